"""Pictures of rows, tries, packing and training curves."""
