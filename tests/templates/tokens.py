"""A small byte-level tokenizer for any chat template, with the control tokens that the template writes."""

from __future__ import annotations

import re
from functools import cache

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template as compiled

from tests.families import words_and_merges
from tests.templates.sources import Template

# What model families use as tokens that frame turns: special in their tokenizers.
SPECIAL = re.compile(
    r"""<[|｜][^<>{}'"\s|｜]+[|｜]>|<\|"\|>|<\|[a-z_]+>|<[a-z_]+\|>|\[\|\w+\|\]"""
    r"""|</?(?:start|end|begin|beginning)_[a-z_]+>|</?s>|<(?:bos|eos)(?::\w+)?>|<(?:sop|eop|eod|sep|nl|escape)>|</?(?:role|assistant|user|system|observation)>|<seed:[be]os>"""
    r"""|<(?:extra_id|SPECIAL|reserved|unused)_?\d+>|</?longcat_(?:user|assistant|system|s)>|<im_(?:start|end)>"""
    r"""|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|SYSTEM_PROMPT|MODEL_SETTINGS|ARGS|CALL_ID|gMASK)\]"""
    r"""|\]~b\]|\]~!b\[|\[e~\["""
)
# What a model writes inside its answer: added to the vocabulary in most tokenizers, but not special.
OWN = re.compile(
    r"</?(?:think|thinking|tool_calls?|tool_response|arg_key|arg_value|tool_sep|TOOLCALL"
    r"|longcat_(?!s>|user|assistant|system)\w+|seed:(?!bos|eos)\w+|minimax:\w+)>"
    r"|\[/?THINK\]"
)


@cache
def literals(text: str) -> str:
    """All that a template writes as it stands, one string a line; the whole text if jinja cannot read it."""
    try:
        tree = compiled_tree(text)
    except TemplateError:
        return text
    found = [node.data for node in tree.find_all(nodes.TemplateData)]
    found += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\n".join(found)


def compiled_tree(text: str) -> nodes.Template:
    return compiled(text).environment.parse(text)


def control_texts(template: Template, rendering: str = "") -> tuple[list[str], list[str]]:
    """The special tokens, and those that a model writes itself, in a template's literals and one of its renderings."""
    written = literals(template.text) + "\n" + rendering
    own = set(OWN.findall(written))
    return sorted(set(SPECIAL.findall(written)) - own), sorted(own)


def tokenizer_for(template: Template, eos: str = "</s>", rendering: str = "") -> PreTrainedTokenizerFast:
    """`eos`: the token that the tokenizer names its end. `rendering`: a text of the template to look for tokens in."""
    special, own = control_texts(template, rendering)
    backend = Tokenizer.from_str(words_and_merges())
    backend.add_tokens([AddedToken(token, normalized=False) for token in own])
    for token in dict.fromkeys(["<s>", "</s>", eos, *special]):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="</s>")
    tokenizer.chat_template = template.text
    return tokenizer


@cache
def _byte_of() -> dict[str, int]:
    """Character of a byte-level vocabulary → its byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def spellings(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """What each token of the vocabulary stands for."""
    byte_of = _byte_of()
    added = {token: each.content.encode() for token, each in tokenizer.added_tokens_decoder.items()}
    texts = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [added.get(token) or bytes(byte_of[char] for char in text) for token, text in enumerate(texts)]
