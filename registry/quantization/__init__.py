"""Quantised weights, from what a format declares: `declared` (the YAML), `formulas`, and how they are met and undone.

It knows the plan and the specs, and no scheme by name.
"""
