"""Common formats of data files: names of columns, of the parts of a turn, and of roles."""

from __future__ import annotations

from typing import Any

# LLaMA-Factory's defaults, which users' files rely on. If an entry lists columns, those it leaves out do not exist.
COLUMNS = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
        "tools": "tools",
        "chosen": "chosen",
        "rejected": "rejected",
    },
    "sharegpt": {
        "messages": "conversations",
        "system": "system",
        "tools": "tools",
        "chosen": "chosen",
        "rejected": "rejected",
    },
    "openai": {"messages": "messages", "tools": "tools", "chosen": "chosen", "rejected": "rejected"},
}
TAGS = {
    "sharegpt": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    },
    "openai": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function_call",
        "system_tag": "system",
    },
}
MEDIA = ("images", "videos", "audios")
# Every role that an entry may assign to a column: LLaMA-Factory's, and `weight`, the row's own weight in the loss.
COLUMN_ROLES = (*COLUMNS["alpaca"], "messages", "kto_tag", *MEDIA, "weight")
ROLE_TAGS = ("role", "from", "speaker")  # keys of a turn that name the speaker
CONTENT_TAGS = ("content", "value", "text", "parts")  # and the content

CALL_ROLE = "call"  # the role of a turn that contains only tool calls
# Roles by their common names. Compared without case; an entry's own tags take precedence.
SPEAKERS = {
    "system": "system", "developer": "system", "系统": "system",
    "user": "user", "human": "user", "prompter": "user", "用户": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "claude": "assistant", "bard": "assistant", "bing": "assistant", "助手": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool", "tool_response": "tool",
    "tool_result": "tool", "function_response": "tool", "function_result": "tool",
    "function_call": CALL_ROLE, "tool_call": CALL_ROLE, "tool_calls": CALL_ROLE,
}  # fmt: skip
ROLE_OF_TAG = {
    "system_tag": "system",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": CALL_ROLE,
}


def messages_of_input(value: Any) -> list[Any] | None:
    """The messages of the `input` of OpenAI's preference rows, an object with `messages` and `tools`; None for any
    other value."""
    messages = value.get("messages") if isinstance(value, dict) else None
    return messages if isinstance(messages, list) else None
