"""Where a run's model comes from, and which parts of it move.

`build_model` reads a checkpoint or makes a model from scratch, with the recipe's loss options in
its config, so that what is saved later says how it was trained. `ready_to_train` makes it one
that is trained as the recipe says.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from yaml import YAMLError

from fastconformer import ASRModel, ModelConfig, load_model
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.checkpoint.yaml_config import check_yaml_depth
from fastconformer.config.changes import (
    with_encoder_dropout,
    with_loss_options,
    with_vocabulary,
)
from fastconformer.funasr import FunASRNano
from fastconformer.load import model_of
from fastconformer.surgery.birwkv7 import to_birwkv7
from fastconformer.surgery.language import with_slot_values
from fastconformer.surgery.sample_rate import with_sample_rate
from fastconformer.surgery.vocabulary import change_vocabulary
from fastconformer.text import read_text
from fastconformer.text.tokenizer import (
    AggregateTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    sentencepiece_files,
)
from training.objective.objective import Objective
from training.recipe.sections import (
    EncoderRecipe,
    FreezeRecipe,
    LoraRecipe,
    LossRecipe,
    ModelRecipe,
    PromptRecipe,
    TrainerRecipe,
)
from training.setup.freeze import Freezing, freeze, is_batch_norm, unreached
from training.setup.funasr import as_asked
from training.setup.lora import add_lora


def build_model(
    recipe: ModelRecipe,
    loss: LossRecipe,
    seed: int,
    encoder: EncoderRecipe = EncoderRecipe(),  # noqa: B008 (frozen)
    prompt: PromptRecipe = PromptRecipe(),  # noqa: B008 (frozen)
) -> ASRModel:
    """The model on the CPU in float32; random weights depend on the seed only.

    Raises:
        FileNotFoundError, ValueError: what the recipe names is missing or does not fit.
    """
    if recipe.init_from is not None:
        model = load_model(recipe.init_from)
        if isinstance(model, FunASRNano):
            return as_asked(model, recipe, loss, encoder, prompt)
        if recipe.changes_vocabulary:
            tokenizer, files, section = read_like(model, recipe)
            model, _ = change_vocabulary(
                model, tokenizer, files, recipe.transfer, recipe.new_rows, seed, section
            )
    else:
        config, files = scratch_config(recipe.config, *vocabulary_of(recipe))
        torch.manual_seed(seed)
        model = ASRModel(ModelConfig.from_nemo(config), load_tokenizer(config, files), files)
    if recipe.mel_edges != "keep":
        raise ValueError(f"model.mel_edges {recipe.mel_edges} is for Fun-ASR-Nano")
    if recipe.sample_rate is not None:
        model = with_sample_rate(model, recipe.sample_rate)
    if encoder.attention is not None:
        model = with_birwkv7(model, encoder.warm_start and recipe.init_from is not None, seed)
    model = with_slot_values(model, prompt.values)
    config = with_loss_options(model.config.nemo, model.heads, loss)
    if recipe.dropout is not None:
        config = with_encoder_dropout(config, recipe.dropout)
    model = model.changed(ModelConfig.from_nemo(config))
    set_direction_dropout(model, encoder.direction_dropout)
    return model


def with_birwkv7(model: ASRModel, warm_start: bool, seed: int) -> ASRModel:
    """The model with BiRWKV7 in the place of attention; one that has it stays as it is."""
    if model.config.encoder.self_attention_model == "rwkv7_attn":
        return model
    checkpoint = to_birwkv7(model.to_checkpoint(), warm_start, seed=seed)
    return model_of(checkpoint, stft_pad=model.preprocessor.featurizer.stft_pad)


def set_direction_dropout(model: ASRModel, probability: float) -> None:
    """ValueError: the model has attention, which has no directions."""
    has_birwkv7 = model.config.encoder.self_attention_model == "rwkv7_attn"
    if probability and not has_birwkv7:
        raise ValueError("encoder.direction_dropout belongs to BiRWKV7, this model has attention")
    for layer in model.encoder.layers if has_birwkv7 else ():
        layer.self_attn.direction_dropout = probability


def vocabulary_of(recipe: ModelRecipe) -> tuple[Tokenizer, dict[str, bytes], dict | None]:
    """The tokenizer that a recipe names, the files that a checkpoint keeps of it, and where it has
    languages, the keys of the config's `tokenizer` section that name them."""
    if recipe.labels:
        return characters(recipe.labels, "model.labels"), {}, None
    if isinstance(recipe.tokenizer, dict):
        files, langs = {}, {}
        for lang, path in recipe.tokenizer.items():
            langs[lang], own = language_files(lang, path)
            files |= own
        return AggregateTokenizer(_models(langs, files)), files, {"langs": langs}
    return *read_tokenizer(recipe.tokenizer), None


