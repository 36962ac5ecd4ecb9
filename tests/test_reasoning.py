"""The reasoning of a thinking model is folded, and whatever measures an answer looks behind it."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from engine.core.problems import Refusal
from engine.core.reasoning import opens_reasoning, split_reasoning, without_reasoning
from engine.core.rundir import RunDir, read_lines, write_json, write_text
from engine.data.datasets import examples, find
from engine.evaluation import report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.evaluation.right_answers import save_right_answers
from engine.launch.workspace import Workplace
from engine.runs import failures, runs
from engine.spec.stage_settings import Grpo
from engine.worker.evaluation.findings import write_findings
from engine.worker.evaluation.questions import Question
from engine.worker.generation.detokenizer import Detokenizer
from engine.worker.generation.reasoning_marks import with_visible_marks
from engine.worker.training.rewards import Answer, score_function
from tests.test_evaluate import asking, ended
from webui import reports
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")


SCORED = (("Seven.", 0.0), ("Eight.", 100.0))
CHANNELS = "<|channel|>analysis<|message|>well<|end|>"  # gpt-oss


@pytest.mark.parametrize(
    ("text", "opened", "parts"),
    [
        ("plain", None, ("", "plain", False)),
        ("<think>well</think>\n\nyes", None, ("well", "\n\nyes", False)),
        ("<think>still", None, ("still", "", True)),
        ("\n<thinking>well</thinking>yes", False, ("well", "yes", False)),
        ("<seed:think>well</seed:think>yes", None, ("well", "yes", False)),
        ("[THINK]well[/THINK]yes", None, ("well", "yes", False)),
        ("<think></think>yes", None, ("", "yes", False)),
        ("<|START_THINKING|>well<|END_THINKING|>yes", None, ("well", "yes", False)),
        ("<rethinking-list> is a tag", None, ("", "<rethinking-list> is a tag", False)),
        ("the template opened it</think>yes", None, ("the template opened it", "yes", False)),
        ("the template opened it</think>yes", True, ("the template opened it", "yes", False)),
        ("the template opened it", True, ("the template opened it", "", True)),
        ("a mark, </think>, in a text", False, ("", "a mark, </think>, in a text", False)),
        ("it said <think> in between", None, ("", "it said <think> in between", False)),
        ("a <rethinking-list> of tags", None, ("", "a <rethinking-list> of tags", False)),
        (CHANNELS + "<|start|>assistant<|channel|>final<|message|>yes", False, ("well", "yes", False)),
        (CHANNELS + "<|start|>assist", None, ("well", "", True)),
        ("<|channel|>analysis<|message|>still", None, ("still", "", True)),
        ("<|channel|>ana", False, ("", "", True)),
        ("<|channel|>final<|message|>yes, 1 < 2", None, ("", "yes, 1 < 2", False)),
        (
            "<|channel|>commentary<|message|>I see.<|end|><|start|>assistant<|channel|>final<|message|>yes",
            None,
            ("", "I see.\n\nyes", False),
        ),
        ("<|channel>thought\nwell<channel|>yes", None, ("well", "yes", False)),
    ],
)
def test_reasoning_is_told_from_the_answer(text: str, opened: bool | None, parts: tuple[str, str, bool]) -> None:
    assert split_reasoning(text, opened=opened) == parts


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("[INST]Hi[/INST][THINK]", True),
        ("<|START_THINKING|>", True),
        ("<|START_THINKING|><|END_THINKING|>", False),
        ("<|turn>model\n<|channel>thought\n", True),
        ("<|turn>model\n<|channel>thought\n<channel|>", False),
    ],
)
def test_a_prompt_may_open_reasoning(prompt: str, opens: bool) -> None:
    assert opens_reasoning(prompt) == opens


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain\n", "plain\n"),
        ("<think></think>4", "4"),
        ("<think>by heart</think>\n\n4", "4"),
        ("2</think>4", "2</think>4"),
        ("<think> opens a thought", "<think> opens a thought"),
    ],
)
def test_a_reference_is_what_stands_after_its_reasoning(text: str, answer: str) -> None:
    assert without_reasoning(text) == answer


def test_marks_that_are_special_tokens_stay_in_the_text_of_an_answer() -> None:
    backend = Tokenizer(WordLevel({"<unk>": 0, "well": 1, "yes": 2}, unk_token="<unk>"))
    assert with_visible_marks(backend) is backend
    backend.add_special_tokens(["[THINK]", "[/THINK]", "</s>"])
    answer = Detokenizer(with_visible_marks(backend))
    text = "".join(answer.add(backend.token_to_id(word)) for word in ("[THINK]", "well", "[/THINK]", "yes", "</s>"))
    assert "".join((text + answer.rest()).split()) == "[THINK]well[/THINK]yes"
    assert backend.decode([3, 1, 4, 2, 5]) == "well yes"


def test_the_channels_of_an_answer_stay_in_its_text_but_not_what_ends_it() -> None:
    backend = Tokenizer(WordLevel({"<unk>": 0, "well": 1, "yes": 2, "final": 3}, unk_token="<unk>"))
    backend.add_special_tokens(["<|end|>"])
    assert with_visible_marks(backend) is backend  # it ends turns of other families
    backend.add_special_tokens(["<|start|>", "<|channel|>", "<|message|>", "<|return|>"])
    tokens = ["<|channel|>", "final", "<|message|>", "yes", "<|return|>"]
    text = with_visible_marks(backend).decode([backend.token_to_id(token) for token in tokens])
    assert "".join(text.split()) == "<|channel|>final<|message|>yes"


# ------------------------------------------------------------------------------------------ findings


@pytest.fixture
def findings(tmp_path: Path) -> RunDir:
    """Of three rows: a model that thinks, once too long, and the same without its thoughts."""
    run = RunDir(tmp_path / "base" / "evaluation" / "run")
    run.report.mkdir(parents=True)
    write_json(run.request, {"by": "", "submitted": 1.0, "attempt": 1, "stop": None})
    references = ["<think>by heart</think>\n\nFour.", "Six.", "Eight."]
    questions = [
        Question(row, "chat", str(row + 1), [{"role": "user", "content": f"{row}?"}], reference=reference)
        for row, reference in enumerate(references)
    ]
    answers = {
        "base": [("2 and 2.</think>\n\nFour.", True), ("Is it seven? No.</think>Six.", True), ("Seven. Or", True)],
        "plain": [("Four.", False), ("Six.", False), ("Nine.", False)],
    }
    outputs = {
        (name, row): {"voice": name, "row": row, "answer": text, "tokens": 9, "ended": row < 2}
        | ({"opened": True} if opened else {})
        for name, texts in answers.items()
        for row, (text, opened) in enumerate(texts)
    }
    write_text(run.report / "questions.jsonl", "".join(json.dumps(asdict(question)) + "\n" for question in questions))
    spec = EvaluationSpec.read({"model": {"model_name_or_path": str(tmp_path)}})
    write_findings(run, spec, "answers", ["base", "plain"], questions, outputs, {}, None)
    return run


def test_metrics_look_behind_the_reasoning(findings: RunDir) -> None:
    summary = report.summary(findings)
    exact = summary["measures"]["exact"]["values"]
    assert exact["base"]["value"] == exact["plain"]["value"] == pytest.approx(200 / 3)
    assert summary["reasoning"] == {"base": {"rows": 3, "unfinished": 1}}
    first, _, last = read_lines(findings.report / "rows.jsonl")
    assert first["reference"] == first["answers"]["base"]["text"] == "Four."
    assert first["answers"]["base"]["reasoning"] == "2 and 2."
    assert (last["answers"]["base"]["text"], last["answers"]["base"]["reasoning"]) == ("", "Seven. Or")
    assert "reasoning" not in last["answers"]["plain"]
    table = list(csv.DictReader(io.StringIO((findings.report / "rows.csv").read_text("utf-8-sig"), newline="")))
    base, plain = (model["title"] for model in summary["voices"])
    assert [line[f"{base}: reasoning"] for line in table] == ["2 and 2.", "Is it seven? No.", "Seven. Or"]
    assert [line[f"{plain}: answer"] for line in table] == ["Four.", "Six.", "Nine."]


@pytest.mark.parametrize(("language", "cut"), [("en", "1 answer was cut off while"), ("zh", "1 个回答在思考过程中")])
def test_a_report_folds_reasoning_and_tells_of_what_was_cut_off(findings: RunDir, language: str, cut: str) -> None:
    words, summary = Words(language), report.summary(findings)
    assert cut in reports.summary(summary, words)
    rows = reports.rows(report.page(findings), summary["voices"], words)
    assert rows.count("<div>Is it seven? No.</div></details>Six.") == 1
    assert "3 answers contain reasoning, and 1 was cut off within it" in report.as_text(summary)


@pytest.mark.parametrize(
    ("comparison", "answers"),
    [("exact", [("Four.", "2 and 2."), ("Six.", "Is it seven? No.")]), ("number", [("It is 6", "Or 7?")])],
)
def test_right_answers_become_a_data_set_with_their_reasoning(
    findings: RunDir, data: Path, comparison: str, answers: list[tuple[str, str]]
) -> None:
    if comparison == "number":
        lines = read_lines(findings.report / "rows.jsonl")
        lines[1] |= {"reference": "Half of 12 is 6."}
        lines[1]["answers"]["base"] |= {"text": "It is 6", "reasoning": "Or 7?"}
        lines[2] |= {"reference": "8"}
        lines[2]["answers"]["base"] |= {"text": "It is 8", "reasoning": "It was cut off."}
        write_text(findings.report / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    saved = save_right_answers(findings, "base", data, comparison)
    assert (saved.rows, saved.with_reasoning, saved.answers) == (len(answers), len(answers), 3)
    rows = list(examples(find(data, saved.dataset), lambda bad: pytest.fail(bad.text())))
    written = [row["messages"][-1] for row in rows]
    assert [(message["content"], message["reasoning_content"]) for message in written] == answers
    assert all(row["messages"][0]["content"].endswith("?") for row in rows)
    assert save_right_answers(findings, "base", data, comparison).dataset != saved.dataset


def test_of_several_answers_to_a_row_the_first_right_one_is_taken(findings: RunDir, data: Path) -> None:
    lines = read_lines(findings.report / "rows.jsonl")
    wrong, right = ({"text": text, "reasoning": "well", "scores": {"exact": score}} for text, score in SCORED)
    lines[2]["answers"]["base"]["samples"] = [wrong, right, right | {"reasoning": "later"}]
    lines[0]["answers"]["base"]["samples"] = [right]
    write_text(findings.report / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    saved = save_right_answers(findings, "base", data)
    assert (saved.rows, saved.answers) == (3, 3)
    rows = list(examples(find(data, saved.dataset), lambda bad: pytest.fail(bad.text())))
    assert [row["messages"][-1]["reasoning_content"] for row in rows] == ["2 and 2.", "Is it seven? No.", "well"]


def test_answers_about_images_are_left_out_of_the_data_set_and_its_count(findings: RunDir, data: Path) -> None:
    lines = read_lines(findings.report / "questions.jsonl")
    lines[0]["messages"][0]["images"] = [{"path": "a.png"}]
    write_text(findings.report / "questions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    saved = save_right_answers(findings, "base", data)
    assert (saved.rows, saved.answers) == (1, 2)


def test_a_report_of_pairs_or_without_its_questions_makes_no_data_set(findings: RunDir, data: Path) -> None:
    lines = read_lines(findings.report / "rows.jsonl")
    del lines[0]["reference"]  # as in a report of pairs
    write_text(findings.report / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert save_right_answers(findings, "base", data).answers == 2
    (findings.report / "questions.jsonl").unlink()
    with pytest.raises(Refusal) as refused:
        save_right_answers(findings, "base", data)
    assert refused.value.problems[0].code == "right-answers-none"


def test_no_right_answer_makes_no_data_set(findings: RunDir, data: Path) -> None:
    before = sorted(data.iterdir())
    for model, comparison, code in (
        ("plain", "number", "right-answers-none"),
        ("plain", "luck", "right-answers-gone"),
        ("nobody", "exact", "right-answers-gone"),
        ("", "", "right-answers-gone"),
    ):
        with pytest.raises(Refusal) as refused:
            save_right_answers(findings, model, data, comparison)
        assert refused.value.problems[0].code == code
    assert sorted(data.iterdir()) == before


# ------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("reward", "reference", "text", "opened", "score"),
    [
        ("exact", "Four.", "<think>2 and 2</think>\nFour.", False, 1),
        ("exact", "<think>by heart</think>Four.", "Four.", False, 1),
        ("exact", "Four.", "<think>Four.", False, 0),
        ("numeric", "4", "<think>4, or 5</think>It is 4.", False, 1),
        ("numeric", "4", "It is 5</think>It is 4", True, 1),
        ("numeric", "4", "<think>4, or 5, no, 4", False, 0),
        ("numeric", "4", "4, or 5, no, 4", True, 0),
        ("numeric", "4", "4, or 5, no, 4", False, 1),
    ],
)
def test_a_reward_looks_behind_the_reasoning(reward: str, reference: str, text: str, opened: bool, score: int) -> None:
    stage = Grpo(rewards={reward: 1})
    assert score_function(reward, stage, None)([Answer([], [1], text, [1], reference, opened)]) == [score]


# ---------------------------------------------------------------------------- a model that always thinks


@pytest.mark.slow
def test_an_evaluation_lets_a_model_think_or_not(workplace: Workplace, tiny: Path, tmp_path: Path) -> None:
    """Random weights never end a thought that the template has opened."""
    thinker = shutil.copytree(tiny, tmp_path / "others" / "thinker")
    workplace = replace(workplace, models=(*workplace.models, thinker.parent))
    file = thinker / "chat_template.jinja"
    opening = (
        "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}"
    )
    write_text(file, file.read_text() + "{%- if add_generation_prompt %}" + opening + "{%- endif %}")
    summaries: dict[bool, Any] = {}
    for thinking in (True, False):
        spec = asking(model__model_name_or_path=str(thinker), generation__thinking=thinking, data__max_samples=3)
        run = ended(workplace, runs.submit(spec, workplace))
        assert run.state == "finished", failures.explain(run)
        summaries[thinking] = report.summary(run.dir)
        answers = [line for line in read_lines(run.dir.report / "answers.jsonl") if "answer" in line]
        assert [line.get("opened", False) for line in answers if line["voice"] == "base"] == [thinking] * 3
    assert summaries[True]["reasoning"] == {"base": {"rows": 3, "unfinished": 3}}
    assert "reasoning" not in summaries[False]
