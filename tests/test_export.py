"""What was trained becomes a model of its own: the same answers, every weight where it belongs, nothing half."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from engine.core import hardware
from engine.core.locks import try_lock
from engine.core.problems import Refusal
from engine.core.rundir import ALIVE_BYTE, RunDir, read_json, write_json
from engine.export import export_spec, gguf
from engine.export.export_spec import ExportSpec
from engine.launch.processes import find_processes
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.models.facts import inspect_model
from engine.preflight.checks import preflight_problems
from engine.runs import kinds, runs
from engine.runs.results import new_export_spec, results
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from tests.conftest import command_line, engine, wait_until
from tests.preloaded import run_python
from tests.sleeping import sleep_after
from webui.train_tab.choices import models_and_results
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")

CPU = {"device": "cpu"}
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of all safetensors files of a folder; bf16 as the fp32 that it stands for."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        for name, entry in json.loads(content[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + at for at in entry["data_offsets"])
                values = np.frombuffer(content[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
                bf16 = entry["dtype"] == "BF16"
                found[name] = (values.astype(np.uint32) << 16).view(np.float32) if bf16 else values
    return found


def merged_by_hand(base: Path, adapters: Mapping[Path, float]) -> dict[str, np.ndarray]:
    """W + Σ weight · scaling · B A, in fp64 (Hu et al. 2021, arXiv:2106.09685; rsLoRA: arXiv:2312.03732)."""
    made = {name: weight.astype(np.float64) for name, weight in weights(base).items()}
    for folder, share in adapters.items():
        config, parts = json.loads((folder / "adapter_config.json").read_text()), weights(folder)
        scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        for name in [name for name in parts if name.endswith("lora_A.weight")]:
            of = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            b, a = parts[name.replace("lora_A", "lora_B")].astype(np.float64), parts[name].astype(np.float64)
            made[of] = made[of] + share * scaling * b @ a
    return made


def bf16(values: np.ndarray) -> np.ndarray:
    """fp32 rounded to the nearest bf16, halves to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def submit(workplace: Workplace, ids: Mapping[str, float] | list[str], **settings: Any) -> Run:
    given = ids if isinstance(ids, dict) else dict.fromkeys(ids, 1.0)
    return runs.submit(new_export_spec(workplace, given, hardware=CPU, **settings), workplace)


def ended(workplace: Workplace, run: Run) -> Run:
    return wait_until(lambda: (now := runs.get(workplace.saves, run.id)).final and now)


# ------------------------------------------------------------------------------------------ the weights


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, dict[str, Any]]:
    """Results of every kind and their exports: the folder of all, and what each says of itself."""
    saves = tmp_path_factory.mktemp("many")
    told = run_python("-m", "tests.export_many", tiny, saves)
    return saves / "tiny", json.loads(told.splitlines()[-1])


