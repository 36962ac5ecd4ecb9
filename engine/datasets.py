"""Finds, reads and validates data sets, and says exactly what is wrong with them and where.

A catalogue is a folder with a `dataset_info.json`, as LLaMA-Factory's users have it. Whatever its files look like
(alpaca, sharegpt, openai; json, jsonl, csv, tsv, parquet, txt), `examples` yields one canonical form:

    text    {"text": str}
    chat    {"messages": [{"role", "content", "tool_calls"?, "reasoning_content"?}, ...], "tools": [...] | None}
    pairs   {"messages": prompt, "chosen": [message], "rejected": [message], "tools": ...}
    thumbs  {"messages": prompt and answer, "label": bool, "tools": ...}
    prompts {"messages": prompt, "answer": str | None, "tools": ...}; any of the three above, read for its questions

A row that does not fit is a Problem with file and line, and the others go on. Tokens are left to `engine.worker`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import rowfiles
from engine.encodings import known_encoding
from engine.problems import Problem, Refusal, problem
from engine.rowfiles import SUFFIXES, Entry, OnBad, Place, type_of
from engine.stages import Form, Kind

PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".xlsx")  # what an upload is unpacked from
INFO_FILE = "dataset_info.json"

Example = dict[str, Any]

# LLaMA-Factory's defaults, which users' files rely on. Where an entry gives columns, those it leaves out do not exist.
COLUMNS = {
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history",
        "tools": "tools", "chosen": "chosen", "rejected": "rejected",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected"},
    "openai": {"messages": "messages", "tools": "tools", "chosen": "chosen", "rejected": "rejected"},
}  # fmt: skip
TAGS = {
    "sharegpt": {
        "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
    },
    "openai": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
    },
}  # fmt: skip
MAY_FOLLOW = {  # who may speak after whom; "call" is an assistant's call of tools
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",),
    "call": ("tool",), "tool": ("tool", "assistant"),
}  # fmt: skip
SPLITS = {  # what the names of files call them
    "train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """One entry of a catalogue. `problem` says why it cannot be used; `hub` is the id of one that is not on disk."""

    name: str
    kind: Kind = "chat"
    formatting: str = "alpaca"
    files: tuple[Path, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    hub: str = ""
    subset: str = ""
    split: str = "train"
    encoding: str = ""  # what a person says its files are written in; "" = as they show or as detected
    problem: Problem | None = None


# ------------------------------------------------------------------------------------------ catalogue


def read_catalogue(data_dir: Path) -> tuple[list[Dataset], list[Problem]]:
    """The data sets of a folder, in the order of its file, and what is wrong with the file as a whole.

    An entry that cannot be used stays in the list with its `problem`. Never raises on what users may have written.
    """
    path = data_dir / INFO_FILE
    if not path.is_file():
        return [], [problem("catalogue-missing", file=str(path))]
    try:
        entries = json.loads(rowfiles.read_text(path))
    except (RecursionError, ValueError) as error:
        return [], [problem("catalogue-broken", file=str(path), **rowfiles.where_broken(error))]
    except OSError as error:
        return [], [problem("data-file-unreadable", file=str(path), why=error.strerror or error)]
    except Refusal as refusal:
        return [], refusal.problems
    if not isinstance(entries, dict):
        return [], [problem("catalogue-not-object", file=str(path), found=type_of(entries))]
    return [dataset_of(data_dir, name, entry) for name, entry in entries.items()], []


def find(data_dir: Path, name: str) -> Dataset:
    """One data set of a folder. Raises Refusal if it is not there, or if the catalogue is broken."""
    found, broken = read_catalogue(data_dir)
    for dataset in found:
        if dataset.name == name:
            return dataset
    raise Refusal(broken or problem("set-unknown", name=name))


def dataset_of(data_dir: Path, name: str, entry: Any) -> Dataset:
    """What an entry of the catalogue says, with the problem in it if it cannot be used. Raises nothing."""
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a character, which no page and no file could hold
        name = name.encode(errors="backslashreplace").decode()
        return Dataset(name, problem=problem("set-name-half", name=name))
    try:
        return _read_entry(data_dir, name, entry)
    except Refusal as refusal:
        return Dataset(name, problem=refusal.problems[0])
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a name too long, or with a NUL in it; links in a circle
        values = {"key": "file_name", "expected": "file name", "found": error}
        return Dataset(name, problem=problem("entry-value", name=name, **values))


def _read_entry(data_dir: Path, name: str, entry: Any) -> Dataset:
    _expect(entry, dict, "entry-value", name=name, key="", expected="object")
    shapes: dict[str, tuple[type, str]] = {
        "file_name": (str, "string"), "formatting": (str, "string"), "columns": (dict, "object"),
        "tags": (dict, "object"), "num_samples": (int, "number"), "ranking": (bool, "true/false"),
        "encoding": (str, "string"),
    }  # fmt: skip
    for key, (shape, expected) in shapes.items():
        if entry.get(key) is not None:
            _expect(entry[key], shape, "entry-value", name=name, key=key, expected=expected)
    for tag, written in (entry.get("tags") or {}).items():
        if written is not None:
            _expect(written, str, "entry-value", name=name, key=f"tags.{tag}", expected="string")
    if entry.get("num_samples") is not None and entry["num_samples"] < 1:
        raise Refusal(
            problem("entry-value", name=name, key="num_samples", expected="≥ 1", found=entry["num_samples"])
        )
    hub = next((entry[key] for key in ("hf_hub_url", "ms_hub_url", "om_hub_url") if entry.get(key)), "")
    if not entry.get("file_name") and not hub:
        raise Refusal(problem("entry-without-file", name=name, keys=_names(entry)))
    files = ()
    if entry.get("file_name"):
        subset, split = (str(entry.get(key) or "") for key in ("subset", "split"))
        files = _of_split(name, _files(data_dir, name, entry["file_name"], subset), split)
    encoding = known_encoding(entry["encoding"]) if entry.get("encoding") else ""
    # An entry that says nothing about its rows is believed to be what its first row looks like.
    if files and not {"formatting", "columns"} & set(entry):
        if wrong := unreadable(files[0], encoding):
            return Dataset(name, files=files, encoding=encoding, problem=wrong)
        entry = guess(files[0], encoding) | entry
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in COLUMNS:
        raise Refusal(problem("entry-formatting", name=name, found=formatting, known=_names(COLUMNS)))
    given = {key: column for key, column in (entry.get("columns") or {}).items() if isinstance(column, str)}
    columns = given or COLUMNS[formatting]
    if formatting != "alpaca":
        columns = {"messages": COLUMNS[formatting]["messages"], **columns}
    return Dataset(
        name=name,
        kind=_kind(entry, formatting, columns, files),
        formatting=formatting,
        files=files,
        columns=columns,
        tags=TAGS.get(formatting, {}) | (entry.get("tags") or {}),
        num_samples=entry.get("num_samples"),
        hub="" if files else str(hub),
        subset=str(entry.get("subset") or ""),
        split=str(entry.get("split") or "train"),
        encoding=encoding,
    )


def _kind(
    entry: Mapping[str, Any], formatting: str, columns: Mapping[str, str], files: Sequence[Path]
) -> Kind:
    if entry.get("ranking"):
        return "pairs"
    if "kto_tag" in columns:
        return "thumbs"
    if formatting == "alpaca" and ("response" not in columns or any(file.suffix == ".txt" for file in files)):
        return "text"
    return "chat"


def _files(data_dir: Path, name: str, file_name: str, subset: str) -> tuple[Path, ...]:
    """A file, or those of a folder; of the folder in it that is called `subset`, if one is wanted.

    Raises Refusal if nothing is there, or if it is outside of the data folder once links are followed.
    """
    root, path = data_dir.resolve(), data_dir / file_name / subset
    if not path.resolve().is_relative_to(root):
        raise Refusal(problem("file-outside", name=name, file=file_name, folder=str(data_dir)))
    if not path.exists():
        raise Refusal(problem("file-missing", name=name, file=str(path)))
    if path.suffix.lower() in PACKED:
        raise Refusal(problem("file-packed", name=name, file=str(path), known=_names(SUFFIXES)))
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = tuple(file for file in found if file.is_file() and file.suffix.lower() in SUFFIXES)
    if not files:
        raise Refusal(problem("file-format", name=name, file=str(path), known=_names(SUFFIXES)))
    for file in files:
        try:
            file.name.encode()
        except UnicodeEncodeError:
            shown = file.name.encode(errors="backslashreplace").decode()
            raise Refusal(problem("file-name-half", name=name, file=shown)) from None
        if not file.resolve().is_relative_to(root):
            raise Refusal(problem("file-outside", name=name, file=file.name, folder=str(data_dir)))
    return files


def _of_split(name: str, files: tuple[Path, ...], split: str) -> tuple[Path, ...]:
    """Those of `split`, told by their names as the datasets library does it: test-00000-of-00002.parquet, my_test.json.

    Where none is wanted they are the ones for training, or all if no name says so. Raises Refusal for a wanted split
    that no file has.
    """
    wanted = split or "train"
    words = "|".join(map(re.escape, SPLITS.get(wanted, (wanted,))))
    named = re.compile(
        rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])", re.IGNORECASE
    )  # no letter before or after it
    found = tuple(file for file in files if named.search(file.stem))
    if split and split != "train" and not found:
        raise Refusal(problem("split-missing", name=name, split=split, files=_names(f.name for f in files)))
    return found or files


def unreadable(file: Path, encoding: str = "") -> Problem | None:
    """Why no row of a file can be read, if that is so."""
    _, first = next(rowfiles.entries(file, encoding=encoding), (None, None))
    whole = isinstance(first, Problem) and first.code.startswith(("file-", "data-file-"))
    return first if whole else None


def guess(file: Path, encoding: str = "") -> dict[str, Any]:
    """What to write into dataset_info.json for a file, going by its first row. {} where that tells nothing."""
    row = next((row for _, row in rowfiles.entries(file, encoding=encoding) if isinstance(row, dict)), {})
    for formatting, role_tag in (("sharegpt", "from"), ("openai", "role")):
        for column in ("messages", "conversations"):
            turns = _parsed(row.get(column))
            if isinstance(turns, list) and turns and isinstance(turns[0], dict) and role_tag in turns[0]:
                optional = {key: key for key in ("system", "tools") if key in row}
                return {"formatting": formatting, "columns": {"messages": column, **optional}}
    if "text" in row and not {"instruction", "output"} & set(row):
        return {"columns": {"prompt": "text"}}
    return {}


# ---------------------------------------------------------------------------------------------- files


def entries(dataset: Dataset) -> Iterator[Entry]:
    """The rows as they are in the files, lazily, the first `num_samples`; a Problem in the place of what is no row.

    Raises Refusal if the data set itself cannot be used.
    """
    found = (
        entry for file in files_of(dataset) for entry in rowfiles.entries(file, encoding=dataset.encoding)
    )
    return found if dataset.num_samples is None else _first(found, dataset.num_samples)


def _first(found: Iterable[Entry], count: int) -> Iterator[Entry]:
    for place, row in found:
        yield place, row
        count -= isinstance(row, dict)
        if not count:
            return


def rows(dataset: Dataset, on_bad: OnBad) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The same without what is no row, which goes to `on_bad`. Raises Refusal as `entries`."""
    return rowfiles.objects(entries(dataset), on_bad)


