"""Leases of GPUs: a lock for each GPU, named by its UUID, in one folder for the whole machine.

Whoever computes on a GPU holds its lease: the supervisor of a run or the process of a chat server, and with it every
process that it has started. So two studios, two users and a shell never use one GPU at the same time, whatever their
saves folders. A lease ends with the last of these processes, however it was killed. Containers share leases only if
they share the folder.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.core.locks import byte_is_locked, lock_byte, unlock_byte
from engine.core.problems import Problem, Refusal, problem
from engine.core.repetition import repeat

FOLDER_VARIABLE = "ATHANOR_LEASES"
HELD_VARIABLE = "ATHANOR_HELD_LEASES"  # of the processes of a holder: the UUIDs, separated by commas
OWNER_VARIABLE = "ATHANOR_LEASE_OWNER"  # of the same: `Holder.owner`
SETUP_SECONDS = 5.0  # taking a lease lasts microseconds, but a process may be suspended in the midst of it
TOUCH_SECONDS = 3600.0  # what deletes old files in /tmp goes by their age
MAX_HOLDER_BYTES = 4096
WAITING_PREFIX, WAITING_SECONDS = ".waiting-", 15.0  # a studio's tick, every two seconds, renews it
# Three bytes of a lock file. The first is locked by the one who takes the lease, and stays so in processes that inherit
# the descriptor; the second is shared by all that join it themselves; the third is locked while a lease is being taken.
HOLDER_BYTE, MEMBER_BYTE, SETUP_BYTE = 0, 1, 2
SERVER_KINDS = ("chat", "vllm")  # of holders that are servers: they answer with transformers, or with vLLM


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. For people: the lock alone decides."""

    what: str  # the name of a run or a model
    kind: str  # a kind of run, or one of SERVER_KINDS
    user: str = ""  # of the operating system
    by: str = ""  # of the studio
    saves: str = ""  # the saves folder
    since: float = 0.0  # seconds since 1970
    owner: str = ""  # whose processes may join: the folder of a run, or the kind of those that share a GPU

    @property
    def is_server(self) -> bool:
        """Whether it is a chat server and not a run."""
        return self.kind in SERVER_KINDS

    @property
    def text(self) -> str:
        """Its name, and whose it is."""
        person = self.by or self.user
        return f"{self.what} ({person})" if person else self.what


