"""A FunASR configuration of Fun-ASR-Nano (`config.yaml`, or its fine-tuning script) as a recipe.

`translate` gives the recipe, line by line what became of each key, every key that has no effect
here, and every key that never had one there: many switches of such configurations are read by
nothing. Source: funasr 1.4.16 (models/fun_asr_nano, datasets/fun_asr_datasets, train_utils).
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from training.recipe.fields import flat, put

SECTIONS = ("audio_encoder_conf", "train_conf", "optim_conf", "dataset_conf", "train_data_set_list")
ROOTS = ("train_data_set_list", "valid_data_set_list", "init_param", "output_dir")
PARTS = {  # sections with a `freeze` of their own: (part here, frozen where it is not said)
    "audio_encoder_conf": ("encoder", True),
    "audio_adaptor_conf": ("adaptor", False),
    "llm_conf": ("llm", True),
}
FRAME_S = 0.01  # of `speech_length` and of all lengths in batches
MOST_KEPT = 10  # models on disk; FunASR's 200 were 400 GB
DEAD = {  # read by nothing in FunASRNano and its data set; the longest prefix decides
    "specaug": "FunASRNano takes it and lets it go: nothing was masked. spec_augment does it here",
    "ctc_weight": "no CTC loss is computed there. loss: {heads: all, ctc_weight: W} does it here",
    "detach_ctc_decoder": "no CTC loss is computed there",
    "ctc_decoder_conf.freeze": "without a CTC loss the branch never moves, frozen or not. "
    "freeze.modules: [ctc] does it here, where CTC is trained",
    "ctc_conf": "no CTC loss is computed there",
    "model_conf.lsm_weight": "the language model's own loss has no label smoothing",
    "model_conf.length_normalized_loss": "only sets a weight that the trainer ignores",
    "model_conf": "FunASRNano reads none of it",
    "dataset_conf.audio_encoder_downsample_rate": "an eighth of the rows is taken always",
    "dataset_conf.audio_adaptor_downsample_rate": "an eighth of the rows is taken always",
    "dataset_conf.ctc_target_normalize": "there are no CTC targets",
    "dataset_conf.ctc_tokenizer": "there are no CTC targets in training",
    "input_size": "the encoder's input is the front end's",
    "normalize": "the front end has no cmvn",
}
WITHOUT_EFFECT = {  # why a key has none here; the longest prefix decides
    "model": "told by the checkpoint",
    "audio_encoder": "comes from the checkpoint",
    "audio_adaptor": "comes from the checkpoint",
    "ctc_decoder": "comes from the checkpoint",
    "ctc_vocab_size": "comes from the checkpoint",
    "frontend": "comes from the checkpoint",
    "llm": "comes from the checkpoint",
    "tokenizer": "comes from the checkpoint",
    "ctc_tokenizer": "comes from the checkpoint",
    "train_conf.use_deepspeed": "torchrun gives DDP; see trainer.parallel",
    "train_conf.deepspeed_config": "torchrun gives DDP; see trainer.parallel",
    "train_conf.effective_save_name_excludes": "a saved model always holds its language model",
    "train_conf.reset_gpu_cache": "memory that runs out splits the batch instead",
    "train_conf.log_": "the log is always written",
    "train_conf.use_lora": "see llm_conf.use_lora",
    "train_conf.save_init_model": "the untouched model is always evaluated first",
    "train_conf.keep_checkpoint_max": "see keep.top_k",
    "dataset": "manifests of chats and NeMo's are both read",
    "dataset_conf.index_ds": "manifests of chats and NeMo's are both read",
    "dataset_conf.batch_sampler": "batches are of like durations anyway",
    "dataset_conf.shuffle": "every epoch is shuffled, by trainer.seed",
    "dataset_conf.sort_size": "draws are sorted in windows of 4,096",
    "dataset_conf.retry": "a bad line is named in dropped.jsonl, and no other clip takes its place",
    "dataset_conf.batch_size_token_max": "no clip is dropped from a batch that is too large",
    "dataset_conf.prompt": "training always asks with the context of the line",
    "dataset_conf.data_split_i": "there are no splits",
    "dataset_conf.max_target_length": "see data.max_tokens_per_s",
    "dataset_conf.max_source_length": "see data.max_duration_s",
    "dataset_conf.min_": "see data.min_duration_s",
    "gpus": "start the command with torchrun for several GPUs",
    "ngpu": "start the command with torchrun for several GPUs",
    "disable_update": "nothing is looked up",
    "hub": "nothing is looked up",
}


@dataclass
class Translation:
    """recipe: nested dict of our keys; taken: (FunASR's key, ours) pairs; dead: (key, why it never
    did anything there); unused: (key, why it does nothing here)."""

    recipe: dict = field(default_factory=dict)
    taken: list[tuple[str, str]] = field(default_factory=list)
    dead: list[tuple[str, str]] = field(default_factory=list)
    unused: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        groups = (
            ("", self.taken),
            (f"keys that never did anything there ({len(self.dead)}):", self.dead),
            (f"keys without effect here ({len(self.unused)}):", self.unused),
        )
        width = max((len(key) for _, pairs in groups for key, _ in pairs), default=0)
        lines = ["a FunASR configuration; its keys, and what they became:"]
        for title, pairs in groups:
            lines += [title] if title and pairs else []
            lines += [f"  {key:{width}}  {text}" for key, text in pairs]
        return "\n".join(lines)


def is_funasr(tree: dict) -> bool:
    """Whether a YAML tree has the sections of a FunASR configuration."""
    return tree.get("model") == "FunASRNano" or any(name in tree for name in SECTIONS)


def is_funasr_key(key: str) -> bool:
    """Whether an override's key, with Hydra's + before it, is FunASR's."""
    name = key.lstrip("+").partition(".")[0]
    return key.startswith("+") or name.endswith("_conf") or name in ROOTS


