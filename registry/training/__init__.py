"""Saving and loading training runs on all their ranks (`saving`, `loading`), and the directory of a run (`manager`).

It stands on binding and plan as conversions do; nothing outside imports it but the public names of `registry`.
"""
