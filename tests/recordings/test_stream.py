"""Streams of causal models: NeMo's steps and caches, and at the end the offline text."""

import copy
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden, load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer import ModelConfig, load_model
from fastconformer.audio import load_audio
from fastconformer.networks.state import encode_chunk, first_state
from fastconformer.surgery.look_ahead import with_look_ahead
from fastconformer.text.metrics import char_errors

CASES = ("stream_ctc", "stream_hybrid_multi")


@pytest.fixture(scope="module", params=CASES)
def case(request):
    found = load_case(request.param)
    return found, load_model(found.folder / "model.nemo")


def clips(case) -> list[np.ndarray]:
    lengths = case.tensors["audio_len"].tolist()
    return [a[:n].numpy() for a, n in zip(case.tensors["audio"], lengths, strict=True)]


def contexts(case) -> list[tuple[str, int, dict]]:
    return [
        (n, block["att_context_size"][1], block) for n, block in case.expected["contexts"].items()
    ]


def test_steps_and_caches_are_nemos(case):
    case, model = case
    tensors, limit = case.tensors, case.expected["suggested_tolerance"]["encoded"]
    seen = 0
    for name, right, _ in contexts(case):
        if right == 0:
            continue  # NeMo's first step is not its offline run there
        chosen = with_look_ahead(model, right)
        encoder = chosen.encoder
        features = tensors["stream_features"]
        lengths = torch.full((len(features),), features.shape[2])
        with torch.no_grad():
            x, _ = encoder.pre_encode(features, lengths)
        state = first_state(encoder, len(x))
        steps = [k for k in tensors if k.startswith(f"{name}/step") and k.endswith("/encoded")]
        for number in range(len(steps)):
            step, start = f"{name}/step{number}", number * (right + 1)
            # a clip's last chunk is another in NeMo: see the golden data's page
            going_on = tensors[f"{name}/stream_encoded_len"] > start + right + 1
            if not going_on.any():
                break
            encoded, state = encode_chunk(encoder, x[:, start : start + right + 1], state)
            difference = (encoded - tensors[f"{step}/encoded"]).abs()
            assert difference[going_on].max() < limit, step
            if f"{step}/cache_last_channel" in tensors:
                for cache, own in (
                    ("cache_last_channel", state.channel),
                    ("cache_last_time", state.time),
                ):
                    assert (own - tensors[f"{step}/{cache}"]).abs().max() < limit, (step, cache)
            seen += 1
    assert seen > 3


@pytest.mark.parametrize("size", [1, 400, 7777, None])
def test_the_end_is_the_offline_text(case, size):
    case, model = case
    for _, right, block in contexts(case):
        for head in model.heads:
            expected = block["offline"].get(head)
            for i, clip in enumerate(clips(case)):
                if size == 1 and i:
                    continue
                stream = model.stream(head=head, look_ahead=right)
                for start in range(0, len(clip), size or len(clip)):
                    if size == 1 and start > 1500:
                        break
                    stream.feed(clip[start : start + (size or len(clip))])
                if size == 1:
                    stream.feed(clip[start:])
                found = stream.finish()
                assert found.tokens == expected[i]["ids"], (right, head, i)
                assert found.token_frames == expected[i]["timestamp"]


def test_look_aheads_offline_too(case):
    case, model = case
    tensors = case.tensors
    for name, right, block in contexts(case):
        chosen = with_look_ahead(model, right)
        with torch.no_grad():
            encoded, lengths = chosen.encode(tensors["features"], tensors["features_len"])
        wanted = tensors[f"{name}/offline_encoded"]
        for row, n in enumerate(lengths.tolist()):
            assert (encoded[row, :n] - wanted[row, :n]).abs().max() < 1e-4
        for head in model.heads:
            found = chosen.decode_greedy(encoded, lengths, head)
            assert [h.tokens for h in found] == [e["ids"] for e in block["offline"][head]]
    for transcribe in (
        model.stream,
        lambda look_ahead: model.transcribe([], look_ahead=look_ahead),
    ):
        with pytest.raises(ValueError, match="was trained with"):
            transcribe(look_ahead=99)


