"""The recipe: one YAML file, plus `key=value` overrides, into frozen and checked dataclasses.

Nothing else in the project reads recipe YAML. Paths are taken as given, so relative ones start at
the current folder. A value of null means "as the checkpoint's own config says" or "off", as the
comment beside the field tells.
"""

# ruff: noqa: RUF009 (a section that is a default is frozen)

import dataclasses
import logging
import operator
import typing
import warnings
from pathlib import Path

from yaml import YAMLError

from fastconformer.checkpoint.yaml_config import check_yaml_depth
from training.recipe.data_sections import (
    AugmentRecipe,
    DataRecipe,
    SourceRecipe,
    SpecAugmentRecipe,
)
from training.recipe.fields import check_keys, convert, flat, key
from training.recipe.funasr import is_funasr, is_funasr_key, read_script
from training.recipe.funasr import translate as translate_funasr
from training.recipe.nemo import is_nemo, is_nemo_key, translate
from training.recipe.sections import (
    DistillRecipe,
    EncoderRecipe,
    FreezeRecipe,
    GuardRecipe,
    KeepRecipe,
    LoraRecipe,
    LossRecipe,
    ModelRecipe,
    OptimRecipe,
    PromptRecipe,
    RetainRecipe,
    ScheduleRecipe,
    TrainerRecipe,
)

try:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ModuleNotFoundError:  # `load_recipe` says where it comes from
    OmegaConf = None

log = logging.getLogger("finetune")

# Pairs of keys of which a stage that sets one lets the other go.
EITHER_OR = (
    ("trainer", "max_steps", "epochs"),
    ("trainer", "val_every_steps", "val_every_epochs"),
    ("schedule", "warmup_steps", "warmup_ratio"),
    ("schedule", "hold_steps", "hold_ratio"),
)
AUGMENTED = ("white_noise", "noise", "rir", "babble", "hum", "telephone")  # by their probability


@dataclasses.dataclass(frozen=True)
class Recipe:
    output: str = ""  # the run folder
    # auto: go on from the run folder's last checkpoint.
    resume: str = key("auto", one_of=("auto", "never"))
    model: ModelRecipe = ModelRecipe()
    encoder: EncoderRecipe = EncoderRecipe()
    data: DataRecipe = DataRecipe()
    prompt: PromptRecipe = PromptRecipe()
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


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides (dotted keys, YAML values). A
    training configuration of NeMo's or FunASR's is translated first, and the translation logged.

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
        check_yaml_depth(b"" if path.suffix == ".sh" else path.read_bytes())
        is_script = path.suffix == ".sh"  # FunASR's fine-tuning is a script with overrides in it
        tree = OmegaConf.create(read_script(path)) if is_script else OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        detail = " ".join(str(error).split())  # an OSError: a number alone is no tree to OmegaConf
        raise ValueError(f"{path}: not a readable YAML file of sections: {detail}") from None
    if not OmegaConf.is_dict(tree):
        raise ValueError(f"{path}: expected sections such as `data:`, found {tree!r}")
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise ValueError(f"override {override!r} is not of the form key=value")
    if is_funasr(_plain(tree, path, resolve=False)):
        tree, overrides = _from_funasr(tree, overrides, path)
    elif is_nemo(_plain(tree, path, resolve=False)):
        tree, overrides = _from_nemo(tree, overrides, path)
    check_keys(Recipe, _plain(tree, path, resolve=False), str(path))
    for override in overrides:
        if override.startswith("data.train."):
            _override_source(tree, override)
        else:
            _override(tree, override, Recipe)
    return recipe_from_dict(_plain(tree, path, resolve=True), str(path))


def _override(tree, override: str, cls: type | None) -> None:
    """One `key=value` into a tree, checked against the keys of `cls`, if any. A value takes the
    place of what was there."""
    name, where = override.split("=", 1)[0], f"override {override!r}"
    try:
        given = OmegaConf.from_dotlist([override])
        if cls is not None:
            check_keys(cls, _plain(given, override, resolve=False), where)
        OmegaConf.update(tree, name, OmegaConf.select(given, name), merge=False)
    except TypeError:  # a name below a list
        raise ValueError(f"{where}: a list stands there; give all of it in one override") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def _override_source(tree, override: str) -> None:
    """`data.train.NAME.key=value` into the source of that name, which is its own or its manifest's
    without folder and ending."""
    path, _, text = override.partition("=")
    name, _, last = path.removeprefix("data.train.").rpartition(".")
    entries = OmegaConf.select(tree, "data.train")
    entries = _plain(entries, override, resolve=False) if OmegaConf.is_list(entries) else [entries]
    sources = [{"manifest": entry} if isinstance(entry, str) else entry for entry in entries]
    names = [source.get("name") or Path(str(source.get("manifest"))).stem for source in sources]
    if names.count(name) != 1:
        what = "several sources" if name in names else "no source"
        raise ValueError(
            f"override {override!r}: data.train has {what} of that name, but {', '.join(names)}"
        )
    given = OmegaConf.from_dotlist([f"{last}={text}"])
    check_keys(SourceRecipe, _plain(given, override, resolve=False), f"override {override!r}")
    entries[names.index(name)] = sources[names.index(name)] | OmegaConf.to_container(given)
    OmegaConf.update(tree, "data.train", entries, merge=False)


