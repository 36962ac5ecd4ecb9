"""Quotas: what somebody may use, what they do use, and who waits while others start."""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from engine.core.locks import try_lock
from engine.core.problems import Refusal
from engine.core.run_warnings import read_warnings
from engine.core.rundir import ALIVE_BYTE, RunDir, read_json, write_json
from engine.data import owners
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import Workplace
from engine.runs import queue, quota_use, runs
from engine.runs.quota_watch import QuotaWatch
from engine.runs.quotas import QUOTAS_FILE, Limits, Quotas, change_limits, read_quotas
from engine.runs.run import Run
from engine.runs.schedule import Demand, Machine, decide
from engine.spec.run_spec import RunSpec, Spec
from tests import stand_in
from tests.conftest import wait_until
from tests.past_runs import run_maker
from tests.train_many import lay_out

HOUR, DAY = 3600.0, 24 * 3600.0


def test_what_a_user_leaves_out_is_the_default_and_null_is_no_limit(tmp_path: Path) -> None:
    assert read_quotas(tmp_path) == Quotas()
    file = tmp_path / QUOTAS_FILE
    file.write_text(
        "default: {runs_at_once: 2, gpu_hours: 100}\nusers:\n  ada: {runs_at_once: null, disk_gb: 0.5}\n  李雷:\n"
    )
    quotas = read_quotas(tmp_path)
    assert quotas.of("ada") == Limits(None, 100, 0.5)
    assert quotas.of("李雷") == quotas.of("bob") == Limits(2, 100, None)
    assert quotas.of("") == Limits()
    file.write_text("")
    assert read_quotas(tmp_path) == Quotas()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("default: {runs: 2}", "quotas-key"),
        ("defaults: {}", "quotas-key"),
        ("- 1", "quotas-key"),
        ("users: [ada]", "quotas-key"),
        ("default: {gpu_hours: -1}", "quotas-number"),
        ("default: {gpu_hours: .inf}", "quotas-number"),
        ("users: {ada: {runs_at_once: yes}}", "quotas-number"),
        ("users: {ada: {runs_at_once: '2'}}", "quotas-number"),
        ("a: [", "quotas-unreadable"),
        ("a: !!python/object/apply:os.system ['true']", "quotas-unreadable"),
    ],
)
def test_a_file_that_says_something_else_is_refused_with_its_place(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / QUOTAS_FILE).write_text(text)
    with pytest.raises(Refusal) as refused:
        read_quotas(tmp_path)
    assert [problem.code for problem in refused.value.problems] == [code]
    assert str(tmp_path / QUOTAS_FILE) in refused.value.text()


# ------------------------------------------------------------------------------------------------ use


def test_use_is_counted_within_thirty_days_and_by_device(tmp_path: Path) -> None:
    saves, data, now = tmp_path / "saves", tmp_path / "data", 2e9
    data.mkdir()
    make = run_maker(saves)

    def ran(name: str, by: str, start: float, end: float, gpus: int) -> Run:
        run = make(name)
        write_json(run.dir.request, {"by": by, "submitted": start, "attempt": 1})
        write_json(run.dir.keeper, {"started": start, "leases": [f"GPU-{number}" for number in range(gpus)]})
        write_json(run.dir.exit, {"outcome": "finished", "reason": "finished", "ended": end})
        return run

    ran("two", "ada", now - 5 * HOUR, now - 2 * HOUR, 2)  # 6 hours
    ran("edge", "ada", now - 30 * DAY - 10 * HOUR, now - 30 * DAY + HOUR, 4)  # 4 hours of it
    ran("old", "ada", now - 60 * DAY, now - 40 * DAY, 8)  # none
    ran("others", "bob", now - HOUR, now, 8)
    resumed = ran("resumed", "ada", now - HOUR / 2, now, 1)  # half an hour, and three before
    earlier = resumed.dir.attempts / "1"
    earlier.mkdir(parents=True)
    write_json(earlier / "keeper.json", {"started": now - 9 * HOUR})
    write_json(earlier / "exit.json", {"ended": now - 6 * HOUR})
    assert quota_use.use_of(saves, data, "ada", now).gpu_hours == pytest.approx(6 + 4 + 3.5)
    assert quota_use.use_of(saves, data, "eve", now) == quota_use.Use(0, 0.0, 0.0)


