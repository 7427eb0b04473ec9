"""The file with which an applied patch checks itself, each time SGLang is imported.

Tools that place lines by number put them anywhere in a file that is not the one they were made
for, and say nothing. The sentinel compares the files with what they must be, and stops the import.
"""

from __future__ import annotations

import ast
import os
from typing import Any

from sglang_scaling_fixes.patches.manifest import Manifest, Patch

_KNOWN_BY = "of sglang-scaling-fixes is applied rightly"

OWN_HUNK = (
    "\n# A hunk of its own inserts these lines: without it, patch --batch run twice deletes this "
    "file.\n"
)
"""Behind line `OWN_HUNK_AT` of every sentinel."""
OWN_HUNK_AT = 10

_TEXT = '''"""Checks that {file} of sglang-scaling-fixes is applied rightly.

The patch added this file. It inserts its other lines by their numbers alone: applied twice, in
another way or to another release, it fixes nothing or breaks a file. Nothing in this folder can
be imported then.
"""

import hashlib
import importlib.util
import os
{hunk}
_PATCH = "{file}"
_NAME = "{name}"
_RELEASES = "{releases}"
# Every file that the patch changes, and the SHA-256 it may have with the patch applied once: alone,
# or with others of sglang-scaling-fixes.
_FILES = {{
{files}}}


def _problem(path, right):
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        return f"cannot be read ({{error.strerror}}), so the patch cannot be checked"
    if hashlib.sha256(source).hexdigest() not in right:
        return "is not the file of that release with this patch applied once"
    try:
        with open(importlib.util.cache_from_source(path), "rb") as file:
            header = file.read(16)
    except (OSError, NotImplementedError):
        return None
    # Flags of 1: Python runs this bytecode without comparing it with the source.
    if header[4:8] == b"\\1\\0\\0\\0" and header[8:] != importlib.util.source_hash(source):
        return "has bytecode of another source, which Python would run unchecked"
    return None


for _file, _right in _FILES.items():
    _path = os.path.join(os.path.dirname(__file__), *_file.split("/"))
    _found = _problem(_path, _right)
    if _found is not None:
        # Not an ImportError: code that can do without a module goes on after one.
        raise RuntimeError(
            f"sglang-scaling-fixes: {{_PATCH}} is for SGLang {{_RELEASES}}, and {{_path}}"
            f" {{_found}}. Run `sglang-scaling-fixes patch revert {{_NAME}}`, or reinstall SGLang"
            f" (pip install --force-reinstall --no-deps sglang==RELEASE) and delete {{__file__}};"
            f" then apply it with `sglang-scaling-fixes patch apply {{_NAME}}`."
        )
'''

_PLUGIN = """
if importlib.util.find_spec("sglang_scaling_fixes") is None:
    raise RuntimeError(
        f"sglang-scaling-fixes: {_PATCH} is applied to {os.path.dirname(__file__)}, and"
        " sglang_scaling_fixes cannot be imported here. Install it, or take the patch back with"
        f" `sglang-scaling-fixes patch revert {_NAME}`."
    )
"""


def text(manifest: Manifest, patch: Patch, release: str, file: str) -> str:
    """The sentinel's source. `file`: what the patch is called as a text, with its number."""
    folder = os.path.dirname(patch.sentinel)
    rows = []
    for changed in patch.files(release):
        known = manifest.digests[release, changed].items()
        with_it = [digest for names, digest in known if patch.name in names]
        digests = "".join(f'        "{digest}",\n' for digest in with_it)
        rows.append(f'    "{os.path.relpath(changed, folder)}": (\n{digests}    ),\n')
    releases = manifest.alike(patch, release)
    body = _TEXT.format(
        file=file,
        hunk=OWN_HUNK,
        name=patch.name,
        releases=" and ".join(filter(None, [", ".join(releases[:-1]), releases[-1]])),
        files="".join(rows),
    )
    return body + (_PLUGIN if patch.needs_plugin else "")


def read(source: str) -> dict[str, Any] | None:
    """`_NAME`, `_FILES` and the other constants of a sentinel; None where it is another file."""
    if _KNOWN_BY not in source:
        return None
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant | ast.Dict)
    }
