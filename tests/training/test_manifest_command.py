"""Data sets of other libraries as manifests: written by those, read back as training reads."""

import json
import shutil
import sys
import tarfile
import types

import numpy as np
import pytest
import soundfile

from fastconformer.audio.files import load_audio
from fastconformer.formats.manifest import read_manifest
from training.corpora.written import Item, write_manifest
from training.data.utterances import read_utterances
from training.manifest import main

RATE = 16000
STEP = 1 / 32768  # of 16 bits


@pytest.fixture
def lhotse():
    return pytest.importorskip("lhotse", reason="lhotse is not installed (extra data)")


@pytest.fixture
def speech(tmp_path):
    """Two wavs of noise, of one and of two channels: their paths and samples, (L, C)."""
    rng = np.random.default_rng(0)
    found = {}
    for name, channels, seconds in (("mono", 1, 2.0), ("stereo", 2, 1.5)):
        path = tmp_path / f"{name}.wav"
        samples = rng.integers(-12000, 12000, (round(seconds * RATE), channels)).astype(np.int16)
        soundfile.write(path, samples, RATE)
        found[name] = types.SimpleNamespace(path=path, samples=samples / np.float32(32768))
    return found


def cut_of(lhotse, path, text="turn on the lamp", language="en", **custom):
    """A cut of a whole file, with one supervision."""
    cut = lhotse.Recording.from_file(path).to_cut()
    said = lhotse.SupervisionSegment(
        id=cut.id, recording_id=cut.id, start=0, duration=cut.duration, channel=0, text=text,
        language=language, speaker="ann", custom=custom or None,
    )  # fmt: skip
    cut.supervisions = [said]
    return cut


def made(tmp_path, source, *more, status=0) -> list[dict]:
    """The manifest's lines; training's reader takes each of them."""
    out = tmp_path / "out"
    assert main([str(source), "-o", str(out), *more]) == status
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    clips, bad = read_utterances(out / "manifest.jsonl", needs_text=False)
    assert len(clips) == len(lines) and not bad
    return lines


def heard(tmp_path) -> list[np.ndarray]:
    """The samples of each line of the manifest, as transcribe and training hear them."""
    clips, _ = read_manifest(tmp_path / "out" / "manifest.jsonl")
    return [load_audio(c.path, RATE, c.offset_s or 0, c.duration_s, c.channel) for c in clips]


def test_cuts_of_files_point_at_them(tmp_path, lhotse, speech, capsys):
    mono = cut_of(lhotse, speech["mono"].path, pnc="yes", snr=7.5, words=["turn", "on"])
    section = mono.truncate(offset=0.25, duration=0.5).with_id("section")
    stereo = cut_of(lhotse, speech["stereo"].path, language=None)
    second = stereo.with_channels(1).with_id("second")
    lhotse.CutSet.from_cuts([mono, section, stereo, second]).to_file(tmp_path / "cuts.jsonl.gz")
    lines = made(tmp_path, tmp_path / "cuts.jsonl.gz", "--lang", "de")
    path = str(speech["mono"].path)
    assert lines[0] == {
        "audio_filepath": path, "duration": 2.0, "text": "turn on the lamp", "lang": "en",
        "id": mono.id, "speaker": "ann", "pnc": "yes", "snr": 7.5,
    }  # fmt: skip
    assert lines[1].items() >= {"audio_filepath": path, "offset": 0.25, "duration": 0.5}.items()
    assert "channel" not in lines[2] and lines[3]["channel"] == 1
    assert [line["lang"] for line in lines] == ["en", "en", "de", "de"]
    assert not (tmp_path / "out" / "audio").exists()
    cuts = [cut.load_audio().mean(axis=0) for cut in (mono, section, stereo, second)]
    for found, expected in zip(heard(tmp_path), cuts, strict=True):
        np.testing.assert_array_equal(found, expected)
    told = capsys.readouterr()
    assert "fields that no line takes: words" in told.err and "4 clips" in told.out


