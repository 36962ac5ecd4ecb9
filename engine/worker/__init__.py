"""The part that imports torch. It runs in child processes only; nothing outside this folder imports it."""

import gc

# Importing the libraries makes hundreds of thousands of objects, of which nearly
# all stay. At Python's own threshold the cyclic collector goes through them again
# and again: a sixth of the time until torch, transformers and peft are there.
gc.set_threshold(100_000, 50, 100)
