"""Speaks a corpus with eSpeak NG: sentences in, 16 kHz clips and a NeMo manifest out.

    python -m training.synthesize OUT --vocabulary quickstart --count 400 --seed 1
    python -m training.synthesize OUT --sentences text.txt --count 10000 --digits 1500 --jobs 2

Writes `OUT/manifest.jsonl` and `OUT/audio/NNNNNN.flac` (16-bit, mono). A corpus repeats bit for bit
from its texts and seed, with any number of processes.

Many voices: English accents x eSpeak's voice variants x speaking rate x pitch x a warp of the
sampling rate, which moves pitch and formants together as another throat would. Then, in numpy, a
room, a microphone, a telephone band and noise. `--voices heldout` takes voice variants and texts
that `--voices train` (the default) never uses.

Facts about the C interface: eSpeak NG's `speak_lib.h`, release 1.50 and later.
"""

import argparse
import ctypes
import functools
import json
import multiprocessing
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import soxr

from fastconformer import cli

SAMPLE_RATE_HZ = 16000

# `en` is eSpeak's British English.
ACCENTS = {
    "en": ("en-us", "en-us", "en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-gb-scotland", "en-029"),
    "hi": ("hi",),
}
# Left out: whispers, effects (Demonic, robots, announcer) and near copies of the voices below.
TRAIN_VARIANTS = [
    "m1", "m2", "m3", "m4", "m5", "m6", "m8", "f1", "f2", "f3", "f4", "Alex", "Alicia", "Andrea",
    "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael",
    "Mike", "Reed", "Storm", "adam", "anika", "antonio", "aunty", "belinda", "benjamin", "boris",
    "caleb", "croak", "david", "ed", "edward", "grandma", "grandpa", "gustave", "ian", "john",
    "kaukovalta", "klatt", "klatt3", "klatt4", "linda", "marcelo", "max", "michel", "miguel",
    "norbert", "pablo", "pedro", "quincy", "robert", "sandro", "shelby", "steph", "travis",
    "victor",
]  # fmt: skip
HELDOUT_VARIANTS = [
    "m7", "f5", "Annie", "Andy", "Nguyen", "iven", "klatt2", "paul", "rob", "zac", "steph2",
    "mike2",
]  # fmt: skip

# eSpeak carries state (flutter, phase, the last voice) from clip to clip, and nothing in its API
# resets it: a fresh process every 32 clips makes a corpus independent of the number of processes.
CLIPS_PER_PROCESS = 32

HELDOUT_TEXT_SHARE = 20  # one text in twenty is spoken by held-out voices only

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = [
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True)
class Clip:
    """What one process needs to make one clip."""

    index: int
    text: str
    seed: int
    heldout: bool
    folder: str
    lang: str = "en"


class Speaker:
    """eSpeak NG behind ctypes. One a process: the library keeps its state in globals."""

    AUDIO_OUTPUT_SYNCHRONOUS = 2
    DONT_EXIT = 0x8000  # without it a missing data folder ends the process
    UTF8 = 1
    RATE, PITCH, RANGE, WORD_GAP = 1, 3, 4, 7  # espeak_PARAMETER

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError:
            raise ModuleNotFoundError(
                "eSpeak NG is not installed (package espeakng-loader); "
                "install the extra that holds it: pip install .[quickstart]"
            ) from None
        data = espeakng_loader.get_data_path()
        self.variants = Path(data, "voices", "!v")
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate_hz = self.library.espeak_Initialize(
            self.AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data), self.DONT_EXIT
        )
        if self.sample_rate_hz <= 0:
            raise RuntimeError(
                f"eSpeak NG cannot read its data in {data}; "
                "reinstall espeakng-loader, in a folder with a path under 150 characters"
            )
        self.pieces = []
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self.callback = callback(self._receive)  # kept: C holds only the bare pointer
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count, _events):
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(
        self, text, voice, rate_wpm=170, pitch=50, pitch_range=50, word_gap=0, seed=1
    ) -> np.ndarray:
        """Samples of `text` in [-1, 1], float32 (L,), at `sample_rate_hz`.

        `voice` is an accent with a variant, `en-us+m3`; pitch and range run from 0 to 100, the word
        gap counts 10 ms. Raises ValueError for a voice that this eSpeak does not have.
        """
        _, _, variant = voice.partition("+")
        # eSpeak itself drops an unknown variant without a word.
        missing = variant and not (self.variants / variant).is_file()
        if missing or self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}; see `espeak-ng --voices=variant`")
        for parameter, value in (
            (self.RATE, rate_wpm),
            (self.PITCH, pitch),
            (self.RANGE, pitch_range),
            (self.WORD_GAP, word_gap),
        ):
            self.library.espeak_SetParameter(parameter, int(value), 0)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(seed))  # else the time of day
        self.pieces.clear()
        encoded = text.encode()
        self.library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, self.UTF8, None, None
        )
        samples = np.concatenate(self.pieces or [np.zeros(0, np.int16)])
        return samples.astype(np.float32) / 32768


