"""The form in which arguments and returned values cross into the sandbox and out of it."""

from __future__ import annotations

from .inside.values import MAX_DEPTH, TOO_DEEP, Opaque, decode, encode, encode_arguments, unfit

__all__ = ["MAX_DEPTH", "TOO_DEEP", "Opaque", "decode", "encode", "encode_arguments", "unfit"]
