"""The Export tab as a person uses it: from a finished run to a merged model that the form trains on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from engine.core.rundir import RunDir, write_json, write_text
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.runs import runs
from engine.runs.runs import Run
from tests.browser.conftest import WORK_MS, Outside
from tests.conftest import start_studio

pytestmark = pytest.mark.usefixtures("forked")


def test_a_run_is_exported_compared_and_picked_in_the_form(
    trained: Workplace, open_page: Callable[..., Page], outside: Outside
) -> None:
    studio, address = start_studio(trained)
    try:
        page = open_page(f"{address}/?run=demo_model/lora/one")
        run = export_with_a_licence(page, trained)
        see_commands_and_files(page, run)
        export_the_adapter_beside(page, trained)
        use_the_export(page, address, run)
        choose_weights_that_cannot_be(page, address)
        assert len(runs.find(trained.saves, "export")) == 1
    finally:
        studio.kill()
        studio.wait()
    assert outside == []


def exports_on(page: Page) -> Locator:
    return page.locator("#exports details.export")


def export_with_a_licence(page: Page, trained: Workplace) -> Run:
    """The open run becomes a merged model that answers as before, with a licence in its model card."""
    page.locator("#export-it").click()
    expect(page.locator("#export-runs")).to_contain_text("one")
    expect(page.locator("#export-card")).to_contain_text("Ready to start")
    expect(page.locator("#export-card")).to_contain_text("MB")
    expect(page.locator("#export-weights")).not_to_be_visible()
    page.locator("#export-more button").first.click()
    license = page.locator("#export-license input, #export-license textarea")
    license.click()  # the fold has opened
    license.fill("apache-2.0")
    license.blur()
    expect(license).to_have_value("apache-2.0")
    page.locator("#export-start").click()
    made = exports_on(page)
    expect(made).to_have_count(1)
    expect(made.locator(".state.right")).to_contain_text("8 of 8 answers are identical", timeout=WORK_MS)
    [run] = runs.find(trained.saves, "export")
    # What libraries tell their developers, and of which a reader can do nothing, is not in the log.
    assert not re.search("Warning|kernels", run.dir.log.read_text(encoding="utf-8"))
    assert "apache-2.0" in (run.dir.model / "README.md").read_text(encoding="utf-8")
    return run


def see_commands_and_files(page: Page, run: Run) -> None:
    """How other programs run it, and its files to download."""
    made = exports_on(page)
    expect(made.locator("#vllm-0")).to_have_text(f"vllm serve {run.dir.model} --served-model-name one")
    made.get_by_text("Modelfile", exact=True).click()
    expect(made.locator("#modelfile-0")).to_contain_text("<|im_start|>assistant")
    made.get_by_text("Files", exact=True).click()
    with page.expect_download() as download:
        made.get_by_text("model/SHA256SUMS").click()
    assert download.value.path().read_bytes() == (run.dir.model / "SHA256SUMS").read_bytes()


def export_the_adapter_beside(page: Page, trained: Workplace) -> None:
    """What is open stays open while another is made, and when that is done."""
    made = exports_on(page)
    page.locator("#export-form").get_by_text("LoRA only", exact=True).click()
    page.locator("#export-start").click()
    expect(made).to_have_count(2)
    expect(made.nth(1).get_by_text("model/SHA256SUMS")).to_be_visible()
    made.nth(1).get_by_text("Modelfile", exact=True).click()
    expect(made.first.locator(".state.right")).to_be_visible(timeout=WORK_MS)
    expect(made.nth(1).get_by_text("model/SHA256SUMS")).to_be_visible()
    expect(made.nth(1).locator("#modelfile-1")).not_to_be_visible()
    adapter, _ = runs.find(trained.saves, "export")
    made.first.get_by_role("link", name="Open the run").click()
    expect(page.locator("#log")).to_be_visible()
    expect(page.locator(".chart-tools")).not_to_be_visible()
    runs.delete(adapter)


def use_the_export(page: Page, address: str, run: Run) -> None:
    """The merged model takes the place of the model in the form."""
    page.goto(f"{address}/?tab=export")
    made = exports_on(page)
    expect(made).to_have_count(1)
    made.locator("[data-use]").click()
    expect(page.locator("#told")).to_contain_text("is now in the form")
    expect(page.locator("#summary .state.right")).to_be_visible()
    page.get_by_role("button", name="Settings as YAML").click()
    expect(page.locator("#yaml-text")).to_contain_text(str(run.dir.model))


def choose_weights_that_cannot_be(page: Page, address: str) -> None:
    """Two runs and one weight that is no number: it is told, and nothing is started."""
    page.goto(f"{address}/?tab=export")
    expect(exports_on(page)).to_have_count(1)
    page.locator("#export-runs input").click()
    for title in ("one · Supervised fine-tuning · LoRA", "two · Supervised fine-tuning · LoRA"):
        page.get_by_role("option", name=title).click()
    expect(page.locator("#export-weights")).to_be_visible()
    page.locator("#export-weights input, #export-weights textarea").fill("1, two")
    expect(page.locator("#export-card")).to_contain_text("1 to fix")
    page.locator("#export-start").click()
    expect(page.locator("#told")).to_contain_text("1 to fix")


def test_a_gguf_file_that_failed_is_tried_again_by_a_click(
    trained: Workplace, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    run = RunDir(trained.saves / "demo_model" / "export" / "small")
    shutil.copytree(DEMO_MODEL, run.model)
    spec = ExportSpec.read({"name": "small", "model": {"model_name_or_path": str(DEMO_MODEL)}, "gguf": "q8_0"})
    write_text(run.spec, spec.to_yaml())
    write_json(run.model / "result.json", {"attempt": 1, "complete": True, "stage": "sft"})
    write_json(run.gguf, {"status": "failed", "problems": [{"code": "export-gguf-cut-off", "values": {}}]})
    write_json(run.exit, {"outcome": "finished", "reason": "finished", "ended": 2.0})
    write_json(run.request, {"kind": "export", "by": "", "submitted": 1.0, "queued": 1, "attempt": 1, "stop": None})
    nowhere = str(tmp_path / "nowhere")
    studio, address = start_studio(trained, ATHANOR_LLAMA_CPP=nowhere)
    try:
        page = open_page(f"{address}/?tab=export")
        made = page.locator("#exports details.export")
        expect(made).to_contain_text("Writing the GGUF file was interrupted")
        expect(made).to_contain_text("The merged model is complete")
        page.get_by_role("button", name="Try GGUF again").click()
        # There is still no converter: now it says so, and the model is still there.
        expect(made).to_contain_text(nowhere, timeout=WORK_MS)
        expect(made.get_by_role("button", name="Use it as the model in the form")).to_be_visible()
        assert runs.get(trained.saves, "demo_model/export/small").request["attempt"] == 2
    finally:
        studio.kill()
        studio.wait()
