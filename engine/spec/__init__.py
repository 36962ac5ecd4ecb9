"""RunSpec: what is declared, how it is read and written, and which settings contradict each other."""