def own_training(record: dict) -> dict:
    """What a checkpoint's config says of its training, in the sections that NeMo has for it."""
    if not is_funasr(record):
        return record
    optim, sched = record.get("optim_conf") or {}, record.get("scheduler_conf") or {}
    data, encoder = record.get("dataset_conf") or {}, record.get("audio_encoder_conf") or {}
    longest = data.get("max_token_length")
    return {
        "optim": {"name": record.get("optim")}
        | optim
        | {"sched": {"name": "inverse_sqrt"} | sched},
        "train_ds": {"max_duration": longest and longest * FRAME_S},
        "encoder": {"dropout": encoder.get("dropout_rate")},
        "preprocessor": {"sample_rate": (record.get("frontend_conf") or {}).get("fs")},
    }


def read_script(path: Path) -> dict:
    """What a fine-tuning script sets: its `++key=value` words over the configuration of the model
    folder that it names, where that is there.

    Raises:
        ValueError: it sets nothing.
    """
    names, overrides = {}, []
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an open quote: no line of settings
            continue
        for word in words:
            for _ in range(5):  # a variable in a variable
                word = re.sub(r"\$\{?(\w+)\}?", lambda m: names.get(m[1], m[0]), word)
            if re.fullmatch(r"\w+=.*", word) and len(words) == 1:
                name, _, value = word.partition("=")
                names[name] = value
            elif re.match(r"\+\+[\w.]+=", word):
                overrides.append(word)
    if not overrides:
        raise ValueError(f"{path}: no ++key=value in it; expected a FunASR fine-tuning script")
    changes: dict = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        put(changes, key, yaml.safe_load(value) if value else None)
    folder = Path(str(changes.get("model") or changes.get("model_path") or ""))
    tree = {}
    if (folder / "config.yaml").is_file():
        from fastconformer.checkpoint.yaml_config import load_config

        tree = load_config((folder / "config.yaml").read_bytes(), "config.yaml")
        changes["model_path"] = str(folder)
    for key, value in flat(changes).items():
        put(tree, key, value)
    tree["model"] = "FunASRNano"
    return tree


