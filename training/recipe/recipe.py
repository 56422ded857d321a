"""The recipe: one YAML file, plus `key=value` overrides, into frozen and checked dataclasses.

Nothing else in the project reads recipe YAML. Paths are taken as given, so relative ones start at
the current folder. A value of null means "as the checkpoint's own config says" or "off", as the
comment beside the field tells.
"""

import dataclasses
import difflib
import logging
import math
import types
import typing
from pathlib import Path

from yaml import YAMLError

from fastconformer.checkpoint.yaml_config import check_yaml_depth
from training.recipe.nemo import is_nemo, translate

try:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ModuleNotFoundError:  # `load_recipe` says where it comes from
    OmegaConf = None

log = logging.getLogger("finetune")


@dataclasses.dataclass(frozen=True)
class ModelRecipe:
    init_from: str | None = None  # .nemo file or converted folder
    config: str | dict | None = None  # from scratch instead: a NeMo-style model config
    tokenizer: str | None = None  # a folder or file; with init_from: change the vocabulary to it
    transfer: str = "by_piece"  # rows to the new vocabulary: by_piece | none (all are random)
    new_rows: str = "mean"  # of pieces without a row: mean | zeros | random
    dropout: float | None = None  # of all encoder layers; null: the checkpoint's
    sample_rate: int | None = None  # e.g. 8000: a front end of this rate on the same weights


@dataclasses.dataclass(frozen=True)
class SourceRecipe:
    """One entry of data.train; a plain path is one with nothing but its manifest."""

    manifest: str = ""  # NeMo manifest; {0..7} or _OP_0..7_CL_ stands for many, as in NeMo
    name: str | None = None  # in logs and tables; null: the manifest's
    weight: float | None = None  # share of the draws, relative to the others'; all or none
    max_hours: float | None = None  # a fixed random part of it; null: all
    max_clips: int | None = None
    lang: str | None = None  # only its lines of this `lang`; null: as data.lang
    tarred_audio_filepaths: str | None = None  # its audio lies in these tar files


@dataclasses.dataclass(frozen=True)
class EncoderRecipe:
    attention: str | None = None  # birwkv7: in the place of self-attention; null: the checkpoint's
    warm_start: bool = True  # BiRWKV7 from the attention's projections; false: from random
    direction_dropout: float = 0.0  # BiRWKV7: share of layers and batches with one direction only


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    # Paths or SourceRecipes; one that is listed twice is seen twice.
    train: tuple[str | SourceRecipe, ...] = ()
    temperature: float = 1.0  # shares are weight ** temperature: 0 makes them equal, as in NeMo
    validation: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> manifest
    lang: str | None = None  # only lines of this `lang` (or without one); null: all
    min_duration_s: float = 0.1
    max_duration_s: float = 40.0
    min_tokens_per_s: float | None = None
    max_tokens_per_s: float | None = None
    min_chars_per_s: float | None = None
    max_chars_per_s: float | None = None
    max_tokens_per_frame: float | None = 1.0  # transducers, encoder frames; CTC has its own limit
    pad_to_s: float = 1.0  # silence on both sides of shorter clips, as `transcribe` adds; 0: none
    batch_size: int | None = 16  # most clips in a batch; null: no limit
    # Most seconds in a batch, padding included; "auto": the most that the device takes.
    batch_duration_s: float | str | None = None
    batch_memory_gb: float | None = None  # what "auto" may take; null: nearly all that is free
    quadratic_duration_s: float | None = None  # a clip of d seconds counts d + d^2 / this
    num_workers: int = 2  # threads that read ahead; 0 reads in the loop
    cache_gb: float = 4.0  # decoded audio stays in memory when all of it fits in this


@dataclasses.dataclass(frozen=True)
class LossRecipe:
    heads: str = "all"  # all | ctc | transducer
    ctc_weight: float | None = None  # hybrid only; null: the checkpoint's
    sigma: float | None = None  # TDT only; null: the checkpoint's
    omega: float | None = None  # TDT only; null: the checkpoint's
    fastemit_lambda: float | None = None  # null: the checkpoint's
    eps: float = 1e-7  # transducer: gradients skip cells of a lower occupancy; 0: none
    transducer_reduction: str | None = None  # null: the checkpoint's
    ctc_reduction: str | None = None  # null: the checkpoint's
    reduction: str | None = None  # of both, instead of the two above
    interctc_layers: tuple[int, ...] | None = None  # from 0; null: the checkpoint's; []: off
    interctc_weights: tuple[float, ...] | None = None  # one for each layer
    use_cr_ctc: bool = False
    cr_ctc_weight: float = 0.2  # of the consistency, beside CTC
    cr_ctc_time_mask_ratio: float = 2.5  # times as many time masks
    cr_ctc_time_warp: int = 80  # frames, shared by both views; 0: none


