"""Servers that answer: started, asked, ended; conversations as values."""
