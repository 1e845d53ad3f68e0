"""Where the layout meets Hugging Face models."""
