"""Recipe sections of what is heard: sources and batches, SpecAugment, changes of the waveform."""

import dataclasses

from training.recipe.fields import key

# How often NeMo's prompt_mode, of a line or of a source, says "auto"; another mode says it as often
# as `data.auto_share`.
AUTO_SHARES = {"langID": 0.0, "auto": 1.0}
# SpecAugment of NeMo's, where a config's section leaves out a key.
MASKS = {"freq_masks": 0, "time_masks": 0, "freq_width": 10, "time_width": 10}
MASKS |= {"rect_masks": 0, "rect_time": 5, "rect_freq": 20}


@dataclasses.dataclass(frozen=True)
class SourceRecipe:
    """One entry of data.train; a plain path is one with nothing but its manifest."""

    manifest: str = ""  # NeMo manifest; {0..7} or _OP_0..7_CL_ stands for many, as in NeMo
    name: str | None = None  # in logs and tables; null: the manifest's
    # Share of the draws, beside the others'; all or none have one. 0: the source is switched off.
    weight: float | None = key(None, at_least=0)
    max_hours: float | None = key(None, above=0)  # a fixed random part of it; null: all
    max_clips: int | None = key(None, above=0)
    lang: str | None = None  # only its lines of this `lang`; null: as data.lang
    tarred_audio_filepaths: str | None = None  # its audio lies in these tar files
    channel: int | None = key(None, at_least=0)  # of lines that name none, from 0; null: all mixed
    auto_share: float | None = key(None, share=True)  # null: data.auto_share
    # Of a vocabulary that grew: old (from before), all; null: old for lines of retain.lang.
    pieces: str | None = key(None, one_of=(None, "old", "all"))

    def __post_init__(self):
        if not self.manifest:
            raise ValueError(f"data.train: {self.name or 'a mapping'} has no manifest")


@dataclasses.dataclass(frozen=True)
class SetRecipe:
    """One entry of data.validation or data.test; a plain path is one with nothing but its manifest.
    Nothing is left out for its length, unless these limits say so."""

    manifest: str = ""
    min_duration_s: float = key(0.0, at_least=0)
    max_duration_s: float | None = key(None, above=0)
    text_field: str | None = None  # null: data.text_field
    lang_field: str | None = None  # null: data.lang_field
    channel: int | None = key(None, at_least=0)  # of lines that name none, from 0; null: all mixed

    def __post_init__(self):
        if not self.manifest:
            raise ValueError("data.validation, data.test: a mapping has no manifest")
        if self.max_duration_s is not None and self.min_duration_s >= self.max_duration_s:
            raise ValueError(f"{self.manifest}: min_duration_s must be below max_duration_s")


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    # Paths or SourceRecipes; one that is listed twice is seen twice.
    train: tuple[str | SourceRecipe, ...] = ()
    temperature: float = key(1.0, at_least=0)  # shares are weight ** this; 0: all equal, as in NeMo
    # name -> manifest, or a SetRecipe
    validation: dict[str, str | SetRecipe] = dataclasses.field(default_factory=dict)
    # measured once, at the end
    test: dict[str, str | SetRecipe] = dataclasses.field(default_factory=dict)
    lang: str | None = None  # only lines of this `lang` (or without one); null: all
    # {slot: value} of a prompt (Canary), for lines that lack a slot: {source_lang: de, pnc: yes}
    prompt: dict = dataclasses.field(default_factory=dict)
    # Of an encoder that is told a language: draws that are told "auto" in place of theirs.
    auto_share: float = key(0.5, share=True)
    shuffle: bool = True  # false: clips and batches in the manifests' order
    text_field: str = "text"  # the manifests' key of what is said
    lang_field: str = "lang"  # the manifests' key of the language
    min_duration_s: float = key(0.1, at_least=0)
    max_duration_s: float = key(40.0, above=0)
    min_tokens_per_s: float | None = key(None, at_least=0)
    max_tokens_per_s: float | None = key(None, above=0)
    max_tokens: int | None = key(None, at_least=1)  # in a clip
    min_chars_per_s: float | None = key(None, at_least=0)
    max_chars_per_s: float | None = key(None, above=0)
    # Of transducers, of the encoder's frames; CTC has its own limit.
    max_tokens_per_frame: float | None = key(1.0, above=0)
    pad_to_s: float = key(1.0, at_least=0)  # silence around shorter clips, as in `transcribe`
    batch_size: int | None = key(16, at_least=1)  # most clips in a batch; null: no limit
    # Most seconds in a batch, padding included; "auto": the most that the device takes.
    batch_duration_s: float | str | None = None
    batch_memory_gb: float | None = key(None, above=0)  # for "auto"; null: nearly all that is free
    quadratic_duration_s: float | None = key(None, above=0)  # a clip of d s counts d + d^2 / this
    retry: int = key(4, at_least=0)  # tries more of files out of reach, 0.5, 1, 2 ... s later
    num_workers: int = key(2, at_least=0)  # threads that read ahead; 0 reads in the loop
    cache_gb: float = key(4.0, at_least=0)  # decoded audio stays in memory when all fits in this

    def __post_init__(self):
        if self.min_duration_s >= self.max_duration_s:
            raise ValueError("data.min_duration_s must be below data.max_duration_s")
        for kind in ("tokens", "chars"):
            low, high = getattr(self, f"min_{kind}_per_s"), getattr(self, f"max_{kind}_per_s")
            if low is not None and high is not None and low >= high:
                raise ValueError(f"data.min_{kind}_per_s must be below data.max_{kind}_per_s")
        limit = self.batch_duration_s
        if limit != "auto" and (isinstance(limit, str) or (limit is not None and limit <= 0)):
            raise ValueError(f"data.batch_duration_s is {limit!r}; give seconds or auto")
        if self.batch_size is None and limit is None:
            raise ValueError("give data.batch_size or data.batch_duration_s, or both")
        if self.quadratic_duration_s is not None and limit is None:
            raise ValueError("data.quadratic_duration_s needs data.batch_duration_s")
        if self.batch_memory_gb is not None and limit != "auto":
            raise ValueError("data.batch_memory_gb needs data.batch_duration_s: auto")
        if not self.shuffle and any(source.weight is not None for source in self.sources):
            raise ValueError("data.shuffle: false keeps the manifests' order, and takes no weights")
        weighted = sum(source.weight is not None for source in self.sources)
        if weighted not in (0, len(self.sources)):
            raise ValueError(
                f"data.train: {weighted} of {len(self.sources)} entries have a weight; "
                "give one to each, or to none"
            )
        if self.train and not self.sources:
            raise ValueError("data.train: every source is switched off by weight 0")

    @property
    def sources(self) -> list[SourceRecipe]:
        """`train` without what is switched off, plain paths as sources too."""
        sources = [s if isinstance(s, SourceRecipe) else SourceRecipe(s) for s in self.train]
        return [source for source in sources if source.weight != 0]


