"""What is looked at before a run starts: obstacles, limits, memory, packages, remarks."""
