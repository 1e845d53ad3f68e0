"""What sharing and packing save on a dataset, computed before anything runs."""