def language_files(lang: str, path: str) -> tuple[dict, dict[str, bytes]]:
    """A language's section of the config's `tokenizer.langs`, and the files that it names."""
    new = tokenizer_files(path)
    names = zip(("model_path", "spe_tokenizer_vocab", "vocab_path"), new, strict=True)
    section = {"dir": "tokenizer", "type": "bpe"}
    section |= {key: f"nemo:{lang}_{name}" for key, name in names}
    return section, {f"{lang}_{name}": content for name, content in new.items()}


def _models(langs: dict[str, dict], files: dict[str, bytes]) -> dict[str, bytes]:
    return {lang: files[part["model_path"][5:]] for lang, part in langs.items()}


def characters(labels: Sequence[str], where: str) -> CharTokenizer:
    """ValueError: a label is there twice, or is no single character."""
    wrong = [label for label in labels if labels.count(label) > 1 or len(label) != 1]
    if wrong or not labels:
        what = f"{wrong[0]!r} is there twice or is no single character" if wrong else "empty"
        raise ValueError(f"{where}: {what}; expected single characters")
    return CharTokenizer(list(labels))


def scratch_config(
    config: str | dict,
    tokenizer: Tokenizer,
    files: dict[str, bytes],
    section: dict | None = None,
) -> tuple[dict, dict[str, bytes]]:
    """NeMo's config with the tokenizer's vocabulary filled in, and the tokenizer's files.

    Args:
        config: NeMo-style model config: a YAML file (a `model:` section may be around it) or a
            dict.
        section: as `vocabulary_of` gives it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(config, str):
        if not Path(config).is_file():
            raise FileNotFoundError(f"model.config {config} is not a file")
        try:
            check_yaml_depth(Path(config).read_bytes())
            config = OmegaConf.load(config)
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"model.config {config}: {' '.join(str(error).split())}") from None
    try:
        config = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from None
    config = config.get("model", config)
    config = with_vocabulary(config, tokenizer, section)
    if "joint" in config:
        # NeMo builds the joint from these two, whatever the joint's own section says.
        widths = config["joint"].get("jointnet", {})
        defaults = {
            "enc_hidden": widths.get("encoder_hidden"),
            "pred_hidden": widths.get("pred_hidden"),
        }
        config["model_defaults"] = defaults | (config.get("model_defaults") or {})
    return config, files


def read_like(model: ASRModel, recipe: ModelRecipe):
    """The recipe's tokenizer, of the model's kind: (tokenizer, its files, and for a multi-task
    model the keys of the config's `tokenizer` section that name them). Of a model with a tokenizer
    for each language those that are given are added to the others or take their place.

    Raises:
        FileNotFoundError, ValueError: no such file, or another kind than the model's.
    """
    old, given = model.tokenizer, recipe.tokenizer
    if old.kind == "agg" and old.bos_id is None:
        return vocabulary_of(recipe)  # which `change_vocabulary` refuses with a word
    if isinstance(given, dict) != (old.kind == "agg"):
        wanted = "{language: path}" if old.kind == "agg" else "one path"
        raise ValueError(f"model.tokenizer is {given!r}, expected {wanted}, as the model's own")
    if not isinstance(given, dict):
        tokenizer, files, _ = vocabulary_of(recipe)
        if old.bos_id is None:
            return tokenizer, files, None
        if not files:
            raise ValueError("model.labels: this model has SentencePiece pieces")
        names = zip(("model_path", "spe_tokenizer_vocab", "vocab_path"), files, strict=True)
        section = {key: f"nemo:{name}" for key, name in names}
        return type(old)(files["tokenizer.model"]), files, section
    kept = dict(model.config.nemo["tokenizer"]["langs"])
    files, langs = {}, {}
    for lang in [*kept, *(lang for lang in given if lang not in kept)]:
        if lang in given:
            langs[lang], own = language_files(lang, given[lang])
            files |= own
        else:
            langs[lang] = kept[lang]
            names = (v[5:] for v in kept[lang].values() if str(v).startswith("nemo:"))
            files |= {name: model.tokenizer_files[name] for name in names}
    return type(old)(_models(langs, files)), files, {"langs": langs}


def read_tokenizer(path: str) -> tuple[Tokenizer, dict[str, bytes]]:
    """A tokenizer and the files that a checkpoint keeps of it: a SentencePiece `.model`, a folder
    with tokenizer.model, or characters: a text file or a folder with labels.txt, a label a line
    (an empty line: the blank), of which no file is kept.

    Raises:
        FileNotFoundError, ValueError: no such file, or not what it should be.
    """
    folder = Path(path)
    labels = folder / "labels.txt" if folder.is_dir() else folder
    if labels.suffix == ".txt" and labels.is_file() and not (folder / "tokenizer.model").is_file():
        listed = [line or " " for line in read_text(labels).split("\n")]
        listed = listed[:-1] if listed[-1] == " " else listed  # what follows the last line break
        return characters(listed, f"model.tokenizer: {labels}"), {}
    files = tokenizer_files(path)
    return SentencePieceTokenizer(files["tokenizer.model"]), files


def tokenizer_at(path: str) -> Tokenizer:
    """Of a model, or a tokenizer's own folder or file."""
    folder = Path(path)
    if folder.suffix == ".nemo" or (folder / "config.json").is_file():
        checkpoint = read_checkpoint(folder)
        return load_tokenizer(checkpoint.config, checkpoint.tokenizer_files)
    return read_tokenizer(path)[0]


def tokenizer_files(path: str) -> dict[str, bytes]:
    """The three files that a NeMo archive keeps; the two lists are written where they lack."""
    folder = Path(path)
    model = folder / "tokenizer.model" if folder.is_dir() else folder
    if not model.is_file():
        raise FileNotFoundError(f"model.tokenizer: {model} is not a file")
    try:
        files = sentencepiece_files(model.read_bytes())
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    for name in files:
        if folder.is_dir() and (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    return files


def ready_to_train(
    model: ASRModel,
    objective: Objective,
    freeze_recipe: FreezeRecipe,
    lora: LoraRecipe,
    trainer: TrainerRecipe,
) -> Freezing:
    """A model as it is trained: adapters, precision, recomputation and compilation as the recipe
    says, and what moves when. To be called once, before the optimizer is built.

    Raises:
        ValueError: the recipe names a part that the model does not have, or options that do not go
            together.
    """
    if trainer.compile and objective.interctc:
        raise ValueError("trainer.compile and loss.interctc_layers do not go together; use one")
    if lora.rank:
        add_lora(model, lora, trainer.seed)
    freezing = freeze(model, freeze_recipe, lora, unreached(model, objective))
    if trainer.precision == "bf16_pure":
        to_bfloat16(model)
    for network in model.recomputable:
        network.recompute = trainer.activation_checkpointing
    if trainer.compile:
        for layer in model.encoder.layers:
            layer.compile(dynamic=True)
    return freezing


def to_bfloat16(model: ASRModel) -> None:
    """All weights to bfloat16 but the front end's and BatchNorm's, whose statistics are sums of
    small shares."""
    for name, part in model.named_children():
        if name != "preprocessor":
            part.to(torch.bfloat16)
    for module in model.modules():
        if is_batch_norm(module):
            module.float()
