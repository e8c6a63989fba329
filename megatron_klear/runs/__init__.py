"""A run's folder: its owner, logs, metrics, rollout files and report."""
