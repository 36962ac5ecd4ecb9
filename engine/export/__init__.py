"""The spec of an export, and the formats of other programs: Ollama, vLLM, GGUF."""
