"""Faults at every file system call of every writer: see `python -m tests.faults --help`."""
