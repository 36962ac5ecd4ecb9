"""A finished reward model as what scores answers, and the proof that it can judge this model's.

How a reward model is trained is left to its stage; what its run says of itself, to `engine.reward_models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from engine.problems import Problem, Refusal, problem
from engine.reward_models import Pair, pairs_of, reward_model_problems
from engine.spec import RunSpec
from engine.worker.model import DTYPES, precision

FIELD = "stage.reward_model"
FLIPPED = 0.05  # share of its pairs that may come out the other way round, since another precision rounds differently
AT_ONCE = 16  # texts scored at a time
PROBE = "Ünïcode, 12345 and <|im_end|>\n\n  two spaces；你好，世界。🙂"  # whatever a tokenizer may treat in its own way


class Scorer:
    """Scores (B,) of answers to prompts, given as token ids, the token that ends an answer included."""

    def __init__(self, model: Any, pad: int):
        self.model, self.pad = model.eval().requires_grad_(False), pad

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        scores = [self._scores(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE)]
        return torch.cat(scores)

    def _scores(self, texts: list[list[int]]) -> Tensor:
        longest, device = max(map(len, texts)), self.model.device
        ids = [text + [self.pad] * (longest - len(text)) for text in texts]
        seen = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        told = self.model(
            input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(seen, device=device)
        )
        return told.logits.squeeze(-1).float()


def reward_of(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Scorer:
    """The reward model of the spec, loaded and tried. Raises Refusal with all that speaks against it."""
    folder = Path(spec.stage.reward_model)
    found = reward_model_problems(folder)
    if not found:
        found = tokenizer_problems(folder, tokenizer)
    if found:
        raise Refusal(found)
    scorer = load(folder, tokenizer.pad_token_id, DTYPES[precision(spec)], device)
    accuracy, found = tried(scorer, pairs_of(folder))
    print(f"reward model: ranks {accuracy:.1%} of its own evaluation pairs rightly", flush=True)
    if found:
        raise Refusal(found)
    return scorer


def load(folder: Path, pad: int, dtype: torch.dtype, device: torch.device) -> Scorer:
    """The reward model in the result folder of a finished run: a whole model, or an adapter with its head."""
    adapter = (folder / "adapter_config.json").exists()
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path if adapter else folder
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=dtype, use_safetensors=True
    )
    model.config.get_text_config().pad_token_id = pad
    if adapter:
        model = PeftModel.from_pretrained(model, folder)
    return Scorer(model.to(device), pad)


def tokenizer_problems(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """What keeps the reward model from reading what the policy writes: another vocabulary, or other ids for a text."""
    theirs = AutoTokenizer.from_pretrained(folder)
    ours, other = tokenizer.get_vocab(), theirs.get_vocab()
    differing = sorted(token for token in ours.keys() | other.keys() if ours.get(token) != other.get(token))
    if differing:
        shown = ", ".join(differing[:3])
        return [problem("reward-other-vocabulary", FIELD, count=len(differing), tokens=shown)]
    chat = [{"role": "user", "content": PROBE}]
    if _read(tokenizer, chat) != _read(theirs, chat):
        return [problem("reward-other-reading", FIELD)]
    return []


def _read(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> list[list[int]]:
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return [tokenizer.encode(PROBE, add_special_tokens=False), rendered]


def tried(scorer: Scorer, pairs: list[Pair]) -> tuple[float, list[Problem]]:
    """The share of its own evaluation pairs that the loaded model ranks rightly, and whether its run promised more."""
    better = scorer([pair.prompt_ids for pair in pairs], [pair.chosen_ids for pair in pairs])
    worse = scorer([pair.prompt_ids for pair in pairs], [pair.rejected_ids for pair in pairs])
    accuracy = (better > worse).double().mean().item()
    promised = sum(pair.chosen_score > pair.rejected_score for pair in pairs) / len(pairs)
    if accuracy < promised - FLIPPED:
        values = {"now": f"{accuracy:.0%}", "then": f"{promised:.0%}", "pairs": len(pairs)}
        return accuracy, [problem("reward-model-changed", FIELD, **values)]
    return accuracy, []
