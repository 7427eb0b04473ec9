"""Which SGLang and which Mooncake this environment has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sglang_scaling_fixes import machine
from sglang_scaling_fixes.attach import LAST_RELEASE

MOONCAKE_DISTRIBUTIONS = (
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "mooncake-transfer-engine-non-cuda",
    "mooncake-transfer-engine-npu",
)
ACKNOWLEDGED_TCP_SINCE = (0, 3, 12)
"""First Mooncake whose TCP transport reports success after the receiver has the bytes
(protocol v2). Before, or with MC_TCP_PROTO=1, success means "in the sender's socket"."""


def version_tuple(text: str) -> tuple[int, ...]:
    """Numeric parts of a version, `.postN` appended: `"0.5.12.post1"` -> `(0, 5, 12, 1)`."""
    match = re.match(r"(\d+(?:\.\d+)*)(?:\.post(\d+))?", text)
    if match is None:
        return ()
    numbers = tuple(int(part) for part in match.group(1).split("."))
    return (*numbers, int(match.group(2))) if match.group(2) else numbers


def sglang_version() -> str | None:
    """The installed release of SGLang, None when there is none."""
    return machine.here.version("sglang")


def untested(version: str) -> str | None:
    """Why nobody has tested this project with this release of SGLang; None where it was tested.

    That decides nothing: a probe does. It tells what the words of the documents are worth.
    """
    if version_tuple(version) > version_tuple(LAST_RELEASE):
        return f"newer than any release that was tested, the last is {LAST_RELEASE}"
    return None


@dataclass(frozen=True)
class Mooncake:
    """The installed Mooncake and the transport its environment selects."""

    version: str
    distribution: str
    protocol: str
    """`"rdma"`, `"tcp-v1"` (success unproven) or `"tcp-v2"` (acknowledged)."""
    unproven: str = ""
    """Why it may write in another way, of which nothing is known here; with the remedy."""

    @property
    def success_means_landed(self) -> bool:
        return self.protocol != "tcp-v1"


def mooncake() -> Mooncake | None:
    """What is installed, None when there is no Mooncake."""
    version = machine.here.version
    wheels = {name: found for name in MOONCAKE_DISTRIBUTIONS if (found := version(name))}
    for name, found in wheels.items():
        return Mooncake(found, name, _protocol(found), _overlaid(wheels) or _unproven(name))
    return None


def mooncake_problem(found: Mooncake | None) -> str | None:
    """Why safe reclaim cannot rely on this Mooncake, with the remedy; None when it can."""
    if found is None:
        return (
            "Mooncake is not installed; pip install mooncake-transfer-engine "
            "(without a GPU: mooncake-transfer-engine-non-cuda)"
        )
    if found.unproven:
        return found.unproven
    if not found.success_means_landed:
        return (
            f"Mooncake {found.version} speaks TCP protocol v1, whose success does not mean "
            "that the bytes have landed; use Mooncake 0.3.12 or later without MC_TCP_PROTO=1"
        )
    return None


OFF = frozenset({"", "0", "false", "no", "n", "off", "none"})
"""How switches that have a value read as off. Of most of its own Mooncake only looks whether they
are set at all."""
_OTHER_ENGINES = {"MC_USE_TENT": "TENT", "MC_USE_TEV1": "TENT"}
_OTHER_TRANSPORTS = {
    "MC_FORCE_MNNVL": "NVLink",
    "MC_INTRANODE_NVLINK": "NVLink",
    "MC_FORCE_MUSA": "MUSA",
    "MC_CXL_DEV_PATH": "CXL",
}
_OTHER_SWITCHES = {
    "USE_BAREX": "Barex",
    "ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE": "Ascend",
    "SGLANG_MOONCAKE_CUSTOM_MEM_POOL": "NVLink or Barex",
}
"""Variables that make Mooncake write in ways whose success is not shown to mean landed, or whose
sender keeps decode's memory mapped whatever decode closes. All but the engines yield to
MC_FORCE_TCP (transfer_engine_impl.cpp)."""


def _overlaid(wheels: dict[str, str]) -> str:
    """Why nobody knows which of these distributions is in use, empty if there is one."""
    if len(wheels) == 1:
        return ""
    names = " and ".join(f"{name} {version}" for name, version in wheels.items())
    return (
        f"{names} are installed over each other, so that nobody knows which of them writes; "
        "pip uninstall all of them and install one"
    )


def _unproven(distribution: str) -> str:
    """Why this environment may select neither RDMA nor TCP, empty if it does not."""
    forced = _tcp_forced()
    asked = {**_OTHER_ENGINES, **({} if forced else _OTHER_TRANSPORTS)}
    env = machine.here.env
    found = {name: what for name, what in asked.items() if name in env}
    for name, what in {} if forced else _OTHER_SWITCHES.items():
        if env.get(name, "").lower() not in OFF:
            found[name] = what
    for name, what in found.items():
        return (
            f"{name}={env[name]}: Mooncake over {what} is not proven to tell when a write "
            "has landed or can no longer land; unset it, or start with --plugin none"
        )
    protocol = (env.get("MOONCAKE_PROTOCOL") or "rdma").lower()
    if not forced and protocol not in ("rdma", "tcp"):
        return (
            f"MOONCAKE_PROTOCOL={protocol}: only rdma and tcp are proven; choose one of them, or "
            "start with --plugin none"
        )
    if forced or distribution.endswith("-non-cuda"):
        return ""
    if distribution.endswith("-npu"):
        return (
            f"{distribution} writes over Ascend, whose success proves nothing; set MC_FORCE_TCP=1, "
            "or start with --plugin none"
        )
    return "" if machine.here.rdma().devices else without_rdma(distribution)


def _tcp_forced() -> bool:
    return bool(machine.here.env.get("MC_FORCE_TCP"))


def needs_rdma(found: Mooncake) -> bool:
    """Whether it must have opened an RDMA device: it may choose its transport, and not only TCP."""
    cuda = not found.distribution.endswith("-non-cuda")
    return not _tcp_forced() and (cuda or found.protocol == "rdma")


def without_rdma(distribution: str) -> str:
    """What to say where Mooncake has no RDMA device to write with, and is not told to use TCP."""
    doubt = machine.here.rdma().doubt
    other = "TCP" if distribution.endswith("-non-cuda") else "NVLink, whose success proves nothing"
    return (
        f"there is no RDMA device to use here{doubt and f' ({doubt})'}, and {distribution} may "
        f"then write over {other}; set MC_FORCE_TCP=1, or make a device usable (its port active, "
        "/sys and /dev/infiniband in the container)"
    )


_NAMES_DEVICES = ("MC_CUSTOM_TOPO_JSON", "MC_FORCE_HCA")
"""Variables with which Mooncake does not go by what it finds."""


def mooncake_retries() -> bool:
    """Whether Mooncake may submit a failed batch again by itself: once per RDMA device it sees.

    True where in doubt: then a write is submitted once, which is right without devices too.
    """
    return machine.here.rdma().possible or any(name in machine.here.env for name in _NAMES_DEVICES)


POSTS = "MC_RETRY_CNT"
"""How often Mooncake's RDMA transport posts a slice that failed (its own default: 9)."""


