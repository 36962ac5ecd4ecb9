"""An Ollama Modelfile for an export, with a Go template derived from the jinja one. Pure: nothing is started.

Ollama renders a conversation with a Go template, transformers with a jinja template. There is no list of model
families: a few conversations of sentinels are rendered with the jinja template, the text between the sentinels becomes
the Go template, and both are compared on conversations of every shape that Ollama passes on. A template that does more
than add text around the turns is rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from engine.core.problems import Problem, Refusal, problem

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # (messages, whether an answer is opened) → text; may raise anything

SYSTEM, QUESTION, ANSWER, QUESTION_2, ANSWER_2, QUESTION_3 = map(chr, range(0xE000, 0xE006))


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# ------------------------------------------------------------------------------------------ the template


@dataclass(frozen=True)
class TemplatePieces:
    """What a chat template writes around the turns of a conversation.

    `head` is before the first question, `between` is between a question and its answer, `opening` between the last
    question and the answer to be generated, `after` between an answer and the next question. The system message is
    between the two texts of `system`: in place of `head` or, with `late`, just before the last question (Mistral),
    where the first of the two is empty. None: the template does not accept one.
    """

    head: str
    between: str
    opening: str
    after: str
    system: tuple[str, str] | None
    late: bool = False


def template_pieces(render: Render, bos: str = "") -> TemplatePieces:
    """The pieces of a template, without `bos` at the beginning, which Ollama adds itself if the model says so.

    Raises Refusal if the template cannot be expressed as pieces.
    """

    def rendered(*messages: Message) -> str:
        return render(list(messages), True).removeprefix(bos)

    ask, reply, ask_again = (
        message("user", QUESTION),
        message("assistant", ANSWER),
        message("user", QUESTION_2),
    )
    try:
        alone, turns = rendered(ask), rendered(ask, reply, ask_again)
    except Exception as error:  # a template is a program and may raise anything
        raise Refusal(problem("ollama-template-fails", why=str(error)[:200])) from error
    result = TemplatePieces(
        head=_between(alone, "", QUESTION),
        between=_between(turns, QUESTION, ANSWER),
        opening=_between(alone, QUESTION, ""),
        after=_between(turns, ANSWER, QUESTION_2),
        system=None,
    )
    try:
        with_system = rendered(message("system", SYSTEM), ask, reply, ask_again)
    except Exception:
        with_system = ""  # Gemma's rejects one
    if SYSTEM in with_system:
        late = with_system.index(SYSTEM) > with_system.index(ANSWER)
        last = QUESTION_2 if late else QUESTION
        before = "" if late else _between(with_system, "", SYSTEM)
        result = TemplatePieces(
            result.head,
            result.between,
            result.opening,
            result.after,
            (before, _between(with_system, SYSTEM, last)),
            late,
        )
    for conversation in _conversations(result.system is not None):
        try:
            expected = rendered(*conversation)
        except Exception as error:
            raise Refusal(problem("ollama-template-fails", why=str(error)[:200])) from error
        if render_pieces(result, conversation) != expected:
            raise Refusal(problem("ollama-template-differs"))
    return result


def _between(text: str, first: str, second: str) -> str:
    """The text between two sentinels; "" is the beginning or the end. Raises Refusal unless each occurs exactly
    once."""
    if any(mark and text.count(mark) != 1 for mark in (first, second)):
        raise Refusal(problem("ollama-template-differs"))
    start = text.index(first) + len(first) if first else 0
    end = text.index(second) if second else len(text)
    if end < start:
        raise Refusal(problem("ollama-template-differs"))
    return text[start:end]


def _conversations(system: bool) -> list[list[Message]]:
    """Conversations of one to three questions, with and without a system message."""
    turns = [
        message("user", QUESTION),
        message("assistant", ANSWER),
        message("user", QUESTION_2),
        message("assistant", ANSWER_2),
        message("user", QUESTION_3),
    ]
    plain = [turns[:1], turns[:3], turns]
    return [
        *plain,
        *([[message("system", SYSTEM), *conversation] for conversation in plain] if system else []),
    ]


def render_pieces(pieces: TemplatePieces, messages: Sequence[Message]) -> str:
    """A conversation as rendered by the Go template of these pieces."""
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    turns = [message for message in messages if message["role"] != "system"]
    text = pieces.head
    if system and pieces.system and not pieces.late:
        text = pieces.system[0] + system + pieces.system[1]
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        if turn["role"] == "user":
            if system and pieces.system and pieces.late and last:
                text += system + pieces.system[1]
            text += turn["content"] + (pieces.opening if last else pieces.between)
        else:
            text += turn["content"] + ("" if last else pieces.after)
    return text


def go_template(pieces: TemplatePieces) -> str:
    """The pieces as a template of Go's text/template, over Ollama's .System and .Messages.

    Ollama also counts the system message among the messages; messages with neither of the two roles are skipped.
    """
    close, opens = _split_after(pieces)
    head = _literal(pieces.head.removesuffix(opens))
    if pieces.system and not pieces.late:
        before, behind = pieces.system[0], pieces.system[1].removesuffix(opens)
        system = f"{{{{ .System }}}}{_literal(behind)}"
        otherwise = f"{{{{ else }}}}{head}" if head else ""
        head = f"{{{{ if .System }}}}{_literal(before)}{system}{otherwise}{{{{ end }}}}"
    late = ""
    if pieces.system and pieces.late:
        late = f"{{{{ if and $.System $last }}}}{{{{ $.System }}}}{_literal(pieces.system[1])}{{{{ end }}}}"
    answer = _literal(pieces.opening)
    if pieces.opening != pieces.between:
        answer = f"{{{{ if $last }}}}{answer}{{{{ else }}}}{_literal(pieces.between)}{{{{ end }}}}"
    closed = f"{{{{ if not $last }}}}{_literal(close)}{{{{ end }}}}" if close else ""
    return (
        head
        + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + f'{{{{ if eq .Role "user" }}}}{_literal(opens)}{late}{{{{ .Content }}}}{answer}'
        + f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{closed}{{{{ end }}}}{{{{ end }}}}'
    )


def _split_after(pieces: TemplatePieces) -> tuple[str, str]:
    """What closes an answer and what opens a question: together they are `after`. A question is opened by whatever is
    before every question, including the first."""
    before = [pieces.after, pieces.head]
    if pieces.system and not pieces.late:
        before.append(pieces.system[1])
    shared = len(list(takewhile(lambda ends: len(set(ends)) == 1, zip(*map(reversed, before), strict=False))))
    close = pieces.after[: len(pieces.after) - shared]
    return close, pieces.after[len(close) :]


def _literal(text: str) -> str:
    """Text inside a Go template inside a Modelfile: neither braces nor three quotes may be interpreted."""
    guarded = re.sub(r'\{\{|"""', lambda match: f"{{{{ {json.dumps(match[0])} }}}}", text)
    return f'{{{{ "\\n" }}}}{guarded[1:]}' if guarded.startswith("\n") else guarded


