"""Rules that several functions of the public surface share."""

from __future__ import annotations

from registry import catalog
from registry.validation import rule

known_format = rule("to names a known format (registry.formats() lists them)", lambda to: to in catalog.names("format"))
known_dtype = rule(
    "dtype is a torch dtype or the name of one",
    lambda dtype: dtype is None or isinstance(dtype, str) or type(dtype).__module__ == "torch",
)
