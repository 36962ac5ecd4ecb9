"""The page. It knows gradio and engine's plain modules, and nothing of torch."""

from webui import gradio_import  # noqa: F401  # before any module of the page imports gradio
