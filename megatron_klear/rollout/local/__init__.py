"""Rollouts drawn by the trainer's own ranks."""
