"""What other programs need to run an export: an Ollama Modelfile, a vLLM command. Pure: nothing is started.

Ollama writes a conversation with a Go template, transformers with a jinja template. No list of model families is kept:
a few conversations of sentinels are rendered with the jinja template, what stands between the sentinels becomes the Go
template, and both are compared on conversations of every shape that Ollama hands over. A template that does more than
put text around the turns is refused, and said to be.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, Refusal, problem

Message = dict[str, str]
Render = Callable[
    [list[Message], bool], str
]  # (messages, whether an answer is opened) → text; may raise anything

SYSTEM, QUESTION, ANSWER, QUESTION_2, ANSWER_2, QUESTION_3 = map(chr, range(0xE000, 0xE006))


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# ------------------------------------------------------------------------------------------ the template


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the turns of a conversation.

    `head` stands before the first question, `between` a question and its answer, `opening` between the last question
    and the answer to be written, `after` between an answer and the next question. The system message stands between
    the two texts of `system`: in place of `head`, or with `late` just before the last question (Mistral), where the
    first of the two is empty. None: the template takes none.
    """

    head: str
    between: str
    opening: str
    after: str
    system: tuple[str, str] | None
    late: bool = False


def pieces(render: Render, bos: str = "") -> Pieces:
    """The pieces of a template. Leaves out `bos` at the beginning: of a model that says so, Ollama adds it itself.

    Raises Refusal where the template cannot be told as pieces.
    """

    def rendered(*messages: Message) -> str:
        return render(list(messages), True).removeprefix(bos)

    ask, reply, ask_again = said("user", QUESTION), said("assistant", ANSWER), said("user", QUESTION_2)
    try:
        alone, turns = rendered(ask), rendered(ask, reply, ask_again)
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise Refusal(problem("ollama-template-fails", why=str(error)[:200])) from error
    found = Pieces(
        head=_between(alone, "", QUESTION), between=_between(turns, QUESTION, ANSWER),
        opening=_between(alone, QUESTION, ""), after=_between(turns, ANSWER, QUESTION_2), system=None,
    )  # fmt: skip
    try:
        told = rendered(said("system", SYSTEM), ask, reply, ask_again)
    except Exception:
        told = ""  # Gemma's refuses one
    if SYSTEM in told:
        late = told.index(SYSTEM) > told.index(ANSWER)
        last = QUESTION_2 if late else QUESTION
        before = "" if late else _between(told, "", SYSTEM)
        found = Pieces(
            found.head, found.between, found.opening, found.after, (before, _between(told, SYSTEM, last)), late
        )  # fmt: skip
    for conversation in _conversations(found.system is not None):
        try:
            wanted = rendered(*conversation)
        except Exception as error:
            raise Refusal(problem("ollama-template-fails", why=str(error)[:200])) from error
        if written(found, conversation) != wanted:
            raise Refusal(problem("ollama-template-differs"))
    return found


def _between(text: str, one: str, other: str) -> str:
    """What stands between two sentinels; "" is the beginning or the end. Raises Refusal if one is not there once."""
    if any(mark and text.count(mark) != 1 for mark in (one, other)):
        raise Refusal(problem("ollama-template-differs"))
    start = text.index(one) + len(one) if one else 0
    end = text.index(other) if other else len(text)
    if end < start:
        raise Refusal(problem("ollama-template-differs"))
    return text[start:end]


def _conversations(system: bool) -> list[list[Message]]:
    """Of every shape that a person has with a model: one to three questions, with and without a system message."""
    turns = [
        said("user", QUESTION), said("assistant", ANSWER), said("user", QUESTION_2), said("assistant", ANSWER_2),
        said("user", QUESTION_3),
    ]  # fmt: skip
    plain = [turns[:1], turns[:3], turns]
    return [*plain, *([[said("system", SYSTEM), *one] for one in plain] if system else [])]


def written(given: Pieces, messages: Sequence[Message]) -> str:
    """A conversation as the Go template of these pieces writes it."""
    system = next((one["content"] for one in messages if one["role"] == "system"), "")
    turns = [one for one in messages if one["role"] != "system"]
    text = given.head
    if system and given.system and not given.late:
        text = given.system[0] + system + given.system[1]
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        if turn["role"] == "user":
            if system and given.system and given.late and last:
                text += system + given.system[1]
            text += turn["content"] + (given.opening if last else given.between)
        else:
            text += turn["content"] + ("" if last else given.after)
    return text


def go_template(given: Pieces) -> str:
    """The pieces as a template of Go's text/template, over Ollama's .System and .Messages.

    Ollama counts the system message among the messages, too; one that is neither of the two roles is passed over.
    """
    close, opens = _cut(given)
    head = _literal(given.head.removesuffix(opens))
    if given.system and not given.late:
        before, behind = given.system[0], given.system[1].removesuffix(opens)
        system = f"{{{{ .System }}}}{_literal(behind)}"
        otherwise = f"{{{{ else }}}}{head}" if head else ""
        head = f"{{{{ if .System }}}}{_literal(before)}{system}{otherwise}{{{{ end }}}}"
    late = ""
    if given.system and given.late:
        late = f"{{{{ if and $.System $last }}}}{{{{ $.System }}}}{_literal(given.system[1])}{{{{ end }}}}"
    answer = _literal(given.opening)
    if given.opening != given.between:
        answer = f"{{{{ if $last }}}}{answer}{{{{ else }}}}{_literal(given.between)}{{{{ end }}}}"
    closed = f"{{{{ if not $last }}}}{_literal(close)}{{{{ end }}}}" if close else ""
    return (
        head
        + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + f'{{{{ if eq .Role "user" }}}}{_literal(opens)}{late}{{{{ .Content }}}}{answer}'
        + f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{closed}{{{{ end }}}}{{{{ end }}}}'
    )


