"""Which languages a model can be told behind its encoder: one of them for good, or further ones."""

import copy
from collections.abc import Mapping

from ..config import ModelConfig
from ..config.changes import with_prompt_values


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


def with_slot_values(model, values: Mapping[str, Mapping]):
    """A model whose prompt's slots have further values, {slot: {value: what stands for it}}: a
    special token of a decoder's prompt, a place of a language behind the encoder.

    Raises:
        ValueError: no such slot or place, or a model that takes no prompt.
    """
    if not values:
        return model
    if model.config.prompts is None:
        changed = model.changed(
            ModelConfig.from_nemo(with_prompt_values(model.config.nemo, values))
        )
        changed.prompt_ids()  # a value that the tokenizer does not have is said here
        return changed
    for slot in values:
        if slot != "target_lang":
            raise ValueError(f"prompt.values.{slot}: this model's prompt has target_lang alone")
    return with_languages(model, values["target_lang"])


def with_languages(model, added: Mapping[str, int | str]):
    """A model that can be told further languages, over the same tensors but for the one that their
    places have columns in.

    Args:
        added: {name: its place among the `num_prompts`, or the name of a known language: a free
            place, which starts as that one}. A name that is known stays where it is.
    Raises:
        ValueError: a place that another name has, or that there is not; no known language, or no
            free place.
    """
    prompts = model.config.prompts
    names = dict(prompts.names)
    weight = model.prompt_kernel[0].weight.detach().clone()
    first = weight.shape[1] - prompts.count  # the columns before are the frame's
    for name, place in added.items():
        where = f"prompt.values.target_lang.{name}"
        if name in names:
            if isinstance(place, int) and place != names[name]:
                raise ValueError(f"{where} is {place}, but the model has it at {names[name]}")
            continue
        if isinstance(place, str):
            if place not in names:
                known = ", ".join(names)
                raise ValueError(f"{where} is {place!r}, expected a place or one of {known}")
            free = sorted(set(range(prompts.count)) - set(names.values()))
            if not free:
                raise ValueError(f"{where}: all {prompts.count} places are taken")
            weight[:, first + free[0]] = weight[:, first + names[place]]
            place = free[0]
        names[name] = place
    nemo = copy.deepcopy(model.config.nemo)
    nemo["model_defaults"]["prompt_dictionary"] = names
    return model.changed(ModelConfig.from_nemo(nemo), {"prompt_kernel.0.weight": weight})
