"""From token sequences to the tensors of one packed row."""