def folder() -> Path:
    """The folder of the lock files: ATHANOR_LEASES, otherwise one that every user of this machine can write to."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    shared = Path("/run/lock")
    with contextlib.suppress(OSError):
        if shared.stat().st_mode & stat.S_IWOTH:
            return shared / "athanor"
    return Path("/tmp/athanor-leases")


def obstacle() -> Problem | None:
    """Why no lease can be taken: the folder cannot be used, or has no locks of this kind."""
    try:
        _make_folder(folder())
        with tempfile.TemporaryFile(dir=folder()) as probe:
            lock_byte(probe.fileno(), HOLDER_BYTE, shared=False)
            byte_is_locked(probe.fileno(), HOLDER_BYTE)
    except OSError as error:
        return problem("leases-not-writable", "hardware.device", folder=folder(), why=error.strerror or error)
    return None


def take(uuids: Iterable[str], holder: Holder) -> list[int] | None:
    """Take the leases of all these GPUs, or of none if another holds one of them. Returns the descriptors that hold
    them; None if they could not be taken. Raises OSError if the folder cannot be used."""
    with contextlib.ExitStack() as undo:
        descriptors = []
        for uuid in sorted(uuids):
            descriptor = _prepared(uuid, undo)
            if descriptor is None or byte_is_locked(descriptor, MEMBER_BYTE):
                return None
            if not lock_byte(descriptor, HOLDER_BYTE, shared=False):
                return None
            descriptors.append(descriptor)
        for descriptor in descriptors:
            _write(descriptor, holder)
            unlock_byte(descriptor, SETUP_BYTE)
        undo.pop_all()
        return descriptors


def take_beside(uuid: str, holder: Holder) -> list[int] | None:
    """Share the lease of a GPU with holders of the same kind. Returns the descriptors that hold it; None if the holder
    is of another kind. Raises OSError."""
    with contextlib.ExitStack() as undo:
        descriptor = _prepared(uuid, undo)
        if descriptor is None:
            return None
        is_held = byte_is_locked(descriptor, HOLDER_BYTE) or byte_is_locked(descriptor, MEMBER_BYTE)
        if is_held and _read(os.pread(descriptor, MAX_HOLDER_BYTES, 0)).kind != holder.kind:
            return None
        lock_byte(descriptor, MEMBER_BYTE, shared=True)
        if not is_held:
            _write(descriptor, holder)
        unlock_byte(descriptor, SETUP_BYTE)
        undo.pop_all()
        return [descriptor]


def _prepared(uuid: str, undo: contextlib.ExitStack) -> int | None:
    """The lock file of a GPU, which nobody else takes or shares at the same moment: what is written in it belongs to
    those who hold it. None if somebody does. `undo` closes it."""
    descriptor = _open(uuid, create=True)
    undo.callback(os.close, descriptor)
    if not lock_byte(descriptor, SETUP_BYTE, shared=False):
        return None
    there = os.stat(folder() / uuid)
    return descriptor if os.path.samestat(there, os.fstat(descriptor)) else None  # deleted in the meantime


def _write(descriptor: int, holder: Holder) -> None:
    content = json.dumps(asdict(holder) | {"user": _user(), "since": time.time()}).encode()
    with contextlib.suppress(OSError):  # the disk is full; the lock alone decides
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content[:MAX_HOLDER_BYTES], 0)


def environment(uuids: Iterable[str], owner: str) -> dict[str, str]:
    """The variables with which the processes of a holder can `join` its leases."""
    return {HELD_VARIABLE: ",".join(uuids), OWNER_VARIABLE: owner}


def join() -> list[int]:
    """Hold the leases of the run that this process belongs to, as its environment names them, until it ends, even if
    all others of the run end before. Returns the descriptors, for passing on to a child. Raises Refusal if all others
    have ended before this one has begun, and somebody else has the lease."""
    descriptors = []
    for uuid in filter(None, os.environ.get(HELD_VARIABLE, "").split(",")):
        with contextlib.suppress(OSError):
            descriptors.append(_open(uuid))
            lock_byte(descriptors[-1], MEMBER_BYTE, shared=True)
            holder = _settled_holder(descriptors[-1])
            if holder.owner not in ("", plain(os.environ.get(OWNER_VARIABLE, holder.owner))):
                for descriptor in descriptors:
                    os.close(descriptor)
                raise Refusal(problem("lease-of-another", "hardware.device", uuid=uuid, who=holder.text))
    return descriptors


def _settled_holder(descriptor: int) -> Holder:
    """What is written in a lease of which a byte is locked here. Nobody begins to take it any more, but somebody may
    have begun before."""
    deadline = time.monotonic() + SETUP_SECONDS
    while byte_is_locked(descriptor, SETUP_BYTE) and time.monotonic() < deadline:
        time.sleep(0.01)
    return _read(os.pread(descriptor, MAX_HOLDER_BYTES, 0))


def touch(uuids: Iterable[str]) -> None:
    """Make the lock files of leases look used: whoever finds one deleted takes the lease, though another holds it."""
    for uuid in uuids:
        with contextlib.suppress(OSError):
            os.utime(folder() / uuid)


def keep_touched(uuids: Sequence[str]) -> None:
    """`touch` them again and again for as long as this process lives."""
    if uuids:
        repeat(functools.partial(touch, uuids), TOUCH_SECONDS)


def holders() -> dict[str, Holder]:
    """The GPUs that are leased at the moment, by UUID, and who holds them."""
    try:
        names = os.listdir(folder())
    except OSError:
        return {}
    return {name: holder for name in names if not name.startswith(".") and (holder := _holder(name))}


def note_waiting(uuid: str) -> None:
    """Let the holder of a lease know that a run waits for the GPU: a chat server that is idle then ends sooner."""
    with contextlib.suppress(OSError):
        path = folder() / f"{WAITING_PREFIX}{uuid}"
        if not path.exists():
            path.touch()
            path.chmod(0o666)
        os.utime(path)


def somebody_waits(uuid: str) -> bool:
    """Whether `note_waiting` has been called for the GPU in the last seconds."""
    try:
        return time.time() - (folder() / f"{WAITING_PREFIX}{uuid}").stat().st_mtime < WAITING_SECONDS
    except OSError:
        return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without an entry, as in many containers
        return str(os.getuid())


def _holder(uuid: str) -> Holder | None:
    """None if nobody has leased the GPU. A lock file that cannot be used counts as leased: nobody can take it."""
    try:
        descriptor = _open(uuid)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Holder(f"{folder() / uuid}: {error.strerror or error}", "")
    try:
        if byte_is_locked(descriptor, HOLDER_BYTE) or byte_is_locked(descriptor, MEMBER_BYTE):
            return _read(os.pread(descriptor, MAX_HOLDER_BYTES, 0))
        # Somebody is taking it, and nobody else can; what is written there is of the last holder.
        return Holder(str(folder() / uuid), "") if byte_is_locked(descriptor, SETUP_BYTE) else None
    except OSError as error:
        return Holder(f"{folder() / uuid}: {error.strerror or error}", "")
    finally:
        os.close(descriptor)


def _read(content: bytes) -> Holder:
    """Any user of the machine may have written it, so it may be anything."""
    fields: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        fields = value if isinstance(value, dict) else {}
    texts = {name: plain(str(fields.get(name, ""))) for name in ("what", "kind", "user", "by", "saves", "owner")}
    since = fields.get("since")
    return Holder(**texts, since=since if isinstance(since, (int, float)) else 0.0)


def plain(text: str) -> str:
    """Text for a page or a terminal: without control characters, and in valid UTF-8."""
    return "".join(character if character.isprintable() else "�" for character in text)


def _open(uuid: str, create: bool = False) -> int:
    """The lock file of a GPU. Raises OSError.

    Users of the machine share it, so it is never opened through a link, and what exists is opened without O_CREAT,
    which the kernel forbids for files of others in a folder like /tmp (fs.protected_regular).
    """
    path = folder() / uuid
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        if not create:
            raise
        descriptor = _create(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a file")
    return descriptor


def _create(path: Path, flags: int) -> int:
    """A lock file that every user may lock. It appears with its permissions, or not at all."""
    _make_folder(path.parent)
    handle, hidden = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        os.fchmod(handle, 0o666)  # whatever the umask is
        with contextlib.suppress(FileExistsError):  # created by another at the same moment
            os.link(hidden, path)
    finally:
        os.close(handle)
        os.unlink(hidden)
    return os.open(path, flags)


def _make_folder(path: Path) -> None:
    """Create it unless it exists, so that every user may add a lock file. Raises OSError."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = tempfile.mkdtemp(prefix=".new-", dir=path.parent)
    os.chmod(hidden, 0o1777)
    try:
        os.rename(hidden, path)
    except OSError:
        os.rmdir(hidden)
        if not path.is_dir():  # otherwise created by another at the same moment
            raise