def test_nobody_gets_hours_back_by_deleting_what_has_used_them(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, now = workplace.saves, time.time()

    def ran(name: str, by: str, hours: float, days_ago: float = 0) -> None:
        run = run_maker(saves)(name)
        end = now - days_ago * DAY
        write_json(run.dir.request, {"by": by, "submitted": end, "attempt": 1})
        write_json(run.dir.keeper, {"started": end - hours * HOUR, "leases": ["GPU-0", "GPU-1"]})
        write_json(run.dir.exit, {"outcome": "finished", "reason": "finished", "ended": end})
        runs.delete(runs.read(run.path, saves))

    def used(*names: str) -> list[float]:
        return [round(quota_use.hours_of(saves, name, now), 3) for name in names]

    ran("hers", "ada", 1.5)
    ran("old", "ada", 5, days_ago=40)
    ran("nobody's", "", 9)
    ran("his", "bob", 2)
    ran("more", "ada", 0.25)
    assert used("ada", "bob", "eve", "") == [3.5, 4, 0, 0]
    assert quota_use.hours_of(saves, "ada", now + 31 * DAY) == 0
    gone = (saves / ".deleted").rename(saves / ".gone")
    (saves / ".deleted").touch()  # no folder can be moved there
    with pytest.raises(Refusal):
        ran("stays", "eve", 1)
    for _ in range(2):
        with pytest.raises(Refusal):
            runs.delete(runs.find(saves)[0])
        assert used("ada", "bob", "eve") == [3.5, 4, 2]  # once, however often it is tried
    (saves / ".deleted").unlink()
    gone.rename(saves / ".deleted")
    runs.delete(runs.find(saves)[0])
    assert used("eve") == [2]
    kept = saves / ".spent-hours.json"
    for damaged in ('[[1], null, ["bob", "x", 1, 1]]', "{", "{}"):
        kept.write_text(damaged)
        assert used("ada", "bob") == [0, 0]
    kept.unlink()
    kept.mkdir()  # nothing can be written there, and the run is deleted all the same
    ran("last", "ada", 1)
    assert runs.find(saves) == []


def test_a_limit_that_is_reached_is_said_with_the_use(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    saves, now = workplace.saves, time.time()
    past = run_maker(saves)("past")
    write_json(past.dir.request, {"by": "ada", "submitted": now, "attempt": 1})
    write_json(past.dir.keeper, {"started": now - 3 * HOUR})
    write_json(past.dir.exit, {"outcome": "failed", "reason": "failed", "ended": now - HOUR})
    (past.path / "weights").write_bytes(bytes(3_000_000))
    (workplace.data / "hers.json").write_bytes(b" " * 2_000_000)
    owners.claim(workplace.data, ["file:hers.json"], "ada")
    runs.submit(make_spec(), workplace, by="ada")
    (saves / QUOTAS_FILE).write_text("default: {gpu_hours: 2}\nusers: {bob: {gpu_hours: 0}, ada: {disk_gb: 0.005}}")
    with pytest.raises(Refusal) as refused:
        runs.submit(make_spec(), workplace, by="ada")
    text = refused.value.text()
    assert "ada has used 2.0 of 2 GPU hours" in text
    assert re.search(r"ada take 0.005\d* of 0.005 GB", text)
    with pytest.raises(Refusal, match=r"2.0 of 2 GPU hours"):
        runs.resume(runs.get(saves, past.id), "root")
    (saves / QUOTAS_FILE).write_text("default: {gpu_hours: 2}\nusers: {bob: {gpu_hours: 0}, ada: {disk_gb: 0.005}}")
    with pytest.raises(Refusal, match=r"ada take 0.005\d* of 0.005 GB"):
        runs.resume(runs.get(saves, past.id), "root", data=workplace.data)
    (saves / QUOTAS_FILE).write_text("users: {ada: {disk_gb: 0.003}, bob: {gpu_hours: 0}}")
    with pytest.raises(Refusal, match=r"ada take 0.003\d* of 0.003 GB"):  # by her runs alone
        runs.resume(runs.get(saves, past.id), "root")
    with pytest.raises(Refusal, match=r"bob has used 0.0 of 0 GPU hours"):
        runs.submit(make_spec(), workplace, by="bob")
    runs.submit(make_spec(), workplace, by="eve")
    runs.submit(make_spec(), workplace)  # without a login there is nobody to limit
    (saves / QUOTAS_FILE).write_text("default: {gpu_hours: many}")
    with pytest.raises(Refusal, match=r"default.gpu_hours"):
        runs.submit(make_spec(), workplace, by="eve")


# ------------------------------------------------------------------------------ hours that end meanwhile


def test_a_training_is_warned_near_the_end_of_the_hours_and_stopped_where_that_is_chosen(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs as their folders show them; nothing trains."""
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    now, quotas = 1e9, workplace.saves / QUOTAS_FILE
    run, other = (runs.submit(make_spec(name=name), workplace, by="ada") for name in ("one", "two"))
    for each in (run, other):
        write_json(each.dir.keeper, {"started": now, "leases": ["GPU-0", "GPU-1"]})
    locks = [try_lock(each.dir.lock, ALIVE_BYTE, shared=True) for each in (run, other)]
    watch = QuotaWatch(run, lambda: now)

    def after(hours: float) -> list[str]:
        nonlocal now
        now = 1e9 + hours * HOUR
        watch.look(True)
        return [warning.problem.code for warning in read_warnings(run.dir)]

    def stops() -> list[bool]:
        return [runs.read(each.path, workplace.saves).state == "stopping" for each in (run, other)]

    assert after(1) == []  # there is no limit
    quotas.write_text("default: {gpu_hours: 20}")
    assert after(4.4) == []  # two runs on two GPUs each: 17.6 hours
    now += 29  # 17.63, and no new look
    quotas.write_text("default: {gpu_hours: 0}")
    watch.look(True)
    quotas.write_text("default: {gpu_hours: 20}")
    assert after(4.6) == after(4.7) == ["quota-hours-near"]
    assert len(run.dir.warnings.read_text().splitlines()) == 1
    assert after(5.1) == ["quota-hours-near", "quota-hours-over"]
    assert stops() == [False, False]
    quotas.write_text("default: {gpu_hours: 20}\nwhen_used_up: sometimes")
    assert len(after(5.2)) == 2  # whoever starts the next run is told
    with pytest.raises(Refusal, match="when_used_up"):
        read_quotas(workplace.saves)
    quotas.write_text("default: {gpu_hours: 20}\nwhen_used_up: stop")
    assert after(5.3)[-1] == "quota-hours-stopped"
    assert stops() == [True, False]  # each is stopped by its own supervisor
    assert "has used 21.2 of 20 GPU hours" in read_warnings(run.dir)[-1].problem.text()
    QuotaWatch(other, lambda: now).look(False)  # it still prepares its rows
    assert (stops(), read_warnings(other.dir)[-1].problem.code) == ([True, True], "quota-hours-ended")
    for lock in filter(None, locks):
        os.close(lock)


USED_UP = "users: {ada: {gpu_hours: 2.0e-7}}\nwhen_used_up: stop\n"  # a thousandth of a second
LOOKS_OFTEN = """
import sys
from engine.runs import quota_watch, supervisor
quota_watch.LOOK_SECONDS = 0.5
sys.exit(supervisor.main())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_real_training_saves_a_checkpoint_and_stops_at_the_end_of_the_hours(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would need a day for its steps."""
    program = [sys.executable, "-c", LOOKS_OFTEN, "keep"]
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: [*program, str(folder)])
    run = runs.submit(make_spec(training__max_steps=10_000_000), workplace, by="ada")
    wait_until(run.dir.metrics.exists)
    (workplace.saves / QUOTAS_FILE).write_text(USED_UP)
    wait_until(lambda: runs.read(run.path, workplace.saves).final, 300)
    run = runs.read(run.path, workplace.saves)
    assert run.state == "stopped"
    assert [warning.problem.code for warning in read_warnings(run.dir)] == ["quota-hours-stopped"]
    assert run.dir.checkpoints()
    with pytest.raises(Refusal, match="GPU hours"):
        runs.resume(run, "ada")
    assert quota_use.hours_left(workplace.saves, "ada") == (0.0, 2e-7)
    assert quota_use.hours_left(workplace.saves, "bob") is None


@pytest.mark.slow
@pytest.mark.parametrize("type_", [EvaluationSpec, ExportSpec])
def test_evaluations_and_exports_are_ended_with_the_hours_of_their_owner(
    workplace: Workplace, tiny: Path, monkeypatch: pytest.MonkeyPatch, type_: type[Spec]
) -> None:
    """A stand-in that would take a day."""
    forever = "import time; time.sleep(100_000)"
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, forever))
    spec = type_.read({"model": {"model_name_or_path": str(tiny)}, "hardware": {"device": "cpu"}})
    run = lay_out(RunDir(workplace.saves / "tiny" / spec.shelf / "run"), spec)
    write_json(run.request, read_json(run.request) | {"by": "ada"})
    (workplace.saves / QUOTAS_FILE).write_text(USED_UP)
    queue.advance(workplace.saves)
    wait_until(run.exit.exists)
    assert runs.state(run) == "stopped"
    assert [warning.problem.code for warning in read_warnings(run)] == ["quota-hours-ended"]


# ---------------------------------------------------------------------------------------- changed by the page

FILES = {
    "none": None,
    "empty": "",
    "comments": "# our limits\n",
    "blocks": "# ours\ndefault:\n  gpu_hours: 5\nusers:\n  # boss\n  root:\n    disk_gb: 9\n  bob: {}  # new\n# end\n",
    "flow": "{default: {gpu_hours: 5}, users: {bob: {disk_gb: 1}}}",
    "null users": "users:\ndefault: {disk_gb: 2}  # small",
    "ada": "users:\n  ada: {gpu_hours: 1}  # first\n  bob:\n    gpu_hours: 2\nwhen_used_up: stop\n",
    "ada alone": "users:\n    'ada':\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_change_of_a_limit_leaves_every_other_line_as_it_is(tmp_path: Path, name: str) -> None:
    file, text = tmp_path / QUOTAS_FILE, FILES[name]
    if text is not None:
        file.write_text(text)
    content = yaml.safe_load(text or "") or {}
    for user, limits in {
        "ada": {"gpu_hours": 3, "disk_gb": None},
        "": {"runs_at_once": 2},
        "1": {},
        "null": {},
    }.items():
        change_limits(tmp_path, user, limits)
        if user:
            content["users"] = (content.get("users") or {}) | {user: limits}
        else:
            content["default"] = limits
        assert yaml.safe_load(file.read_text()) == content
    left = file.read_text()
    for comment in re.findall(r"#.*", text or ""):
        assert comment in left
    assert (tmp_path / QUOTAS_FILE).read_text().count("\n\n") == 0


def test_a_limit_that_cannot_be_changed_is_said_and_the_file_stays(tmp_path: Path) -> None:
    file = tmp_path / QUOTAS_FILE
    commented = "users:\n  ada:\n    gpu_hours: 1  # as agreed\n    disk_gb: 2\n"
    anchored = "users:\n  bob: &two {gpu_hours: 2}\n  ada: *two\n"
    for text, limits, code in (
        (commented, {}, "quotas-not-changed"),
        ("users: [", {}, "quotas-unreadable"),
        ("a: 1", {}, "quotas-key"),
        ("users: {}", {"gpu_hours": -1}, "quotas-number"),
    ):
        file.write_text(text)
        with pytest.raises(Refusal) as refused:
            change_limits(tmp_path, "ada", limits)
        assert [issue.code for issue in refused.value.problems] == [code]
        assert file.read_text() == text
    file.write_text(anchored)
    with pytest.raises(Refusal, match="editor"):
        change_limits(tmp_path, "ada", {"gpu_hours": 3})  # would change bob's, too
    assert file.read_text() == anchored


# ------------------------------------------------------------------------------------------- who waits


def test_whoever_has_enough_in_progress_waits_and_keeps_nothing_from_others() -> None:
    machine = Machine([], {}, lanes=4, free_memory=1 << 40, running={"ada": 1}, limits={"ada": 2, "bob": 0})
    names = ("ada", "ada", "bob", "eve", "ada", "eve")
    demands = [Demand(str(number), 0, owner=owner) for number, owner in enumerate(names)]
    decisions = decide(demands, machine)
    assert [decision.starts for decision in decisions] == [True, False, False, True, False, True]
    assert decisions[1].text() == "Waits for another run of ada: 2 of 2 allowed at once are in progress."
    assert decisions[2].text() == "Waits for another run of bob: 0 of 0 allowed at once are in progress."


def test_no_queue_starts_more_than_a_limit_nor_fewer_than_without_those_who_wait() -> None:
    chance = random.Random(1)
    for _ in range(300):
        owners_ = [chance.choice("abcd") for _ in range(chance.randint(1, 12))]
        running = {owner: chance.randint(0, 2) for owner in "ab"}
        limits = {owner: chance.randint(0, 3) for owner in "abc"}
        machine = Machine([], {}, lanes=chance.randint(0, 8), free_memory=1 << 40, running=running, limits=limits)
        demands = [Demand(str(number), 0, owner=owner) for number, owner in enumerate(owners_)]
        decisions = decide(demands, machine)
        after = Counter(running) + Counter(d.owner for d, e in zip(demands, decisions, strict=True) if e.starts)
        assert all(after[owner] <= max(limits[owner], running.get(owner, 0)) for owner in limits)
        left = [d for d, e in zip(demands, decisions, strict=True) if not (e.reason and e.reason.code == "waits-quota")]
        again = decide(left, Machine([], {}, lanes=machine.lanes, free_memory=1 << 40))
        assert [e.starts for e in again] == [e.starts for d, e in zip(demands, decisions, strict=True) if d in left]


def test_the_queue_counts_what_is_alive_and_a_broken_file_stops_users_only(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    monkeypatch.setenv("ATHANOR_CPU_RUNS", "4")
    submitted = [runs.submit(make_spec(name=name), workplace, by=name[:3]) for name in ("ada1", "ada2", "bob1")]
    runs.submit(make_spec(name="nobody"), workplace)
    lock = try_lock(submitted[0].dir.lock, ALIVE_BYTE, shared=True)
    assert lock is not None
    quotas = workplace.saves / QUOTAS_FILE
    quotas.write_text("default: {runs_at_once: 1}")
    waits = {run.title: decision.text() for run, decision in queue.decisions(workplace.saves)}
    assert waits == {
        "ada2": "Waits for another run of ada: 1 of 1 allowed at once is in progress.", "bob1": "", "nobody": "",
    }  # fmt: skip
    quotas.write_text("default: {gpu_hours: 0}\nwhen_used_up: stop")
    waits = {run.title: decision.text() for run, decision in queue.decisions(workplace.saves)}
    assert waits["nobody"] == ""
    assert "bob has used up their GPU hours" in waits["bob1"]
    quotas.write_text("default: {gpu_hours: 0}")  # then it may start: it was submitted when there were some
    waits = {run.title: decision.text() for run, decision in queue.decisions(workplace.saves)}
    assert waits == {"ada2": "", "bob1": "", "nobody": ""}
    quotas.write_text("default: [")
    waits = {run.title: decision.text() for run, decision in queue.decisions(workplace.saves)}
    assert waits["nobody"] == ""
    assert "cannot be read" in waits["ada2"]
    assert "cannot be read" in waits["bob1"]