@dataclasses.dataclass(frozen=True)
class FreezeRecipe:
    encoder_layers: int | str = 0  # the subsampling and this many first layers, or "half"
    modules: tuple[str, ...] = ()  # e.g. [prediction, joint, ctc, subsampling, encoder.layers.0-3]
    until: dict[str, int] = dataclasses.field(default_factory=dict)  # part -> its first step
    batch_norm: str = "fixed"  # of frozen parts: fixed | adapt (statistics) | affine (and weights)


@dataclasses.dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters are all that moves, besides `also`; merged in what is saved."""

    rank: int = 0  # 0: no LoRA
    alpha: float | None = None  # the update is scaled by alpha / rank; null: as rank
    dropout: float = 0.0  # of the adapters' input
    targets: tuple[str, ...] = ("attention", "feed_forward")  # or linear layers, such as linear_q
    also: tuple[str, ...] = ()  # parts that move as a whole, such as [ctc, joint]


@dataclasses.dataclass(frozen=True)
class OptimRecipe:
    name: str = "adamw"  # adamw | adamw8bit
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 1e-3
    eps: float = 1e-8
    decay_norms_and_biases: bool = True  # NeMo decays every parameter
    lr_groups: dict[str, float] = dataclasses.field(default_factory=dict)  # part -> its lr
    layer_decay: float | None = None  # lr times this for every layer further from the heads


@dataclasses.dataclass(frozen=True)
class ScheduleRecipe:
    name: str = "cosine"  # cosine | linear | inverse_sqrt | noam | wsd | constant
    warmup_steps: int | None = None
    warmup_ratio: float | None = None  # of all steps, instead of warmup_steps
    min_lr: float = 1e-6
    hold_steps: int | None = None  # wsd: steps at lr between warm-up and decay
    hold_ratio: float | None = None  # of all steps, instead; both null: the last fifth decays
    decay_shape: str = "linear"  # wsd: linear | sqrt (1 - sqrt)
    d_model: int | None = None  # noam; null: the encoder's


@dataclasses.dataclass(frozen=True)
class TrainerRecipe:
    max_steps: int | None = None
    epochs: int | None = None  # instead of max_steps
    accumulate: int = 1  # batches in one optimizer step
    clip_grad_norm: float | None = 1.0  # null: no clipping
    precision: str = "fp32"  # fp32 | bf16 (autocast, weights in fp32) | bf16_pure (all in bf16)
    activation_checkpointing: bool = False  # encoder layers are computed twice, for less memory
    compile: bool = False  # encoder layers by torch.compile
    ema_decay: float | None = None  # average of the weights, measured and saved; null: off
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int | None = None  # CPU threads; null: torch's choice
    seed: int = 1234
    val_every_steps: int | None = None  # null: once per epoch
    log_every_steps: int = 10
    save_every_steps: int | None = None  # null: as val_every_steps
    keep_last: int = 2  # checkpoints that stay on disk
    max_nonfinite_steps: int = 20  # skipped steps before the run gives up
    parallel: str = "ddp"  # on many processes: ddp | fsdp
    sync_batchnorm: bool = False  # BatchNorm over all processes' clips


@dataclasses.dataclass(frozen=True)
class DistillRecipe:
    """Of `python -m training.distill`."""

    block_steps: int = 2000  # stage 1: each block learns its attention's output
    model_steps: int = 1000  # stage 2: the encoder learns the teacher's outputs
    model_lr: float | None = None  # of stage 2; null: optim.lr
    ctc_weight: float = 1.0  # of the CTC divergence beside the encoder's error
    output: str | None = None  # run folder; null: `output` with _distilled after it


@dataclasses.dataclass(frozen=True)
class SpecAugmentRecipe:
    """null everywhere: the checkpoint's `spec_augment`; freq_masks = time_masks = 0: off."""

    freq_masks: int | None = None
    time_masks: int | None = None
    freq_width: int | None = None  # mel bins
    time_width: float | int | None = None  # int: frames; float: share of the clip's frames
    rect_masks: int | None = None  # cut-out rectangles
    rect_time: int | None = None  # frames
    rect_freq: int | None = None  # mel bins


