"""Rows with images on tiny models of two families: ids, labels and the first loss are as by transformers' classes."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from engine.core.problems import say
from engine.data import browse
from engine.data.images import image_in_file
from engine.launch.workspace import Workplace
from engine.preflight.checks import preflight_problems
from engine.serving import servers
from engine.spec.run_spec import RunSpec
from engine.worker.data.turn_weights import spans_without
from tests.forked import run_forking
from tests.image_training import FAMILIES, IMAGES
from tests.served import client_of, serving
from tests.test_images import marked, picture
from tests.test_row_spellings import dataset
from webui.data_tab import rows_html, tokens_html
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("images")
    return {"root": root} | json.loads(run_forking("-m", "tests.image_training", root).splitlines()[-1])


slow, each_family = pytest.mark.slow, pytest.mark.parametrize("family", FAMILIES)


@slow
@each_family
def test_rows_with_images_are_prepared_as_the_processor_writes_them(results: dict[str, Any], family: str) -> None:
    for by_hand, ours in (results[family]["ids"], results[family]["labels"]):
        assert ours == by_hand
    assert results[family]["files"] == IMAGES


@slow
@each_family
def test_the_first_loss_is_that_of_the_model_by_hand(results: dict[str, Any], family: str) -> None:
    by_hand, first, *_, last = results[family]["loss"]
    assert first == pytest.approx(by_hand, abs=2e-6)
    assert last < first
    assert results[family]["other_loss"] != pytest.approx(by_hand, abs=2e-5)  # the images play a part in it


@slow
@each_family
def test_answers_and_losses_of_rows_with_images_are_those_by_hand(results: dict[str, Any], family: str) -> None:
    """Answers are written side by side, where the positions of some are shifted by an image and of others are not."""
    ours, by_hand = results[family]["answers"]
    assert ours == by_hand
    ours, by_hand = results[family]["losses"]
    assert ours == pytest.approx(by_hand, abs=1e-3)


@slow
@each_family
def test_preferences_over_images_are_scored_as_by_hand(results: dict[str, Any], family: str) -> None:
    """DPO's better and worse answers, and KTO's good and bad ones; GRPO ends with a result that reads images."""
    made = results[family]["preferences"]
    assert made["logged"] == pytest.approx(made["by_hand"], abs=2e-4)
    assert any("processor" in name for name in made["grpo"])


@slow
def test_other_programs_ask_about_an_image(results: dict[str, Any], tmp_path: Path) -> None:
    base = results["root"] / "qwen2_5_vl" / "base"
    row, (ours, _) = results["qwen2_5_vl"]["request"], results["qwen2_5_vl"]["answers"]
    url = f"data:image/png;base64,{row['image']}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row["question"]}]
    (tmp_path / "saves").mkdir()
    workplace = Workplace(models=(base.parent,), data=tmp_path, saves=tmp_path / "saves")
    with serving(workplace, servers.choose(workplace, str(base))) as server:
        client = client_of(server)
        ask = partial(client.chat.completions.create, model="base", temperature=0, max_tokens=len(ours[0]))
        answer = ask(messages=[{"role": "user", "content": parts}], extra_body={"ignore_eos": True})
        assert answer.choices[0].message.content == row["answer"]
        parts[0]["image_url"] = {"url": "http://127.0.0.1/a.png"}
        with pytest.raises(openai.BadRequestError, match="Images are not downloaded"):
            ask(messages=[{"role": "user", "content": parts}])


@slow
@each_family
def test_image_tokens_are_never_trained_and_a_cut_leaves_images_whole(results: dict[str, Any], family: str) -> None:
    made = results[family]["otherwise"]
    places = {"qwen2_5_vl": 4, "gemma3": 10}[family]  # tokens of the first image, with those around them for Gemma
    everything = made["everything"]
    assert len(everything["ids"]) - len(everything["trained"]) == places
    assert (made["cut_end"]["status"], made["cut_end"]["files"]) == ("cut", ["red"])
    assert made["cut_end"]["ids"] == results[family]["ids"][0][0][:-1]
    assert (made["cut_start"]["status"], made["cut_start"]["files"]) == ("cut", ["blue", "green"])
    assert (made["no room"]["status"], made["no room"]["files"]) == ("too_long", [])
    assert made["text template"]["reason"] == say("images-left-out", places=0, images=1)


@slow
def test_images_are_scaled_to_the_limits_of_pixels_which_the_result_keeps(results: dict[str, Any]) -> None:
    ours, by_transformers = results["pixels"]["tokens"]
    whole = results["qwen2_5_vl"]["ids"][0][1].count(800)
    assert ours == by_transformers < whole
    assert results["pixels"]["served"] == 4  # 1024 pixels are four tokens of 16 x 16
    assert results["pixels"]["limits"] == [1024, 1024]
    assert results["pixels"]["fixed"] == "image-size-fixed"


@slow
def test_prepared_rows_are_used_again_until_an_image_changes(results: dict[str, Any]) -> None:
    assert results["again"] == [True, False, True, False]


def test_a_model_that_reads_no_images_and_packing_are_refused_before_the_start(
    workplace: Workplace, make_spec: Any
) -> None:
    picture(workplace.data / "a.png")
    row = json.dumps(marked("<image>What?", "a.png"))
    (workplace.data / "seen.jsonl").write_text(row)
    (workplace.data / "dataset_info.json").write_text(json.dumps({"seen": {"file_name": "seen.jsonl"}}))
    spec: RunSpec = make_spec(data__datasets=["seen"], data__packing=True)
    codes = {problem.code for problem in preflight_problems(spec, workplace)}
    assert {"model-without-images", "packing-with-images"} <= codes
    assert "strategy-images" not in codes
    divided = make_spec(data__datasets=["seen"], hardware={"num_processes": 2, "strategy": "fsdp2"})
    assert "strategy-images" in {problem.code for problem in preflight_problems(divided, workplace)}


def test_limits_of_pixels_are_held_against_the_model(workplace: Workplace, make_spec: Any, tiny: Path) -> None:
    picture(workplace.data / "a.png")
    (workplace.data / "seen.jsonl").write_text(json.dumps(marked("<image>What?", "a.png")))
    (workplace.data / "dataset_info.json").write_text(json.dumps({"seen": {"file_name": "seen.jsonl"}}))
    base = workplace.saves / "base"
    shutil.copytree(tiny, base)
    here = replace(workplace, models=(workplace.saves,))
    for config, codes in (
        ({"image_processor_type": "A", "size": {"height": 64, "width": 64}}, {"image-size-fixed"}),
        ({"image_processor_type": "A", "size": {"longest_edge": 512, "shortest_edge": 256}}, {"image-size-fixed"}),
        ({"image_processor_type": "A", "min_pixels": 3136, "max_pixels": 12845056}, {"image-pixels-crossed"}),
        ({"image_processor_type": "A", "min_pixels": 1024, "max_pixels": 12845056}, set()),
    ):
        (base / "preprocessor_config.json").write_text(json.dumps(config))
        spec: RunSpec = make_spec(data__datasets=["seen"], data__image_max_pixels=2048)
        problems = preflight_problems(spec.change("model.model_name_or_path", str(base)), here)
        assert {problem.code for problem in problems if problem.field.startswith("data.")} == codes


def test_spans_are_cut_where_images_are() -> None:
    assert spans_without([(0, 10)], None, [(2, 4), (8, 12)]) == ([(0, 2), (4, 8)], None)
    assert spans_without([(0, 3), (5, 9)], [1.0, 0.5], [(5, 6)]) == ([(0, 3), (6, 9)], [1.0, 0.5])


def test_tokens_of_an_image_are_shown_as_one_after_the_image(tmp_path: Path) -> None:
    pieces = [[5, "<image>", False, True]] * 64 + [[6, "a", True, False]] * 6
    row = {"number": 1, "place": "a:1", "fate": "kept", "reason": None}
    pieces = [[4, "<s>", False, True], *pieces]
    side = {"name": "", "tokens": 71, "trained": 6, "pieces": pieces, "images": [[1, "a"]]}
    image = image_in_file(picture(tmp_path / "a.png", (40, 30)))
    html = tokens_html.tokens({"rows": [row | {"sides": [side]}]}, Words("en"), {"a": image})
    assert re.search(r"&lt;s&gt;.*<img .*a\.png · 40 × 30.*&lt;image&gt;", html)
    assert html.count("&lt;image&gt;") == 1
    assert "× 64" in html
    assert html.count('title="6"') == 6


def test_a_row_is_shown_with_small_pictures_of_its_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (400, 100), (250, 0, 0))
    Image.effect_noise((400, 100), 90).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    shown = browse.page(dataset(tmp_path, marked("<image>What?", "a.png"), marked("<image>What?", "b.png")), 1, 10)
    html = rows_html.page(shown, Words("en"))
    assert "&lt;image&gt;What?" in html
    assert "a.png · 400 × 100" in html
    assert "b.png · 400 × 100" in html
    (url,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)  # of the other only its header is whole
    with Image.open(io.BytesIO(base64.b64decode(url))) as small:
        assert small.size == (96, 24)
        assert small.getpixel((50, 10))[0] > 200


def test_an_image_is_looked_at_once_until_its_file_changes(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png", (6, 4))
    assert image_in_file(file).size == (6, 4)
    picture(file, (90, 40))
    assert image_in_file(file).size == (90, 40)
