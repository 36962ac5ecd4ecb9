"""The base of all other packages: problems and their sentences, run folder and lock, this machine, the stages."""
