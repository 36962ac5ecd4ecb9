"""Estimate how large a regular expression becomes when compiled, from its text.

`(?:[a-z]{500}){500}` is short to type and has a quarter of a million states; nested once more it takes all memory.
"""

from __future__ import annotations

import re

MAX_STATES = 20_000  # a few megabytes, compiled in a fraction of a second
QUANTIFIER = re.compile(r"\{(\d*)(,?)(\d*)\}|[*+?]")
GROUP = re.compile(r"\((?:\?(?:P?<\w+>|<[=!]|[:=!>|]|[a-zA-Z-]+:?))?")
ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]", re.DOTALL)


def pattern_states(pattern: str) -> int:
    """A lower bound of a pattern's number of states: its characters, multiplied by the repetitions around them. The
    time is bounded by its length; unknown constructs are counted once."""
    groups: list[int] = [0]  # states of each open group
    last, place = 0, 0  # states of what a quantifier would repeat
    while place < len(pattern):
        if token := ESCAPE_OR_CLASS.match(pattern, place):
            last, place = 1, token.end()
            groups[-1] += last
        elif opening := GROUP.match(pattern, place):
            groups.append(0)
            last, place = 0, opening.end()
        elif pattern[place] == ")" and len(groups) > 1:
            last, place = groups.pop(), place + 1
            groups[-1] += last
        elif quantifier := QUANTIFIER.match(pattern, place):
            least, comma, most = quantifier[1], quantifier[2], quantifier[3]
            times = max((int(number[:9]) for number in (least, comma and most) if number), default=1)
            groups[-1] += last * (times - 1) if times > 1 else 0
            last, place = last * max(times, 1), quantifier.end()
        else:
            last, place = 1, place + 1
            groups[-1] += last
    return sum(groups)
