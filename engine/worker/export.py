"""Exporting, top to bottom: python -m engine.worker.export FOLDER

Base and adapters become one model, or one adapter. What was written is loaded again and asked the same questions as
base and adapters before. All of this happens in a hidden folder that is renamed at the end, so an interruption leaves
nothing half-written. Only one model is in memory at a time. The optional GGUF file comes last: the result is already in
place, and an export that lacks only this file can be resumed at this step.
"""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path

from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, RunDir, read_object, write_json
from engine.export import gguf
from engine.export.export_spec import ExportSpec, memory_problems
from engine.preflight.package_checks import quantized
from engine.runs import kinds
from engine.worker.runtime.optional_packages import hide_unused_packages
from engine.worker.runtime.process_lifecycle import ProgressReport, library_imports, run_lifecycle


def export(run: RunDir) -> None:
    """Write the result of the export to its folder, unless it is already there; then its GGUF file."""
    spec, report = spec_of(run), ProgressReport(run)
    if gguf.can_be_tried_again(run):
        result = read_object(run.model / RESULT_FILE)
        write_json(run.model / RESULT_FILE, result | {"attempt": run.attempt()})
    else:
        write_result(run, spec, report)
    if spec.gguf != "none":
        from engine.worker.exporting.gguf import add_gguf_file

        add_gguf_file(run, spec, report)


def spec_of(run: RunDir) -> ExportSpec:
    spec = kinds.read(run.spec.read_text(encoding="utf-8"))
    assert isinstance(spec, ExportSpec)
    return spec


def write_result(run: RunDir, spec: ExportSpec, report: ProgressReport) -> None:
    """Write the merged model, or the adapter, with all that belongs to it."""
    report("loading")

    # Imported here: the lock is held and the progress written before torch begins to load.
    with library_imports():
        from engine.worker.exporting import model_card
        from engine.worker.exporting.base_model import Sources
        from engine.worker.exporting.merge import WRITE, load, peak_memory, quantize, reload
        from engine.worker.exporting.output_comparison import compare_outputs, model_outputs, prompts_of

    sources = Sources.of(spec)
    if problems := memory_problems(spec):
        raise Refusal(problems)
    folder, partial, scratch = output_folders(run, spec)

    model = load(spec, sources)
    prompts = prompts_of(spec, sources)
    report("exporting", 0, len(prompts), "prompts")
    before = model_outputs(model, sources.stage, sources.settings, prompts, report)
    report("saving")
    whole = partial if spec.quantize == "none" else scratch
    WRITE[spec.form](spec, model, whole)
    del model
    gc.collect()  # before the second one is loaded
    if whole is scratch:
        quantize(spec, sources, scratch, partial)
        shutil.rmtree(scratch)
    sources.save_settings(partial)

    report("loading")
    model = reload(spec, sources, partial)
    after = model_outputs(model, sources.stage, partial, prompts, report)
    comparison = compare_outputs(spec, prompts, before, after)
    write_json(partial / "comparison.json", comparison)
    del model
    gc.collect()

    report("saving")
    model_card.write(spec, sources, partial, folder, comparison)
    write_json(
        partial / RESULT_FILE,
        {
            "attempt": run.attempt(),
            "complete": True,
            **model_card.result_record(spec, sources, peak_memory()),
        },
    )
    model_card.write_checksums(partial)
    install_result(partial, folder)


def output_folders(run: RunDir, spec: ExportSpec) -> tuple[Path, Path, Path]:
    """The final folder of the result, the folder in which it is created, and a temporary folder; the latter two
    empty."""
    folder = run.adapter if spec.form == "adapter" else run.model
    partial, scratch = folder.with_name(f".{folder.name}.partial"), folder.with_name(".whole.partial")
    for left in (partial, scratch):
        shutil.rmtree(left, ignore_errors=True)  # of an interrupted attempt
    partial.mkdir()
    return folder, partial, scratch


def install_result(partial: Path, folder: Path) -> None:
    """Move the finished folder into place; a LoRA-only export also becomes one file for download."""
    if folder.name == "adapter":
        archive = shutil.make_archive(str(partial.with_name(".adapter")), "zip", partial)
        Path(archive).replace(folder.with_name("adapter.zip"))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    with run_lifecycle(sys.argv[1]) as export_run:
        spec = spec_of(export_run)
        hide_unused_packages(spec.quantize != "none" or quantized(spec.model))
        export(export_run)