def test_what_lhotse_computes_is_written_down(tmp_path, lhotse, speech):
    """Padded, mixed, faster audio, and two files as two channels."""
    mono, stereo = cut_of(lhotse, speech["mono"].path), cut_of(lhotse, speech["stereo"].path)
    short = stereo.with_channels(0)
    recording = lhotse.Recording.from_file(speech["mono"].path)
    other = lhotse.Recording.from_file(speech["mono"].path)
    other.sources[0].channels = [1]
    pair = lhotse.Recording("pair", recording.sources + other.sources, RATE, 2 * RATE, 2.0)
    cuts = [
        mono.pad(duration=3.0),
        mono.mix(short, offset_other_by=0.5, snr=10),
        mono.append(short),
        mono.perturb_speed(1.1),
        mono.perturb_volume(4.0),  # louder than 16 bits hold
        pair.to_cut(),
    ]
    cuts = [cut.with_id(f"cut{number}") for number, cut in enumerate(cuts)]
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    lines = made(tmp_path, tmp_path / "cuts.jsonl")
    assert [line["id"] for line in lines] == [cut.id for cut in cuts]
    assert lines[1]["text"] == lines[2]["text"] == "turn on the lamp turn on the lamp"
    for cut, line in zip(cuts, lines, strict=True):
        expected = cut.load_audio()
        path = tmp_path / "out" / line["audio_filepath"]
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        assert rate == cut.sampling_rate and line["duration"] == pytest.approx(cut.duration)
        assert line["duration"] == len(samples) / rate
        exact = path.suffix == ".wav"
        assert exact == (cut.id == "cut4")
        np.testing.assert_allclose(samples.T, expected, rtol=0, atol=0 if exact else STEP / 2)


def test_what_is_resampled_is_read_at_the_new_rate(tmp_path, lhotse, speech):
    """By soxr, as all audio here; Lhotse would need scipy or torchaudio."""
    plain = cut_of(lhotse, speech["mono"].path).resample(8000)
    section = plain.truncate(offset=0.25, duration=0.5).with_id("section")
    padded = plain.pad(duration=3.0).with_id("padded")
    lhotse.CutSet.from_cuts([plain, section, padded]).to_file(tmp_path / "cuts.jsonl")
    lines = made(tmp_path, tmp_path / "cuts.jsonl")
    assert lines[0]["audio_filepath"] == lines[1]["audio_filepath"] == str(speech["mono"].path)
    assert lines[1]["offset"] == 0.25 and lines[2]["audio_filepath"] == "audio/000000.flac"
    samples, rate = soundfile.read(tmp_path / "out" / "audio" / "000000.flac", dtype="float32")
    assert rate == 8000 and len(samples) == 24000 and not samples[16000:].any()
    expected = load_audio(speech["mono"].path, 8000)
    np.testing.assert_allclose(samples[:16000], expected, rtol=0, atol=STEP / 2)


def test_texts_are_joined_as_nemo_trains_on_them(tmp_path, lhotse, speech):
    """In the order of the supervisions, not by time; without any text there is no key."""
    cut = cut_of(lhotse, speech["mono"].path)
    said = [lhotse.SupervisionSegment(str(i), cut.id, 1 - i, 1, text=text, language=lang)
            for i, (text, lang) in enumerate((("late", None), ("early", "nl")))]  # fmt: skip
    silent = cut.drop_supervisions().with_id("silent")
    cut.supervisions = said
    lhotse.CutSet.from_cuts([cut, silent]).to_file(tmp_path / "cuts.jsonl")
    lines = made(tmp_path, tmp_path / "cuts.jsonl")
    assert lines[0]["text"] == "late early" and lines[0]["lang"] == "nl"
    assert "text" not in lines[1]


