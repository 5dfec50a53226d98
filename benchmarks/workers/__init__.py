"""Processes that compute what `benchmarks.step` measures: one for each implementation."""