@pytest.mark.parametrize("kind", ["chunks", "windows"])
def test_what_is_fed_is_read_as_recordings_are(kind):
    model = load_model(golden("stream_ctc") / "model.nemo" if kind == "chunks" else BASE)
    clip = load_audio(JFK, 16000)[:24000]
    stream = model.stream()
    stream.feed(clip)
    text = stream.finish().text
    for samples in (torch.from_numpy(clip).requires_grad_(), clip.astype(">f8"), list(clip)):
        stream = model.stream()
        for nothing in ([], torch.zeros(0), np.zeros(0, np.int16)):
            assert stream.feed(nothing).tokens == []
        for wrong, why in (
            ((clip, 8000), "no pair"),
            (clip[None], "shape"),
            (clip * np.nan, "NaN"),
        ):
            with pytest.raises(ValueError, match=why):
                stream.feed(wrong)
        stream.feed(samples)
        assert stream.finish().text == text
    stream = model.stream()
    stream.feed(torch.from_numpy(clip).bfloat16())
    assert stream.finish().duration == 1.5


@pytest.mark.parametrize(("before", "after"), [(9000, 0), (0, 20000), (16000, 16000)])
def test_digital_silence_around_speech_is_heard_as_offline(case, before, after):
    case, model = case
    clip = np.pad(clips(case)[0], (before, after))
    for head in model.heads:
        stream = model.stream(head)
        for start in range(0, len(clip), 5000):
            stream.feed(clip[start : start + 5000])
        [wanted] = model.transcribe([clip], head, retry=False)
        assert (stream.finish().tokens, wanted.text != "") == (wanted.tokens, True)


@pytest.mark.parametrize("name", [*CASES, "birwkv7_encoder"])
def test_of_digital_silence_nothing_is_told(name):
    model = load_model(golden(name) / "model.nemo")
    stream, silence = model.stream(), np.zeros(40000, np.int16)
    partials = [stream.feed(part) for part in np.array_split(silence, 4)]
    [wanted] = model.transcribe([silence], retry=False)
    assert stream.finish().text == wanted.text == ""
    assert [p.text for p in partials] == [""] * 4 and partials[-1].duration == 2.5


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_depends_on_the_pieces(seed):
    model = load_model(golden("stream_ctc") / "model.nemo")
    clip = clips(load_case("stream_ctc"))[0]
    rng = np.random.default_rng(seed)
    whole = model.stream()
    whole.feed(clip)
    stream, start, texts = model.stream(), 0, []
    while start < len(clip):
        n = int(rng.choice([0, 1, 17, 400, 3000, 20000]))
        partial = stream.feed(clip[start : start + n])
        assert partial.stable == len(partial.tokens)
        texts.append(partial.tokens)
        start += n
    for before, after in itertools.pairwise(texts):
        assert after[: len(before)] == before  # nothing is taken back
    assert stream.finish() == whole.finish()


def test_streams_in_a_batch_are_the_streams_alone(case):
    case, model = case
    alone = []
    for clip in clips(case):
        stream = model.stream()
        stream.feed(clip)
        alone.append(stream.finish().tokens)
    streams, pieces = [model.stream() for _ in alone], clips(case)
    for start in range(0, max(map(len, pieces)), 5000):
        for stream, clip in zip(streams, pieces, strict=True):
            stream.take(clip[start : start + 5000])
        streams[0].together(streams)
    assert [stream.finish().tokens for stream in streams] == alone


def test_a_state_can_be_copied_and_saved():
    model = load_model(golden("stream_ctc") / "model.nemo")
    clip = clips(load_case("stream_ctc"))[0]
    stream = model.stream()
    stream.feed(clip[:20001])
    saved = pickle.dumps(stream.state)
    stream.feed(clip[20001:])
    again = model.stream(state=pickle.loads(saved))
    again.feed(clip[20001:])
    assert again.finish() == stream.finish()


def test_words_have_times_while_it_runs():
    model = load_model(golden("stream_hybrid_multi") / "model.nemo")
    clip = clips(load_case("stream_hybrid_multi"))[1]
    stream = model.stream(look_ahead=5)
    partial = stream.feed(clip[:32000])
    assert partial.words and partial.text
    assert all(0 <= word.start <= word.end <= 2.0 for word in partial.words)
    assert partial.text.startswith(partial.words[0].text)


def test_short_clips_are_padded_as_offline():
    model = load_model(golden("stream_ctc") / "model.nemo")
    clip = clips(load_case("stream_ctc"))[0]
    for n in (0, 1, 300, 4000, 15999, 16000):
        stream = model.stream()
        stream.feed(clip[:n])
        found = stream.finish()
        if n:
            (offline,) = model.transcribe([clip[:n]], timestamps=True)
            assert (found.tokens, found.words) == (offline.tokens, offline.words), n
        else:
            assert (found.text, found.duration) == ("", 0.0)
    with pytest.raises(ValueError, match="finished"):
        stream.feed(clip)


