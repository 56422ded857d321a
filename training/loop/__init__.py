"""What happens in each step, and what a run leaves on disk."""
