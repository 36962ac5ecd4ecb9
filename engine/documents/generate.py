"""The process of a draft: read its documents, ask the model about each passage that it has not been asked about, and
have it judge each row. Run as `python -m engine.documents.generate FOLDER`.

A line of rows.jsonl is written when all of a passage is done, so a process that was killed repeats at most the passages
that it was at.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from engine.core.problems import NOTHING, Problem, Refusal, problem
from engine.core.rundir import append_lines, write_json, write_text
from engine.data.data_jobs import ReportProgress, job_process
from engine.documents.answers import Judgement, Pair, read_judgement, read_pairs
from engine.documents.document_reader import read_document
from engine.documents.drafts import Draft, choice_of
from engine.documents.passages import Passage, passages_of
from engine.documents.prompts import judge_prompt, question_prompt
from engine.documents.repetitions import write_repetitions
from engine.documents.settings import DraftSettings
from engine.documents.support import support
from engine.serving import chat_client, servers
from engine.serving.chat_client import Answer
from engine.serving.server import Server

ASKED_AT_ONCE = 8  # answers; a server generates 16 at once, so that people who chat with it need not wait
TOKENS_PER_ROW, MAX_ROW_TOKENS = 250, 2_000  # of a question with its answer, and of all about a passage
JUDGE_TOKENS = 120
MAX_CHARACTERS = 50_000_000  # of all documents of a draft
POLL_S = 0.3  # between two looks for a request to stop
BUSY_WAIT_S = 1.0  # until a server that has too many questions is asked again
MAX_KEPT = 2_000  # characters kept of an answer that cannot be read
OF_ONE_PASSAGE = "chat-too-long"  # any other problem ends the process, so that its passage is asked about again


class Stopped(Exception):
    """Somebody has asked for the process to end."""


@dataclass(frozen=True)
class Model:
    """The served model that is asked, until `is_stopped`; `connections` are those over which it is answering."""

    server: Server
    name: str
    is_stopped: Callable[[], bool]
    connections: set[HTTPConnection] = field(default_factory=set)

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """The answer to a single question, always the same. Raises Stopped, or Refusal if the server is of no use."""
        settings = {"temperature": 0, "max_tokens": max_tokens, "thinking": False}
        while True:
            if self.is_stopped():
                raise Stopped
            connection = chat_client.connect(self.server)
            self.connections.add(connection)
            messages = [{"role": "user", "content": prompt}]
            answer = chat_client.answer_over(self.server, connection, self.name, messages, settings)
            self.connections.discard(connection)
            connection.close()
            if answer.problem is None or answer.problem.code != "chat-busy":
                break
            time.sleep(BUSY_WAIT_S)
        if self.is_stopped():
            raise Stopped
        if answer.problem is not None and answer.problem.code != OF_ONE_PASSAGE:
            raise Refusal(answer.problem)
        if answer.finish == "cancelled":
            raise Refusal(problem("draft-answer-cancelled", name=self.server.name))
        return answer

    def drop_answers(self) -> None:
        """End all answers that are not complete."""
        for connection in list(self.connections):
            chat_client.shut_down(connection)


def generate(draft: Draft, report: ReportProgress) -> None:
    """Do what is left to do. Raises Stopped, and Refusal if there is nothing to ask about or nobody to ask."""
    if not (draft.path / "passages.jsonl").exists():
        read_documents(draft, report)
    complete = draft.records()
    left = [passage for passage in draft.passages() if passage.number not in complete]
    done, total = len(complete), len(complete) + len(left)
    if left:
        model = load_model(draft)
        _phase(draft, done, total, "passages")
        for record in _records(left, draft.settings, model):
            append_lines(draft.path / "rows.jsonl", [record])
            done += 1
            report(done, total, "passages")
    _phase(draft, total, total, "repetitions")


def _phase(draft: Draft, done: int, total: int | None, unit: str) -> None:
    """What it is doing now; unlike a report, this is written at once."""
    write_json(draft.path / "progress.json", {"done": done, "total": total, "unit": unit}, durable=False)


def read_documents(draft: Draft, report: ReportProgress) -> None:
    """Read all documents, and write their passages and what there is to know of each. One that cannot be read is left
    out with its problem. Raises Stopped, and Refusal if no document can be read."""
    passages: list[Passage] = []
    reading: list[dict[str, Any]] = []
    problems: list[Problem] = []
    characters = 0
    for file in draft.files:
        if draft.stopping:
            raise Stopped
        _phase(draft, 0, None, "pages")

        def on_pages(done: int, total: int) -> None:
            if draft.stopping:
                raise Stopped
            report(done, total, "pages")

        try:
            document = read_document(file, on_pages)
        except Refusal as refusal:
            problems += refusal.problems
            reading.append({"file": file.name, "problems": [_as_record(issue) for issue in refusal.problems]})
            continue
        characters += document.characters
        if characters > MAX_CHARACTERS:
            raise Refusal(problem("draft-too-long", limit=f"{MAX_CHARACTERS:,}"))
        new = passages_of(document, len(passages) + 1, draft.settings.length)
        passages += new
        facts = {name: value for name, value in vars(document).items() if name != "blocks"}
        reading.append(facts | {"characters": document.characters, "passages": len(new)})
    write_json(draft.path / "reading.json", reading)
    if not passages:
        raise Refusal(problems or [problem("draft-no-documents", known=NOTHING)])
    lines = (json.dumps(passage.as_record(), ensure_ascii=False) + "\n" for passage in passages)
    write_text(draft.path / "passages.jsonl", "".join(lines))


def _as_record(issue: Problem) -> dict[str, Any]:
    return {
        "code": issue.code,
        "field": issue.field,
        "values": {key: str(value) for key, value in issue.values.items()},
    }


def load_model(draft: Draft) -> Model:
    """The model, once it can be asked. Raises Stopped, or Refusal if it cannot be loaded."""
    _phase(draft, 0, None, "model")
    choice = choice_of(draft.workplace, draft.settings)
    server = servers.start(draft.workplace, choice, draft.owner)
    for _ in servers.until_ready(server, goes_on=lambda: not draft.stopping):
        pass
    if draft.stopping:
        raise Stopped
    chat_client.add(server, choice.adapters)
    return Model(server, next(iter(choice.adapters), server.name), lambda: draft.stopping)


def _records(passages: list[Passage], settings: DraftSettings, model: Model) -> Iterator[dict[str, Any]]:
    """What the model makes of each passage, as each is done. Raises Stopped, or the first error; answers that are not
    complete by then are dropped."""
    left, running = iter(passages), set[Future[dict[str, Any]]]()
    with ThreadPoolExecutor(ASKED_AT_ONCE, thread_name_prefix="ask") as pool:
        try:
            while True:
                for passage in itertools.islice(left, ASKED_AT_ONCE - len(running)):
                    running.add(pool.submit(ask_about, passage, settings, model))
                if not running:
                    return
                ended, running = wait(running, POLL_S, FIRST_COMPLETED)
                yield from (future.result() for future in ended if not future.exception())
                if model.is_stopped():
                    raise Stopped
                for future in ended:
                    future.result()  # raises its error
        finally:
            for future in running:
                future.cancel()
            model.drop_answers()


def ask_about(passage: Passage, settings: DraftSettings, model: Model) -> dict[str, Any]:
    """The line of rows.jsonl for a passage."""
    prompt = question_prompt(passage, settings.rows, settings.language, settings.instruction, settings.form)
    answer = model.answer(prompt, min(TOKENS_PER_ROW * settings.rows, MAX_ROW_TOKENS))
    record: dict[str, Any] = {"passage": passage.number, "rows": [], "finish": answer.finish}
    if answer.problem is not None:  # the prompt is too long, and there is no conversation to shorten
        return record | {"problem": _as_record(problem("draft-passage-long", **answer.problem.values))}
    pairs = read_pairs(answer.text, settings.rows, answer.finish == "stop", answer.opened)
    record["dropped"] = dict(pairs.dropped)
    if not pairs.kept and not pairs.dropped:
        return record | {"unread": answer.text[:MAX_KEPT]}
    rows = []
    for number, pair in enumerate(pairs.kept, 1):
        measure = support(pair.answer, passage.text)
        row = {"id": f"{passage.number}.{number}", **asdict(pair)}
        row |= {"support": round(measure.share, 3), "missing": list(measure.missing_numbers)}
        rows.append(row | _judged(passage, pair, settings, model))
    return record | {"rows": rows}


def _judged(passage: Passage, pair: Pair, settings: DraftSettings, model: Model) -> dict[str, Any]:
    """The score and the reason; no score, and what the model said instead, if that cannot be read."""
    prompt = judge_prompt(passage, pair.question, pair.answer, settings.language, settings.form)
    answer = model.answer(prompt, JUDGE_TOKENS)
    judgement = read_judgement(answer.text, answer.opened) if answer.problem is None else None
    if judgement is None:
        why = answer.text if answer.problem is None else answer.problem.text()
        return {"score": None, "unread": why[:MAX_KEPT]}
    return asdict(Judgement(judgement.score, judgement.reason[:MAX_KEPT]))


def main() -> int:
    with job_process(sys.argv[1]) as (folder, _arguments, report):
        draft = Draft(Path(folder))
        # Without a studio, a server ends soon after the last process that holds this lock.
        studio = servers.hold_studio_lock(draft.workplace.saves)
        try:
            generate(draft, report)
        except Stopped:
            return 0
        finally:
            write_repetitions(draft)
            if studio is not None:
                os.close(studio)
        write_json(draft.path / "result.json", {"at": time.time()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
