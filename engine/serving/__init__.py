"""Chat servers: starting, asking and ending them; conversations as values."""
