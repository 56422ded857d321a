"""Texts to clips and a manifest, by any number of processes, bit for bit the same."""

import json
import multiprocessing
import os
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import soxr

from training.speech.sounds import SAMPLE_RATE_HZ, record, trim
from training.speech.voices import ACCENTS, HELDOUT_VARIANTS, TRAIN_VARIANTS, the_speaker

# eSpeak carries state (flutter, phase, the last voice) from clip to clip, and nothing in its API
# resets it: a fresh process every 32 clips makes a corpus independent of the number of processes.
CLIPS_PER_PROCESS = 32


@dataclass(frozen=True)
class SpokenText:
    """What one process needs to make one clip."""

    index: int
    text: str
    seed: int
    heldout: bool
    folder: str
    lang: str = "en"


def make_clip(clip: SpokenText) -> dict | None:
    """Speaks, records and writes one clip; its manifest entry, None where eSpeak stays silent."""
    rng = np.random.default_rng([clip.seed, clip.index, zlib.crc32(clip.text.encode())])
    variant = rng.choice(HELDOUT_VARIANTS if clip.heldout else TRAIN_VARIANTS)
    voice = f"{rng.choice(ACCENTS[clip.lang])}+{variant}"
    warp = rng.uniform(0.88, 1.14)
    speaker = the_speaker()
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


def synthesize(folder, texts, seed=0, heldout=False, jobs=1, hours=None, lang="en") -> list[dict]:
    """Speaks `texts` into `folder`; the entries of the manifest written there.

    Stops after the clip that reaches `hours`. The manifest is written last, so a folder without one
    is an unfinished corpus. Raises ModuleNotFoundError without eSpeak NG.
    """
    folder = Path(folder)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    the_speaker()  # a missing library is told once, here
    clips = (SpokenText(i, text, seed, heldout, str(folder), lang) for i, text in enumerate(texts))
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
