"""Shell text → its commands as lists of words, with the quotes, line continuations and variables of bash, cmd and
PowerShell.

Nothing is run. A variable that the text itself sets is substituted; what only a shell could know (`$1`, `$(date)`)
stays as it is written, and its name is kept, so that the user can be told.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

VARIABLE_NAME = re.compile(r"[A-Za-z_]\w*")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=(.*)", re.S)
# A continued line: \ in bash, ^ in cmd, ` in PowerShell. Blanks after the mark are a mistake with the same meaning.
CONTINUED = re.compile(r"[\\^`][ \t]*(?:\n|$)")
REDIRECTION = re.compile(r"(?:\d|&)?>{1,2}(?:&\d|&-)?|<")
HERE_DOCUMENT = re.compile(
    r"^[^\n]*?(?:cat|tee)[^\n]*?<<-?\s*(['\"]?)(\w+)\1[^\n]*\n(.*?)^\s*\2[ \t]*$\n?", re.M | re.S
)
WRITTEN_TO = re.compile(r">{1,2}\s*['\"]?([^\s'\"<>|;&]+)|\btee\s+(?:-a\s+)?['\"]?([^\s'\"<>|;&]+)")
WINDOWS_SYNTAX = re.compile(r"[\^`][ \t]*$|^\s*(?:\$env:|set\s+\w+=|@echo)", re.M | re.I)
# Assignments in PowerShell and cmd, and their form in bash.
ASSIGNMENT_REWRITES = (
    (re.compile(r"^\s*\$env:(\w+)\s*=\s*", re.M | re.I), r"export \1="),
    (re.compile(r"^\s*\$(\w+)\s*=\s*", re.M), r"\1="),
    (re.compile(r"^\s*set\s+\"(\w+)=([^\"\n]*)\"", re.M | re.I), r'export \1="\2"'),
    (re.compile(r"^\s*set\s+(\w+)=", re.M | re.I), r"export \1="),
)


@dataclass
class Script:
    """The content of a text: `commands` as lists of words, the `exported` variables, `documents` (here-documents
    written to files, name → text), and the names in `unknown` that are used but not set."""

    commands: list[list[str]] = field(default_factory=list)
    exported: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def read_script(text: str) -> Script:
    """The commands of a script. Raises ValueError if a quote is not closed."""
    script = Script()

    def keep(match: re.Match[str]) -> str:
        target = WRITTEN_TO.search(match[0].split("\n", 1)[0])
        if target:
            script.documents[target[1] or target[2]] = match[3]
        return "\n"

    text = HERE_DOCUMENT.sub(keep, text)
    windows = bool(WINDOWS_SYNTAX.search(text))
    for pattern, ours in ASSIGNMENT_REWRITES:
        text = pattern.sub(ours, text)
    lexer = _Lexer(text, windows, script)
    while (words := lexer.command()) is not None:
        inner = next(
            (words[index + 1] for index, word in enumerate(words[:-1]) if word == "-c" and _is_shell(words[index - 1])),
            None,
        )
        if inner is not None:  # bash -c "…"
            script.commands += read_script(inner).commands
        else:
            _keep_command(words, lexer.variables, script)
    return script


def _is_shell(word: str) -> bool:
    return word.rpartition("/")[2] in ("bash", "sh", "zsh")


def _keep_command(words: list[str], variables: dict[str, str | list[str]], script: Script) -> None:
    """Record a command's assignments; keep the command if there is more to it."""
    if not words:
        return
    exports = words[0] == "export"
    rest = words[1:] if exports else words
    assigned = [ASSIGNMENT.fullmatch(word) for word in rest]
    if all(assigned) or exports:
        for match in filter(None, assigned):
            variables[match[1]] = match[2]
        names = [match[1] for match in assigned if match] + [word for word in rest if VARIABLE_NAME.fullmatch(word)]
        if exports:
            script.exported |= {name: str(variables[name]) for name in names if name in variables}
        return
    if words[0].startswith("--") and script.commands:
        script.commands[-1] += words  # its line continuation was forgotten, or a comment is in between
        return
    script.commands.append(words)


