"""Answers measured: questions, metrics, confidence intervals, the report."""
