"""NeMo's language prompts behind the encoder, against NeMo (golden/record_prompts.py)."""

import contextlib
import io
import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import golden, load_case
from safetensors.torch import load_file

from converters import nemo2st, st2hf, st2mlx, st2nemo, st2onnx
from fastconformer import ModelConfig, load_model
from fastconformer import transcribe as command
from fastconformer.audio import load_audio
from fastconformer.checkpoint.nemo_archive import read_nemo, write_nemo
from fastconformer.decoding import Confidence, ctc_align
from fastconformer.recordings import longform
from fastconformer.recordings.in_windows import transcribe_in_windows
from fastconformer.recordings.stream import Stream
from fastconformer.surgery.look_ahead import with_look_ahead
from training import segment
from training.data.segments import find_segments

FOLDER = golden("stream_chunked_hybrid_rnnt")
KERNEL = load_file(FOLDER / "prompts.safetensors")
EXPECTED = json.loads((FOLDER / "prompts.json").read_text())
CASE = load_case(FOLDER)
CLIPS = [
    audio[:n].numpy()
    for audio, n in zip(CASE.tensors["audio"], CASE.tensors["audio_len"].tolist(), strict=True)
]
LANGUAGES = ("auto", "en-US", "de-DE")


def write(path, **defaults):
    checkpoint = read_nemo(FOLDER / "model.nemo")
    checkpoint.config |= {"target": EXPECTED["target"], "num_prompts": EXPECTED["num_prompts"]}
    checkpoint.config["model_defaults"] = EXPECTED["model_defaults"] | defaults
    checkpoint.state_dict |= {k: v for k, v in KERNEL.items() if k != "encoded"}
    write_nemo(path, checkpoint)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prompts") / "prompted.nemo")


@pytest.fixture(scope="module")
def model(archive):
    return load_model(archive)


def test_frames_and_losses_are_nemos(model):
    tensors = CASE.tensors
    with torch.no_grad():
        features = model.featurize(tensors["audio"], tensors["audio_len"])
        encoded, lengths = model.encode(*features, prompt_indices=EXPECTED["mixed"])
        losses = model.losses(encoded, lengths, tensors["targets"], tensors["targets_len"])
    n = int(lengths[0])
    assert (encoded[0, :n] - KERNEL["encoded"]).abs().max() < 1e-4
    share = model.config.loss.ctc_weight
    loss = (1 - share) * losses["rnnt"].mean() + share * losses["ctc"].mean()
    assert float(loss) == pytest.approx(EXPECTED["training_step_eval_mode"], rel=1e-4)


@pytest.mark.parametrize("language", LANGUAGES)
def test_offline_and_live_tokens_are_nemos(model, language):
    tensors, index = CASE.tensors, model.config.prompts.names[language]
    seen = 0
    for right, block in EXPECTED["contexts"].items():
        chosen, wanted = with_look_ahead(model, int(right)), block[language]
        with torch.no_grad():
            features = chosen.featurize(tensors["audio"], tensors["audio_len"])
            encoded, lengths = chosen.encode(*features, prompt_indices=index)
        found = chosen.decode_greedy(encoded, lengths, "rnnt")
        assert [h.tokens for h in found] == [w["ids"] for w in wanted["rnnt"]]
        assert [h.frames for h in found] == [w["timestamp"] for w in wanted["rnnt"]]
        found = chosen.decode_greedy(encoded, lengths, "ctc")
        texts = [model.tokenizer.decode(h.tokens) for h in found]
        assert texts == [w["text"] for w in wanted["ctc"]]
        for clip, ids in zip(CLIPS, wanted["rnnt"], strict=True):
            if len(clip) < 16000:
                continue  # told at its end, padded
            stream = model.stream(look_ahead=int(right), target_lang=language)
            tokens = [stream.feed(part).tokens for part in np.array_split(clip, 7)]
            assert all(ids["ids"][: len(t)] == t for t in tokens)
            assert stream.finish().tokens == ids["ids"]
            seen += 1
        for ids in wanted.get("stream", [])[:-1]:  # NeMo's last chunk is another: golden's page
            assert wanted["rnnt"][0]["ids"][: len(ids)] == ids
    assert seen == 6


def test_transcribe_in_one_batch_and_by_clip(model, tmp_path):
    for language in LANGUAGES:
        found = model.transcribe(CLIPS, target_lang=language, retry=False)
        assert [t.text for t in found] == EXPECTED["transcribe"][language]
        windows = model.transcribe(CLIPS[:1], target_lang=language, retry=False, long="chunks")
        assert windows[0].text == EXPECTED["transcribe"][language][0]
    assert [t.text for t in model.transcribe(CLIPS, retry=False)] == EXPECTED["transcribe"]["auto"]
    mixed = [{"target_lang": name} for name in ("de-DE", "auto", "en-US")]
    found = model.transcribe(CLIPS, prompt=mixed, retry=False)
    wanted = [EXPECTED["transcribe"][m["target_lang"]][i] for i, m in enumerate(mixed)]
    assert [t.text for t in found] == wanted
    # what a manifest's lines say of their language, where the model knows it
    head = model.head("ctc")
    assert head.for_lines([{"lang": "de-DE"}, {"lang": "xx"}, {"target_lang": "en"}]) == {
        "prompt_indices": [3, 5, 0]
    }


