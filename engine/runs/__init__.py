"""Runs: submitting, queueing, supervising, watching and comparing them, all based on their folders."""
