"""What every worker process has in common: its beginning and end, what it imports, its children."""
