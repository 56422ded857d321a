"""A NeMo file's data sets and augmentor in a recipe's words.

Sources: NeMo's `asr/data/audio_to_text_dataset.py`, `common/data/lhotse/cutset.py` (input_cfg) and
`asr/parts/preprocessing/perturb.py` (augmentor).
"""

import shlex
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from training.recipe.data_sections import AUTO_SHARES
from training.recipe.fields import named_files

SECTION = "model.train_ds"
# Clips are counted, filtered and put in order before the first step, so that a run goes on exactly
# where it was stopped; data sets that only a library can list are made manifests of before.
ELSEWHERE = {
    "hf_data_cfg": "Hugging Face data sets are",
    "shar_path": "Lhotse Shar is",
    "cuts_path": "Lhotse cuts are",
}
NO_LIMIT_S = 7 * 24 * 3600.0  # longer than any clip that a manifest may name


def translate_data(tree: dict, found) -> None:
    """`tree`: the YAML; `found`: the Translation that is filled."""
    model = tree.get("model") or {}
    train, take = model.get("train_ds") or {}, found.take
    _refuse_changes(SECTION, found)
    for key in ELSEWHERE:
        if train.get(key):
            then = f"; then ~{SECTION}.{key} {SECTION}.manifest_filepath=FOLDER/manifest.jsonl"
            found.refuse(f"{SECTION}.{key}", _elsewhere(key, train[key]) + then)
    for key in (
        *("is_concat", "batch_augmentor", "bucketing_batch_size", "bucket_batch_size"),
        *("bucketing_weights", "drop_last"),
    ):
        if train.get(key):
            found.refuse(f"{SECTION}.{key}", "has no counterpart here; delete it")
    sources = _sources(found)
    if sources:
        found.set("data.train", sources, f"{SECTION}.manifest_filepath")
    for ours, section in (("data.validation", "validation_ds"), ("data.test", "test_ds")):
        key = f"model.{section}.manifest_filepath"
        given = (model.get(section) or {}).get("manifest_filepath")
        if isinstance(given, dict):
            found.refuse(key, f"is {given!r}, expected a path or a list of paths")
        manifests = [path for path, _ in _paths(found.left.pop(key, None), key, found)]
        more = _set_options(f"model.{section}", train, found)
        if manifests and more:
            named = named_files(manifests, found.where, key)
            sets = {name: {"manifest": path} | more for name, path in named.items()}
            found.set(ours, sets)
            found.taken.append((key, f"{ours}: {sets}"))
        elif manifests:
            found.set(ours, manifests, key)
        for name in ("input_cfg", "tarred_audio_filepaths", "datasets"):
            if found.left.get(f"model.{section}.{name}"):
                found.refuse(f"model.{section}.{name}", "give plain NeMo manifests by name")
        for name in ELSEWHERE:
            if given := (model.get(section) or {}).get(name):
                found.refuse(f"model.{section}.{name}", _elsewhere(name, given))
    duration = take(f"{SECTION}.batch_duration", "data.batch_duration_s", float)
    size = found.number(f"{SECTION}.batch_size", 0)
    if size > 0:
        found.set("data.batch_size", int(size), f"{SECTION}.batch_size")
    elif duration is not None:
        found.set("data.batch_size", None)
    take(f"{SECTION}.quadratic_duration", "data.quadratic_duration_s", float)
    # What NeMo does not leave out or pad is not left out or padded here.
    for key, ours, default, bounded in (
        ("min_duration", "data.min_duration_s", 0.0, max),
        ("max_duration", "data.max_duration_s", NO_LIMIT_S, min),
    ):
        if take(f"{SECTION}.{key}", ours, partial(_bounded, bounded, default)) is None:
            found.set(ours, default)
    found.set("data.pad_to_s", 0.0)
    found.set("data.max_tokens_per_frame", None)
    take(f"{SECTION}.min_tps", "data.min_tokens_per_s", _above_zero)
    take(f"{SECTION}.max_tps", "data.max_tokens_per_s", _above_zero)
    take(f"{SECTION}.num_workers", "data.num_workers")
    take(f"{SECTION}.seed", "trainer.seed", lambda v: v if isinstance(v, int) else None)
    _languages_said(train, found)
    take(f"{SECTION}.text_field", "data.text_field")
    take(f"{SECTION}.lang_field", "data.lang_field")
    temperature = take(f"{SECTION}.reweight_temperature")
    if isinstance(temperature, list) and len(set(temperature)) == 1:
        temperature = temperature[0]
    if isinstance(temperature, list):
        found.refuse(f"{SECTION}.reweight_temperature", "one for all groups is what is done here")
    if temperature is not None:
        key = f"{SECTION}.reweight_temperature"
        found.left[key] = temperature
        found.set("data.temperature", found.number(key, 1.0), key)
    if take(f"{SECTION}.shuffle") is False:
        found.set("data.shuffle", False, f"{SECTION}.shuffle")
    for key in (f"{SECTION}.sample_rate", "model.validation_ds.sample_rate"):
        if found.left.pop(key, None):
            found.unused.append((key, "audio is resampled to the checkpoint's rate"))
    _augmentor(train.get("augmentor") or {}, found)