def _from_nemo(tree, overrides: typing.Sequence[str], path: Path):
    """(a recipe's tree, the overrides that are in a recipe's words) of a NeMo file: those in NeMo's
    words, with Hydra's + and ~, are put into it before it is translated. What is still `???` is as
    if it were left out."""
    _know_resolvers()
    ours = []
    for override in overrides:
        name = override.split("=", 1)[0]
        if not is_nemo_key(name):
            ours.append(override)
        elif override.startswith("~"):
            parent, _, last = name[1:].rpartition(".")
            section = OmegaConf.select(tree, parent) if parent else tree
            if section is None or last not in section:
                raise ValueError(f"override {override!r}: there is no {name[1:]}")
            del section[last]
        else:
            _override(tree, override.lstrip("+"), None)
    plain = OmegaConf.create(_without_missing(_plain(tree, path, resolve=False)))
    translation = translate(_plain(plain, path, resolve=True), str(path))
    log.info("%s is %s", path, translation)
    return OmegaConf.create(translation.recipe), ours


def _know_resolvers() -> None:
    """`${multiply:a,b}` and `${sum:a,b}`, which NeMo's own scripts give to their files."""
    with warnings.catch_warnings():  # omegaconf 2.4 has another name for it, 2.3 this one
        warnings.simplefilter("ignore")
        for name, function in (("multiply", operator.mul), ("sum", operator.add)):
            OmegaConf.register_new_resolver(name, function, replace=True)


