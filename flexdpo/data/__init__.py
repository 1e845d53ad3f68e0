"""From files and hub names to tokenised groups."""
