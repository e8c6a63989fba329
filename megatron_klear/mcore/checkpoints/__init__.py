"""Checkpoints: saved, read, compared and converted."""