def translate(tree: dict, where: str = "recipe") -> Translation:
    """`tree`: the configuration, interpolations resolved.

    Raises:
        ValueError: a key asks for what this project does not do and what would change the result.
    """
    found, left = Translation(), flat(tree)

    def take(key: str, ours: str | None = None, value=None):
        given = left.pop(key, None)
        if given is not None and ours is not None:
            put(found.recipe, ours, given if value is None else value(given))
            found.taken.append((key, f"{ours}: {_get(found.recipe, ours)}"))
        return given

    def fixed(ours: str, value, why: str) -> None:
        put(found.recipe, ours, value)
        found.taken.append((f"({why})", f"{ours}: {value}"))

    fixed("loss.heads", "llm", "FunASR's training has no other loss")
    _start(left, take, where)
    _frozen(take, found)
    _lora(left, take, found)
    _data(left, take, found, where)
    _optimisation(left, take, fixed, where)
    _trainer(left, take, found, fixed)
    for key, value in left.items():
        if value is None:
            continue
        for reasons, listed in ((DEAD, found.dead), (WITHOUT_EFFECT, found.unused)):
            prefixes = [prefix for prefix in reasons if key.startswith(prefix)]
            if prefixes:
                listed.append((key, reasons[max(prefixes, key=len)]))
                break
        else:
            found.unused.append((key, "nothing here reads it"))
    return found


def _start(left: dict, take, where: str) -> None:
    start = take("init_param") or take("model_path") or take("model_conf.init_param")
    if start is not None:
        path = Path(str(start))
        start = path.parent if path.suffix in (".pt", ".pth") else path
    elif Path(where).name == "config.yaml" and (Path(where).parent / "model.pt").is_file():
        start = Path(where).parent
    if start is not None:
        left["init_param"] = str(start)
        take("init_param", "model.init_from")
    fs = left.get("frontend_conf.fs")
    if fs is not None and fs != 16000:
        take("frontend_conf.fs", "model.sample_rate", int)
        # FunASR spreads the filters below half of the new rate: each hears another frequency
        left["frontend_conf.fs, its filters"] = "stretch"
        take("frontend_conf.fs, its filters", "model.mel_edges")
    out = take("output_dir", "output")
    if out is None:
        left["(no output_dir)"] = f"runs/{Path(where).stem}"
        take("(no output_dir)", "output")


def _frozen(take, found: Translation) -> None:
    modules = []
    for section, (part, default) in PARTS.items():
        given = take(f"{section}.freeze")
        frozen = default if given is None else bool(given)
        said = "" if given is not None else " (not said: FunASR's default)"
        found.taken.append(
            (f"{section}.freeze: {frozen}{said}", f"{part} {'frozen' if frozen else 'moves'}")
        )
        modules += [part] if frozen else []
    put(found.recipe, "freeze.modules", [*modules, "ctc"])


def _lora(left: dict, take, found: Translation) -> None:
    conf = "llm_conf.lora_conf"
    names = {"r": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout"}
    if not take("llm_conf.use_lora"):
        for key in [k for k in left if k.startswith(f"{conf}.")]:
            found.unused.append((key, "llm_conf.use_lora is false"))
            left.pop(key)
        return
    defaults = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
    }
    for key, value in defaults.items():
        left.setdefault(f"{conf}.{key}", value)
    for key, ours in names.items():
        take(f"{conf}.{key}", ours, int if key == "r" else float)
    take(f"{conf}.target_modules", "lora.targets", list)
    moving = [p for p in ("encoder", "adaptor") if p not in found.recipe["freeze"]["modules"]]
    if moving and not take("train_conf.lora_only"):
        put(found.recipe, "lora.also", moving)
        found.taken.append(("(parts that are not frozen)", f"lora.also: {moving}"))


def _data(left: dict, take, found: Translation, where: str) -> None:
    conf = "dataset_conf"
    take("train_data_set_list", "data.train", lambda given: [str(given)])
    take("valid_data_set_list", "data.validation", lambda given: {"valid": str(given)})
    kind = take(f"{conf}.batch_type")
    if kind in (None, "example", "length"):
        take(f"{conf}.batch_size", "data.batch_size", int)
    elif kind == "token":
        # not tokens: frames of 10 ms, padding included
        take(f"{conf}.batch_size", "data.batch_duration_s", lambda n: round(n * FRAME_S, 3))
        if take(f"{conf}.batch_size_sample_max", "data.batch_size", int) is None:
            put(found.recipe, "data.batch_size", None)
    else:
        raise ValueError(f"{where}: {conf}.batch_type is {kind!r}, expected token or example")
    longest = left.get(f"{conf}.max_token_length")
    take(f"{conf}.max_token_length", "data.max_duration_s", lambda n: round(n * FRAME_S, 3))
    if longest is not None:
        found.taken[-1] = (found.taken[-1][0], found.taken[-1][1] + " (frames of 10 ms and tokens: "
                           "there, longer clips go without a word)")  # fmt: skip
    take(f"{conf}.num_workers", "data.num_workers", int)
    splits = take(f"{conf}.data_split_num")
    if splits:
        found.unused.append((f"{conf}.data_split_num",
                             f"with one .jsonl each of FunASR's epochs is {splits} passes through "
                             "the data; here an epoch is one"))  # fmt: skip
    for key in [k for k in left if "noise" in k and k.startswith(conf)]:
        if left[key]:
            raise ValueError(f"{where}: {key} adds noise; name it as augment.noise in a recipe")


