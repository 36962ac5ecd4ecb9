"""The page. It uses gradio and the engine's plain modules, but not torch."""

from webui import gradio_import  # noqa: F401  # before any module of the page imports gradio
