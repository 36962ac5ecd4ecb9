"""Evaluation of answers: questions, metrics, confidence intervals, the report."""
