"""Answers written by a model, many at once."""
