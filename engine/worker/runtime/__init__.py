"""What all worker processes share: their beginning and end, their imports, their children."""
