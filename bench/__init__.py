"""Benchmarks of Athanor against its targets: `python -m bench`. See README.md in this folder."""
