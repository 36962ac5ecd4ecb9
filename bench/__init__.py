"""What Athanor promises in numbers, measured: `python -m bench`. See README.md here."""