def test_streams_of_several_languages_go_together(model):
    streams = [model.stream(target_lang=language) for language in LANGUAGES]
    for part in np.array_split(CLIPS[0], 5):
        for stream in streams:
            stream.take(part)
        Stream.together(streams)
    found = [stream.finish().tokens for stream in streams]
    assert found == [EXPECTED["contexts"]["6"][name]["rnnt"][0]["ids"] for name in LANGUAGES]


def test_there_and_back_and_what_is_refused(archive, model, tmp_path, capsys):
    with pytest.raises(ValueError, match="target_lang is 'xx', expected one of auto, en-US"):
        model.transcribe(CLIPS, target_lang="xx")
    with pytest.raises(ValueError, match=r"target_lang is \['de-DE'\], expected"):
        model.head("rnnt").for_lines([{"target_lang": ["de-DE"], "lang": ["de-DE"]}])
    assert model.head("rnnt").slots_of({"lang": ["de-DE"]}) == {}
    with pytest.raises(ValueError, match="pnc is no slot of this model's prompt"):
        model.stream(pnc="yes")
    assert nemo2st.main([str(archive), "-o", str(tmp_path / "folder")]) == 0
    assert st2nemo.main([str(tmp_path / "folder"), "-o", str(tmp_path / "back.nemo")]) == 0
    before, after = read_nemo(archive), read_nemo(tmp_path / "back.nemo")
    assert after.config["target"] == EXPECTED["target"]
    assert after.config["model_defaults"] == EXPECTED["model_defaults"]
    assert before.state_dict.keys() == after.state_dict.keys()
    for name, tensor in before.state_dict.items():
        assert torch.equal(tensor, after.state_dict[name])
    none = load_model(write(tmp_path / "few.nemo", prompt_dictionary={"de-DE": 3}))
    with pytest.raises(ValueError, match="target_lang is not given, expected one of de-DE"):
        none.transcribe(CLIPS[:1])
    with pytest.raises(ValueError, match="prompt_dictionary.xx is 6, expected 0 to 5"):
        load_model(write(tmp_path / "bad.nemo", prompt_dictionary={"xx": 6}))
    config = before.config | {"target": EXPECTED["target"].replace("HybridRNNTCTC", "RNNT")}
    assert ModelConfig.from_nemo(config).heads == ("rnnt",)  # the other class


def test_the_command_takes_a_language(archive, tmp_path, capsys):
    soundfile.write(tmp_path / "clip.wav", CLIPS[0], 16000, subtype="FLOAT")
    arguments = [str(tmp_path / "clip.wav"), "--model", str(archive)]
    assert command.main([*arguments, "--target-lang", "en-US"]) == 0
    assert EXPECTED["transcribe"]["en-US"][0] in capsys.readouterr().out
    assert command.main([*arguments, "--target-lang", "xx"]) == 2
    assert "target_lang is 'xx'" in capsys.readouterr().err


def test_windows_and_alignments_are_told_the_language(model):
    for head in model.heads:
        wanted = {"long": "chunks", "retry": False, "timestamps": True, "target_lang": "de-DE"}
        (wanted,) = model.transcribe(CLIPS[:1], head, **wanted)
        told = transcribe_in_windows(model, CLIPS[0], str, head, target_lang="de-DE")
        assert told.words == wanted.words
        auto = transcribe_in_windows(model, CLIPS[0], str, head)
        assert auto.text == model.transcribe(CLIPS[:1], head, retry=False)[0].text != told.text
    # words of the text are looked for in the frames of that language
    text = "one two three"
    spans = {name: model.align(CLIPS[0], text, True, target_lang=name) for name in LANGUAGES}
    assert spans["auto"] == model.align(CLIPS[0], text, True) != spans["de-DE"]
    with torch.no_grad():
        features = model.featurize(torch.tensor(CLIPS[0])[None], torch.tensor([len(CLIPS[0])]))
        encoded, lengths = model.encode(*features, prompt_indices=3)
    tokens = [i for w in text.split() for i in model.tokenizer.encode(w)]
    (found,) = ctc_align(model.ctc_log_probs(encoded), lengths, [tokens], Confidence())
    assert spans["de-DE"][0].confidence == pytest.approx(
        min(found.confidences[: len(model.tokenizer.encode("one"))]), abs=1e-5
    )
    with pytest.raises(ValueError, match="target_lang is 'xx', expected one of"):
        model.align(CLIPS[0], text, target_lang="xx")
    whole = np.concatenate(CLIPS)
    scores = {lang: [s.score for s in find_segments(model, whole, text, lang=lang)]
              for lang in (None, "auto", "de-DE")}  # fmt: skip
    assert scores[None] == scores["auto"] != scores["de-DE"]


