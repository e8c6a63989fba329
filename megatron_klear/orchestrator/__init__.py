"""A process beside rank 0: prompts, drawing, grading, rollout files and the book of what is under way."""
