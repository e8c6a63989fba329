"""Curation of training sets: what may be dropped from a source, and why."""
