"""Whole runs from names to files, as the commands start them."""
