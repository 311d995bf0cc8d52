"""Training: data, the loop and its state."""
