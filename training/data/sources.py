"""The recipe's `data` section: manifests to a mixture of clips.

`load_data` reads the manifests, leaves out what cannot be trained on, and says what and why.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastconformer import ASRModel
from fastconformer.checkpoint.files import atomic_file
from fastconformer.heads import HEADS
from training.augment.waveform import WaveAugment
from training.data.batching import Source, mixture_shares
from training.data.json_lines import append_line, json_line
from training.data.limits import Limits, check_for_training
from training.data.old_language import OldLanguage
from training.data.store import AudioStore
from training.data.tarred import expand_braces, tar_shards
from training.data.utterances import Dropped, Fields, Utterance, dropped_line, read_utterances
from training.recipe.data_sections import (
    AUTO_SHARES,
    AugmentRecipe,
    DataRecipe,
    SetRecipe,
    SourceRecipe,
)

log = logging.getLogger("finetune")

MOST_LISTED = 10_000  # lines of dropped.jsonl


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """The training clips, and the parts of the mixture that they came in."""

    store: AudioStore
    sources: tuple[Source, ...]
    durations_s: np.ndarray  # of each clip

    @property
    def utterances(self) -> list[Utterance]:
        return self.store.utterances


def load_data(
    data: DataRecipe,
    augment: AugmentRecipe,
    seed: int,
    model: ASRModel,
    heads,
    dropped_path: Path | None = None,
    is_main: bool = True,
    old: OldLanguage | None = None,
) -> tuple[TrainingSet, dict[str, AudioStore]]:
    """(training set, {name: validation store}); what is left out goes to `dropped_path`, if any.
    `old` writes the lines of the language from before the vocabulary grew.

    Of several processes the main one writes the lines that all of them leave out; the others add
    the clips that only they read, and cannot. Without heads sound is all that is wanted: lines of
    `data.train` need no text.

    Raises:
        ValueError, FileNotFoundError: a manifest is missing, or has no line that can be used.
    """
    check_prompt_keys(data, model)
    limits = training_limits(data, heads)
    encoder_frames = _frame_counter(model, max(augment.speeds, default=1.0), data.pad_to_s)
    trained = model.head(heads[0]) if heads else None
    utterances, sources, dropped, as_before, n_lines = [], [], [], [], 0
    for number, source in enumerate(data.sources):
        found, bad = read_source(source, data, limits.needs_text)
        known = _known(source, old)
        tokenizer = known or model.tokenizer
        usable, unusable = check_for_training(
            *(found, tokenizer, limits, encoder_frames, trained, data.prompt)
        )
        usable = [_with_auto_share(utterance, source, data, trained) for utterance in usable]
        n_lines += len(found) + len(bad)
        usable, over = cap(usable, source, seed, number)
        dropped += bad + unusable + over
        name = source.name or source.manifest
        if usable:
            clips = np.arange(len(utterances), len(utterances) + len(usable))
            sources.append(Source(name, clips, source.weight, _shards_of(usable)))
        elif source.weight is not None:
            raise ValueError(f"data.train: no usable clip in {name}; {_why(bad + unusable)}")
        utterances += usable
        as_before += [u for u in usable if known is not None and known.writes(u.lang)]
    if old is not None:
        old.tell(as_before)
    validation, bad = _read_validation(data, trained, limits.needs_text)
    dropped += bad
    if dropped_path is not None:
        _tell_dropped(dropped, dropped_path, is_main)
    if not utterances:
        names = ", ".join(source.manifest for source in data.sources)
        raise ValueError(
            f"no usable training clip among {n_lines} lines of {names}; "
            f"{_why(dropped)}" + (f"; see {dropped_path}" if dropped_path else "")
        )

    def on_dropped(item: Dropped):
        log.warning("left out %s, line %d: %s", item.manifest, item.line, item.detail)
        if dropped_path is not None:
            append_line(dropped_path, dataclasses.asdict(item))

    def store(clips, max_duration_s=None, pad_to_s=data.pad_to_s):
        return AudioStore(
            clips,
            model.sample_rate,
            data.cache_gb,
            max_duration_s,
            pad_to_s,
            on_dropped,
            data.retry,
        )

    durations_s = np.array([utterance.duration_s for utterance in utterances])
    train = TrainingSet(store(utterances, data.max_duration_s), tuple(sources), durations_s)
    train.store.seed = seed
    noises, responses = (
        store(_sounds(section.manifests), pad_to_s=0.0) for section in (augment.noise, augment.rir)
    )
    train.store.augment = WaveAugment(
        augment,
        model.sample_rate,
        seed,
        *((len(s.utterances), s.samples) for s in (noises, responses, train.store)),
    )
    if len(sources) > 1:
        log.info("%s", mixture_table(train, data.temperature))
    return train, {name: store(clips) for name, clips in validation.items()}


def check_prompt_keys(data: DataRecipe, model: ASRModel) -> None:
    """ValueError: keys of a prompt that this model does not take."""
    slots = {slot for name in model.heads for slot in model.head(name).slots}
    for slot in data.prompt:
        if slot not in slots and not (slot == "taskname" and "task" in slots):
            known = ", ".join(sorted(slots)) or "none"
            raise ValueError(f"data.prompt.{slot}: this model's prompt has no such slot ({known})")
    given = [source.auto_share for source in data.sources if source.auto_share is not None]
    is_told = data.auto_share != DataRecipe.auto_share or given
    if is_told and "target_lang" not in slots:
        raise ValueError("auto_share: this model is told no language")


def _with_auto_share(
    utterance: Utterance, source: SourceRecipe, data: DataRecipe, head
) -> Utterance:
    """ValueError: the model knows no "auto", which some draws are to be told."""
    if not utterance.encoder_slots:
        return utterance
    share = data.auto_share if source.auto_share is None else source.auto_share
    mode = utterance.others.get("prompt_mode")
    share = share if mode is None else AUTO_SHARES.get(str(mode), data.auto_share)
    if share:
        try:
            head.encoder_slots({})
        except ValueError:
            raise ValueError(
                f"data.auto_share is {share}, but this model's prompts have no auto; set it to 0"
            ) from None
    return dataclasses.replace(utterance, auto_share=share)


def _known(source: SourceRecipe, old: OldLanguage | None) -> OldLanguage | None:
    if old is None and source.pieces == "old":
        raise ValueError(
            f"data.train: {source.name or source.manifest} has pieces old, but no vocabulary that "
            "grew is known; name the one from before in retain.tokenizer"
        )
    return None if old is None else dataclasses.replace(old, pieces=source.pieces)


def _askable(
    utterances: list[Utterance], head, prompt: dict
) -> tuple[list[Utterance], list[Dropped]]:
    """Lines of which the head can be asked, and those whose slots it does not have."""
    kept, dropped = [], []
    for utterance in utterances:
        try:
            if head is not None:
                head.for_lines([utterance.as_line(prompt)])
            kept.append(utterance)
        except ValueError as error:
            dropped.append(dropped_line(utterance, "bad_prompt", str(error)))
    return kept, dropped


def _read_validation(
    data: DataRecipe, head, needs_text: bool
) -> tuple[dict[str, list[Utterance]], list[Dropped]]:
    sets, dropped = {}, []
    for name, entry in data.validation.items():
        sets[name], bad = _read_set(entry, data)
        sets[name], unasked = _askable(sets[name], head, data.prompt)
        bad += unasked
        dropped += bad
        if not sets[name] and needs_text:
            manifest = as_set(entry).manifest
            raise ValueError(f"validation set {name}: no usable line in {manifest}; {_why(bad)}")
        if not sets[name]:
            log.warning("validation set %s is not measured: %s", name, _why(bad))
            del sets[name]
    return sets, dropped


def as_set(entry: str | SetRecipe) -> SetRecipe:
    return SetRecipe(entry) if isinstance(entry, str) else entry


def _read_set(entry: str | SetRecipe, data: DataRecipe) -> tuple[list[Utterance], list[Dropped]]:
    """Lines of one entry of data.validation or data.test, and those that are left out."""
    entry = as_set(entry)
    text, lang = entry.text_field or data.text_field, entry.lang_field or data.lang_field
    fields = Fields(text, lang, default_channel=entry.channel)
    clips, bad = read_utterances(entry.manifest, data.lang, fields=fields)
    kept = []
    for clip in clips:
        seconds, most = clip.duration_s, entry.max_duration_s
        if seconds < entry.min_duration_s:
            detail = f"{seconds} s is below its set's min_duration_s"
            bad.append(dropped_line(clip, "too_short", detail))
        elif most is not None and seconds > most:
            detail = f"{seconds} s is above its set's max_duration_s"
            bad.append(dropped_line(clip, "too_long", detail))
        else:
            kept.append(clip)
    return kept, bad


def read_sets(
    sets: dict[str, str | SetRecipe], data: DataRecipe, sample_rate_hz: int
) -> dict[str, AudioStore]:
    """{name: its clips} of `data.test`; lines that cannot be used are counted.

    Raises:
        ValueError, FileNotFoundError: a manifest is missing, or has no line that can be used.
    """
    stores = {}
    for name, entry in sets.items():
        clips, bad = _read_set(entry, data)
        if not clips:
            manifest = as_set(entry).manifest
            raise ValueError(f"data.test.{name}: no usable line in {manifest}; {_why(bad)}")
        if bad:
            log.warning("data.test.%s: left out %d lines: %s", name, len(bad), _why(bad))
        stores[name] = AudioStore(
            clips, sample_rate_hz, data.cache_gb, pad_to_s=data.pad_to_s, retry=data.retry
        )
    return stores


def _frame_counter(model: ASRModel, fastest: float, pad_to_s: float) -> Callable[[float], int]:
    """Seconds of a clip -> frames of the encoder, at the fastest speed at which it is played."""

    def encoder_frames(seconds: float) -> int:
        shortest_s = max(seconds / max(fastest, 1.0), pad_to_s)
        return model.encoded_frames(int(shortest_s * model.sample_rate))

    return encoder_frames


def _tell_dropped(dropped: list[Dropped], path: Path, is_main: bool) -> None:
    if is_main:
        with atomic_file(path) as temporary:
            lines = [json_line(dataclasses.asdict(item)) for item in dropped[:MOST_LISTED]]
            if len(dropped) > MOST_LISTED:
                more = f"and {len(dropped) - MOST_LISTED} more lines, which are not listed"
                lines.append(json_line(dataclasses.asdict(Dropped("", 0, "not_listed", more))))
            temporary.write_text("".join(lines), encoding="utf-8")
    if dropped:
        log.warning("left out %d manifest lines: %s", len(dropped), _why(dropped))
        log.warning("each is listed with its reason in %s", path)


def training_limits(data: DataRecipe, heads) -> Limits:
    """The recipe's filters, those of the heads that are trained included."""
    names = {field.name for field in dataclasses.fields(Limits)} & vars(data).keys()
    values = {name: getattr(data, name) for name in names}
    if not any(HEADS[head].bounds_tokens_per_frame for head in heads):
        values["max_tokens_per_frame"] = None
    needs_frames = any(HEADS[head].needs_frame_per_token for head in heads)
    return Limits(**values, needs_text=bool(heads), frame_per_token=needs_frames)


