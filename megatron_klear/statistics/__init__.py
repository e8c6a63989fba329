"""What samples say of a model, and how far: the same for an evaluation and for validation during training."""
