"""What Athanor knows of fine-tuning. Plain modules: no torch, no gradio; see docs/architecture.md."""