def _optimisation(left: dict, take, fixed, where: str) -> None:
    name = take("optim") or "adamw"
    if str(name).lower() != "adamw":
        raise ValueError(f"{where}: optim is {name!r}, supported is adamw")
    take("optim_conf.lr", "optim.lr", float)
    if take("optim_conf.weight_decay", "optim.weight_decay", float) is None:
        fixed("optim.weight_decay", 0.01, "torch's default")
    if take("optim_conf.betas", "optim.betas", list) is None:
        fixed("optim.betas", [0.9, 0.999], "torch's default")
    take("optim_conf.eps", "optim.eps", float)
    for key in [k for k in left if k.startswith("optim_conf.") and left[k]]:
        raise ValueError(f"{where}: {key} is {left[key]!r}, which has no counterpart here")
    name = take("scheduler") or "warmuplr"
    if name != "warmuplr":
        raise ValueError(f"{where}: scheduler is {name!r}, supported is warmuplr")
    fixed("schedule.name", "inverse_sqrt", "warmuplr")
    steps = left.pop("scheduler_conf.warmup_steps", None)
    steps = 25000 if steps is None else int(steps)
    fixed("schedule.warmup_steps", max(0, steps - 1), f"warmuplr, warmup_steps {steps}")
    fixed("schedule.min_lr", 0.0, "warmuplr")


def _trainer(left: dict, take, found: Translation, fixed) -> None:
    conf = "train_conf"
    take(f"{conf}.max_epoch", "trainer.epochs", int)
    take(f"{conf}.accum_grad", "trainer.accumulate", int)
    if take(f"{conf}.grad_clip", "trainer.clip_grad_norm", float) is None:
        fixed("trainer.clip_grad_norm", 10.0, "FunASR's default")
    take(f"{conf}.log_interval", "trainer.log_every_steps", int)
    take(f"{conf}.validate_interval", "trainer.val_every_steps", int)
    take(f"{conf}.save_checkpoint_interval", "trainer.save_every_steps", int)
    take(f"{conf}.resume", "resume", lambda given: "auto" if given else "never")
    take("seed", "trainer.seed", int)
    dtype = take("llm_conf.llm_dtype")
    half = take(f"{conf}.use_bf16") or take(f"{conf}.use_fp16") or dtype in ("bf16", "fp16")
    if half:
        found.taken.append(("llm_conf.llm_dtype, train_conf.use_bf16", "trainer.precision: bf16"))
        put(found.recipe, "trainer.precision", "bf16")
    recompute = [take(f"{s}.activation_checkpoint") for s in ("llm_conf", "audio_encoder_conf")]
    if any(recompute):
        found.taken.append(("activation_checkpoint", "trainer.activation_checkpointing: True"))
        put(found.recipe, "trainer.activation_checkpointing", True)
    # there by teacher-forced accuracy of tokens, here by what is decoded
    fixed("keep.metric", "cer", "FunASR keeps by the accuracy of tokens after the right ones")
    nbest = left.get(f"{conf}.keep_nbest_models")
    take(f"{conf}.keep_nbest_models", "keep.top_k", lambda n: max(1, min(int(n), MOST_KEPT)))
    if nbest is not None and int(nbest) > MOST_KEPT:
        found.taken[-1] = (found.taken[-1][0], f"keep.top_k: {MOST_KEPT} (of {nbest} whole models)")
    averaged = take(f"{conf}.avg_nbest_model")
    top = _get(found.recipe, "keep.top_k") or 1
    if top > 1:
        said = f"{conf}.avg_nbest_model{'' if averaged is None else f': {averaged}'}"
        put(found.recipe, "keep.average", True)
        found.taken.append((said, f"keep.average: of the {top} best by what was decoded"))


def _get(tree: dict, key: str):
    for name in key.split("."):
        tree = (tree or {}).get(name)
    return tree
