"""A reward model scores a text at its last token: also where the token that ends a turn is the padding token, too."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from engine.core.rundir import RunDir, write_json, write_text
from engine.export.export_spec import ExportSpec
from engine.spec.run_spec import RunSpec
from engine.worker.export import export
from engine.worker.exporting import model_card
from engine.worker.models.loading import load_model
from engine.worker.models.reward_model import load_reward_model, score_conversations
from engine.worker.models.tokenizer import load_tokenizer, padding_beside_ends
from engine.worker.training.context import TrainingContext
from engine.worker.training.reward import reward_trainer
from tests import tiny_reward_model
from tests.preloaded import run_python

END = 2  # <|im_end|> of the tiny model


@pytest.fixture(scope="module")
def padded_with_its_end(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as SmolLM2 has it: what ends a turn also fills up batches."""
    folder = tmp_path_factory.mktemp("padded") / "tiny"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.pad_token_id = END
    config.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == config.pad_token_id == config.eos_token_id
    return folder


@pytest.fixture(scope="module")
def result(padded_with_its_end: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward model's adapter on it, random and of strong opinions."""
    run = tmp_path_factory.mktemp("saves") / "tiny" / "lora" / "judge"
    tiny_reward_model.make(str(padded_with_its_end), run)
    return run / "adapter"


def spec_of(model: Path, **changes: Any) -> RunSpec:
    return RunSpec.read(
        {
            "stage": "rm",
            "model": {"model_name_or_path": str(model)},
            "data": {"datasets": ["x"]},
            "training": {"gradient_checkpointing": False, "per_device_train_batch_size": 4},
            "hardware": {"device": "cpu"},
            **changes,
        }
    )


def conversations() -> list[list[int]]:
    """Texts of different lengths that end as an answer does; two more are cut off, one of them at a padding token."""
    draw = random.Random(0)
    texts = [[*(draw.randrange(10, 800) for _ in range(draw.randrange(3, 9))), END] for _ in range(6)]
    return [*texts, texts[0][:-1], [*texts[1][:-1], 0]]


@torch.no_grad()
def by_hand(body: Any, head: torch.Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
    """The head's product with the hidden state of each text's last token, one unpadded text at a time."""
    hidden = [body(input_ids=torch.tensor([list(ids)])).last_hidden_state[0, -1] for ids in texts]
    return [(state.float() @ head.float().T).item() for state in hidden]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_padded_on_either_side_scores_as_each_text_alone(padded_with_its_end: Path, side: str) -> None:
    torch.manual_seed(3)
    model = load_model(spec_of(padded_with_its_end, method="full"), str(padded_with_its_end)).eval()
    texts = conversations()
    body = AutoModel.from_pretrained(padded_with_its_end).eval()
    expected = by_hand(body, model.score.weight, texts)
    assert len({round(score, 4) for score in expected}) == len(texts)
    width = max(map(len, texts)) + 2
    empty = [width - len(ids) for ids in texts]
    rows = [[END] * n + ids if side == "left" else ids + [END] * n for n, ids in zip(empty, texts, strict=True)]
    real = [[1] * len(ids) for ids in texts]
    masks = [[0] * n + m if side == "left" else m + [0] * n for n, m in zip(empty, real, strict=True)]
    with torch.no_grad():
        together = model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks)).logits
        alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in texts]
    assert together.shape == (len(texts), 1)
    assert together.squeeze(-1).tolist() == pytest.approx(expected, abs=1e-5)
    assert alone == pytest.approx(expected, abs=1e-5)
    assert score_conversations(model, texts).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_batch_is_trained_at_the_end_of_each_answer(padded_with_its_end: Path, tmp_path: Path) -> None:
    spec = spec_of(padded_with_its_end, method={"kind": "lora", "r": 4})
    model = load_model(spec, str(padded_with_its_end))
    tokenizer = load_tokenizer(spec, str(padded_with_its_end))
    draw = random.Random(1)
    rows = [
        {
            "prompt_ids": [1, 300 + n],
            "chosen_ids": [*draw.sample(range(10, 40), 2 + n), END],
            "rejected_ids": [*draw.sample(range(40, 70), 5 - n), END],
        }
        for n in range(4)
    ]
    data = {"train": Dataset.from_list(rows)}
    trainer = reward_trainer(TrainingContext(spec, RunDir(tmp_path), model, tokenizer, data))
    model.eval()
    loss = trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator(rows))).item()
    body = AutoModel.from_pretrained(padded_with_its_end).eval()  # what an adapter that has learned nothing leaves
    head = next(weight for name, weight in model.named_parameters() if "score.modules_to_save" in name)
    better, worse = (
        torch.tensor(by_hand(body, head, [row["prompt_ids"] + row[side] for row in rows]))
        for side in ("chosen_ids", "rejected_ids")
    )
    assert loss == pytest.approx(-torch.nn.functional.logsigmoid(better - worse).mean().item(), abs=1e-5)