def _refuse_changes(section: str, found) -> None:
    """Clips and texts go into training and its measures as they stand."""
    if found.take(f"{section}.trim_silence"):
        found.refuse(f"{section}.trim_silence", "is not done here; trim the audio before")
    for key in ("normalize_text", "normalize", "normalize_transcripts"):
        if found.take(f"{section}.{key}"):
            why = "texts are tokenized as they stand; normalise them in the manifest"
            found.refuse(f"{section}.{key}", why)


def _elsewhere(key: str, value) -> str:
    """Why a key of ELSEWHERE is refused, with the command that makes a manifest of its data set; of
    several, which NeMo lists alone or with weights, the first."""
    while isinstance(value, list) and value:
        value = value[0]
    words = [value]
    if isinstance(value, dict):  # load_dataset's arguments
        options = {"--config": value.get("name"), "--split": value.get("split")}
        words = [value.get("path"), *(w for pair in options.items() if pair[1] for w in pair)]
    if not all(isinstance(word, str) for word in words):
        words = ["SOURCE"]
    command = shlex.join(["python", "-m", "training.manifest", *words, "-o", "FOLDER"])
    return f"{ELSEWHERE[key]} not read here; make a manifest: {command}"


def _languages_said(train: dict, found) -> None:
    """What an encoder is told of a clip's language: how often "auto" in its place, and languages
    that the checkpoint may lack. Source: NeMo's LhotseSpeechToTextBpeDatasetWithPromptIndex."""
    mode = found.take(f"{SECTION}.default_prompt_mode") or "unified"
    ratio = found.number(f"{SECTION}.unified_auto_ratio", 0.5)
    shares = AUTO_SHARES | {"unified": ratio}
    if mode not in shares:
        known = ", ".join(shares)
        found.refuse(f"{SECTION}.default_prompt_mode", f"is {mode!r}, expected one of {known}")
    share = shares[mode]
    if share != 0.5:
        found.set("data.auto_share", share, f"{SECTION}.unified_auto_ratio, default_prompt_mode")
    if found.take(f"{SECTION}.prompt_mode_field") not in (None, "prompt_mode"):
        found.refuse(f"{SECTION}.prompt_mode_field", "is prompt_mode here; name the key so")
    dictionary = train.get("prompt_dictionary")
    found.drop(f"{SECTION}.prompt_dictionary")
    if dictionary:
        added = {"target_lang": dictionary}
        found.set("prompt.values", added)
        found.taken.append((f"{SECTION}.prompt_dictionary", f"prompt.values: {added}"))


def _set_options(section: str, train: dict, found) -> dict:
    """What a set that is measured says beside its manifest. Keys that it leaves out have NeMo's
    defaults, not those of the training set."""
    _refuse_changes(section, found)
    options = {"channel": _channel(section, found)}
    for key, default, bounded in (("min_duration", 0.0, max), ("max_duration", NO_LIMIT_S, min)):
        limit = found.number(f"{section}.{key}", default)
        options[f"{key}_s"] = None if bounded(default, limit) == default else limit
    for key in ("text_field", "lang_field"):
        default = key.removesuffix("_field")
        given = found.take(f"{section}.{key}") or default
        options[key] = None if given == (train.get(key) or default) else given
    return {key: value for key, value in options.items() if value is not None}


