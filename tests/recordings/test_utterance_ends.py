"""Tokens that end an utterance: NeMo's texts without them, streams and a server that heed them."""

import asyncio
import base64
import dataclasses
import json

import numpy as np
import pytest
from conftest import golden, load_case

from fastconformer import listen, load_model
from fastconformer.checkpoint.nemo_archive import read_nemo, write_nemo
from fastconformer.decoding import Hypothesis
from fastconformer.recordings.partial import RunningText
from fastconformer.recordings.timestamps import Span
from fastconformer.serving.batcher import Batcher
from fastconformer.serving.live import ITEM, Refused, Session
from fastconformer.text.sentencepiece_model import CONTROL, USER_DEFINED, SentencePieceModel

FOLDER = golden("stream_chunked_hybrid_rnnt")
EXPECTED = json.loads((FOLDER / "eou.json").read_text())
KINDS = {"control": CONTROL, "user_defined": USER_DEFINED}
CASE = load_case(FOLDER)
CLIP = CASE.tensors["audio"][1, : int(CASE.tensors["audio_len"][1])].numpy()
EOU_FRAME, EOB_FRAME = 2, 8  # "yes<EOU> of course<EOB> it is raining"


def model_with(kind: str, path):
    """The golden case with its comma named <EOU> and its exclamation mark <EOB>, as recorded."""
    checkpoint = read_nemo(FOLDER / "model.nemo")
    name = next(n for n in checkpoint.tokenizer_files if n.endswith("tokenizer.model"))
    model = SentencePieceModel.from_bytes(checkpoint.tokenizer_files[name])
    marks = EXPECTED["marks"]
    pieces = (
        dataclasses.replace(p, text=marks[p.text], type=KINDS[kind]) if p.text in marks else p
        for p in model.pieces
    )
    checkpoint.tokenizer_files[name] = model.with_pieces(pieces).to_bytes()
    write_nemo(path, checkpoint)
    return load_model(path)


@pytest.fixture(scope="module", params=KINDS)
def kind_and_model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("eou") / "model.nemo"
    return request.param, model_with(request.param, path)


def test_texts_are_nemos_without_the_names(kind_and_model):
    kind, model = kind_and_model
    tensors = CASE.tensors
    encoded, lengths = model.encode(*model.featurize(tensors["audio"], tensors["audio_len"]))
    for head in model.heads:
        wanted = EXPECTED["texts"][kind][head]
        found = model.decode_greedy(encoded, lengths, head)
        for hypothesis, expected in zip(found, wanted, strict=True):
            text = expected["text"].replace("<EOU>", "").replace("<EOB>", "")
            assert model.head(head).text(hypothesis) == text
            if "ids" in expected:
                assert hypothesis.tokens == expected["ids"]
    assert ("<EOU>" in EXPECTED["texts"][kind]["rnnt"][1]["text"]) == (kind == "user_defined")


def test_a_stream_tells_that_an_utterance_ended(kind_and_model):
    model = kind_and_model[1]
    stream, partials = model.stream(), []
    for part in np.array_split(CLIP, 20):
        partials.append(stream.feed(part))
    found = stream.finish()
    assert found.text == "yes of course it is raining"
    assert [word.text for word in found.words] == found.text.split()
    frame_s = model.config.frame_seconds
    ended = [p.ended_s for p in partials]
    assert ended[0] is None and ended == sorted(ended, key=lambda s: s or 0)
    assert ended[-1] == pytest.approx(EOB_FRAME * frame_s)
    assert model.stream().partial().ended_s is None
    # a state that goes on knows of the end before it; the words before it are told at once
    short = model.stream()
    first = short.feed(CLIP[: int(0.64 * 16000)])
    assert first.ended_s == pytest.approx(EOU_FRAME * frame_s)
    again = model.stream(state=short.state.copy())
    assert again.partial().ended_s == first.ended_s


def test_the_last_word_stays_where_an_utterance_ended(kind_and_model):
    model = kind_and_model[1]
    ids = EXPECTED["texts"]["control"]["rnnt"][1]["ids"][:3]  # "yes<EOU>"
    running = RunningText(model.head("rnnt"))
    before = running.partial(Hypothesis(ids[:2], [0, 0], None, 0.0), None, 1.0)
    assert (before.stable_text, before.ended_s) == ("", None)
    after = running.partial(Hypothesis(ids, [0, 0, EOU_FRAME], None, 0.0), None, 1.0)
    assert after.stable_text == after.text == "yes"
    assert after.words == [Span("yes", 0.0, 1 * model.config.frame_seconds)]


def test_listen_ends_the_line(kind_and_model, capsys):
    model = kind_and_model[1]
    blocks = iter(np.array_split(np.concatenate((CLIP, CLIP)), 40))
    listen.write_lines(blocks, model.stream, 60.0, 16000)
    assert len(capsys.readouterr().out.splitlines()) > 1


class Socket:
    def __init__(self):
        self.events = []

    async def send_text(self, text):
        self.events.append(json.loads(text))


def test_the_server_commits_where_it_was_asked_to(kind_and_model):
    model = kind_and_model[1]
    batcher = Batcher(model)
    turns = {"turn_detection": {"type": "semantic_vad"}, "format": {"rate": 16000}}

    def told(audio: dict) -> list[dict]:
        async def talk():
            session = Session(Socket(), batcher, None, 60.0)
            session.update({"audio": {"input": audio}})
            for part in np.array_split(CLIP, 10):
                pcm = (part * 32767).astype("<i2").tobytes()
                await session.append(base64.b64encode(pcm).decode())
            return session.socket.events

        return [e for e in asyncio.run(talk()) if e["type"] == f"{ITEM}.completed"]

    try:
        assert len(told(turns)) > 0
        assert not told({"format": {"rate": 16000}})
        with pytest.raises(Refused, match="or its type to semantic_vad"):
            told({"turn_detection": {"type": "server_vad"}})
    finally:
        batcher.close()
