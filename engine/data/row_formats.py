"""The forms that people's data files have: names of columns, of the parts of a turn, and of who speaks in it."""

from __future__ import annotations

# LLaMA-Factory's defaults, which users' files rely on. Where an entry gives columns, those it leaves out do not exist.
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
# Every role that an entry may give a column to: LLaMA-Factory's, and `weight`, a row's own weight in the loss.
COLUMN_ROLES = (*COLUMNS["alpaca"], "messages", "kto_tag", *MEDIA, "weight")
ROLE_TAGS = ("role", "from", "speaker")  # keys of a turn that say who speaks
CONTENT_TAGS = ("content", "value", "text", "parts")  # and what

CALL_ROLE = "call"  # the role of a turn that is a call of tools and nothing else
# Who speaks, by the names that people write. Compared without case; an entry's own tags go before.
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
