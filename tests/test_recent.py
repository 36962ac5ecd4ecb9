"""What the page begins with: the newest finished run with its base, and the model that was used last."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from engine.core.rundir import RESULT_FILE, RunDir, write_json, write_text
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.workspace import DEMO_MODEL, DEMO_VISION_MODEL, Workplace
from engine.runs import plan, recent, runs
from engine.spec.run_spec import RunSpec
from webui.studio import page

TINY, DEMO = "tiny", str(DEMO_MODEL)


@pytest.fixture
def place(tmp_path: Path, tiny: Path, data: Path) -> Workplace:
    """An operator's folder with two models beside the bundled one; no run has been made."""
    shutil.copytree(tiny, tmp_path / "models" / "zebra")
    shutil.copytree(tiny, tmp_path / "models" / "ant")
    (tmp_path / "saves").mkdir()
    return Workplace(models=(tmp_path / "models", DEMO_MODEL), data=data, saves=tmp_path / "saves")


def used(
    place: Workplace,
    model: str | Path,
    name: str,
    when: float,
    outcome: str = "finished",
    stage: str = "sft",
    left: str = "adapter",
) -> Path:
    """A training's folder as one that has ended leaves it, its weights aside; the folder of its result."""
    run = RunDir(place.saves / Path(model).name / "lora" / name)
    folder = run.path / left
    folder.mkdir(parents=True)
    spec = RunSpec.read({"stage": stage, "name": name, "model": {"model_name_or_path": str(model)}})
    write_text(run.spec, spec.to_yaml())
    write_json(run.exit, {"outcome": outcome, "reason": outcome, "ended": when})
    write_json(run.request, {"by": "", "submitted": when, "attempt": 1, "stop": None})
    write_json(folder / RESULT_FILE, {"attempt": 1, "complete": True, "stage": stage})
    return folder


def model_of(place: Workplace, name: str) -> str:
    return str(place.models[0] / name)


def names(place: Workplace) -> list[str]:
    return [model.path.name for model in recent.models(place)]


def test_the_model_used_last_comes_first_and_the_demo_last(place: Workplace) -> None:
    assert names(place) == ["ant", "zebra", "demo_model"]
    assert recent.first_model(place).path.name == "ant"
    used(place, model_of(place, "zebra"), "a", 1.0, "failed")
    assert names(place) == ["zebra", "ant", "demo_model"]
    run = RunDir(place.saves / "demo_model" / "evaluation" / "b")
    run.path.mkdir(parents=True)
    write_text(run.spec, EvaluationSpec.read({"model": {"model_name_or_path": DEMO}}).to_yaml())
    write_json(run.request, {"kind": "evaluation", "by": "", "submitted": 2.0, "attempt": 1, "stop": None})
    assert names(place) == ["ant", "zebra", "demo_model"]  # last in the list, though it was used last
    assert recent.first_model(place).path.name == "demo_model"
    used(place, model_of(place, "gone"), "c", 3.0)  # its folder is not there any more
    (run.path.parent / "broken").mkdir()
    write_json(run.path.parent / "broken" / "request.json", {"by": "", "submitted": 4.0, "attempt": 1, "stop": None})
    assert recent.first_model(place).path.name == "demo_model"
    assert recent.first_model(dataclasses.replace(place, models=())) is None


def test_the_form_begins_with_it_in_settings_for_any_model(place: Workplace) -> None:
    assert plan.first_preset(place) == "demo"  # nothing has been used: what can be started at once
    spec, _ = plan.start_from(place, "lora_7b")
    assert spec.model.model_name_or_path == model_of(place, "ant")
    alone = dataclasses.replace(place, models=(DEMO_MODEL,))
    assert not plan.start_from(alone, "lora_7b")[0].model.model_name_or_path
    there = Page(place)
    assert (there.opens()["preset"], "f-model-model_name_or_path" in there.changed) == ("demo", False)
    used(place, model_of(place, "zebra"), "a", 1.0)
    assert plan.first_preset(place) == "lora_7b"
    shown = there.opens()
    assert (shown["preset"], shown["f-model-model_name_or_path"]) == ("lora_7b", model_of(place, "zebra"))
    assert shown["f-training-learning_rate"] == "0.0001"
    spec, _ = plan.start_from(place, "demo")
    assert spec.model.model_name_or_path == DEMO
    used(place, DEMO, "b", 2.0)
    assert there.opens()["preset"] == "demo"
    used(place, str(DEMO_VISION_MODEL), "c", 3.0)
    assert plan.first_preset(dataclasses.replace(place, models=(*place.models, DEMO_VISION_MODEL))) == "demo_images"
    assert Page(place).opens()["preset"] == "demo"


# -------------------------------------------------------------------------------------------- on the page