def _channel(section: str, found) -> int | None:
    key = f"{section}.channel_selector"
    given = found.take(key)
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if given in (None, "average"):
        return None
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        found.refuse(key, f"is {given!r}, expected a channel's number from 0, or average")
    return given


def _bounded(bounded, default: float, value) -> float:
    """A limit of NeMo's, whose own defaults are -1 and infinity: none."""
    return bounded(default, float(value))


def _above_zero(value) -> float | None:
    return float(value) if float(value) > 0 else None


# --- manifests ------------------------------------------------------------------------------------


def _sources(found) -> list:
    """`data.train`: plain paths, or mappings where there is more to say of one."""
    channel = _channel(SECTION, found)
    return [_heard(source, channel) for source in _listed(found)]


def _heard(source: str | dict, channel: int | None) -> str | dict:
    """The source, of whose audio one channel is heard."""
    if channel is None:
        return source
    return ({"manifest": source} if isinstance(source, str) else source) | {"channel": channel}


def _listed(found) -> list:
    config = found.left.pop(f"{SECTION}.input_cfg", None)
    manifests = found.left.pop(f"{SECTION}.manifest_filepath", None)
    tars = found.left.pop(f"{SECTION}.tarred_audio_filepaths", None)
    if config:
        return _group(config, f"{SECTION}.input_cfg", found, None, {})
    paths = _paths(manifests, f"{SECTION}.manifest_filepath", found)
    shards = [path for path, _ in _paths(tars, f"{SECTION}.tarred_audio_filepaths", found)]
    if shards and len(shards) != len(paths):
        raise ValueError(
            f"{found.where}: {len(shards)} tarred_audio_filepaths for {len(paths)} manifests"
        )
    sources = []
    for (path, weight), shard in zip(paths, shards or [None] * len(paths), strict=True):
        more = {"tarred_audio_filepaths": shard, "weight": weight}
        more = {key: value for key, value in more.items() if value is not None}
        sources.append({"manifest": path, **more} if more else path)
    return sources


def _paths(value, key: str, found) -> list[tuple[str, float | None]]:
    """NeMo's ways to write manifests, each with a weight or None: a string, with commas, a list, a
    list of lists, of which [path, weight] is one."""
    if value is None or value in ("", "???"):
        return []
    if isinstance(value, str):
        return [(part.strip(), None) for part in value.split(",") if part.strip()]
    if not isinstance(value, list):
        raise ValueError(f"{found.where}: {key}: {value!r} stands where a path belongs")
    is_pair = len(value) == 2 and isinstance(value[0], str) and _is_number(value[1])
    if is_pair:
        return [(value[0], float(value[1]))]
    return [path for item in value for path in _paths(item, key, found)]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _group(config, key: str, found, share: float | None, tags: dict) -> list[dict]:
    """Sources of an `input_cfg`: a list, or the YAML file that holds it. A group's weight, `share`,
    is shared by its members in proportion to theirs."""
    if isinstance(config, str):
        config = _read_list(config, key, found)
    if not isinstance(config, list) or not all(isinstance(item, dict) for item in config):
        found.refuse(key, "expected a list of data sets, each with a type")
    for number, item in enumerate(config):
        weight, own = item.get("weight"), item.get("tags")
        if weight is not None and not (_is_number(weight) and weight >= 0):
            found.refuse(f"{key}[{number}].weight", f"is {weight!r}, expected a number")
        if own is not None and not isinstance(own, dict):
            found.refuse(f"{key}[{number}].tags", f"is {own!r}, expected a mapping")
    weights = [item.get("weight") for item in config]
    if any(weight is not None for weight in weights) and None in weights:
        found.refuse(key, "give every member a weight, or none")
    weighted = bool(weights) and None not in weights
    if share is not None and not weighted and len(config) > 1:
        found.refuse(key, "the group has a weight; give one to each of its members")
    total = sum(weights) if weighted else 0.0
    sources = []
    for number, item in enumerate(config):
        name, kind = f"{key}[{number}]", item.get("type")
        part = (share or 1.0) * weights[number] / total if weighted and total else share
        own_tags = tags | (item.get("tags") or {})
        if kind in ("lhotse", "lhotse_shar"):
            source = "shar_path" if item.get("shar_path") else "cuts_path"
            then = "; then type: nemo, manifest_filepath: FOLDER/manifest.jsonl"
            found.refuse(f"{name}.{source}", _elsewhere(source, item.get(source)) + then)
        known = {"type", "weight", "tags", "input_cfg", "manifest_filepath"}
        known |= {"tarred_audio_filepaths", "reweight_temperature"}
        unknown = [k for k, v in item.items() if k not in known and v not in (None, False)]
        if unknown:
            found.refuse(f"{name}.{unknown[0]}", "has no counterpart here; delete it")
        if kind == "group":
            sources += _group(item.get("input_cfg"), name, found, part, own_tags)
        elif kind in ("nemo", "nemo_tarred"):
            sources += _nemo_sources(item, name, found, part, own_tags)
        else:
            why = "give NeMo manifests (types nemo, nemo_tarred, group)"
            found.refuse(f"{name}.type", f"{kind!r} is not read here; {why}")
    return sources


