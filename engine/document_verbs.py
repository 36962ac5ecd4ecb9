"""The verb of the command line that makes rows from documents, and what can be done with a draft of them."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path

from engine.core import audit
from engine.core.problems import Refusal, problem, say, shell_language
from engine.documents import drafts, remarks, review, save
from engine.documents.drafts import Draft
from engine.documents.prompts import FORMS, LANGUAGES
from engine.documents.settings import DraftSettings
from engine.following import sentence, user_name
from engine.launch.workspace import Workplace, make_saves
from engine.models.discovery import is_hub_id

WHAT = ("make", "list", "show", "continue", "accept", "save", "delete")
POLL_S = 0.5


def add_options(verb: argparse.ArgumentParser) -> None:
    """What to do, and how a draft is made."""
    usual = DraftSettings()
    verb.add_argument("what", choices=WHAT, help="make rows from documents; otherwise with the draft of that ID")
    verb.add_argument("names", nargs="*", metavar="NAME", help="make: documents (pdf, docx, md, txt); else: a draft")
    verb.add_argument("--name", default="", help="of the data set; default: that of the first document")
    verb.add_argument("--base", default="", metavar="MODEL", help="folder of the model that is asked")
    verb.add_argument("--run", default="", help="a finished run whose model is asked, by ID as printed by list")
    verb.add_argument("--language", choices=LANGUAGES, default=usual.language, help="default: that of each passage")
    verb.add_argument(
        "--rows", type=int, default=usual.rows, metavar="N", help=f"questions for each passage; default: {usual.rows}"
    )
    verb.add_argument("--instruction", default="", metavar="TEXT", help="what else the questions should be like")
    verb.add_argument(
        "--length", type=int, default=usual.length, metavar="N",
        help=f"characters of a passage, half as many of Chinese; default: {usual.length}",
    )  # fmt: skip
    verb.add_argument(
        "--similarity", type=float, default=usual.similarity, metavar="SHARE",
        help=f"rows that are so much like earlier ones are repetitions; default: {usual.similarity}",
    )  # fmt: skip
    verb.add_argument(
        "--form", choices=FORMS, default=usual.form, help=f"of the model's answers; default: {usual.form}"
    )
    verb.add_argument(
        "--support", type=float, default=0.8, metavar="SHARE",
        help="accept: open rows of which at least this share stands in the passage, and all numbers; default: 0.8",
    )  # fmt: skip
    verb.add_argument("--format", choices=save.FORMATS, default=next(iter(save.FORMATS)), help="save: of the rows")


def documents(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Have a model of your own write questions and answers on documents; list, show, continue, accept, save or delete
    such drafts. make and continue print the draft's ID, and their progress on standard error; Ctrl-C stops them."""
    if arguments.what == "list":
        for draft in drafts.every_draft(workplace.saves):
            counts = review.counts_of(draft, review.rows_of(draft))
            print(f"{draft.state:<12} {counts.rows:>6} rows  {draft.id}  {draft.name}")
        return 0
    if not arguments.names or (arguments.what != "make" and len(arguments.names) > 1):
        raise Refusal(problem("draft-which"))
    if arguments.what == "make":
        if made := make_saves(workplace):
            print(sentence(made), file=sys.stderr)
        with _recorded(workplace, "make-draft", arguments.name or Path(arguments.names[0]).name):
            draft = _make(arguments, workplace)
        print(draft.id, flush=True)
        return _follow(draft)
    draft = drafts.get(workplace.saves, arguments.names[0])
    if arguments.what == "show":
        return _show(draft)
    with _recorded(workplace, "review-draft", f"{draft.name}: {arguments.what}"):
        if arguments.what == "continue":
            drafts.proceed(draft)
        elif arguments.what == "accept":
            print(review.accept_supported(draft, arguments.support, user_name()))
        elif arguments.what == "save":
            rows = review.rows_of(draft)
            print(save.save_accepted(draft, rows, arguments.format, workplace.data, user_name()))
        else:
            drafts.remove(draft)
    return _follow(draft) if arguments.what == "continue" else 0


def _recorded(workplace: Workplace, action: str, what: str) -> contextlib.AbstractContextManager[None]:
    return audit.recorded(workplace.saves, audit.shell(user_name()), action, what)


def _make(arguments: argparse.Namespace, workplace: Workplace) -> Draft:
    base = arguments.base
    settings = DraftSettings(
        base if not base or is_hub_id(base) else str(Path(base).absolute()),
        arguments.run,
        arguments.language,
        arguments.rows,
        arguments.instruction,
        arguments.similarity,
        arguments.length,
        arguments.form,
    )
    files = [(Path(name), Path(name).name) for name in arguments.names]
    return drafts.make(workplace, arguments.name or files[0][0].stem, files, settings, user_name())


def _follow(draft: Draft) -> int:
    """Print the progress until the process of the draft ends."""
    presses: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: presses.append(1))
    last = ""
    while draft.state == "working":
        now = draft.progress
        if now and (line := f"[{now['unit']} {now['done']}/{now['total'] or '?'}]") != last:
            last = line
            print(line, file=sys.stderr, flush=True)
        if presses:
            presses.clear()
            drafts.stop(draft)
        time.sleep(POLL_S)
    counts = review.counts_of(draft, review.rows_of(draft))
    for remark in remarks.remarks(draft, counts):
        print(sentence(remark), file=sys.stderr)
    values = {"rows": counts.rows, "passages": counts.passages, "asked": counts.asked, "open": counts.by_filter["open"]}
    print(say("draft-counts", shell_language(), **values), file=sys.stderr)
    return 0 if draft.state in ("done", "stopped") else 1


def _show(draft: Draft) -> int:
    """Print the rows with their sources and measures."""
    for row in review.rows_of(draft):
        place = ", ".join([row.passage.file, *row.passage.headings, *map(str, row.passage.pages or ())])
        state = row.decision or (f"repeats {row.repetition[0]}" if row.repetition else "open")
        score = f"{row.score}/5" if row.score is not None else "no score"
        print(f"{row.id}  {state}  support {row.support:.0%}, {score}  {place}\n  {row.question}\n  {row.answer}")
    return 0
