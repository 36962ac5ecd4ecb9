"""The numbers of an evaluation beside the libraries' own and beside what a person works out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.worker.evaluation import metrics
from engine.worker.evaluation.bootstrap import difference, interval, resampled
from engine.worker.evaluation.metrics import (
    ModelAnswer,
    answer_metrics,
    bleu,
    bleu_sums,
    chrf,
    chrf_sums,
    labels_of,
    normalize,
    rouge,
)

ENGLISH = [
    ("The cat sat on the mat.", "The cat is on the mat."),
    ("Hello there, general", "Hello there, general Kenobi!"),
    ("No", "Yes"),
    ("", "Nothing was said"),
    ("a b c d e f g", "a b c d e f h"),
]
CHINESE = [
    ("我们在北京大学学习", "我们在北京学习"),
    ("世界卫生组织", "世界卫生组织"),
    ("不知道", "联合国儿童基金会"),
]


def summed(count, pairs) -> np.ndarray:
    return np.array([count(*pair) for pair in pairs], float)


@pytest.mark.parametrize(("pairs", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh")])
def test_bleu_and_chrf_of_a_corpus_are_those_of_sacrebleu(pairs, tokenizer) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    answers, references = map(list, zip(*pairs, strict=True))
    theirs = BLEU(tokenize=tokenizer, effective_order=True).corpus_score(answers, [references]).score
    assert bleu(summed(bleu_sums, pairs).sum(0)) == pytest.approx(theirs)
    theirs = CHRF().corpus_score(answers, [references]).score
    assert chrf(summed(chrf_sums, pairs).sum(0)) == pytest.approx(theirs)
    for answer, reference in pairs:  # and of one row alone
        one = BLEU(tokenize=tokenizer, effective_order=True).sentence_score(answer, [reference]).score
        assert bleu(np.array(bleu_sums(answer, reference), float)) == pytest.approx(one)


def test_the_mean_of_sentences_is_another_number_than_that_of_the_corpus() -> None:
    sums = summed(bleu_sums, ENGLISH)
    assert abs(bleu(sums).mean() - bleu(sums.sum(0))) > 1


def test_rouge_is_worked_out_by_hand() -> None:
    # "the cat sat" / "the cat ran fast": 2 of 3 and 2 of 4 words; 1 of 2 and 1 of 3 pairs; "the cat" in order.
    two_words, one_pair = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4), 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    wanted = {"rouge1": 100 * two_words, "rouge2": 100 * one_pair, "rougeL": 100 * two_words}
    assert rouge("The cat sat.", "the cat ran fast") == pytest.approx(wanted)


def test_a_reference_without_a_pair_of_words_says_nothing_of_pairs() -> None:
    assert rouge("Yes.", "yes") == {"rouge1": 100, "rougeL": 100}
    assert rouge("Yes.", "!") == {}
    said = [ModelAnswer("yes", 1, True), ModelAnswer("two words", 2, True)]
    assert answer_metrics(said, ["yes", "two words"], None)["rouge2"].value == 100
    assert "rouge2" not in answer_metrics(said, ["yes", "no"], None)


def test_rouge_sees_words_where_chinese_writes_no_spaces() -> None:
    assert metrics.words("我们在北京大学，学习 Hello") == ["我们", "在", "北京大学", "学习", "hello"]
    # Three of the four words are shared; the library's own tokenizer would see none at all.
    assert rouge("我们在北京大学学习", "我们在北京学习")["rouge1"] == pytest.approx(75)


def test_an_exact_match_overlooks_width_case_and_what_is_around() -> None:
    assert normalize("  「ＡＢＣ」。\n") == normalize("abc") == "abc"
    assert normalize("a, b") != normalize("a b")
    assert normalize("!?") == "!?"  # else it would be the same as an empty answer


def test_short_references_that_come_again_are_labels_and_long_or_unique_ones_are_not() -> None:
    assert labels_of(["Yes", "no.", "YES", "No"]) == ["no", "yes"]
    assert labels_of(["好", "坏", "好", "坏"]) == ["坏", "好"]
    assert labels_of(["one", "two", "three", "four"]) is None
    assert labels_of(["what a very long answer"] * 6) is None


def test_macro_f1_is_worked_out_by_hand_and_babble_is_nobodys_false_alarm() -> None:
    answers, references = ["yes", "yes", "no", "perhaps"], ["yes", "no", "no", "no"]
    # yes: 1 hit, 1 false alarm, 0 misses = 2/3. no: 1 hit, 0 false alarms, 2 misses = 1/2.
    assert metrics.macro_f1(answers, references, ["no", "yes"]).value == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


def test_perplexity_weighs_rows_by_their_tokens() -> None:
    said = [
        ModelAnswer("x", 1, True, loss=1.0, loss_tokens=1),
        ModelAnswer("x", 1, True, loss=9.0, loss_tokens=3),
    ]
    found = answer_metrics(said, [None, None], None)
    assert found["loss"].value == pytest.approx(10 / 4)
    assert found["perplexity"].value == pytest.approx(math.exp(10 / 4))
    assert set(found) == {
        "loss",
        "perplexity",
        "ended",
        "tokens",
    }  # without references nothing is right or wrong


def test_rows_without_a_reference_do_not_count_where_one_is_needed() -> None:
    said = [ModelAnswer("a", 1, True), ModelAnswer("anything", 1, False)]
    found = answer_metrics(said, ["a", None], None)
    assert found["exact"].value == found["chrf"].value == found["rouge1"].value == 100
    assert found["ended"].value == 50


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    source = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        low, high = interval(metrics.mean(source.random(60)))[1:]
        held += low <= 0.5 <= high
    assert 88 <= held <= 100


def test_a_real_difference_is_told_from_chance_and_in_the_right_direction() -> None:
    source = np.random.default_rng(1)
    hard = source.random(200)  # what is hard for one is hard for the other
    base, better, alike = hard, hard + 0.02 + 0.01 * source.random(200), hard + source.normal(0, 0.3, 200)
    higher = [metrics.mean(one) for one in (base, better, alike)]
    assert difference(higher[1], higher[0]).verdict == "better"
    assert difference(higher[0], higher[1]).verdict == "worse"
    assert difference(higher[2], higher[0]).verdict == "same"
    # Not paired, the small difference would be lost: the intervals of the two overlap widely.
    assert interval(higher[1]).low < interval(higher[0]).high
    lower = [metrics.mean(one, "lower") for one in (base, better)]
    assert difference(lower[1], lower[0]).verdict == "worse"
    length = [metrics.mean(one, "neither") for one in (base, better)]
    assert difference(length[1], length[0]).verdict == "more"


def test_the_same_rows_are_drawn_again_and_few_rows_get_no_verdict() -> None:
    measure = metrics.mean(np.arange(30.0))
    assert (resampled(measure) == resampled(measure)).all()
    few = [metrics.mean(one) for one in ([0.0] * 9, [1.0] * 9)]
    assert interval(few[0]).low is None
    assert difference(few[1], few[0])[0] == 1
    assert difference(few[1], few[0]).verdict == "same"


def test_margins_of_a_reward_model() -> None:
    found = metrics.margin_metrics([1.0, 2.0, -0.5, 0.0])
    assert found["pair_accuracy"].value == 50  # a tie is not ranked rightly
    assert found["margin"].value == pytest.approx(2.5 / 4)
    drawn = metrics.histogram([1.0, 2.0, -0.5], 4)
    assert drawn["edges"] == [-2, -1, 0, 1, 2]
    assert drawn["counts"] == [0, 1, 0, 2]
