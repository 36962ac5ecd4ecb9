"""The page. It knows gradio and engine's plain modules, and nothing of torch."""
