"""The documentation, and what writes the pages of it that are made from the code: `python -m docs.generate`."""
