"""Preferences over images on the demo vision model: losses are those by hand, and a resumed run ends the same."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from engine.data.images import IMAGE_MARK, image_in_file
from engine.launch.workspace import DEMO_VISION_MODEL, Workplace
from engine.preflight.checks import preflight_problems
from engine.spec.run_spec import RunSpec
from engine.worker.data.examples import Encoder
from engine.worker.data.preview import encode
from engine.worker.models.processor import load_image_tokens
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.templates.image_tokens import ImageTokens, media_token_ids
from tests.forked import run_forking
from tests.test_images import picture

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("images")
    return json.loads(run_forking("-m", "tests.image_preferences", root).splitlines()[-1])


def close_to(rows: list[list[float]]) -> list[Any]:
    return [pytest.approx(row, abs=2e-5) for row in rows]


def test_the_loss_of_pairs_with_images_is_that_by_hand(results: dict[str, Any]) -> None:
    """Of the model as it was, and after a step; of rows with no image, with one and with two."""
    by_hand, logged = results["dpo"]["by_hand"], results["dpo"]["logged"]
    assert logged == close_to(by_hand)
    assert by_hand[1][0] < 0.5 < by_hand[0][0]


def test_the_loss_and_drift_of_rated_answers_about_images_are_those_by_hand(results: dict[str, Any]) -> None:
    by_hand, logged = results["kto"]["by_hand"], results["kto"]["logged"]
    assert logged == close_to(by_hand)
    assert by_hand[0] == [0.5, 0]
    assert by_hand[1][0] < 0.45
    assert by_hand[1][1] > 0.5


def test_the_loss_without_a_reference_is_that_by_hand(results: dict[str, Any]) -> None:
    assert results["orpo"]["logged"] == close_to(results["orpo"]["by_hand"])


def test_the_images_play_a_part_in_the_loss_of_pairs(results: dict[str, Any]) -> None:
    before, others = results["dpo"]["by_hand"][0], results["dpo"]["other_images"]
    assert before[1] != pytest.approx(others[0], abs=1e-2)


def test_answers_to_questions_about_images_are_written_and_scored_as_by_hand(results: dict[str, Any]) -> None:
    made = results["grpo"]
    assert len({tuple(ours) for ours, _ in made["written"]}) > 1
    for ours, by_hand in made["written"]:
        assert ours == by_hand
    assert made["logged"] == pytest.approx(made["by_hand"], abs=2e-5)
    assert min(made["by_hand"]) > 0.01


def test_sampled_answers_show_the_question_with_marks_for_its_images(results: dict[str, Any]) -> None:
    questions = {sample["prompt"][0]["content"] for sample in results["grpo"]["samples"]}
    assert questions == {"<image>What is in the picture?", "Is <image> like <image>", "Hello!"}


@pytest.mark.parametrize("stage", ["dpo", "grpo"])  # GRPO in the middle of a round, with its answers and images
def test_a_resumed_run_over_images_ends_as_if_nothing_had_happened(results: dict[str, Any], stage: str) -> None:
    assert results[stage]["resumed_steps"] == [2]
    assert results[stage]["resumed"] == 0


def test_the_result_of_preferences_over_images_reads_images(results: dict[str, Any]) -> None:
    assert "preprocessor_config.json" in results["dpo"]["files"]


@cache
def image_tokens() -> ImageTokens:
    model = {"model_name_or_path": str(DEMO_VISION_MODEL)}
    return load_image_tokens(
        str(DEMO_VISION_MODEL), load_tokenizer(RunSpec.read({"model": model}), str(DEMO_VISION_MODEL))
    )


def encoder_of(stage: dict[str, Any], max_length: int = 64) -> Encoder:
    spec = RunSpec.read({"stage": stage}).change("data.max_length", max_length)
    return Encoder.of(spec, image_tokens().processor.tokenizer, images=image_tokens())


def pair_about(file: Path) -> dict[str, Any]:
    question = {"role": "user", "content": f"{IMAGE_MARK}What is it?", "images": [image_in_file(file)]}
    sides = {"chosen": "A red ring.", "rejected": "No."}
    return {"messages": [question]} | {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}


def test_what_the_model_sees_of_a_pair_shows_the_image_of_both_sides(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png", (48, 48))
    (encoded,) = encode(encoder_of({"kind": "dpo"}), [pair_about(file)])
    image = encoder_of({"kind": "dpo"}).tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for side in encoded.sides:
        ((begin, identity),) = side.images
        assert (identity, [*side.ids].count(image)) == (str(file), 9)
        assert [*side.ids[begin : begin + 9]] == [image] * 9
        assert side.trained[0][0] > begin + 9


def test_images_of_pairs_are_decoded_and_count_in_lengths(tmp_path: Path) -> None:
    row = pair_about(picture(tmp_path / "a.png", (48, 48)))
    (whole,) = encoder_of({"kind": "dpo"}).examples([row])
    prompt, chosen, _ = map(len, whole.values)
    lengths = (prompt + chosen, prompt + chosen - 1, prompt)
    made = [encoder_of({"kind": "dpo"}, length).examples([row])[0] for length in lengths]
    assert [example.status for example in made] == ["kept", "cut", "too_long"]
    assert [len(example.images) for example in made] == [1, 1, 0]
    file = tmp_path / "b.jpg"
    Image.effect_noise((64, 64), 90).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (broken,) = encoder_of({"kind": "dpo"}).examples([pair_about(file)])
    assert broken.reason.code == "row-image-broken"


def test_a_reward_model_is_not_trained_on_images(tmp_path: Path) -> None:
    (made,) = encoder_of({"kind": "rm"}).examples([pair_about(picture(tmp_path / "a.png"))])
    assert made.reason.code == "row-images-stage"


def test_a_reward_model_scores_no_questions_with_images(workplace: Workplace, make_spec: Any) -> None:
    picture(workplace.data / "a.png")
    (workplace.data / "seen.jsonl").write_text(json.dumps({"instruction": "<image>?", "output": "", "image": "a.png"}))
    (workplace.data / "dataset_info.json").write_text(json.dumps({"seen": {"file_name": "seen.jsonl"}}))
    spec: RunSpec = make_spec(data__datasets=["seen"])
    for rewards, refused in ({"length": 1}, False), ({"length": 1, "reward_model": 1}, True):
        stage = {"kind": "grpo", "rewards": rewards, "reward_length": 9}
        codes = {problem.code for problem in preflight_problems(spec.change("stage", stage), workplace)}
        assert ("reward-model-images" in codes) == refused
    generated = spec.change("stage", {"kind": "grpo", "rewards": {"length": 1}, "reward_length": 9})
    generated = generated.change("extra", {"use_vllm": True})
    assert "images-with-vllm" in {problem.code for problem in preflight_problems(generated, workplace)}


@pytest.mark.slow
def test_a_model_learns_from_pairs_what_is_in_pictures(tmp_path: Path) -> None:
    """Also of pictures that it has never seen. Its answers there are evaluated as a person would do it."""
    learned = json.loads(run_forking("-m", "tests.image_learning", tmp_path / "learning", "dpo").splitlines()[-1])
    accuracy, held_out = learned["dpo"]
    assert accuracy[0] < 0.6
    assert min(accuracy[-3:]) > 0.9
    assert held_out[-1] > 0.9
    assert learned["exact"]["dpo"] > 80


def test_tokens_of_all_media_are_suppressed() -> None:
    processor = SimpleNamespace(image_token_id=5, video_token_ids=[7, None], audio_token_id=None)
    config = SimpleNamespace(image_token_index=4, image_token_id=5)
    assert media_token_ids(processor, config) == [4, 5, 7]
