"""The form in which arguments and returned values cross into the sandbox and out of it."""

from __future__ import annotations

from .inside.values import Opaque, decode, encode, encode_arguments

__all__ = ["Opaque", "decode", "encode", "encode_arguments"]
