"""Chat templates as text: whether one can be parsed at all, before any process renders a row with it.

What a template writes, and where answers begin and end, is determined by `engine.worker.templates`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from engine.core import regular_files
from engine.core.problems import Problem, problem

TEMPLATE_FOLDER = Path(__file__).parent / "templates"  # the built-in ones, by name
MAX_TEMPLATE_BYTES = 1 << 20  # real ones have a few thousand


def template_file_problem(path: Path) -> Problem | None:
    """The problem with the template in a file; None if there is none."""
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            return problem("template-too-large", file=path.name)
        return template_problem(path.name, regular_files.read_text(path))
    except OSError as error:
        return problem("file-unreadable", file=path, why=error.strerror)
    except UnicodeDecodeError:
        return problem("file-not-text", file=path)


@lru_cache(maxsize=64)
def template_problem(file: str, text: str) -> Problem | None:
    """The error in `text`, read from `file`, that jinja reports with the configuration of transformers."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, transformers' own mark around an answer."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    try:
        jinja.compile(text)  # it is not executed
    except TemplateSyntaxError as error:
        return problem("template-broken", file=file, line=error.lineno, what=error.message)
    except RecursionError:
        return problem("template-too-large", file=file)
    return None
