"""Measurements, side by side with peers; results are kept as JSON in `results/`."""
