"""What a run would do, and pictures of what it does."""
