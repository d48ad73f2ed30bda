"""The version of Jobledger, for modules that must not import the whole library."""

#: The version of the package; the same as in ``pyproject.toml``.
VERSION = "0.1.0"
