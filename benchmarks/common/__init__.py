"""What several benchmarks use: figures from runs, CPU time, reports and pictures of results."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository: the benchmarks run in a checkout of it only."""
