"""All ways in which a key of LLaMA-Factory is taken whose value changes its form: name, as the table has it → function.

A way is `(draft, name, value) -> None`: it puts what it can into the draft, and tells what it cannot. What it means there
was read in LLaMA-Factory 0.9.5 and its main branch of August 2026 (src/llamafactory/hparams and the trainers).
"""

from engine.importer import ways_data, ways_model, ways_training

WAYS = ways_model.WAYS | ways_data.WAYS | ways_training.WAYS
