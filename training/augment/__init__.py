"""Sound changed while training."""