def test_relative_paths(tmp_path, lhotse, speech, monkeypatch):
    """Lhotse takes them from the working folder on, NeMo from the cuts' folder on."""
    cut = lhotse.Recording.from_file(speech["mono"].path, relative_path_depth=1).to_cut()
    padded = cut.pad(duration=3.0).with_id("padded")
    (tmp_path / "lists").mkdir()
    for name in (".", "lists"):
        lhotse.CutSet.from_cuts([cut, padded]).to_file(tmp_path / name / "cuts.jsonl")
    for folder, source in ((tmp_path, "lists/cuts.jsonl"), (tmp_path / "lists", "../cuts.jsonl")):
        monkeypatch.chdir(folder)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        lines = made(tmp_path, source)
        assert lines[0]["audio_filepath"] == str(speech["mono"].path)
        assert lines[1]["audio_filepath"] == "audio/000000.flac"


def test_bad_items_are_named_and_left_out(tmp_path, lhotse, speech, capsys):
    """And nothing is run or fetched that a list of cuts asks for."""
    good = cut_of(lhotse, speech["mono"].path)
    records = {name: json.loads(json.dumps(good.to_dict())) for name in ("url", "command", "gone")}
    for name, record in records.items():
        record["recording"]["sources"][0] |= {"type": name, "source": f"touch {tmp_path / 'ran'}"}
    records["gone"]["recording"]["sources"][0]["type"] = "file"
    mixed = good.pad(duration=3.0).to_dict()
    mixed["tracks"][0]["cut"]["recording"] = records["command"]["recording"]
    half = good.to_dict() | {"custom": {"note": "\ud800"}}
    damaged = tmp_path / "damaged.flac"
    soundfile.write(damaged, speech["mono"].samples, RATE)
    broken = cut_of(lhotse, damaged).pad(duration=3.0).to_dict()
    damaged.write_bytes(damaged.read_bytes()[:20000])
    features = {key: value for key, value in good.to_dict().items() if key != "recording"}
    records |= {"mixed": mixed, "half": half, "broken": broken, "features": features}
    records |= {"backwards": good.to_dict() | {"duration": -1.0}}
    records |= {"empty": {}, "incomplete": {"type": "MonoCut", "id": "x"}}
    lines = [json.dumps(good.to_dict()), *map(json.dumps, records.values()), "{", "7"]
    (tmp_path / "cuts.jsonl").write_text("\n\n".join(lines) + "\n")
    assert len(made(tmp_path, tmp_path / "cuts.jsonl")) == 1
    assert not (tmp_path / "ran").exists()
    left = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    left = {x["item"].rpartition(":")[2]: x["reason"] for x in map(json.loads, left)}
    assert len(left) == len(lines) - 1 and next(iter(left)) == "3"
    assert "its audio is the url" in left["3"] and "its audio is the command" in left["5"]
    assert "no such audio file: touch" in left["7"] and "its audio is the command" in left["9"]
    assert left["11"] == "its text holds half of a character" and "damaged" in left["13"]
    assert left["15"] == "it has no recording" and "its type is None" in left["19"]
    assert left["17"] == "it starts at 0.0 s and lasts -1.0 s"
    told = capsys.readouterr()
    assert "cuts.jsonl:3: its audio is the url" in told.err and "and 2 more" in told.err
    assert "1 clips" in told.out and "12 left out" in told.out


def test_a_file_that_ends_early(tmp_path, lhotse, speech, capsys):
    cuts = [cut_of(lhotse, speech["mono"].path).with_id(f"cut{i}") for i in range(500)]
    path = tmp_path / "cuts.jsonl.gz"
    lhotse.CutSet.from_cuts(cuts).to_file(path)
    path.write_bytes(path.read_bytes()[:-200])
    assert 0 < len(made(tmp_path, path)) < 500
    assert "damaged, what follows is lost" in capsys.readouterr().err