@functools.cache
def _speaker() -> Speaker:
    return Speaker()


def trim(samples: np.ndarray, threshold=1e-3) -> np.ndarray:
    """Cuts leading and trailing samples below `threshold`; all of a silent clip."""
    loud = np.flatnonzero(np.abs(samples) > threshold)
    return samples[loud[0] : loud[-1] + 1] if loud.size else samples[:0]


def shaped_noise(rng, n_samples: int, slope_db: float) -> np.ndarray:
    """Gaussian noise of unit power whose spectrum changes by `slope_db` an octave (pink: -3)."""
    spectrum = np.fft.rfft(rng.standard_normal(n_samples))
    bins = np.arange(len(spectrum))
    bins[0] = 1
    spectrum *= bins ** (slope_db / 6.02)
    noise = np.fft.irfft(spectrum, n_samples)
    return (noise / (noise.std() + 1e-12)).astype(np.float32)


def room(rng, decay_s: float, direct_to_reverberant_db: float) -> np.ndarray:
    """Impulse response: the direct sound, then noise that falls by 60 dB in `decay_s` seconds."""
    n_samples = int(decay_s * SAMPLE_RATE_HZ)
    tail = rng.standard_normal(n_samples) * 10 ** (-3 * np.arange(n_samples) / n_samples)
    tail[: int(0.002 * SAMPLE_RATE_HZ)] = 0
    tail *= 10 ** (-direct_to_reverberant_db / 20) / np.sqrt(np.sum(tail**2) + 1e-12)
    tail[0] = 1
    return tail


def record(rng, samples: np.ndarray) -> np.ndarray:
    """The clip as some microphone somewhere hears it: silence, room, colour, band, noise, level."""
    lead, trail = (rng.uniform(0.03, 0.5, 2) * SAMPLE_RATE_HZ).astype(int)
    samples = np.pad(samples, (lead, trail))
    response = np.ones(1)
    if rng.random() < 0.3:
        response = room(rng, rng.uniform(0.1, 0.6), rng.uniform(0, 15))
    size = 1 << (len(samples) + len(response) - 1).bit_length()
    spectrum = np.fft.rfft(samples, size) * np.fft.rfft(response, size)
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ), 50)
    if rng.random() < 0.7:  # spectral tilt around 1 kHz
        spectrum *= 10 ** (rng.uniform(-4, 4) * np.log2(frequency / 1000) / 20)
    band = rng.random()
    if band < 0.2:  # telephone
        spectrum /= np.sqrt(1 + (rng.uniform(80, 300) / frequency) ** 6)
        spectrum /= np.sqrt(1 + (frequency / rng.uniform(3200, 3800)) ** 20)
    elif band < 0.4:  # one-pole lowpass
        spectrum /= np.sqrt(1 + (frequency / rng.uniform(1500, 6000)) ** 2)
    samples = np.fft.irfft(spectrum, size)[: len(samples)]
    if rng.random() < 0.7:
        level = np.sqrt(np.mean(samples**2)) * 10 ** (-rng.uniform(12, 45) / 20)
        samples = samples + level * shaped_noise(rng, len(samples), rng.choice([0, -3, -6]))
    peak = 10 ** (-rng.uniform(0.5, 22) / 20)
    return (samples * (peak / (np.abs(samples).max() + 1e-9))).astype(np.float32)


