"""Measurements: each module is run as `python -m benchmarks.NAME` and writes JSON into `benchmarks/results/`."""
