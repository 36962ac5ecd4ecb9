"""Facts about model folders: configuration, safetensors headers, adapters, chat templates, vocabulary."""
