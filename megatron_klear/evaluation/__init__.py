"""Benchmarks and sampling protocols."""
