"""Draft the spec of an unknown architecture, of what the known ones call and lay out alike.

`drafter` puts it together, of `habits` (names and layouts of known specs), `sizes` (fields of an unknown config) and
`text` (YAML that marks every doubt). They know the specs and the headers of one checkpoint, and write nothing.
"""

from registry.drafting.drafter import draft

__all__ = ["draft"]