def template_warnings(render: Render, template: str) -> list[Problem]:
    """What the jinja template does and a Go template cannot: noted in the Modelfile, since answers may differ because
    of it."""

    def without(text: str, answer: str = ANSWER) -> bool:
        """Whether the text of a message is changed when it is rendered."""
        conversation = [message("user", text), message("assistant", answer), message("user", QUESTION_2)]
        try:
            rendered = render(conversation, True)
        except Exception:  # it rejects the message, so a difference in rendering cannot be determined
            return False
        return text not in rendered or answer not in rendered

    problems = []
    if without(f" {QUESTION} ") or without(QUESTION, f" {ANSWER} "):
        problems.append(problem("ollama-trims"))
    if without(QUESTION, f"<think>\n{ANSWER_2}\n</think>\n\n{ANSWER}"):
        problems.append(problem("ollama-forgets-thoughts"))
    if "strftime_now" in template:
        problems.append(problem("ollama-date"))
    if "tools" in template:
        problems.append(problem("ollama-tools"))
    return problems


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
    """An Ollama Modelfile. `source` is a folder or a GGUF file, `adapter` a folder with a LoRA adapter next to it.
    Without a `template`, the notes say why."""
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


def with_weights_file(text: str, file: str) -> str:
    """The text of a Modelfile, with the weights taken from a file next to it."""
    return re.sub(r"(?m)^FROM .*$", lambda _: f"FROM ./{file}", text, count=1)


def model_name(name: str) -> str:
    """A model name that Ollama and vLLM accept: lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "model"
