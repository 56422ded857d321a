"""Attention of a few seconds on both sides in the place of full attention, on the same weights."""

import copy

from ..config import ModelConfig

CONTEXT_FRAMES = 128  # on each side; what NVIDIA recommends for long files with full models


def with_local_attention(model, context_frames: int = CONTEXT_FRAMES):
    """A model over the same tensors, with local attention on both sides; the given one where its
    attention is not full. Source: NeMo's `change_attention_model`."""
    encoder = model.config.encoder
    if not encoder.takes_local_attention:
        return model
    nemo = copy.deepcopy(model.config.nemo)
    nemo["encoder"] |= {
        "self_attention_model": "rel_pos_local_attn",
        "att_context_style": "regular",
        "att_context_size": [context_frames, context_frames],
    }
    return model.changed(ModelConfig.from_nemo(nemo))
