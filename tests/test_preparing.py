"""Data files become what a run trains on: whole, the same whoever prepares it, once, and never stale."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from engine.core import locks
from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_json, write_json, write_text
from engine.data import preview_client
from engine.data.chunks import blocks
from engine.data.datasets import find
from engine.launch.workspace import PROJECT
from engine.spec.run_spec import RunSpec
from engine.worker.data import cache, tables
from engine.worker.data.examples import IGNORE_INDEX, Encoder
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.prepare import prepare
from tests.conftest import gone, wait_until

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def make_run(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> Callable[..., RunDir]:
    """A run that has everything to be prepared; keywords are paths with `__` for the dot."""
    made = []

    def make(**changes: Any) -> RunDir:
        run = RunDir(tmp_path / "saves" / "tiny" / "lora" / f"run{len(made)}")
        run.path.mkdir(parents=True)
        write_text(run.spec, make_spec(**changes).to_yaml())
        made.append(run)
        return run

    return make


def prepared(run: RunDir) -> dict[str, Any]:
    prepare(run)
    return read_json(run.prepared / "summary.json")


def table(run: RunDir, split: str = "train") -> list[dict[str, Any]]:
    with pa.memory_map(str(run.prepared / f"{split}.arrow")) as source:
        return pa.ipc.open_stream(source).read_all().to_pylist()


def kept(run: RunDir) -> list[Path]:
    """What the cache holds."""
    return sorted((run.path.parents[2] / ".prepared").glob("[!.]*/"))


def child(run: RunDir, *before: str) -> subprocess.Popen[str]:
    """The preparation as a keeper starts it; `before` is run in the same process first."""
    code = "\n".join([*before, "import runpy, sys", "runpy.run_module('engine.worker.prepare', run_name='__main__')"])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def many_rows(data: Path, count: int) -> None:
    """As many different chats, in a file of several megabytes if they are many."""
    chance = random.Random(0)
    words = ["apple", "银行", "river", "of", "the", "<|im_end|>", "</s>", "1984", "\n", "大学", "it's"]
    rows = [
        {
            "instruction": f"{n}: " + " ".join(chance.choices(words, k=9)),
            "output": " ".join(chance.choices(words, k=7)),
        }
        for n in range(count)
    ]
    write_json(data / "chat.json", rows)


# ---------------------------------------------------------------------------------------- what is made


def test_the_share_for_validation_and_the_weights_are_exact_and_no_row_is_in_both(
    make_run: Callable[..., RunDir],
) -> None:
    run = make_run(data__validation_share=0.3, data__datasets={"chat": 2.5})
    summary = prepared(run)
    assert summary["splits"] == ["train", "validation"]
    assert (summary["validation"]["rows"], summary["train"]["rows"]) == (12, 70)  # 28 × 2.5
    train, validation = ([tuple(row["input_ids"]) for row in table(run, split)] for split in summary["splits"])
    assert len(set(validation)) == 12
    assert not set(train) & set(validation)
    assert sorted({train.count(row) for row in train}) == [2, 3]
    again = make_run(data__validation_share=0.3, data__datasets={"chat": 2.5}, training__seed=7)
    prepared(again)
    assert {tuple(row["input_ids"]) for row in table(again, "validation")} != set(validation)


def test_limits_count_good_rows_only_and_the_first_ones_are_taken(make_run: Callable[..., RunDir], data: Path) -> None:
    rows: list[Any] = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(20)]
    rows[1], rows[3], rows[18] = {"instruction": "no answer"}, "no row", {"output": "no question"}
    write_json(data / "chat.json", rows)
    run = make_run(data__max_samples=5, data__skip_bad_rows=True)
    summary = prepared(run)
    assert (summary["train"]["rows"], summary["bad_rows"]) == (5, 2)  # what comes later is not looked at
    info = read_json(data / "dataset_info.json")
    info["chat"]["num_samples"] = 4  # rows of the file, be they good or not
    write_json(data / "dataset_info.json", info)
    assert prepared(make_run(data__skip_bad_rows=True))["train"]["rows"] == 3
    with pytest.raises(Refusal, match=r"chat\.json:\d+.*(input|output|column)"):
        prepare(make_run())


@pytest.mark.parametrize("good", [0, 3])
def test_no_more_rows_than_num_samples_are_read_where_the_last_of_them_are_bad(
    make_run: Callable[..., RunDir], data: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    monkeypatch.setattr(
        "engine.data.chunks.MAX_BLOCK_ROWS", 10
    )  # so that the limit is within the first of several blocks
    rows = [("q", "a")] * good + [("q", "")] * (10 - good) + [("later", "a")] * 10
    lines = "".join(f"{question},{answer}\n" for question, answer in [("instruction", "output"), *rows])
    (data / "some.csv").write_text(lines)
    info = read_json(data / "dataset_info.json")
    write_json(data / "dataset_info.json", info | {"some": {"file_name": "some.csv", "num_samples": 5}})
    run = make_run(data__datasets={"chat": 1, "some": 1}, data__skip_bad_rows=True)
    assert prepared(run)["train"]["rows"] == 40 + good


def test_several_data_sets_and_one_to_measure_on(make_run: Callable[..., RunDir], data: Path) -> None:
    info = read_json(data / "dataset_info.json")
    write_json(
        data / "dataset_info.json",
        info | {"more": {"file_name": "more.jsonl"}, "own": {"file_name": "own.json"}},
    )
    (data / "more.jsonl").write_text('{"instruction": "more", "output": "yes"}\n' * 3)
    write_json(data / "own.json", [{"instruction": "own", "output": "no"}])
    run = make_run(data__datasets={"chat": 1, "more": 2}, data__eval_datasets=["own"])
    summary = prepared(run)
    assert (summary["train"]["rows"], summary["validation"]["rows"]) == (46, 1)
    assert len(table(run)) == 46
    assert len(table(run, "validation")) == 1


@pytest.mark.slow
def test_rows_and_splits_do_not_depend_on_the_number_of_processes(make_run: Callable[..., RunDir], data: Path) -> None:
    many_rows(data, 18_000)
    assert (data / "chat.json").stat().st_size > 2 << 20  # there is a process for each megabyte
    small_blocks = "import engine.data.chunks as chunks; chunks.CHUNK_BYTES = 1 << 18"
    forks = "import os; fork = os.fork; os.fork = lambda: print('a fork', flush=True) or fork()"
    settings = {"data__validation_share": 0.1, "data__max_length": 48, "data__too_long": "cut_start"}
    tables = []
    for processes in (1, 2):
        run = make_run(**settings, data__preprocessing_num_workers=processes)
        printed, _ = (done := child(run, small_blocks, forks)).communicate(timeout=300)
        assert (done.returncode, printed.count("a fork")) == (0, processes if processes > 1 else 0), printed
        tables.append((table(run), table(run, "validation"), read_json(run.prepared / "summary.json")))
        shutil.rmtree(kept(run)[0])
    assert tables[0] == tables[1]
    train, validation = (tables[0][2][split]["rows"] for split in ("train", "validation"))
    assert (train, validation) == (16_200, 1_800)


# ------------------------------------------------------------------------------------------ the cache


@pytest.mark.slow
def test_what_was_prepared_before_is_handed_over_without_loading_anything(
    make_run: Callable[..., RunDir],
) -> None:
    first, second = make_run(), make_run(training__learning_rate=1e-5, data__preprocessing_num_workers=2)
    prepare(first)
    nothing = (
        "import sys; "
        "sys.modules |= dict.fromkeys(['transformers', 'tokenizers', 'pyarrow', 'torch', 'numpy', 'pandas'])"
    )
    done = child(second, nothing)
    assert done.wait(300) == 0, done.stdout.read()
    assert table(first) == table(second)
    assert len(kept(first)) == 1
    assert read_json(first.prepared / "summary.json") == read_json(second.prepared / "summary.json")


def test_an_edited_file_is_never_stale_even_if_its_time_and_size_are_the_same(
    make_run: Callable[..., RunDir], data: Path
) -> None:
    file = data / "chat.json"
    before = file.stat()
    first = make_run()
    prepare(first)
    file.write_text(file.read_text().replace("5.", "6."))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = make_run()
    prepare(second)
    assert table(first) != table(second)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data__max_samples", 7),
        ("data__max_length", 35),
        ("data__too_long", "drop"),
        ("data__packing", True),
        ("data__validation_share", 0.2),
        ("data__datasets", {"chat": 3}),
        ("stage", {"kind": "sft", "train_on": "everything"}),
        ("model__chat_template", "plain"),
    ],
)
def test_every_setting_that_changes_a_row_is_in_the_key(make_run: Callable[..., RunDir], path: str, value: Any) -> None:
    one, other = make_run(data__max_length=36), make_run(**{"data__max_length": 36, path: value})
    prepare(one)
    prepare(other)
    assert len(kept(one)) == 2
    assert table(one) != table(other)


def test_the_columns_of_a_data_set_and_the_tokenizer_are_in_the_key(
    make_run: Callable[..., RunDir], data: Path, tmp_path: Path, tiny: Path
) -> None:
    copied = tmp_path / "models" / "copied"
    shutil.copytree(tiny, copied)
    keys = []

    def key() -> str:
        run = make_run(model__model_name_or_path=str(copied))
        keys.append(prepared(run)["key"])
        return keys[-1]

    key()
    info = read_json(data / "dataset_info.json")
    info["chat"]["columns"] = {"prompt": "output", "response": "instruction"}
    write_json(data / "dataset_info.json", info)
    key()
    template = copied / "chat_template.jinja"
    template.write_text(template.read_text().replace("\\n", " \\n"))
    key()
    (copied / "model.safetensors").write_bytes(b"")  # weights change no row
    key()
    assert len(set(keys)) == 3


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_rows_of_a_template_that_writes_the_day_are_of_that_day(
    make_run: Callable[..., RunDir], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    copied = tmp_path / "models" / "copied"
    shutil.copytree(tiny, copied)
    template = (copied / "chat_template.jinja").read_text() + "{# {{ strftime_now('%d %b %Y') }} #}"
    (copied / "chat_template.jinja").unlink()
    config = read_json(copied / "tokenizer_config.json")
    if file == "tokenizer_config.json":  # where most of those that do are
        write_json(copied / file, config | {"chat_template": template})
    else:
        write_text(copied / file, template)
    keys = []
    for day in ("2026-01-01", "2026-01-01", "2026-01-02"):
        monkeypatch.setattr(
            cache,
            "time",
            SimpleNamespace(strftime=lambda _, day=day: day, time=time.time, time_ns=time.time_ns),
        )
        keys.append(prepared(make_run(model__model_name_or_path=str(copied)))["key"])
    assert keys[0] == keys[1] != keys[2]


def test_a_run_stays_whole_when_the_cache_is_pruned_and_what_was_used_last_stays(
    make_run: Callable[..., RunDir],
) -> None:
    runs = [make_run(data__max_samples=count) for count in (10, 11, 12)]
    folders = []
    for at, run in enumerate(runs):
        folders.append(run.path.parents[2] / ".prepared" / prepared(run)["key"])
        os.utime(folders[-1] / "summary.json", (at, at))
    prepare(make_run(data__max_samples=10))  # used again just now
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    cache.prune(folders[0].parent, most=size)
    assert kept(runs[0]) == [folders[0]]
    assert [len(table(run)) for run in runs] == [10, 11, 12]


def test_what_a_kill_left_half_is_removed_and_what_somebody_works_on_is_not(tmp_path: Path) -> None:
    left = tmp_path / ".partial-left"
    left.mkdir()
    (left / "lock").touch()
    with cache.new_cache_entry(tmp_path, "key") as mine:
        for folder in (left, mine):
            os.utime(folder, (0, 0))
        cache.prune(tmp_path)
        assert not left.exists()
        assert mine.exists()
        write_json(mine / "summary.json", {"splits": []})
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_where_locks_say_nothing_rows_are_prepared_and_only_what_is_long_abandoned_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hours_ago = tmp_path / "saves" / ".prepared", time.time() - 3600
    old, young = store / ".partial-old", store / ".partial-young"  # of other machines

    def leave_two() -> None:
        for folder, at in ((old, 0.0), (young, hours_ago)):
            folder.mkdir(parents=True)
            (folder / "lock").touch()
            os.utime(folder, (at, at))

    leave_two()
    (tmp_path / "saves" / "engine.yaml").write_text("engine: slurm\n", encoding="utf-8")
    cache.prune(store)
    assert (old.exists(), young.exists()) == (False, True)
    young.joinpath("lock").unlink()
    young.rmdir()
    (tmp_path / "saves" / "engine.yaml").unlink()
    leave_two()
    with monkeypatch.context() as patch:
        patch.setattr(locks.fcntl, "fcntl", no_locks)
        with cache.new_cache_entry(store, "key") as mine:
            write_json(mine / "summary.json", {"splits": []})
    assert (old.exists(), young.exists(), (store / "key").exists()) == (False, True, True)
    cache.prune(store)
    assert not young.exists()  # here the lock counts


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_resumed_run_keeps_its_rows_though_its_model_was_moved_and_its_data_edited(
    make_run: Callable[..., RunDir], data: Path, tmp_path: Path, tiny: Path
) -> None:
    run = make_run()
    before, rows = prepared(run), table(run)
    moved = before | {"model_path": str(tmp_path / "a hub's cache that was emptied")}
    write_json(run.prepared / "summary.json", moved)
    write_json(data / "chat.json", [{"instruction": "another", "output": "row"}])
    assert prepared(run) == before
    assert table(run) == rows


def test_rows_that_are_missing_from_a_runs_folder_are_prepared_again(
    make_run: Callable[..., RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(data__max_samples=10)
    prepare(run)
    before = table(run)
    (run.prepared / "train.arrow").unlink()
    prepare(run)
    assert "prepared again" in capsys.readouterr().out
    assert table(run) == before


def test_of_two_that_prepare_the_same_at_once_both_have_it_whole(tmp_path: Path) -> None:
    with cache.new_cache_entry(tmp_path, "key") as one, cache.new_cache_entry(tmp_path, "key") as other:
        for folder in (one, other):
            write_json(folder / "summary.json", {"splits": []})
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_rows_that_are_refused_leave_nothing_behind(make_run: Callable[..., RunDir], data: Path) -> None:
    write_json(data / "chat.json", [{"instruction": "q", "output": ""}])
    run = make_run()
    with pytest.raises(Refusal):
        prepare(run)
    assert [path.name for path in (run.path.parents[2] / ".prepared").iterdir() if path.is_dir()] == []
    assert not run.prepared.exists()


# ----------------------------------------------------------------------------------------- being ended


# A preparation that comes to no end: the blocks of its file come again and again.
ENDLESS = """
import itertools, sys
sys.modules["torch"] = None
from engine.data import chunks
from engine.worker.data import tables
chunks.CHUNK_BYTES, blocks = 1 << 16, tables.blocks
tables.blocks = lambda *file: itertools.cycle([*blocks(*file)])
"""


def two_forks(preparation: subprocess.Popen[str]) -> list[psutil.Process]:
    return wait_until(lambda: len(forks := psutil.Process(preparation.pid).children()) == 2 and forks)


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGKILL])
def test_a_preparation_that_is_ended_leaves_no_process_and_soon_no_file(
    make_run: Callable[..., RunDir], data: Path, ended_by: signal.Signals
) -> None:
    many_rows(data, 18_000)
    run = make_run(data__preprocessing_num_workers=2)
    done = child(run, ENDLESS)
    try:
        forks = two_forks(done)
        wait_until(lambda: (read_json(run.progress) or {}).get("done"))
        assert read_json(run.progress)["unit"] == "rows"
        done.send_signal(ended_by)
        done.wait(120)
        wait_until(lambda: all(map(gone, forks)))
    finally:
        done.kill()
    store = run.path.parents[2] / ".prepared"
    if ended_by == signal.SIGKILL:  # nobody was left to tidy up: the next one does
        for folder in store.glob(".partial-*"):
            os.utime(folder, (0, 0))
        # The lock of a killed process is released a moment after its end.
        wait_until(lambda: (cache.prune(store), not [*store.glob(".partial-*")])[1])
    assert [path for path in store.iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_a_process_that_is_killed_for_memory_ends_the_preparation_with_a_sentence(
    make_run: Callable[..., RunDir], data: Path
) -> None:
    many_rows(data, 18_000)
    run = make_run(data__preprocessing_num_workers=2)
    done = child(run, ENDLESS)
    try:
        two_forks(done)[0].kill()
        assert done.wait(120) == 1
    finally:
        done.kill()
    assert "was killed" in read_json(run.error)["message"]
    assert kept(run) == []


def test_long_tasks_and_long_answers_do_not_wait_for_each_other() -> None:
    code = (
        "from engine.worker.runtime.process_pool import ProcessPool; pool = ProcessPool(2, bytes.upper);"
        "print(sum(map(len, pool.map([b'x' * 1_000_000] * 8)))); pool.close()"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, timeout=300)
    assert int(told.stdout) == 8_000_000


def test_a_stop_in_the_middle_of_a_long_answer_ends_the_work() -> None:
    code = """
