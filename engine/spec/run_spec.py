"""RunSpec: everything needed to repeat a run, as one value.

Each setting is declared here and nowhere else: its type, default, limits, English label and help. The form, the YAML,
the command line, the validation and docs/spec.md read it from here. Names are those of transformers, peft and TRL. A
part that does not apply is absent: a choice between kinds (`stage`, `method`, `quantization`, `rope_scaling`,
`strategy`) is a union of parts, so a full fine-tuning has no LoRA rank to ignore.

What a spec means on a particular machine is left to `engine.preflight.checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field

from engine.spec.fields import choices_of, fields_of
from engine.spec.hardware_settings import Hardware, TrainingHardware
from engine.spec.method_settings import AnyMethod, Lora
from engine.spec.model_settings import Model
from engine.spec.parts import OneOf, Part, named_weights, setting
from engine.spec.stage_settings import AnyStage, Sft
from engine.spec.vision_settings import Vision
from engine.spec.yaml_text import read_yaml, write_yaml

MAX_NAME_LENGTH = 80  # characters of a run's name
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy",
]  # fmt: skip
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "adafactor", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "sgd", "adagrad", "rmsprop",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_8bit",
    "paged_ademamix_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise",
    "lomo", "adalomo", "grokadamw", "stable_adamw", "schedule_free_adamw", "schedule_free_sgd",
    "schedule_free_radam", "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_xla",
    "adamw_torch_npu_fused",
]  # fmt: skip


class Data(Part):
    """Data: what the model learns from."""

    datasets: Annotated[
        dict[str, Annotated[float, Field(gt=0, le=1000)]],
        BeforeValidator(named_weights, json_schema_input_type=list[str] | dict[str, float]),
    ] = setting(
        {},
        "Data sets",
        "Names from dataset_info.json, with weights: 2 uses each row twice per epoch, 0.5 uses half of the rows.",
        essential=True,
    )
    dataset_dir: str = setting("data", "Data folder", "Folder that contains dataset_info.json.", max_length=1024)
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = setting(
        "concat",
        "Mixing",
        "Uses all rows, repeated according to the weights, or interleaves the sets: the next row comes from a random "
        "one, with the weights as probabilities, until one set is used up, or all are.",
    )
    max_samples: int | None = setting(
        None,
        "Max rows",
        "Uses only the first rows of each data set, at most this many. Leave empty for all.",
        ge=1,
        le=10**10,
    )
    max_length: int = setting(
        2048,
        "Max length",
        "Maximum length of an example in tokens. Longer rows are truncated or dropped, and counted.",
        essential=True,
        ge=8,
        le=10**7,
    )
    too_long: Literal["cut_end", "cut_start", "drop"] = setting(
        "cut_end",
        "Over-length rows",
        "Truncating the end drops the last turns that do not fit, and truncates the first answer if necessary. "
        "Keeping the end drops the oldest turns after the system message.",
    )
    end_last_answer: bool = setting(
        True,
        "Add missing end token",
        "Some chat templates write nothing after the last answer. This adds the stop token there and trains "
        "on it; otherwise the model would not learn to stop.",
    )
    train_empty_thoughts: bool = setting(
        True,
        "Train on empty thinking",
        "Templates of thinking models write an empty thinking block (<think></think>) before an answer "
        "without reasoning. On: it is trained on, and the model learns not to think. Off: it is only "
        "context, as in a chat with thinking off.",
    )
    skip_bad_rows: bool = setting(
        False,
        "Skip bad rows",
        "Rows with problems are skipped and counted. Off: a run does not start if there are any.",
    )
    preprocessing_num_workers: int | None = setting(
        None,
        "Preprocessing workers",
        "Processes that turn rows into tokens before training. Leave empty to use all cores.",
        ge=1,
        le=256,
    )
    packing: bool = setting(
        False, "Packing", "Puts several short examples into one sequence; they cannot see each other."
    )
    image_max_pixels: int | None = setting(
        None,
        "Max image pixels",
        "Larger images are scaled down to so many pixels, width times height: fewer tokens, less memory and time. For "
        "models whose images have as many tokens as pixels allow, such as Qwen-VL. Leave empty for the model's own "
        "limit. Saved with the result.",
        ge=1024,
        le=10**8,
    )
    image_min_pixels: int | None = setting(
        None,
        "Min image pixels",
        "Smaller images are scaled up to so many pixels. Leave empty for the model's own limit.",
        ge=1024,
        le=10**8,
    )
    group_by_length: bool = setting(
        True,
        "Group by length",
        "Puts examples of similar length into the same batch to reduce padding; each is still seen once per "
        "epoch. Only without packing.",
    )
    validation_share: float = setting(
        0.0,
        "Validation share",
        "Share of the rows held out for validation. 0 means none.",
        ge=0,
        lt=1,
    )
    validation_rows: int | None = setting(
        None,
        "Validation rows",
        "Number of rows to hold out instead, across all data sets. Leave empty to use the share above.",
        ge=1,
        le=10**9,
    )
    eval_datasets: list[str] = setting(
        [], "Validation sets", "Separate data sets for validation, instead of a share of the training rows."
    )


class Training(Part):
    """Training: how long, how fast, in what precision."""

    num_train_epochs: float = setting(
        3.0, "Epochs", "How many times the model sees the data.", essential=True, gt=0, le=100_000
    )
    max_steps: int | None = setting(
        None,
        "Max steps",
        "Stops after this many optimizer steps, regardless of the number of epochs.",
        ge=1,
        le=10**9,
    )
    learning_rate: float = setting(
        1e-4,
        "Learning rate",
        "LoRA: 5e-5 to 2e-4, for tiny models up to 2e-3. Full: 1e-6 to 2e-5.",
        essential=True,
        gt=0,
        le=1,
    )
    per_device_train_batch_size: int = setting(
        2,
        "Batch size",
        "Examples per device and forward pass; for PPO and GRPO, answers.",
        essential=True,
        ge=1,
        le=65536,
    )
    gradient_accumulation_steps: int = setting(
        8,
        "Gradient accumulation",
        "Forward passes per optimizer step. Same effect as a larger batch, with less memory.",
        essential=True,
        ge=1,
        le=65536,
    )
    lr_scheduler_type: Scheduler = setting("cosine", "Schedule", "How the learning rate changes during training.")
    warmup_steps: float = setting(
        0.0,
        "Warm-up",
        "Steps over which the learning rate rises; below 1, a share of all steps.",
        ge=0,
        le=10**9,
    )
    optim: Optimizer = setting("adamw_torch", "Optimizer", "8-bit and paged optimizers save GPU memory.")
    weight_decay: float = setting(0.0, "Weight decay", "Pulls the weights towards zero.", ge=0, le=10)
    max_grad_norm: float = setting(
        1.0,
        "Max gradient norm",
        "Gradients with a larger norm are clipped to it. 0 means never.",
        ge=0,
        le=10**6,
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "Precision", "Auto: bf16 if the GPU supports it, else fp16; fp32 on a CPU."
    )
    gradient_checkpointing: bool = setting(
        True,
        "Activation checkpointing",
        "Recomputes activations in the backward pass: less memory, about 30 % slower.",
    )
    neftune_noise_alpha: float | None = setting(
        None,
        "NEFTune noise",
        "Noise on the embeddings (Jain et al. 2023), typically 5. Leave empty for none.",
        gt=0,
        le=1000,
    )
    per_device_eval_batch_size: int = setting(
        2, "Validation batch size", "Examples per device during validation.", ge=1, le=65536
    )
    seed: int = setting(42, "Seed", "The same seed on the same machine gives the same run.", ge=0, le=2**32 - 1)


class Logging(Part):
    """Logging and checkpoints: what is written down, and how often."""

    logging_steps: int = setting(5, "Log every", "Optimizer steps between two points on the curves.", ge=1, le=10**9)
    eval_strategy: Literal["steps", "epoch"] = setting(
        "steps", "Validate by", "At a fixed interval of steps, or at the end of each epoch."
    )
    eval_steps: int = setting(
        100,
        "Validate every",
        "Optimizer steps between two validations. The first is done before training, except with PPO and GRPO.",
        ge=1,
        le=10**9,
    )
    save_strategy: Literal["steps", "epoch", "no"] = setting(
        "steps",
        "Save by",
        "A checkpoint at a fixed interval of steps, at the end of each epoch, or never. The result is always saved.",
    )
    save_steps: int = setting(100, "Save every", "Optimizer steps between two checkpoints.", ge=1, le=10**9)
    save_total_limit: int | None = setting(
        2,
        "Checkpoints to keep",
        "The newest n (plus the best one, if it is kept). Leave empty for all.",
        ge=1,
        le=10**6,
    )
    load_best_model_at_end: bool = setting(
        False,
        "Keep the best model",
        "The result is the checkpoint that did best in validation: lowest loss, or highest reward in stages "
        "that score answers. Needs validation data.",
    )
    early_stopping_patience: int | None = setting(
        None,
        "Early stopping",
        "Stops after this many validations without improvement. Leave empty to turn it off.",
        ge=1,
        le=10**6,
    )
    report_to: list[Literal["tensorboard", "wandb", "swanlab", "mlflow", "comet_ml", "clearml", "trackio"]] = setting(
        [], "Report to", "Experiment trackers besides Athanor's own curves. Each needs its own package."
    )
    watch: Literal["warn", "stop", "off"] = setting(
        "warn",
        "If the loss goes wrong",
        "If the loss is exactly 0 for several points, or rises far above its best: show a warning on the run's "
        "page, or save a checkpoint and stop the run. Not for PPO and GRPO, whose loss says little. A loss of NaN "
        "or infinity always stops the run.",
    )
    stall_minutes: float = setting(
        30.0,
        "Stall warning after",
        "Minutes without a new step after which the run's page shows a warning, and what each process is doing is "
        "written to stalled.txt in the run's folder. The run is not stopped. Loading and the first step may take "
        "three times as long. 0 turns it off.",
        ge=0,
        le=100_000,
    )
    plot_loss: bool = setting(True, "Plot the loss", "Saves training_loss.png next to the result.")
    probe: bool = setting(
        True,
        "Probe at the end",
        "SFT only: asks a few training and general prompts before and after training, and reports what was "
        "learned and what was forgotten. Takes a tenth of the run's time, at most half a minute, with at "
        "least one prompt of each kind.",
    )


class Spec(Part):
    """A whole spec: everything needed to repeat a run of one kind. Each has a name, a model and hardware; `shelf` is
    the folder inside the model's folder that contains such runs."""

    if TYPE_CHECKING:  # each kind of run declares them itself, at their places among its settings
        kind: ClassVar[str]
        name: str
        model: Model
        hardware: Hardware

    @property
    def shelf(self) -> str:
        return self.kind

    def named(self, name: str) -> Self:
        """The spec itself if it has a name; otherwise a copy called `name`, cut to the maximum length."""
        return self if self.name.strip() else self.change("name", name[:MAX_NAME_LENGTH])

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """A spec from YAML. Raises Refusal, with line and column if the text is not valid YAML."""
        return cls.read(read_yaml(text))

    def to_yaml(self, *, brief: bool = False) -> str:
        """YAML from which `from_yaml` reads an equal spec. `brief` leaves out defaults."""
        return write_yaml({"kind": self.kind} | self.model_dump(mode="json", exclude_defaults=brief))

    def change(self, path: str, value: Any) -> Self:
        """A copy in which the field at `path` ("training.seed") is `value`. Raises Refusal as `read` does."""
        plain = self.model_dump()
        *parents, last = path.split(".")
        inner = plain
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        return self.read(plain)


