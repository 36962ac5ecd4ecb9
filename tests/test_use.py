"""What was trained is used: several adapters at once, and what each way of using says where something does not fit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core import hardware
from engine.core.locks import try_lock
from engine.core.problems import Problem, Refusal
from engine.core.rundir import ALIVE_BYTE, read_json, write_json
from engine.evaluation import evaluation_spec, report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export import export_spec
from engine.export.export_spec import ExportSpec
from engine.launch.engine_choice import EngineChoice
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.runs import failures, runs
from engine.runs.results import new_export_spec
from engine.serving import server_process, servers
from engine.spec.run_spec import RunSpec
from tests.conftest import by_hand, wait_until
from tests.past_runs import past_run

pytestmark = pytest.mark.usefixtures("forked")

CPU = {"device": "cpu"}


def ended(workplace: Workplace, run: runs.Run) -> runs.Run:
    return wait_until(lambda: (now := runs.get(workplace.saves, run.id)).final and now, 180)


@pytest.mark.slow
def test_several_adapters_are_measured_together_with_their_base_and_each_says_its_own(
    workplace: Workplace, demo_results: Path
) -> None:
    shutil.copytree(demo_results, workplace.saves, dirs_exist_ok=True)
    rows = [{"instruction": f"Translate {word} Group", "output": word} for word in ("BSIC", "Ada", "Sea", "10")]
    (workplace.data / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    workplace = Workplace(models=(DEMO_MODEL,), data=workplace.data, saves=workplace.saves)
    ids = [f"demo_model/lora/{name}" for name in ("two", "one")]
    spec = EvaluationSpec.read(
        {"results": ids, "data": {"datasets": ["chat"]}, "generation": {"max_new_tokens": 40}, "hardware": CPU}
    )
    run = ended(workplace, runs.submit(spec, workplace))
    assert run.state == "finished", failures.explain(run)
    found = report.summary(run.dir)
    assert [one["id"] for one in found["voices"]] == ["base", *ids]
    assert set(found["differences"]) == set(ids)
    told = report.page(run.dir, "asked").rows
    asked = [{**row, "instruction": one["messages"][-1]["content"]} for row, one in zip(rows, told, strict=True)]
    expected = by_hand(DEMO_MODEL, None, *(workplace.saves / one / "adapter" for one in ids), rows=asked)
    for voice, one in zip(("base", *ids), expected, strict=True):
        assert [row["answers"][voice]["text"] for row in told] == one["answers"], voice
    assert len({tuple(one["answers"]) for one in expected}) == 3


@pytest.mark.slow
def test_a_chat_template_that_writes_nothing_is_told_wherever_it_would_be_used(
    workplace: Workplace, make_spec: Callable[..., RunSpec], tiny: Path, tmp_path: Path
) -> None:
    silent = tmp_path / "models" / "silent"
    shutil.copytree(tiny, silent)
    (silent / "chat_template.jinja").unlink(missing_ok=True)
    settings = read_json(silent / "tokenizer_config.json") | {
        "chat_template": "{% if false %}{{ messages }}{% endif %}"
    }
    write_json(silent / "tokenizer_config.json", settings)
    workplace = Workplace(models=(silent.parent,), data=workplace.data, saves=workplace.saves)
    base = {"model_name_or_path": str(silent)}
    training = make_spec(model=base)
    measuring = EvaluationSpec.read({"model": base, "data": {"datasets": ["chat"]}, "hardware": CPU})
    exporting = ExportSpec.read({"model": base, "prompts": ["Hello?"], "check_prompts": 0, "hardware": CPU})
    for spec in (training, measuring, exporting):
        run = ended(workplace, runs.submit(spec, workplace))
        why = failures.explain(run)
        assert run.state == "failed"
        assert "template writes no token at the end of an answer" in why.what("en"), spec.kind
        assert "对话模板" in why.what("zh"), spec.kind
    server = servers.start(workplace, servers.choose(workplace, str(silent)))
    try:
        with pytest.raises(Refusal, match="template writes no token at the end of an answer"):
            servers.wait(server)
    finally:
        servers.end(server)


def test_an_adapter_of_another_base_is_told_by_its_name_in_chat_evaluation_and_export(
    workplace: Workplace, tiny: Path
) -> None:
    other = str(workplace.models[0] / "Elsewhere-7B")
    for name, base in (("own", str(tiny)), ("stranger", other)):
        spec = RunSpec.read({"name": name, "model": {"model_name_or_path": base}})
        run = past_run(workplace.saves, spec)
        write_json(run.dir.adapter / "adapter_config.json", {"base_model_name_or_path": base, "r": 8})
        (run.dir.adapter / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    own, stranger = f"{tiny.name}/lora/own", "Elsewhere-7B/lora/stranger"

    def in_chat() -> list[Problem]:
        with pytest.raises(Refusal) as refused:
            servers.choose(workplace, str(tiny), [own, stranger])
        return refused.value.problems

    def in_evaluation() -> list[Problem]:
        asked = {
            "model": {"model_name_or_path": str(tiny)},
            "results": [own, stranger],
            "data": {"datasets": ["chat"]},
        }
        spec = EvaluationSpec.read(asked | {"hardware": CPU})
        return evaluation_spec.problems(evaluation_spec.frozen(spec, workplace), workplace)

    def in_export() -> list[Problem]:
        spec = new_export_spec(workplace, {own: 1.0, stranger: 1.0}, hardware=CPU)
        return export_spec.problems(export_spec.frozen(spec, workplace), workplace)

    for used in (in_chat, in_evaluation, in_export):
        [wrong] = used()
        for text in (wrong.text("en"), wrong.text("zh")):
            assert "stranger" in text, used
            assert other in text, used
            assert str(tiny) in text, used
        assert "own" not in wrong.values["name"]


def test_who_wants_a_third_model_is_told_who_has_the_others(workplace: Workplace, tiny: Path) -> None:
    choice = servers.choose(workplace, str(tiny))
    locks = []
    # Servers as their folders say: alive is whose lock is held. Nothing is loaded for this.
    for started, name, by in ((1.0, "alpha", "ada"), (2.0, "beta", ""))[: EngineChoice().chat_servers]:
        folder = workplace.saves / servers.SERVERS_FOLDER / name
        folder.mkdir(parents=True)
        write_json(folder / "serve.json", {"name": name, "by": by, "started": started, "adapters": {}})
        locks.append(try_lock(folder / "lock", ALIVE_BYTE, shared=True))
    try:
        with pytest.raises(Refusal) as refused:
            servers.start(workplace, choice, by="bob")
    finally:
        for lock in locks:
            os.close(lock)
    [wrong] = refused.value.problems
    assert wrong.code == "chat-too-many"
    assert "alpha (ada); beta (—)" in wrong.text("en")
    assert "alpha (ada)" in wrong.text("zh")


def test_a_server_goes_to_the_card_with_the_most_room_and_says_when_there_is_too_little(
    workplace: Workplace, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The machine of the tests has no card: what nvidia-smi and torch would say of two is put in their place.
    cards = tuple(hardware.Gpu(n, f"GPU-{n}", "H100", 80 << 30, free << 30, 9.0) for n, free in ((0, 5), (1, 60)))
    monkeypatch.setattr(hardware, "gpus", lambda: cards)
    folder = workplace.saves / servers.SERVERS_FOLDER / "one"
    given = servers.serve_settings(workplace, servers.choose(workplace, str(tiny)), "ada")
    assert server_process._environment(given, folder)["CUDA_VISIBLE_DEVICES"] == "1"
    folder.mkdir(parents=True)
    write_json(folder / "serve.json", given)
    write_json(folder / "error.json", {"type": "OutOfMemoryError", "message": "CUDA out of memory.", "problems": []})
    [wrong] = servers.Server(folder).problems
    assert "not enough GPU memory for tiny" in wrong.text("en")
    assert "显存不足" in wrong.text("zh")