@dataclasses.dataclass(frozen=True)
class WhiteNoiseRecipe:
    probability: float = 0.0
    level_db: tuple[float, float] = (-90.0, -46.0)  # relative to full scale, as in NeMo


@dataclasses.dataclass(frozen=True)
class NoiseRecipe:
    manifests: tuple[str, ...] = ()
    probability: float = 0.0
    snr_db: tuple[float, float] = (0.0, 30.0)


@dataclasses.dataclass(frozen=True)
class RoomRecipe:
    manifests: tuple[str, ...] = ()  # impulse responses
    probability: float = 0.0


@dataclasses.dataclass(frozen=True)
class BabbleRecipe:
    """Other training clips, mixed."""

    probability: float = 0.0
    voices: tuple[int, int] = (3, 7)  # fewest and most
    snr_db: tuple[float, float] = (5.0, 20.0)


@dataclasses.dataclass(frozen=True)
class HumRecipe:
    probability: float = 0.0
    mains_hz: tuple[int, ...] = (50, 60)
    snr_db: tuple[float, float] = (10.0, 30.0)


@dataclasses.dataclass(frozen=True)
class TelephoneRecipe:
    probability: float = 0.0
    codecs: tuple[str, ...] = ("mulaw", "alaw")  # G.711; each clip gets one of them
    band_hz: tuple[float, float] = (300.0, 3400.0)
    packet_loss: float = 0.0  # the largest share of packets that are lost
    burst_packets: float = 3.0  # mean length of a burst
    packet_ms: float = 20.0


@dataclasses.dataclass(frozen=True)
class AugmentRecipe:
    """Of waveforms; (low, high) pairs are drawn from uniformly. All off unless given."""

    speeds: tuple[float, ...] = ()  # each draw gets one of them, pitch included
    gain_db: tuple[float, float] | None = None
    shift_s: float = 0.0  # earlier or later by at most this
    white_noise: WhiteNoiseRecipe = WhiteNoiseRecipe()
    noise: NoiseRecipe = NoiseRecipe()
    rir: RoomRecipe = RoomRecipe()
    babble: BabbleRecipe = BabbleRecipe()
    hum: HumRecipe = HumRecipe()
    telephone: TelephoneRecipe = TelephoneRecipe()


@dataclasses.dataclass(frozen=True)
class KeepRecipe:
    metric: str = "wer"  # wer | cer | train_loss | wer/SET/HEAD | cer/SET/HEAD; SET "all": all
    top_k: int = 1  # best evaluations whose models stay, in `top/`; 1: `best/` alone
    average: bool = False  # at the end, of the top_k; becomes `best/` if it is better
    patience: int | None = None  # evaluations without a better one before the run ends
    min_delta: float = 0.0  # how much better, for patience


@dataclasses.dataclass(frozen=True)
class GuardRecipe:
    """Against forgetting: a model is only "best" while one validation set keeps its WER."""

    set: str | None = None  # name in data.validation; null: no guard
    limit: float = 0.01  # WER may rise by this above the untouched model's
    relative: bool = False  # limit is a share of the untouched model's WER
    stop_after: int | None = None  # evaluations in a row above the limit before the run ends


@dataclasses.dataclass(frozen=True)
class RetainRecipe:
    """Keeping what the checkpoint knows; see training/retain.py."""

    lang: str | None = None  # the old language's `lang` in manifests; null: all clips are old
    distill_ctc: float = 0.0  # weight of KL(original || model) of CTC posteriors, on old clips
    distill_encoder: float = 0.0  # weight of the encoder states' relative squared distance
    l2_to_start: float = 0.0  # gradient of this times (weight - where it started)
    new_rows_steps: int = 0  # first steps, in which only the rows of new pieces move
    check_clips: int = 32  # on which a changed vocabulary is proven before the first step; 0: none


@dataclasses.dataclass(frozen=True)
class Recipe:
    output: str = ""  # the run folder
    resume: str = "auto"  # auto: go on from the run folder's last checkpoint | never
    model: ModelRecipe = ModelRecipe()
    encoder: EncoderRecipe = EncoderRecipe()
    data: DataRecipe = DataRecipe()
    loss: LossRecipe = LossRecipe()
    freeze: FreezeRecipe = FreezeRecipe()
    lora: LoraRecipe = LoraRecipe()
    optim: OptimRecipe = OptimRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    retain: RetainRecipe = RetainRecipe()
    trainer: TrainerRecipe = TrainerRecipe()
    spec_augment: SpecAugmentRecipe = SpecAugmentRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    distill: DistillRecipe = DistillRecipe()
    keep: KeepRecipe = KeepRecipe()
    guard: GuardRecipe = GuardRecipe()
    stages: tuple[dict, ...] = ()  # changes to the keys above; each starts from the last one's best


