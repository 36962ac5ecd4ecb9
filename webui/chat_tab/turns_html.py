"""A conversation as HTML: its turns with the answers side by side, and the list of earlier conversations."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from engine.serving import conversation_tree
from engine.serving.chat_client import Answer
from engine.serving.conversation_tree import Conversation, Turn
from webui.chat_tab import answer_html
from webui.chat_tab.answer_html import Titles
from webui.words import Words


def past_turns(conversation: Conversation, titles: Titles, words: Words, answering: bool = False) -> str:
    """All finished turns on the path. Then, unless a question is being answered: a button to ask the last one again, if
    its answers were interrupted; a button to later turns."""
    turns = "".join(_turn(conversation, place, titles, words) for place in conversation.path())
    if answering:
        return turns
    if conversation.tip >= 0 and conversation.turns[conversation.tip].interrupted:
        turns += (
            f'<p class="onward"><span class="quiet">{escape(words("chat-interrupted"))}</span> '
            f'<button type="button" class="plain" data-do="again">{escape(words("chat-retry"))}</button></p>'
        )
    later = conversation.children(conversation.tip)
    if not later:
        return turns
    onward = (
        f'<button type="button" class="plain" data-do="go" data-turn="{later[-1]}">'
        f"{escape(words('chat-onward'))}</button>"
    )
    return f'{turns}<p class="onward">{onward}</p>'


def live_turn(question: Turn, answers: Sequence[Answer], titles: Titles, words: Words) -> str:
    """A turn that is being answered."""
    cells = "".join(answer_html.live(answer, titles, words) for answer in answers)
    # Sent again with every few tokens, so without its images.
    asking = _question(question, words, with_images=False)
    return f'<section class="turn">{asking}<div class="answers">{cells}</div></section>'


def waiting_turn(question: Turn, message: str, words: Words) -> str:
    """A question that has no answers yet."""
    return f'<section class="turn">{_question(question, words)}<p class="quiet loading">{escape(message)}</p></section>'


def empty_html(words: Words) -> str:
    """Shown before the first question."""
    return f'<div class="empty"><b>{escape(words("chat-empty"))}</b><p>{escape(words("chat-empty-help"))}</p></div>'


def export_html(conversation: Conversation, words: Words) -> str:
    """The conversation as JSON lines, and a button to download it."""
    if conversation.tip < 0:
        return ""
    return (
        f'<pre id="talk-jsonl" hidden>{escape(conversation_tree.jsonl(conversation))}</pre>'
        '<button type="button" class="plain" '
        f'data-save="#talk-jsonl" data-name="chat.jsonl">{escape(words("chat-export"))}</button>'
    )


def conversation_list(conversations: Sequence[Conversation], words: Words) -> str:
    """The first questions of earlier conversations, with buttons to open and delete them."""
    return "".join(
        f'<div class="earlier"><button type="button" class="plain" data-do="open" data-turn="{number}">'
        f"{escape(_first_question(conversation))}</button>"
        f"{_small_button('drop', number, '×', words('chat-drop'))}</div>"
        for number, conversation in enumerate(conversations)
    )


def _first_question(conversation: Conversation) -> str:
    turns = conversation.turns_on_path() or conversation.turns
    return turns[0].question[:120] if turns else ""


def _turn(conversation: Conversation, place: int, titles: Titles, words: Words) -> str:
    turn = conversation.turns[place]
    cells = "".join(answer_html.finished(turn, place, model, titles, words) for model in turn.said)
    tools = _branch_buttons(conversation, place, words)
    tools += _small_button("edit", place, words("chat-edit"), words("chat-edit-title"))
    return f'<section class="turn">{_question(turn, words, tools)}<div class="answers">{cells}</div></section>'


def _branch_buttons(conversation: Conversation, place: int, words: Words) -> str:
    """Buttons to the other questions that were asked at this point; "" if there are none."""
    branches = conversation.children(conversation.turns[place].after)
    if len(branches) < 2:
        return ""
    number = branches.index(place)
    back, on = branches[max(number - 1, 0)], branches[min(number + 1, len(branches) - 1)]
    return (
        _small_button("go", back, "‹", words("branch-back"), off=back == place)
        + f"<span>{number + 1} / {len(branches)}</span>"
        + _small_button("go", on, "›", words("branch-on"), off=on == place)
    )


def _question(turn: Turn, words: Words, tools: str = "", with_images: bool = True) -> str:
    """A question, or the result of a tool; `tools` is HTML with its buttons."""
    pictures = "".join(f'<img class="thumbnail" src="{url}" alt="">' for url in turn.images)
    if turn.images and not with_images:
        pictures = f"<small>{escape(words('chat-images-count', count=len(turn.images)))}</small>"
    pictures = f'<p class="pictures">{pictures}</p>' if pictures else ""
    kind = f"<small>{escape(words('chat-tool-said'))}</small>" if turn.role == "tool" else ""
    return (
        f'<div class="asked"><div class="question {turn.role}">{kind}{pictures}{escape(turn.question)}</div>'
        f'{f"""<div class="tools">{tools}</div>""" if tools else ""}</div>'
    )


def _small_button(action: str, place: int, label: str, title: str, off: bool = False) -> str:
    return (
        f'<button type="button" data-do="{action}" data-turn="{place}" '
        f'title="{escape(title)}" aria-label="{escape(title)}"'
        f"{' disabled' if off else ''}>{escape(label)}</button>"
    )