def posts_again() -> str | None:
    """What is wrong with this environment's `POSTS`, None if a write is posted once or by TCP.

    A slice that had no answer is posted again, over another device if either side has one, and
    nobody ends the queue pair of the first try. Status 0 may then be the second try's, while
    bytes of the first are on the network (`tests/mooncake/test_two_rails.py`). Which devices the
    other side has, nobody here knows.
    """
    found = machine.here.env.get(POSTS)
    if found == "1" or _tcp_forced() or not mooncake_retries():
        return None
    return (
        f"{POSTS}{' is not set' if found is None else f'={found}'}: over RDMA a failed write would "
        f"be posted again while the first one may still land; set {POSTS}=1 (safe-reclaim does so "
        "by itself where it is not set at the start), or start with --plugin none"
    )


def _protocol(version: str) -> str:
    """How Mooncake writes if it can open the devices it sees (see `needs_rdma`).

    Without a device it falls back to TCP on its own. MOONCAKE_PROTOCOL changes nothing: its
    wheels take what they find, whichever protocol SGLang hands them (transfer_engine_impl.cpp).
    """
    if not _tcp_forced() and machine.here.rdma().devices:
        return "rdma"
    old = version_tuple(version)[:3] < ACKNOWLEDGED_TCP_SINCE
    return "tcp-v1" if old or machine.here.env.get("MC_TCP_PROTO") == "1" else "tcp-v2"