def files_of(dataset: Dataset) -> tuple[Path, ...]:
    """Its files. Raises Refusal if the data set itself cannot be used."""
    if dataset.problem:
        raise Refusal(dataset.problem)
    if not dataset.files:
        raise Refusal(problem("dataset-on-hub", name=dataset.name, hub=dataset.hub))
    return dataset.files


def count_rows(dataset: Dataset) -> int:
    """How many rows there are, good or bad. Fast, and remembered until a file changes. Raises Refusal as `entries`."""
    total = sum(rowfiles.count(file, dataset.encoding) for file in files_of(dataset))
    return total if dataset.num_samples is None else min(total, dataset.num_samples)


# ----------------------------------------------------------------------------------------------- rows


def examples(dataset: Dataset, on_bad: OnBad, form: Form | None = None) -> Iterator[Example]:
    """The rows in a canonical form (see the module's docstring), that of their own kind if none is named; each bad
    one goes to `on_bad` and is left out.

    Raises Refusal if the data set itself cannot be used.
    """
    return canonical(dataset, rows(dataset, on_bad), on_bad, form)


def canonical(
    dataset: Dataset,
    found: Iterable[tuple[Place, Mapping[str, Any]]],
    on_bad: OnBad,
    form: Form | None = None,
) -> Iterator[Example]:
    """The same of rows that are read already."""
    convert = CONVERSIONS[form or dataset.kind]
    for place, row in found:
        try:
            yield convert(_Row(dataset, place, row))
        except Refusal as refusal:
            on_bad(refusal.problems[0])


