"""Layers that carry a state along the row, run along the trie: convolutions and scans."""
