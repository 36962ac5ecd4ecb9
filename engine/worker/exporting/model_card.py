"""The files next to the weights of an export: model card, Modelfile, spec of the training, checksums."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from engine.core.permissions import apply_umask
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import RunDir, read_lines
from engine.export import ollama, vllm_command
from engine.export.export_spec import ExportSpec, model_title, needs_combination
from engine.models.adapters import adapter_config
from engine.models.discovery import identity, is_hub_id
from engine.models.facts import inspect_model
from engine.runs.lineage import adapts_vision
from engine.spec.run_spec import RunSpec
from engine.worker.exporting.base_model import Sources
from engine.worker.models.tokenizer import end_ids
from engine.worker.templates.chat_template import render
from engine.worker.templates.conversations import end_of_turn_ids

CHECKSUMS_FILE = "SHA256SUMS"


def write(spec: ExportSpec, sources: Sources, folder: Path, lasting: Path, compared: Mapping[str, Any]) -> None:
    """Write everything except result.json and the checksums into `folder`, which will be renamed to `lasting`."""
    for number, (run, _) in enumerate(sources.trainings, start=1):
        name = "spec.yaml" if len(sources.trainings) == 1 else f"spec-{number}.yaml"
        shutil.copyfile(run.spec, folder / name)
    if sources.stage != "rm":
        (folder / "Modelfile").write_text(_modelfile(spec, sources, folder), encoding="utf-8")
    (folder / "README.md").write_text(_readme(spec, sources, folder, lasting, compared), encoding="utf-8")


def result_record(spec: ExportSpec, sources: Sources, weighed: Mapping[str, Any]) -> dict[str, Any]:
    """The content of result.json, except the attempt."""
    return {
        "saved": time.time(),
        "base": spec.model.model_name_or_path,
        "stage": sources.stage,
        "form": spec.form,
        "precision": spec.precision,
        "quantize": spec.quantize,
        "adapters": dict(spec.adapters),
        **weighed,
    }


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS of every file for `sha256sum -c`, and give all files the mode of a new file."""
    lines = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != CHECKSUMS_FILE:
            apply_umask(file)  # safetensors writes for the owner alone
            with file.open("rb") as content:
                lines.append(f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {file.relative_to(folder)}\n")
    (folder / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")


# ------------------------------------------------------------------------------------------ Ollama


def _template(sources: Sources) -> tuple[str | None, list[Problem]]:
    """The chat template in Go, and what Ollama does differently; or None and the reason."""
    tokenizer = sources.tokenizer()
    if not tokenizer.chat_template:
        return None, [problem("ollama-no-template")]
    template = tokenizer.get_chat_template()

    def rendered(messages: list[dict[str, str]], generate: bool) -> str:
        return render(tokenizer, template, messages, add_generation_prompt=generate)[0]

    # If the tokenizer starts every text with this token, Ollama also adds it.
    bos = tokenizer.bos_token or ""
    adds = bool(bos) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    try:
        pieces = ollama.template_pieces(rendered, bos if adds else "")
    except Refusal as refusal:
        return None, refusal.problems
    return ollama.go_template(pieces), ollama.template_warnings(rendered, template)


def _modelfile(spec: ExportSpec, sources: Sources, folder: Path) -> str:
    template, notes = _template(sources)
    tokenizer = sources.tokenizer()
    settings = _json(folder / "generation_config.json")
    ends = settings.get("eos_token_id") or []
    ids = [
        *(end_of_turn_ids(tokenizer) if tokenizer.chat_template else []),
        *([ends] if isinstance(ends, int) else ends),
    ]
    stops = tokenizer.convert_ids_to_tokens(list(dict.fromkeys(ids)))
    sampling = {name: settings[name] for name in ("temperature", "top_p", "top_k") if settings.get(name)}
    return ollama.modelfile(
        source=str(sources.base) if spec.form == "adapter" else ".",
        adapter="." if spec.form == "adapter" else "",
        template=template,
        stops=[stop for stop in stops if stop],
        context=inspect_model(sources.base).context_length,
        sampling=sampling if settings.get("do_sample") else {"temperature": 0},
        notes=notes,
    )


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ------------------------------------------------------------------------------------------ the model card


def _readme(spec: ExportSpec, sources: Sources, folder: Path, lasting: Path, compared: Mapping[str, Any]) -> str:
    """A model card in the format of hubs: front matter, then a description, the training data, and the usage."""
    title = spec.name or sources.base.name
    parts = [
        _front_matter(spec, sources),
        f"# {title}",
        spec.remark.strip(),
        _description(spec, sources),
        _training_sections(sources),
        _comparison_sentence(spec, compared),
        _usage(spec, sources, folder, lasting, title),
        f"Files are listed with their checksums in `{CHECKSUMS_FILE}`: `sha256sum -c {CHECKSUMS_FILE}`.\n",
    ]
    return "\n\n".join(part for part in parts if part)


def _base_name(sources: Sources) -> str:
    """The public name of the base: its hub ID, or the name of its folder."""
    names = [adapter_config(folder).get("base_model_name_or_path") or "" for folder in sources.adapters]
    names.append(identity(str(sources.base)))
    return next((name for name in names if is_hub_id(name)), sources.base.name)


def _front_matter(spec: ExportSpec, sources: Sources) -> str:
    base = _base_name(sources)
    lines = [f"base_model: {json.dumps(base, ensure_ascii=False)}"] if sources.adapters else []
    if spec.license:
        lines.append(f"license: {json.dumps(spec.license, ensure_ascii=False)}")
    lines.append(f"library_name: {'peft' if spec.form == 'adapter' else 'transformers'}")
    lines.append(f"pipeline_tag: {'text-classification' if sources.stage == 'rm' else 'text-generation'}")
    tags = ["athanor", sources.stage, *(["lora"] if spec.form == "adapter" else [])]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _description(spec: ExportSpec, sources: Sources) -> str:
    form = "LoRA adapter, which needs its base model" if spec.form == "adapter" else "full model"
    if spec.quantize != "none":
        form += f", in {spec.quantize.removesuffix('bit')} bits (bitsandbytes)"
    lines = [f"- base: `{_base_name(sources)}`", f"- form: {form}, {spec.precision}"]
    for folder, weight in sources.adapters.items():
        config = adapter_config(folder)
        marks = [name for name, key in (("DoRA", "use_dora"), ("rsLoRA", "use_rslora")) if config.get(key)]
        about = ", ".join([f"rank {config.get('r')}", f"alpha {config.get('lora_alpha')}", *marks])
        lines.append(
            f"- adapter: `{model_title(folder)}` ({about})"
            + (f", weight {weight:g}" if needs_combination(spec) else "")
        )
    if needs_combination(spec):
        lines.append(f"- combination: {spec.combination}")
    return "\n".join(lines)


def _training_sections(sources: Sources) -> str:
    """Data, settings and final values of each training, in chronological order."""
    sections = []
    for run, training in sources.trainings:
        metrics = _last_metrics(run)
        sets = ", ".join(f"`{name}`" for name in training.data.datasets) or "—"
        lines = [
            f"## Training {training.name}".rstrip(),
            f"- stage: {training.stage.kind}",
            f"- data: {sets}",
        ]
        template = training.model.chat_template or "the tokenizer's own"
        lines.append(f"- chat template: {template}")
        shown = ("loss", "eval_loss", "accuracy", "eval_accuracy", "reward", "epoch", "step", "num_tokens")
        figures = [f"{name} {metrics[name]:.5g}" for name in shown if name in metrics]
        if figures:
            lines.append(f"- final values: {', '.join(figures)}")
        sections.append("\n".join([lines[0], "", *lines[1:], "", "```yaml", _yaml(training), "```"]))
    return "\n\n".join(sections)


def _last_metrics(run: RunDir) -> dict[str, float]:
    """The last logged value of each metric, by name."""
    last: dict[str, float] = {}
    for line in read_lines(run.metrics):
        last |= {name: value for name, value in line.items() if isinstance(value, (int, float))}
    return last


def _yaml(training: RunSpec) -> str:
    return training.to_yaml(brief=True).strip()


def _comparison_sentence(spec: ExportSpec, comparison: Mapping[str, Any]) -> str:
    if not comparison["prompts"]:
        return ""
    what = "scores" if comparison["rows"] and not comparison["rows"][0]["tokens"] else "greedy answers"
    return (
        "Loaded again after the export and compared with the original: "
        f"{comparison['equal']} of {comparison['prompts']} {what} are equal (`comparison.json`)."
    )


def _scoring_code(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Python code that scores a conversation up to the end token of its last answer, as in training."""
    ends = end_ids(tokenizer)
    pad = [f"model.config.get_text_config().pad_token_id = {tokenizer.pad_token_id}"]
    if tokenizer.pad_token_id in ends:
        pad = [
            ("# The padding token also ends a turn, and transformers would skip it: score one conversation at a time."),
            "model.config.get_text_config().pad_token_id = None",
        ]
    return [
        *pad,
        (
            'chat = [{"role": "user", "content": "Hello!"}, '
            '{"role": "assistant", "content": "Hello! What can I do for you?"}]'
        ),
        'ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]',
        (
            f"end = max(at for at, id in enumerate(ids[0].tolist()) if id in {sorted(ends)})"
            "  # the score is read at this token"
        ),
        "print(model(input_ids=ids[:, : end + 1]).logits.item())",
    ]


def _usage(spec: ExportSpec, sources: Sources, folder: Path, lasting: Path, title: str) -> str:
    where, base = str(lasting), _base_name(sources)
    name = ollama.model_name(title)
    auto = "AutoModelForSequenceClassification" if sources.stage == "rm" else "AutoModelForCausalLM"
    load = f'model = {auto}.from_pretrained("{where}", dtype="auto")'
    imports = f"from transformers import {auto}, AutoTokenizer"
    if spec.form == "adapter":
        imports += "\nfrom peft import PeftModel"
        head = ", num_labels=1" if sources.stage == "rm" else ""  # not in the config of the base
        load = (
            f'model = {auto}.from_pretrained("{sources.base if not is_hub_id(base) else base}", dtype="auto"{head})\n'
            f'model = PeftModel.from_pretrained(model, "{where}")'
        )
    lines = [
        "## Use",
        "",
        "```python",
        imports,
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
        load,
    ]
    if sources.stage != "rm":
        lines += [
            'chat = [{"role": "user", "content": "Hello!"}]',
            (
                "inputs = tokenizer.apply_chat_template(chat, "
                'add_generation_prompt=True, return_tensors="pt", return_dict=True)'
            ),
            "answer = model.generate(**inputs, max_new_tokens=256)",
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]
    else:
        lines += _scoring_code(sources.tokenizer())
    lines.append("```")
    if sources.stage != "rm":
        adapter = adapter_config(folder) if spec.form == "adapter" else None
        on_vision = any(map(adapts_vision, sources.adapters))
        issues = vllm_command.adapter_problems(adapter, on_vision=on_vision) if adapter else []
        serve = vllm_command.serve_command(lasting, name, str(sources.base), adapter)
        lines += [
            "",
            "vLLM: " + " ".join(issue.text() for issue in issues) if issues else f"vLLM:\n\n    {serve}",
        ]
        lines += [
            "",
            f"Ollama:\n\n    cd {shlex.quote(str(where))} && ollama create {name} -f Modelfile && ollama run {name}",
        ]
    return "\n".join(lines)
