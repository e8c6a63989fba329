"""The training loops and what they print."""