def make_clip(clip: Clip) -> dict | None:
    """Speaks, records and writes one clip; its manifest entry, None where eSpeak stays silent."""
    rng = np.random.default_rng([clip.seed, clip.index, zlib.crc32(clip.text.encode())])
    variant = rng.choice(HELDOUT_VARIANTS if clip.heldout else TRAIN_VARIANTS)
    voice = f"{rng.choice(ACCENTS[clip.lang])}+{variant}"
    warp = rng.uniform(0.88, 1.14)
    speaker = _speaker()
    samples = speaker.speak(
        clip.text + rng.choice([".", ".", ".", "", ",", "?"]),
        voice,
        rate_wpm=rng.uniform(95, 185) / warp,
        pitch=rng.integers(25, 76),
        pitch_range=rng.integers(15, 86),
        word_gap=rng.choice([0, 0, 0, 1, 3, 6]),
        seed=int(rng.integers(1 << 31)),
    )
    samples = soxr.resample(trim(samples), speaker.sample_rate_hz * warp, SAMPLE_RATE_HZ)
    if len(samples) == 0:
        return None
    samples = record(rng, samples)
    name = f"audio/{clip.index:06d}.flac"
    pcm = np.round(samples * 32767).astype(np.int16)
    soundfile.write(Path(clip.folder, name), pcm, SAMPLE_RATE_HZ)
    return {
        "audio_filepath": name,
        "duration": len(pcm) / SAMPLE_RATE_HZ,
        "text": clip.text,
        "lang": clip.lang,
        "speaker": voice,
        "sample_rate": SAMPLE_RATE_HZ,
    }


def plain_text(line: str) -> str | None:
    """Lower case a-z, apostrophes, single spaces; None where a digit stands for unknown words."""
    if re.search(r"\d", line):
        return None
    line = unicodedata.normalize("NFKD", line.lower().replace("\u2019", "'"))
    line = "".join(c for c in line if not unicodedata.combining(c))
    words = (word.strip("'") for word in re.sub(r"[^a-z']+", " ", line).split())
    return " ".join(word for word in words if word)


def read_sentences(paths, rng, max_words=16) -> list[str]:
    """Sentences of the files, one a line (the last column of a `.tsv`), in pieces of 2 to
    `max_words` words cut at random word boundaries."""
    pieces = []
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            words = (plain_text(line.split("\t")[-1]) or "").split()
            while words:
                n_words = int(rng.integers(2, max_words + 1))
                if len(words) <= max_words and rng.random() < 0.5:
                    n_words = len(words)
                if len(words) - n_words == 1:  # a last word alone joins its piece
                    n_words = len(words) if n_words < max_words else n_words - 1
                pieces.append(" ".join(words[:n_words]))
                words = words[n_words:]
    return [piece for piece in dict.fromkeys(pieces) if piece]


def is_heldout(text: str) -> bool:
    """Whether a text belongs to the held-out voices: decided by its checksum, so by it alone."""
    return zlib.crc32(text.encode()) % HELDOUT_TEXT_SHARE == 0