class _Lexer:
    """Reads one command after another from a text, with the variables set so far."""

    def __init__(self, text: str, windows: bool, script: Script):
        self.text, self.at, self.windows, self.script = text, 0, windows, script
        self.variables: dict[str, str | list[str]] = {}

    def command(self) -> list[str] | None:
        """The words of the next command, which may be none; None at the end."""
        if self.at >= len(self.text):
            return None
        words: list[str] = []
        while self.at < len(self.text):
            rest = self.text[self.at :]
            if continued := CONTINUED.match(rest):
                self.at += continued.end()
            elif rest[0] in "\n;" or rest.startswith(("&&", "||")) or rest[0] == "|":
                self.at += 2 if rest[:2] in ("&&", "||") else 1
                return words
            elif redirection := REDIRECTION.match(rest):
                self.at += redirection.end()
                if "&" not in redirection[0][1:]:
                    self._blanks()
                    self._word()
            elif rest[0] in " \t&()":
                self.at += 1
            elif rest[0] == "#":
                self._comment()
            else:
                words += self._word()
        return words

    def _blanks(self) -> None:
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1

    def _comment(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _word(self) -> list[str]:
        """A word; an unquoted variable may turn into several words, or none."""
        made: list[str] = []
        parts, quoted = [""], False
        while self.at < len(self.text):
            sign = self.text[self.at]
            if sign in " \t\n;|&<>" or CONTINUED.match(self.text, self.at):
                break
            if sign == "(" and parts[-1].endswith("=") and not made:
                return self._array(parts[-1][:-1].rstrip("+"))
            if sign == ")":
                break
            if sign in "'\"":
                quoted = True
                several = self._quoted(sign)
                made += [parts[-1] + text for text in several[:-1]]
                parts[-1] = (parts[-1] if len(several) == 1 else "") + several[-1]
            elif sign == "\\" and not self._literal(parts[-1]):
                parts[-1] += self.text[self.at + 1 : self.at + 2]
                self.at += 2
            elif sign in "$%`" and (value := self._value()) is not None:
                whole = isinstance(value, list) or (self.windows and sign == "$")  # PowerShell does not split
                several = value if isinstance(value, list) else [value] if whole else value.split() or [""]
                made += [parts[-1] + several[0], *several[1:-1]] if len(several) > 1 else []
                parts[-1] = several[-1] if len(several) > 1 else parts[-1] + several[0]
            else:
                parts[-1] += sign
                self.at += 1
        return [*made, parts[-1]] if parts[-1] or quoted else made

    def _literal(self, before: str) -> bool:
        """Whether a backslash is literal, as in a Windows path."""
        return self.windows or bool(re.match(r"[A-Za-z]:", before))

    def _array(self, name: str) -> list[str]:
        """`NAME=(a b c)`: stored as a list, and not a word of any command."""
        self.at += 1
        words: list[str] = []
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "#":
                self._comment()
            elif continued := CONTINUED.match(self.text, self.at):
                self.at = continued.end()
            elif self.text[self.at] in " \t\n":
                self.at += 1
            else:
                words += self._word()
        self.at += 1
        before = self.variables.get(name)
        self.variables[name] = [*before, *words] if isinstance(before, list) else words
        return []

    def _quoted(self, sign: str) -> list[str]:
        start, text = self.at, [""]
        self.at += 1
        while self.at < len(self.text):
            here = self.text[self.at]
            if here == sign:
                self.at += 1
                return text
            if here == "\\" and sign == '"' and not self.windows and self.text[self.at + 1 : self.at + 2] in '"\\$`\n':
                text[-1] += self.text[self.at + 1].strip("\n")
                self.at += 2
            elif here in "$%`" and sign == '"' and (value := self._value()) is not None:
                several = value if isinstance(value, list) else [value]
                text = [*text[:-1], text[-1] + "".join(several[:1]), *several[1:]]
            else:
                text[-1] += here
                self.at += 1
        line = self.text.count("\n", 0, start) + 1
        raise ValueError(f"line {line}: a quote {sign} is not closed")

    def _value(self) -> str | list[str] | None:
        """The value of a `$` or `%` at this position, moving past it; None if it is literal."""
        rest = self.text[self.at :]
        if inner := re.match(r"\$\(|`[^`\n]+`", rest):
            return self._inner(inner)
        braces = re.match(r"\$\{(\w+)(\[[@*]\])?(?::?[-=]([^}]*))?[^}]*\}", rest)
        match = braces or re.match(r"\$(?:env:)?(\w+|[@*#?$])", rest) or re.match(r"%(\w+)%", rest)
        if not match:
            return None
        name = match[1]
        value = self.variables.get(name, self.script.exported.get(name))
        if value is None and braces and braces[3] is not None:
            value = braces[3].strip("'\"")
        if value is None:
            if rest[0] == "%":
                return None
            self.script.unknown.append(match[0])
            value = match[0]
        self.at += match.end()
        return value

    def _inner(self, match: re.Match[str]) -> str:
        """A command inside a command: its output is unknown, so its text is kept."""
        end = self.at + match.end()
        if match[0] == "$(":
            depth = 1
            while end < len(self.text) and depth:
                depth += {"(": 1, ")": -1}.get(self.text[end], 0)
                end += 1
        text = self.text[self.at : end]
        self.at = end
        self.script.unknown.append(text)
        return text.replace(" ", "_")
