"""Checkpoint conversion and warm loading: model weights into an accelerator at hardware speed."""

from __future__ import annotations

__version__ = "0.1.0"
