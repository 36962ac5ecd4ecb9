"""Facts of a model folder, read from config.json, the tokenizer's files and the safetensors headers.

Answers what the page and the checks ask before anything is loaded: which models there are, what is wrong with
one, what LoRA can target in it and how many weights a method trains. Weights are never read; loading them is
`engine.worker.models.loading`'s job, fetching them the hub's, and what they need of a GPU is `engine.preflight.memory`'s.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from engine.core.problems import Problem, problem

DEPTH = 4  # how far below a root a model folder may be: root/team/org/name/model
MAX_JSON = 16 << 20  # bytes; the largest real headers, indexes and tokenizer configs are a few MiB
MAX_TOKENIZER = 128 << 20  # the largest tokenizer.json, of 260,000 words, has some 35 MiB
ALL_LINEAR = "all-linear"

# The same fact under the names different families gave it; the first one present wins.
CONTEXT = (
    "max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length", "n_ctx",
)  # fmt: skip
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TEXT_PARTS = ("text_config", "llm_config", "language_config")  # where vision-language models keep theirs

GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHead")
SCORERS = ("ForSequenceClassification", "ForTokenClassification", "RewardModel")
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip
TEMPLATES = ("chat_template.jinja", "chat_template.json", "chat_templates", "additional_chat_templates")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # as peft names them
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
DTYPES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip

HEADS = {"lm_head", "output", "output_layer", "score", "classifier", "v_head"}
ROUTERS = {"gate", "router"}  # plain parameters in transformers 5, although two-dimensional
EXPERT = re.compile(r"\.experts\.\d")  # transformers 5 fuses routed experts into 3-D parameters
SENSES = ("vision_config", "audio_config")
PART_THAT_WRITES = ".language_model."
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
CONV1D = {"gpt2", "openai-gpt", "gpt-sw3"}  # keep their linear weights as (in, out)
PACKED = re.compile(r"(.+\.weight)\.quant_state\.bitsandbytes__\w+")
NOT_WEIGHTS = re.compile(r".+\.(weight\..+|SCB|weight_format|weight_scale\w*|rotary_emb\.inv_freq)")


# A real small model for whoever has none, where `make smollm2` puts it.
SMOLLM2 = Path(__file__).resolve().parent.parent / "data" / "models" / "SmolLM2-135M-Instruct"


class Tensor(NamedTuple):
    """One entry of a safetensors header. `shape` is the true one where bitsandbytes packed two values a byte."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """What a model folder says about itself. A fact that is absent or cannot be read is None (text: "")."""

    name: str  # path below its root, or the hub id it was fetched as
    path: Path
    model_type: str = ""
    architecture: str = ""
    parameters: int | None = None
    bytes: int = 0  # of the files directly in the folder
    dtype: str = ""
    context_length: int | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    tied: bool = False  # the output head is the embedding
    rope: str | None = None  # how its positions are stretched already: "yarn", "llama3", …
    has_chat_template: bool = False
    quantized: str | None = None  # "gptq", "awq", "bitsandbytes", "fp8", …
    needs_remote_code: bool = False
    adapter_of: str | None = None  # the folder is an adapter, of this base


# ------------------------------------------------------------------------------------ which models there are


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetched. Its rules, repeated so that it need not be imported."""
    if cached := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cached).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser() / "hub"


