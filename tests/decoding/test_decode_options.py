"""Decoding through the model: batches, beams, locks, boosts, second tries and alignment."""

import json

import numpy as np
import pytest
import torch
from conftest import SAMPLES, golden, load_case

import fastconformer
from fastconformer.audio.files import load_audio
from fastconformer.decoding import DecodingOptions, Hypothesis, read_phrases, token_bias
from fastconformer.recordings.retry import loudness, silent_stretches, speaks
from fastconformer.text.tokenizer import CharTokenizer
from fastconformer.transcribe import main

CASES = ["ctc_bpe", "rnnt_bpe", "tdt_bpe", "hybrid_tdt_ctc_bpe", "hybrid_rnnt_ctc_bpe"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    case = load_case(golden(request.param))
    case.model = fastconformer.load_model(case.folder / "model.nemo")
    return case


def fields(hypothesis):
    return hypothesis.tokens, hypothesis.frames, hypothesis.durations


@pytest.mark.parametrize("beam", [1, 4])
def test_alone_in_a_batch_and_with_padding_are_one(case, beam):
    t, model, options = case.tensors, case.model, DecodingOptions(beam=beam)
    encoded, lengths = t["encoded"], t["encoded_len"]
    padded = torch.cat((encoded, torch.full_like(encoded, 9.0)), 1)
    many = torch.cat((padded, padded, padded))
    for head in model.heads:
        together = model.decode(encoded, lengths, head, options)
        with_padding = model.decode(many, lengths.repeat(3), head, options)
        for b, hypothesis in enumerate(together):
            n = lengths[b : b + 1]
            (alone,) = model.decode(encoded[b : b + 1, : int(n)], n, head, options)
            assert fields(alone) == fields(hypothesis)
            for again in with_padding[b :: len(lengths)]:
                assert fields(again) == fields(hypothesis)


def test_transducer_beams_are_nemos(case):
    """NeMo's batched TDT beam gives these texts with these scores. Its RNNT beams differ from one
    another, and lose on CPU what its greedy finds."""
    entry = case.expected.get("transducer", {}).get("decoding", {}).get("malsd_batch_3")
    if case.model.heads[0] != "tdt" or entry is None or "hyps" not in entry:
        pytest.skip("no beam of a TDT was recorded")
    t, model = case.tensors, case.model
    found = model.decode(t["encoded"], t["encoded_len"], "tdt", DecodingOptions(beam=3))
    for hypothesis, expected in zip(found, entry["hyps"], strict=True):
        assert model.tokenizer.decode(hypothesis.tokens) == expected["text"]
        # paths to one text are summed where they meet, which is not the same moment everywhere
        assert hypothesis.score == pytest.approx(expected["score"], abs=0.1)


def test_ctc_beams_are_nemos(case):
    entry = case.expected.get("ctc", {}).get("decoding", {}).get("beam_batch")
    if entry is None or "hyps" not in entry:
        pytest.skip("no beam of a CTC head was recorded")
    t, model = case.tensors, case.model
    found = model.decode(t["encoded"], t["encoded_len"], "ctc", DecodingOptions(beam=8))
    for hypothesis, expected in zip(found, entry["hyps"], strict=True):
        expected = expected[0] if isinstance(expected, list) else expected
        assert model.tokenizer.decode(hypothesis.tokens) == expected["text"]


def test_forbidden_tokens_do_not_occur(case):
    """Every greedy and every beam obeys: what was found without the lock is then impossible."""
    t, model = case.tensors, case.model
    for head in model.heads:
        for options in (DecodingOptions(), DecodingOptions(beam=3)):
            free = model.decode(t["encoded"], t["encoded_len"], head, options)
            letters = {i for h in free for i in h.tokens if model.tokenizer.pieces[i].strip("▁")}
            bias = torch.zeros(model.blank_id + 1)
            bias[sorted(letters)] = -torch.inf
            locked = type("Locked", (DecodingOptions,), {"bias": lambda *_, b=bias: b})
            for hypothesis in model.decode(
                t["encoded"], t["encoded_len"], head, locked(beam=options.beam)
            ):
                assert letters.isdisjoint(hypothesis.tokens)


def test_scripts_of_pieces():
    pieces = ["<unk>", " ", "a", "é", "я", "ж", "ع", "7", ",", "日", "<0x41>", "<0xC3>", "か"]
    tokenizer = CharTokenizer(pieces)

    def allowed(*names):
        bias = token_bias(tokenizer, names)
        assert bias[-1] == 0  # blank
        return "".join(p for p, b in zip(pieces, bias) if b == 0 and not p.startswith("<"))

    assert allowed("latin") == allowed("en") == allowed("de", "fr") == " aé7,"
    assert allowed("ru") == " яж7,"
    assert allowed("ru", "Latin") == " aéяж7,"
    assert allowed("latin", "ж") == " aéж7,"
    assert allowed("ar") == " ع7,"
    assert allowed("ja") == " 7,日か"
    bias = token_bias(tokenizer, ["en"])
    assert bias[pieces.index("<0x41>")] == 0
    assert bias[pieces.index("<0xC3>")] == -torch.inf
    with pytest.raises(ValueError, match="allow is 'greek'.*latin"):
        token_bias(tokenizer, ["greek"])


def test_a_phrase_that_greedy_misses_is_brought_back():
    """A word whose tokens the model is made to like less: greedy and beam lose it, the boosted beam
    finds it again, and the beam that expects another word does not."""
    case = load_case(golden("hybrid_tdt_ctc_bpe"))
    model = fastconformer.load_model(case.folder / "model.nemo")
    encoded, lengths = case.tensors["encoded"][:1], case.tensors["encoded_len"][:1]
    for head in ("ctc", "tdt"):
        (good,) = model.decode(encoded, lengths, head, DecodingOptions(beam=4))
        text = model.tokenizer.decode(good.tokens)
        word = "lights"
        assert word in text
        ids = set(model.tokenizer.encode(word))
        output = model.ctc_head.decoder_layers[0] if head == "ctc" else model.joint.joint_net[-1]
        bias = output.bias.data
        before = bias.clone()
        try:
            other = {"zebra": 12.0}
            for drop in (2.0, 4.0, 6.0, 8.0, 10.0, 12.0):
                bias.copy_(before)
                bias[sorted(ids)] -= drop
                (greedy,) = model.decode(encoded, lengths, head)
                wide = DecodingOptions(beam=8, boost=other)
                (lost,) = model.decode(encoded, lengths, head, wide)
                texts = [model.tokenizer.decode(h.tokens) for h in (greedy, lost)]
                if not any(word in text for text in texts):
                    break
            assert not any(word in text for text in texts)
            boosted = DecodingOptions(beam=8, boost=other | {word: drop + 2.0})
            (found,) = model.decode(encoded, lengths, head, boosted)
            assert word in model.tokenizer.decode(found.tokens)
        finally:
            bias.copy_(before)


def test_lists_of_phrases(tmp_path):
    path = tmp_path / "phrases.txt"
    path.write_text("# names\nAnna Karenina\t2.5\n\nkitchen\n")
    assert read_phrases(path, 1.5) == {"Anna Karenina": 2.5, "kitchen": 1.5}
    path.write_text("kitchen\tmuch\n")
    with pytest.raises(ValueError, match="phrases.txt:1: 'much'"):
        read_phrases(path, 1.5)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no phrase"):
        read_phrases(path, 1.5)


def test_options_are_checked(tmp_path):
    for options in ({"beam": 0}, {"beam": 2.0}, {"boost": "word"}, {"boost": [" "]}):
        with pytest.raises(ValueError, match="beam is|boost is|phrase to boost"):
            load_tiny().transcribe(np.zeros(16000, np.float32), **options)
    for options in (
        {"lm_weight": np.nan},
        {"lm_bonus": np.inf},
        {"boost_weight": -np.inf},
        {"boost": {"word": np.nan}},
    ):
        with pytest.raises(ValueError, match="expected a number"):
            DecodingOptions(**options)
    with pytest.raises(FileNotFoundError, match="none.arpa"):
        DecodingOptions(lm=tmp_path / "none.arpa")


def load_tiny():
    return fastconformer.load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")


def test_silence_over_speech_is_told_from_a_pause():
    rate = 16000
    generator = np.random.default_rng(0)
    noise = 0.003 * generator.standard_normal(12 * rate).astype(np.float32)
    talk = noise.copy()  # syllables: loud and soft five times a second
    loud = np.sin(2 * np.pi * 5 * np.arange(12 * rate) / rate) > -0.3
    talk += 0.1 * generator.standard_normal(12 * rate).astype(np.float32) * loud
    paused = talk.copy()
    paused[4 * rate : 10 * rate] = noise[4 * rate : 10 * rate]
    hypothesis = Hypothesis([1, 2], [10, 49], [4, 1])
    stretches = silent_stretches(hypothesis, 150, 0.08)
    assert stretches == [(50, 150)]
    for samples, expected in ((talk, True), (paused, False), (noise, False), (0 * noise, False)):
        for frame in 1280, 1277:  # also where a hop's samples give no equal quarters
            levels = loudness(torch.from_numpy(samples), frame, 150)
            assert levels.shape == (150, 4)
            assert speaks(levels, 50, 125, 0.08) is expected
    assert silent_stretches(Hypothesis([1], [40]), 80, 0.08) == []


def test_a_stuck_transducer_is_tried_again():
    case = load_case(golden("hybrid_tdt_ctc_bpe"))
    model = load_tiny()
    clips = [a[:n].numpy() for a, n in zip(case.tensors["audio"], case.tensors["audio_len"])]
    joined = np.concatenate([*clips, *clips, *clips, *clips])
    features, n = model.featurize(torch.from_numpy(joined)[None], torch.tensor([len(joined)]))
    encoded, n = model.encode(features, n)
    (whole,) = model.decode(encoded, n)
    (heard,) = model.decode(encoded, n, "ctc")
    assert len(joined) > 8 * model.sample_rate and whole.tokens and heard.tokens
    cut = whole.frames[2] + 1
    stuck = Hypothesis(whole.tokens[:3], whole.frames[:3], whole.durations[:3], 0.0)
    retries = model.retry_stuck(stuck, encoded[0], torch.from_numpy(joined), "tdt")
    assert [first for first, _, _ in retries] == [whole.frames[2] + max(1, whole.durations[2])]
    assert retries[0][2] and len(stuck.tokens) > 0.3 * len(whole.tokens)
    assert stuck.frames == sorted(stuck.frames) and len(stuck.durations) == len(stuck.tokens)
    assert stuck.tokens[:3] == whole.tokens[:3] and stuck.frames[3] >= cut
    # a transducer that never speaks again: the CTC head's tokens take its place
    model.joint.joint_net[-1].bias.data[model.blank_id] += 100
    transcripts = model.transcribe([joined], timestamps=True)
    assert transcripts[0].retries and transcripts[0].retries[0].text
    text = model.tokenizer.decode(model.decode(encoded, n, "ctc")[0].tokens)
    assert transcripts[0].text == text
    assert model.transcribe([joined], retry=False)[0].text == ""
    # quiet: nothing to find, and nothing tried
    assert not model.transcribe([np.zeros_like(joined)])[0].retries


def test_alignment_gives_every_word_its_time():
    case = load_case(golden("hybrid_tdt_ctc_bpe"))
    model, compared = load_tiny(), 0
    for b, n in enumerate(case.tensors["audio_len"].tolist()):
        audio = case.tensors["audio"][b, :n].numpy()
        (greedy,) = model.transcribe([audio], head="ctc", timestamps=True)
        if not greedy.text:
            continue
        spans = model.align(audio, greedy.text, confidence=True)
        assert [span.text for span in spans] == greedy.text.split()
        times = [time for span in spans for time in (span.start, span.end)]
        assert times == sorted(times) and times[-1] <= n / 16000 + 0.081
        assert all(0 <= span.confidence <= 1 for span in spans)
        pieces = model.tokenizer.ids_to_pieces(greedy.tokens)
        starts = [f for f, p in zip(greedy.token_frames, pieces) if p.startswith("▁")]
        if n >= 16000 and len(starts) == len(spans):
            found = [span.start for span in spans]
            assert found == pytest.approx([0.08 * f for f in starts], abs=0.17)
            compared += len(starts)
    assert compared > 5
    shifted = np.concatenate([np.zeros(16000, np.float32), audio])
    later = model.align(shifted, greedy.text)
    assert later[-1].end == pytest.approx(spans[-1].end + 1, abs=0.17)
    with pytest.raises(ValueError, match="too many for the"):
        model.align(audio[:4000], "please turn off the lights " * 20)
    with pytest.raises(ValueError, match="empty"):
        model.align(audio, "  ")
    with pytest.raises(ValueError, match="head is 'ctc'"):
        fastconformer.load_model(golden("tdt_bpe") / "model.nemo").align(audio, "text")


def test_alignment_of_characters():
    case = load_case(golden("striding4_ctc_char"))
    model = fastconformer.load_model(case.folder / "model.nemo")
    audio = case.tensors["audio"][0, : case.tensors["audio_len"][0]].numpy()
    (greedy,) = model.transcribe([audio])
    spans = model.align(audio, greedy.text + " §")
    assert [span.text for span in spans] == [*greedy.text.split(), "§"]
    assert spans[-1].start == spans[-1].end == spans[-2].end  # unknown to the tokenizer


def test_command_line(tmp_path, capsys):
    audio = SAMPLES / "digits_8k" / "7_george_0.flac"
    model = str(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    (tmp_path / "boost.txt").write_text("seven\nkitchen\t3\n")
    (tmp_path / "lm.arpa").write_text(
        "\\data\\\nngram 1=3\n\n\\1-grams:\n-1\t<unk>\n-1\t</s>\n-0.5\tseven\n\n\\end\\\n"
    )
    options = ["--beam", "3", "--boost", str(tmp_path / "boost.txt"), "--languages", "en"]
    options += ["--lm", str(tmp_path / "lm.arpa"), "--lm-bonus", "0.5", "--confidence"]
    for head in ("tdt", "ctc"):
        arguments = [str(audio), "--model", model, "--head", head, *options]
        assert main([*arguments, "--format", "json", "--timestamps"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert len(found["confidences"]) == len(found["tokens"])
        assert all("confidence" in word for word in found["words"])
    # what could never be written is told, and the rest of the list counts
    (tmp_path / "mixed.txt").write_text("seven\nдом\n", encoding="utf-8")
    assert main([str(audio), "--model", model, "--boost", str(tmp_path / "mixed.txt")]) == 0
    assert capsys.readouterr().err.strip().endswith("no text of this model can hold 'дом'")
    for wrong, status in (
        (["--beam", "0"], 2),
        (["--max-repeats", "2"], 2),
        (["--length-penalty", "1"], 2),
        (["--look-ahead", "3"], 2),
        (["--memory-gb", "nan"], 2),
        (["--lm-weight", "0.5"], 2),
        (["--boost-weight", "2"], 2),
        (["--boost", str(tmp_path / "boost.txt"), "--boost-weight", "nan"], 2),
        (["--languages", "greek"], 2),
        (["--languages", ","], 2),
        (["--track", "-1"], 2),
        (["--confidence"], 2),
        (["--confidence", "gibbs", "--format", "srt"], 2),
        (["--lm", str(tmp_path / "boost.txt")], 1),
        (["--boost", str(tmp_path / "none.txt")], 1),
    ):
        assert main([str(audio), "--model", model, *wrong]) == status
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert load_audio(audio, 16000).size