@dataclasses.dataclass(frozen=True)
class SpecAugmentRecipe:
    """null everywhere: the checkpoint's `spec_augment`; freq_masks = time_masks = 0: off."""

    freq_masks: int | None = key(None, at_least=0)
    time_masks: int | None = key(None, at_least=0)
    freq_width: int | None = key(None, at_least=0)  # mel bins
    time_width: float | int | None = key(None, at_least=0)  # int: frames; float: share of a clip's
    rect_masks: int | None = key(None, at_least=0)  # cut-out rectangles
    rect_time: int | None = key(None, at_least=0)  # frames
    rect_freq: int | None = key(None, at_least=0)  # mel bins
    lfr: bool = False  # Fun-ASR-Nano: widths in rows of 60 ms, after stacking, as FunASR's


@dataclasses.dataclass(frozen=True)
class WhiteNoiseRecipe:
    probability: float = key(0.0, share=True)
    level_db: tuple[float, float] = key((-90.0, -46.0), in_order=True)  # of full scale, as in NeMo


@dataclasses.dataclass(frozen=True)
class NoiseRecipe:
    manifests: tuple[str, ...] = ()
    probability: float = key(0.0, share=True)
    snr_db: tuple[float, float] = key((0.0, 30.0), in_order=True)

    def __post_init__(self):
        _sounds_and_probability(self, "noise")


@dataclasses.dataclass(frozen=True)
class RoomRecipe:
    manifests: tuple[str, ...] = ()  # impulse responses
    probability: float = key(0.0, share=True)

    def __post_init__(self):
        _sounds_and_probability(self, "rir")


def _sounds_and_probability(section, name: str) -> None:
    if bool(section.manifests) != (section.probability > 0):
        raise ValueError(f"augment.{name} needs manifests and a probability above 0, or neither")


@dataclasses.dataclass(frozen=True)
class BabbleRecipe:
    """Other training clips, mixed."""

    probability: float = key(0.0, share=True)
    voices: tuple[int, int] = key((3, 7), in_order=True)  # fewest and most
    snr_db: tuple[float, float] = key((5.0, 20.0), in_order=True)

    def __post_init__(self):
        if self.voices[0] < 1:
            raise ValueError(
                f"augment.babble.voices starts at {self.voices[0]}, expected 1 or more"
            )


@dataclasses.dataclass(frozen=True)
class HumRecipe:
    probability: float = key(0.0, share=True)
    mains_hz: tuple[int, ...] = (50, 60)
    snr_db: tuple[float, float] = key((10.0, 30.0), in_order=True)

    def __post_init__(self):
        if not self.mains_hz or min(self.mains_hz) <= 0:
            raise ValueError("augment.hum.mains_hz needs frequencies above 0")


@dataclasses.dataclass(frozen=True)
class TelephoneRecipe:
    probability: float = key(0.0, share=True)
    codecs: tuple[str, ...] = ("mulaw", "alaw")  # G.711; each clip gets one of them
    band_hz: tuple[float, float] = key((300.0, 3400.0), in_order=True)
    packet_loss: float = key(0.0, share=True)  # the largest share of packets that are lost
    burst_packets: float = key(3.0, at_least=1)  # mean length of a burst
    packet_ms: float = key(20.0, at_least=1)

    def __post_init__(self):
        if not self.codecs or not set(self.codecs) <= {"mulaw", "alaw"}:
            raise ValueError(f"augment.telephone.codecs is {self.codecs}, expected mulaw or alaw")
        if not 0 <= self.band_hz[0] < self.band_hz[1] <= 4000:
            raise ValueError("augment.telephone.band_hz is not a band within 0 to 4000 Hz")


@dataclasses.dataclass(frozen=True)
class AugmentRecipe:
    """Changes of the waveform, all off unless given. (low, high) pairs are drawn from uniformly."""

    speeds: tuple[float, ...] = ()  # each draw gets one of them, pitch included
    gain_db: tuple[float, float] | None = key(None, in_order=True)
    shift_s: float = key(0.0, at_least=0)  # earlier or later by at most this
    white_noise: WhiteNoiseRecipe = WhiteNoiseRecipe()
    noise: NoiseRecipe = NoiseRecipe()
    rir: RoomRecipe = RoomRecipe()
    babble: BabbleRecipe = BabbleRecipe()
    hum: HumRecipe = HumRecipe()
    telephone: TelephoneRecipe = TelephoneRecipe()

    def __post_init__(self):
        if not all(0.25 <= speed <= 4 for speed in self.speeds):
            raise ValueError(f"augment.speeds is {list(self.speeds)}, expected 0.25 to 4")
