"""Fine-tuning and training from scratch: `python -m training.finetune RECIPE.yaml`."""

import fastconformer  # noqa: F401  before torch: it says how torch's threads wait