import signal, sys
from engine.worker.runtime.process_pool import ProcessPool
signal.signal(signal.SIGALRM, lambda *_: sys.exit())
for ms in range(1, 200, 10):
    pool = ProcessPool(2, bytes)
    try:
        signal.setitimer(signal.ITIMER_REAL, ms / 1000)
        for answer in pool.map([50_000_000] * 50):
            pass
    except SystemExit:
        print("stopped")
    finally:
        pool.close()
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert told.stdout.split() == ["stopped"] * 20, told.stderr


def test_rows_that_the_template_refuses_are_told_with_their_own_lines(
    tmp_path: Path, tiny: Path, make_spec: Callable[..., RunSpec]
) -> None:
    system = {"role": "system", "content": "s"}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [turns, [system, *turns], turns, [system, *turns]]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.jsonl"}}))
    template = tmp_path / "refuses.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    spec = make_spec(
        model__model_name_or_path=str(tiny),
        model__chat_template=str(template),
        data__dataset_dir=str(tmp_path),
        data__datasets=["x"],
    )
    wrong, _ = preview_client.first_rows(spec, tmp_path)
    assert [one.code for one in wrong] == ["bad-rows", "template-refuses-row", "template-refuses-row"]
    assert [one.values["place"] for one in wrong[1:]] == ["x.jsonl:2", "x.jsonl:4"]
    skipping = spec.change("data.skip_bad_rows", True)
    assert preview_client.first_rows(skipping, tmp_path)[0] == []
    encoder = Encoder.of(spec, load_tokenizer(spec, str(tiny)))
    tasks = [
        tables.Task(0, block, tmp_path / f"table{number}") for number, block in enumerate(blocks(tmp_path / "x.jsonl"))
    ]
    parts = [tables.make_table(encoder, [find(tmp_path, "x")], task) for task in tasks]
    assert [str(reason).split(": ")[0] for part in parts for _, reason in part.bad] == [
        "x.jsonl:2",
        "x.jsonl:4",
    ]


