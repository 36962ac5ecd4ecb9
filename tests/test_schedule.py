"""Which waiting runs start, on which GPUs: schedules worked out by hand, and rules that hold for any queue."""

from __future__ import annotations

import random
from dataclasses import replace

from engine.core.hardware import Gpu, GpuProcess
from engine.runs.schedule import Decision, Demand, Machine, decide

GB = 1 << 30


def gpu(index: int, free: int = 79, *, memory: int = 80, processes: tuple[GpuProcess, ...] = ()) -> Gpu:
    return Gpu(index, f"GPU-{index}", "NVIDIA H100", memory * GB, free * GB, 9.0, processes)


EIGHT = [gpu(index) for index in range(8)]


def indices(decision: Decision) -> list[int] | None:
    """The GPUs on which it starts; None if it waits."""
    return [gpu.index for gpu in decision.gpus] if decision.starts else None


def started(demands: list[Demand], gpus: list[Gpu] = EIGHT, **taken: str) -> dict[str, list[int] | None]:
    """What happens to each demand; `taken`: GPU3="who"."""
    machine = Machine(gpus, {name.replace("GPU", "GPU-"): who for name, who in taken.items()})
    return {demand.name: indices(decision) for demand, decision in zip(demands, decide(demands, machine), strict=True)}


def test_ten_runs_on_eight_gpus_beside_a_chat_server_and_a_process_of_others() -> None:
    """By hand, round by round. GPU 7 has a chat server; on GPU 6, somebody computes."""
    gpus = [*EIGHT[:6], gpu(6, 40, processes=(GpuProcess(99, 30 * GB),)), EIGHT[7]]
    demands = [
        Demand("a", 4), Demand("b", 1), Demand("c", 4), Demand("d", 1), Demand("e", 1, (5,)), Demand("f", 2),
        Demand("g", 1, beside_others=True), Demand("h", 1, held=True), Demand("i", 0), Demand("j", 0),
    ]  # fmt: skip
    now = started(demands, gpus, GPU7="chat")
    # c keeps GPU 5 until three more have ended: so neither d nor e nor f passes it. Nobody keeps GPU 6: g starts there.
    first = {"a": [0, 1, 2, 3], "b": [4], "g": [6], "i": [], "c": None, "d": None, "e": None, "f": None, "h": None}
    assert now == first | {"j": None}

    # a has ended: c has its four, and what is left is for d.
    left = [demand for demand in demands if demand.name not in "abgi"]
    now = started(left, gpus, GPU7="chat", GPU4="b", GPU6="g")
    assert now == {"c": [0, 1, 2, 3], "d": [5], "e": None, "f": None, "h": None, "j": []}
    # Nothing is left. Released, h waits behind f as well.
    left = [demand for demand in left if demand.name in "efh"]
    now = started(left, gpus, GPU7="chat", GPU4="b", GPU5="d", GPU6="g", **{f"GPU{number}": "c" for number in range(4)})
    assert now == {"e": None, "f": None, "h": None}
    # d and c have ended. e gets the GPU that it asked for, f two others, and h stays on hold.
    now = started(left, gpus, GPU7="chat", GPU4="b", GPU6="g")
    assert now == {"e": [5], "f": [0, 1], "h": None}
    # With everything else in use, g is the only one to start beside the others.
    now = started([demands[3], demands[6]], gpus, GPU7="chat", **{f"GPU{number}": "x" for number in range(6)})
    assert now == {"d": None, "g": [6]}


def test_a_process_of_others_on_one_gpu_does_not_idle_the_other_seven() -> None:
    """By hand. Nobody knows when the process on GPU 7 ends, so nothing is kept for a run that needs this GPU, too."""
    busy = [*EIGHT[:7], gpu(7, 40, processes=(GpuProcess(99, 30 * GB),))]
    eight, three, two, last = Demand("eight", 8), Demand("three", 3), Demand("two", 2), Demand("last", 3)
    assert started([eight, three, two, last], busy) == {"eight": None, "three": [0, 1, 2], "two": [3, 4], "last": None}
    [reason, *_] = decide([eight], Machine(busy, {}))
    assert reason.text() == (
        "Needs 8 GPUs; 7 are free. GPU 7: 32.2 GB used by other programs (process 99); "
        "the free GPUs are not kept for this run, since nobody knows when other programs end"
    )
    assert reason.text("zh").endswith("；其他程序何时结束无法预知，因此空闲的 7 张显卡不为本任务预留")
    # Behind eight, last keeps the two that are left until three or two has ended: nothing foreign is in its way.
    running = {f"GPU{number}": "three" if number < 3 else "two" for number in range(5)}
    assert started([eight, last, Demand("small")], busy, **running) == {"eight": None, "last": None, "small": None}
    # The process has ended: eight keeps GPUs 5 to 7, and gets the others as they become free.
    assert started([eight, last], EIGHT, **running) == {"eight": None, "last": None}
    assert started([eight, last], EIGHT) == {"eight": [0, 1, 2, 3, 4, 5, 6, 7], "last": None}
    # A run that can do without GPU 7 keeps the free ones, whoever computes there.
    running = dict.fromkeys(("GPU0", "GPU1", "GPU2"), "x")
    assert started([Demand("six", 6), Demand("small")], busy, **running) == {"six": None, "small": None}
    assert started([Demand("chosen", 2, (0, 7)), Demand("small")], busy, **running) == {"chosen": None, "small": [3]}


