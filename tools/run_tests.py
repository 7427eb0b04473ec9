"""Everything `make test` runs, in order, each step timed; the last line is the sum.

    lint              ruff and mypy: seconds, and first to say what is wrong
    stock wheels      download what the contract tests read, once
    lab               the release that tests start beside the one of .venv
    fast tests        what talks to real sockets, engines and ranks: side by side, no server.
                      Not beside e2e: ranks take memory of which stock's HiCache wants 10 GB free
    e2e               real servers, one test at a time; beside it, on what CPU it leaves:
    background        tests that only compute, or import SGLang in many processes

With `long` as its argument it runs only the tests on real servers that are marked so: more than
CI has time for. `docs/measured.md` says when they last passed.

A failed step does not stop the next: one run shows all there is to mend. The
exit status is 0 only if every step passed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LAB_RELEASE = "0.5.12"
PATIENT = {"tests/contract", "tests/starts", "tests/unit"}  # may wait for a core for seconds
SLOW = {"tests/e2e", "tests/gpu"}  # serial; and for machines with a GPU, by hand
SIDE_BY_SIDE = ("-n", "auto", "--dist=worksteal")
NO_TESTS_COLLECTED = 5

TOTALS: Counter[str] = Counter()
STARTED = time.monotonic()


class LeastMemory(threading.Thread):
    """What is available at the least. Where it is little, pages of programs are read from the disk
    again and again, and every test crawls."""

    gib = float("inf")

    def run(self) -> None:
        while True:
            if found := re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text()):
                self.gib = min(self.gib, int(found[1]) / 2**20)
            time.sleep(2)


MEMORY = LeastMemory(daemon=True)


def main() -> int:
    MEMORY.start()
    if sys.argv[1:] == ["long"]:
        step("lab", BIN / "sglang-scaling-fixes", "lab", "install", LAB_RELEASE)
        pytest("long e2e", ["tests/e2e"], "-n", "0", "-m", "long")
        return finish()
    for name, *command in (
        ("ruff", BIN / "ruff", "check", "."),
        ("ruff format", BIN / "ruff", "format", "--check", "--quiet", "."),
        ("mypy", BIN / "mypy"),
        ("stock wheels", sys.executable, "tests/contract/wheels.py"),
        ("lab", BIN / "sglang-scaling-fixes", "lab", "install", LAB_RELEASE),
    ):
        step(name, *command)
    # All but those below, so that a new folder is never left out.
    folders = {f"tests/{p.name}" for p in (ROOT / "tests").iterdir() if p.is_dir()} - SLOW
    pytest("fast tests", sorted(folders - PATIENT), *SIDE_BY_SIDE)
    with beside("background", sorted(PATIENT), *SIDE_BY_SIDE):
        pytest("e2e", ["tests/e2e"], "-n", "0", "-m", "e2e and not long")
    return finish()


def step(name: str, *command: object) -> bool:
    """Run a command that either passes or counts as one error."""
    passed = run(name, *command) == 0
    TOTALS["errors"] += not passed
    return passed


def pytest(name: str, folders: list[str], *options: str) -> None:
    """Run the tests below `folders`, and count them."""
    judge(name, run(name, *tests(name, folders, *options)))


@contextlib.contextmanager
def beside(name: str, folders: list[str], *options: str) -> Iterator[None]:
    """Run the tests below `folders` during the block, and after it until they end.

    Whatever else wants a core gets it first: nice alone counts among the processes of one session
    (sched_autogroup), so theirs is nice as a whole, too. What they print comes at their end.
    """
    began = time.monotonic()
    say(f"{name} (beside what follows) ...")
    log = ROOT / ".cache" / f"tests-{name}.log"
    with log.open("w") as output:
        child = subprocess.Popen(
            ["nice", "-n", "19", *tests(name, folders, *options)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with contextlib.suppress(OSError):  # a kernel without
            Path(f"/proc/{child.pid}/autogroup").write_text("19")
        try:
            yield
            status = child.wait()
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
                child.wait()
    print(log.read_text(errors="replace"), flush=True)
    say(f"{name}: {verdict(status)}, {time.monotonic() - began:.0f} s in all")
    judge(name, status)


def tests(name: str, folders: list[str], *options: str) -> list[str]:
    """The command that runs the tests below `folders`, and reports to `report_of(name)`."""
    report = report_of(name)
    report.unlink(missing_ok=True)
    return [sys.executable, "-m", "pytest", *folders, *options, f"--junit-xml={report}"]


def report_of(name: str) -> Path:
    return ROOT / ".cache" / f"tests-{name.replace(' ', '-')}.xml"


def judge(name: str, status: int) -> None:
    """Count what pytest, which ended with this status, reported."""
    report = report_of(name)
    if status == NO_TESTS_COLLECTED:
        say(f"{name}: files of tests, and pytest found none in them")
    counted = count(report) if report.exists() else Counter[str]()
    # A crash, a bad option, an empty selection: pytest failed without a failed test.
    if status and not counted["failed"] + counted["errors"]:
        counted["errors"] += 1
    TOTALS.update(counted)


def count(report: Path) -> Counter[str]:
    """Results of a JUnit report, in pytest's words."""
    found: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):
        results = {child.tag for child in case}
        if "failure" in results:
            found["failed"] += 1
        elif "error" in results:
            found["errors"] += 1
        elif "skipped" in results:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found


def run(name: str, *command: object) -> int:
    say(f"{name} ...")
    began = time.monotonic()
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, stdin=subprocess.DEVNULL, check=False
    )
    say(f"{name}: {verdict(done.returncode)}, {time.monotonic() - began:.0f} s")
    return done.returncode


def verdict(status: int) -> str:
    return "ok" if status == 0 else f"FAILED (exit status {status})"


def say(text: str) -> None:
    print(f"[test {time.monotonic() - STARTED:4.0f}s] {text}", flush=True)


def finish() -> int:
    say(f"memory: {MEMORY.gib:.1f} GiB were available at the least")
    order = ("failed", "passed", "skipped", "errors")
    parts = [f"{TOTALS[word]} {word}" for word in order if TOTALS[word]] or ["no tests ran"]
    text = f" {', '.join(parts)} in {time.monotonic() - STARTED:.2f}s "
    print(text.center(80, "="), flush=True)
    return 1 if TOTALS["failed"] or TOTALS["errors"] or not TOTALS["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
