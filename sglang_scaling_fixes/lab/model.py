"""The lab's random checkpoint, made once and cached in the lab home."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from sglang_scaling_fixes.lab import weights
from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.install import Environment, lab_home

# K and V of every layer, float32.
KV_BYTES_PER_TOKEN = 2 * weights.LAYERS * weights.HEADS * weights.HEAD_DIM * 4
VOCAB = weights.VOCAB


def checkpoint(environment: Environment, seed: int = 1) -> Path:
    """The folder of the checkpoint of `seed`, the same bytes for every release."""
    script = Path(weights.__file__)
    recipe = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    folder = lab_home() / "models" / f"llama-{seed}-{recipe}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    done = subprocess.run(
        [str(environment.python), "-I", str(script), str(partial), str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        shutil.rmtree(partial, ignore_errors=True)
        raise LabError(f"could not write the lab's model to {partial}: {done.stderr.strip()}")
    try:
        partial.rename(folder)
    except OSError:  # another lab process was faster
        shutil.rmtree(partial, ignore_errors=True)
    return folder