ALIKE = [
    "plain", "other", "dora", "rslora", "pissa", "olora", "head", "embeddings",
    "judge", "templated", "vocabulary", "alone", "sum", "squeezed", "doubled",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_in_fp32_what_was_written_answers_like_what_it_was_made_of(name: str, many: tuple[Path, Any]) -> None:
    told = many[1][name]
    assert told.get("equal") == 12, told.get("failed") or told
    assert len({row["before"] for row in told["rows"]}) > 1  # and does not say the same to everything


@pytest.mark.slow
def test_a_merge_is_the_base_plus_the_product_of_the_matrices(many: tuple[Path, Any], tiny: Path) -> None:
    folder, _ = many
    for name in ("plain", "rslora"):
        by_hand = merged_by_hand(tiny, {folder / "lora" / name / "adapter": 1.0})
        written = weights(folder / "export" / name / "model")
        assert set(written) == set(by_hand)
        for key, weight in by_hand.items():
            np.testing.assert_allclose(written[key], weight, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.slow
def test_a_sum_of_adapters_is_the_sum_whatever_scaling_each_has(many: tuple[Path, Any], tiny: Path) -> None:
    folder, _ = many
    shares = {"plain": 1.0, "rslora": -0.5, "other": 0.25}
    by_hand = merged_by_hand(tiny, {folder / "lora" / name / "adapter": one for name, one in shares.items()})
    for key, weight in weights(folder / "export" / "sum" / "model").items():
        np.testing.assert_allclose(weight, by_hand[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_bf16_is_the_merge_in_fp32_rounded_once(many: tuple[Path, Any]) -> None:
    folder, told = many
    exact, half = (weights(folder / "export" / name / "model") for name in ("plain", "half"))
    for key, weight in exact.items():
        np.testing.assert_array_equal(half[key], bf16(weight), err_msg=key)
    assert told["half"]["equal"] < 12  # the tiny model's weights are noise: told as it is
    assert all(row["equal"] == (row["differs_at"] is None) for row in told["half"]["rows"])


@pytest.mark.slow
def test_a_whole_model_is_written_in_shards_and_another_precision(many: tuple[Path, Any]) -> None:
    folder, told = many
    shards = list((folder / "export" / "whole" / "model").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert inspect_model(shards[0].parent).dtype == "float16"
    trained = weights(folder / "lora" / "full" / "model")
    for key, weight in weights(shards[0].parent).items():
        np.testing.assert_array_equal(weight, trained[key].astype(np.float16))
    assert told["whole"]["prompts"] == 12


@pytest.mark.slow
def test_embeddings_that_were_trained_are_no_longer_the_output_head(many: tuple[Path, Any], tiny: Path) -> None:
    folder = many[0] / "export" / "embeddings" / "model"
    assert inspect_model(tiny).tied
    assert not inspect_model(folder).tied
    assert not np.array_equal(weights(folder)["model.embed_tokens.weight"], weights(folder)["lm_head.weight"])


@pytest.mark.slow
def test_words_that_were_added_are_in_the_model(many: tuple[Path, Any], tiny: Path) -> None:
    folder = many[0] / "export" / "vocabulary" / "model"
    assert inspect_model(folder).vocab_size == inspect_model(tiny).vocab_size + 2
    assert "<newer>" in (folder / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_model_is_smaller_and_loads_as_it_is(bits: str, many: tuple[Path, Any]) -> None:
    folder, told = many
    assert told[bits]["prompts"] == 12, told[bits]  # so it was loaded again, and answered
    config = read_json(folder / "export" / bits / "model" / "config.json")
    assert config["quantization_config"][f"load_in_{bits}"]
    size = {name: inspect_model(folder / "export" / name / "model").bytes for name in (bits, "plain")}
    assert size[bits] < size["plain"]
    assert not list((folder / "export" / bits).glob(".whole*"))


@pytest.mark.slow
def test_numbers_that_do_not_hold_are_refused(many: tuple[Path, Any]) -> None:
    folder, told = many
    assert told["overflow"] == {"refused": ["export-overflow"]}
    assert told["nan"] == {"refused": ["export-broken-adapter"]}
    assert RunDir(folder / "export" / "nan").left() is None


@pytest.mark.slow
def test_the_template_of_the_run_goes_along(many: tuple[Path, Any]) -> None:
    folder = many[0] / "export" / "templated" / "model"
    assert (folder / "chat_template.jinja").read_text() == (
        PROJECT / "engine/models/templates/alpaca.jinja"
    ).read_text()
    assert "### Instruction" in (folder / "Modelfile").read_text()


@pytest.mark.slow
def test_lora_alone_is_one_file_too(many: tuple[Path, Any]) -> None:
    run = RunDir(many[0] / "export" / "alone")
    with zipfile.ZipFile(run.path / "adapter.zip") as archive:
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(archive.namelist())
        assert archive.read("SHA256SUMS") == (run.adapter / "SHA256SUMS").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "alone", "judge", "whole"])
def test_every_file_has_its_checksum_and_the_card_says_what_it_is(name: str, many: tuple[Path, Any]) -> None:
    folder = RunDir(many[0] / "export" / name).left()
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": OK") == sum(one.is_file() for one in folder.iterdir()) - 1
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert front["library_name"] == ("peft" if name == "alone" else "transformers")
    assert "alpaca_translate_zh" in card
    assert str(folder) in card


# ------------------------------------------------------------------------------------------ as a run


@pytest.mark.slow
def test_a_run_on_a_quantized_base_is_merged_into_the_full_one_and_the_form_offers_it(
    workplace: Workplace, make_spec: Callable[..., RunSpec], tiny: Path
) -> None:
    spec = make_spec(model__quantization={"kind": "4bit"}, training__max_steps=4, name="small")
    trained = ended(workplace, runs.submit(spec, workplace))
    assert trained.state == "finished"

    done = engine(workplace, "export", trained.id, "--precision", "fp32", "--license", "mit", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    by_hand = merged_by_hand(tiny, {trained.dir.adapter: 1.0})
    for key, weight in weights(folder).items():
        np.testing.assert_allclose(weight, by_hand[key], rtol=1e-5, atol=1e-6, err_msg=key)
    told = read_json(folder / "comparison.json")
    assert told["equal"] == told["prompts"] == 8
    assert {row["source"] for row in told["rows"]} >= {"chat", "alpaca_translate_zh"}
    assert 'license: "mit"' in (folder / "README.md").read_text()
    assert kinds.read((folder / "spec.yaml").read_text(encoding="utf-8")) == trained.spec

    assert str(folder) in [value for _, value in models_and_results(workplace, Words("en"))]
    assert preflight_problems(workplace.frozen(make_spec(model__model_name_or_path=str(folder))), workplace) == []
    [newest, *_] = results(workplace.saves)
    assert (newest.run.kind, newest.stage, newest.adapter) == ("export", "sft", False)


@pytest.fixture
def here(workplace: Workplace, demo_results: Path) -> Workplace:
    """With two finished runs of the demo model."""
    shutil.copytree(demo_results, workplace.saves, dirs_exist_ok=True)
    return Workplace(models=(DEMO_MODEL, *workplace.models), data=workplace.data, saves=workplace.saves)


@pytest.mark.slow
def test_merged_and_adapter_say_the_same_to_all_demo_prompts(here: Workplace) -> None:
    run = ended(here, submit(here, ["demo_model/lora/one"], precision="fp32", check_prompts=200))
    told = read_json(run.dir.model / "comparison.json")
    assert told["prompts"] >= 150
    assert told["equal"] == told["prompts"]


@pytest.mark.slow
def test_kill_nine_in_the_middle_leaves_nothing_half_and_resume_begins_anew(
    here: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep_after(monkeypatch, tmp_path / "start", "write_json", 'path.name == "comparison.json"')
    run = submit(here, ["demo_model/lora/one"], check_prompts=1)
    partial = run.path / ".model.partial"
    wait_until((partial / "comparison.json").exists)
    assert (partial / "model.safetensors").exists()
    for process in find_processes(run.path):
        process.send_signal(signal.SIGSTOP)
    for process in [*find_processes(run.path), *keepers(run.path)]:
        process.kill()
    wait_until(lambda: runs.get(here.saves, run.id).state == "interrupted")
    assert run.dir.left() is None
    assert "export" not in [one.run.kind for one in results(here.saves)]
    (partial / "left-over").touch()

    wait_until(lambda: not find_processes(run.path))
    monkeypatch.undo()
    runs.resume(runs.get(here.saves, run.id))
    done = ended(here, run)
    assert done.state == "finished", done.dir.log.read_text()
    assert not (done.dir.model / "left-over").exists()
    assert not partial.exists()


def keepers(folder: Path) -> list[psutil.Process]:
    """The keeper itself, which does not carry the marker of its run."""
    return [one for one in psutil.process_iter() if str(folder) in command_line(one)]


# ------------------------------------------------------------------------------------------ what stands in the way


@pytest.fixture
def finished(workplace: Workplace, tiny: Path) -> Callable[..., str]:
    """A run as one that has finished leaves it, with an adapter whose weights are not looked at; returns its id."""

    def make(name: str, base: str = "", run_base: str = "", **config: Any) -> str:
        run = RunDir(workplace.saves / "tiny" / "lora" / name)
        run.adapter.mkdir(parents=True)
        spec = RunSpec.read({"name": name, "model": {"model_name_or_path": run_base or str(tiny)}})
        run.spec.write_text(spec.to_yaml(), encoding="utf-8")
        lora = {
            "base_model_name_or_path": base or run_base or str(tiny),
            "r": 8,
            "lora_alpha": 16,
            "task_type": "CAUSAL_LM",
        }
        write_json(run.adapter / "adapter_config.json", lora | config)
        (run.adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        write_json(run.adapter / "result.json", {"attempt": 1, "stage": "sft", "complete": True})
        write_json(run.exit, {"outcome": "finished", "reason": "finished", "ended": 1.0})
        write_json(run.request, {"by": "", "submitted": 1.0, "attempt": 1, "stop": None})
        return f"tiny/lora/{name}"

    return make


def refused(workplace: Workplace, ids: Mapping[str, float] | list[str], **settings: Any) -> list[Any]:
    given = ids if isinstance(ids, dict) else dict.fromkeys(ids, 1.0)
    spec = new_export_spec(workplace, given, **{"hardware": CPU} | settings)
    return export_spec.problems(export_spec.frozen(spec, workplace), workplace)


def codes(*asked: Any, **settings: Any) -> list[str]:
    return [one.code for one in refused(*asked, **settings)]


def test_a_finished_adapter_can_be_exported(workplace: Workplace, finished: Callable[..., str]) -> None:
    assert refused(workplace, [finished("good")]) == []


def test_an_adapter_of_another_base_says_which(workplace: Workplace, finished: Callable[..., str], tiny: Path) -> None:
    ids = [finished("good"), finished("stranger", base="/models/Elsewhere-7B")]
    [wrong] = refused(workplace, ids)
    assert wrong.code == "chat-other-base"
    assert "'stranger'" in wrong.text()
    assert "/models/Elsewhere-7B" in wrong.text()
    assert str(tiny) in wrong.text()


def test_a_base_that_is_gone_or_was_never_here_is_told(workplace: Workplace, finished: Callable[..., str]) -> None:
    assert codes(workplace, [finished("hub", run_base="org/never-fetched")]) == ["export-no-base"]
    gone = str(workplace.models[0] / "gone")
    assert codes(workplace, [finished("gone", run_base=gone)]) == ["model-missing-alone"]


def test_a_run_that_is_still_alive_is_not_exported(workplace: Workplace, finished: Callable[..., str]) -> None:
    id = finished("resumed")
    spec = export_spec.frozen(new_export_spec(workplace, {id: 1.0}, hardware=CPU), workplace)
    lock = try_lock(RunDir(workplace.saves / id).lock, ALIVE_BYTE, shared=True)
    assert [one.code for one in export_spec.problems(spec, workplace)] == ["export-unfinished"]
    os.close(lock)
    assert export_spec.problems(spec, workplace) == []


def test_too_little_room_is_told_before_the_start(
    workplace: Workplace, finished: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    id = finished("good")
    spec = export_spec.frozen(new_export_spec(workplace, {id: 1.0}, precision="fp32"), workplace)
    assert export_spec.disk_needed(spec) - export_spec.SLACK_BYTES == 4 * inspect_model(tiny).parameters
    half = spec.change("precision", "bf16")
    assert export_spec.disk_needed(half) - export_spec.SLACK_BYTES == 2 * inspect_model(tiny).parameters
    monkeypatch.setattr(hardware, "free_disk", lambda _folder: 1000)
    [wrong] = refused(workplace, [id])
    assert wrong.code == "export-no-room"
    assert "0.05 GB" in wrong.text()


def test_too_little_memory_is_told_before_the_start(
    workplace: Workplace, finished: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    id = finished("good")
    head = json.dumps(
        {
            "q.lora_A.weight": {"dtype": "F32", "shape": [4, 10], "data_offsets": [0, 160]},
            "q.lora_B.weight": {"dtype": "F32", "shape": [20, 4], "data_offsets": [160, 480]},
        }
    ).encode()
    file = RunDir(workplace.saves / id).adapter / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(head)) + head + bytes(480))
    spec = export_spec.frozen(new_export_spec(workplace, {id: 1.0}, precision="bf16"), workplace)
    # A base of fp32 is merged in fp32, whatever is written; beside it are the matrices, and a layer three times.
    needed = export_spec.memory_needed(spec)
    assert needed - export_spec.LIBRARIES_BYTES == 4 * (
        inspect_model(tiny).parameters + (4 * 10 + 20 * 4) + 3 * (20 * 10)
    )
    assert export_spec.memory_needed(spec.change("precision", "fp32")) == needed
    monkeypatch.setattr(hardware, "memory", lambda: (needed - 1, needed))
    [wrong] = refused(workplace, [id])
    assert wrong.code == "export-no-memory"
    assert "needs 0.50 GB" in wrong.text()
    # An export that waits for another run is measured by all the memory there is, and by what is free when it begins.
    other = RunDir(workplace.saves / finished("other"))
    lock = try_lock(other.lock, ALIVE_BYTE, shared=True)
    assert refused(workplace, [id]) == []
    os.close(lock)
    assert [one.code for one in export_spec.memory_problems(spec)] == ["export-no-memory"]
    # The machine of the tests has no card: what nvidia-smi would say of one is put in its place.
    card = hardware.Gpu(0, "GPU-0", "H100", 2 * needed, needed - 1, 9.0)
    monkeypatch.setattr(hardware, "gpus", lambda: (card,))
    on_card = spec.change("hardware.device", "cuda")
    assert [one.code for one in export_spec.memory_problems(on_card)] == ["export-no-card-memory"]
    assert export_spec.memory_problems(on_card, waits=True) == []


def test_a_container_has_the_memory_of_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)  # the files that the kernel shows in a container
    free, whole = hardware.memory()
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 600\ninactive_file 200\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert hardware.memory() == (300, 1000)
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.memory()[1] == whole
    assert free < whole


def test_ranks_are_compared_before_the_start(workplace: Workplace, finished: Callable[..., str]) -> None:
    ids = [finished("eight"), finished("four", r=4)]
    assert refused(workplace, ids, combination="cat") == []
    assert refused(workplace, ids, combination="ties_svd") == []
    [wrong] = refused(workplace, ids, combination="dare_linear")
    assert (wrong.code, "eight: 8, four: 4" in wrong.text()) == ("export-ranks-differ", True)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"use_dora": True}, "export-dora-combined"),
        ({"modules_to_save": ["lm_head"]}, "export-whole-modules"),
        ({"task_type": "SEQ_CLS"}, "export-whole-modules"),
    ],
)
def test_what_cannot_be_added_up_is_merged_alone(
    config: dict[str, Any], code: str, workplace: Workplace, finished: Callable[..., str]
) -> None:
    good, odd = finished("good"), finished("odd", **config)
    assert refused(workplace, [odd]) == []
    assert codes(workplace, [good, odd]) == [code]
    assert codes(workplace, {odd: 0.5}) == [code]


def test_contradictions_are_told_each(
    workplace: Workplace, finished: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATHANOR_LLAMA_CPP", raising=False)
    monkeypatch.setattr(gguf, "converter", lambda: None)
    good = finished("good")
    assert codes(workplace, [good], form="adapter", gguf="f16") == ["export-gguf-adapter"]
    monkeypatch.setenv("ATHANOR_LLAMA_CPP", "/elsewhere")
    [wrong] = refused(workplace, [good], gguf="f16")
    assert "/elsewhere" in wrong.text()
    monkeypatch.delenv("ATHANOR_LLAMA_CPP")
    assert codes(workplace, [good], form="adapter", quantize="4bit") == ["export-quantized-adapter"]
    assert codes(workplace, [good], quantize="4bit", gguf="f16") == [
        "export-quantized-gguf",
        "export-no-converter",
    ]
    assert codes(workplace, {good: 0.0, finished("zero"): 0.0}) == ["export-weights-zero"]
    with pytest.raises(Refusal, match="No run is chosen"):
        new_export_spec(workplace, {})
    with pytest.raises(Refusal, match="'tiny/lora/nobody' has no weights"):
        new_export_spec(workplace, {"tiny/lora/nobody": 1.0})


def test_a_base_that_is_itself_quantized_is_never_merged_into(workplace: Workplace, tiny: Path) -> None:
    copy = workplace.saves / "copied"
    copy.mkdir()
    for file in tiny.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = read_json(copy / "config.json") | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    write_json(copy / "config.json", config)
    spec = export_spec.frozen(ExportSpec.read({"model": {"model_name_or_path": str(copy)}, "hardware": CPU}), workplace)
    assert [one.code for one in export_spec.problems(spec, workplace)] == ["export-base-quantized"]


def test_a_quantized_run_is_exported_from_the_full_base(workplace: Workplace, finished: Callable[..., str]) -> None:
    id = finished("qlora")
    file = RunDir(workplace.saves / id).spec
    spec = kinds.read(file.read_text()).change("model.quantization", {"kind": "4bit"})
    file.write_text(spec.to_yaml(), encoding="utf-8")
    assert new_export_spec(workplace, {id: 1.0}).model.quantization.kind == "none"
