"""Benchmarks of the library against the plainest thing that moves the same bytes."""
