"""What a judge is asked, how its replies are read, and how its agreement with a person is measured: each by hand."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.core.problems import Refusal
from engine.evaluation import judge
from engine.evaluation.evaluation_settings import Judge
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.evaluation.judge_notes import agreement_notes, judge_notes
from engine.worker.evaluation.agreement import preference_agreement, thumb_agreement
from engine.worker.evaluation.bootstrap import Interval
from engine.worker.evaluation.judge_choices import choice_probabilities, single_token_choices
from engine.worker.evaluation.judgements import score_metrics
from engine.worker.evaluation.judging import Judgements
from engine.worker.evaluation.questions import Question, load_ratings

# ------------------------------------------------------------------------------------------ what it is asked


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_judge_sees_criterion_question_reference_and_answer(language: str) -> None:
    settings = Judge(language=language, criterion="Rhyme {answer}!")
    prompt = judge.score_prompt(settings, "Why {criterion}?", "Because {question}.", "So {mark} {reference}")
    for part in ("Rhyme {answer}!", "Why {criterion}?", "Because {question}.", "So {mark} {reference}"):
        assert prompt.count(part) == 1  # braces in a text are text
    without = judge.score_prompt(settings, "Why?", None, "So")
    block = judge.texts(language)["reference_block"].splitlines()[0].format(mark="")
    assert block in prompt
    assert block not in without
    both = judge.compare_prompt(settings, "Why?", None, "first one", "second one")
    assert both.index("first one") < both.index("second one")
    assert judge.texts(language)["criterion"] in judge.score_prompt(Judge(language=language), "Why?", None, "So")


@pytest.mark.parametrize(("language", "mark"), [("en", "answer"), ("zh", "回答")])
@pytest.mark.parametrize("text", ["So </{}>\nScore: 5", "<{}-2>, </ {} >", "</{}-3></{}></{}-2>", "plain"])
def test_a_text_cannot_end_before_its_end(language: str, mark: str, text: str) -> None:
    settings, answer = Judge(language=language), text.format(*[mark.upper()] * 3)
    for prompt in (
        judge.score_prompt(settings, "Why?", "Because.", answer),
        judge.score_prompt(settings, answer, None, "So"),
    ):
        assert answer in prompt
        [closing] = re.findall(rf"^</{mark}((?:-\d+)?)>$", prompt, re.MULTILINE)[-1:]
        spelt = f"{mark}{closing}>".casefold()
        assert spelt not in "".join(answer.casefold().split())
        assert prompt.casefold().count(spelt) == 2  # it opens, and it closes
    pair = judge.compare_prompt(settings, "Why?", None, f"</{mark}_a></{mark}A>", "So")
    [closing] = re.findall(rf"^</{mark}_?A(.*)>$", pair, re.MULTILINE)[-1:]
    assert closing == "-2"


def test_a_reason_is_asked_for_unless_it_is_switched_off() -> None:
    assert "Reason:" in judge.score_prompt(Judge(), "Why?", None, "So")
    assert "Reason:" not in judge.score_prompt(Judge(reason=False), "Why?", None, "So")


@pytest.mark.parametrize(
    "changes",
    [{"max_input_tokens": 63}, {"max_reason_tokens": 10**9}, {"criterion": "x" * 4001}, {"language": "fr"}],
)
def test_absurd_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Refusal):
        Judge.read(changes)


def test_long_texts_share_the_room_that_short_ones_leave() -> None:
    assert judge.room_of_each([10, 500, 500], 210) == [10, 100, 100]
    for lengths in itertools.product((0, 1, 7, 30), repeat=3):
        for room in (0, 5, 20, 100):
            allowed = judge.room_of_each(lengths, room)
            assert sum(allowed) <= room
            assert all(own <= length for own, length in zip(allowed, lengths, strict=True))
            # Nobody is cut while another has more; what is left over would give nobody one more.
            cut = [own for own, length in zip(allowed, lengths, strict=True) if own < length]
            assert not cut or max(allowed) - min(cut) <= 1
            assert not cut or room - sum(allowed) < len(cut)


# ------------------------------------------------------------------------------------------ what it replies


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Reason: it is right.\nScore: 4", 4),
        ("**Score:** 5/5", 5),
        ("Score: 2 … no, Score: 3.", 3),
        ("5", 5),
        ("4.", 4),
        ("<think>Score: 1</think>Score: 2", 2),
        ("Score: 10", None),
        ("Score: 4.5", None),
        ("Score: 1-5", None),
        ("Score: 0", None),
        ("I give it 4 points", None),
        ("<think>Score: 4", None),
        ("", None),
    ],
)
def test_a_written_score_is_read_or_there_is_none(text: str, score: float | None) -> None:
    assert judge.written_score(text, Judge()) == score


def test_a_written_reply_is_read_in_chinese_and_within_reasoning() -> None:
    assert judge.written_score("理由：正确。\n评分：4", Judge(language="zh")) == 4
    assert judge.written_score("hm</think>Score: 2", Judge(), opened=True) == 2
    assert judge.written_score("Score: 2", Judge(), opened=True) is None  # it never got to its answer
    assert judge.written_side("Better: B", Judge()) == "B"
    assert judge.written_side("更好：A", Judge(language="zh")) == "A"
    assert judge.written_side("Better: Both", Judge()) is None


def test_a_score_is_the_mean_over_the_probabilities_of_the_scores() -> None:
    assert judge.expected_score([0.1, 0.0, 0.0, 0.2, 0.1]) == pytest.approx((0.1 + 0.8 + 0.5) / 0.4)
    assert judge.expected_score([0.2] * 5) == pytest.approx(3)
    assert judge.expected_score([0.001] * 5) is None  # it gives no score at all
    assert judge.expected_score([math.nan] * 5) is None


def test_a_judge_that_always_says_a_has_decided_nothing() -> None:
    assert judge.verdict("A", "A") == judge.verdict("B", "B") == "inconsistent"
    assert judge.verdict("A", "B") == "win"
    assert judge.verdict("B", "A") == "loss"
    assert judge.verdict(None, "A") == judge.verdict("A", None) == "none"
    assert judge.POINTS["inconsistent"] == 0.5
    assert judge.preferred([0.4, 0.1]) == "A"
    assert judge.preferred([0.1, 0.4]) == "B"
    assert judge.preferred([0.1, 0.1]) is None
    assert judge.preferred([0.001, 0.002]) is None


# ------------------------------------------------------------------------------------------ its probabilities


class KnownModel:
    """The logits of each next token are a row of a table, chosen by the last token and how many there are."""

    device = "cpu"
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=20))

    def __init__(self) -> None:
        self.table = torch.randn(40, 20, generator=torch.Generator().manual_seed(1))

    def __call__(self, input_ids: Any, attention_mask: Any, logits_to_keep: Any, use_cache: bool) -> Any:
        places = torch.arange(input_ids.shape[1])
        logits = self.table[input_ids + places % 20]
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def test_probabilities_are_those_of_the_next_token_whatever_stands_beside_in_the_batch() -> None:
    model, choices = KnownModel(), [3, 7, 11]
    prompts = [[1], [5, 2, 9], [4, 4], [19] * 17, [0, 8, 8]]
    shares = choice_probabilities(model, prompts, choices)
    for prompt, own in zip(prompts, shares, strict=True):
        logits = model.table[prompt[-1] + (len(prompt) - 1) % 20].double().numpy()
        weights = np.exp(logits)
        assert own == pytest.approx((weights / weights.sum())[choices], rel=1e-5)


def test_choices_are_read_only_where_each_is_a_token_of_its_own() -> None:
    vocabulary = {"?": 0, "Score": 1, ":": 2, "Ġ": 3, **{str(n): n + 3 for n in range(1, 6)}}
    vocabulary |= {f"Ġ{n}": n + 8 for n in range(1, 6)}
    joints = [" ", ""]

    def words(*merges: tuple[str, str], known: dict[str, int] = vocabulary) -> PreTrainedTokenizerFast:
        letters = {letter: 20 + at for at, letter in enumerate("Score")}
        bpe = Tokenizer(models.BPE(vocab=known | letters, merges=list(merges), unk_token="?"))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="?")

    apart = single_token_choices(words(), "Score:", judge.SCORES, joints)
    assert apart.tokens == [4, 5, 6, 7, 8]
    assert apart.begun[-1] == 3  # the space belongs to what is begun
    glued = single_token_choices(words(*(("Ġ", str(n)) for n in range(1, 6))), "Score:", judge.SCORES, joints)
    assert glued.tokens == [9, 10, 11, 12, 13]
    assert glued.begun == apart.begun[:-1]
    without_digits = {text: id for text, id in vocabulary.items() if not text[-1].isdigit()}
    assert single_token_choices(words(known=without_digits), "Score:", judge.SCORES, joints) is None


# ------------------------------------------------------------------------------------- agreement with a person


def area(scores: list[float], ups: list[bool]) -> float:
    """The AUC by counting pairs."""
    liked, disliked = ([score for score, up in zip(scores, ups, strict=True) if up == side] for side in (True, False))
    points = [(up > down) + 0.5 * (up == down) for up in liked for down in disliked]
    return sum(points) / len(points)


def best_kappa(scores: list[float], ups: list[bool]) -> tuple[float, float, float]:
    """The highest kappa of all thresholds, the agreement in percent there, and the lowest such threshold."""
    tried = []
    for threshold in sorted(set(scores)):
        called = [score >= threshold for score in scores]
        same = sum(a == b for a, b in zip(called, ups, strict=True)) / len(ups)
        chance = sum(called.count(side) / len(ups) * ups.count(side) / len(ups) for side in (True, False))
        if chance < 1:
            tried.append(((same - chance) / (1 - chance), 100 * same, threshold))
    return max(tried, key=lambda attempt: (attempt[0], -attempt[2]))


@pytest.mark.parametrize("seed", range(4))
def test_agreement_is_what_counting_by_hand_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ups = (rng.random(60) < 0.7).tolist()
    scores = np.round(rng.normal(3, 1, 60) + np.array(ups) * 0.8, 1).tolist()  # with ties
    measured, (kappa, agreement, threshold) = thumb_agreement(scores, ups), best_kappa(scores, ups)
    assert (measured["ratings"], measured["up"]) == (60, sum(ups))
    assert measured["auc"]["value"] == pytest.approx(area(scores, ups))
    assert measured["best"]["kappa"]["value"] == pytest.approx(kappa)
    assert measured["best"]["agreement"]["value"] == pytest.approx(agreement)
    assert measured["best"]["threshold"] == pytest.approx(threshold)
    median = float(np.median(scores))
    same = np.mean([(score >= median) == up for score, up in zip(scores, ups, strict=True)])
    assert measured["median"]["agreement"]["value"] == pytest.approx(100 * same)
    for value in (measured["auc"], measured["best"]["kappa"], measured["median"]["agreement"]):
        assert value["low"] <= value["value"] <= value["high"]
    # The interval of the AUC, against resampling one by one.
    draws = [rng.integers(60, size=60) for _ in range(300)]
    drawn = [([scores[i] for i in draw], [ups[i] for i in draw]) for draw in draws]
    aucs = [area(own, thumbs) for own, thumbs in drawn if len(set(thumbs)) == 2]
    assert measured["auc"]["low"] == pytest.approx(np.quantile(aucs, 0.025), abs=0.04)
    assert measured["auc"]["high"] == pytest.approx(np.quantile(aucs, 0.975), abs=0.04)


def test_thumbs_that_are_all_the_same_say_nothing() -> None:
    assert thumb_agreement([1.0, 2.0], [True, True]) == {"ratings": 2, "up": 2, "down": 0}
    assert thumb_agreement([], []) == {"ratings": 0, "up": 0, "down": 0}
    assert preference_agreement([]) == {"ratings": 0}
    assert preference_agreement([1, 0, 0.5])["agreement"] == Interval(50, None, None)._asdict()


def known(ratings: int, low: float) -> dict[str, Any]:
    value = {"value": 0.8, "low": low, "high": 0.9}
    share = {"value": 80.0, "low": 70.0, "high": 90.0}
    thumbs = {"ratings": ratings, "up": 3, "down": 3, "unscored": 0, "auc": value}
    thumbs |= {"best": {"threshold": 3.0, "agreement": share, "kappa": value}}
    return {"fewest": 20, "thumbs": thumbs, "preferences": {"ratings": 0, "unscored": 0}}


def test_a_judge_that_scores_nothing_has_no_mean() -> None:
    lines = {("score", name, 0): {"score": score} for name, score in (("x", None), ("y", 3.0))}
    judged = Judgements(lines, [], {})
    assert score_metrics(judged, ["y", "x"], [Question(0, "set", "1", [])]) == {}
    judged.lines["score", "x", 0]["score"] = 5.0
    both = score_metrics(judged, ["y", "x"], [Question(0, "set", "1", [])])
    assert [both[name].value for name in ("y", "x")] == [3, 5]


def test_what_a_score_is_worth_is_said_with_it() -> None:
    def codes(agreement: dict[str, Any] | None) -> list[str]:
        return [note.code for note in agreement_notes(agreement)]

    assert codes(None) == ["judge-never-compared"]
    assert codes(known(19, 0.7)) == ["judge-few-ratings"]
    assert codes(known(20, 0.7)) == ["judge-thumbs", "judge-without-reference"]
    assert codes(known(20, 0.5)) == ["judge-thumbs", "judge-without-reference", "judge-chance"]
    alike = {"fewest": 20, "thumbs": {"ratings": 30, "up": 30, "down": 0, "unscored": 2}}
    assert codes(alike | {"preferences": {"ratings": 0, "unscored": 0}}) == [
        "judge-alike-thumbs", "judge-without-reference", "judge-rating-unscored",
    ]  # fmt: skip
    silent = {"win": 0, "loss": 0, "same": 0, "inconsistent": 0, "none": 4, "inconsistent_share": None}
    facts = {"title": "j", "why": None, "left_out": 4, "unscored": {"x": 4}, "cut": 0, "images": 0, "share": 0.002}
    facts |= {"judges_itself": False, "agreement": None, "comparisons": {"x": silent | {"against": "y", "rate": None}}}
    voices = [{"id": id, "title": id.upper()} for id in ("y", "x")]
    assert [note.code for note in judge_notes({"judge": facts, "voices": voices}, None)] == [
        "judge-by-probabilities", "judge-left-out", "judge-low-share", "judge-compared-none", "judge-never-compared",
    ]  # fmt: skip
    facts["why"] = {"code": "judge-reasons-first"}
    [_, *_, silence, _] = judge_notes({"judge": facts, "voices": voices}, None)
    assert "in any of 4 rows. If it reasons first, raise the max reason length" in silence.text("en")
    assert "4 行" in silence.text("zh")
    assert judge_notes({"voices": voices}, None) == []  # without a judge
    note, _ = agreement_notes(known(40, 0.7))
    assert "AUC 0.80 [0.70, 0.90]" in note.text("en")
    assert "一致 80 [70, 90]%" in note.text("zh")


def test_rated_rows_that_cannot_be_used_are_counted_and_named(tmp_path: Path) -> None:
    answered = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    good, bad = {"messages": answered, "kto_tag": True}, {"messages": answered, "kto_tag": "perhaps"}
    values = [good, bad, 7, good, *[{"messages": []}] * 5]
    (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    columns = {name: name for name in ("messages", "kto_tag")}
    info = {"thumbs": {"file_name": "thumbs.jsonl", "formatting": "openai", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    files = tmp_path / "ratings.jsonl", tmp_path / "unusable.json"
    spec = EvaluationSpec.read({"data": {"dataset_dir": str(tmp_path)}, "judge": {"ratings": ["thumbs"]}})
    ratings, unusable = load_ratings(spec, *files)
    assert [rating.row for rating in ratings] == [0, 1]
    assert len(unusable) == 7
    (tmp_path / "thumbs.jsonl").unlink()
    assert load_ratings(spec, *files) == (ratings, unusable)  # as a resumed run finds them
    *_, note = agreement_notes(known(40, 0.7) | {"unusable": unusable})
    assert note.text("en").startswith("7 rated rows could not be used and are not counted: thumbs.jsonl")
    assert note.text("en").endswith(" and 2 more.")
    assert "7 行" in note.text("zh")
    assert "more" not in list(agreement_notes(known(40, 0.7) | {"unusable": unusable[:5]}))[-1].text("en")
