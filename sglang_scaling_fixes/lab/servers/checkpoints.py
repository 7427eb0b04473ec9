"""The lab's checkpoints, made once and cached in the lab home, and what a server of each needs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from sglang_scaling_fixes.lab.errors import LabError
from sglang_scaling_fixes.lab.glm import weights as glm_weights
from sglang_scaling_fixes.lab.install import Environment, lab_home
from sglang_scaling_fixes.lab.runtime import DSA
from sglang_scaling_fixes.lab.servers import tiny_llama, tokenizer

# K and V of every layer of the Llama, float32.
KV_BYTES_PER_TOKEN = 2 * tiny_llama.LAYERS * tiny_llama.HEADS * tiny_llama.HEAD_DIM * 4
VOCAB = tiny_llama.VOCAB


@dataclass(frozen=True)
class Model:
    """A checkpoint's folder, and how SGLang serves it on this CPU."""

    name: str
    folder: Path
    modules: tuple[str, ...]  # of sglang.srt.models; the others are left out of the start-up
    flags: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None  # without one, requests and answers are token ids


def llama(environment: Environment, seed: int = 1) -> Model:
    """A dense model with ordinary attention, the same bytes for every release."""
    return Model(
        name="tiny-llama",
        folder=_checkpoint(environment, tiny_llama, "llama", seed),
        modules=("llama", "registry", "utils"),
        flags=("--attention-backend", "torch_native", "--disable-radix-cache"),
    )


def tiny_glm(
    environment: Environment, seed: int = 1, *, text: bool = False, layers: int = glm_weights.LAYERS
) -> Model:
    """GLM-5.1's architecture in small; SGLang 0.5.23, whose modules its stand-ins know.

    `text`: with a tokenizer of words, for the OpenAI API.
    """
    if environment.release != "0.5.23":
        raise LabError(
            f"tiny-glm-5.1 runs on SGLang 0.5.23, not on {environment.release}:"
            " its stand-ins for CUDA kernels are written for that release"
        )
    return Model(
        name="tiny-glm-5.1",
        folder=_checkpoint(environment, glm_weights, f"glm-{layers}", seed, layers),
        modules=("glm4_moe", "deepseek_v2", "deepseek_nextn", "registry", "utils"),
        flags=("--attention-backend", "dsa"),
        # Interpreted: the Triton kernels that assign slots, on CPU tensors.
        env={DSA: "1", "TRITON_INTERPRET": "1"},
        tokenizer=tokenizer.write(lab_home() / "models" / "words", glm_weights.VOCAB)
        if text
        else None,
    )


def _tokenizer() -> Path:
    return tokenizer.write(lab_home() / "models" / "words", glm_weights.VOCAB)


def _checkpoint(
    environment: Environment, writer: ModuleType, name: str, seed: int, *more: int
) -> Path:
    """The folder that `writer`, run as a script with these numbers, has filled."""
    script = Path(str(writer.__file__))
    recipe = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    folder = lab_home() / "models" / f"{name}-{seed}-{recipe}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    done = subprocess.run(
        [str(environment.python), "-I", str(script), str(partial), *map(str, (seed, *more))],
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
