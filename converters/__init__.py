"""Commands that bring checkpoints and tokenizers in and out, and what they share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastconformer import ASRModel
    from fastconformer.checkpoint.contents import Checkpoint


def check(checkpoint: "Checkpoint") -> str:
    """Raises ValueError unless the options, the tokenizer and the tensors fit one another.
    Returns a line that describes the model."""
    # Imported here: --help and bad usage need no torch.
    from fastconformer.config import ModelConfig
    from fastconformer.heads import check_vocabulary
    from fastconformer.load import check_state_dict
    from fastconformer.text.tokenizer import load_tokenizer

    if checkpoint.kind != "nemo":
        raise ValueError("this is no model of NeMo's; see converters.st2funasr")
    config = ModelConfig.from_nemo(checkpoint.config)
    check_state_dict(config, checkpoint.state_dict)
    check_vocabulary(config, load_tokenizer(checkpoint.config, checkpoint.tokenizer_files))
    beside = ""
    if checkpoint.aligner:
        try:
            beside = f"\nwith a model for times: {check(checkpoint.aligner)}"
        except ValueError as error:
            raise ValueError(f"the CTC model for times: {error}") from None
    adapters = [adapter.name for adapter in config.encoder.adapters]
    if adapters:
        beside = f"\nwith adapters behind each layer: {', '.join(adapters)}{beside}"
    n_values = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    return (
        f"{config.class_name}, heads {' '.join(config.heads)}, {n_values / 1e6:.2f} M parameters "
        f"and statistics, {config.vocab_size} tokens, {config.sample_rate} Hz{beside}"
    )


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """What a model card says beyond the model; `model_card` reads them."""
    group = parser.add_argument_group("model card")
    group.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="error rates: what fastconformer.evaluate -o wrote",
    )
    group.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="how it was trained (default: the recipe.yaml of the run folder that MODEL lies in)",
    )
    group.add_argument("--licence", help="the hub's name of a licence: apache-2.0, cc-by-4.0 ...")
    group.add_argument("--base-model", metavar="ID", help="what it was fine-tuned from, on the hub")
    group.add_argument("--languages", default="", metavar="CODES", help="en,de ...")


def model_card(args, source: Path, target: Path, config, head: str, library: str) -> str:
    """The card of a model read from `source`, for `target`. ValueError or FileNotFoundError: a
    file of `add_card_arguments` that cannot be read."""
    from fastconformer.export import model_card as card

    recipe = args.recipe or source.resolve().parent / "recipe.yaml"
    return card.model_card(
        target.absolute().stem,
        config,
        head,
        library,
        results=[card.read_evaluation(path) for path in args.results],
        recipe=card.read_recipe(recipe) if args.recipe or recipe.is_file() else None,
        licence=args.licence,
        base=args.base_model,
        languages=[code for code in args.languages.split(",") if code],
    )


def load_exportable(path: str) -> "ASRModel":
    """The model at path, of the kind that the exports know. ValueError: another kind."""
    from fastconformer import ASRModel, load_model

    model = load_model(path)
    if not isinstance(model, ASRModel):
        raise ValueError(
            f"{path} is no FastConformer model, and there is no export of its kind; "
            "converters.st2funasr writes FunASR's folder, which FunASR's own tools take on"
        )
    return model
