"""Where an installation keeps its things, and the processes that it starts: command lines, environments, their end."""
