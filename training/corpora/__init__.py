"""Data sets that other libraries list, as NeMo manifests: Lhotse's and Hugging Face's."""
