"""Masks, scores and kernels for rows of token tries."""