def number_words(number: int) -> str:
    """0 to 999 in words, American style: 412 is "four hundred twelve"."""
    if number >= 100:
        rest = number % 100
        return f"{DIGITS[number // 100]} hundred" + (f" {number_words(rest)}" if rest else "")
    if number < 10:
        return DIGITS[number]
    if number < 20:
        return TEENS[number - 10]
    return TENS[number // 10 - 2] + (f" {DIGITS[number % 10]}" if number % 10 else "")


def digit_text(rng) -> str:
    """A digit, a string of two to eight digits, or a number below 1000."""
    kind = rng.random()
    if kind < 0.4:
        return str(rng.choice(DIGITS))
    if kind < 0.85:
        return " ".join(rng.choice(DIGITS, int(rng.integers(2, 9))))
    return number_words(int(rng.integers(10, 1000)))


PROMPTS = (
    "please {w}", "press {d}", "press {d} for {w}", "to {w} press {d}", "please enter your {w}",
    "your {w} is {w}", "you have {n} new {w}", "enter the {w} followed by the {w}", "{w} and {w}",
    "thank you for {w}", "the {w} is not {w}", "please hold for the next {w}", "{w} at {n} {w}",
    "if you would like to {w} please press {d} now", "the number you have {w} is {d} {d} {d} {d}",
    "{w} not found", "goodbye", "your {w} has been {w}", "no {w} today", "that {w} was {w}",
)  # fmt: skip


def phrase_text(rng, sentences, frequent) -> str:
    """A frequent word alone, one to four words of a sentence, or a prompt around frequent words."""
    kind = rng.random()
    if kind < 0.3:
        return str(rng.choice(frequent))
    if kind < 0.6:
        words = sentences[int(rng.integers(len(sentences)))].split()
        start = int(rng.integers(len(words)))
        return " ".join(words[start : start + int(rng.integers(1, 5))])
    pattern = str(rng.choice(PROMPTS))
    fill = {
        "w": lambda: str(rng.choice(frequent)),
        "d": lambda: str(rng.choice(DIGITS)),
        "n": lambda: number_words(int(rng.integers(1, 100))),
    }
    return re.sub(r"\{(\w)\}", lambda match: fill[match[1]](), pattern)


COLOURS = ["red", "green", "blue", "yellow", "white", "black"]
THINGS = ["lamp", "door", "window", "box", "radio", "camera", "heater", "fan"]
ROOMS = ["kitchen", "garden", "office", "bedroom", "garage", "hall"]
MONTHS = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
]  # fmt: skip
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
QUICKSTART = (
    "turn {on} the {colour} {thing} in the {room}", "open the {room} {thing}",
    "turn {on} the {thing} at {number} o'clock", "call number {digits}", "move to the {room}",
    "close the {colour} {thing}", "set the {room} {thing} to {number}", "play track {number}",
    "the {month} meeting is on {weekday}", "wake me on {weekday} at {number}",
    "{weekday} the {number} of {month}", "the code is {digits}", "put the {thing} in the {room}",
)  # fmt: skip


def quickstart_text(rng) -> str:
    """A household command, a date or a number, over some eighty words."""
    fill = {
        "on": lambda: rng.choice(["on", "off"]),
        "colour": lambda: rng.choice(COLOURS),
        "thing": lambda: rng.choice(THINGS),
        "room": lambda: rng.choice(ROOMS),
        "month": lambda: rng.choice(MONTHS),
        "weekday": lambda: rng.choice(WEEKDAYS),
        "number": lambda: number_words(int(rng.integers(1, 60))),
        "digits": lambda: " ".join(rng.choice(DIGITS, int(rng.integers(3, 6)))),
    }
    return re.sub(r"\{(\w+)\}", lambda match: str(fill[match[1]]()), str(rng.choice(QUICKSTART)))