def example(dataset: Dataset, place: Place, row: Mapping[str, Any], form: Form | None = None) -> Example:
    """One row in a canonical form, that of its own kind if none is named. Raises Refusal with what is wrong with it."""
    return CONVERSIONS[form or dataset.kind](_Row(dataset, place, row))


@dataclass(slots=True)
class _Row:
    """One row, asked for its values by LLaMA-Factory's names of the columns."""

    dataset: Dataset
    place: Place
    values: Mapping[str, Any]

    def bad(self, code: str, **values: Any) -> Refusal:
        return Refusal(problem(code, place=str(self.place), **values))

    def get(self, key: str) -> Any:
        """The value of an optional column; None where there is none."""
        return self.values.get(self.dataset.columns.get(key, ""))

    def need(self, key: str) -> Any:
        column = self.dataset.columns.get(key, key)
        if column not in self.values:
            raise self.bad("row-without-column", column=column, columns=_names(self.values))
        return self.values[column]

    def string(self, value: Any, column: str) -> str:
        """Raises Refusal unless the value is a string, or a list of text parts as OpenAI writes it."""
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            if other := next((part for part in value if not isinstance(part.get("text"), str)), None):
                raise self.bad("row-not-text", column=column, found=other.get("type") or _names(other))
            return "".join(part["text"] for part in value)
        raise self.bad("row-value-type", column=column, expected="string", found=type_of(value))

    def filled(self, value: Any, column: str) -> str:
        text = self.string(value, column)
        if not text.strip():
            raise self.bad("row-empty", column=column)
        return text

    def parsed(self, value: Any) -> Any:
        """What `_parsed` gives. Raises Refusal for half of a character, which JSON in a string can hide."""
        found = _parsed(value)
        if found is not value and (half := rowfiles.half_character(found, value)):
            raise self.bad("row-half-character", found=half)
        return found

    def items(self, value: Any, column: str) -> list[Any]:
        """A list, or the JSON of one: tables can hold nothing else."""
        value = self.parsed(value)
        if not isinstance(value, list):
            raise self.bad("row-value-type", column=column, expected="list", found=type_of(value))
        return value

    def column(self, key: str) -> str:
        return self.dataset.columns.get(key, key)


