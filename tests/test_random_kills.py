"""Whatever dies, and whenever: no run is said to be what it is not, and each comes to its end with the same weights.

A few rounds by default, in processes that are forked; many, in processes that start as ever: `make kills ROUNDS=100
SEED=7`. A seed fixes what is done, not how the processes are scheduled while it is done.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.core.problems import Refusal
from engine.launch.workspace import PROJECT, Workplace
from engine.runs import queue, runs
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from tests.conftest import end_runs, flags_of, wait_until
from tests.forked import start_forking_process
from tests.living import Living, Look, Watcher, contradictions, living
from tests.test_runs_tab import VIEW, Tab

ROUNDS = int(os.environ.get("ATHANOR_KILL_ROUNDS", "8"))
SEED = int(os.environ.get("ATHANOR_KILL_SEED", "6"))
MARK = "ATHANOR_KILL_TEST"  # a variable that everything started here inherits
STEPS = 60
RANKS = {"alone": 1, "pair": 2}  # kinds of run: how many processes train
# "shell" is a verb that submits or resumes; "starter" the supervisor of a run before it has the run's lock.
TARGETS = ("studio", "shell", "supervisor", "supervisor", "launcher", "rank", "preparation")
if "ATHANOR_KILL_ROUNDS" in os.environ:  # a forked one has the lock before it can be caught; see test_outcomes
    TARGETS += ("starter",)
MOMENTS = {
    "shell": ("any", "start"),
    "supervisor": ("any", "training", "checkpoint", "saving", "ended"),
    "launcher": ("any", "training", "checkpoint", "saving"),
    "rank": ("training", "checkpoint", "saving"),
}  # for other targets "any"
LONGEST_DELAYS = {
    "checkpoint": 0.005, "saving": 0.3, "ended": 0.6, "start": 0.6,
    "studio": 6.0, "shell": 1.5, "starter": 0.3, "preparation": 0.5,
}  # fmt: skip  # s; after the moment has come, or for the target where the moment is "any"
WAYS = {"kill": 0.7, "terminate": 0.15, "suspend, then kill": 0.15}
# A machine may be busy with other things, too.
MOMENT_SECONDS = 300.0  # for a moment to come
END_SECONDS = 120.0  # for what was killed to be gone: a supervisor gives its processes ten
START_SECONDS = 180.0  # for a waiting run to begin once none is alive


@dataclass(frozen=True)
class Kill:
    """What a round does: whom it kills, in which moment of a run, how long after that came (s), and how."""

    target: str
    moment: str
    delay: float
    way: str


def plan(seed: int, rounds: int) -> list[Kill]:
    """Every target comes once before any comes again."""
    chance, kills, deck = random.Random(seed), [], []
    for _ in range(rounds):
        deck = deck or chance.sample(TARGETS, len(TARGETS))
        target = deck.pop()
        moment = chance.choice(MOMENTS.get(target, ("any",)))
        delay = chance.uniform(0, LONGEST_DELAYS.get(moment) or LONGEST_DELAYS.get(target, 1.0))
        kills.append(Kill(target, moment, delay, chance.choices(list(WAYS), list(WAYS.values()))[0]))
    return kills


# ---------------------------------------------------------------------------- what the files of a run say


def content(file: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if it is not there."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def attempt(folder: Path) -> tuple[Path, int]:
    """The attempt that lives, or was the last that did: a resume that was killed may have done no more than count."""
    files = ("exit.json", "keeper.json", "request.json")
    return folder, next(number for file in files if (number := content(folder / file).get("attempt")))


def waits(folder: Path) -> bool:
    return not any((folder / file).exists() for file in ("exit.json", "keeper.json"))


def has_come(moment: str, folder: Path) -> bool:
    if moment == "training":
        return content(folder / "progress.json").get("phase") == "training"
    if moment == "checkpoint":
        return any(not (path / "complete.json").exists() for path in folder.glob("checkpoint-*"))
    if moment == "saving":
        written = content(folder / "adapter" / "result.json").get("attempt") == attempt(folder)[1]
        return written or (folder / ".adapter.partial").exists()
    return moment == "any" or (folder / "exit.json").exists()


def losses_and_weights(folder: Path) -> tuple[list[float], bytes]:
    """The losses by step, each as it was logged last, and the weights."""
    loss = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            logged = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        loss[logged["step"]] = logged["loss"]
    assert sorted(loss) == list(range(1, STEPS + 1)), folder
    return [loss[step] for step in sorted(loss)], (folder / "adapter" / "adapter_model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------ processes


def plays(target: str, process: Living, folder: Path) -> bool:
    """Whether a process has this part in the run in `folder`."""
    if target in ("starter", "supervisor"):
        is_supervisor = process.supervises and "keep" in process.words and str(folder) in process.words
        starts = waits(folder) and not process.holds(folder)
        return is_supervisor and starts == (target == "starter")
    modules = {"launcher": "engine.worker.launch", "preparation": "engine.worker.prepare"}
    return process.run == str(folder) and modules.get(target, "engine.worker.train") in process.words


def is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_running(child: subprocess.Popen[bytes] | None) -> bool:
    return child is not None and child.poll() is None


class Trial:
    """The runs of one saves folder, and everything that starts, ends or looks at them."""

    def __init__(self, workplace: Workplace, make_spec: Callable[..., RunSpec], seed: int):
        self.place, self.saves, self.make_spec = workplace, workplace.saves, make_spec
        self.chance = random.Random(seed)
        self.mark = f"{MARK}={os.environ[MARK]}"
        self.output = workplace.saves.parent / "output.txt"  # of the studio and the verbs
        self.studio: subprocess.Popen[bytes] | None = None
        self.verb: subprocess.Popen[bytes] | None = None  # the newest that submits or resumes
        self.submitted = 0
        self.hit: set[tuple[Path, int]] = set()  # attempts of which a process was killed
        self.killed: Counter[str] = Counter()
        tab = Tab(workplace)
        self.watcher = Watcher(self.mark, lambda: runs.find(self.saves), lambda now: show(tab, now))
        self.mover = threading.Thread(target=self._move_on, daemon=True)
        self.paused = False  # the mover
        # The runs that nobody kills come first, so that what is no part of a run is killed beside them.
        self.references = {kind: runs.submit(self._spec(kind, "reference"), workplace).path for kind in RANKS}

    def _spec(self, kind: str, name: str) -> RunSpec:
        return self.make_spec(
            name=f"{kind} {name}", hardware__num_processes=RANKS[kind], training__max_steps=STEPS,
            method__lora_dropout=0.1, logging__save_steps=3, logging__plot_loss=False,
            # No row is as long as that: the length only keeps a run from finding the rows of another one prepared.
            data__max_length=100 + self.submitted,
        )  # fmt: skip

    def processes(self) -> list[Living]:
        return living(self.mark)

    def folders(self) -> list[Path]:
        """Every run that was submitted in whole."""
        return sorted(file.parent for file in self.saves.glob("[!.]*/*/*/request.json"))

    def victims(self) -> list[Path]:
        return [folder for folder in self.folders() if folder not in self.references.values()]

    def broken(self) -> list[Run]:
        return [run for run in runs.find(self.saves) if run.final and run.state != "finished"]

    # ----------------------------------------------------------------------------- what goes on all the time

    def _move_on(self) -> None:
        """Let the queue go on, as a studio does, and see that it does."""
        still_since = 0.0
        while not self.watcher.ended.wait(0.2):
            try:
                if not self.paused:
                    queue.advance(self.saves)
                still_since = (still_since or time.monotonic()) if self._stands_still() else 0.0
                if still_since and time.monotonic() > still_since + START_SECONDS:
                    self.watcher.faults.append("Runs wait, none is alive, and none begins.")
            except Exception:
                self.watcher.faults.append(traceback.format_exc())

    def _stands_still(self) -> bool:
        return any(map(waits, self.folders())) and not any(process.locks for process in self.processes())

    def check(self) -> None:
        """Nothing false was seen so far, and no run has come to a bad end by itself."""
        assert not self.watcher.faults, "\n".join(dict.fromkeys(self.watcher.faults))
        attempts = {folder: attempt(folder) for folder in self.folders()}  # before: a verb may resume one meanwhile
        for run in self.broken():
            log = run.dir.log.read_text(encoding="utf-8", errors="replace")[-3000:] if run.dir.log.exists() else ""
            assert attempts.get(run.path, (run.path, 1)) in self.hit, (
                f"{run.id} is {run.state} by itself: {run.exit}\n{log}"
            )

    def tend(self) -> None:
        """Check, and see that there is a run that can be killed."""
        self.check()
        going = any(not run.final and run.path in self.victims() for run in runs.find(self.saves))
        if not going and not is_running(self.verb):
            self.start_victim()

    def start_victim(self) -> subprocess.Popen[bytes]:
        """A verb that resumes a run, where one is broken, or submits another one."""
        broken = self.broken()
        if broken and self.chance.random() < 0.8:
            self.verb = self._popen("-m", "engine", "resume", self.chance.choice(broken).id)
            return self.verb
        self.submitted += 1
        file = self.saves.parent / f"{self.submitted}.yaml"
        kind = list(RANKS)[self.submitted % len(RANKS)]
        file.write_text(self._spec(kind, "victim").to_yaml(), encoding="utf-8")
        self.verb = self._popen("-m", "engine", "submit", str(file))
        return self.verb

    def start_studio(self) -> subprocess.Popen[bytes]:
        if self.studio is None:
            self.studio = self._popen("app.py", "--port", "0")
        return self.studio

    def _popen(self, *words: str) -> subprocess.Popen[bytes]:
        with self.output.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *words, *flags_of(self.place)], cwd=PROJECT,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    # ----------------------------------------------------------------------------- one round

    def play(self, kill: Kill) -> None:
        """Kill; meanwhile the shell lists the runs and shows one."""
        if self.chance.random() < 0.5:
            self.start_studio()
        some = self.chance.choice(self.folders()).relative_to(self.saves).as_posix()
        looks = [self._popen("-m", "engine", "list"), self._popen("-m", "engine", "show", some)]
        kill_target = {"studio": self._kill_studio, "shell": self._kill_verb}.get(kill.target, self._kill_in_run)
        victim = kill_target(kill)
        self.killed[kill.target] += 1
        print(f"{time.strftime('%X')} {kill.way} {kill.target} at {kill.moment} + {kill.delay:.3f} s: {victim}")
        for verb in looks:
            assert verb.wait(END_SECONDS) == 0, self.output.read_text(errors="replace")[-3000:]
        self.tend()

    def _kill_studio(self, kill: Kill) -> str:
        """While it starts, or in a tick of its queue, or while nothing happens."""
        studio = self.start_studio()
        deadline = time.monotonic() + kill.delay
        while time.monotonic() < deadline:
            self.tend()
            time.sleep(0.1)
        end(studio, kill.way, self.chance)
        self.studio = None
        return "app.py"

    def _kill_verb(self, kill: Kill) -> str:
        """While it writes the run, or while it starts its supervisor: then nobody else is to do that."""
        starts = kill.moment == "start"
        if starts:
            wait_until(self._lane_is_free, MOMENT_SECONDS)
        self.paused = starts
        before = self._supervisors()
        verb, deadline = self.start_victim(), time.monotonic() + END_SECONDS
        while starts and is_running(verb) and time.monotonic() < deadline:
            starts = self._supervisors() <= before
        time.sleep(kill.delay)
        end(verb, kill.way, self.chance)
        self.paused = False
        return " ".join(verb.args[3:5])

    def _supervisors(self) -> set[tuple[int, int]]:
        return {process.identity for process in self.processes() if process.supervises}

    def _lane_is_free(self) -> bool:
        self.check()
        taken = any(map(waits, self.folders())) or any(process.locks for process in self.processes())
        return not taken and not is_running(self.verb)

    def _kill_in_run(self, kill: Kill) -> str:
        deadline = time.monotonic() + MOMENT_SECONDS
        while time.monotonic() < deadline:
            self.tend()
            processes = self.processes()
            for folder in self.victims():
                if process := self._caught(kill, folder, processes, deadline):
                    self.hit.add(attempt(folder))
                    end(process, kill.way, self.chance)
                    return f"{process.pid} of {folder.name}"
            time.sleep(0.02)
        raise AssertionError(f"{kill} never came")

    def _caught(self, kill: Kill, folder: Path, processes: list[Living], deadline: float) -> psutil.Process | None:
        """The target in a run when the moment has come; None if there is none now, or it ends before."""
        candidates = [process for process in processes if plays(kill.target, process, folder)]
        # Of one rank, the launcher trains; of more, those that are not the launcher do.
        candidates = [process for process in candidates if "engine.worker.launch" not in process.words] or candidates
        if not candidates:
            return None
        process = psutil.Process(self.chance.choice(candidates).pid)
        while is_there(process) and time.monotonic() < deadline:
            if has_come(kill.moment, folder):
                time.sleep(kill.delay)
                return process
            time.sleep(0.001 if kill.moment == "checkpoint" else 0.02)  # which is over soon
        return None

    # ----------------------------------------------------------------------------- how it ends

    def finish(self) -> None:
        """Resume whatever is broken until all have finished; then nobody is left."""
        if self.verb:
            self.verb.wait(END_SECONDS)
        wait_until(self._have_finished, MOMENT_SECONDS + 2 * END_SECONDS * len(self.folders()), every=0.3)
        if self.studio:
            end(self.studio, "terminate", self.chance)
        wait_until(lambda: not self.processes(), END_SECONDS)
        self.watcher.stop()
        self.check()

    def _have_finished(self) -> bool:
        self.check()
        for run in self.broken():
            try:
                runs.resume(run)
            except Refusal as refusal:
                # What of it still ends is awaited.
                if [entry.code for entry in refusal.problems] != ["run-still-there"]:
                    raise
        return all(run.state == "finished" for run in runs.find(self.saves))

    def compare(self) -> None:
        """A run that was killed has the losses and weights of the run of its kind that was not."""
        for folder in self.victims():
            kind = "pair" if "pair" in folder.name else "alone"
            assert losses_and_weights(folder) == losses_and_weights(self.references[kind]), folder.name


def show(tab: Tab, now: list[Run]) -> None:
    """What the page asks for."""
    tab.table.list_runs("", "100")
    for run in now:
        tab.view.open(run.id, *VIEW)


def end(process: psutil.Process | subprocess.Popen[bytes], way: str, chance: random.Random) -> None:
    """Kill, and see that it is gone. What has ended by itself meanwhile is as good."""
    try:
        target = process if isinstance(process, psutil.Process) else psutil.Process(process.pid)
        if way == "terminate":
            target.terminate()
        else:
            if way != "kill":
                target.suspend()
                time.sleep(chance.uniform(0.2, 1.5))
            target.kill()
        wait_until(lambda: not is_there(target), END_SECONDS)
    except psutil.NoSuchProcess:
        pass
    if not isinstance(process, psutil.Process):
        process.wait(END_SECONDS)


@pytest.fixture
def starting(request: pytest.FixtureRequest) -> None:
    """How processes start: forked, unless there is time for more rounds."""
    if "ATHANOR_KILL_ROUNDS" not in os.environ:
        request.getfixturevalue("forked")
        start_forking_process()  # before there is a variable that marks what the trial starts


@pytest.fixture
def trial(
    starting: None, workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Trial]:
    monkeypatch.setenv(MARK, uuid.uuid4().hex)
    trial = Trial(workplace, make_spec, SEED)
    trial.watcher.start()
    trial.mover.start()
    yield trial
    trial.watcher.stop()
    for run in runs.find(workplace.saves):  # for who reads why the test has failed
        print(run.id, run.state, run.request, run.exit)
    print(*trial.processes(), sep="\n")
    end_runs(workplace.saves)
    for process in trial.processes():
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_random_kills_leave_no_false_state_and_no_run_behind(trial: Trial) -> None:
    print(f"ATHANOR_KILL_ROUNDS={ROUNDS} ATHANOR_KILL_SEED={SEED}")
    for kill in plan(SEED, ROUNDS):
        trial.play(kill)
    trial.finish()
    trial.compare()
    assert trial.killed, "nothing was killed"
    print(f"{dict(trial.killed)}, {len(trial.folders())} runs, looked at {trial.watcher.looks} times")


# ------------------------------------------------------------------------------------------ what judges


LOCKS = {"idle": (), "lives": (("/saves/run/lock", 0),), "other": (("/saves/other/lock", 0),)}


def seen(*processes: Living) -> Look:
    return Look(list(processes), frozenset())


def process_of(pid: int, holds: str, *words: str) -> Living:
    return Living(pid, 1, words or ("python",), "/saves/run", frozenset(LOCKS[holds]))


def named(name: str, state: str, exit: dict[str, Any] | None = None) -> Run:
    return Run(name, Path("/saves", name), state, {"attempt": 1}, exit)


SUPERVISOR = process_of(2, "lives", "python", "-m", "engine.runs.supervisor")
LIVES, OTHER = process_of(1, "lives"), process_of(3, "other")


@pytest.mark.parametrize(
    ("before", "now", "after", "false"),
    [
        ([LIVES], [named("run", "running")], [LIVES], ""),
        ([LIVES], [named("run", "running")], [], ""),  # it ended meanwhile
        ([], [named("run", "running")], [], "nobody holds its lock"),
        ([LIVES], [named("run", "queued")], [LIVES], "held by"),
        ([LIVES], [named("run", "interrupted")], [LIVES], "held by"),
        ([LIVES], [named("run", "interrupted")], [], ""),
        ([LIVES], [named("run", "failed", {"ended": 1})], [LIVES], "held by"),
        ([SUPERVISOR], [named("run", "failed", {"ended": 1})], [SUPERVISOR], ""),
        ([LIVES, OTHER], [named("run", "running"), named("other", "running")], [LIVES, OTHER], "at the same time"),
        ([LIVES], [named("run", "finished", {"ended": 1}), named("other", "running")], [OTHER], ""),
    ],
)
def test_what_cannot_be_so_is_seen(before: list[Living], now: list[Run], after: list[Living], false: str) -> None:
    faults = contradictions(seen(*before), now, seen(*after))
    assert bool(faults) == bool(false)
    assert false in "".join(faults)
