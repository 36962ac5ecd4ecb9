"""The words of a command → what it starts, with which settings, on which GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.core.problems import Refusal
from engine.importer.draft import Draft, as_list
from engine.importer.sharding_converters import CONVERTERS as SHARDING_CONVERTERS
from engine.importer.sharding_converters import fsdp_key
from engine.importer.shell import ASSIGNMENT
from engine.importer.table import Entry, entries
from engine.spec.run_spec import RunSpec
from engine.spec.yaml_text import read_yaml

CLI_NAMES = ("llamafactory-cli", "lmf", "axolotl")
LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "python", "python3", "srun", "mpirun", "ray")
# Scripts of older versions of LLaMA-Factory, by the beginning of their name.
VERB_OF_SCRIPT = (
    ("export", "export"), ("cli_demo", "chat"), ("api", "api"), ("web", "webchat"), ("evaluate", "eval"),
    ("train_web", "webui"), ("chat", "chat"), ("train", "train"),
)  # fmt: skip
VERBS = (
    "train",
    "export",
    "chat",
    "api",
    "webchat",
    "webui",
    "eval",
    "env",
    "version",
    "preprocess",
    "inference",
    "merge-lora",
)
SETTINGS_SUFFIXES = (".yaml", ".yml", ".json")
SECRET_NAME = re.compile(r"token|key|secret|passw", re.I)
# Variables that libraries read; others are the script's own.
LIBRARY_VARIABLE = re.compile(
    r"(NCCL|WANDB|HF|HUGGING|TORCH|CUDA|PYTORCH|SWANLAB|MLFLOW|TRANSFORMERS"
    r"|TRITON|VLLM|MODELSCOPE|RAY|ASCEND|HCCL|GLOO|TRACKIO)_?\w*"
)


@dataclass
class Launch:
    """A command. `verb` is LLaMA-Factory's verb ("" if there is none); `settings` are names and values as written,
    `files` contain more of them; `flags` and `environment` are the launcher's."""

    verb: str = ""
    axolotl: bool = False
    program: str = ""  # the launcher: accelerate, torchrun, …
    settings: list[tuple[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    flags: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    words: Sequence[str] = ()


def read_command(words: Sequence[str], exported: Mapping[str, str]) -> Launch | None:
    """What a command starts; None if it has nothing to do with training (`cd`, `pip install`)."""
    environment, rest = dict(exported), list(words)
    while rest and (rest[0] in ("env", "nohup", "time", "sudo", "exec") or ASSIGNMENT.fullmatch(rest[0])):
        if assigned := ASSIGNMENT.fullmatch(rest[0]):
            environment[assigned[1]] = assigned[2]
        rest = rest[1:]
    at = _program_index(rest)
    launch = Launch(environment=environment, words=words)
    if at is None:
        # Words whose beginning was not copied: flags, or the verb and flags.
        if not rest or not (rest[0].startswith("--") or rest[0] in ("train", "export")):
            return None
        bare = rest[0] in ("train", "export")
        launch.verb = rest[0] if bare else ""
        _add_arguments(launch, rest[bare:])
        return launch
    launch.axolotl = "axolotl" in rest[at]
    names = [word.rpartition("/")[2] for word in rest[:at]]
    start = next((index for index, name in enumerate(names) if name in LAUNCHERS), at)
    launch.program = names[start] if start < at else ""
    launch.flags = dict(parse_flags(rest[start:at])[0])
    if re.search(r"(^|[/\\])scripts[/\\]", rest[at]):
        launch.verb = rest[at]  # of LLaMA-Factory's own helpers, which train nothing
        return launch
    script, behind = rest[at], rest[at + 1 :]
    if script.rpartition("/")[2].removesuffix(".exe") in CLI_NAMES or script.endswith("llamafactory.cli"):
        launch.verb, behind = (behind[0], behind[1:]) if behind and behind[0] in VERBS else ("", behind)
    else:
        name = script.replace("\\", "/").rpartition("/")[2].removesuffix(".py").rpartition(".")[2]
        launch.verb = next((verb for begin, verb in VERB_OF_SCRIPT if name.startswith(begin)), "train")
    launch.verb = {"preprocess": "train", "merge-lora": "export", "inference": "chat"}.get(launch.verb, launch.verb)
    _add_arguments(launch, behind)
    return launch


def _program_index(words: Sequence[str]) -> int | None:
    """The position of the started program, after the launcher and its flags."""
    for index, word in enumerate(words):
        name = word.replace("\\", "/").rpartition("/")[2].removesuffix(".exe")
        if name in CLI_NAMES or word.endswith(".py"):
            return index
        if (
            index
            and words[index - 1] in ("-m", "--module")
            and ("axolotl" in word or re.match(r"llamafactory|llmtuner", word))
        ):
            return index
    return None


def _add_arguments(launch: Launch, words: Sequence[str]) -> None:
    """Files and `key=value` before the first flag; then flags."""
    first = next((index for index, word in enumerate(words) if _is_flag(word)), len(words))
    for word in words[:first]:
        name, equals, value = word.partition("=")
        if equals and re.fullmatch(r"[+~]*[\w.]+", name):
            launch.settings.append((name.lstrip("+~"), parse_value(value)))
        elif word.lower().endswith(SETTINGS_SUFFIXES):
            launch.files.append(word)
    flag_settings, files = parse_flags(words[first:])
    launch.settings += flag_settings
    launch.files += files


def _is_flag(word: str) -> bool:
    return bool(re.match(r"--?[a-zA-Z]", word))  # and not -1, which is a value


def parse_flags(words: Sequence[str]) -> tuple[list[tuple[str, Any]], list[str]]:
    """`--a 1 --b=2 --c --d x y` becomes a: 1, b: 2, c: true, d: "x,y"; words before the first flag belong to no flag.
    Also returns the files in `--c x.yaml key=value`, which follow a switch."""
    words_by_flag: list[tuple[str, list[str]]] = []
    files: list[str] = []
    for word in words:
        if _is_flag(word):
            name, equals, value = word.lstrip("-").partition("=")
            words_by_flag.append((name.replace("-", "_"), [value] if equals else []))
        elif re.fullmatch(r"[a-z_]+=\S*", word) and words_by_flag and words_by_flag[-1][1]:
            name, _, value = word.partition("=")
            words_by_flag.append((name, [value]))
        elif words_by_flag:
            words_by_flag[-1][1].append(word)
    return [(name, parse_value(",".join(values)) if values else True) for name, values in words_by_flag], files


def parse_value(word: str) -> Any:
    """The value as YAML reads it; text if YAML cannot read it."""
    try:
        return read_yaml(word)
    except Refusal:
        return word


# ------------------------------------------------------------------------------------------ hardware


def put_hardware(draft: Draft, launch: Launch) -> None:
    """The devices according to launcher and environment; each of their words is used or noted."""
    table, gpus = entries("launchers"), []
    processes: Any = None
    for name, value in [*launch.flags.items(), *launch.environment.items()]:
        entry = table.get(name)
        path = entry.path("") if entry else ""
        if path == "hardware.devices":
            gpus = _gpu_numbers(draft, name, value)
        elif path == "hardware.num_processes":
            if isinstance(count := parse_value(str(value)), int):
                processes = count
        elif path == "hardware.device":
            draft.put(path, "cpu", name)
        elif entry and path == "hardware.strategy":
            SHARDING_CONVERTERS[entry.converter](draft, name, value)
        elif name.startswith("fsdp_"):
            fsdp_key(draft, name, value)
        elif path == "training.precision":
            if value in ("bf16", "fp16") and draft.get(path) is None:
                draft.put(path, value)
        elif path == "model.hub":
            if str(value) in ("1", "true", "True"):
                draft.put(path, "modelscope")
        elif entry or name in launch.flags or LIBRARY_VARIABLE.fullmatch(name):
            _note_flag(draft, name, value, entry, launch)
    count = processes if processes is not None else len(gpus)
    if draft.spec_type is not RunSpec:
        count = min(count, 1)  # chat and export do so on one GPU
    if count:
        draft.put("hardware.num_processes", count, "num_processes")
        draft.put("hardware.devices", gpus[: max(count, 0)])


def _gpu_numbers(draft: Draft, name: str, value: Any) -> list[int]:
    """`0,1`, `localhost:0,1`; what is not the number of a GPU is noted."""
    words = [word.rpartition(":")[2] for word in as_list(str(value).rpartition("@")[2])]
    if all(word.isdecimal() for word in words):
        return [int(word) for word in words]
    if words not in (["-1"], ["all"]):
        draft.note("import-none", name, value, "one-per-card")
    return []


def _note_flag(draft: Draft, name: str, value: Any, entry: Entry | None, launch: Launch) -> None:
    if entry is None and re.match(r"deepspeed|offload|zero", name):
        entry = Entry(none="sharding")
    if entry is None and name.isupper():
        entry = Entry(none="studio-environment", secret=bool(SECRET_NAME.search(name)))
    if entry is None:
        draft.note("import-unknown", name, value, program=launch.program, hint="—")
        return
    draft.note_unused(name, value, entry)