def test_a_gpu_with_too_little_free_memory_is_waited_for() -> None:
    """Less is used than shows that somebody computes there: 2 GB, of which no process is seen."""
    large = Demand("large", memory=79 * GB)
    [waits] = decide([large], Machine([gpu(0, 78)], {}))
    assert waits.text() == (
        "Needs 1 GPU with about 84.8 GB of memory; 0 are free. GPU 0: only 83.8 GB of 85.9 GB is free"
    )
    assert started([large], [gpu(0, 78), gpu(1, 79)]) == {"large": [1]}
    # It may be told to start; and what no GPU could ever hold, its owner wants to try.
    assert started([Demand("now", memory=79 * GB, beside_others=True)], [gpu(0, 78)]) == {"now": [0]}
    assert started([Demand("huge", memory=81 * GB)], [gpu(0, 78)]) == {"huge": [0]}
    # Nobody knows when the memory is freed, so nothing else is kept meanwhile.
    two = Demand("two", 2, memory=79 * GB)
    assert started([two, Demand("small")], [gpu(0, 78), gpu(1, 79)]) == {"two": None, "small": [1]}


def test_a_gpu_that_does_not_respond_for_a_moment_sends_nobody_to_a_smaller_one() -> None:
    mixed = [gpu(0), gpu(1, 23, memory=24), gpu(2, 23, memory=24)]  # a second one with 80 GB has fallen off the bus
    fitted = Demand("fitted", 2, memory=60 * GB, fits=True)
    assert started([fitted, Demand("small")], mixed) == {"fitted": None, "small": [0]}
    [reason] = decide([fitted], Machine(mixed, {}))
    assert reason.text().startswith("Needs 2 GPUs with about 64.4 GB of memory; there is only 1 of that size now.")
    assert started([replace(fitted, beside_others=True)], mixed) == {"fitted": [0, 1]}  # as *Start now* asks for
    assert started([fitted], [*mixed, gpu(3)]) == {"fitted": [0, 3]}
    assert started([Demand("tries", 2, memory=60 * GB)], mixed) == {"tries": [0, 1]}  # there never were two


def test_a_small_run_passes_a_large_one_only_where_it_does_not_delay_it() -> None:
    large, small = Demand("large", 2, memory=60 * GB), Demand("small", 1, memory=10 * GB)
    mixed = [gpu(0), gpu(1), gpu(2, 23, memory=24)]
    assert started([large, small], mixed, GPU0="x") == {"large": None, "small": [2]}  # too small for the large one
    assert started([large, small], mixed[:2], GPU0="x") == {"large": None, "small": None}
    chosen = Demand("chosen", 2, (0, 1))
    assert started([chosen, small], EIGHT[:3], GPU0="x") == {"chosen": None, "small": [2]}
    assert started([Demand("held", 3, held=True), small], EIGHT[:1]) == {"held": None, "small": [0]}


def test_what_can_never_start_keeps_nothing_from_others() -> None:
    seven = EIGHT[:7]
    demands = [Demand("eight", 8), Demand("lost", 2, (6, 7)), Demand("other", 1, allowed=frozenset())]
    assert started([*demands, Demand("small", 3)], seven) == dict.fromkeys(("eight", "lost", "other")) | {
        "small": [0, 1, 2]
    }
    texts = [decision.text() for decision in decide(demands, Machine(seven, {}))]
    assert texts[0].startswith("Needs 8 GPUs that it could use; there are only 7 now.")
    assert texts[1].startswith("Needs GPU 7, which is not available")
    assert texts[2].startswith("Needs 1 GPU that it could use; there are only 0 now.")


def test_the_emptiest_gpus_are_taken_and_then_the_first() -> None:
    uneven = [gpu(0, 78), gpu(1, 79), gpu(2, 79), gpu(3, 79)]
    assert started([Demand("one", 1)], uneven) == {"one": [1]}
    assert started([Demand("two", 2), Demand("third", 1)], uneven) == {"two": [1, 2], "third": [3]}
    assert started([Demand("ordered", 2, (3, 1))], uneven) == {"ordered": [3, 1]}
    assert started([Demand("huge", 1, memory=500 * GB)], uneven) == {"huge": [1]}  # its owner wants to try it