def find_models(roots: Sequence[Path]) -> list[Model]:
    """Every language model below `roots` and in the hub's cache, by name. A folder is listed once, a broken
    config.json is listed too (with no facts), and a link that leaves the roots is not followed."""
    allowed = _allowed(roots)
    found: dict[str, Model] = {}
    for root in dict.fromkeys(allowed):
        for folder, name in _model_folders(root, root, allowed, DEPTH, set()):
            real = os.path.realpath(folder)
            if real not in found and _is_language_model(folder):
                found[real] = inspect(folder, name)
    return sorted(found.values(), key=lambda model: model.name.casefold())


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id, "org/name". Says nothing about whether such a model exists."""
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    return bool(re.fullmatch(f"{part}/{part}", text, re.ASCII)) and ".." not in text and "--" not in text


def locate(text: str, roots: Sequence[Path]) -> Path | None:
    """The existing file or folder that `text` means: a full path, or one relative to a root. Not yet checked to
    stay below the roots."""
    for candidate in [text] if os.path.isabs(text) else [os.path.join(root, text) for root in roots]:
        if os.path.exists(candidate):
            return Path(candidate)
    return None


def identity(text: str) -> str:
    """What a model is called wherever it lies: the id of a folder in the hub's cache, the real path of any other
    folder, and the text itself where nothing is on this machine."""
    if not os.path.exists(text):
        return text
    real, cache = os.path.realpath(text), os.path.realpath(hub_cache())
    cached_as = re.match(r"models--(.+?)--(.+?)/snapshots/", os.path.relpath(real, cache))
    return "/".join(cached_as.groups()) if cached_as else real


def _allowed(roots: Sequence[Path]) -> list[str]:
    return [os.path.realpath(root) for root in (*roots, hub_cache())]


def _below(path: str | Path, allowed: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in allowed)


def _model_folders(
    folder: str, root: str, allowed: Sequence[str], depth: int, seen: set[str]
) -> Iterator[tuple[Path, str]]:
    """(folder, name) of all that look like models; `seen` keeps links in a circle from going round."""
    real = os.path.realpath(folder)
    if real in seen or not _below(real, allowed):
        return
    seen.add(real)
    cached_as = re.fullmatch(r"models--(.+?)--(.+)", os.path.basename(folder))
    if cached_as and (snapshot := _snapshot(folder)):
        yield snapshot, "/".join(cached_as.groups())
    elif os.path.isfile(os.path.join(folder, "config.json")):
        name = os.path.relpath(folder, root)
        yield Path(folder), os.path.basename(root) if name == "." else Path(name).as_posix()
    elif depth:
        try:
            inside = sorted(
                entry.path for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
            )
        except OSError:  # a folder this user may not list holds no model this user can train
            return
        for child in inside:
            yield from _model_folders(child, root, allowed, depth - 1, seen)


def _snapshot(repository: str) -> Path | None:
    """The revision that `main` points to in the hub's cache, else the newest one."""
    snapshots = Path(repository, "snapshots")
    try:
        main = Path(repository, "refs", "main").read_text(encoding="ascii").strip()
        if re.fullmatch(r"\w+", main) and (snapshots / main).is_dir():
            return snapshots / main
    except (OSError, ValueError):
        pass  # fetched by commit: there is no main
    revisions = [path for path in snapshots.glob("*") if path.is_dir()]
    return max(revisions, key=lambda path: path.stat().st_mtime, default=None)


def _is_language_model(folder: Path) -> bool:
    config = _json(folder / "config.json")
    if isinstance(config, Problem):
        return True  # shown, so that somebody repairs it, rather than silently absent
    architecture = _architecture(config)
    if architecture:
        return any(word in architecture for word in (*GENERATORS, *SCORERS))
    return bool(config.get("model_type")) and _fact(config, ("vocab_size",)) is not None


# -------------------------------------------------------------------------------------- what one of them is


def inspect(path: str | Path, name: str = "") -> Model:
    """The facts of the folder `path`. Never raises for what is in it: `model_problems` tells what is wrong."""
    folder = Path(path)
    config = _json(folder / "config.json")
    config = {} if isinstance(config, Problem) else config
    tensors, broken = _tensors(folder)
    quantized = _quantized(folder, config)
    countable = tensors and not broken and quantized in (None, "bitsandbytes", "fp8")
    tied = bool(config.get("tie_word_embeddings", _text_part(config).get("tie_word_embeddings")))
    if tied and "lm_head.weight" in tensors and len(tensors) > 1:
        tensors = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    return Model(
        name=name or folder.name,
        path=folder,
        model_type=_text(config.get("model_type")),
        architecture=_architecture(config),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()) if countable else None,
        bytes=sum(size for _, size in _files(folder)),
        dtype=_dtype(config, tensors),
        context_length=_fact(config, CONTEXT),
        vocab_size=_fact(config, ("vocab_size", "padded_vocab_size")),
        hidden_size=_fact(config, HIDDEN),
        layers=_fact(config, LAYERS),
        tied=tied,
        rope=_rope(config),
        has_chat_template=_has_chat_template(folder),
        quantized=quantized,
        needs_remote_code="auto_map" in config
        and not _known_to_transformers(_text(config.get("model_type"))),
        adapter_of=_adapter_of(folder),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((config[part] for part in TEXT_PARTS if isinstance(config.get(part), dict)), {})