class RunSpec(Spec):
    """Everything needed to repeat a training."""

    kind: ClassVar[str] = "training"
    name: str = setting(
        "", "Run name", "A few words to help you find the run later. Optional.", max_length=MAX_NAME_LENGTH
    )
    stage: OneOf[AnyStage] = setting(Sft(), "Stage", "What kind of training this is.", essential=True)
    model: Model = Field(default_factory=Model)
    method: OneOf[AnyMethod] = setting(Lora(), "Method", "Which weights are trained.", essential=True)
    vision: Vision = Field(default_factory=Vision)
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    logging: Logging = Field(default_factory=Logging)
    hardware: TrainingHardware = Field(default_factory=TrainingHardware)
    extra: dict[str, Any] = setting(
        {},
        "Extra arguments",
        "Any other argument of the trainer's configuration class, as YAML, such as adam_beta2: 0.95",
    )

    @property
    def shelf(self) -> str:
        return self.method.kind

    def to_yaml(self, *, brief: bool = False) -> str:
        plain: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=brief)
        if brief:
            kinds: dict[str, Any] = {
                "stage": {"kind": self.stage.kind},
                "method": {"kind": self.method.kind},
            }
            plain = kinds | plain
            for path in SPEC_CHOICES:
                _add_kind(plain, self, path.split("."))
        return write_yaml(plain)


def _add_kind(plain: dict[str, Any], part: Any, steps: Sequence[str]) -> None:
    """Put the kind of a choice, which is a default of its part, first among the settings of it that are there."""
    name, *inner = steps
    if name not in plain:
        return
    if inner:
        _add_kind(plain[name], getattr(part, name), inner)
    else:
        plain[name] = {"kind": getattr(part, name).kind} | plain[name]


SPEC_CHOICES = choices_of(RunSpec)


@cache
def union_of(path: str) -> str | None:
    """The union whose kinds the setting belongs to: "method.r" → "method"."""
    return next((union for union in SPEC_CHOICES if path.startswith(f"{union}.")), None)


def fields(whole: type[Part] = RunSpec) -> dict[str, Any]:
    """Every setting of a whole: path → pydantic's FieldInfo, in the order of declaration."""
    return fields_of(whole)
