"""Checks before a run starts: obstacles, limits, memory, packages, remarks."""