HINDI_DIGITS = ["शून्य", "एक", "दो", "तीन", "चार", "पाँच", "छह", "सात", "आठ", "नौ"]
HINDI_NUMBERS = [
    *HINDI_DIGITS[1:], "दस", "ग्यारह", "बारह", "तेरह", "चौदह", "पंद्रह", "सोलह", "सत्रह",
    "अठारह", "उन्नीस", "बीस",
]  # fmt: skip
HINDI_WORDS = {
    "on": ["चालू", "बंद"],
    "colour": ["लाल", "हरी", "नीली", "पीली", "सफ़ेद", "काली"],
    "thing": ["बत्ती", "खिड़की", "अलमारी", "घड़ी", "गाड़ी", "किताब"],  # all feminine, as colours are
    "room": ["रसोई", "बगीचे", "दफ़्तर", "कमरे", "गलियारे"],
    "month": [
        "जनवरी", "फ़रवरी", "मार्च", "अप्रैल", "मई", "जून", "जुलाई", "अगस्त", "सितंबर", "अक्टूबर",
        "नवंबर", "दिसंबर",
    ],
    "weekday": ["सोमवार", "मंगलवार", "बुधवार", "गुरुवार", "शुक्रवार", "शनिवार", "रविवार"],
    "drink": ["चाय", "पानी", "दूध"],
    "number": HINDI_NUMBERS,
}  # fmt: skip
HINDI = (
    "{room} की {thing} {on} करो", "{colour} {thing} {on} करो", "{room} का दरवाज़ा खोलो",
    "कोड है {digits}", "{weekday} को {number} बजे मुझे जगाओ", "गाना नंबर {number} चलाओ",
    "{colour} {thing} {room} में रखो",
    "{month} की {number} तारीख को मिलते हैं", "फ़ोन नंबर {digits} मिलाओ",
    "मुझे {number} बजे {drink} चाहिए",
    "{number} और {number} जोड़ो", "{room} में {number} लोग हैं", "आज {weekday} है और कल {weekday}",
)  # fmt: skip


def hindi_text(rng) -> str:
    """A household command, a date or a number in Hindi, over some eighty words."""
    fill = {name: lambda words=words: rng.choice(words) for name, words in HINDI_WORDS.items()}
    fill["digits"] = lambda: " ".join(rng.choice(HINDI_DIGITS, int(rng.integers(3, 6))))
    return re.sub(r"\{(\w+)\}", lambda match: str(fill[match[1]]()), str(rng.choice(HINDI)))


GRAMMARS = {"quickstart": ("en", quickstart_text), "hindi": ("hi", hindi_text)}


def draw(make, count: int, heldout: bool) -> list[str]:
    """`count` different texts of `make()`, all held out or none; ValueError where it runs dry."""
    texts: dict[str, None] = {}
    for _ in range(200 * HELDOUT_TEXT_SHARE + 20 * HELDOUT_TEXT_SHARE * count):
        if len(texts) == count:
            return list(texts)
        text = make()
        if is_heldout(text) == heldout:
            texts[text] = None
    raise ValueError(f"only {len(texts)} different sentences, asked for {count}; lower the count")


def choose_texts(args) -> list[str]:
    """The text of every clip, in a seeded order."""
    rng = np.random.default_rng(args.seed)
    heldout = args.voices == "heldout"
    sentences = read_sentences(args.sentences or [], rng, args.max_words)
    frequent = [w for w, _ in Counter(" ".join(sentences).split()).most_common(2000) if len(w) > 1]
    mine = [text for text in sentences if is_heldout(text) == heldout]
    if args.vocabulary:
        _, make = GRAMMARS[args.vocabulary]
        texts = draw(lambda: make(rng), args.count, heldout)
    elif args.count and not mine:
        raise ValueError(
            f"{len(sentences)} sentences in {', '.join(map(str, args.sentences))}, none of them for"
            f" --voices {args.voices} (one in {HELDOUT_TEXT_SHARE} is held out); give more text"
        )
    else:  # each sentence once before any comes twice
        texts = []
        while len(texts) < args.count:
            texts.extend(mine[i] for i in rng.permutation(len(mine)))
        texts = texts[: args.count]
    texts += [digit_text(rng) for _ in range(args.digits)]
    if args.phrases:
        if not mine:
            raise ValueError("--phrases takes its words from --sentences, which gave none")
        texts += [phrase_text(rng, mine, frequent) for _ in range(args.phrases)]
    return [texts[i] for i in rng.permutation(len(texts))]


