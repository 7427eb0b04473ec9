"""RDMA without an RDMA device: verbs in software, for Mooncake's own RDMA transport."""

from __future__ import annotations

from typing import Literal

Transport = Literal["tcp", "rdma"]
"""What Mooncake writes with in the lab."""

NIC = "softnic"
"""The process that stands for a process's RDMA devices, as `ps` shows it."""
