"""The materializer on a real broker."""
from __future__ import annotations