def test_a_reloaded_adapter_scores_the_end_token(padded_with_its_end: Path, result: Path) -> None:
    model, tokenizer = load_reward_model(result)
    weights = load_file(result / "adapter_model.safetensors")
    [head] = [weight for name, weight in weights.items() if "score" in name]
    body = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(padded_with_its_end), result
    ).base_model.model.model
    assert score_conversations(model, conversations()).tolist() == pytest.approx(
        by_hand(body.eval(), head, conversations()), abs=1e-4
    )
    assert tokenizer.pad_token_id != END  # so that other programs find the end of a turn


def test_what_is_saved_pads_with_another_token(tiny: Path, padded_with_its_end: Path) -> None:
    for model in (tiny, padded_with_its_end):
        assert load_tokenizer(spec_of(model), str(model)).pad_token_id == 0
    writing = RunSpec.read({"stage": "sft"})
    assert load_tokenizer(writing, str(padded_with_its_end)).pad_token_id == END  # nothing is read at its end


def test_where_there_is_no_other_token_the_model_card_says_what_that_means() -> None:
    words = models.WordLevel({"<end>": 0, "word": 1}, unk_token="word")
    alone = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<end>", pad_token="<end>")
    assert padding_beside_ends(alone) == 0
    assert "pad_token_id = None" in "\n".join(model_card._scoring_code(alone))


@pytest.mark.slow
def test_a_merged_export_scores_the_same_in_a_program_of_its_own(result: Path, padded_with_its_end: Path) -> None:
    judge = RunDir(result.parent)
    saves = judge.path.parent.parent.parent
    write_json(judge.request, {"by": "", "submitted": 1.0, "attempt": 1, "stop": None})
    for form in ("merged", "adapter"):
        run = RunDir(saves / "tiny" / "export" / form)
        run.path.mkdir(parents=True)
        about = {
            "model": {"model_name_or_path": str(padded_with_its_end)},
            "adapters": {str(result): 1.0},
            "precision": "fp32",
            "check_prompts": 4,
            "form": form,
        }
        write_text(run.spec, ExportSpec.read(about).to_yaml())
        write_json(run.request, {"kind": "export", "by": "", "submitted": 2.0, "attempt": 1, "stop": None})
        with contextlib.redirect_stdout(io.StringIO()):
            export(run)
        text = (run.left() / "README.md").read_text(encoding="utf-8")
        program = text.partition("```python\n")[2].partition("```")[0]
        printed = run_python("-c", program)
        model, tokenizer = load_reward_model(result)
        chat = [
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Hello! What can I do for you?"},
        ]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        assert ids[-2] == END  # a line break follows, which is not scored
        assert float(printed) == pytest.approx(score_conversations(model, [ids[:-1]]).item(), abs=1e-4)
    # A batch in a program that knows nothing of masks: the padding that was saved does not hide the end.
    merged = RunDir(saves / "tiny" / "export" / "merged").left()
    other = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    ended = conversations()[:6]
    pad = other.config.pad_token_id
    assert pad == AutoTokenizer.from_pretrained(merged).pad_token_id != END
    width = max(map(len, ended))
    rows = torch.tensor([ids + [pad] * (width - len(ids)) for ids in ended])
    with torch.no_grad():
        told = other(input_ids=rows, attention_mask=(rows != pad).long()).logits.squeeze(-1)
    assert told.tolist() == pytest.approx(score_conversations(model, ended).tolist(), abs=1e-4)
