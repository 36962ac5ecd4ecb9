"""What lists show of a run, read without validating its spec or reading its curves; cheap enough for 10,000 runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from engine.core import regular_files
from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, RunDir, end_of, read_object
from engine.core.stages import STAGES
from engine.spec.yaml_text import read_yaml

AXES = ("step", "epoch", "time")  # keys of every line of a metrics file that are not metrics
TAIL_BYTES = (1 << 13, 1 << 18)  # last bytes of a metrics file that are searched first, and then
NEWEST_VALUES = 3  # last points of a curve that are searched for a number
MAX_REMEMBERED_CHARACTERS = 1000  # of a part of a spec
# The part of a spec, as written by `Spec.to_yaml`, that lists show: a tenth of its lines, read in a tenth of the time.
_LISTED_PARTS = re.compile(
    r"^(?:stage|model|method|data|harness):\n(?:[ \n].*\n)*|^name:.*\n(?:[ \n].*\n)*", re.MULTILINE
)
_LISTED_LINES = re.compile(
    r"^[a-z]+:.*\n|^  (?:kind|model_name_or_path|datasets|tasks):.*\n(?:  [ -].*\n)*", re.MULTILINE
)


@dataclass(frozen=True)
class RunFacts:
    """Texts are empty if the spec does not contain them or cannot be read."""

    name: str = ""
    base: str = ""  # a folder or a hub ID, as in the spec
    stage: str = ""
    method: str = ""
    data: tuple[str, ...] = ()  # data sets, and the tasks of an evaluation
    result_folder: str = ""  # "adapter" or "model", inside the run's folder; "" without weights
    result_stage: str = ""  # the stage that produced them
    headline: float | None = None  # the newest value of the main curve


def read_facts(run: RunDir, kind: str) -> RunFacts:
    """The current facts of a run of this kind. Never raises: damaged parts are left empty."""
    try:
        return _read_facts(run, kind)
    except Exception:  # whatever is in a file: a list of runs needs an entry for each
        return RunFacts()


def _read_facts(run: RunDir, kind: str) -> RunFacts:
    spec = _listed_parts(run.spec)
    stage = _kind_of(spec.get("stage")) if kind == "training" else ""
    result = run.result()
    return RunFacts(
        name=_text(spec.get("name")),
        base=_text(_mapping(spec.get("model")).get("model_name_or_path")),
        stage=stage,
        method=_kind_of(spec.get("method")) if kind == "training" else "",
        data=(*_names(spec.get("data"), "datasets"), *_names(spec.get("harness"), "tasks")),
        result_folder=result.name if result else "",
        result_stage=_text(read_object(result / RESULT_FILE).get("stage")) if result else "",
        headline=newest_value(run.metrics, headline_curve(kind, stage)),
    )


def headline_curve(kind: str, stage: str) -> str:
    """The name of a run's main curve, which depends on its stage."""
    return STAGES[stage].tells if kind == "training" and stage in STAGES else "loss"


def newest_value(metrics: Path, name: str) -> float | None:
    """The newest number of this curve near the end of a metrics file; None if there is none."""
    for size in TAIL_BYTES:
        try:
            text = end_of(metrics, size)
        except OSError:  # not a file, or not readable
            return None
        values = [value for _, value in zip(range(NEWEST_VALUES), _values_backwards(text, name), strict=False)]
        if values or len(text) < size:
            return next((value for value in values if math.isfinite(value)), None)
    return None


def _values_backwards(text: bytes, name: str) -> Iterator[float]:
    key = b'"' + name.encode() + b'"'
    for line in reversed(text.split(b"\n")):
        if key in line:
            try:
                logged = from_json(line, allow_inf_nan=True)
            except ValueError:  # cut off at either end
                continue
            if isinstance(logged, dict) and name in logged and set(AXES) <= set(logged):
                value = logged[name]
                yield _number(value)


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer with hundreds of digits
        return math.nan


def _listed_parts(path: Path) -> dict[str, Any]:
    """The parts of a spec that lists show, unchecked; {} if it cannot be read."""
    try:
        text = regular_files.read_text(path)
    except (OSError, UnicodeDecodeError):
        return {}
    # A text with line breaks is written with empty lines, and a long key with a question mark: then all of it is read.
    plain_layout = "\n\n" not in text and "  ? " not in text
    listed = [_listed_lines(part) for part in _LISTED_PARTS.findall(text)] if plain_layout else []
    for parts in (listed, [text]):
        try:
            plain = _read_parts(parts)
        except (Refusal, RecursionError):
            continue
        if isinstance(plain.get("model"), dict):
            return plain
    return {}


def _listed_lines(part: str) -> str:
    return part if part.startswith("name:") else "".join(_LISTED_LINES.findall(part))


def _read_parts(parts: list[str]) -> dict[str, Any]:
    """The parts of a spec together. Of thousands of runs, most parts are the same, and each is parsed once."""
    plain: dict[str, Any] = {}
    for part in parts:
        content = _read_part(part) if len(part) < MAX_REMEMBERED_CHARACTERS else read_yaml(part)
        plain |= _mapping(content)
    return plain


@lru_cache(maxsize=512)
def _read_part(part: str) -> Any:
    return read_yaml(part)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _kind_of(value: Any) -> str:
    return _text(_mapping(value).get("kind"))


def _names(part: Any, key: str) -> tuple[str, ...]:
    names = _mapping(part).get(key)
    return tuple(filter(None, map(_text, names))) if isinstance(names, (list, dict)) else ()
