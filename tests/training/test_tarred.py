"""NeMo's tarred data sets, read in place."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from training.data.sources import read_source
from training.data.store import AudioStore
from training.data.tarred import expand_braces, shard_number, tar_shards
from training.data.utterances import read_utterances
from training.recipe.data_sections import DataRecipe, SourceRecipe

RATE = 16000


def wav(seconds, seed):
    content = io.BytesIO()
    samples = np.random.default_rng(seed).integers(-3000, 3000, int(RATE * seconds))
    soundfile.write(content, samples.astype(np.int16), RATE, format="WAV")
    return content.getvalue(), samples.astype(np.float32) / 32768


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("audio__OP_0..2_CL_.tar", ["audio_0.tar", "audio_1.tar", "audio_2.tar"]),
        ("a_{08..10}.tar", ["a_08.tar", "a_09.tar", "a_10.tar"]),
        ("{x,y}/a_{0..1}", ["x/a_0", "x/a_1", "y/a_0", "y/a_1"]),
        ("a_(3..1)", ["a_3", "a_2", "a_1"]),
        ("plain (1).tar", ["plain (1).tar"]),
    ],
)
def test_braces(text, expected):
    assert expand_braces(text) == expected
    with pytest.raises(ValueError, match="neither"):
        expand_braces("a_{x}")


def test_numbers_of_shards():
    names = ("audio_12.tar", "x/7/manifest_3_clean.jsonl.gz", "audio.tar", "audio_0004.tar")
    assert [shard_number(name) for name in names] == [12, 3, None, 4]


@pytest.fixture
def sets(tmp_path):
    """Two shards of four clips, and a long recording with three segments in the first."""
    clips, lines = {}, []
    for shard in range(2):
        members = {}
        for i in range(4):
            name = f"clip{shard}{i}.wav"
            members[name if i else f"./{name}"], clips[name] = wav(0.3 + 0.1 * i, 10 * shard + i)
            entry = {"audio_filepath": name, "duration": 0.3 + 0.1 * i, "text": f"t{shard}{i}"}
            lines.append(entry | {"shard_id": shard})
        if not shard:
            members["talk.flac.wav"], clips["talk.flac.wav"] = wav(3.0, 99)
        write_tar(tmp_path / f"audio_{shard}.tar", members)
    for i, offset in enumerate((0.0, 1.0, 2.5)):
        name = f"talk.flac-sub{i}.wav" if i else "talk.flac.wav"
        entry = {"audio_filepath": name, "duration": 0.5, "offset": offset, "text": f"s{i}"}
        lines.append(entry | {"shard_id": 0})
    return tmp_path, lines, clips


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def check(found, clips):
    assert len(found) == 11
    store = AudioStore(found, RATE, cache_gb=0.0)
    for index, utterance in enumerate(found):
        samples = store.samples(index)
        if utterance.offset_s is None:
            assert np.array_equal(samples, clips[utterance.tar_member])
        else:
            start = round(utterance.offset_s * RATE)
            assert np.array_equal(samples, clips["talk.flac.wav"][start : start + RATE // 2])
    assert store.n_unusable == 0


def test_one_manifest_with_shard_ids(sets):
    folder, lines, clips = sets
    manifest = write(folder / "tarred_audio_manifest.json", lines)
    source = SourceRecipe(manifest, tarred_audio_filepaths=f"{folder}/audio__OP_0..1_CL_.tar")
    found, bad = read_source(source, DataRecipe())
    assert not bad
    check(found, clips)
    assert not list(folder.glob("*.wav"))  # nothing is extracted


def test_a_manifest_for_each_shard(sets):
    folder, lines, clips = sets
    for shard in range(2):
        some = [
            {k: v for k, v in e.items() if k != "shard_id"} for e in lines if e["shard_id"] == shard
        ]
        write(folder / f"manifest_{shard}.json", some)
    source = SourceRecipe(
        f"{folder}/manifest_{{0..1}}.json", tarred_audio_filepaths=f"{folder}/audio_{{0..1}}.tar"
    )
    found, bad = read_source(source, DataRecipe())
    assert not bad
    check(found, clips)


def test_a_segment_that_was_cut_when_it_was_tarred_is_taken_whole(sets):
    folder, _, clips = sets
    line = {"audio_filepath": "clip03.wav", "duration": 0.6, "offset": 12.0, "text": "x"}
    manifest = write(folder / "manifest_0.json", [line])
    found, _ = read_utterances(manifest, tars={0: str(folder / "audio_0.tar")})
    samples = AudioStore(found, RATE, cache_gb=0.0).samples(0)
    assert np.array_equal(samples, clips["clip03.wav"])


def test_what_is_missing_or_broken_is_named(sets):
    folder, lines, _ = sets
    with pytest.raises(FileNotFoundError, match=r"audio_2\.tar is not a file and 1 more"):
        tar_shards(f"{folder}/audio_{{0..3}}.tar")
    extra = [lines[0] | {"shard_id": 7}, lines[0] | {"_skipme": True}]
    extra += [lines[0] | {"audio_filepath": "gone.wav"}]
    manifest = write(folder / "all.json", lines + extra)
    tars = tar_shards(f"{folder}/audio_{{0..1}}.tar")
    found, bad = read_utterances(manifest, tars=tars)
    assert [(d.line, d.reason) for d in bad] == [(12, "missing_audio"), (13, "skipme")]
    content = (folder / "audio_1.tar").read_bytes()
    (folder / "audio_1.tar").write_bytes(content[: len(content) // 2])  # a copy that broke off
    dropped = []
    store = AudioStore(found, RATE, cache_gb=0.0, on_dropped=dropped.append)
    usable = [found[i].text for i in range(len(found)) if store.samples(i) is not None]
    assert usable[:6] == ["t00", "t01", "t02", "t03", "t10", "t11"] and "t13" not in usable
    reasons = " ".join(d.detail for d in dropped)
    assert "audio_0.tar holds no gone.wav" in reasons and "audio_1.tar" in reasons
    (folder / "audio_0.tar").write_bytes(b"\x1f\x8b not a tar")
    dropped.clear()
    assert AudioStore(found, RATE, 0.0, on_dropped=dropped.append).batch([0, 1]) is None
    assert "is not an uncompressed tar file" in dropped[0].detail
