"""The page as gradio is told of it: what each of its events costs the browser,
and that it holds what it begins with."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from engine.launch.workspace import PROJECT, Workplace
from webui.studio import page

MANY = 2  # components that an event may tell of its progress


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> gr.Blocks:
    saves: Path = tmp_path_factory.mktemp("saves")
    return page(Workplace(saves=saves), "en")


@pytest.fixture(scope="module")
def config(blocks: gr.Blocks) -> dict[str, Any]:
    return blocks.get_config_file()


def test_the_page_is_not_described_before_it_is_served_nor_a_class_for_each_of_its_components(
    blocks: gr.Blocks,
) -> None:
    assert blocks.config == {}
    for kind in (gr.Textbox, gr.Dropdown, gr.Column):
        assert inspect.signature(kind.__init__) is inspect.signature(kind.__init__)


def test_no_event_tells_its_progress_to_all_that_it_changes(config: dict[str, Any]) -> None:
    """Gradio tells every output unless it is told whom, and looks each up among
    all components: at every look at a run."""
    events = [one for one in config["dependencies"] if one["targets"]]
    assert len(events) > 80
    for one in events:
        assert one["show_progress_on"] is not None, one["targets"]
        assert len(one["show_progress_on"]) <= MANY, one["targets"]


def test_the_form_is_built_with_what_it_begins_with(config: dict[str, Any]) -> None:
    values = {one["props"].get("elem_id"): one["props"].get("value") for one in config["components"]}
    assert values["f-training-learning_rate"] == "0.002"
    assert values["f-data-datasets"] == ["alpaca_translate_zh"]
    assert values["f-stage"] == "sft"


IMPORT_AND_EVENT = """
import sys
stubs = []
def note_stub(event, args):
    if event == "open" and str(args[0]).endswith(".pyi"):
        stubs.append(args[0])
sys.addaudithook(note_stub)
import {module}
opened = len(stubs)
has_mcp = "mcp" in sys.modules
import gradio
from fastapi import FastAPI
from starlette.testclient import TestClient
with gradio.Blocks() as blocks:
    box = gradio.Textbox()
    box.change(lambda text: text + "!", box, box, api_name="same", queue=False)
client = TestClient(gradio.mount_gradio_app(FastAPI(), blocks, "/"))
told = client.post("/gradio_api/run/same", json={{"data": ["x"]}}).json()["data"]
import mcp
print(told, opened > 0, "matplotlib" in sys.modules, has_mcp, mcp.__name__)
"""


@pytest.mark.parametrize(("module", "own_ways"), [("webui", False), ("gradio", True)])
def test_gradio_writes_no_stubs_and_imports_neither_matplotlib_nor_mcp_where_the_page_imports_it(
    module: str, own_ways: bool
) -> None:
    """Did it neither without the page either, `webui.gradio_import` would have nothing left to do."""
    code = IMPORT_AND_EVENT.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['x!']", *[str(own_ways)] * 3, "mcp"]


def test_other_programs_find_the_endpoints_by_their_names(config: dict[str, Any]) -> None:
    public = {event["api_name"] for event in config["dependencies"] if event["api_visibility"] == "public"}
    assert public == {"start", "runs", "run", "stop"}