def synthesize(folder, texts, seed=0, heldout=False, jobs=1, hours=None, lang="en") -> list[dict]:
    """Speaks `texts` into `folder`; the entries of the manifest written there.

    Stops after the clip that reaches `hours`. The manifest is written last, so a folder without one
    is an unfinished corpus. Raises ModuleNotFoundError without eSpeak NG.
    """
    folder = Path(folder)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    _speaker()  # a missing library is told once, here
    clips = (Clip(i, text, seed, heldout, str(folder), lang) for i, text in enumerate(texts))
    entries, duration_s = [], 0.0
    limit_s = float("inf") if hours is None else hours * 3600
    # Rounds, not one long map, so that little is spoken in vain when --hours ends the run.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        while duration_s < limit_s:
            batch = list(islice(clips, (8 if hours is None else 1) * CLIPS_PER_PROCESS * jobs))
            if not batch:
                break
            for entry in pool.map(make_clip, batch, chunksize=CLIPS_PER_PROCESS):
                if entry is not None and duration_s < limit_s:
                    entries.append(entry)
                    duration_s += entry["duration"]
    for path in (folder / "audio").glob("[0-9]*.flac"):  # spoken beyond --hours, or an older run's
        if entries and int(path.stem) > int(Path(entries[-1]["audio_filepath"]).stem):
            path.unlink()
    partial = folder / "manifest.jsonl.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / "manifest.jsonl")
    return entries


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.parser(
        "training.synthesize",
        "Speak a corpus with eSpeak NG: 16 kHz FLAC clips and a NeMo manifest.",
        "corpus --vocabulary quickstart --count 400",
    )
    parser.add_argument("out", type=Path, help="folder for manifest.jsonl and audio/")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--sentences",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text files, a sentence a line; of a .tsv the last column",
    )
    source.add_argument("--vocabulary", choices=list(GRAMMARS), help="a built-in small grammar")
    parser.add_argument("--count", type=int, default=400, help="clips of sentences (%(default)s)")
    parser.add_argument("--digits", type=int, default=0, help="further clips of digits and numbers")
    parser.add_argument("--phrases", type=int, default=0, help="further clips of words and phrases")
    parser.add_argument("--hours", type=float, help="stop once this much audio is spoken")
    parser.add_argument("--max-words", type=int, default=16, help="longer sentences are cut (16)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same corpus (%(default)s)")
    parser.add_argument(
        "--voices",
        choices=["train", "heldout"],
        default="train",
        help="heldout: voices and sentences that `train` never uses",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.seed < 0 or args.max_words < 3:
        parser.error("--jobs must be at least 1, --seed 0, --max-words 3")
    if min(args.count, args.digits, args.phrases) < 0 or (args.hours or 1) <= 0:
        parser.error("--count, --digits and --phrases must not be negative, --hours positive")
    return args


def main(argv=None) -> int:
    return cli.run("synthesize", lambda: run(parse_arguments(argv)))


def run(args) -> None:
    try:
        texts = choose_texts(args)
        heldout = args.voices == "heldout"
        lang = GRAMMARS[args.vocabulary][0] if args.vocabulary else "en"
        entries = synthesize(args.out, texts, args.seed, heldout, args.jobs, args.hours, lang)
    except (ModuleNotFoundError, RuntimeError) as error:
        raise cli.Failed(str(error)) from None
    minutes = sum(entry["duration"] for entry in entries) / 60
    voices = len({entry["speaker"] for entry in entries})
    print(f"{len(entries)} clips, {minutes:.1f} min, {voices} voices: {args.out}/manifest.jsonl")


if __name__ == "__main__":
    sys.exit(main())