def read_source(
    source: SourceRecipe, data: DataRecipe, needs_text: bool = True
) -> tuple[list[Utterance], list[Dropped]]:
    """All lines of one entry of data.train: those that can be used, and those that cannot."""
    tars = tar_shards(source.tarred_audio_filepaths) if source.tarred_audio_filepaths else None
    fields = Fields(data.text_field, data.lang_field, source.lang, source.channel)
    found, bad = [], []
    paths = [source.manifest]
    if not Path(source.manifest).is_file():  # a name with brackets in it is a name
        paths = expand_braces(source.manifest)
    for path in paths:
        some_found, some_bad = read_utterances(
            path, source.lang or data.lang, tars, needs_text, fields
        )
        found += some_found
        bad += some_bad
    return found, bad


def cap(
    utterances: list[Utterance], source: SourceRecipe, seed: int, number: int
) -> tuple[list[Utterance], list[Dropped]]:
    """At most max_clips and max_hours of a source: the same random part in every epoch."""
    if source.max_clips is None and source.max_hours is None:
        return utterances, []
    order = np.random.default_rng([seed, number]).permutation(len(utterances))
    hours = np.cumsum([utterances[i].duration_s for i in order]) / 3600
    count = len(order) if source.max_clips is None else source.max_clips
    if source.max_hours is not None:
        count = min(count, int(np.searchsorted(hours, source.max_hours, side="right")))
    kept = set(order[:count].tolist())
    over = [
        Dropped(
            u.manifest,
            u.line,
            "over_cap",
            f"{source.name or source.manifest} is capped",
            u.audio_name,
        )
        for i, u in enumerate(utterances)
        if i not in kept
    ]
    return [utterances[i] for i in sorted(kept)], over


