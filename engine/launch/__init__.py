"""Where an installation keeps its files, and the processes that it starts: command lines, environments, their end."""
