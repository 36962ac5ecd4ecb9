"""The settings of an evaluation by part: questions, generation of answers, tasks of lm-evaluation-harness, judge."""

from __future__ import annotations

from typing import Literal

from engine.spec.parts import Part, setting


class Questions(Part):
    """The questions: which data sets, and which rows of them."""

    datasets: list[str] = setting(
        [],
        "Data sets",
        "Held-out rows: questions with reference answers.",
        essential=True,
        max_length=100,
    )
    dataset_dir: str = setting("data", "Data folder", "Folder that contains dataset_info.json.", max_length=1024)
    max_samples: int | None = setting(
        200,
        "Rows",
        "Number of rows sampled from all data sets together. Leave empty for all.",
        essential=True,
        ge=1,
        le=100_000,
    )
    seed: int = setting(42, "Sampling seed", "The same seed picks the same rows.", ge=0, le=2**32 - 1)
    without_references: bool = setting(
        False,
        "Evaluate without references",
        "Without references, only the length of the answers and the share of completed answers can be measured.",
    )


class Generation(Part):
    """How answers are generated."""

    max_new_tokens: int = setting(
        256, "Max answer length", "In tokens. Longer answers are cut off here.", essential=True, ge=1, le=10**5
    )
    temperature: float = setting(
        0.0,
        "Temperature",
        "0 always picks the most likely token, so that results are reproducible.",
        ge=0,
        le=10,
    )
    top_p: float = setting(
        1.0, "Top-p", "Samples only from the most likely tokens that add up to this probability.", gt=0, le=1
    )
    thinking: bool = setting(
        True,
        "Think before answering",
        "Off: without reasoning, for models whose template can switch it off. Metrics only look at the answer after "
        "the reasoning.",
    )
    samples: int = setting(
        1,
        "Answers per row",
        "With several, and a temperature above 0, a data set of right answers has more of the rows. Metrics only "
        "look at the first.",
        ge=1,
        le=64,
    )
    seed: int = setting(42, "Seed", "Random seed for sampling; each row gets its own.", ge=0, le=2**31)
    batch_size: int = setting(16, "Batch size", "Answers generated at the same time.", ge=1, le=256)


class Harness(Part):
    """Tasks of lm-evaluation-harness, if that package is installed: YAML files in harness/ in the data folder."""

    tasks: list[str] = setting(
        [],
        "lm-evaluation-harness tasks",
        "Names of tasks whose files and data are in harness/ in the data folder.",
        essential=True,
        max_length=100,
    )
    num_fewshot: int | None = setting(
        None,
        "Few-shot examples",
        "Solved examples before each question. Leave empty for the task's own number. A task that sets 0 "
        "stays zero-shot.",
        ge=0,
        le=64,
    )
    limit: int | None = setting(
        None,
        "Questions per task",
        "Takes this many from the start of each task. Leave empty for all.",
        ge=1,
        le=1_000_000,
    )
    apply_chat_template: bool = setting(
        True,
        "Use the chat template",
        "Asks each question as a user turn if the model has a template. Off: as plain text that the model continues.",
    )


class Judge(Part):
    """A model that scores the answers, and what its scores are compared with."""

    model: str = setting(
        "",
        "Judge",
        "A model folder, or the ID or result folder of a finished run. It scores each answer from 1 to 5. Leave empty "
        "for none.",
        essential=True,
        max_length=1024,
    )
    quantization: Literal["none", "8bit", "4bit"] = setting(
        "none", "Quantization", "Of a model folder's weights; a finished run is loaded as it was trained."
    )
    language: Literal["en", "zh"] = setting("en", "Language", "Of the prompt for the judge.")
    criterion: str = setting(
        "",
        "Criterion",
        "What makes an answer good. Leave empty for the default: correct, complete and helpful.",
        max_length=4000,
    )
    reason: bool = setting(
        True, "Ask for a reason", "The judge writes a sentence before each score. Off: only the score, which is faster."
    )
    compare: bool = setting(
        True,
        "Compare in pairs",
        "The judge also compares each model's answers with those of the base, or of the first model, in both orders.",
    )
    max_input_tokens: int = setting(
        3072,
        "Max input length",
        "In the judge's tokens: question, reference and answers together. What is longer is cut, and counted.",
        ge=64,
        le=10**6,
    )
    max_reason_tokens: int = setting(
        96, "Max reason length", "In tokens. Raise it for a judge that reasons before it answers.", ge=8, le=10**5
    )
    ratings: list[str] = setting(
        [],
        "Rated answers",
        "Data sets of answers with thumbs, or of preferences, such as those from the Chat tab. The judge is compared "
        "with them.",
        max_length=100,
    )