def test_shar(tmp_path, lhotse, speech):
    """Two shards; FLAC as it lies in the tars, whose sections Lhotse has cut out."""
    from lhotse.shar import SharWriter

    mono, stereo = (
        cut_of(lhotse, speech["mono"].path, pnc="no"),
        cut_of(lhotse, speech["stereo"].path),
    )
    cuts = [mono, stereo, mono.truncate(offset=0.5, duration=1.0), mono.perturb_volume(0.5)]
    cuts = [cut.with_id(f"cut{number}") for number, cut in enumerate(cuts)]
    (tmp_path / "shar").mkdir()
    with SharWriter(str(tmp_path / "shar"), fields={"recording": "flac"}, shard_size=2) as writer:
        for cut in cuts:
            writer.write(cut)
    for shard in range(2):  # a field that was added later
        rows = [{"cut_id": cut.id, "note": f"of {cut.id}"} for cut in cuts[2 * shard :][:2]]
        rows = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "shar" / f"note.{shard:06d}.jsonl").write_text(rows)
    lines = made(tmp_path, tmp_path / "shar")
    assert [line["audio_filepath"] for line in lines] == [f"audio/00000{i}.flac" for i in range(4)]
    assert lines[0]["text"] == "turn on the lamp" and lines[0]["pnc"] == "no"
    assert [line["note"] for line in lines] == [f"of cut{i}" for i in range(4)]
    assert not {"shard_origin", "shar_epoch", "offset"} & lines[0].keys()
    for cut, found in zip(cuts, heard(tmp_path), strict=True):
        expected = cut.load_audio().mean(axis=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=STEP)


def test_damaged_shards(tmp_path, lhotse, speech, capsys):
    """The rest of that shard is lost, and the others are read."""
    from lhotse.shar import SharWriter

    (tmp_path / "shar").mkdir()
    cut = cut_of(lhotse, speech["mono"].path)
    with SharWriter(str(tmp_path / "shar"), fields={"recording": "wav"}, shard_size=3) as writer:
        for number in range(12):
            writer.write(cut.with_id(f"cut{number:02d}"))
    tar = tmp_path / "shar" / "recording.000000.tar"
    tar.write_bytes(tar.read_bytes()[:100_000])  # within the second clip
    shorter = tmp_path / "shar" / "recording.000001.tar"
    with tarfile.open(shorter) as old, tarfile.open(tmp_path / "new.tar", "w") as new:
        for member in old.getmembers()[:4]:  # of two clips
            new.addfile(member, old.extractfile(member))
    (tmp_path / "new.tar").rename(shorter)
    (tmp_path / "shar" / "recording.000002.tar").unlink()
    lines = made(tmp_path, tmp_path / "shar")
    assert [line["id"] for line in lines] == ["cut00", "cut03", "cut04", "cut09", "cut10", "cut11"]
    told = capsys.readouterr().err
    assert "cuts.000000.jsonl.gz: left after 1 cuts" in told
    assert "cuts.000001.jsonl.gz: there is audio of 2 of its 3 cuts" in told
    assert "cuts.000002.jsonl.gz: cut06: its audio is not in the folder" in told