def _text(row: _Row) -> Example:
    column = "text" if row.place.file.suffix == ".txt" else row.column("prompt")
    if column not in row.values:
        raise row.bad("row-without-column", column=column, columns=_names(row.values))
    return {"text": row.filled(row.values[column], column)}


def _chat(row: _Row) -> Example:
    messages = _prompt(row)
    if row.dataset.formatting == "alpaca":
        messages.append(_answer(row))
    return {"messages": _in_order(row, messages, "assistant", "call"), "tools": _tools(row)}


def _pairs(row: _Row) -> Example:
    prompt = _in_order(row, _prompt(row), "user", "tool")
    chosen, rejected = ([_choice(row, key)] for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise row.bad("row-pair-equal")
    return {"messages": prompt, "chosen": chosen, "rejected": rejected, "tools": _tools(row)}


def _thumbs(row: _Row) -> Example:
    label = row.need("kto_tag")
    label = {"true": True, "false": False}.get(label.lower(), label) if isinstance(label, str) else label
    if not isinstance(label, bool):
        raise row.bad(
            "row-value-type", column=row.column("kto_tag"), expected="true/false", found=type_of(label)
        )
    return {**_chat(row), "label": label}


def _prompts(row: _Row) -> Example:
    """The questions of a row, and its answer where it has one: what follows the last turn of anybody else."""
    messages = _prompt(row)
    answer = row.get("response") if row.dataset.formatting == "alpaca" else None
    if messages and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    answer = row.string(answer, row.column("response")) if answer else None
    return {"messages": _in_order(row, messages, "user", "tool"), "answer": answer, "tools": _tools(row)}


CONVERSIONS: Mapping[Form, Callable[[_Row], Example]] = {
    "text": _text, "chat": _chat, "pairs": _pairs, "thumbs": _thumbs, "prompts": _prompts,
}  # fmt: skip


def _prompt(row: _Row) -> list[dict[str, Any]]:
    """All messages of a row that are not in a column of their own."""
    system = row.get("system")
    messages = [{"role": "system", "content": row.string(system, row.column("system"))}] if system else []
    if row.dataset.formatting != "alpaca":
        turns = row.items(row.need("messages"), row.column("messages"))
        spoken = [
            _message(row, turn, f"{row.column('messages')}[{number}]") for number, turn in enumerate(turns)
        ]
        return spoken if spoken and spoken[0]["role"] == "system" else messages + spoken
    history = row.get("history")
    for number, exchange in enumerate(row.items(history, row.column("history")) if history else ()):
        column = f"{row.column('history')}[{number}]"
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise row.bad(
                "row-value-type", column=column, expected="[question, answer]", found=type_of(exchange)
            )
        question, answer = (row.filled(text, column) for text in exchange)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt, query = row.string(row.need("prompt"), row.column("prompt")), row.get("query") or ""
    asked = "\n".join(part for part in (prompt, row.string(query, row.column("query"))) if part)
    return [*messages, {"role": "user", "content": row.filled(asked, row.column("prompt"))}]


def _answer(row: _Row) -> dict[str, Any]:
    return {"role": "assistant", "content": row.filled(row.need("response"), row.column("response"))}


def _choice(row: _Row, key: str) -> dict[str, Any]:
    value, column = row.need(key), row.column(key)
    if isinstance(value, dict):
        return _message(row, value, column)
    return {"role": "assistant", "content": row.filled(value, column)}


def _message(row: _Row, turn: Any, column: str) -> dict[str, Any]:
    tags = row.dataset.tags
    if not isinstance(turn, dict):
        raise row.bad("row-value-type", column=column, expected="object", found=type_of(turn))
    if tags["role_tag"] not in turn:
        raise row.bad("row-without-column", column=f"{column}.{tags['role_tag']}", columns=_names(turn))
    said, column = turn.get(tags["content_tag"]), f"{column}.{tags['content_tag']}"
    spoken_by = turn[tags["role_tag"]]
    roles = {
        tags["system_tag"]: "system", tags["user_tag"]: "user", tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "tool", tags["function_tag"]: "function",
    }  # fmt: skip
    role = roles.get(spoken_by) if isinstance(spoken_by, str) else None
    if role is None:
        raise row.bad("row-role", column=column, found=spoken_by, known=_names(roles))
    if role == "function":
        return {"role": "assistant", "content": "", "tool_calls": _calls(row, said, column)}
    message: dict[str, Any] = {"role": role}
    if reasoning := turn.get("reasoning_content"):
        message["reasoning_content"] = row.string(reasoning, f"{column}.reasoning_content")
    if calls := turn.get("tool_calls"):
        return message | {"content": row.string(said or "", column), "tool_calls": _calls(row, calls, column)}
    # A tool may answer with nothing, and an empty system message is a way to turn a template's own off.
    return message | {"content": (row.string if role in ("tool", "system") else row.filled)(said, column)}


def _calls(row: _Row, value: Any, column: str) -> list[dict[str, Any]]:
    """Tool calls as OpenAI writes them, with the arguments as an object, which is what chat templates expect."""
    calls = row.parsed(value)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise row.bad(
                "row-value-type", column=column, expected='{"name", "arguments"}', found=type_of(call)
            )
        arguments = row.parsed(function.get("arguments") or {})
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(row: _Row) -> list[dict[str, Any]] | None:
    value = row.get("tools")
    if not value:
        return None
    tools = row.items(value, row.column("tools"))
    if any(not isinstance(other := tool, dict) for tool in tools):
        raise row.bad("row-value-type", column=row.column("tools"), expected="[object]", found=type_of(other))
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _in_order(row: _Row, messages: list[dict[str, Any]], *last: str) -> list[dict[str, Any]]:
    """The messages, if whoever speaks may speak then, and the last one is among `last`."""
    before = ""
    for number, message in enumerate(messages, start=1):
        if message["role"] not in MAY_FOLLOW[before]:
            raise row.bad(
                "row-order", number=number, expected=_names(MAY_FOLLOW[before]), found=message["role"]
            )
        before = "call" if message.get("tool_calls") else message["role"]
    if before not in last:
        if "assistant" in last and not any(message["role"] == "assistant" for message in messages):
            raise row.bad("row-without-answer")
        raise row.bad("row-last", expected=_names(last), found=before or "—")
    return messages


# ---------------------------------------------------------------------------------------- small things


def _expect(value: Any, shape: type, code: str, **values: Any) -> None:
    if not isinstance(value, shape) or (shape is int and isinstance(value, bool)):
        raise Refusal(problem(code, found=type_of(value), **values))


def _parsed(value: Any) -> Any:
    """What a string holds if it is the JSON of a list or an object, else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def _names(names: Any) -> str:
    return ", ".join(map(str, names)) or "—"
