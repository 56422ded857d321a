"""From a recipe's data section to batches: filters, caps, workers, processes, resuming."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from conftest import golden

from fastconformer import load_model
from training.data.sources import load_data
from training.data.stream import batch_order, batch_rules, training_batches
from training.recipe.recipe import recipe_from_dict

RATE = 16000
AUGMENT = {
    "speeds": [0.9, 1.0, 1.1],
    "gain_db": [-6, 6],
    "shift_s": 0.1,
    "white_noise": {"probability": 0.5, "level_db": [-60, -40]},
    "babble": {"probability": 0.5, "voices": [1, 2]},
    "hum": {"probability": 0.5},
    "telephone": {"probability": 0.5, "packet_loss": 0.3},
}


@pytest.fixture(scope="module")
def model():
    return load_model(golden("train_parity") / "model.nemo")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Manifests long.jsonl (24 clips of 2 to 4 s) and short.jsonl (16 of 0.5 to 1 s)."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, count, low, high in (("long", 24, 2.0, 4.0), ("short", 16, 0.5, 1.0)):
        lines = []
        for i in range(count):
            seconds = round(rng.uniform(low, high), 2)
            samples = rng.integers(-3000, 3000, int(RATE * seconds)).astype(np.int16)
            soundfile.write(folder / f"{name}{i}.wav", samples, RATE)
            entry = {"audio_filepath": f"{name}{i}.wav", "duration": seconds, "text": "good"}
            lines.append(entry | {"lang": "en" if i % 2 else "hi"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    return folder


def recipe_of(corpus, data=None, augment=None, **trainer):
    tree = {
        "output": "unused",
        "model": {"init_from": "unused"},
        "data": {
            "train": [str(corpus / "long.jsonl"), str(corpus / "short.jsonl")],
            "batch_size": None,
            "batch_duration_s": 12.0,
            "quadratic_duration_s": 20.0,
        }
        | (data or {}),
        "augment": augment or {},
        "trainer": {"max_steps": 1, "seed": 3} | trainer,
    }
    return recipe_from_dict(tree)


def load(recipe, model, tmp_path, heads=("ctc",)):
    dropped, seed = tmp_path / "dropped.jsonl", recipe.trainer.seed
    return load_data(recipe.data, recipe.augment, seed, model, heads, dropped)[0]


def rules_of(recipe):
    return batch_rules(recipe.data, recipe.augment.speeds, recipe.trainer.seed)


def take(train, recipe, count, epoch=0, batch=0, **process):
    workers = recipe.data.num_workers
    stream = training_batches(train, rules_of(recipe), epoch, batch, num_workers=workers, **process)
    found = [next(stream) for _ in range(count)]
    stream.close()
    return found


def same(one, other):
    return one.utterances == other.utterances and torch.equal(one.audio, other.audio)


def test_any_number_of_workers_gives_the_same_batches(corpus, model, tmp_path):
    """With everything random on, across the end of an epoch, with and without the cache."""
    runs = []
    for workers, cache_gb in ((0, 1.0), (1, 0.0), (4, 1.0), (3, 0.0)):
        recipe = recipe_of(corpus, {"num_workers": workers, "cache_gb": cache_gb}, AUGMENT)
        runs.append(take(load(recipe, model, tmp_path), recipe, 30))
    epochs = [epoch for epoch, _, _ in runs[0]]
    assert epochs[0] == 0 and epochs[-1] >= 1
    for run in runs[1:]:
        assert [place[:2] for place in run] == [place[:2] for place in runs[0]]
        assert all(same(a[2], b[2]) for a, b in zip(run, runs[0]))


def test_a_run_resumes_in_the_middle_of_an_epoch(corpus, model, tmp_path):
    recipe = recipe_of(corpus, augment=AUGMENT)
    whole = take(load(recipe, model, tmp_path), recipe, 24)
    for at in (1, 7, 20):
        epoch, done, _ = whole[at - 1]
        rest = take(load(recipe, model, tmp_path), recipe, 24 - at, epoch, done)
        assert [place[:2] for place in rest] == [place[:2] for place in whole[at:]]
        assert all(same(a[2], b[2]) for a, b in zip(rest, whole[at:]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(corpus, model, tmp_path, world_size):
    recipe = recipe_of(corpus, augment=AUGMENT)
    train = load(recipe, model, tmp_path)
    turns = 5
    one = take(train, recipe, turns * world_size)
    shares = [
        take(train, recipe, turns, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for turn in range(turns):
        places = {share[turn][:2] for share in shares}
        assert places == {one[(turn + 1) * world_size - 1][:2]}  # the same for all
        for rank, share in enumerate(shares):
            assert same(share[turn][2], one[turn * world_size + rank][2])
    # two processes go on where three stopped
    epoch, done, _ = shares[0][-1]
    after = take(train, recipe, 1, epoch, done, rank=1, world_size=2)[0][2]
    assert same(after, take(train, recipe, turns * world_size + 2)[-1][2])
    # and in an epoch, together, every clip once
    clips = Counter(clip for batch in batch_order(train, rules_of(recipe), 0) for clip in batch)
    assert set(clips.values()) == {1} and len(clips) == 40


def test_a_batch_that_cannot_be_read_keeps_its_place(corpus, model, tmp_path):
    for name in ("long", "short"):
        for path in corpus.glob(f"{name}*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    recipe = recipe_of(
        tmp_path, {"batch_size": 1, "batch_duration_s": None, "quadratic_duration_s": None}
    )
    train = load(recipe, model, tmp_path)
    order = [batch[0] for batch in batch_order(train, rules_of(recipe), 0)]
    for clip in (order[3], order[4]):
        (tmp_path / train.utterances[clip].audio_path).write_bytes(b"")
    expected = [order[i] for i in (0, 1, 2, 5, 5, 5, 6, 7)]
    clips = {utterance.name: i for i, utterance in enumerate(train.utterances)}
    for world_size in (1, 2):
        shares = [
            take(train, recipe, 8 // world_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        found = [
            clips[s[turn][2].utterances[0].name] for turn in range(8 // world_size) for s in shares
        ]
        assert found == expected
    for utterance in train.utterances:
        (tmp_path / utterance.audio_path).write_bytes(b"")
    with pytest.raises(ValueError, match="no training clip can be read"):
        take(load(recipe, model, tmp_path), recipe, 1)


def test_weights_caps_and_languages(corpus, model, tmp_path, caplog):
    caplog.set_level("INFO")
    train = [
        {"manifest": str(corpus / "long.jsonl"), "weight": 1, "max_clips": 5, "name": "lectures"},
        {"manifest": str(corpus / "short.jsonl"), "weight": 3, "lang": "hi"},
    ]
    recipe = recipe_of(corpus, {"train": train})
    loaded = load(recipe, model, tmp_path)
    assert [len(source.clips) for source in loaded.sources] == [5, 8]
    drawn = Counter(
        clip < 5
        for e in range(40)
        for batch in batch_order(loaded, rules_of(recipe), e)
        for clip in batch
    )
    assert drawn[False] / drawn.total() == pytest.approx(0.75, abs=0.005)
    assert "25.0%" in caplog.text and "lectures" in caplog.text
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").open()]
    assert Counter(d["reason"] for d in dropped) == {"over_cap": 19, "other_language": 8}
    # equal shares, and a cap in hours
    train[0] |= {"max_clips": None, "max_hours": 20 / 3600, "weight": 9}
    recipe = recipe_of(corpus, {"train": train, "temperature": 0})
    loaded = load(recipe, model, tmp_path)
    hours = loaded.durations_s[loaded.sources[0].clips].sum()
    assert 16 < hours <= 20
    first = len(loaded.sources[0].clips)
    drawn = Counter(
        clip < first
        for e in range(40)
        for batch in batch_order(loaded, rules_of(recipe), e)
        for clip in batch
    )
    assert drawn[True] / drawn.total() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("limits", "heads", "expected"),
    [
        ({"max_chars_per_s": 3.0}, ("ctc",), {"too_many_chars_per_s": 16}),
        ({"min_chars_per_s": 3.0}, ("ctc",), {"too_few_chars_per_s": 24}),
        ({"max_tokens_per_s": 3.0}, ("ctc",), {"too_many_tokens_per_s"}),
        ({"min_tokens_per_s": 3.0}, ("ctc",), {"too_few_tokens_per_s"}),
        ({"max_tokens_per_frame": 0.1}, ("ctc",), {}),
        ({"max_tokens_per_frame": 0.1}, ("tdt", "ctc"), {"too_many_tokens"}),
        ({"min_duration_s": 1.5}, ("ctc",), {"too_short": 16}),
        ({"max_duration_s": 1.5}, ("ctc",), {"too_long": 24}),
    ],
)
def test_what_each_filter_drops_is_counted_and_listed(
    corpus, model, tmp_path, caplog, limits, heads, expected
):
    train = load(recipe_of(corpus, limits), model, tmp_path, heads)
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").open()]
    counts = Counter(d["reason"] for d in dropped)
    assert counts.keys() == (expected.keys() if isinstance(expected, dict) else expected)
    if isinstance(expected, dict):
        assert counts == expected
    for reason, count in counts.items():
        assert f"{count} {reason}" in caplog.text
    assert len(train.utterances) + len(dropped) == 40
    assert all(d["manifest"] and d["line"] and d["detail"] for d in dropped)


def test_auto_is_a_number_before_batches_are_made(corpus, model, tmp_path):
    recipe = recipe_of(corpus, {"batch_duration_s": "auto"})
    with pytest.raises(ValueError, match="find_batch RECIPE --write"):
        batch_order(load(recipe, model, tmp_path), rules_of(recipe), 0)


def test_speed_makes_clips_shorter_and_leaves_ctc_its_frames(corpus, model, tmp_path):
    slow, fast = (recipe_of(corpus, augment={"speeds": [s]}) for s in (0.5, 2.0))
    plain = recipe_of(corpus)
    lengths = []
    for recipe in (slow, plain, fast):
        train = load(recipe, model, tmp_path)
        found = take(train, recipe, 8)
        for _, _, batch in found:
            seconds = batch.audio.shape[1] / RATE
            cost = seconds + seconds**2 / 20
            assert len(batch.utterances) == 1 or len(batch.utterances) * cost <= 12.0 * 1.01
        lengths.append(
            {u.name: int(n) for _, _, b in found for u, n in zip(b.utterances, b.audio_lengths)}
        )
    for name in lengths[0].keys() & lengths[1].keys():
        assert lengths[0][name] == pytest.approx(2 * lengths[1][name], rel=0.01) or (
            lengths[1][name] == RATE
        )
    line = {"audio_filepath": str(corpus / "short0.wav"), "duration": 1.3, "text": "good day sir"}
    (tmp_path / "one.jsonl").write_text(json.dumps(line) + "\n")
    tokens = len(model.tokenizer.encode(line["text"]))
    data = {"train": [str(tmp_path / "one.jsonl"), str(corpus / "long.jsonl")]}
    speed = 1.3 / (0.08 * tokens) * 1.3  # so fast that the frames are fewer than the tokens
    for speeds, count in (([1.0], 25), ([1.0, speed], 24)):
        train = load(recipe_of(corpus, data | {"pad_to_s": 0}, {"speeds": speeds}), model, tmp_path)
        assert len(train.utterances) == count
