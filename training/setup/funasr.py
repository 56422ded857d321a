"""What a recipe asks of Fun-ASR-Nano before its first step: rate, dropout, loss options."""

from fastconformer.funasr import FunASRNano
from training.recipe.sections import EncoderRecipe, LossRecipe, ModelRecipe, PromptRecipe


def as_asked(
    model: FunASRNano,
    recipe: ModelRecipe,
    loss: LossRecipe,
    encoder: EncoderRecipe,
    prompt: PromptRecipe,
) -> FunASRNano:
    """A model over the same tensors, as the recipe says.

    Raises:
        ValueError: a key that is for other models.
    """
    others = {
        "model.tokenizer": recipe.tokenizer,
        "model.labels": recipe.labels,
        "prompt.values": prompt.values,
        "encoder.attention": encoder.attention,
        "encoder.direction_dropout": encoder.direction_dropout,
        "loss.sigma": loss.sigma,
        "loss.omega": loss.omega,
        "loss.fastemit_lambda": loss.fastemit_lambda,
        "loss.transducer_reduction": loss.transducer_reduction,
        "loss.interctc_layers": loss.interctc_layers,
        "loss.use_cr_ctc": loss.use_cr_ctc,
        "loss.label_smoothing": loss.label_smoothing,
        "loss.mask_prompt": loss.mask_prompt,
    }
    for key, value in others.items():
        if value:
            raise ValueError(f"{key} is {value!r}, which Fun-ASR-Nano does not have")
    if loss.ctc_weight is not None and len(model.heads) < 2:
        raise ValueError("loss.ctc_weight: this checkpoint has no CTC weights")
    options = {
        "ctc_weight": loss.ctc_weight,
        "llm_reduction": loss.reduction,
        "ctc_reduction": loss.ctc_reduction or loss.reduction,
    }
    options = {name: value for name, value in options.items() if value is not None}
    config = model.config.changed(**options)
    if recipe.sample_rate is not None:
        config = config.with_sample_rate(recipe.sample_rate, recipe.mel_edges)
    if recipe.dropout is not None:
        config = config.with_dropout(recipe.dropout)
    return model.changed(config)
