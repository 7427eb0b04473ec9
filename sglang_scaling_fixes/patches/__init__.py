"""Lines of ours for SGLang's own files: for releases that load no plugins, and for upstream.

    manifest.toml    every patch as data: why, where, our lines, and the digests of the files
    manifest.py      reads it; anchors.py: where our lines go in a stock file
    sentinel.py         the file with which an applied patch checks itself at import
    series.py        the patches as text, in quilt's order, for git and GNU patch
    tree.py          an `sglang` on a disk, and which patches its files have
    change.py        files changed all or not at all; record.py what is kept for the way back
    export.py        patches for upstream as commits on a checkout; upstream/: their tests
    command.py       `sglang-scaling-fixes patch`

A patch only inserts. No line of SGLang's is in this package: an anchor is a digest of one.
"""
