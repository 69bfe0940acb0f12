"""Benchmarks, `make bench`: each figure stands next to its ceiling or its peer from the same run."""
