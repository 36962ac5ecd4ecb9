"""What Athanor knows about fine-tuning. Plain modules without torch or gradio; see docs/architecture.md."""