def _nemo_sources(item: dict, name: str, found, weight, tags: dict) -> list[dict]:
    paths = _paths(item.get("manifest_filepath"), f"{name}.manifest_filepath", found)
    tars = _paths(item.get("tarred_audio_filepaths"), f"{name}.tarred_audio_filepaths", found)
    if (item["type"] == "nemo_tarred") != bool(tars) or (tars and len(tars) != len(paths)):
        found.refuse(name, "a tarred set needs one tarred_audio_filepaths for each manifest")
    others = sorted(tags.keys() - {"lang", "prompt_mode"})
    if others:
        known = "lang and prompt_mode are"
        found.refuse(f"{name}.tags", f"only {known} known here, not {', '.join(others)}")
    own = [part for _, part in paths]
    total = sum(own) if None not in own else None
    sources = []
    for number, (path, part) in enumerate(paths):
        more = {"tarred_audio_filepaths": tars[number][0]} if tars else {}
        if weight is not None:
            more["weight"] = weight * (part / total if total else 1 / len(paths))
        elif part is not None:
            more["weight"] = part
        if "lang" in tags:
            more["lang"] = tags["lang"]
        if tags.get("prompt_mode") in AUTO_SHARES:
            more["auto_share"] = AUTO_SHARES[tags["prompt_mode"]]
        sources.append({"manifest": path} | more)
    return sources


def _read_list(path: str, key: str, found) -> list:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from fastconformer.checkpoint.yaml_config import check_yaml_depth

    if not Path(path).is_file():
        raise FileNotFoundError(f"{found.where}: {key}: {path} is not a file")
    try:
        check_yaml_depth(Path(path).read_bytes())
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        found.refuse(f"{key}: {path}", " ".join(str(error).split()))


# --- augmentor ------------------------------------------------------------------------------------


def _augmentor(section: dict, found) -> None:
    """NeMo's perturbations of a clip, each with its probability `prob`."""
    for name, options in section.items():
        key = f"{SECTION}.augmentor.{name}"
        found.drop(key)
        if not isinstance(options, dict | None):
            found.refuse(key, f"is {options!r}, expected a mapping of options")
        options = dict(options or {})
        for option, value in options.items():
            is_known = option == "prob" or option in OPTIONS.get(name, ())
            if is_known and option not in NO_NUMBERS and not (value is None or _is_number(value)):
                found.refuse(f"{key}.{option}", f"is {value!r}, expected a number")
        probability = float(options.pop("prob", None) or 0.0) if "prob" in options else 1.0
        if name not in PERTURBATIONS:
            known = ", ".join(PERTURBATIONS)
            found.refuse(key, f"has no counterpart here (those that have: {known}); delete it")
        for option, value in options.items():
            if option not in OPTIONS[name] and value not in (None, False):
                found.refuse(f"{key}.{option}", "has no counterpart here; delete it")
        if probability > 0:
            PERTURBATIONS[name](options, probability, key, found)