def test_rows_in_any_order_and_the_header_that_no_prompt_writes_are_told_and_trained(
    tmp_path: Path, tiny: Path, make_run: Callable[..., RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    q, a = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    orders = [[q, a], [a, q, a | {"weight": 2}], [q, q, a, a], [q, a, q]]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"messages": order}) for order in orders))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.jsonl"}}))
    template = tmp_path / "no_prompt.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    run = make_run(
        model__model_name_or_path=str(tiny),
        model__chat_template=str(template),
        data__dataset_dir=str(tmp_path),
        data__datasets={"x": 1},
        data__packing=True,
        data__max_length=512,
        data__validation_share=0.0,
    )
    spec = RunSpec.from_yaml(run.spec.read_text())
    wrong, notes = preview_client.first_rows(spec, tmp_path)
    assert (wrong, [note.code for note in notes]) == ([], ["rows-with-header"])
    summary = prepared(run)
    assert summary["train"]["lost"] == {"header": 4}
    noted = {(note["rows"], note["first"].split(": ")[0]) for note in summary["notes"]}
    assert {(1, "x.jsonl:2"), (1, "x.jsonl:3"), (1, "x.jsonl:4")} <= noted
    assert "so in 4 of 4 rows the header of an answer" in capsys.readouterr().out
    (pack,) = table(run)
    tokenizer = load_tokenizer(spec, str(tiny))
    ids, labels, weights = (np.array(pack[name]) for name in ("input_ids", "labels", "weights"))
    text = tokenizer.decode(ids[labels != IGNORE_INDEX])
    answers = text.split("<|im_end|>")[:-1]
    assert sorted(answers) == ["<|im_start|>assistant\na"] * 4 + ["a"] * 2  # nobody asks for the two others
    assert set(weights[labels != IGNORE_INDEX]) == {1, 2}
    assert not weights[labels == IGNORE_INDEX].any()
