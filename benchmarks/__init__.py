"""Benchmarks: `python -m benchmarks.NAME` prints ratios measured in one process, and writes them with `--json`."""