def _fact(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for part in (config, _text_part(config)):
        for name in names:
            if type(part.get(name)) is int and part[name] > 0:
                return part[name]
    return None


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return _text(names[0]) if isinstance(names, list) and names else ""


def _dtype(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """As the config says it, else the one most weights have."""
    for part in (config, _text_part(config)):
        if said := _text(part.get("dtype")) or _text(part.get("torch_dtype")):
            return said
    values: Counter[str] = Counter()
    for tensor in tensors.values():
        values[tensor.dtype] += math.prod(tensor.shape)
    common = max(values, key=values.__getitem__, default="")
    return DTYPES.get(common, common.lower())


def may_be_quantized(path: str, kind: str = "none") -> bool:
    """Whether a model may have quantized weights: it is loaded so (`kind`), lies so on disk, or is not here yet."""
    return kind != "none" or not os.path.isdir(path) or inspect(path).quantized is not None


def _quantized(folder: Path, config: Mapping[str, Any]) -> str | None:
    how = config.get("quantization_config")
    if isinstance(how, dict):
        return _text(how.get("quant_method")) or "bitsandbytes"  # its first releases did not name themselves
    if os.path.isfile(folder / "quantize_config.json"):
        return "gptq"  # AutoGPTQ and AutoAWQ kept it in a file of their own at first
    return "awq" if os.path.isfile(folder / "quant_config.json") else None


def _rope(config: Mapping[str, Any]) -> str | None:
    """The kind of scaling in the config, under the names it has had; families may have one for each kind of layer."""
    for part in (config, _text_part(config)):
        for given in (part.get("rope_parameters"), part.get("rope_scaling")):
            if isinstance(given, dict):
                kinds = [given, *(one for one in given.values() if isinstance(one, dict))]
                named = [_text(one.get("rope_type") or one.get("type")) for one in kinds]
                if own := [name for name in named if name not in ("", "default", "mrope")]:
                    return own[0]
                if len(kinds) > 1:
                    return ", ".join(given)
    return None


def _has_chat_template(folder: Path) -> bool:
    return bool(chat_template(folder)) or any(os.path.exists(folder / name) for name in TEMPLATES)


def chat_template(folder: Path) -> tuple[str, str] | None:
    """(file, text) of the template that transformers takes for plain conversations; None if there is none."""
    file = folder / TEMPLATES[0]
    try:
        if os.path.isfile(file) and file.stat().st_size <= MAX_JSON:
            return file.name, file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    config = _json(folder / "tokenizer_config.json")
    given = None if isinstance(config, Problem) else config.get("chat_template")
    if isinstance(given, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    return ("tokenizer_config.json", given) if given and isinstance(given, str) else None


def _adapter_of(folder: Path) -> str | None:
    if not os.path.isfile(folder / "adapter_config.json"):
        return None
    adapter = _json(folder / "adapter_config.json")
    return "?" if isinstance(adapter, Problem) else _text(adapter.get("base_model_name_or_path")) or "?"


@cache
def _known_to_transformers(model_type: str) -> bool:
    """Whether the installed transformers has this family's code, so that the model's own is not needed. Looks
    for the folder; importing transformers would take seconds."""
    package = importlib.util.find_spec("transformers")
    folder = model_type.replace("-", "_")
    if not package or not re.fullmatch(r"\w+", folder):
        return False
    return any(Path(place, "models", folder).is_dir() for place in package.submodule_search_locations or ())


@cache
def _auto_classes(table: str) -> Mapping[str, str]:
    """Family → class of one of the installed transformers' tables, such as "CAUSAL_LM". Read from its source, since
    importing it would take seconds."""
    package = importlib.util.find_spec("transformers")
    places = package.submodule_search_locations if package else ()
    for place in places or ():
        source = Path(place, "models", "auto", "modeling_auto.py").read_text(encoding="utf-8")
        start = rf"^MODEL_FOR_{table}_MAPPING_NAMES = .*?^\)"
        if found := re.search(start, source, re.MULTILINE | re.DOTALL):
            return dict(re.findall(r'\("([\w-]+)", "(\w+)"\)', found[0]))
    return {}


def has_reward_model(model_type: str) -> bool:
    """Whether the installed transformers can put a score in place of the next token of this family."""
    families = _auto_classes("SEQUENCE_CLASSIFICATION")
    return not families or model_type in families  # without transformers nothing is trained on this machine


def _files(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the files directly in `folder`, links followed."""
    try:
        return sorted((entry.name, entry.stat().st_size) for entry in os.scandir(folder) if entry.is_file())
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return []


def _json(path: Path, limit: int = MAX_JSON) -> dict[str, Any] | Problem:
    """A JSON object of at most `limit` bytes, or what is wrong with it."""
    try:
        if path.stat().st_size > limit:
            return problem("model-json-too-large", file=path.name, limit=limit >> 20)
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        return problem(
            "model-json-broken", file=path.name, line=error.lineno, column=error.colno, what=error.msg
        )
    except OSError as error:
        return problem("model-file-unreadable", file=path.name, what=error.strerror)
    except (ValueError, RecursionError):  # not UTF-8, a number of ten thousand digits, nested without end
        return problem("model-json-not-text", file=path.name)
    return value if isinstance(value, dict) else problem("model-json-not-object", file=path.name)


def read_object(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes; empty where there is none that can be read, which others tell."""
    value = _json(path, limit)
    return {} if isinstance(value, Problem) else value


# --------------------------------------------------------------------------------------- safetensors headers


def _weight_files(folder: Path) -> tuple[list[Path], list[Problem]]:
    """The safetensors files transformers would load, and what is wrong with the set."""
    single = folder / "model.safetensors"
    if os.path.isfile(single):
        return [single], []
    index = folder / "model.safetensors.index.json"
    if not os.path.exists(index):
        return [], [_no_weights(folder)]
    content = _json(index)
    if isinstance(content, Problem):
        return [], [content]
    places = content.get("weight_map")
    shards = sorted(set(places.values())) if _is_weight_map(places) else []
    if not shards:
        return [], [problem("model-index-broken", file=index.name)]
    present = [folder / shard for shard in shards if (folder / shard).is_file()]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if not missing:
        return present, []
    return present, [
        problem("model-shards-missing", count=len(missing), of=len(shards), missing=_some(missing))
    ]


def _is_weight_map(places: Any) -> bool:
    """A shard is a plain file name: an index must not make us open ../../something."""
    return isinstance(places, dict) and all(
        isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in places.values()
    )


def _no_weights(folder: Path) -> Problem:
    names = [name for name, _ in _files(folder)]
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return problem("model-gguf", file=gguf[0])
    pickles = [
        name for name in names if name.endswith(PICKLES) and name not in ("training_args.bin", "optimizer.pt")
    ]
    if pickles:
        return problem("model-pickled", file=pickles[0])
    return problem("model-no-weights", folder=folder)


def _tensors(folder: Path) -> tuple[dict[str, Tensor], list[Problem]]:
    """All tensors of a model by name, and what is wrong with its weight files."""
    files, problems = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = header(file)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            tensors.update(found)
    # Of a model that also sees or hears, the part that writes is loaded, under the names of a model that only writes.
    if any(PART_THAT_WRITES in name for name in tensors):
        tensors = {
            name.replace(PART_THAT_WRITES, ".", 1): tensor
            for name, tensor in tensors.items()
            if PART_THAT_WRITES in name or name.startswith("lm_head.")
        }
    return tensors, problems


def header(path: Path) -> Mapping[str, Tensor] | Problem:
    """The tensors of one safetensors file, or what is wrong with it. Reads the header only and trusts nothing
    in it: the size it claims is checked against the file before a byte is allocated."""
    try:
        stat = path.stat()
        return _header(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        return problem("model-file-unreadable", file=path.name, what=error.strerror)


@lru_cache(maxsize=4096)
def _header(path: Path, modified: int, size: int) -> Mapping[str, Tensor] | Problem:
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":  # what git leaves where `git lfs pull` was never run
            return problem("model-lfs-pointer", file=path.name)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_JSON:
            return problem("model-header-broken", file=path.name)
        if 8 + length > size:
            return problem("model-file-size", file=path.name, size=size, expected=8 + length)
        try:
            entries = json.loads(file.read(length))
            if not all(map(str.isprintable, entries)):  # names are shown on the page
                raise ValueError(path)
            tensors = {name: _tensor(entry) for name, entry in entries.items() if name != "__metadata__"}
            end = max(
                (entry["data_offsets"][1] for name, entry in entries.items() if name in tensors), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return problem("model-header-broken", file=path.name)
        if 8 + length + end != size:
            return problem("model-file-size", file=path.name, size=size, expected=8 + length + end)
        for name in tensors.copy():
            if packed := PACKED.fullmatch(name):
                file.seek(8 + length + entries[name]["data_offsets"][0])
                shape = _packed_shape(file.read(min(math.prod(tensors[name].shape), 4096)))
                if shape and packed[1] in tensors:
                    tensors[packed[1]] = tensors[packed[1]]._replace(shape=shape)
    return {name: tensor for name, tensor in tensors.items() if not NOT_WEIGHTS.fullmatch(name)}


def _tensor(entry: Any) -> Tensor:
    """Raises ValueError, TypeError or KeyError where a header entry contradicts itself."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    sane = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= 16
    if not sane or not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise ValueError(entry)
    bits = BITS.get(dtype)  # a type newer than this table is taken as it is
    if end < begin or (bits and math.prod(shape) * bits != (end - begin) * 8):
        raise ValueError(entry)
    return Tensor(dtype, tuple(shape))


def _packed_shape(state: bytes) -> tuple[int, ...] | None:
    """The true shape of a weight that bitsandbytes stored packed: it writes it as JSON beside the weight."""
    try:
        shape = json.loads(state)["shape"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sane = (
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    )
    return tuple(shape) if sane else None


# ---------------------------------------------------------------------------------- what is wrong with a choice


def model_problems(
    path_or_id: str | Path,
    roots: Sequence[Path],
    field: str = "model.model_name_or_path",
    *,
    allow_remote_code: bool = False,
    scorer: bool = False,
) -> list[Problem]:
    """Everything that keeps this model from being trained; [] for a sound folder and for a hub id, which is
    only known once fetched. `scorer`: a reward model is wanted, so a classification head is no fault."""
    text = str(path_or_id)
    if unclear := _path_problem(text):
        return [replace(unclear, field=field)]
    place = locate(text, roots)
    if place is None:
        return [] if is_hub_id(text) else [replace(_not_a_name(text) or _missing(text, roots), field=field)]
    if not _below(place, _allowed(roots)):
        return [problem("model-outside-roots", field, path=text, roots=_some(map(str, roots)))]
    if place.is_file():
        code = "model-gguf" if place.suffix == ".gguf" else "model-is-a-file"
        return [problem(code, field, file=place.name, folder=place.parent)]
    return [replace(found, field=field) for found in _folder_problems(place, allow_remote_code, scorer)]


def _path_problem(text: str) -> Problem | None:
    """What no path of a model is, whether it is there or not."""
    if not text.strip():
        return problem("model-empty")
    if not text.isprintable():
        return problem("model-path-characters", given=ascii(text[:80])[1:-1])
    if ".." in Path(text).parts:
        return problem("model-path-dots", given=text[:80])
    if len(os.fsencode(text)) > 1024 or any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        return problem("model-path-long", given=text[:80])
    return None


def _not_a_name(text: str) -> Problem | None:
    """A folder that is there may be called anything, since no name is given to a shell; but where there is none,
    whoever pasted half a command should hear of it."""
    if re.search(r"[;|&<>$`!*?\"']", text) or text[0] in "-~":
        return problem("model-path-characters", given=text[:80])
    return None


def _missing(text: str, roots: Sequence[Path]) -> Problem:
    """The nearest by the last part of the name, whatever its case: that is where slips are made."""
    if Path(text).name == SMOLLM2.name:
        return problem("model-smollm2", given=text, place=SMOLLM2)
    names = [model.name for model in find_models(roots)]
    by_end = {name.rsplit("/")[-1].casefold(): name for name in names}
    near = difflib.get_close_matches(Path(text).name.casefold(), by_end, n=3, cutoff=0.5)
    if near:
        return problem("model-missing", given=text, nearest=_some(by_end[end] for end in near))
    return problem("model-missing-alone", given=text, roots=_some(map(str, roots)), count=len(names))


def _folder_problems(folder: Path, allow_remote_code: bool, scorer: bool) -> list[Problem]:
    if base := _adapter_of(folder):
        return [problem("model-is-adapter", folder=folder.name, base=base)]
    if not (folder / "config.json").exists():
        gguf = [name for name, _ in _files(folder) if name.endswith(".gguf")]
        return [problem("model-gguf", file=gguf[0]) if gguf else problem("model-no-config", folder=folder)]
    config = _json(folder / "config.json")
    if isinstance(config, Problem):
        return [config]

    model, found = inspect(folder), []
    if model.needs_remote_code and not allow_remote_code:
        found.append(problem("model-remote-code", model=model.name, model_type=model.model_type or "?"))
    if model.quantized not in (None, "bitsandbytes"):
        found.append(problem("model-quantized", how=model.quantized))
    if config.get("is_encoder_decoder"):
        found.append(problem("model-encoder-decoder", architecture=model.architecture or model.model_type))
    elif any(word in model.architecture for word in SCORERS):
        if not scorer:
            found.append(problem("model-is-scorer", architecture=model.architecture))
    elif not _is_language_model(folder):
        found.append(
            problem("model-not-language", architecture=model.architecture or model.model_type or "?")
        )
    elif any(part in config for part in SENSES) and not _writes_alone(model):
        found.append(problem("model-with-senses", architecture=model.architecture or model.model_type))
    tensors, damaged = _tensors(folder)
    return found + damaged + _shape_problems(config, tensors) + _tokenizer_problems(folder)


def _writes_alone(model: Model) -> bool:
    """Whether the part of the model that writes is loaded without those that see or hear."""
    return model.needs_remote_code or _auto_classes("CAUSAL_LM").get(model.model_type, "").endswith(
        "ForCausalLM"
    )


def _shape_problems(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Problem]:
    """A config.json of another model than the weights are, seen at the embedding."""
    embedding = tensors.get("model.embed_tokens.weight")
    said = {"vocab_size": _fact(config, ("vocab_size",)), "hidden_size": _fact(config, HIDDEN)}
    if not embedding or len(embedding.shape) != 2 or embedding.dtype not in DTYPES:
        return []
    return [
        problem("model-config-differs", name=name, said=number, size=size)
        for (name, number), size in zip(said.items(), embedding.shape, strict=True)
        if number and number != size
    ]


def _tokenizer_problems(folder: Path) -> list[Problem]:
    names = [name for name, _ in _files(folder)]
    if not any(name in TOKENIZERS or name.endswith(".tiktoken") for name in names):
        return [problem("model-no-tokenizer", folder=folder.name)]
    found = []
    if "tokenizer.json" in names:
        status = (folder / "tokenizer.json").stat()
        found.append(_tokenizer_file(folder / "tokenizer.json", status.st_mtime_ns, status.st_size))
    if "tokenizer_config.json" in names and isinstance(
        config := _json(folder / "tokenizer_config.json"), Problem
    ):
        found.append(config)
    return [one for one in found if one]


@lru_cache(maxsize=256)
def _tokenizer_file(path: Path, modified: int, size: int) -> Problem | None:
    """What is wrong with a tokenizer.json; these are larger than any other JSON of a model, so read once."""
    content = _json(path, MAX_TOKENIZER)
    if isinstance(content, Problem):
        return content
    model = content.get("model")
    sound = isinstance(model, dict) and isinstance(model.get("vocab"), (dict, list))
    return None if sound else problem("model-tokenizer-broken", file=path.name)


def _some(names: Any, most: int = 5) -> str:
    """Names in one line, the rest as a dot-dot-dot."""
    names = list(names)
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


# ------------------------------------------------------------------------------------- what training can touch


def modules(model: Model) -> list[str]:
    """Full names of all modules that hold weights, containers included: model.layers.0.mlp, …mlp.up_proj."""
    return _modules(_weights(model))


def _modules(tensors: Iterable[str]) -> list[str]:
    names: dict[str, None] = {}
    for tensor in tensors:
        parts = tensor.split(".")[:-1]
        names.update((".".join(parts[:end]), None) for end in range(1, len(parts) + 1))
    return list(names)


def linear_modules(model: Model) -> list[str]:
    """Short names of what LoRA is usually put on: q_proj, k_proj, …; no embeddings, heads or routers."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in _linear(model)))


def whole_modules(model: Model) -> list[str]:
    """Short names of what is usually trained in full beside LoRA: embeddings and the head."""
    linear = set(_linear(model))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in matrices(model) if name not in linear))


def lora_problems(
    model: Model,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] = (),
    part: str = "method",
) -> list[Problem]:
    """Names that peft would not find in the model; fields are `part`.target_modules and `part`.modules_to_save.
    Returns [] where the headers cannot be read: `model_problems` speaks of that."""
    linear = linear_modules(model)
    if not linear:
        return []
    found, named = [], list(matrices(model))
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        pattern = isinstance(target_modules, str) and target != ALL_LINEAR
        try:
            missing = target != ALL_LINEAR and not any(_matches(target, name, pattern) for name in named)
        except re.error as error:
            found.append(
                problem("lora-pattern-broken", f"{part}.target_modules", given=target, what=error.msg)
            )
            continue
        if missing:
            near = difflib.get_close_matches(target, linear, n=1, cutoff=0.0)
            found.append(
                problem("lora-target-missing", f"{part}.target_modules", given=target, nearest=near[0],
                        modules=_some(linear, 12))
            )  # fmt: skip
    names = modules(model)
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for saved in modules_to_save:
        if not any(name.endswith(saved) for name in names):
            near = difflib.get_close_matches(saved, ends, n=1, cutoff=0.0)
            found.append(
                problem("lora-saved-missing", f"{part}.modules_to_save", given=saved, nearest=near[0])
            )
    return found


def freeze_problems(
    model: Model, trainable_modules: Sequence[str], field: str = "method.trainable_modules"
) -> list[Problem]:
    """Names that are of no parameter and of no module. Returns [] where the headers cannot be read."""
    names = list(_parameters(model))
    unknown = [one for one in trainable_modules if not any(is_or_below(name, one) for name in names)]
    known = _modules(name for name in names if not EXPERT.search(name))
    return [
        problem("freeze-unknown", field, given=one, nearest=difflib.get_close_matches(one, known, 1, 0.0)[0])
        for one in unknown
        if known
    ]


def is_or_below(parameter: str, name: str) -> bool:
    """Whether `name` names the parameter, or a module that it is in: both are full names."""
    return parameter == name or parameter.startswith(f"{name}.")


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """The adapter's adapter_config.json; empty where it cannot be read, or a rank in it is no number."""
    found = _json(Path(folder) / ADAPTER_FILES[0])
    if isinstance(found, Problem):
        return {}
    pattern = found.get("rank_pattern") or {}
    ranks = [found.get("r") or 0, *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    return found if all(isinstance(one, int) for one in ranks) else {}


def adapter_problems(
    folder: str | Path,
    base: str,
    settings: Mapping[str, Any],
    field: str = "model.adapter_path",
    *,
    scorer: bool = False,
) -> list[Problem]:
    """What keeps the training of a LoRA adapter from going on: missing files, another base than `base`, that it
    judges texts where none is wanted that does (`scorer`), and `settings` (name in peft's LoraConfig → value) that
    are not the adapter's, each at "method." and its name."""
    folder = Path(folder)
    for name in ADAPTER_FILES:
        if not os.path.isfile(folder / name):
            return [problem("adapter-file-missing", field, file=name, folder=folder)]
    config, weights = _json(folder / ADAPTER_FILES[0]), header(folder / ADAPTER_FILES[1])
    if broken := [one for one in (config, weights) if isinstance(one, Problem)]:
        return [replace(one, field=field) for one in broken]
    found = []
    trained_on = _text(config.get("base_model_name_or_path"))
    if not _same_base(trained_on, base):
        found.append(problem("adapter-other-base", field, base=trained_on or "?", model=base))
    if _scores(config) and not scorer:
        found.append(problem("adapter-scores", field, folder=folder))
    return found + [
        problem("adapter-differs", f"method.{name}", given=value, adapter=config[name])
        for name, value in settings.items()
        if name in config and config[name] != value
    ]


def adapter_scores(folder: str | Path) -> bool:
    """Whether an adapter has the head of a reward model."""
    config = _json(Path(folder) / ADAPTER_FILES[0])
    return not isinstance(config, Problem) and _scores(config)


def _scores(config: Mapping[str, Any]) -> bool:
    return config.get("task_type") == "SEQ_CLS"


def _same_base(trained_on: str, chosen: str) -> bool:
    """A base that is not on this machine under the name it had is known by the last part of that name."""
    one, other = identity(trained_on), identity(chosen)
    moved = not os.path.exists(trained_on) and Path(one).name == Path(other).name
    return one == other or moved


def adapter_rows(folder: str | Path) -> int:
    """For how many token ids an adapter brings embeddings of its own; 0 for one that leaves them to the base."""
    weights = header(Path(folder) / ADAPTER_FILES[1])
    names = (
        "embed_tokens.weight",
        "wte.weight",
        "embed_in.weight",
        "word_embeddings.weight",
        "lm_head.weight",
    )
    found = {} if isinstance(weights, Problem) else weights
    return max(
        (one.shape[0] for name, one in found.items() if name.endswith(names) and len(one.shape) == 2),
        default=0,
    )


def adapter_parameters(folder: str | Path) -> int:
    """How many weights an adapter has; 0 where its header cannot be read."""
    weights = header(Path(folder) / ADAPTER_FILES[1])
    return 0 if isinstance(weights, Problem) else sum(math.prod(tensor.shape) for tensor in weights.values())


def kept_layers(layers: int, count: int) -> range:
    """Indices of the last `count` of so many layers; of a negative count those of the first."""
    return range(max(layers - count, 0), layers) if count > 0 else range(min(-count, layers))


def trainable_parameters(
    model: Model,
    method: str,
    *,
    r: int = 16,
    target_modules: str | Sequence[str] = (ALL_LINEAR,),
    modules_to_save: Sequence[str] = (),
    use_dora: bool = False,
    trainable_layers: int = 2,
    trainable_modules: Sequence[str] = (),
    scorer: bool = False,
) -> int:
    """How many weights `method` ("full", "freeze" or "lora") trains, as peft would count them: LoRA has
    r × (in + out) per matrix (Hu et al. 2021), DoRA one magnitude per output more (Liu et al. 2024).
    A `scorer` has one score in place of the output head. 0 where the headers cannot be read. Raises KeyError for
    another method."""
    sizes, score = _parameters(model), 0
    if scorer and sizes:
        sizes = {name: size for name, size in sizes.items() if HEADS.isdisjoint(name.split(".")[:-1])}
        score = model.hidden_size or 0

    def full() -> int:
        return sum(sizes.values())

    def freeze() -> int:
        if trainable_modules:
            return sum(
                size
                for name, size in sizes.items()
                if any(is_or_below(name, one) for one in trainable_modules)
            )
        layer = {name: int(found[1]) for name in sizes if (found := LAYER.search(name))}
        trained = kept_layers(len(set(layer.values())), trainable_layers)
        return sum(sizes[name] for name, number in layer.items() if number in trained)

    def lora() -> int:
        whole = {name: math.prod(tensor.shape) for name, tensor in _weights(model).items()}
        saved = sum(size for name, size in whole.items() if _saved(name, modules_to_save))
        out = 1 if model.model_type in CONV1D else 0
        return saved + sum(
            r * sum(shape) + (shape[out] if use_dora else 0)
            for shape in targeted_shapes(model, target_modules, modules_to_save)
        )

    return {"full": full, "freeze": freeze, "lora": lora}[method]() + score


def _weights(model: Model) -> Mapping[str, Tensor]:
    """All tensors by name. A tied head is not in the file, yet it is a module that can be named."""
    tensors, _ = _tensors(model.path)
    embedding = next((name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))), "")
    if model.tied and embedding and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors[embedding]
    return tensors


def _parameters(model: Model) -> dict[str, int]:
    """Size of every parameter by name; a tied head is no parameter of its own."""
    head = "lm_head.weight" if model.tied else ""
    return {name: math.prod(one.shape) for name, one in _weights(model).items() if name != head}


def matrices(model: Model) -> dict[str, tuple[int, ...]]:
    """Modules that peft can put an adapter on, with the shape of their weight: linear layers and embeddings."""
    found = {}
    for name, tensor in _weights(model).items():
        module, _, kind = name.rpartition(".")
        router = module.rpartition(".")[2] in ROUTERS
        if kind == "weight" and len(tensor.shape) == 2 and not router and not EXPERT.search(module):
            found[module] = tensor.shape
    return found


def _linear(model: Model) -> list[str]:
    ends = {name: name.rpartition(".")[2] for name in matrices(model)}
    return [
        name
        for name, end in ends.items()
        if "emb" not in end and end not in HEADS and end not in ("wte", "wpe")
    ]


def targeted_shapes(
    model: Model, targets: str | Sequence[str], saved: Sequence[str]
) -> list[tuple[int, ...]]:
    """Shapes of the matrices that LoRA is put on; [] where the headers cannot be read."""
    pattern = isinstance(targets, str) and targets != ALL_LINEAR
    targets = [targets] if isinstance(targets, str) else targets
    chosen = set(_linear(model)) if ALL_LINEAR in targets else set()
    return [
        shape
        for name, shape in matrices(model).items()
        if (name in chosen or any(_matches(target, name, pattern) for target in targets))
        and not any(_inside(f"{name}.weight", module) for module in saved)
    ]


def _matches(target: str, module: str, pattern: bool) -> bool:
    """peft's rule: one string is a pattern for the whole name, names in a list are the name or its end."""
    return (
        bool(re.fullmatch(target, module)) if pattern else module == target or module.endswith(f".{target}")
    )


def _inside(tensor: str, module: str) -> bool:
    """Whether a tensor belongs to a module, or to one inside it; `module` is a full name or the end of one."""
    return f".{module}." in f".{tensor}"


def _saved(tensor: str, modules_to_save: Sequence[str]) -> bool:
    """peft wraps every module whose full name ends with the given one, with or without a dot before it."""
    parts = tensor.split(".")
    return any(".".join(parts[:end]).endswith(tuple(modules_to_save)) for end in range(1, len(parts)))
