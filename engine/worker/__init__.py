"""The part that imports torch. It runs in child processes only; nothing outside this folder imports it."""

import gc

# Importing the libraries creates hundreds of thousands of objects, nearly all of which stay. With Python's default
# threshold, the cyclic garbage collector visits them again and again, which takes a sixth of the time to import torch,
# transformers and peft.
gc.set_threshold(100_000, 50, 100)
