"""A NeMo fine-tuning YAML (`model.train_ds`, `trainer`, `exp_manager`) as a recipe of ours.

`translate` gives the recipe, line by line what became of each key, and every key that has no effect
here, with the reason: nothing is dropped in silence. Sources: NeMo's `examples/asr/conf` and
`speech_to_text_finetune.py`, `core/config/optimizers.py`, `utils/exp_manager.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path

SCHEDULERS = {
    "CosineAnnealing": "cosine",
    "NoamAnnealing": "noam",
    "InverseSquareRootAnnealing": "inverse_sqrt",
    "PolynomialDecayAnnealing": "linear",
    "PolynomialHoldDecayAnnealing": "wsd",
    "WarmupHoldPolicy": "wsd",
    "WarmupAnnealing": "linear",
}
PRECISIONS = {"32": "fp32", "32-true": "fp32", "bf16": "bf16", "bf16-mixed": "bf16"}
PRECISIONS |= {"bf16-true": "bf16_pure", "16": "bf16", "16-mixed": "bf16"}
WHY_NOT = {  # the longest prefix decides
    "model.train_ds.shuffle": "every epoch is shuffled, by trainer.seed",
    "model.train_ds.is_tarred": "told by tarred_audio_filepaths",
    "model.train_ds.use_lhotse": "batches are planned here without lhotse",
    "model.train_ds.num_buckets": "batches are cut where a duration changes, without fixed buckets",
    "model.train_ds.bucket": "batches are cut where a duration changes, without fixed buckets",
    "model.train_ds.shuffle_n": "tarred sets mix neighbouring tars",
    "model.train_ds.pin_memory": "no loader processes",
    "model.train_ds.use_start_end_token": "no start and end tokens are added",
    "model.validation_ds": "validation has the batches of training, without shuffling",
    "model.test_ds": "use fastconformer.evaluate on the test manifests",
    "model.preprocessor": "comes from the checkpoint",
    "model.encoder": "comes from the checkpoint",
    "model.decoder": "comes from the checkpoint",
    "model.joint": "comes from the checkpoint; the loss never builds the joint's tensor",
    "model.aux_ctc": "comes from the checkpoint",
    "model.decoding": "training decodes greedily",
    "model.model_defaults": "comes from the checkpoint",
    "model.tokenizer": "the checkpoint's tokenizer stays (tokenizer.update_tokenizer is false)",
    "model.labels": "come from the checkpoint",
    "model.optim.sched.max_steps": "is trainer.max_steps",
    "model.log_prediction": "predictions are always shown",
    "model.compute_eval_loss": "WER and CER are what is evaluated",
    "model.skip_nan_grad": "steps that are not finite are always skipped and counted",
    "trainer.max_epochs": "trainer.max_steps decides",
    "trainer.devices": "start the command with torchrun for several GPUs",
    "trainer.num_nodes": "start the command with torchrun for several machines",
    "trainer.strategy": "torchrun gives DDP; see trainer.parallel",
    "trainer.num_sanity_val_steps": "the untouched model is always evaluated first",
    "trainer.use_distributed_sampler": "batches are dealt out without it",
    "trainer.enable": "always there",
    "trainer.logger": "TensorBoard and JSON lines are always written",
    "exp_manager.resume": "the same command always goes on; see resume",
    "exp_manager.create_tensorboard_logger": "TensorBoard is always written",
    "exp_manager.create_checkpoint_callback": "checkpoints are always written",
    "exp_manager.create_wandb_logger": "there is no W&B logger; TensorBoard and JSON lines are",
    "exp_manager.checkpoint_callback_params.always_save_nemo": "model.nemo is always written",
}


@dataclass
class Translation:
    """recipe: nested dict of our keys; taken: (NeMo's key, ours) pairs; unused: (key, reason)."""

    recipe: dict = field(default_factory=dict)
    taken: list[tuple[str, str]] = field(default_factory=list)
    unused: list[tuple[str, str]] = field(default_factory=list)

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


def translate(tree: dict, where: str = "recipe") -> Translation:
    """`tree`: the YAML, interpolations resolved.

    Raises:
        ValueError: a key asks for what this project does not do and what would change the result.
    """
    found, left = Translation(), _flat(tree)

    def take(key: str, ours: str | None = None, value=None, note: str = "") -> object:
        """NeMo's value of `key`, None where it is absent or null; noted as become `ours`."""
        given = left.pop(key, None)
        if given is None:
            return None
        if ours is not None:
            value = given if value is None else value(given)
            if value is None:
                found.unused.append((key, note or "has no counterpart"))
                return given
            _set(found.recipe, ours, value)
            shown = "the architecture, from scratch" if isinstance(value, dict) else value
            found.taken.append((key, f"{ours}: {shown}"))
        return given

    name, folder = take("name"), take("exp_manager.exp_dir")
    name = take("exp_manager.name") or name or "nemo_recipe"
    output = str(Path(str(folder or "runs")) / str(name))
    _set(found.recipe, "output", output)
    found.taken.append(("exp_manager.exp_dir, name", f"output: {output}"))

    scratch = _start(tree, left, take, where)
    _data(left, take, found, where)
    _optimisation(left, take, where)
    _losses(left, take)
    for key in ("freq_masks", "time_masks", "freq_width", "time_width"):
        take(f"model.spec_augment.{key}", f"spec_augment.{key}")
    for key in ("rect_masks", "rect_time", "rect_freq"):
        take(f"model.spec_augment.{key}", f"spec_augment.{key}")
    _freezing(left, take, found)
    _trainer(left, take, found, where)
    _keeping(left, take)

    for key, value in left.items():
        if value is None or key.endswith("_target_") or (scratch and key.startswith("model.")):
            continue
        reasons = [prefix for prefix in WHY_NOT if key.startswith(prefix)]
        reason = WHY_NOT[max(reasons, key=len)] if reasons else "nothing here reads it"
        found.unused.append((key, reason))
    return found


def _start(tree: dict, left: dict, take, where: str) -> bool:
    """Where the weights come from; True for a model from scratch."""
    start = take("init_from_nemo_model", "model.init_from")
    pretrained = take("init_from_pretrained_model")
    if start is None and pretrained is not None:
        path = Path(str(pretrained))
        if not path.exists():
            raise ValueError(
                f"{where}: init_from_pretrained_model names {pretrained}; download its .nemo file "
                "and give that as init_from_nemo_model=FILE"
            )
        left["init_from_pretrained_model"] = str(path)
        start = take("init_from_pretrained_model", "model.init_from")
    scratch = start is None and "encoder" in tree.get("model", {})
    if scratch:
        keys = ("preprocessor", "spec_augment", "encoder", "decoder", "joint", "decoding", "loss")
        keys += ("aux_ctc", "model_defaults", "interctc", "sample_rate", "target", "_target_")
        section = {k: v for k, v in tree["model"].items() if k in keys}
        # NeMo's scripts choose the class, its configurations do not name it.
        section.setdefault("target", _model_class(tree["model"]))
        left["model"] = section
        take("model", "model.config")
    update = take("model.tokenizer.update_tokenizer")
    if scratch or update:
        take("model.tokenizer.dir", "model.tokenizer")
        left.pop("model.tokenizer.type", None)
    if "model.encoder.dropout" in left and not scratch:
        take("model.encoder.dropout", "model.dropout")
    return scratch


def _model_class(model: dict) -> str:
    pieces = "BPE" if "tokenizer" in model else ""
    if "joint" not in model:
        return f"nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModel{pieces}"
    if "aux_ctc" in model:
        module = "nemo.collections.asr.models.hybrid_rnnt_ctc_bpe_models"
        return f"{module}.EncDecHybridRNNTCTC{pieces}Model"
    return f"nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNT{pieces}Model"


def _data(left: dict, take, found: Translation, where: str) -> None:
    section = "model.train_ds"
    if take(f"{section}.trim_silence"):
        raise ValueError(f"{where}: {section}.trim_silence is not done here; trim the audio before")
    manifests = _paths(left.pop(f"{section}.manifest_filepath", None))
    tars = _paths(left.pop(f"{section}.tarred_audio_filepaths", None))
    if tars and len(tars) != len(manifests):
        raise ValueError(
            f"{where}: {len(tars)} tarred_audio_filepaths for {len(manifests)} manifests"
        )
    entries = [
        {"manifest": manifest, "tarred_audio_filepaths": tar} if tar else manifest
        for manifest, tar in zip(manifests, tars or [None] * len(manifests), strict=True)
    ]
    _set(found.recipe, "data.train", entries)
    found.taken.append((f"{section}.manifest_filepath", f"data.train: {manifests}"))
    validation = _paths(left.pop("model.validation_ds.manifest_filepath", None))
    if validation:
        _set(found.recipe, "data.validation", validation)
        found.taken.append(
            ("model.validation_ds.manifest_filepath", f"data.validation: {validation}")
        )
    batch_duration = take(f"{section}.batch_duration", "data.batch_duration_s", float)
    batch_size = take(f"{section}.batch_size")
    if batch_size is not None and int(batch_size) > 0:
        left[f"{section}.batch_size"] = batch_size
        take(f"{section}.batch_size", "data.batch_size")
    elif batch_duration is not None:
        _set(found.recipe, "data.batch_size", None)
    take(f"{section}.quadratic_duration", "data.quadratic_duration_s", float)
    take(f"{section}.min_duration", "data.min_duration_s", float)
    take(f"{section}.max_duration", "data.max_duration_s", float)
    take(f"{section}.min_tps", "data.min_tokens_per_s", float)
    take(f"{section}.max_tps", "data.max_tokens_per_s", lambda v: float(v) if v > 0 else None)
    take(f"{section}.num_workers", "data.num_workers")
    take(f"{section}.reweight_temperature", "data.temperature")
    take(f"{section}.seed", "trainer.seed", lambda v: v if isinstance(v, int) else None)
    for rate in (f"{section}.sample_rate", "model.sample_rate", "model.validation_ds.sample_rate"):
        if rate in left:
            found.unused.append((rate, "audio is resampled to the checkpoint's rate"))
            del left[rate]


def _optimisation(left: dict, take, where: str) -> None:
    names = {"adamw": "adamw", "adam": "adamw", "adamw8bit": "adamw8bit"}
    name = left.get("model.optim.name")
    if name is not None and str(name).lower() not in names:
        raise ValueError(f"{where}: model.optim.name is {name!r}; here: adamw or adamw8bit")
    take("model.optim.name", "optim.name", lambda v: names[str(v).lower()])
    take("model.optim.lr", "optim.lr", float)
    take("model.optim.betas", "optim.betas", list)
    take("model.optim.eps", "optim.eps", float)
    take("model.optim.weight_decay", "optim.weight_decay", float)
    sched = "model.optim.sched"
    name = left.get(f"{sched}.name")
    if name is not None and name not in SCHEDULERS:
        raise ValueError(f"{where}: {sched}.name is {name!r}; known: {', '.join(SCHEDULERS)}")
    take(f"{sched}.name", "schedule.name", SCHEDULERS.get)
    take(f"{sched}.warmup_steps", "schedule.warmup_steps")
    take(f"{sched}.warmup_ratio", "schedule.warmup_ratio")
    take(f"{sched}.min_lr", "schedule.min_lr", float)
    take(f"{sched}.hold_steps", "schedule.hold_steps")
    take(f"{sched}.d_model", "schedule.d_model", lambda v: v if isinstance(v, int) else None)


def _losses(left: dict, take) -> None:
    for loss in ("tdt", "warprnnt_numba", "multiblank_rnnt"):
        take(f"model.loss.{loss}_kwargs.fastemit_lambda", "loss.fastemit_lambda", float)
    for key in ("sigma", "omega"):
        take(f"model.loss.tdt_kwargs.{key}", f"loss.{key}", float)
    take("model.rnnt_reduction", "loss.transducer_reduction")
    take("model.aux_ctc.ctc_reduction", "loss.ctc_reduction")
    take("model.ctc_reduction", "loss.ctc_reduction")
    take("model.aux_ctc.ctc_loss_weight", "loss.ctc_weight", float)
    layers = left.get("model.interctc.apply_at_layers")
    if layers:
        take("model.interctc.apply_at_layers", "loss.interctc_layers", list)
        take("model.interctc.loss_weights", "loss.interctc_weights", list)
    take("model.use_cr_ctc", "loss.use_cr_ctc")


def _freezing(left: dict, take, found: Translation) -> None:
    modules = []
    for key, part in (("model.freeze_encoder", "encoder"), ("model.freeze_decoder", "prediction")):
        if take(key):
            modules = [*modules, part]
            found.taken.append((key, f"freeze.modules: {part}"))
    until = {}
    if take("model.freeze_updates.enabled"):
        for part, ours in (("encoder", "encoder"), ("decoder", "prediction"), ("joint", "joint")):
            steps = take(f"model.freeze_updates.modules.{part}")
            if steps is not None:
                modules = [*modules, ours]
                if int(steps) >= 0:
                    until[ours] = int(steps)
                found.taken.append((f"model.freeze_updates.modules.{part}", f"freeze: {ours}"))
    if modules:
        _set(found.recipe, "freeze.modules", modules)
    if until:
        _set(found.recipe, "freeze.until", until)


def _trainer(left: dict, take, found: Translation, where: str) -> None:
    steps = left.get("trainer.max_steps")
    if steps is not None and int(steps) > 0:
        take("trainer.max_steps", "trainer.max_steps")
    else:
        left.pop("trainer.max_steps", None)
        take("trainer.max_epochs", "trainer.epochs")
    take("trainer.accumulate_grad_batches", "trainer.accumulate")
    clip = take("trainer.gradient_clip_val")
    _set(found.recipe, "trainer.clip_grad_norm", float(clip) if clip else None)
    found.taken.append(("trainer.gradient_clip_val", f"trainer.clip_grad_norm: {clip or None}"))
    precision = left.get("trainer.precision")
    if precision is not None and str(precision) not in PRECISIONS:
        raise ValueError(
            f"{where}: trainer.precision is {precision!r}; known: {', '.join(PRECISIONS)}"
        )
    take("trainer.precision", "trainer.precision", lambda v: PRECISIONS[str(v)])
    take(
        "trainer.accelerator",
        "trainer.device",
        {"gpu": "cuda", "cuda": "cuda", "cpu": "cpu", "auto": "auto"}.get,
    )
    take("trainer.sync_batchnorm", "trainer.sync_batchnorm")
    take("trainer.log_every_n_steps", "trainer.log_every_steps")
    take(
        "trainer.val_check_interval",
        "trainer.val_every_steps",
        lambda v: v if isinstance(v, int) and v > 1 else None,
        "a share of an epoch; validation is once an epoch, or trainer.val_every_steps",
    )


def _keeping(left: dict, take) -> None:
    section = "exp_manager.checkpoint_callback_params"
    metrics = {"val_wer": "wer", "val_cer": "cer", "train_loss": "train_loss"}
    take(f"{section}.monitor", "keep.metric", metrics.get, "only wer, cer or train_loss")
    take(f"{section}.save_top_k", "keep.top_k", lambda v: max(1, int(v)))
    take(f"{section}.every_n_train_steps", "trainer.save_every_steps")
    if take("exp_manager.create_early_stopping_callback"):
        take("exp_manager.early_stopping_callback_params.patience", "keep.patience")
        take("exp_manager.early_stopping_callback_params.min_delta", "keep.min_delta", float)
    if take("exp_manager.ema.enable"):
        take("exp_manager.ema.decay", "trainer.ema_decay", float)


def _paths(value) -> list[str]:
    """NeMo's ways to write manifests: a string, with commas, a list, a list of lists."""
    if value is None or value in ("", "???"):
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [path for item in value for path in _paths(item)]


def _flat(tree: dict, prefix: str = "") -> dict:
    """Lists stay whole."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _set(tree: dict, key: str, value) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value