BASE = Path(__file__).parents[2] / "models" / "base_tiny.nemo"
JFK = Path(__file__).parents[2] / "samples" / "jfk.flac"


@pytest.mark.parametrize("head", ["tdt", "ctc"])
def test_windows_stream_a_model_that_was_not_made_for_it(head):
    """Nothing that was called stable is taken back, however the samples come, and the text is near
    what one pass gives."""
    model, clip = load_model(BASE), load_audio(JFK, 16000)
    ends = []
    for size in (1601, len(clip)):
        stream, stable = model.stream(head=head), []
        for start in range(0, len(clip), size):
            partial = stream.feed(clip[start : start + size])
            assert partial.tokens[: len(stable)] == stable
            stable = partial.tokens[: partial.stable]
        found = stream.finish()
        assert found.tokens[: len(stable)] == stable
        ends.append(found)
    assert all(end == ends[0] for end in ends)
    (offline,) = model.transcribe([clip], head=head)
    assert char_errors([offline.text], [ends[0].text]).rate < 0.5
    assert ends[0].duration == pytest.approx(11.0)


def test_windows_that_hold_all_are_one_pass():
    model, clip = load_model(BASE), load_audio(JFK, 16000)
    stream = model.stream(part_s=12.0)
    assert stream.feed(clip).tokens == []
    found = stream.finish()
    (offline,) = model.transcribe([clip], retry=False)
    assert found.text == offline.text


def test_the_look_ahead_is_told_early():
    model, clip = load_model(BASE), load_audio(JFK, 16000)
    partial = model.stream(look_ahead=40).feed(clip)
    assert partial.stable < len(partial.tokens)


def test_a_window_stream_goes_on_from_its_state():
    model, clip = load_model(BASE), load_audio(JFK, 16000)
    stream = model.stream()
    stream.feed(clip[:50001])
    again = model.stream(state=pickle.loads(pickle.dumps(stream.state)))
    for one in (stream, again):
        one.feed(clip[50001:])
    assert again.finish() == stream.finish()


def test_a_head_that_reads_a_clip_as_a_whole_says_so():
    model = load_model(golden("canary_flash_agg") / "model.nemo")
    with pytest.raises(ValueError, match="as a whole"):
        model.stream()


@torch.no_grad()
def test_birwkv7_carries_its_past_from_window_to_window():
    """Only the part and its look-ahead go through the layers, and what they give is near to what
    the chunks of one pass over the whole clip give; without the carried states it is not."""
    model = load_model(golden("birwkv7_encoder") / "model.nemo")
    nemo = copy.deepcopy(model.config.nemo)
    nemo["preprocessor"]["normalize"] = "NA"  # else each window is normalised by itself
    model, clip = model.changed(ModelConfig.from_nemo(nemo)), load_audio(JFK, 16000)[:80000]
    part, ahead = 10, 8

    def frames(back_s: float, forgets: bool = False) -> torch.Tensor:
        stream = model.stream(look_ahead=ahead, part_s=0.8, back_s=back_s)
        assert stream.part_frames == part
        encode, decode, found = model.encoder.carried, stream._decode, []

        def carried(x, pad_mask, carries, n_kept):
            assert x.shape[1] <= part + ahead + 1
            return encode(
                x, pad_mask, model.encoder.first_carries() if forgets else carries, n_kept
            )

        stream._decode = lambda x, count: found.append(x[:, :count]) or decode(x, count)
        model.encoder.carried = carried
        try:
            for start in range(0, len(clip), 7000):
                stream.feed(clip[start : start + 7000])
            stream.finish()
        finally:
            del model.encoder.carried
        return torch.cat(found, 1)

    features, lengths = model.featurize(torch.from_numpy(clip)[None], torch.tensor([len(clip)]))
    wanted = torch.cat(list(model.encoder.chunks(features, lengths, part, ahead)), 1)
    found = frames(2.0)
    assert found.shape == wanted.shape

    def error(other):
        return float((other - wanted).norm() / wanted.norm())

    assert error(found) < 0.02 and error(frames(0.5)) < 0.02
    assert error(frames(2.0, forgets=True)) > 5 * error(found)


def test_birwkv7_streams_go_on_from_their_state():
    model, clip = load_model(golden("birwkv7_encoder") / "model.nemo"), load_audio(JFK, 16000)
    stream = model.stream()
    stream.feed(clip[:50001])
    again = model.stream(state=pickle.loads(pickle.dumps(stream.state)))
    for one in (stream, again):
        one.feed(clip[50001:])
    assert again.finish() == stream.finish()