def test_segment_says_which_language_it_does_not_tell(archive, tmp_path, capsys):
    soundfile.write(tmp_path / "talk.wav", np.concatenate(CLIPS), 16000)
    (tmp_path / "talk.txt").write_text("one two")
    command = [str(tmp_path / "talk.wav"), str(tmp_path / "talk.txt"), f"--model={archive}"]
    for lang, n_said in (("de-DE", 0), ("de", 1)):
        segment.main([*command, f"--lang={lang}", "-o", str(tmp_path / lang)])
        assert capsys.readouterr().err.count(f"told auto, not {lang}: it has auto, en-US") == n_said


def test_the_server_tells_windows_in_a_language(model, monkeypatch):
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    client = pytest.importorskip("starlette.testclient", reason="httpx is not installed")
    from fastconformer.serving.app import Service, make_app
    from fastconformer.serving.batcher import Batcher

    monkeypatch.setattr(longform, "WINDOW_S", 1.0)
    app = make_app(Service(Batcher(model), "prompted", None), contextlib.nullcontext())
    flac = io.BytesIO()
    soundfile.write(flac, CLIPS[0], 16000, format="FLAC")
    with client.TestClient(app) as asking:
        form = {"stream": "true", "language": "de-DE"}
        answer = asking.post("/v1/audio/transcriptions", files={"file": flac.getvalue()}, data=form)
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-1]]
    options = {"long": "chunks", "window_s": 1.0, "retry": False, "target_lang": "de-DE"}
    (wanted,) = model.transcribe([load_audio(flac.getvalue(), 16000)], **options)
    assert len(events) > 2  # with the whole text alone it is two
    assert events[-1]["text"] == wanted.text == "".join(e["delta"] for e in events[:-1])


def test_exports_take_the_language_or_have_one(archive, model, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")

    def exported(name, *options):
        words = [archive, "-o", tmp_path / name, "--for", "sherpa-onnx", *options]
        assert st2onnx.main(list(map(str, words))) == 0
        file = tmp_path / name / ("model.onnx" if "ctc" in options else "encoder.onnx")
        return onnxruntime.InferenceSession(file)

    features, lengths = model.featurize(CASE.tensors["audio"], CASE.tensors["audio_len"])
    inputs = {"audio_signal": features.numpy(), "length": lengths.numpy()}
    for name, options, index in (
        ("rnnt", ["--offline", "--target-lang", "de-DE"], 3),
        ("auto", ["--offline"], 5),
        ("ctc", ["--offline", "--head", "ctc", "--target-lang", "en"], 0),
    ):
        out = exported(name, *options).run(None, inputs)[0]
        with torch.no_grad():
            wanted, counts = model.encode(features, lengths, index)
            wanted = model.ctc_log_probs(wanted) if name == "ctc" else wanted.transpose(1, 2)
        axis = 1 if name == "ctc" else 2
        for row, other, n in zip(out, wanted.numpy(), counts.tolist(), strict=True):
            parts = [np.moveaxis(x, axis - 1, 0)[:n] for x in (row, other)]
            assert np.abs(parts[0] - parts[1]).max() < 1e-4
    # the online recogniser asks for each stream; told one for good, it does not
    asking, told = exported("online"), exported("told", "--target-lang", "de-DE")
    metadata = asking.get_modelmeta().custom_metadata_map
    assert (
        json.loads(metadata["prompt_dictionary"]) == EXPECTED["model_defaults"]["prompt_dictionary"]
    )
    assert metadata["auto_prompt_id"] == "5"
    assert "prompt_dictionary" not in told.get_modelmeta().custom_metadata_map
    shapes = {x.name: x.shape for x in told.get_inputs()}
    assert [x.name for x in asking.get_inputs()] == [*shapes, "prompt_index"]
    given = {
        name: np.zeros([2, *shape[1:]], np.int64 if "len" in name else np.float32)
        for name, shape in shapes.items()
    }
    given["audio_signal"] = features[:2, :, : shapes["audio_signal"][2]].numpy()
    given["length"] += given["audio_signal"].shape[2]
    mixed = asking.run(None, given | {"prompt_index": np.array([3, 0])})[0]
    assert np.array_equal(mixed[0], told.run(None, given)[0][0])
    assert np.abs(mixed[1] - told.run(None, given)[0][1]).max() > 0.01
    # who builds the network itself has no such layers
    per_feature = read_nemo(archive)
    per_feature.config["preprocessor"]["normalize"] = "per_feature"
    write_nemo(tmp_path / "x.nemo", per_feature)
    for command_of in (st2hf, st2mlx):
        assert command_of.main([str(tmp_path / "x.nemo"), "-o", str(tmp_path / "no")]) == 1
        assert "told a language behind its encoder" in capsys.readouterr().err
    for path, reason in (
        (archive, "target_lang is 'xx', expected one of auto, en-US"),
        (FOLDER / "model.nemo", "no language is told to this model's encoder"),
    ):
        words = [path, "-o", tmp_path / "no", "--for", "sherpa-onnx", "--target-lang", "xx"]
        assert st2onnx.main(list(map(str, words))) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