class Page:
    """The page in this process: what its handlers answer, by the components that they answer into."""

    def __init__(self, place: Workplace):
        self.blocks = page(place, "en")
        self.config = self.blocks.get_config_file()
        self.ids = {one["props"].get("elem_id"): one["id"] for one in self.config["components"]}
        self.tabs = {one["props"].get("id"): one["id"] for one in self.config["components"] if one["type"] == "tabitem"}

    def does(self, source: int, event: str, *given: Any) -> dict[str, Any]:
        """What the first handler of an event of a component answers, by the elem_id of each output."""
        events = [one for one in self.config["dependencies"] if one["backend_fn"]]
        [one, *_] = [one for one in events if [source, event] in map(list, one["targets"])]
        return self._answered(one, self.blocks.fns[one["id"]].fn(*given))

    def _answered(self, event: dict[str, Any], answers: Any) -> dict[str, Any]:
        """What a handler answered, by component or in the order of its outputs, by the elem_id of each output."""
        elements = {id: element for element, id in self.ids.items() if element}
        if isinstance(answers, dict):
            answers = {component._id: value for component, value in answers.items()}
            assert answers.keys() <= set(event["outputs"])
        else:
            answers = dict(zip(event["outputs"], answers, strict=True))
        return {elements[id]: value for id, value in answers.items() if id in elements}

    def opens(self) -> dict[str, Any]:
        """The whole page; `changed` are the controls that do not stay as the page was built."""
        [one] = [one for one in self.config["dependencies"] if "athanorArrive()" in str(one["js"])]
        values = self.blocks.fns[one["id"]].fn(self._request(), "", "", "", "", "", "")
        shown = self._answered(one, values)
        self.changed = {name for name, value in shown.items() if value != gr.skip()}
        return shown

    def _request(self) -> gr.Request:
        request = gr.Request(username=None, session_hash="x", client=None)
        request.state = type("State", (), {"user": ""})()
        return request

    def opens_chat(self) -> dict[str, Any]:
        return self.does(self.tabs["chat"], "select", self._request(), {}, {}, None, [], "transformers")

    def opens_evaluate(self) -> dict[str, Any]:
        return self.does(self.tabs["evaluate"], "select", "", "", None, [], [], [], None, [], "asked", "", "1")


def chosen(update: Any) -> Any:
    return update["value"] if isinstance(update, dict) else update


def test_chat_and_evaluate_begin_with_the_newest_finished_run_and_its_base(place: Workplace) -> None:
    there = Page(place)
    ant, zebra = model_of(place, "ant"), model_of(place, "zebra")
    assert chosen(there.opens_chat()["chat-base"]) == chosen(there.opens_evaluate()["evaluate-base"]) == ant
    used(place, DEMO, "old", 1.0)
    newest = used(place, zebra, "new", 2.0)
    judge = used(place, ant, "judge", 3.0, stage="rm")  # judges, and cannot be talked to
    used(place, ant, "stopped", 4.0, outcome="failed")
    used(place, model_of(place, "gone"), "lost", 5.0)  # of a base that is not here any more
    chat = there.opens_chat()
    assert (chosen(chat["chat-base"]), chosen(chat["chat-adapters"])) == (zebra, ["zebra/lora/new"])
    evaluate = there.opens_evaluate()
    assert (chosen(evaluate["evaluate-base"]), chosen(evaluate["evaluate-results"])) == (ant, [str(judge)])
    shutil.rmtree(judge.parent)
    evaluate = there.opens_evaluate()
    assert (chosen(evaluate["evaluate-base"]), chosen(evaluate["evaluate-results"])) == (zebra, [str(newest)])
    whole = used(place, ant, "whole", 6.0, left="model")
    (whole / "config.json").write_text("{}")
    chat = there.opens_chat()
    assert (chosen(chat["chat-base"]), chosen(chat["chat-adapters"])) == (str(whole), [])
    evaluate = there.opens_evaluate()
    assert (chosen(evaluate["evaluate-base"]), chosen(evaluate["evaluate-results"])) == (ant, [str(whole)])


def test_a_run_that_is_chosen_brings_its_base(place: Workplace) -> None:
    there = Page(place)
    zebra = model_of(place, "zebra")
    old, newest = used(place, DEMO, "old", 1.0), used(place, zebra, "new", 2.0)
    adapters = dict(map(reversed, there.opens_chat()["chat-adapters"]["choices"]))
    assert adapters == {
        "zebra/lora/new": "new · Supervised fine-tuning",
        "demo_model/lora/old": "old · Supervised fine-tuning · demo_model",
    }
    both = ["zebra/lora/new", "demo_model/lora/old"]
    chat = there.does(there.ids["chat-adapters"], "input", zebra, both, "transformers")
    assert (chosen(chat["chat-base"]), chosen(chat["chat-adapters"])) == (DEMO, both[1:])
    chat = there.does(there.ids["chat-base"], "input", zebra, both[1:], "transformers")
    assert (chosen(chat["chat-base"]), chosen(chat["chat-adapters"])) == (zebra, [])
    evaluate = there.does(there.ids["evaluate-results"], "input", zebra, [str(newest), str(old)], [])
    assert (chosen(evaluate["evaluate-base"]), chosen(evaluate["evaluate-results"])) == (DEMO, [str(old)])
    for odd in ([], None, ["../x"], ["<b>"]):
        chat = there.does(there.ids["chat-adapters"], "input", zebra, odd, "transformers")
        assert (chosen(chat["chat-base"]), chosen(chat["chat-adapters"])) == (zebra, [])
        evaluate = there.does(there.ids["evaluate-results"], "input", zebra, odd, [])
        assert (chosen(evaluate["evaluate-base"]), chosen(evaluate["evaluate-results"])) == (zebra, [])
    assert runs.get(place.saves, "old").id == "demo_model/lora/old"
