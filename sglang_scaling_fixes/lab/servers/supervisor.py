"""Runs one command so that nothing of it outlives the lab.

    python -I supervisor.py [--new-netns | --netns FILE] [--scratch FOLDER] -- COMMAND...

Standard input is a pipe whose other end only the lab process holds.  When it closes
(the lab asked for it, ended, or was killed) every descendant is killed, by pid, and
the scratch folder removed.  As a subreaper the supervisor stays the ancestor of orphans,
so that none is missed; should the supervisor itself be killed, its child dies with it.
Standard library only, and imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.2
TRACKERS_S = 5.0
_SHM = "/dev/shm/"

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def enter_netns(path: str) -> None:
    """Move the calling thread into the network namespace that file `path` stands for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _check(_libc.setns(descriptor, CLONE_NEWNET), "setns")
    finally:
        os.close(descriptor)


def descendants(pid: int) -> list[int]:
    """Pids of the living descendants of `pid`, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry))
    found: list[int] = []
    pending = [pid]
    while pending:
        for child in children.get(pending.pop(), []):
            found.append(child)
            pending.append(child)
    return found


def _shared_memory(pids: list[int]) -> set[str]:
    """Files in /dev/shm that these processes have mapped."""
    files = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
            files |= {line[line.index(_SHM) :].rstrip() for line in maps if _SHM in line}
    return files


def _is_tracker(pid: int) -> bool:
    """Whether this is Python's resource tracker, which removes semaphores and then ends."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"resource_tracker" in file.read()
    except OSError:
        return False


def _kill_descendants() -> None:
    """Kill them all, and remove the shared memory that a killed process leaves behind."""
    leftovers: set[str] = set()
    trackers_end = time.monotonic() + TRACKERS_S
    while pids := descendants(os.getpid()):
        leftovers |= _shared_memory(pids)
        for pid in pids:
            if time.monotonic() < trackers_end and _is_tracker(pid):
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        select.select([], [], [], 0.02)
    for path in leftovers:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _die_with_supervisor() -> Callable[[], None]:
    supervisor = os.getpid()

    def prepare() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)

    return prepare


def _supervise(command: list[str]) -> int:
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_supervisor(),  # noqa: PLW1509 - the supervisor has one thread
    )
    while True:
        readable, _, _ = select.select([0], [], [], POLL_S)
        if readable and not os.read(0, 4096):
            return 0
        status = child.poll()
        if status is not None:
            return status if status >= 0 else 128 - status


def main(arguments: list[str]) -> int:
    split = arguments.index("--")
    options, command = arguments[:split], arguments[split + 1 :]
    scratch = options[options.index("--scratch") + 1] if "--scratch" in options else None

    def end(_number: int, _frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
    if "--new-netns" in options:
        _check(_libc.unshare(CLONE_NEWNET), "unshare")
    if "--netns" in options:
        enter_netns(options[options.index("--netns") + 1])
    try:
        return _supervise(command)
    finally:
        _kill_descendants()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
