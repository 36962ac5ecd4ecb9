"""RunSpec: its declaration, reading and writing it, and which settings contradict each other."""
