"""Ways to make another model of a trained one."""
