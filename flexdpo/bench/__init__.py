"""Timings side by side, and the results page made of them."""
