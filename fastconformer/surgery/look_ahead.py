"""Another of the look-aheads that a streaming checkpoint was trained with, on the same weights."""

import copy

from ..config import ModelConfig


def with_look_ahead(model, look_ahead: int | None = None):
    """A model over the same tensors whose attention looks `look_ahead` encoder frames ahead; the
    given one where that is its look-ahead already, or None.

    Raises:
        ValueError: not one of the checkpoint's att_context_size; the message lists them.
    """
    if look_ahead is None:
        return model
    encoder = model.config.encoder
    contexts = getattr(encoder, "att_contexts", [(-1, -1)])  # Fun-ASR's encoder sees all
    if look_ahead == contexts[0][1]:
        return model
    rights = [right for _, right in contexts]
    if look_ahead not in rights:
        known = ", ".join("all" if right < 0 else str(right) for right in rights)
        raise ValueError(f"look_ahead is {look_ahead}, this model was trained with {known}")
    chosen = rights.index(look_ahead)
    order = [chosen, *(i for i in range(len(contexts)) if i != chosen)]
    nemo = copy.deepcopy(model.config.nemo)
    nemo["encoder"]["att_context_size"] = [list(contexts[i]) for i in order]
    if encoder.att_context_probs:
        nemo["encoder"]["att_context_probs"] = [encoder.att_context_probs[i] for i in order]
    return model.changed(ModelConfig.from_nemo(nemo))