CHOICES = {
    "resume": ("auto", "never"),
    "model.transfer": ("by_piece", "none"),
    "model.new_rows": ("mean", "zeros", "random"),
    "encoder.attention": (None, "birwkv7"),
    "loss.heads": ("all", "ctc", "transducer"),
    "loss.transducer_reduction": (None, "mean_batch", "mean", "mean_volume", "sum"),
    "loss.ctc_reduction": (None, "mean_batch", "mean", "mean_volume", "sum"),
    "freeze.batch_norm": ("fixed", "adapt", "affine"),
    "loss.reduction": (None, "mean_batch", "mean", "mean_volume", "sum"),
    "optim.name": ("adamw", "adamw8bit"),
    "schedule.name": ("cosine", "linear", "inverse_sqrt", "noam", "wsd", "constant"),
    "schedule.decay_shape": ("linear", "sqrt"),
    "trainer.precision": ("fp32", "bf16", "bf16_pure"),
    "trainer.parallel": ("ddp", "fsdp"),
}
AT_LEAST = {
    "data.min_duration_s": 0,
    "data.pad_to_s": 0,
    "data.batch_size": 1,
    "data.num_workers": 0,
    "data.cache_gb": 0,
    "loss.sigma": 0,
    "loss.fastemit_lambda": 0,
    "lora.rank": 0,
    "loss.cr_ctc_weight": 0,
    "loss.cr_ctc_time_warp": 0,
    "optim.weight_decay": 0,
    "retain.distill_ctc": 0,
    "retain.distill_encoder": 0,
    "retain.l2_to_start": 0,
    "retain.new_rows_steps": 0,
    "retain.check_clips": 0,
    "schedule.warmup_steps": 0,
    "schedule.hold_steps": 0,
    "schedule.d_model": 1,
    "schedule.min_lr": 0,
    "trainer.max_steps": 1,
    "trainer.epochs": 1,
    "trainer.accumulate": 1,
    "trainer.threads": 1,
    "trainer.seed": 0,
    "trainer.val_every_steps": 1,
    "trainer.log_every_steps": 1,
    "trainer.save_every_steps": 1,
    "trainer.keep_last": 1,
    "trainer.max_nonfinite_steps": 1,
    "distill.block_steps": 0,
    "distill.model_steps": 0,
    "distill.ctc_weight": 0,
    "spec_augment.freq_masks": 0,
    "spec_augment.time_masks": 0,
    "spec_augment.freq_width": 0,
    "spec_augment.time_width": 0,
    "spec_augment.rect_masks": 0,
    "spec_augment.rect_time": 0,
    "spec_augment.rect_freq": 0,
    "data.temperature": 0,
    "data.min_tokens_per_s": 0,
    "data.min_chars_per_s": 0,
    "augment.shift_s": 0,
    "augment.telephone.burst_packets": 1,
    "augment.telephone.packet_ms": 1,
    "model.sample_rate": 1000,
    "keep.top_k": 1,
    "keep.patience": 1,
    "keep.min_delta": 0,
    "guard.limit": 0,
    "guard.stop_after": 1,
}
ABOVE_ZERO = (
    "data.max_duration_s",
    "data.quadratic_duration_s",
    "data.batch_memory_gb",
    "data.max_tokens_per_s",
    "data.max_chars_per_s",
    "data.max_tokens_per_frame",
    "lora.alpha",
    "loss.cr_ctc_time_mask_ratio",
    "optim.lr",
    "optim.eps",
    "optim.layer_decay",
    "distill.model_lr",
)
SHARES = (
    "model.dropout",
    "encoder.direction_dropout",
    "loss.eps",
    "loss.ctc_weight",
    "loss.omega",
    "lora.dropout",
    "optim.layer_decay",
    "schedule.warmup_ratio",
    "schedule.hold_ratio",
    "trainer.ema_decay",
    "augment.white_noise.probability",
    "augment.noise.probability",
    "augment.rir.probability",
    "augment.babble.probability",
    "augment.hum.probability",
    "augment.telephone.probability",
    "augment.telephone.packet_loss",
)
RANGES = (  # (low, high)
    "augment.gain_db",
    "augment.white_noise.level_db",
    "augment.noise.snr_db",
    "augment.babble.voices",
    "augment.babble.snr_db",
    "augment.hum.snr_db",
    "augment.telephone.band_hz",
)


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides (dotted keys, YAML values). A NeMo
    training configuration is translated first, and the translation logged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, an unknown key (the nearest known one is named), a value of the
            wrong kind or out of range, or keys that contradict each other.
    """
    if OmegaConf is None:
        raise ValueError('recipes are read by omegaconf; get it with pip install -e ".[train]"')
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} is not a file; give the path of a YAML recipe")
    try:
        check_yaml_depth(path.read_bytes())
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable YAML file: {detail}") from None
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{path}: expected sections such as `data:`, found {tree!r}")
    if is_nemo(_plain(tree, path, resolve=False)):
        translation = translate(_plain(tree, path, resolve=True), str(path))
        log.info("%s is %s", path, translation)
        tree = OmegaConf.create(translation.recipe)  # overrides are in our keys
    _check_keys(Recipe, _plain(tree, path, resolve=False), str(path))
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value")
        key = override.split("=", 1)[0]
        try:
            given = OmegaConf.from_dotlist([override])
            _check_keys(Recipe, _plain(given, override, resolve=False), f"override {override!r}")
            OmegaConf.update(tree, key, OmegaConf.select(given, key), merge=False)
        except (YAMLError, OmegaConfBaseException) as error:
            detail = " ".join(str(error).split())
            raise ValueError(f"override {override!r}: {detail}") from None
    return recipe_from_dict(_plain(tree, path, resolve=True), str(path))


def recipe_from_dict(tree: dict, where: str = "recipe") -> Recipe:
    """Plain nested dict -> checked Recipe; `where` names the source in errors."""
    _check_keys(Recipe, tree, where)
    recipe = _convert(Recipe, tree, "", where)
    _check_values(recipe, where)
    return recipe


EITHER_OR = (
    ("trainer", "max_steps", "epochs"),
    ("schedule", "warmup_steps", "warmup_ratio"),
    ("schedule", "hold_steps", "hold_ratio"),
)


def stage_recipes(recipe: Recipe, where: str = "recipe") -> list[Recipe]:
    """The recipe of each stage: the whole one with that stage's changes, in `OUTPUT/stage_N`, from
    the second on starting from the `best` of the stage before (`last` without validation).

    Raises:
        ValueError: an unknown key, or a stage that is no valid recipe.
    """
    base = dataclasses.asdict(recipe) | {"stages": ()}
    stages = []
    for number, changes in enumerate(recipe.stages, start=1):
        name = f"{where}, stage {number}"
        _check_keys(Recipe, changes, name)
        for key in ("output", "stages", "resume"):
            if key in changes:
                raise ValueError(f"{name}: {key} belongs to the whole recipe, not to a stage")
        tree = dict(base)
        if stages:
            before = stages[-1]
            best = "best" if before.data.validation else "last"
            first = {"init_from": f"{before.output}/{best}", "dropout": base["model"]["dropout"]}
            tree["model"] = first
        tree["output"] = f"{recipe.output}/stage_{number}"
        for section, values in changes.items():
            if isinstance(values, dict) and isinstance(tree[section], dict):
                values = _merged(tree[section], values)
            tree[section] = values
        for section, *keys in EITHER_OR:
            given = [key for key in keys if (changes.get(section) or {}).get(key) is not None]
            if len(given) == 1:
                tree[section] |= {key: None for key in keys if key not in given}
        stages.append(recipe_from_dict(_listed(tree), name))
    return stages


def _merged(tree: dict, changes: dict) -> dict:
    merged = dict(tree)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = _merged(merged[key], value)
        merged[key] = value
    return merged


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML text that `load_recipe` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(_listed(dataclasses.asdict(recipe))))


def recipe_differences(old: Recipe, new: Recipe) -> dict[str, tuple]:
    """{dotted key: (old value, new value)} for every key that differs."""
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    keys = sorted(before.keys() | after.keys())
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _plain(tree, where, resolve: bool) -> dict:
    try:
        return OmegaConf.to_container(tree, resolve=resolve, throw_on_missing=resolve)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def _listed(value):
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _check_keys(cls, tree, where: str, prefix: str = ""):
    if not isinstance(tree, dict):
        name = prefix.rstrip(".")
        raise ValueError(f"{where}: {name} must be a section of keys, not {tree!r}")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in tree.items():
        if key not in fields:
            raise ValueError(f"{where}: unknown key {prefix}{key}; {_nearest(str(key), prefix)}")
        if dataclasses.is_dataclass(fields[key]) and value is not None:
            _check_keys(fields[key], value, where, f"{prefix}{key}.")


def _nearest(key: str, prefix: str) -> str:
    """What an unknown key was probably meant to be: here first, then in any other section."""
    known = _all_keys(Recipe)
    here = [name[len(prefix) :] for name in known if name.startswith(prefix)]
    here = sorted({name.split(".")[0] for name in here})
    close = difflib.get_close_matches(key, here, n=1)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    last_parts = {name.split(".")[-1]: name for name in reversed(known)}
    close = difflib.get_close_matches(key, list(last_parts), n=1)
    if close:
        return f"did you mean {last_parts[close[0]]}?"
    return f"known keys: {', '.join(prefix + name for name in here)}"


def _all_keys(cls, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            keys += _all_keys(field.type, f"{prefix}{field.name}.")
        keys.append(f"{prefix}{field.name}")
    return keys


def _convert(kind, value, key: str, where: str):
    """`value` as `kind` (a type hint of the dataclasses above), or ValueError."""
    if dataclasses.is_dataclass(kind):
        prefix = f"{key}." if key else ""
        _check_keys(kind, value or {}, where, prefix)
        types_of = {field.name: field.type for field in dataclasses.fields(kind)}
        items = (value or {}).items()
        return kind(**{k: _convert(types_of[k], v, f"{prefix}{k}", where) for k, v in items})
    wrong = ValueError(f"{where}: {key} must be {_kind_name(kind)}, not {value!r}")
    if isinstance(kind, types.UnionType):
        if value is None and type(None) in kind.__args__:
            return None
        section = next((t for t in kind.__args__ if dataclasses.is_dataclass(t)), None)
        if section is not None and isinstance(value, dict):  # so that its own errors are told
            return _convert(section, value, key, where)
        # The stricter kinds first: 3 stays an int where float | int is allowed.
        for option in sorted(kind.__args__, key=lambda t: (bool, int, float, str, dict).index(t)
                             if t in (bool, int, float, str, dict) else 9):  # fmt: skip
            try:
                return _convert(option, value, key, where)
            except ValueError:
                continue
        raise wrong
    origin = typing.get_origin(kind)
    if origin is tuple:
        items = [value] if isinstance(value, str | dict) else value
        if not isinstance(items, list | tuple):
            raise wrong
        args = typing.get_args(kind)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise wrong
        return tuple(_convert(args[0], item, f"{key}[{i}]", where) for i, item in enumerate(items))
    if origin is dict:
        item_kind = typing.get_args(kind)[1]
        # A single manifest, or a list, gets its names from the files.
        if item_kind is str and isinstance(value, str):
            value = [value]
        if item_kind is str and isinstance(value, list):
            named = {Path(str(item)).stem: item for item in value}
            if len(named) < len(value):  # .../fsdd/test.jsonl and .../an4/test.jsonl
                named = {f"{Path(str(i)).parent.name}_{Path(str(i)).stem}": i for i in value}
            if len(named) < len(value):
                raise ValueError(f"{where}: {key} has files of one name; write {{name: file}}")
            value = named
        if not isinstance(value, dict):
            raise wrong
        return {str(k): _convert(item_kind, v, f"{key}.{k}", where) for k, v in value.items()}
    if kind is dict and isinstance(value, dict):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):
        return float(value)
    raise wrong


def _kind_name(kind) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names |= {type(None): "null", dict: "a mapping", SourceRecipe: "a mapping with a manifest"}
    if isinstance(kind, types.UnionType):
        return " or ".join(_kind_name(option) for option in kind.__args__)
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        count = "" if args[-1] is Ellipsis else f"{len(args)} values, "
        return f"a list ({count}each {_kind_name(args[0])})"
    if typing.get_origin(kind) is dict:
        item = typing.get_args(kind)[1]
        return f"a mapping from names to {'files' if item is str else _kind_name(item)}"
    return names.get(kind, str(kind))


def _check_values(recipe: Recipe, where: str):
    values = _flat(dataclasses.asdict(recipe))
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            listed = ", ".join("null" if choice is None else choice for choice in choices)
            raise ValueError(f"{where}: {key} is {values[key]!r}, expected one of {listed}")
    for key, low in AT_LEAST.items():
        if values[key] is not None and values[key] < low:
            raise ValueError(f"{where}: {key} is {values[key]}, expected at least {low}")
    for key in ABOVE_ZERO:
        if values[key] is not None and values[key] <= 0:
            raise ValueError(f"{where}: {key} is {values[key]}, expected more than 0")
    for key in SHARES:
        if values[key] is not None and not 0 <= values[key] <= 1:
            raise ValueError(f"{where}: {key} is {values[key]}, expected 0 to 1")
    if not all(0 <= beta < 1 for beta in recipe.optim.betas):
        raise ValueError(f"{where}: optim.betas is {recipe.optim.betas}, expected 0 <= beta < 1")
    clip = recipe.trainer.clip_grad_norm
    if clip is not None and clip <= 0:
        raise ValueError(f"{where}: trainer.clip_grad_norm is {clip}, expected more than 0 or null")
    layers = recipe.freeze.encoder_layers
    if layers != "half" and not (isinstance(layers, int) and layers >= 0):
        raise ValueError(f'{where}: freeze.encoder_layers is {layers!r}; give a count or "half"')
    for key, step in recipe.freeze.until.items():
        if step < 0:
            raise ValueError(f"{where}: freeze.until.{key} is {step}, expected a step, 0 or more")
    for key, rate in recipe.optim.lr_groups.items():
        if rate <= 0:
            raise ValueError(f"{where}: optim.lr_groups.{key} is {rate}, expected more than 0")
    if recipe.lora.rank and not recipe.lora.targets:
        raise ValueError(f"{where}: lora.targets is empty; name e.g. attention, or set rank 0")
    if recipe.data.min_duration_s >= recipe.data.max_duration_s:
        raise ValueError(f"{where}: data.min_duration_s must be below data.max_duration_s")
    if recipe.data.batch_size is None and recipe.data.batch_duration_s is None:
        raise ValueError(f"{where}: give data.batch_size or data.batch_duration_s, or both")
    _check_data(recipe, where)
    if not recipe.output:
        raise ValueError(f"{where}: output is missing; name the run folder, e.g. output: runs/a")
    if not recipe.data.train:
        raise ValueError(f"{where}: data.train is missing; list one manifest or more")
    if (recipe.model.init_from is None) == (recipe.model.config is None):
        raise ValueError(
            f"{where}: give either model.init_from (a .nemo file or folder) "
            "or model.config (from scratch)"
        )
    if recipe.model.config is not None and recipe.model.tokenizer is None:
        raise ValueError(f"{where}: model.config (from scratch) needs model.tokenizer")
    changes = recipe.model.init_from is not None and recipe.model.tokenizer is not None
    if recipe.retain.new_rows_steps and not changes:
        raise ValueError(
            f"{where}: retain.new_rows_steps needs new rows: model.init_from and model.tokenizer"
        )
    if recipe.model.init_from is None and (
        recipe.retain.distill_ctc or recipe.retain.distill_encoder
    ):
        raise ValueError(f"{where}: retain.distill_* need an original: model.init_from")
    if (recipe.trainer.max_steps is None) == (recipe.trainer.epochs is None):
        raise ValueError(f"{where}: give either trainer.max_steps or trainer.epochs")
    if recipe.schedule.warmup_steps is not None and recipe.schedule.warmup_ratio is not None:
        raise ValueError(f"{where}: give schedule.warmup_steps or schedule.warmup_ratio, not both")
    if recipe.trainer.parallel == "fsdp":
        # 8-bit blocks cannot be cut into shards, and FSDP2 wants one type of weights.
        for key, value in (("optim.name", "adamw8bit"), ("trainer.precision", "bf16_pure")):
            if values[key] == value:
                raise ValueError(
                    f"{where}: {key} {value} does not go with trainer.parallel fsdp; use ddp, or "
                    "adamw and bf16"
                )
    if recipe.schedule.hold_steps is not None and recipe.schedule.hold_ratio is not None:
        raise ValueError(f"{where}: give schedule.hold_steps or schedule.hold_ratio, not both")
    loss = recipe.loss
    if loss.reduction and (loss.transducer_reduction or loss.ctc_reduction):
        raise ValueError(f"{where}: loss.reduction sets both reductions; leave the others out")
    layers, weights = loss.interctc_layers, loss.interctc_weights
    if (layers is None) != (weights is None) or len(layers or ()) != len(weights or ()):
        raise ValueError(
            f"{where}: give loss.interctc_layers and loss.interctc_weights, one weight a layer"
        )
    if not all(0 <= weight <= 1 for weight in weights or ()) or sum(weights or ()) > 1:
        raise ValueError(
            f"{where}: loss.interctc_weights is {weights}, expected shares of at most 1 together"
        )
    if recipe.keep.average and recipe.keep.top_k < 2:
        raise ValueError(f"{where}: keep.average is of the keep.top_k best; set top_k to 2 or more")
    if recipe.guard.set is not None and recipe.guard.set not in recipe.data.validation:
        raise ValueError(
            f"{where}: guard.set is {recipe.guard.set!r}, data.validation has "
            f"{', '.join(recipe.data.validation) or 'none'}"
        )
    if recipe.stages:
        stage_recipes(recipe, where)
    if recipe.schedule.min_lr > recipe.optim.lr:
        raise ValueError(
            f"{where}: schedule.min_lr {recipe.schedule.min_lr} is above optim.lr {recipe.optim.lr}"
        )


def _check_data(recipe: Recipe, where: str):
    """Sections `data` and `augment`: what their keys mean together."""
    values = _flat(dataclasses.asdict(recipe))
    data, augment = recipe.data, recipe.augment
    limit = data.batch_duration_s
    if limit != "auto" and (isinstance(limit, str) or (limit is not None and limit <= 0)):
        raise ValueError(f"{where}: data.batch_duration_s is {limit!r}; give seconds or auto")
    if data.quadratic_duration_s is not None and limit is None:
        raise ValueError(f"{where}: data.quadratic_duration_s needs data.batch_duration_s")
    if data.batch_memory_gb is not None and limit != "auto":
        raise ValueError(f"{where}: data.batch_memory_gb needs data.batch_duration_s: auto")
    for kind in ("tokens", "chars"):
        low, high = values[f"data.min_{kind}_per_s"], values[f"data.max_{kind}_per_s"]
        if low is not None and high is not None and low >= high:
            raise ValueError(f"{where}: data.min_{kind}_per_s must be below data.max_{kind}_per_s")
    sources = [item for item in data.train if isinstance(item, SourceRecipe)]
    for number, source in enumerate(sources, start=1):
        name = f"data.train: {source.manifest or f'mapping {number}'}"
        if not source.manifest:
            raise ValueError(f"{where}: {name} has no manifest")
        for key in ("weight", "max_hours", "max_clips"):
            value = getattr(source, key)
            if value is not None and value <= 0:
                raise ValueError(f"{where}: {name}: {key} is {value}, expected more than 0")
    weighted = sum(source.weight is not None for source in sources)
    if weighted not in (0, len(data.train)):
        raise ValueError(
            f"{where}: data.train: {weighted} of {len(data.train)} entries have a weight; "
            "give one to each, or to none"
        )
    for key in RANGES:
        if values[key] is not None and values[key][0] > values[key][1]:
            raise ValueError(f"{where}: {key} is {list(values[key])}, expected [low, high]")
    if augment.babble.voices[0] < 1:
        raise ValueError(f"{where}: augment.babble.voices starts at {augment.babble.voices[0]}")
    if not all(0.25 <= speed <= 4 for speed in augment.speeds):
        raise ValueError(f"{where}: augment.speeds is {list(augment.speeds)}, expected 0.25 to 4")
    if not augment.hum.mains_hz or min(augment.hum.mains_hz) <= 0:
        raise ValueError(f"{where}: augment.hum.mains_hz needs frequencies above 0")
    codecs = augment.telephone.codecs
    if not codecs or not set(codecs) <= {"mulaw", "alaw"}:
        raise ValueError(f"{where}: augment.telephone.codecs is {codecs}, expected mulaw or alaw")
    if not 0 <= augment.telephone.band_hz[0] < augment.telephone.band_hz[1] <= 4000:
        raise ValueError(f"{where}: augment.telephone.band_hz is not a band within 0 to 4000 Hz")
    for kind in ("noise", "rir"):
        section = getattr(augment, kind)
        if bool(section.manifests) != (section.probability > 0):
            raise ValueError(
                f"{where}: augment.{kind} needs manifests and a probability above 0, or neither"
            )
