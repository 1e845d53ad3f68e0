"""Data, the training step and the trainer."""
