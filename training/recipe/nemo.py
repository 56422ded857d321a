"""A NeMo training YAML (`model.train_ds`, `trainer`, `exp_manager`) as a recipe of ours.

`translate` gives the recipe, and line by line what became of each key. A key that would change the
result and has no counterpart here is an error; one that would not is listed with the reason.
Sources: NeMo's `examples/asr/conf` and `speech_to_text_finetune.py`, `core/config/optimizers.py`,
`utils/exp_manager.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from fastconformer.checkpoint.hub import is_hub_id
from training.recipe.data_sections import MASKS
from training.recipe.fields import flat, put
from training.recipe.nemo_data import translate_data
from training.recipe.nemo_optim import translate_optimizer
from training.recipe.nemo_unused import WITHOUT_EFFECT
from training.recipe.sections import ModelRecipe, TrainerRecipe

PRECISIONS = {"32": "fp32", "32-true": "fp32", "bf16": "bf16", "bf16-mixed": "bf16"}
PRECISIONS |= {"bf16-true": "bf16_pure", "16": "bf16", "16-mixed": "bf16"}
SECTIONS = ("model", "trainer", "exp_manager", "model.optim", "model.optim.sched")
SECTIONS += ("model.train_ds", "model.train_ds.augmentor", "model.validation_ds", "model.test_ds")
SECTIONS += ("model.tokenizer", "model.tokenizer.langs", "model.freeze_updates", "model.encoder")
SECTIONS += ("model.freeze_updates.modules", "model.spec_augment", "model.model_defaults")
SECTIONS += ("model.decoder", "model.joint", "model.loss", "model.aux_ctc", "exp_manager.ema")
SECTIONS += ("exp_manager.early_stopping_callback_params", "model.train_ds.prompt_dictionary")
SECTIONS += ("exp_manager.checkpoint_callback_params",)
ARCHITECTURE = ("preprocessor", "spec_augment", "encoder", "decoder", "joint", "decoding", "loss")
ARCHITECTURE += ("aux_ctc", "model_defaults", "interctc", "sample_rate", "target", "_target_")
ARCHITECTURE += ("labels", "rnnt_reduction", "ctc_reduction")
LOSS_CLASSES = ("SmoothedCrossEntropyLoss",)  # Canary's; other losses are named by loss_name


@dataclass
class Translation:
    """recipe: nested dict of our keys; taken: (NeMo's key, ours) pairs; unused: (key, reason);
    left: NeMo's keys that nobody has asked for yet; where: the file, for errors."""

    left: dict
    where: str = "recipe"
    recipe: dict = field(default_factory=dict)
    taken: list[tuple[str, str]] = field(default_factory=list)
    unused: list[tuple[str, str]] = field(default_factory=list)

    def take(self, key: str, ours: str | None = None, value=None, note: str = "") -> object:
        """NeMo's value of `key`, None where it is absent or null; noted as become `ours`, through
        the function `value`; where that gives None, listed with `note`."""
        given = self.left.pop(key, None)
        if given is None or ours is None:
            return given
        try:
            mine = given if value is None else value(given)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{self.where}: {key} is {given!r}") from None
        if mine is None:
            self.unused.append((key, note or "has no counterpart"))
        else:
            self.set(ours, mine, key)
        return given

    def number(self, key: str, default: float) -> float:
        """NeMo's value of `key` as a number; `default` where it is absent or null."""
        given = self.take(key)
        try:
            return default if given is None else float(given)
        except (TypeError, ValueError):
            raise ValueError(f"{self.where}: {key} is {given!r}, expected a number") from None

    def set(self, ours: str, value, key: str = "") -> None:
        """A key of ours; with NeMo's that it comes from."""
        put(self.recipe, ours, value)
        if key:
            shown = "the architecture, from scratch" if isinstance(value, dict) else value
            self.taken.append((key, f"{ours}: {shown}"))

    def drop(self, section: str) -> None:
        """Passes over what is left of a section."""
        self.left = {k: v for k, v in self.left.items() if not k.startswith(f"{section}.")}

    def refuse(self, key: str, why: str) -> None:
        raise ValueError(f"{self.where}: {key}: {why}")

    def __str__(self) -> str:
        width = max((len(key) for key, _ in self.taken + self.unused), default=0)
        lines = ["a NeMo configuration; its keys, and what they became:"]
        lines += [f"  {key:{width}}  {ours}" for key, ours in self.taken]
        lines += [f"keys without effect here ({len(self.unused)}):"] if self.unused else []
        lines += [f"  {key:{width}}  {why}" for key, why in self.unused]
        return "\n".join(lines)


def is_nemo(tree: dict) -> bool:
    """Whether a YAML tree has the sections of a NeMo training configuration."""
    model = tree.get("model")
    has_data = isinstance(model, dict) and ("train_ds" in model or "optim" in model)
    return has_data or "exp_manager" in tree


def is_nemo_key(key: str) -> bool:
    """Whether an override of a NeMo file is in NeMo's words: those that it shares with a recipe
    (trainer.max_steps, trainer.accumulate) mean the same there."""
    section, _, rest = key.lstrip("+~").partition(".")
    first, _, deeper = rest.partition(".")
    if section == "model":
        ours = set(ModelRecipe.__dataclass_fields__) - {"sample_rate", "labels"}
        return first not in ours or bool(deeper)
    if section == "trainer":
        return first not in set(TrainerRecipe.__dataclass_fields__) - {"precision", "max_steps"}
    return section in ("name", "exp_manager", "hydra") or section.startswith("init_from_")


def translate(tree: dict, where: str = "recipe") -> Translation:
    """`tree`: the YAML, interpolations resolved; what is missing is null.

    Raises:
        ValueError: a key asks for what this project does not do and what would change the result,
            or has a value of a kind that it cannot have.
    """
    try:
        return _translated(tree, where)
    except (TypeError, OverflowError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            f"{where}: a value is of a kind that its key cannot have: {error}"
        ) from error


def _translated(tree: dict, where: str) -> Translation:
    check_sections(tree, where)
    found = Translation(flat(tree), where)
    take = found.take
    name, folder = take("name"), take("exp_manager.exp_dir")
    name = take("exp_manager.name") or name or "nemo_recipe"
    found.set("output", str(Path(str(folder or "runs")) / str(name)), "exp_manager.exp_dir, name")
    for section in ("model.adapter", "model.loss_list"):
        if any(key.startswith(f"{section}.") for key in found.left):
            found.refuse(
                section,
                "trains adapters in NeMo, which are not done here; ~model.adapter lora.rank=32 "
                "trains low-rank adapters in their place"
                if section == "model.adapter"
                else "self-supervised training is not done here",
            )
    if take("model.variational_noise.std"):
        found.refuse("model.variational_noise.std", "noise on gradients is not done here")
    loss = str(found.left.get("model.loss._target_", "")).rpartition(".")[2]
    if loss not in ("", *LOSS_CLASSES):
        found.refuse("model.loss", f"{loss} is of another task than speech recognition")
    scratch = _start(tree, found)
    translate_data(tree, found)
    translate_optimizer(tree, found)
    _losses(found)
    _spec_augment(tree, found, scratch)
    _freezing(found)
    _trainer(found)
    _keeping(found)
    for key, value in found.left.items():
        if value in (None, "", [], {}) or key.endswith("_target_"):
            continue
        reasons = [prefix for prefix in WITHOUT_EFFECT if key.startswith(prefix)]
        if not reasons and value is False:
            continue  # what is switched off needs no counterpart
        if not reasons:
            found.refuse(key, f"{value!r} has no counterpart here; delete it, or set it to null")
        found.unused.append((key, WITHOUT_EFFECT[max(reasons, key=len)]))
    return found


def check_sections(tree: dict, where: str) -> None:
    """ValueError where something else stands in the place of one of NeMo's sections."""
    for section in SECTIONS:
        value = tree
        for name in section.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{where}: {section} must be a section of keys, not {value!r}")


def _start(tree: dict, found: Translation) -> bool:
    """Where the weights come from, and the vocabulary; True for a model from scratch."""
    take, model = found.take, tree.get("model") or {}
    for key in ("init_from_nemo_model", "init_from_pretrained_model", "init_from_ptl_ckpt"):
        if any(left.startswith(f"{key}.") for left in found.left):
            found.refuse(key, "parts of several models are not put together here")
    start = take("init_from_nemo_model", "model.init_from")
    if start is None:  # of NeMo's script for adapters
        start = take("model.nemo_model", "model.init_from")
    pretrained = take("init_from_pretrained_model") or take("model.pretrained_model")
    if start is None and pretrained is not None:
        if not Path(str(pretrained)).exists() and not is_hub_id(str(pretrained)):
            found.refuse(
                "init_from_pretrained_model",
                f"{pretrained} is no name of the Hugging Face hub (owner/name); download its .nemo "
                "file and give that as init_from_nemo_model=FILE",
            )
        start = str(pretrained)
        found.set("model.init_from", start, "init_from_pretrained_model")
    weights = take("init_from_ptl_ckpt")
    if weights is not None:
        found.refuse(
            "init_from_ptl_ckpt",
            f"it has weights alone; python -m converters.nemo2st {weights} --like MODEL.nemo -o "
            "FOLDER, then init_from_nemo_model=FOLDER",
        )
    scratch = start is None and "encoder" in model
    if scratch and "transf_decoder" in model:
        found.refuse(
            "model.transf_decoder",
            "multi-task models are not trained from scratch here; give init_from_nemo_model=FILE",
        )
    kind = take("model.tokenizer.type")
    if scratch:
        section = {k: v for k, v in model.items() if k in ARCHITECTURE}
        # NeMo's scripts choose the class, its configurations do not name it.
        section.setdefault("target", _model_class(model))
        for key in list(found.left):
            names = key.split(".")
            if names[0] == "model" and names[1] in ARCHITECTURE and names[1] != "spec_augment":
                del found.left[key]
        found.set("model.config", section, "model")
    update = take("model.tokenizer.update_tokenizer")
    if (scratch or update) and kind == "agg":
        _languages(found)
    elif (scratch or update) and kind not in (None, "bpe"):
        found.refuse("model.tokenizer.type", f"a {kind} tokenizer is not read here; use bpe")
    elif scratch or update:
        take("model.tokenizer.dir", "model.tokenizer")
    if scratch and "tokenizer" not in model:
        labels = model.get("labels") or (model.get("decoder") or {}).get("vocabulary") or ()
        found.set("model.labels", list(labels), "model.labels")
    if take("model.char_labels.update_labels"):
        take("model.char_labels.labels", "model.labels", list)
    if "model.encoder.dropout" in found.left and not scratch:
        dropout = take("model.encoder.dropout", "model.dropout", float)
        for key in ("model.encoder.dropout_att", "model.encoder.dropout_pre_encoder"):
            if found.left.get(key) is not None:
                same = take(key) == dropout
                told = "is model.dropout" if same else f"model.dropout, {dropout}, is of these too"
                (found.taken if same else found.unused).append((key, told))
    return scratch


def _languages(found: Translation) -> None:
    """A tokenizer for each language, as NeMo's aggregate tokenizer has them."""
    section, paths = "model.tokenizer.langs.", {}
    for key in [key for key in found.left if key.startswith(section)]:
        lang, _, option = key.removeprefix(section).rpartition(".")
        value = found.take(key)
        if option == "dir" and value is not None:
            paths[lang] = value
        elif option == "type" and value not in (None, "bpe"):
            found.refuse(key, f"a {value} tokenizer is not read here; use bpe")
    found.set("model.tokenizer", paths, section.rstrip("."))


def _model_class(model: dict) -> str:
    if (model.get("model_defaults") or {}).get("initialize_prompt_feature"):
        kind = "hybrid_rnnt_ctc" if "aux_ctc" in model else "rnnt"
        name = "HybridRNNTCTCBPEModel" if "aux_ctc" in model else "RNNTBPEModel"
        return f"nemo.collections.asr.models.{kind}_bpe_models_prompt.EncDec{name}WithPrompt"
    pieces = "BPE" if "tokenizer" in model else ""
    kind = "_bpe" if pieces else ""
    if "joint" not in model:
        return f"nemo.collections.asr.models.ctc{kind}_models.EncDecCTCModel{pieces}"
    if "aux_ctc" in model:
        module = f"nemo.collections.asr.models.hybrid_rnnt_ctc{kind}_models"
        return f"{module}.EncDecHybridRNNTCTC{pieces}Model"
    return f"nemo.collections.asr.models.rnnt{kind}_models.EncDecRNNT{pieces}Model"


def _losses(found: Translation) -> None:
    take = found.take
    found.set("loss.eps", 0.0, "model.loss (skips no cells)")
    take("model.label_smoothing", "loss.label_smoothing", float)
    take("model.use_loss_mask_for_prompt", "loss.mask_prompt", bool)
    for loss in ("tdt", "warprnnt_numba"):
        take(f"model.loss.{loss}_kwargs.fastemit_lambda", "loss.fastemit_lambda", float)
    for key in ("sigma", "omega"):
        take(f"model.loss.tdt_kwargs.{key}", f"loss.{key}", float)
    take("model.rnnt_reduction", "loss.transducer_reduction")
    take("model.aux_ctc.ctc_reduction", "loss.ctc_reduction")
    take("model.ctc_reduction", "loss.ctc_reduction")
    take("model.aux_ctc.ctc_loss_weight", "loss.ctc_weight", float)
    if found.left.get("model.interctc.apply_at_layers"):
        take("model.interctc.apply_at_layers", "loss.interctc_layers", list)
        take("model.interctc.loss_weights", "loss.interctc_weights", list)
    take("model.use_cr_ctc", "loss.use_cr_ctc")


def _spec_augment(tree: dict, found: Translation, scratch: bool) -> None:
    """NeMo makes the masks anew from the section: what it leaves out has NeMo's defaults, not the
    checkpoint's values."""
    section = (tree.get("model") or {}).get("spec_augment")
    if section:
        for name, default in MASKS.items():
            if found.take(f"model.spec_augment.{name}", f"spec_augment.{name}") is None:
                found.set(f"spec_augment.{name}", default)
    for name in ("use_vectorized_code", "use_numba_kernel"):
        found.take(f"model.spec_augment.{name}")  # the same masks by another road
    if scratch:
        found.take("model.spec_augment")


def _freezing(found: Translation) -> None:
    modules, until, take = [], {}, found.take
    for key, part in (("model.freeze_encoder", "encoder"), ("model.freeze_decoder", "prediction")):
        if take(key):
            modules.append(part)
            found.taken.append((key, f"freeze.modules: {part}"))
    if take("model.freeze_updates.enabled"):
        for part, ours in (("encoder", "encoder"), ("decoder", "prediction"), ("joint", "joint")):
            steps = take(f"model.freeze_updates.modules.{part}")
            if steps is not None:
                modules.append(ours)
                if not isinstance(steps, int) or isinstance(steps, bool):
                    key = f"model.freeze_updates.modules.{part}"
                    found.refuse(key, f"is {steps!r}, expected a whole number of steps")
                if steps >= 0:
                    until[ours] = steps
                found.taken.append((f"model.freeze_updates.modules.{part}", f"freeze: {ours}"))
    if modules:
        found.set("freeze.modules", modules)
    if until:
        found.set("freeze.until", until)


def _trainer(found: Translation) -> None:
    take = found.take
    ends = {"trainer.max_steps": "trainer.max_steps", "trainer.max_epochs": "trainer.epochs"}
    for key in ends:  # -1: not by this one
        given = found.number(key, 0)
        if given >= 1:
            found.left[key] = given
    if ends.keys() <= found.left.keys():
        found.refuse(
            "trainer.max_epochs",
            "NeMo ends at it or at trainer.max_steps, whichever comes first; set one to null",
        )
    for key, ours in ends.items():
        take(key, ours, int)
    _validation_rhythm(found)
    take("trainer.accumulate_grad_batches", "trainer.accumulate")
    if take("trainer.gradient_clip_algorithm") not in (None, "norm"):
        found.refuse("trainer.gradient_clip_algorithm", "only the norm is clipped here")
    clip = found.number("trainer.gradient_clip_val", 0) or None
    found.set("trainer.clip_grad_norm", clip)
    found.taken.append(("trainer.gradient_clip_val", f"trainer.clip_grad_norm: {clip}"))
    precision = found.left.get("trainer.precision")
    if precision is not None and str(precision) not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ValueError(f"{found.where}: trainer.precision is {precision!r}; known: {known}")
    take("trainer.precision", "trainer.precision", lambda v: PRECISIONS[str(v)])
    devices = {"gpu": "cuda", "cuda": "cuda", "cpu": "cpu", "auto": "auto"}
    if found.left.get("trainer.accelerator") not in (None, *devices):
        found.refuse("trainer.accelerator", f"is one of {', '.join(devices)} here")
    take("trainer.accelerator", "trainer.device", devices.get)
    take("trainer.sync_batchnorm", "trainer.sync_batchnorm")
    take("trainer.log_every_n_steps", "trainer.log_every_steps")
    limit = take("trainer.limit_train_batches")
    if limit not in (None, 1.0):
        found.refuse("trainer.limit_train_batches", "see data.train: max_clips or max_hours")


def _validation_rhythm(found: Translation) -> None:
    """Lightning's val_check_interval: a float is a share of an epoch, an int a number of batches,
    of which `accumulate_grad_batches` make a step; then only in every so manieth epoch."""
    interval, epochs = "trainer.val_check_interval", "trainer.check_val_every_n_epoch"
    every, given = found.left.get(epochs), found.left.get(interval)
    for key, value in ((epochs, every), (interval, given)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and value > 0):
            found.refuse(key, f"is {value!r}, expected a number above 0")
    if isinstance(given, float) and given > 1:
        found.refuse(interval, f"is {given}; give a share of an epoch or a whole number of batches")
    in_epoch = given is not None and not (isinstance(given, float) and given == 1)
    if in_epoch and every not in (None, 1):
        found.refuse(
            epochs, f"is {every} beside {interval}, {given}; give one of them, the other null"
        )
    if isinstance(given, int):
        batches = int(found.left.get("trainer.accumulate_grad_batches") or 1)
        found.take(interval, "trainer.val_every_steps", lambda v: max(1, v // batches))
    else:
        found.take(interval, "trainer.val_every_epochs", float)
    if found.take(epochs) is not None and not in_epoch:
        found.set("trainer.val_every_epochs", float(every), epochs)


def _keeping(found: Translation) -> None:
    take = found.take
    section = "exp_manager.checkpoint_callback_params"
    metrics = {"val_wer": "wer", "val_cer": "cer", "train_loss": "train_loss"}
    multi_task = any(key.startswith("model.transf_decoder.") for key in found.left)
    if multi_task and found.left.get(f"{section}.monitor") == "val_loss":  # their default
        found.left.pop(f"{section}.monitor")
        found.unused.append((f"{section}.monitor", "the WER of validation decides, not its loss"))
    monitor = found.left.get(f"{section}.monitor")
    if monitor is not None and monitor not in metrics:
        known = ", ".join(metrics)
        found.refuse(f"{section}.monitor", f"{monitor!r} is not measured here; known: {known}")
    take(f"{section}.monitor", "keep.metric", metrics.get)
    if found.left.get(f"{section}.mode") not in (None, "min"):
        found.refuse(f"{section}.mode", "the lowest is kept here")
    if found.left.get(f"{section}.save_top_k") is not None:
        kept = found.number(f"{section}.save_top_k", 1)  # -1: all
        found.set("keep.top_k", None if kept < 0 else max(1, int(kept)), f"{section}.save_top_k")
    take(f"{section}.every_n_train_steps", "trainer.save_every_steps")
    if take("exp_manager.create_early_stopping_callback"):
        _early_stopping(monitor, metrics, found)
    if take("exp_manager.ema.enable"):
        if take("exp_manager.ema.decay", "trainer.ema_decay", float) is None:
            found.set("trainer.ema_decay", 0.999, "exp_manager.ema.decay (left out)")
        if take("exp_manager.ema.every_n_steps") not in (None, 1):
            found.refuse("exp_manager.ema.every_n_steps", "the average moves at every step here")
        take("exp_manager.ema.cpu_offload")  # the same average elsewhere
    else:
        found.drop("exp_manager.ema")  # switched off


def _early_stopping(kept_by: str | None, metrics: dict[str, str], found: Translation) -> None:
    """What is left out has NeMo's default; one metric keeps models and stops the run here."""
    section, take = "exp_manager.early_stopping_callback_params", found.take
    monitor = take(f"{section}.monitor") or "val_loss"
    if monitor not in metrics:
        known = ", ".join(metrics)
        found.refuse(f"{section}.monitor", f"{monitor!r} is not measured here; known: {known}")
    if kept_by not in (None, monitor):
        found.refuse(f"{section}.monitor", f"is {monitor!r}, but models are kept by {kept_by!r}")
    found.set("keep.metric", metrics[monitor], f"{section}.monitor")
    if found.left.get(f"{section}.mode") not in (None, "min"):
        found.refuse(f"{section}.mode", "the lowest is kept here")
    for key in ("stopping_threshold", "divergence_threshold"):
        if take(f"{section}.{key}") is not None:
            found.refuse(f"{section}.{key}", "has no counterpart here; set it to null")
    for key, default in (("patience", 10), ("min_delta", 0.001)):
        if take(f"{section}.{key}", f"keep.{key}", type(default)) is None:
            found.set(f"keep.{key}", default, f"{section}.{key} (left out)")
