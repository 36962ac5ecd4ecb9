"""Metrics of answers, for one row and for many. Pure functions over texts and numpy arrays.

A metric over many rows is always a function of *sums over rows*: n-gram counts for BLEU and chrF, losses and tokens for
perplexity, hits and misses of each label for F1, and for a plain mean the values and their number. So whatever can be
computed over all rows can be computed over any resample of them, and `engine.worker.evaluation.bootstrap` does not need
to know any metric.
"""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from engine.core.reasoning import AnswerParts, split_reasoning

Better = Literal["higher", "lower", "neither"]
MAX_LABEL_WORDS, MAX_LABELS = 4, 20  # maximum number of words in a label, and of labels
BLEU_ORDER = 4  # of BLEU's n-grams (Papineni et al. 2002)
CHRF_CHAR_ORDER, CHRF_BETA = 6, 2  # of chrF (Popović 2015)
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Metric:
    """One metric of one model over all rows. `sums` (N, k): what each row adds; `score`: sums (…, k) → values (…).

    A row that adds only zeros does not count (for example without a reference).
    """

    sums: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    better: Better = "higher"

    @property
    def value(self) -> float:
        return float(self.score(self.sums.sum(0)))


def normalize(text: str) -> str:
    """The text without what exact match ignores: the width of characters (NFKC), case, and surrounding whitespace and
    punctuation. An answer of only punctuation is kept as it is."""
    plain = unicodedata.normalize("NFKC", text).casefold().strip()
    marks = [unicodedata.category(character)[0] in "PZC" for character in plain]
    if all(marks):
        return plain
    return plain[marks.index(False) : len(marks) - marks[::-1].index(False)]


def is_chinese(text: str) -> bool:
    """Whether a text is Chinese; a Chinese character counts as about two letters of a word."""
    letters = sum(character.isalpha() for character in text)
    return 3 * len(HAN.findall(text)) > letters > 0


# ---------------------------------------------------------------------------------------------- words


@cache
def _jieba() -> Any:
    """The segmenter, with its dictionary cached in a private folder: in the system's temporary folder, it would be read
    from a file that anyone may have written."""
    import jieba

    jieba.setLogLevel("ERROR")
    segmenter = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        segmenter.tmp_dir = folder
        segmenter.initialize()
    return segmenter


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation; Chinese is segmented by jieba."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    parts = _jieba().lcut(plain) if HAN.search(plain) else re.findall(r"\w+", plain)
    return [part for part in parts if any(character.isalnum() for character in part)]


