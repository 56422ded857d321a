"""Fine-tuning and training from scratch: `python -m training.finetune RECIPE.yaml`."""
