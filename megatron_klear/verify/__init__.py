"""What users run on their own cluster: layouts, resume, rollouts and mismatch."""
