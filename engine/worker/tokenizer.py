"""The tokenizer of a spec, with the chat template that the run uses. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.spec import RunSpec
from engine.workplace import template_file

TEMPLATES = Path(__file__).parent.parent / "templates"


def load_tokenizer(spec: RunSpec, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`. Its chat template is the spec's, if the spec names one."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=spec.model.trust_remote_code)
    if spec.model.chat_template:
        file = template_file(spec) or TEMPLATES / f"{spec.model.chat_template}.jinja"
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        # Only fills up batches: labels and attention never come from it.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
