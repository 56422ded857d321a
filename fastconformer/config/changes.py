"""NeMo's model config with something else in it: each function gives a changed copy."""

import copy

from .heads import CTC_CLASSES, HYBRID_CLASSES, PROMPTED_CLASSES, TRANSDUCER_CLASSES

# A class for character labels and the one for SentencePiece, with NeMo's modules.
NEMO_CLASSES = {
    CTC_CLASSES: ("ctc_models", "ctc_bpe_models"),
    TRANSDUCER_CLASSES: ("rnnt_models", "rnnt_bpe_models"),
    HYBRID_CLASSES: ("hybrid_rnnt_ctc_models", "hybrid_rnnt_ctc_bpe_models"),
}


def with_loss_options(config: dict, heads: tuple[str, ...], loss) -> dict:
    """With the options of a recipe's `loss` section; None: as it was.

    Raises:
        ValueError: an option of a head that the model does not have.
    """
    config = copy.deepcopy(config)
    transducer = {"sigma": loss.sigma, "omega": loss.omega, "fastemit_lambda": loss.fastemit_lambda}
    for name, value in transducer.items():
        if value is None:
            continue
        if name != "fastemit_lambda" and "tdt" not in heads:
            raise ValueError(f"loss.{name} belongs to TDT, this model has {', '.join(heads)}")
        if heads in (("ctc",), ("aed",)):
            raise ValueError(f"loss.{name} belongs to a transducer, this model has {heads[0]} only")
        section = config.setdefault("loss", {})
        default = "tdt" if "tdt" in heads else "warprnnt_numba"
        names = [f"{section.get('loss_name')}_kwargs", f"{default}_kwargs"]
        kwargs = next((key for key in names if section.get(key) is not None), names[1])
        section[kwargs] = {**(section.get(kwargs) or {}), name: value}
    if heads == ("aed",) and (loss.reduction or loss.transducer_reduction):
        raise ValueError("loss.reduction: an attention decoder's loss is a mean over tokens")
    if loss.transducer_reduction is not None and heads == ("ctc",):
        raise ValueError("loss.transducer_reduction: this model has ctc only")
    if loss.ctc_reduction is not None and "ctc" not in heads:
        raise ValueError("loss.ctc_reduction: this model has no ctc head")
    if (reduction := loss.transducer_reduction or loss.reduction) and heads != ("ctc",):
        config["rnnt_reduction"] = reduction
    if (reduction := loss.ctc_reduction or loss.reduction) and "ctc" in heads:
        config.get("aux_ctc", config)["ctc_reduction"] = reduction
    for name, value in (
        ("label_smoothing", loss.label_smoothing),
        ("mask_prompt", loss.mask_prompt),
    ):
        if value is not None and heads != ("aed",):
            raise ValueError(
                f"loss.{name} belongs to attention decoders, this model has {heads[0]}"
            )
    if loss.label_smoothing is not None:  # NeMo's interpolation is resolved: it stands twice
        config["label_smoothing"] = loss.label_smoothing
        config["loss"] = (config.get("loss") or {}) | {"label_smoothing": loss.label_smoothing}
    if loss.mask_prompt is not None:
        config["use_loss_mask_for_prompt"] = loss.mask_prompt
    if loss.interctc_layers is not None:
        config["interctc"] = {
            "loss_weights": list(loss.interctc_weights),
            "apply_at_layers": list(loss.interctc_layers),
        }
    if loss.ctc_weight is not None:
        if len(heads) < 2:
            raise ValueError(f"loss.ctc_weight belongs to hybrids, this model has {heads[0]} only")
        config["aux_ctc"]["ctc_loss_weight"] = loss.ctc_weight
    return config


def with_prompt_values(config: dict, values: dict) -> dict:
    """With further values of a prompt's slots, {slot: {value: special token}}, beside those that it
    has. ValueError: the model takes no prompt."""
    if not values:
        return config
    if "prompt_format" not in config:
        raise ValueError("prompt.values: this model takes no prompt")
    config = copy.deepcopy(config)
    kept = config.setdefault("prompt_values", {})
    for slot, added in values.items():
        kept[slot] = {**(kept.get(slot) or {}), **added}
    return config


def with_encoder_dropout(config: dict, probability: float) -> dict:
    """Of the encoder's input, feed-forwards, attention weights and residual branches."""
    config = copy.deepcopy(config)
    names = "dropout", "dropout_pre_encoder", "dropout_att"
    config["encoder"] |= dict.fromkeys(names, probability)
    return config


def with_vocabulary(config: dict, tokenizer, files: dict | None = None) -> dict:
    """A copy that names the tokenizer's files and pieces, as NeMo writes it; a
    model class for characters becomes the one for SentencePiece, and the other way round. `files`:
    keys of the `tokenizer` section that name the files of a multi-task model, or of one with a
    tokenizer for each language."""
    config = copy.deepcopy(config)
    pieces = list(tokenizer.pieces)
    if "transf_decoder" in config:  # names no pieces, and keeps its own kind of tokenizer
        config["head"]["num_classes"] = -(-len(pieces) // 8) * 8
        if files is not None:
            config["tokenizer"] = {**config["tokenizer"], **files}
        return config
    is_char = tokenizer.kind == "char"
    if is_char and str(config.get("target", "")).endswith(PROMPTED_CLASSES):
        raise ValueError("model.labels: a model that is told a language has SentencePiece pieces")
    module, _, name = str(config.get("target", "")).rpartition(".")
    for classes, modules in NEMO_CLASSES.items():
        wanted = 0 if is_char else 1
        if name in classes and name != classes[wanted]:
            package = module.rpartition(".")[0]
            config["target"] = ".".join(filter(None, (package, modules[wanted], classes[wanted])))
    if is_char:
        config.pop("tokenizer", None)
    elif tokenizer.kind == "agg":
        config["tokenizer"] = {"type": "agg", "dir": None, **(files or {})}
    else:
        config["tokenizer"] = {
            "dir": "tokenizer",  # never read, but NeMo's restore_from wants the key
            "type": "bpe",
            "model_path": "nemo:tokenizer.model",
            "vocab_path": "nemo:vocab.txt",
            "spe_tokenizer_vocab": "nemo:tokenizer.vocab",
        }
    config["labels"] = pieces
    if "joint" in config:
        config["decoder"]["vocab_size"] = len(pieces)
        config["joint"] |= {"num_classes": len(pieces), "vocabulary": pieces}
    ctc = config.get("aux_ctc", {}).get("decoder") if "joint" in config else config.get("decoder")
    if ctc is not None:
        ctc |= {"num_classes": len(pieces), "vocabulary": pieces}
    return config


def with_data_sections(config: dict) -> dict:
    """With the data sections that NeMo's models read where no data is: `transcribe` of paths asks
    `validation_ds`, and a change of characters writes into all three. What is there stays.
    Source: NeMo 3.0.0, `_setup_transcribe_dataloader` and `change_vocabulary`."""
    rate = config.get("sample_rate") or (config.get("preprocessor") or {}).get("sample_rate", 16000)
    sections = {
        f"{part}_ds": {
            "manifest_filepath": None,
            "sample_rate": rate,
            "batch_size": 16,
            "shuffle": part == "train",
            "use_start_end_token": False,
        }
        for part in ("train", "validation", "test")
    }
    return config | {name: config.get(name) or section for name, section in sections.items()}
