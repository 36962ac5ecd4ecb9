"""Runs: submitted, queued, supervised, watched, compared; all of it read from their folders."""
