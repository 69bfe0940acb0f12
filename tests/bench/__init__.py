"""Benchmarks, `make bench`: each figure beside its ceiling or its peer from the same run."""
