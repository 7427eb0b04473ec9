"""The cost of safe reclaim. `python -m benchmarks.reclaim --help`; how to read it: README.md."""