def test_slices_are_for_runs_with_one_process() -> None:
    slices = [Gpu(100 + number, f"MIG-{number}", "slice", 10 * GB, 9 * GB, 9.0) for number in range(3)]
    assert started([Demand("two", 2), Demand("small", 1)], slices) == {"two": None, "small": [100]}
    both = [*slices, gpu(0), gpu(1)]
    assert started([Demand("two", 2), Demand("small", 1)], both) == {"two": [0, 1], "small": [100]}


def test_processes_of_others_are_seen_by_what_they_use() -> None:
    demand = Demand("run", 1)
    assert started([demand], [gpu(0, processes=(GpuProcess(5, 100 << 20),))]) == {"run": [0]}  # a monitor
    assert started([demand], [gpu(0, processes=(GpuProcess(5, 300 << 20),))]) == {"run": None}
    assert started([demand], [gpu(0, processes=(GpuProcess(5),))]) == {"run": None}  # its memory is not reported
    assert started([demand], [gpu(0, 70)]) == {"run": None}  # in a container, no process is seen
    assert started([demand], [Gpu(0, "GPU-0", "NVIDIA GB10", 0, 0, 12.1)]) == {"run": [0]}


def test_a_run_that_waits_says_what_for_in_both_languages() -> None:
    gpus = [gpu(0), gpu(1, 49, processes=(GpuProcess(812, 30 * GB),)), gpu(2), gpu(3)]
    machine = Machine(gpus, {"GPU-0": "tiny/lora/a (ada)"})
    first, second = decide([Demand("b", 3, memory=20 * GB), Demand("c", 1)], machine)
    assert first.text() == (
        "Needs 3 GPUs with about 21.5 GB of memory; 2 are free. "
        "GPU 0: tiny/lora/a (ada); GPU 1: 32.2 GB used by other programs (process 812)"
    )
    assert first.text("zh").endswith("显卡 0：tiny/lora/a (ada)；显卡 1：其他程序占用 32.2 GB（进程 812）")
    assert second.text().startswith("Needs 1 GPU; 0 are free. GPU 0: tiny/lora/a (ada); GPU 1: 32.2 GB used by")
    assert second.text().endswith("(process 812); GPU 2: kept for b; GPU 3: kept for b")
    [on_cpu] = decide([Demand("d", 0)], Machine([], {}, on_cpu=list("efgh")))
    assert on_cpu.text() == "Waits for the CPU. Before it: e, f, g, …."
    two = [Demand("d", 0, memory=9 * 10**9)] * 2
    assert [decision.starts for decision in decide(two, Machine([], {}, lanes=2, free_memory=10**10))] == [True, False]
    [narrow] = decide(two[:1], Machine([], {}, lanes=2, on_cpu=["e"], free_memory=10**9))
    assert narrow.text() == "Needs about 9.0 GB of memory; the runs in progress leave 1.0 GB."


def test_no_gpu_is_given_twice_and_nobody_is_delayed_by_a_later_run() -> None:
    draw = random.Random(7)
    for _ in range(400):
        gpus = []
        for index in range(draw.randint(0, 8)):
            memory, busy = draw.choice([24, 80]), draw.random() < 0.3
            gpus.append(gpu(index, memory - 1 - 20 * busy, memory=memory, processes=(GpuProcess(1, 20 * GB),) * busy))
        taken = {device.uuid for device in gpus if draw.random() < 0.3}
        demands = [
            Demand(
                str(number),
                draw.randint(0, 4),
                memory=draw.choice([0, 10, 60, 500]) * GB,
                beside_others=draw.random() < 0.2,
                held=draw.random() < 0.2,
            )
            for number in range(draw.randint(0, 8))
        ]
        assert broken_rules(demands, Machine(gpus, dict.fromkeys(taken, "x"))) == []


def broken_rules(demands: list[Demand], machine: Machine) -> list[str]:
    """Which rules of the queue the decisions about these runs break."""
    decisions = decide(demands, machine)
    used = [device.uuid for decision in decisions for device in decision.gpus]
    broken = []
    if len(used) != len(set(used)) or set(used) & set(machine.taken):
        broken.append("a GPU is used twice")
    for number, (demand, decision) in enumerate(zip(demands, decisions, strict=True)):
        if demand.held and decision.starts:
            broken.append("a run on hold starts")
        if len(decision.gpus) != (demand.count if decision.starts else 0):
            broken.append("another number of GPUs than needed")
        if not demand.beside_others and any(device.processes for device in decision.gpus):
            broken.append("a run starts beside others")
        if decide(demands[: number + 1], machine)[number] != decision:
            broken.append("what a run gets depends on those behind it")
        if not decision.starts and not demand.held and not demand.on_cpu:
            later = {device.uuid: "y" for behind in decisions[number + 1 :] for device in behind.gpus}
            alone, beside = (
                decide([demand], Machine(machine.gpus, taken))[0] for taken in (machine.taken, machine.taken | later)
            )
            if alone.starts != beside.starts:
                broken.append("a later run takes what a run could use now")
    return broken
