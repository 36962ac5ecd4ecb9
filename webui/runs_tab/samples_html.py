"""The newest answers of a run's model as HTML, each with its question and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from engine.core.reasoning import split_reasoning
from webui.numbers import short
from webui.text_html import folded_reasoning, lines
from webui.words import Words


def samples(latest_samples: Sequence[Mapping[str, Any]], words: Words) -> str:
    """A table of samples; `latest_samples` as returned by `engine.runs.samples.latest`."""
    if not latest_samples:
        return f'<p class="quiet">{escape(words("samples-none"))}</p>'
    heads = "".join(
        f"<th>{escape(words(f'samples-{column}'))}</th>" for column in ("step", "prompt", "answer", "reward")
    )
    body = "".join(
        f"<tr><td>{sample['step']:,}</td><td>{lines(_prompt_text(sample['prompt']))}</td>"
        f"<td>{_answer(sample, words)}</td><td>{_reward(sample, words)}</td></tr>"
        for sample in latest_samples
    )
    return f'<table class="samples"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _answer(sample: Mapping[str, Any], words: Words) -> str:
    """The answer, with its reasoning folded away."""
    parts = split_reasoning(str(sample["completion"]), opened=bool(sample.get("opened")) or None)
    text = folded_reasoning(parts.reasoning, words) + lines(parts.answer.strip("\n"))
    return text or f'<i class="quiet">{escape(words("samples-empty"))}</i>'


def _prompt_text(prompt: Any) -> str:
    """The messages of a prompt; roles are named if there is more than one."""
    if isinstance(prompt, str):
        return prompt
    messages = [message for message in prompt if isinstance(message, dict)] if isinstance(prompt, list) else []
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in messages)


def _reward(sample: Mapping[str, Any], words: Words) -> str:
    """The reward, and below it its parts."""
    parts = sample["rewards"] if isinstance(sample["rewards"], dict) else {}
    parts_text = " · ".join(f"{words.choice('stage.rewards', name)} {_number(value)}" for name, value in parts.items())
    return f"{_number(sample['reward'])}<small>{escape(parts_text)}</small>"


def _number(value: Any) -> str:
    return short(value) if isinstance(value, (int, float)) else "—"
