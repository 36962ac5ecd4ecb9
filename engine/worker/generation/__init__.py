"""Generation of answers by a model, many at once."""
