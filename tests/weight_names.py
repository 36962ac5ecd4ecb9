"""Has transformers compile its nine hundred patterns for names of weights, which it would do anew in each process that
loads or saves a model."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen2")