def _without_missing(value):
    """A plain tree with null in the place of every `???`."""
    if isinstance(value, dict):
        return {name: _without_missing(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_missing(item) for item in value]
    return None if value == "???" else value


def recipe_from_dict(tree: dict, where: str = "recipe") -> Recipe:
    """Plain nested dict -> checked Recipe; `where` names the source in errors."""
    recipe = convert(Recipe, tree, where)
    try:
        check_together(recipe)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if recipe.stages:
        stage_recipes(recipe, where)
    return recipe


def check_together(recipe: Recipe) -> None:
    """ValueError where sections contradict each other, or something that a run needs is missing."""
    model, retain, trainer = recipe.model, recipe.retain, recipe.trainer
    if not recipe.output:
        raise ValueError("output is missing; name the run folder, e.g. output: runs/a")
    if not recipe.data.train:
        raise ValueError("data.train is missing; list one manifest or more")
    if (model.init_from is None) == (model.config is None):
        raise ValueError(
            "give either model.init_from (a .nemo file or folder) or model.config (from scratch)"
        )
    if model.config is not None and model.tokenizer is None and not model.labels:
        raise ValueError("model.config (from scratch) needs model.tokenizer, or model.labels")
    if trainer.precision == "bf16_pure" and (recipe.optim.name == "adam" or recipe.optim.amsgrad):
        raise ValueError("trainer.precision bf16_pure goes with optim.name adamw or adamw8bit only")
    if trainer.max_steps is None and trainer.epochs is None:
        raise ValueError("give either trainer.max_steps or trainer.epochs")
    if retain.new_rows_steps and not model.changes_vocabulary:
        raise ValueError(
            "retain.new_rows_steps needs new rows: model.init_from and model.tokenizer"
        )
    if retain.distills and model.init_from is None:
        raise ValueError("retain.distill_* need an original: model.init_from")
    if trainer.parallel == "fsdp":
        # 8-bit blocks cannot be cut into shards, and FSDP2 wants one type of weights.
        for name, wrong in (
            ("optim.name adamw8bit", recipe.optim.name == "adamw8bit"),
            ("trainer.precision bf16_pure", trainer.precision == "bf16_pure"),
        ):
            if wrong:
                raise ValueError(
                    f"{name} does not go with trainer.parallel fsdp; use ddp, or adamw and bf16"
                )
    if recipe.guard.set is not None and recipe.guard.set not in recipe.data.validation:
        raise ValueError(
            f"guard.set is {recipe.guard.set!r}, data.validation has "
            f"{', '.join(recipe.data.validation) or 'none'}"
        )
    if not recipe.data.validation:
        for field in dataclasses.fields(recipe.keep):
            if getattr(recipe.keep, field.name) != field.default:
                raise ValueError(f"keep.{field.name} needs data.validation: nothing is measured")
    if recipe.schedule.min_lr > recipe.optim.lr:
        raise ValueError(
            f"schedule.min_lr {recipe.schedule.min_lr} is above optim.lr {recipe.optim.lr}"
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
        place = f"{where}, stage {number}"
        check_keys(Recipe, changes, place)
        for name in ("output", "stages", "resume"):
            if name in changes:
                raise ValueError(f"{place}: {name} belongs to the whole recipe, not to a stage")
        tree = dict(base)
        if stages:
            before = stages[-1]
            best = "best" if before.data.validation else "last"
            first = {"init_from": f"{before.output}/{best}", "dropout": base["model"]["dropout"]}
            tree["model"] = first
            if recipe.model.changes_vocabulary and recipe.retain.tokenizer is None:
                tree["retain"] = tree["retain"] | {"tokenizer": recipe.model.init_from}
        tree["output"] = f"{recipe.output}/stage_{number}"
        tree["data"] = tree["data"] | {"test": {}}  # measured once, after all stages
        for section, values in changes.items():
            if isinstance(values, dict) and isinstance(tree[section], dict):
                values = _merged(tree[section], values)
            tree[section] = values
        for section, *keys in EITHER_OR:
            given = [key for key in keys if (changes.get(section) or {}).get(key) is not None]
            if len(given) == 1:
                tree[section] |= {key: None for key in keys if key not in given}
        stages.append(recipe_from_dict(as_lists(tree), place))
    return stages


def _merged(tree: dict, changes: dict) -> dict:
    merged = dict(tree)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            value = _merged(merged[name], value)
        merged[name] = value
    return merged


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML text that `load_recipe` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(as_lists(dataclasses.asdict(recipe))))


def recipe_differences(old: Recipe, new: Recipe) -> dict[str, tuple]:
    """{dotted key: (old value, new value)} for every key that differs."""
    before, after = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
    keys = sorted(before.keys() | after.keys())
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def idle_keys(recipe: Recipe) -> dict[str, str]:
    """{key that the recipe sets, and that does nothing: what it would need}."""
    model, schedule, keep = recipe.model, recipe.schedule.name, recipe.keep
    vocabulary = model.changes_vocabulary, "another model.tokenizer than that of model.init_from"
    needs = {  # beginning of keys: whether they do something, and what for
        "model.transfer": vocabulary,
        "model.new_rows": vocabulary,
        "model.mel_edges": (model.sample_rate is not None, "model.sample_rate"),
        "encoder.warm_start": (recipe.encoder.attention is not None, "encoder.attention"),
        "loss.cr_ctc": (recipe.loss.use_cr_ctc, "loss.use_cr_ctc"),
        "lora": (recipe.lora.rank > 0, "lora.rank"),
        "schedule.hold": (schedule == "wsd", "schedule.name wsd"),
        "schedule.decay_shape": (schedule == "wsd", "schedule.name wsd"),
        "schedule.power": (schedule in ("linear", "wsd"), "schedule.name linear or wsd"),
        "schedule.constant_steps": (schedule == "cosine", "schedule.name cosine"),
        "schedule.d_model": (schedule == "noam", "schedule.name noam"),
        "retain.check_clips": vocabulary,
        "keep.min_delta": (keep.patience is not None, "keep.patience"),
        "guard": (recipe.guard.set is not None, "guard.set"),
    }
    for name in AUGMENTED:
        probability = getattr(recipe.augment, name).probability
        needs[f"augment.{name}"] = (probability > 0, f"augment.{name}.probability")
    return {
        key: what
        for key in recipe_differences(Recipe(), recipe)
        for start, (does, what) in needs.items()
        if key.startswith(start) and not does
    }


def _plain(tree, where, resolve: bool) -> dict:
    try:
        return OmegaConf.to_container(tree, resolve=resolve, throw_on_missing=resolve)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def _from_funasr(tree, overrides: typing.Sequence[str], path: Path):
    """(a recipe's tree, the overrides in a recipe's words) of a FunASR configuration: overrides in
    its own words, with or without `++`, are put into it before it is translated."""
    ours = [item for item in overrides if not is_funasr_key(item.partition("=")[0])]
    theirs = [item.lstrip("+") for item in overrides if item not in ours]
    try:
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(theirs))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    translation = translate_funasr(_plain(tree, path, resolve=True), str(path))
    log.info("%s is %s", path, translation)
    return OmegaConf.create(translation.recipe), ours


def as_lists(value):
    """A plain tree with lists in place of tuples, as YAML has them."""
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, tuple) else value
