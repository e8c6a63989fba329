"""Rollouts drawn by vLLM servers over HTTP."""
