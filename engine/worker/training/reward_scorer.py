"""A finished reward model that scores answers, and the check that it can score the answers of this model.

Its training is in `engine.worker.training.reward`, loading and scoring in `engine.worker.models.reward_model`, and its
recorded accuracy in `engine.models.reward_models`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.core.problems import Problem, Refusal, problem
from engine.models.reward_models import ScoredPair, pairs_of, reward_model_problems
from engine.worker.models.reward_model import load_reward_model, score_conversations

# The number of its pairs that may be ranked differently, since another machine rounds differently.
MAX_FLIPPED_SHARE = 0.05
TOKENIZER_PROBE = (
    "Ünïcode, 12345 and <|im_end|>\n\n  two spaces；你好，世界。🙂"  # texts that tokenizers may treat differently
)

# Token ids of prompts and of their answers, including the end token → a score (B,) for each.
RewardFunction = Callable[[list[list[int]], list[list[int]]], Tensor]


def load_reward_function(folder: Path, tokenizer: PreTrainedTokenizerBase) -> RewardFunction:
    """The reward model in a result folder, loaded and tested. Raises Refusal if it cannot score the output of a model
    with this tokenizer."""
    if problems := reward_model_problems(folder):
        raise Refusal(problems)
    model, theirs = load_reward_model(folder)
    problems = tokenizer_problems(tokenizer, theirs)
    if not problems:
        accuracy, problems = check_ranking(model, pairs_of(folder))
        print(f"reward model: ranks {accuracy:.1%} of its own evaluation pairs correctly", flush=True)
    if problems:
        raise Refusal(problems)
    return lambda prompts, answers: score_conversations(model, _with_prompts(prompts, answers))


def _with_prompts(prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    return [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]


def tokenizer_problems(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> list[Problem]:
    """What prevents a reward model from reading the policy's output: another vocabulary, or other ids for a text."""
    own, other = ours.get_vocab(), theirs.get_vocab()
    differing = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    if differing:
        values = {"count": len(differing), "tokens": ", ".join(differing[:3])}
        return [problem("reward-other-vocabulary", "stage.reward_model", **values)]
    if _tokenized_probe(ours) != _tokenized_probe(theirs):
        return [problem("reward-other-reading", "stage.reward_model")]
    return []


def _tokenized_probe(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    chat = [{"role": "user", "content": TOKENIZER_PROBE}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return [tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=False), rendered]


def check_ranking(model: Any, pairs: list[ScoredPair]) -> tuple[float, list[Problem]]:
    """The share of its own evaluation pairs that the loaded model ranks correctly; Refusal if its run recorded more."""
    prompts = [pair.prompt_ids for pair in pairs]
    better = score_conversations(model, _with_prompts(prompts, [pair.chosen_ids for pair in pairs]))
    worse = score_conversations(model, _with_prompts(prompts, [pair.rejected_ids for pair in pairs]))
    accuracy = (better > worse).double().mean().item()
    promised = sum(pair.chosen_score > pair.rejected_score for pair in pairs) / len(pairs)
    if accuracy < promised - MAX_FLIPPED_SHARE:
        values = {"now": f"{accuracy:.0%}", "then": f"{promised:.0%}", "pairs": len(pairs)}
        return accuracy, [problem("reward-model-changed", "stage.reward_model", **values)]
    return accuracy, []
