"""Proofs on the model itself: what packed, shared rows give is what the ordinary run gives."""