def _shards_of(utterances: list[Utterance]) -> np.ndarray | None:
    if utterances[0].tar_member is None:
        return None
    return np.unique([u.audio_path for u in utterances], return_inverse=True)[1]


def _sounds(manifests: tuple[str, ...]) -> list[Utterance]:
    """Noises or room responses: manifests whose texts do not matter."""
    sounds = []
    for manifest in manifests:
        found, bad = read_utterances(manifest)
        if not found:
            raise ValueError(f"augment: no usable line in {manifest}; {_why(bad)}")
        sounds += found
    return sounds


def mixture_table(train: TrainingSet, temperature: float) -> str:
    """Each source: its clips, hours, share of the draws, and how often an epoch hears it."""
    shares = mixture_shares(train.sources, temperature)
    total = len(train.utterances)
    rows = ["  clips    hours   share  times an epoch  source"]
    for source, share in zip(train.sources, shares, strict=True):
        count, hours = len(source.clips), train.durations_s[source.clips].sum() / 3600
        rows.append(
            f"{count:7d} {hours:8.2f} {share:7.1%} {share * total / count:15.2f}  {source.name}"
        )
    return "\n".join(rows)


def _why(dropped: list[Dropped]) -> str:
    counts = Counter(item.reason for item in dropped).most_common()
    if not counts:
        return "nothing was left out"
    first = f"the first, line {dropped[0].line}: {dropped[0].detail}"
    return ", ".join(f"{count} {reason}" for reason, count in counts) + f"; {first}"