def labels_of(references: Sequence[str]) -> list[str] | None:
    """The labels, if the references are labels: two to twenty different ones of at most four words, each occurring
    about twice or more. Otherwise None."""
    labels = sorted({normalize(reference) for reference in references})
    if not 2 <= len(labels) <= min(MAX_LABELS, len(references) // 2) or any(len(label) > 40 for label in labels):
        return None
    return labels if all(len(words(label)) <= MAX_LABEL_WORDS for label in labels) else None


# ------------------------------------------------------------------------------------------- one row


def bleu_sums(answer: str, reference: str) -> list[int]:
    """Lengths, matches and n-grams as counted by sacrebleu, with the tokenizer "zh" for a Chinese reference, otherwise
    "13a"."""
    return _bleu("zh" if is_chinese(reference) else "13a")._extract_corpus_statistics([answer], [[reference]])[0]


def sentence_bleu(answer: str, reference: str) -> float:
    """BLEU of one sentence, 0…100, which is only approximate."""
    return float(bleu(np.array(bleu_sums(answer, reference), float)))


def chrf_sums(answer: str, reference: str) -> list[int]:
    """For each n-gram length, those of the answer, of the reference, and of both, as counted by sacrebleu."""
    return _chrf()._extract_corpus_statistics([answer], [[reference]])[0]


@cache
def _bleu(tokenizer: str) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer, effective_order=True, force=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(char_order=CHRF_CHAR_ORDER, beta=CHRF_BETA)


@cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer, tokenizers

    class Words(tokenizers.Tokenizer):
        """The library's own tokenizer drops every letter that is not a to z."""

        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return rouge_scorer.RougeScorer(list(ROUGES), tokenizer=Words())


def rouge(answer: str, reference: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), each as F1 in 0…100. A reference of one word has no word pairs, so it
    has no ROUGE-2; the usual programs give 0 here, even for a right answer."""
    scores, long = _rouge().score(reference, answer), len(words(reference))
    return {name: 100 * scores[name].fmeasure for name in ROUGES if long >= (2 if name == "rouge2" else 1)}


# ------------------------------------------------------------------------------------------ many rows


def mean(values: Sequence[float | None] | np.ndarray, better: Better = "higher", scale: float = 1.0) -> Metric:
    """A plain mean over the rows that have a value."""
    there = np.array([value is not None for value in values])
    numbers = np.array([0.0 if value is None else float(value) for value in values])
    return Metric(np.stack([scale * numbers * there, there], 1), _ratio, better)


def ratio(above: Sequence[float], below: Sequence[float], better: Better, then: Any = None) -> Metric:
    """Σ numerators ÷ Σ denominators: a mean weighted by length. `then` is applied to it."""
    sums = np.stack([np.asarray(above, float), np.asarray(below, float)], 1)
    return Metric(sums, _ratio if then is None else lambda totals: then(_ratio(totals)), better)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU of summed counts (…, 2 + 2 × 4), with sacrebleu's exponential smoothing and, as for sentences, over those
    n-gram lengths that the answers have at all; otherwise all short answers would get 0."""
    lengths, correct, total = sums[..., 0], sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER :]
    references = sums[..., 1]
    missed = (correct == 0) & (total > 0)
    smooth = 2.0 ** np.cumsum(missed, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(missed, 1 / smooth, correct) / total
        logs = np.where(total > 0, np.log(precision), 0.0).sum(-1) / np.maximum((total > 0).sum(-1), 1)
        brevity = np.where(lengths < references, np.exp(1 - references / lengths), 1.0)
    score = np.where((correct > 0).any(-1), 100 * brevity * np.exp(logs), 0.0)
    return np.where(references > 0, score, np.nan)


def chrf(sums: np.ndarray) -> np.ndarray:
    """chrF of summed counts (…, 6 × 3), with sacrebleu's effective order."""
    ours, theirs, both = (sums[..., at::3] for at in range(3))
    there = (ours > 0) & (theirs > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        orders = there.sum(-1)
        precision = np.where(there, both / ours, 0.0).sum(-1) / orders
        recall = np.where(there, both / theirs, 0.0).sum(-1) / orders
        score = 100 * (1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall)
    return np.where(theirs.sum(-1) > 0, np.nan_to_num(score), np.nan)


def macro_f1(answers: Sequence[str], references: Sequence[str | None], labels: Sequence[str]) -> Metric:
    """The mean of the F1 scores of all labels: a rare label counts as much as a frequent one. An answer that is not a
    label is a miss of the right one, but not a false alarm; a label that is in no resampled row does not count."""
    number = {label: at for at, label in enumerate(labels)}
    sums = np.zeros((len(answers), 3, len(labels)))  # hits, false alarms, misses
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        if reference is None:
            continue
        predicted, expected = normalize(answer), normalize(reference)
        if predicted == expected:
            sums[row, 0, number[expected]] = 1
            continue
        sums[row, 2, number[expected]] = 1
        if predicted in number:
            sums[row, 1, number[predicted]] = 1

    def score(totals: np.ndarray) -> np.ndarray:
        hits, alarms, misses = (totals[..., at * len(labels) : (at + 1) * len(labels)] for at in range(3))
        occurs = hits + misses > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            each = np.where(occurs, 2 * hits / (2 * hits + alarms + misses), 0.0)
            return 100 * each.sum(-1) / occurs.sum(-1)

    return Metric(sums.reshape(len(answers), -1), score)


# ------------------------------------------------------------------------------------ answers of a model


@dataclass(frozen=True)
class ModelAnswer:
    """One model's answer to one row. `tokens` of the answer; `ended`: by itself, not at the limit. `loss` is the sum of
    −log p over the `loss_tokens` of the reference; none without a reference."""

    text: str
    tokens: int
    ended: bool
    loss: float = 0.0
    loss_tokens: int = 0


def answer_parts(line: Mapping[str, Any]) -> AnswerParts:
    """Reasoning and answer in a line of answers.jsonl."""
    return split_reasoning(line["answer"], opened=line.get("opened", False))


def row_scores(answer: ModelAnswer, reference: str | None, labels: Sequence[str] | None) -> dict[str, float]:
    """The scores of one answer by itself, in 0…100; BLEU of a single sentence is only approximate."""
    scores: dict[str, float] = {"tokens": answer.tokens, "ended": float(answer.ended)}
    if answer.loss_tokens:
        scores["loss"] = answer.loss / answer.loss_tokens
    if reference is not None:
        scores["accuracy" if labels else "exact"] = 100.0 * (normalize(answer.text) == normalize(reference))
        scores["bleu"] = sentence_bleu(answer.text, reference)
        scores["chrf"] = float(chrf(np.array(chrf_sums(answer.text, reference), float)))
        scores |= rouge(answer.text, reference)
    return scores


def answer_metrics(
    answers: Sequence[ModelAnswer], references: Sequence[str | None], labels: Sequence[str] | None
) -> dict[str, Metric]:
    """All metrics that apply to one model's answers, by name, in display order."""
    metrics: dict[str, Metric] = {}
    there = [reference is not None for reference in references]
    if any(there):
        pairs = list(zip(answers, references, strict=True))
        same = [None if right is None else normalize(answer.text) == normalize(right) for answer, right in pairs]
        metrics["accuracy" if labels else "exact"] = mean(same, scale=100)
        if labels:
            metrics["f1"] = macro_f1([answer.text for answer in answers], references, labels)
        metrics["chrf"] = Metric(_stacked(pairs, chrf_sums, 3 * CHRF_CHAR_ORDER), chrf)
        metrics["bleu"] = Metric(_stacked(pairs, bleu_sums, 2 + 2 * BLEU_ORDER), bleu)
        scores = [{} if right is None else rouge(answer.text, right) for answer, right in pairs]
        for name in ROUGES:
            if any(name in row for row in scores):
                metrics[name] = mean([row.get(name) for row in scores])
    if any(answer.loss_tokens for answer in answers):
        losses, tokens = [answer.loss for answer in answers], [answer.loss_tokens for answer in answers]
        metrics["loss"] = ratio(losses, tokens, "lower")
        metrics["perplexity"] = ratio(losses, tokens, "lower", np.exp)
    metrics["ended"] = mean([answer.ended for answer in answers], scale=100)
    metrics["tokens"] = mean([answer.tokens for answer in answers], "neither")
    return metrics


def _stacked(
    pairs: Sequence[tuple[ModelAnswer, str | None]], count: Callable[[str, str], list[int]], width: int
) -> np.ndarray:
    return np.array([[0] * width if right is None else count(answer.text, right) for answer, right in pairs], float)


def margin_metrics(margins: Sequence[float]) -> dict[str, Metric]:
    """Metrics of a reward model from how far it scores the better answer of each pair above the worse one."""
    lead = np.asarray(margins, float)
    return {"pair_accuracy": mean(lead > 0, scale=100), "margin": mean(lead)}


def histogram(margins: Sequence[float], bins: int = 20) -> dict[str, list[float]]:
    """A histogram of margins: `edges` (bins + 1), symmetric around zero so that errors are left of the middle; `counts`
    (bins)."""
    lead = np.asarray(margins, float)
    widest = float(np.abs(lead).max(initial=0.0)) or 1.0
    counts, edges = np.histogram(lead, bins, (-widest, widest))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
