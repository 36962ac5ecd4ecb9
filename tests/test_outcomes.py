"""How a run ends, told truly: by real keepers of real processes, with another program in place of the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from engine.core.rundir import RunDir, write_json
from engine.launch.processes import end_processes, find_processes
from engine.launch.workspace import Workplace
from engine.runs import attempts, engines, failures, progress, queue, runs, supervisor
from engine.runs.run import ALIVE_STATES, state
from engine.spec.run_spec import RunSpec
from tests import stand_in
from tests.conftest import command_line, gone, wait_until

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def run_program(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], runs.Run]:
    """Submit a run whose training is the given program."""

    def run(source: str) -> runs.Run:
        monkeypatch.setattr(queue, "supervisor_command", lambda folder: stand_in.supervisor_command(folder, source))
        return runs.submit(make_spec(), workplace, by="ada")

    return run


def ended(run: runs.Run) -> runs.Run:
    return wait_until(lambda: (now := fresh(run)).final and now)


def wait_for_program(run: runs.Run) -> None:
    """Until the program itself runs, and not what is prepared for it."""
    wait_until(lambda: any("sleep(600)" in " ".join(command_line(one)) for one in find_processes(run.path)))


def fresh(run: runs.Run) -> runs.Run:
    return runs.read(run.path, queue.saves_of(run.path))


def test_exit_zero_with_a_result_is_finished(run_program: Callable[[str], runs.Run]) -> None:
    run = ended(run_program("finish()"))
    assert run.state == "finished"
    assert failures.explain(run) is None


def test_three_bad_ends_are_three_different_messages(run_program: Callable[[str], runs.Run]) -> None:
    told = {}
    for name, source in {
        "exit": "raise ValueError('the furnace is cold')",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "no-result": "print('bye')",
    }.items():
        run = ended(run_program(source))
        assert run.state == "failed"
        why = failures.explain(run)
        told[name] = (why.what("en"), why.what("zh"), why.advice("en"), why.advice("zh"))
    assert all(len(set(texts)) == 3 for texts in zip(*told.values(), strict=True))
    assert "the furnace is cold" in told["exit"][0]
    assert "SIGKILL" in told["killed"][0]
    assert "exit code 0" in told["no-result"][0]


def test_the_first_traceback_is_shown(run_program: Callable[[str], runs.Run]) -> None:
    run = ended(run_program("int('gold')"))
    assert "ValueError: invalid literal for int() with base 10: 'gold'" in failures.explain(run).traceback


WRAPPED = """
from engine.worker.runtime.process_lifecycle import run_lifecycle
with run_lifecycle(str(folder)):
    {before}
    raise RuntimeError(
        "We encountered some issues during automatic conversion of the weights: ignore_mismatched_sizes"){after}
