"""Fuzzing of every parser: `make fuzz`, and a short run among the tests. Nothing may be raised but RegistryError."""