def _cut(given: Pieces) -> tuple[str, str]:
    """What closes an answer and what opens a question: together they are `after`. A question is opened by whatever
    stands before every one of them, the first included."""
    before = [given.after, given.head]
    if given.system and not given.late:
        before.append(given.system[1])
    shared = len(list(takewhile(lambda ends: len(set(ends)) == 1, zip(*map(reversed, before), strict=False))))
    close = given.after[: len(given.after) - shared]
    return close, given.after[len(close) :]


def _literal(text: str) -> str:
    """Text inside a Go template inside a Modelfile: neither braces nor three quotes may be taken for their own."""
    guarded = re.sub(r'\{\{|"""', lambda found: f"{{{{ {json.dumps(found[0])} }}}}", text)
    return f'{{{{ "\\n" }}}}{guarded[1:]}' if guarded.startswith("\n") else guarded


def doubts(render: Render, template: str) -> list[Problem]:
    """What the jinja template does and no Go template can: told beside the Modelfile, since answers may differ by it."""

    def without(text: str, answer: str = ANSWER) -> bool:
        """Whether the text of a message is not written as it is."""
        conversation = [said("user", text), said("assistant", answer), said("user", QUESTION_2)]
        try:
            told = render(conversation, True)
        except Exception:  # it refuses the message, so no difference in writing it can be told
            return False
        return text not in told or answer not in told

    found = []
    if without(f" {QUESTION} ") or without(QUESTION, f" {ANSWER} "):
        found.append(problem("ollama-trims"))
    if without(QUESTION, f"<think>\n{ANSWER_2}\n</think>\n\n{ANSWER}"):
        found.append(problem("ollama-forgets-thoughts"))
    if "strftime_now" in template:
        found.append(problem("ollama-date"))
    if "tools" in template:
        found.append(problem("ollama-tools"))
    return found


def modelfile(
    source: str,
    template: str | None,
    stops: Sequence[str],
    *,
    adapter: str = "",
    context: int | None = None,
    sampling: Mapping[str, float] | None = None,
    notes: Sequence[Problem] = (),
) -> str:
    """An Ollama Modelfile. `source` is a folder or a GGUF file, `adapter` a folder with LoRA alone beside it.
    `template` None: the notes say why there is none."""
    lines = [f"# {note.text()}" for note in notes]
    lines.append(f"FROM {source}")
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    if template is not None:
        lines += ["", f'TEMPLATE """{template}"""', ""]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops if '"' not in stop]
    if context:
        lines.append(f"PARAMETER num_ctx {min(context, 32_768)}")  # Ollama reserves memory for all of it
    lines += [f"PARAMETER {name} {value:g}" for name, value in (sampling or {}).items()]
    return "\n".join(lines) + "\n"


def from_file(text: str, file: str) -> str:
    """The text of a Modelfile, with the weights taken from a file that lies beside it."""
    return re.sub(r"(?m)^FROM .*$", lambda _: f"FROM ./{file}", text, count=1)


def tag(name: str) -> str:
    """A name as Ollama and vLLM take one: small letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "model"


def quoted(path: Path | str) -> str:
    """A path as one word of a shell command."""
    return shlex.quote(str(path))


# ------------------------------------------------------------------------------------------ vLLM

# What vLLM takes as --max-lora-rank (vllm/config/lora.py); the default is 16.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_text(folder: Path, name: str, base: str = "", adapter: Mapping[str, Any] | None = None) -> str:
    """`vllm serve` of a whole model, or of a base with LoRA beside it."""
    if not adapter:
        return f"vllm serve {quoted(folder)} --served-model-name {quoted(name)}"
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"{name}={folder}"]
    if (needed := max_lora_rank(adapter)) and needed > 16:
        words += ["--max-lora-rank", str(needed)]
    if (folder / "chat_template.jinja").exists():
        words += ["--chat-template", str(folder / "chat_template.jinja")]
    return shlex.join(words)


def max_lora_rank(adapter: Mapping[str, Any]) -> int | None:
    """The smallest --max-lora-rank that holds the adapter; None where none does."""
    largest = max([adapter.get("r") or 0, *(adapter.get("rank_pattern") or {}).values()])
    return next((one for one in RANKS if one >= largest), None)


def vllm_problems(adapter: Mapping[str, Any]) -> list[Problem]:
    """What of an adapter (its adapter_config.json) vLLM does not take (vllm/lora/peft_helper.py). Empty: it is served
    beside its base; a merged model always is, where vLLM knows its architecture."""
    found = []
    if adapter.get("task_type") == "SEQ_CLS":
        found.append(problem("vllm-judge"))
    if whole := adapter.get("modules_to_save"):
        found.append(problem("vllm-whole-modules", names=", ".join(whole)))
    if adapter.get("use_dora"):
        found.append(problem("vllm-dora"))
    if adapter.get("bias", "none") != "none":
        found.append(problem("vllm-bias"))
    if adapter.get("rank_pattern") or adapter.get("alpha_pattern"):
        found.append(problem("vllm-patterns"))
    if max_lora_rank(adapter) is None:
        found.append(problem("vllm-rank", rank=adapter.get("r"), most=RANKS[-1]))
    targets = adapter.get("target_modules") or ()
    ends = {one.rpartition(".")[2] for one in ([targets] if isinstance(targets, str) else targets)}
    if outer := sorted(ends & {"embed_tokens", "lm_head", "wte"}):
        found.append(problem("vllm-embeddings", names=", ".join(outer)))
    return found