def _white_noise(options: dict, probability: float, key: str, found) -> None:
    level = [float(options.get("min_level", -90)), float(options.get("max_level", -46))]
    mine = {"probability": probability, "level_db": level}
    found.set("augment.white_noise", mine)
    found.taken.append((key, f"augment.white_noise: {mine}"))


def _speed(options: dict, probability: float, key: str, found) -> None:
    """A share of the draws gets one of these rates, the rest rate 1: in one list of speeds."""
    count = int(options.get("num_rates", 5))
    if count < 1:
        found.refuse(f"{key}.num_rates", "rates out of a range are not done here; give a number")
    low, high = float(options.get("min_speed_rate", 0.9)), float(options.get("max_speed_rate", 1.1))
    rates = [round(float(rate), 6) for rate in np.linspace(low, high, count)]
    share = Fraction(probability).limit_denominator(20)
    speeds = rates * share.numerator
    speeds += [1.0] * (count * (share.denominator - share.numerator))
    found.set("augment.speeds", speeds, key)


def _noise(options: dict, probability: float, key: str, found) -> None:
    manifests = [
        path for path, _ in _paths(options.get("manifest_path"), f"{key}.manifest_path", found)
    ]
    snr = [float(options.get("min_snr_db", 10)), float(options.get("max_snr_db", 50))]
    mine = {"manifests": manifests, "probability": probability, "snr_db": snr}
    if float(options.get("max_gain_db") or 300) < 300:
        found.refuse(f"{key}.max_gain_db", "a noise is scaled without a limit here; delete it")
    if not manifests:
        found.refuse(f"{key}.manifest_path", "is missing; name a manifest of noises")
    found.set("augment.noise", mine)
    found.taken.append((key, f"augment.noise: {mine}"))


def _impulse(options: dict, probability: float, key: str, found) -> None:
    manifests = [
        path for path, _ in _paths(options.get("manifest_path"), f"{key}.manifest_path", found)
    ]
    if not manifests:
        found.refuse(f"{key}.manifest_path", "is missing; name a manifest of impulse responses")
    mine = {"manifests": manifests, "probability": probability}
    found.set("augment.rir", mine)
    found.taken.append((key, f"augment.rir: {mine}"))


def _gain(options: dict, probability: float, key: str, found) -> None:
    if probability < 1:
        found.refuse(f"{key}.prob", "every clip gets a gain here; set it to 1")
    low, high = float(options.get("min_gain_dbfs", -10)), float(options.get("max_gain_dbfs", 10))
    found.set("augment.gain_db", [low, high], key)


def _shift(options: dict, probability: float, key: str, found) -> None:
    low, high = float(options.get("min_shift_ms", -5)), float(options.get("max_shift_ms", 5))
    if probability < 1 or low != -high:
        found.refuse(key, "every clip is shifted here, both ways alike; set prob to 1, min to -max")
    found.set("augment.shift_s", high / 1000, key)


NO_NUMBERS = {"rng", "manifest_path", "resample_type", "shift_impulse"}
RANDOM = {"rng", "shuffle_n"}  # draws are this project's own
OPTIONS = {
    "white_noise": RANDOM | {"min_level", "max_level"},
    "speed": RANDOM | {"min_speed_rate", "max_speed_rate", "num_rates", "sr", "resample_type"},
    "noise": RANDOM | {"manifest_path", "min_snr_db", "max_snr_db", "max_gain_db", "orig_sr"},
    "impulse": RANDOM | {"manifest_path", "shift_impulse"},
    "gain": RANDOM | {"min_gain_dbfs", "max_gain_dbfs"},
    "shift": RANDOM | {"min_shift_ms", "max_shift_ms"},
}
PERTURBATIONS = {
    "white_noise": _white_noise,
    "speed": _speed,
    "noise": _noise,
    "impulse": _impulse,
    "gain": _gain,
    "shift": _shift,
}
