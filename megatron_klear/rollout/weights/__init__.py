"""Weights from the trainer to rollout engines, and the proof that they arrived."""
