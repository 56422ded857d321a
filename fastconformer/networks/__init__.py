"""All modules with weights, and nothing else."""
