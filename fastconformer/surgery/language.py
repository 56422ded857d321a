"""A model that is told a language behind its encoder, told one of them for good."""

import copy

from ..config import ModelConfig


def with_language(model, target_lang: str | None = None):
    """A model over the same tensors that knows this language alone, and takes it where none is
    named; None: the given one.

    Raises:
        ValueError: no such language (the message lists them), or a model that is told none.
    """
    if target_lang is None:
        return model
    prompts = model.config.prompts
    if prompts is None:
        raise ValueError(
            f"target_lang is {target_lang!r}, but no language is told to this model's encoder"
        )
    nemo = copy.deepcopy(model.config.nemo)
    index = prompts.index({"target_lang": target_lang})
    nemo["model_defaults"]["prompt_dictionary"] = {"auto": index}
    return model.changed(ModelConfig.from_nemo(nemo))
