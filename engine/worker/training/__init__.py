"""The trainers of all stages, and what happens at each of their steps."""
