"""Models, adapters and tokenizers in memory."""
