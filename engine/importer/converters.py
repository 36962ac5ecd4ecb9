"""The converters of all LLaMA-Factory keys whose value changes its form: name, as in the table → function.

A converter is `(draft, name, value) -> None`: it puts what it can into the draft, and notes what it cannot. The meaning
of the keys was read from LLaMA-Factory 0.9.5 and its main branch of August 2026 (src/llamafactory/hparams and the
trainers).
"""

from engine.importer import data_converters, model_converters, sharding_converters, training_converters

CONVERTERS = (
    model_converters.CONVERTERS
    | data_converters.CONVERTERS
    | training_converters.CONVERTERS
    | sharding_converters.CONVERTERS
)