def test_other_sources_are_told(tmp_path, lhotse, speech, capsys):
    (tmp_path / "nemo.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1}\n')
    recordings = lhotse.RecordingSet.from_recordings(
        [lhotse.Recording.from_file(speech["mono"].path)]
    )
    recordings.to_file(tmp_path / "recordings.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    for name, message in (
        ("nemo.jsonl", "is a NeMo manifest already"),
        ("recordings.jsonl", "lhotse cut simple"),
        ("empty.jsonl", "nothing in it can be used"),
        ("missing.jsonl", "no such file"),
        ("mono.wav", "no file of Lhotse cuts"),
    ):
        assert main([str(tmp_path / name), "-o", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("*out*"))


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="datasets is not installed (extra data)")


@pytest.fixture
def rows(speech):
    """Columns of a data set of three rows: a WAV's content twice, and a file."""
    content = speech["mono"].path.read_bytes()
    sounds = [(content, "a.wav"), (content, None), (None, str(speech["stereo"].path))]
    return {
        "audio": [{"bytes": content, "path": path} for content, path in sounds],
        "sentence": ["een", "twee", "drie"],
        "speaker": [7, 8, 9],
        "locale": [1, 0, 1],
        "embedding": [[0.5, 1.0]] * 3,
    }


def test_saved_data_sets(tmp_path, datasets, rows, speech, capsys):
    """By save_to_disk, which puts the files' contents in; audio is the same to the bit."""
    locale = datasets.ClassLabel(names=["de", "nl"])
    found = datasets.Dataset.from_dict(rows).cast_column("locale", locale)
    found = found.cast_column("audio", datasets.Audio())
    found.save_to_disk(tmp_path / "saved")
    lines = made(tmp_path, tmp_path / "saved", "--lang-column", "locale")
    assert lines[0] == {
        "audio_filepath": "audio/000000.wav", "duration": 2.0, "text": "een", "lang": "nl",
        "speaker": 7,
    }  # fmt: skip
    assert [line["text"] for line in lines] == ["een", "twee", "drie"]
    assert [line["lang"] for line in lines] == ["nl", "de", "nl"]
    assert "fields that no line takes: embedding" in capsys.readouterr().err
    names = ("mono", "mono", "stereo")
    for name, samples in zip(names, heard(tmp_path), strict=True):
        np.testing.assert_array_equal(samples, speech[name].samples.mean(axis=1))
    splits = datasets.DatasetDict(train=found, test=found.select([2]))
    splits.save_to_disk(tmp_path / "splits")
    for more, message in (
        ([], "has the splits train, test; give one of them with --split"),
        (["--split", "dev"], "has no split 'dev'; it has train, test"),
        (["--split", "test", "--text-column", "words"], "has no column 'words'; it has audio, sen"),
        (["--split", "test", "--config", "nl"], "has no configurations"),
    ):
        assert main([str(tmp_path / "splits"), "-o", str(tmp_path / "new"), *more]) == 1
        assert message in capsys.readouterr().err
    command = [str(tmp_path / "splits"), "-o", str(tmp_path / "new"), "--lang", "nl"]
    assert main([*command, "--split", "test"]) == 0
    [line] = (tmp_path / "new" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["lang"] == "nl" and json.loads(line)["duration"] == 1.5


@pytest.mark.parametrize("kind", ["parquet", "bare", "arrow", "folder"])
def test_files_of_data_sets(tmp_path, datasets, rows, speech, kind):
    """With the columns' kinds, as `datasets` writes them, or without, and a folder of splits."""
    found = datasets.Dataset.from_dict(rows).remove_columns("locale")
    if kind != "bare":
        found = found.cast_column("audio", datasets.Audio())
    (tmp_path / "data").mkdir()
    source = tmp_path / "data" / "test-00000-of-00001.parquet"
    if kind == "arrow":
        found.save_to_disk(tmp_path / "saved")
        [source] = (tmp_path / "saved").glob("*.arrow")
    else:
        found.to_parquet(source)
    if kind == "folder":
        found.select([0]).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
        source = tmp_path / "data"
    lines = made(tmp_path, source, *(["--split", "test"] if kind == "folder" else []))
    assert [line["text"] for line in lines] == ["een", "twee", "drie"]
    assert [line["duration"] for line in lines] == [2.0, 2.0, 1.5]
    if kind == "bare":
        assert lines[2]["audio_filepath"] == str(speech["stereo"].path)
    for name, samples in zip(("mono", "mono", "stereo"), heard(tmp_path), strict=True):
        np.testing.assert_array_equal(samples, speech[name].samples.mean(axis=1))


def test_bad_rows_and_columns(tmp_path, datasets, rows, capsys):
    rows = rows | {"text": ["eins", None, "drei"], "other": rows["audio"]}
    rows["audio"][2] = {"bytes": b"no audio at all", "path": "x.wav"}
    rows = {key: [*values, values[0]] for key, values in rows.items() if key != "embedding"}
    rows["audio"][3] = {"bytes": None, "path": "gone.wav"}
    found = datasets.Dataset.from_dict(rows)
    found.to_parquet(tmp_path / "rows.parquet")
    command = [str(tmp_path / "rows.parquet"), "-o", str(tmp_path / "out")]
    assert main(command) == 1
    assert "columns of audio audio, other; name the one of audio" in capsys.readouterr().err
    assert main([*command, "--audio-column", "audio"]) == 0
    told = capsys.readouterr()
    assert "row 1: text is None" in told.err and "row 2: the audio is damaged" in told.err
    assert "row 3: no such audio file: gone.wav" in told.err and "1 clips" in told.out
    found.select_columns(["other", "speaker"]).to_parquet(tmp_path / "rows.parquet")
    shutil.rmtree(tmp_path / "out")
    assert main(command) == 1
    assert "has the columns other, speaker; name the texts' with" in capsys.readouterr().err
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    assert main(command) == 1 and not (tmp_path / "out").exists()
    assert "rows.parquet" in capsys.readouterr().err


def test_names_of_the_hub(tmp_path, datasets, rows, monkeypatch, capsys):
    """Are handed to `datasets` with the revision."""
    asked = []

    def load_dataset(*words, **more):
        asked.append((words, more))
        return datasets.IterableDatasetDict(
            train=datasets.Dataset.from_dict(rows).to_iterable_dataset()
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(made(tmp_path, "owner/name@v2", "--config", "nl", "--split", "train")) == 3
    assert asked == [(("owner/name", "nl"), {"revision": "v2", "streaming": True})]
    cuts = tmp_path / "cuts.jsonl"
    cuts.write_text("{}\n")
    assert main([str(cuts), "-o", str(tmp_path / "new"), "--text-column", "text"]) == 2
    assert "--text-column is for Hugging Face data sets" in capsys.readouterr().err


def test_loose_files_beside_a_table(tmp_path, datasets, rows, speech, monkeypatch, capsys):
    table = '{"file_name": "mono.wav", "text": "een"}\n'
    (tmp_path / "metadata.jsonl").write_text(table)
    assert main([str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "no Hugging Face data set" in capsys.readouterr().err
    loose = datasets.load_dataset(str(tmp_path), streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: loose)
    assert main(["owner/name", "-o", str(tmp_path / "out")]) == 1
    assert "is a set of loose audio files, which is not read" in capsys.readouterr().err


def test_nothing_is_written_over_and_nothing_stays_half_written(tmp_path, lhotse, speech, capsys):
    cut = cut_of(lhotse, speech["mono"].path)
    source = tmp_path / "cuts.jsonl"
    lhotse.CutSet.from_cuts([cut]).to_file(source)
    made(tmp_path, source)
    before = (tmp_path / "out" / "manifest.jsonl").read_bytes()
    assert main([str(source), "-o", str(tmp_path / "out")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == before

    def interrupted():
        yield Item("one", {"duration": 1.0}, b"RIFF", ".wav")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(interrupted(), tmp_path / "new", None)
    assert not list(tmp_path.glob("*new*"))
    (tmp_path / "new").mkdir()  # an empty one is as good as none
    assert main([str(source), "-o", str(tmp_path / "new")]) == 0


def test_without_the_packages(tmp_path, monkeypatch, capsys):
    (tmp_path / "cuts.jsonl").write_text('{"type": "MonoCut"}\n')
    for package, source in (("lhotse", tmp_path / "cuts.jsonl"), ("datasets", "owner/name")):
        monkeypatch.setitem(sys.modules, package, None)
        assert main([str(source), "-o", str(tmp_path / "out")]) == 1
        told = capsys.readouterr().err
        assert f'{package} is not installed; pip install "fastconformer[data]"' in told
