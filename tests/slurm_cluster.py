"""A real Slurm of two machines in a private folder: a controller and two node daemons on loopback, on free ports,
without munge, systemd or cgroups. Ended by pid."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import subprocess
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from engine.core.rundir import write_json
from tests import hold, nvml
from tests.find_slurm import missing, program
from tests.ports import reserved_ports
from tests.preloaded import PROJECT, REAL_POPEN

CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
MessageTimeout=2
GresTypes=gpu
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
KillWait=3
SlurmctldTimeout=10
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[0]} CPUs={cores} Gres=gpu:1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores} Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GPUS = "Name=gpu File=/dev/null\n"  # what Slurm takes for a GPU; the machine has none
GPUS_SEEN = "ATHANOR_TEST_NODE_GPUS"  # a variable: the programs of a job see a GPU on its node (`tests.nvml`)
# The supervisor on a node forks what it starts, as the tests do; and so do the programs of srun, which then only wait.
START = """\
import os, subprocess, sys
program = sys.orig_argv[2] if sys.orig_argv[1:2] == ["-m"] else ""
batch = "engine.runs.slurm_batch", "engine.serving.slurm_batch"
if program in (*batch, "engine.worker.launch", "engine.worker.check_ranks"):
    from tests.forked import fork_programs
    fork_programs()
if program.startswith("engine.worker."):
    os._exit(subprocess.Popen([sys.executable, *sys.orig_argv[1:]]).wait() & 0xFF)
"""


@dataclass
class Cluster:
    """The daemons, by name. `variables`: for every command, so that it asks this Slurm."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def configuration(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def variables(self) -> dict[str, str]:
        start = f"{PROJECT}{os.pathsep}{self.folder / 'start'}"
        return {"SLURM_CONF": str(self.configuration), "PYTHONPATH": start}

    def start(self, name: str) -> None:
        """Start a daemon: slurmctld, or the slurmd of a node, by the node's name."""
        daemon = "slurmctld" if name == "slurmctld" else "slurmd"
        node = [] if name == "slurmctld" else ["-N", name]
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = REAL_POPEN(
                [program(daemon), "-D", *node, "-f", self.configuration],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def stop(self, name: str) -> None:
        """Stop a daemon. A slurmctld saves its jobs first; without that, it would not know those of the last seconds
        when it is started again, and end them."""
        self.daemons[name].terminate()
        self.daemons.pop(name).wait(120)

    def command(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(words, env=os.environ | self.variables, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def wait_until_idle(self, limit_s: float = 120) -> None:
        """Wait until both nodes can take a job."""
        deadline = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(subprocess.CalledProcessError):
                if self.command("sinfo", "--noheader", "--format=%T %D") == "idle 2":
                    return
            assert time.monotonic() < deadline, (self.folder / "slurmctld.out").read_text()[-3000:]
            time.sleep(0.1)

    def end(self) -> None:
        """End the daemons, and the processes of their jobs, which wait for each other if they are asked to end."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                if variables.get("SLURM_CONF") == str(self.configuration) and "SLURM_JOB_ID" in variables:
                    for step in [parent for parent in process.parents() if parent.name() == "slurmstepd"]:
                        step.kill()
                    process.kill()


@contextlib.contextmanager
def running_cluster(folder: Path, cores: int = 2) -> Iterator[Cluster]:
    """Two nodes that are ready for jobs."""
    assert not missing(), f"Slurm is not installed ({', '.join(missing())}): python -m tests.find_slurm"
    for name in ("state", "spool-n1", "spool-n2", "start"):
        (folder / name).mkdir()
    seen = f"import os\nif {GPUS_SEEN!r} in os.environ:\n{textwrap.indent(nvml.AT_START, '    ')}"
    (folder / "start" / "sitecustomize.py").write_text(seen + START + hold.START, encoding="utf-8")
    shutil.copy(nvml.LIBRARY, folder / "start" / "pynvml.py")
    write_json(folder / "start" / "answer.json", {"gpus": [{"uuid": "GPU-0", "memory": 80 << 30, "free": 79 << 30}]})
    cluster = Cluster(folder)
    (folder / "gres.conf").write_text(GPUS, encoding="utf-8")
    with reserved_ports(3) as ports:
        values = {"user": getpass.getuser(), "folder": folder, "port": ports[0], "ports": ports[1:], "cores": cores}
        cluster.configuration.write_text(CONFIGURATION.format(**values), encoding="utf-8")
        try:
            for name in ("slurmctld", "n1", "n2"):
                cluster.start(name)
            cluster.wait_until_idle()
            yield cluster
        finally:
            cluster.end()