"""
# In two parts: the log begins with the command, and so with this source.
MISSING = "Native code method ' + 'attempted to call: lib.cquantize_blockwise_fp32_nf4()"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # As transformers does it: the reason is printed in a report, megabytes before the end, and forgotten.
        (f"print('{MISSING}'); print('loading…\\n' * 300_000)", ""),
        (f"cause = OSError('{MISSING}')", " from cause"),
        (
            f"\n    try: raise OSError('{MISSING}')\n    except OSError: raise ValueError('no weights') from None",
            "",
        ),
    ],
)
def test_a_reason_that_a_library_has_wrapped_in_other_words_is_the_reason_that_is_told(
    run_program: Callable[[str], runs.Run], before: str, after: str
) -> None:
    run = ended(run_program(WRAPPED.format(before=before, after=after)))
    assert run.state == "failed"
    assert failures.explain(run).code == "bitsandbytes", run.dir.log.read_text()[-2000:]


def test_what_a_library_only_warned_of_explains_no_other_error(
    run_program: Callable[[str], runs.Run],
) -> None:
    warned = "print('ConnectionError: the tracker was not reached; loading libbitsandbytes_cuda126.so')"
    run = ended(run_program(WRAPPED.format(before=warned, after="")))
    assert failures.explain(run).code == "damaged"


def test_a_refused_row_is_named_with_its_file_and_line(run_program: Callable[[str], runs.Run]) -> None:
    source = (
        "from engine.core.problems import Refusal, problem\n"
        "from engine.worker.runtime.process_lifecycle import run_lifecycle\n"
        "with run_lifecycle(str(folder)):\n"
        "    raise Refusal([problem('mask-empty', answer=1).at('chat.jsonl, line 7'),"
        " problem('row-empty', column='output', place='chat.jsonl, line 9')])"
    )
    why = failures.explain(ended(run_program(source)))
    for language in ("en", "zh"):
        first, second = why.what(language).splitlines()
        assert first.startswith("chat.jsonl, line 7: ")
        assert second.count("chat.jsonl, line 9") == 1


def test_an_old_result_does_not_make_a_new_attempt_finished(run_program: Callable[[str], runs.Run]) -> None:
    source = (
        "finish() if not (folder / 'attempts').exists() else None; raise SystemExit(not (folder / 'attempts').exists())"
    )
    run = ended(run_program(source))
    assert run.state == "failed"  # a result was written, but the exit code was 1
    runs.resume(run)
    run = ended(run)
    assert (run.request["attempt"], attempts.resumed_from(run)) == (2, 0)  # it has no checkpoint
    assert attempts.seconds_before(run) > 0
    assert (run.state, run.exit["reason"]) == ("failed", "no-result")


def test_ten_mebibytes_on_both_streams_do_not_stop_a_run(run_program: Callable[[str], runs.Run]) -> None:
    source = "for _ in range(5120): print('o' * 1023); sys.stderr.write('e' * 1023 + '\\n')\nfinish()"
    run = ended(run_program(source))
    assert run.state == "finished"
    assert run.dir.log.stat().st_size > 10 * 2**20


def test_kill_ends_even_a_process_that_left_the_session_and_ignores_sigterm(
    run_program: Callable[[str], runs.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN)\n"
        "child = 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)'\n"
        "subprocess.Popen([sys.executable, '-c', child], start_new_session=True)\ntime.sleep(600)"
    )
    run = run_program(source)
    wait_for_program(run)
    wait_until(lambda: len(find_processes(run.path)) == 2)
    runs.stop(fresh(run), "kill")
    assert fresh(run).state == "stopping"
    run = wait_until(lambda: (now := fresh(run)).final and now)
    assert run.state == "stopped"
    assert find_processes(run.path) == []


def test_kill_works_when_the_keeper_is_gone(run_program: Callable[[str], runs.Run]) -> None:
    run = run_program("import time; time.sleep(600)")
    wait_for_program(run)
    psutil.Process(keeper_pid(run)).kill()
    wait_until(lambda: not psutil.pid_exists(keeper_pid(run)))
    assert fresh(run).state == "preparing"  # something of it lives, so it is not over
    runs.stop(fresh(run), "kill")
    run = ended(run)
    assert run.state == "stopped"
    assert find_processes(run.path) == []


def test_kill_reaches_a_suspended_supervisor(run_program: Callable[[str], runs.Run]) -> None:
    run = run_program("import time; time.sleep(600)")
    wait_for_program(run)
    keeper = psutil.Process(keeper_pid(run))
    keeper.suspend()
    wait_until(lambda: keeper.status() == psutil.STATUS_STOPPED)  # it may not have had its turn yet
    runs.stop(fresh(run), "kill")
    run = ended(run)
    assert run.state == "stopped"
    assert find_processes(run.path) == []


def test_stopping_a_run_that_waits_starts_no_process(
    run_program: Callable[[str], runs.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    run = run_program("finish()")
    monkeypatch.setattr(engines.subprocess, "Popen", None)
    runs.stop(run, "kill")
    assert fresh(run).state == "stopped"


def keeper_pid(run: runs.Run) -> int:
    return json.loads(run.dir.keeper.read_text())["pid"]


def test_a_foreign_process_with_the_recorded_pid_is_neither_adopted_nor_signalled(
    run_program: Callable[[str], runs.Run],
) -> None:
    run = run_program("import time; time.sleep(600)")
    wait_for_program(run)
    psutil.Process(keeper_pid(run)).kill()
    end_processes(run.path, kill_timeout_s=0)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        wait_until(lambda: fresh(run).state == "interrupted")
        write_json(run.dir.keeper, {"pid": stranger.pid, "started": 0})
        assert fresh(run).state == "interrupted"
        end_processes(run.path, kill_timeout_s=0)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_machine_that_shuts_down_leaves_the_run_interrupted(run_program: Callable[[str], runs.Run]) -> None:
    run = run_program("import time; time.sleep(600)")
    wait_for_program(run)
    psutil.Process(keeper_pid(run)).terminate()
    run = ended(run)
    assert run.state == "interrupted"
    assert "resume" in run.can
    assert find_processes(run.path) == []


def test_a_run_has_one_keeper_at_most(run_program: Callable[[str], runs.Run]) -> None:
    run = run_program("import time; time.sleep(600)")
    second = subprocess.run([sys.executable, "-m", "engine.runs.supervisor", "keep", str(run.path)], timeout=120)
    assert second.returncode == 1
    assert fresh(run).state == "preparing"


# ------------------------------------------------------------------------------------------ the queue


def test_runs_wait_their_turn_and_go_on_in_order(
    run_program: Callable[[str], runs.Run], workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    wait_for_go = f"import time\nwhile not pathlib.Path('{workplace.saves}/go').exists(): time.sleep(0.05)\nfinish()"
    first = run_program(wait_for_go)
    second, third = (runs.submit(make_spec(name=name), workplace) for name in ("b", "c"))
    assert (second.state, queue.place(second).number) == ("queued", 1)
    assert (third.state, queue.place(third).number) == ("queued", 2)
    Path(workplace.saves, "go").touch()
    ends = [ended(run).ended for run in (first, second, third)]  # each keeper starts the next: no studio is there
    assert ends == sorted(ends)
    assert all(fresh(run).state == "finished" for run in (first, second, third))


@pytest.mark.parametrize("move_on", ["list", "show", "stop", "delete", "end of orphans"])
def test_the_queue_moves_on_after_a_killed_supervisor_without_a_studio(
    run_program: Callable[[str], runs.Run],
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    move_on: str,
) -> None:
    first = run_program("import time; time.sleep(600)")
    wait_for_program(first)
    second, third = (runs.submit(make_spec(name=name), workplace) for name in ("second", "third"))
    psutil.Process(keeper_pid(first)).kill()
    wait_until(lambda: not psutil.pid_exists(keeper_pid(first)))
    if move_on == "end of orphans":
        runs.stop(fresh(first), "kill")
    else:
        end_processes(first.path, kill_timeout_s=0)
        operand = {"list": [], "show": [second.id], "stop": [third.id], "delete": [first.id]}[move_on]
        command = [sys.executable, "-m", "engine", move_on, *operand, "--saves", str(workplace.saves)]
        subprocess.run(command, check=True, capture_output=True)
    wait_until(lambda: fresh(second).state not in ("queued",))


def test_many_studios_at_once_start_a_waiting_run_once(
    run_program: Callable[[str], runs.Run],
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = f"open('{workplace.saves}/started', 'a').write('x')\nimport time; time.sleep(3)\nfinish()"
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    run = run_program(source)
    assert run.state == "queued"
    studio = (
        "import sys, pathlib; from tests import stand_in; from engine.runs import queue;"
        "stand_in.stand_in(sys.argv[2]); queue.advance(pathlib.Path(sys.argv[1]))"
    )
    studios = [subprocess.Popen([sys.executable, "-c", studio, str(workplace.saves), source]) for _ in range(6)]
    assert [one.wait(300) for one in studios] == [0] * 6
    assert ended(run).state == "finished"
    assert Path(workplace.saves, "started").read_text() == "x"


ALONE = """
import fcntl, time
try: fcntl.flock(lane := open(folder.parent / "lane", "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError: (folder.parent / "two at once").touch()
while not (folder.parent / "enough").exists(): time.sleep(0.05)
finish()
"""
LATE = """
import pathlib, subprocess, sys, time
while not pathlib.Path({go!r}).exists(): time.sleep(0.05)
sys.exit(subprocess.call({words!r}))
"""
ADVANCE = """
from pathlib import Path
from engine.runs import queue
queue.supervisor_command = lambda _: {words!r}
queue.advance(Path({saves!r}))
"""


def test_no_two_runs_are_alive_where_who_starts_the_first_is_killed(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor of the first is on its way then; meanwhile somebody takes that run back, and asks for it again."""
    go = workplace.saves / "go"
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    first, second = (runs.submit(make_spec(name=name), workplace) for name in ("first", "second"))
    monkeypatch.undo()
    words = stand_in.supervisor_command(first.path, ALONE)
    late = [sys.executable, "-c", LATE.format(go=str(go), words=words)]
    start = ADVANCE.format(words=late, saves=str(workplace.saves))
    starter = subprocess.Popen([sys.executable, "-c", start])
    on_its_way = wait_until(lambda: psutil.Process(starter.pid).children())[0]
    starter.kill()
    starter.wait()
    words = stand_in.supervisor_command(second.path, ALONE)
    monkeypatch.setattr(queue, "supervisor_command", lambda _: words)

    def ask_again() -> None:
        runs.stop(first, "kill")
        queue.advance(workplace.saves)
        wait_until(lambda: fresh(second).state in ALIVE_STATES)
        runs.resume(fresh(first))

    other = threading.Thread(target=ask_again)
    other.start()
    other.join(4)
    go.touch()
    other.join(120)
    wait_until(lambda: gone(on_its_way))
    Path(first.path.parent, "enough").touch()
    assert [ended(run).state for run in (second, first)] == ["finished", "finished"]
    assert not Path(first.path.parent, "two at once").exists()


def test_a_run_with_a_supervisor_is_not_given_up_where_what_started_that_was_killed(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "{ " + sys.executable + ' -m tests.stand_in "$0" "import time; time.sleep(600)"; kill -9 $$; }'
    monkeypatch.setattr(queue, "supervisor_command", lambda folder: ["sh", "-c", words, str(folder)])
    run = runs.submit(make_spec(), workplace)
    assert run.state == "preparing"
    assert not run.dir.exit.exists()


class Starting(RunDir):
    """A run whose supervisor comes in the moment after it was looked whether it is there."""

    def alive(self) -> bool:
        alive = super().alive()
        write_json(self.keeper, {"pid": 1})
        return alive


def test_a_run_that_starts_while_it_is_looked_at_was_not_interrupted(tmp_path: Path) -> None:
    write_json(RunDir(tmp_path).request, {"submitted": 0.0, "attempt": 1})
    assert state(Starting(tmp_path)) == "queued"
    assert state(RunDir(tmp_path)) == "interrupted"  # nobody holds the lock, and there was a supervisor


def test_the_end_of_orphans_ends_no_run_that_waits(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked for before the run was resumed, and comes late."""
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    run = runs.submit(make_spec(), workplace)
    supervisor.end_orphans(run.path)
    assert fresh(run).state == "queued"


def test_the_curves_of_a_long_run_are_read_when_it_ends(run_program: Callable[[str], runs.Run]) -> None:
    line = '{"step": %d, "epoch": 0.5, "time": 1.25, "loss": 2.5, "grad_norm": 0.75, "learning_rate": 0.001}\\n'
    run = ended(
        run_program(f"(folder / 'metrics.jsonl').write_text(''.join('{line}' % n for n in range(60_000))); finish()")
    )
    assert run.state == "finished", run.dir.log.read_text()
    kept = run.path / progress.CACHE_FILE
    wait_until(kept.exists)
    with np.load(kept) as told:
        assert int(told["offset"]) == run.dir.metrics.stat().st_size
        assert "loss" in told["names"]


def test_a_waiting_run_can_be_taken_back(
    run_program: Callable[[str], runs.Run], workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    run_program("import time; time.sleep(600)")
    waiting = runs.submit(make_spec(), workplace)
    runs.stop(waiting, "kill")
    assert fresh(waiting).state == "stopped"
    runs.delete(fresh(waiting))
    assert not waiting.path.exists()


def test_editing_the_form_does_not_change_a_run_that_waits(
    run_program: Callable[[str], runs.Run], workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    run_program("import time; time.sleep(600)")
    waiting = runs.submit(make_spec(training__seed=7), workplace)
    runs.submit(make_spec(training__seed=8), workplace)
    assert fresh(waiting).spec.training.seed == 7


def test_equal_names_get_folders_of_their_own(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    name = "../../etc/passwd; rm -rf / 'quotes' 中文 <script>"
    folders = {runs.submit(make_spec(name=name), workplace).path for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.parent == workplace.saves / "tiny" / "lora" for folder in folders)
    assert all(run.title == name for run in runs.find(workplace.saves))


def test_an_alive_run_cannot_be_deleted(run_program: Callable[[str], runs.Run]) -> None:
    run = run_program("import time; time.sleep(600)")
    with pytest.raises(runs.Refusal, match="It can be deleted when it has ended"):
        runs.delete(fresh(run))
    assert run.path.exists()


def test_ids_from_the_page_cannot_leave_the_saves_folder(workplace: Workplace) -> None:
    outside = workplace.saves.parent / "secret" / "x"
    (outside / "y").mkdir(parents=True)
    (outside / "y" / "request.json").write_text("{}")
    os.symlink(outside, workplace.saves / "link")
    for id in ("../secret/x/y", "/etc/passwd", "", "a/b/c", "link/y/..", "\0/a/b", "../../..", "./x/y"):
        with pytest.raises(runs.Refusal):
            runs.get(workplace.saves, id)


def test_files_of_a_run_are_only_its_own(run_program: Callable[[str], runs.Run]) -> None:
    run = ended(run_program("finish()"))
    assert runs.file(run, "adapter/result.json").exists()
    for name in ("../../../etc/passwd", "/etc/passwd", "", "adapter", "nothing.txt"):
        with pytest.raises(runs.Refusal):
            runs.file(run, name)


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    hold = (
        "import sys, time, pathlib; from engine.core.locks import *; from engine.core.rundir import *;"
        "try_lock(pathlib.Path(sys.argv[1]), ALIVE_BYTE, shared=True); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(run.lock)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    assert run.alive()
    holder.kill()
    holder.wait()
    assert not run.alive()
