"""ONNX folders in onnxruntime, beside NeMo's own tensors and our texts; what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import golden, load_case

import converters.st2onnx
from fastconformer import load_model
from fastconformer.export import onnx_asr, sherpa_onnx
from fastconformer.networks.state import encode_chunk, first_state
from fastconformer.surgery.look_ahead import with_look_ahead

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CASES = ["ctc_bpe", "rnnt_bpe", "tdt_bpe", "hybrid_tdt_ctc_bpe", "local_attn_g0", "local_attn_g1"]


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A case and the folders of all its heads, by head."""
    case = load_case(golden(request.param))
    archive, folders = case.folder / "model.nemo", {}
    model = load_model(archive)
    for head in model.heads:
        folders[head] = tmp_path_factory.mktemp(request.param) / head
        words = [archive, "-o", folders[head], "--for", "onnx-asr", "--head", head]
        assert converters.st2onnx.main(list(map(str, words))) == 0
    return SimpleNamespace(case=case, model=model, folders=folders, tensors=case.tensors)


def greedy(folder, encoded, n_durations, max_symbols):
    """Tokens and frames, as a client finds them in encoded (D, T'): the blank starts, a duration is
    its index."""
    step = session(folder / "decoder_joint-model.onnx")
    shapes = {x.name: x.shape for x in step.get_inputs()}
    layers, _, hidden = shapes["input_states_1"]
    state = [np.zeros((layers, 1, hidden), np.float32)] * 2
    blank = len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines()) - 1
    tokens, frames, t, here = [], [], 0, 0
    while t < encoded.shape[1]:
        inputs = {
            "encoder_outputs": encoded[None, :, t : t + 1],
            "targets": np.array([[tokens[-1] if tokens else blank]], np.int32),
            "target_length": np.array([1], np.int32),
            "input_states_1": state[0],
            "input_states_2": state[1],
        }
        names = ["outputs", "output_states_1", "output_states_2"]
        logits, *after = step.run(names, inputs)
        logits = logits.squeeze()
        assert logits.shape == (blank + 1 + n_durations,)
        token = int(logits[: blank + 1].argmax())
        jump = int(logits[blank + 1 :].argmax()) if n_durations else 0
        if token != blank:
            tokens.append(token)
            frames.append(t)
            state, here = after, here + 1
        if jump:
            t, here = t + jump, 0
        elif token == blank or here == max_symbols:
            t, here = t + 1, 0
    return tokens, frames


def test_graphs_equal_nemo(exported):
    """Encoder, log-probabilities and greedy tokens, from NeMo's features, clips padded together."""
    tensors, case = exported.tensors, exported.case
    features, lengths = tensors["features"], tensors["features_len"]
    inputs = {"audio_signal": features.numpy(), "length": lengths.numpy().astype(np.int64)}
    for head, folder in exported.folders.items():
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == f"nemo-conformer-{head}"
        hypotheses = exported.model.decode(tensors["encoded"], tensors["encoded_len"], head)
        if (folder / "model.onnx").exists():
            (log_probs,) = session(folder / "model.onnx").run(["logprobs"], inputs)
            n_frames = (inputs["length"] - 1) // config["subsampling_factor"] + 1
            assert n_frames.tolist() == tensors["encoded_len"].tolist()
            for row, n in enumerate(n_frames):
                there = tensors["ctc_log_probs"][row, :n].numpy()
                assert np.abs(log_probs[row, :n] - there).max() < 2e-4
            continue
        names = ["outputs", "encoded_lengths"]
        encoded, n_frames = session(folder / "encoder-model.onnx").run(names, inputs)
        assert n_frames.tolist() == tensors["encoded_len"].tolist()
        tolerance = case.expected["suggested_tolerance"]["encoded"]
        for row, (n, hypothesis) in enumerate(zip(n_frames, hypotheses, strict=True)):
            there = tensors["encoded"][row, :n].numpy()
            assert np.abs(encoded[row, :, :n].T - there).max() < tolerance
            n_durations = len(exported.model.config.loss.durations)
            limit = config["max_tokens_per_step"]
            tokens, frames = greedy(folder, encoded[row, :, :n], n_durations, limit)
            assert tokens == hypothesis.tokens and frames == hypothesis.frames


def encoder_of(exported):
    """A session that gives (B, T', D or V+1), and the same by the model."""
    folder = next(iter(exported.folders.values()))
    is_ctc = (folder / "model.onnx").exists()
    run = session(folder / ("model.onnx" if is_ctc else "encoder-model.onnx"))

    def theirs(features, lengths):
        out = run.run(None, {"audio_signal": features.numpy(), "length": lengths.numpy()})[0]
        return out if is_ctc else out.transpose(0, 2, 1)

    @torch.no_grad()
    def ours(features, lengths):
        encoded, n = exported.model.encode(features, lengths)
        return (exported.model.ctc_log_probs(encoded) if is_ctc else encoded).numpy(), n

    return theirs, ours


def test_any_length(exported):
    """Graphs were traced with 97 frames: fewer and many more, the shorter clip padded."""
    theirs, ours = encoder_of(exported)
    torch.manual_seed(0)
    for lengths in ((1, 1), (8, 3), (17, 9), (1203, 1199)):
        features = torch.randn(2, exported.model.config.encoder.feat_in, max(lengths))
        expected, n_frames = ours(features, torch.tensor(lengths))
        found = theirs(features, torch.tensor(lengths))
        for row, n in enumerate(n_frames.tolist()):
            assert np.abs(found[row, :n] - expected[row, :n]).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case, minutes", [("hybrid_tdt_ctc_bpe", 10), ("local_attn_g0", 30)])
def test_long_audio_gives_our_text(case, minutes, tmp_path):
    """NeMo's own export fails at 400 s, where its table of positions ends."""
    model = load_model(golden(case) / "model.nemo")
    onnx_asr.export(model, "ctc", tmp_path / "x")
    torch.manual_seed(1)
    clip = torch.randn(1, minutes * 60 * 16000) * 0.05
    lengths = torch.tensor([clip.shape[1]])
    with torch.no_grad():
        features, lengths = model.featurize(clip, lengths)
        encoded, n = model.encode(features, lengths)
        expected = model.decode(encoded, n, "ctc")[0].tokens
    inputs = {"audio_signal": features.numpy(), "length": lengths.numpy()}
    (found,) = session(tmp_path / "x" / "model.onnx").run(None, inputs)
    best = torch.from_numpy(found[0, : int(n)]).argmax(-1).unique_consecutive()
    assert [t for t in best.tolist() if t != model.blank_id] == expected
    assert len(expected) > minutes


def test_int8_is_of_matrix_products_only(tmp_path):
    model = load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    onnx_asr.export(model, "tdt", tmp_path / "x")
    onnx_asr.export(model, "tdt", tmp_path / "x", int8=True)
    names = {file.name for file in (tmp_path / "x").iterdir()}
    parts = ("encoder-model", "decoder_joint-model")
    files = {f"{part}{kind}.onnx" for part in parts for kind in ("", ".int8")}
    assert names == {*files, "config.json", "vocab.txt"}
    graphs = {}
    for kind in ("", ".int8"):
        graph = onnx.load(tmp_path / "x" / f"encoder-model{kind}.onnx").graph
        graphs[kind] = [node.op_type for node in graph.node]
    assert graphs[".int8"].count("Conv") == graphs[""].count("Conv") > 0
    # of each layer: 2 x 2 feed-forward, 5 attention, 2 pointwise; and the subsampling's
    n_products = 11 * model.config.encoder.n_layers + 1
    assert graphs[".int8"].count("MatMulInteger") == n_products
    # a scale for each of a weight's outputs
    document = onnx.load(tmp_path / "x" / "encoder-model.int8.onnx")
    scales = [t.dims for t in document.graph.initializer if t.name.endswith("_scale")]
    assert all(len(dims) == 1 and dims[0] >= 32 for dims in scales) and scales


def test_weights_beyond_a_files_limit_lie_beside_it(tmp_path, monkeypatch):
    model = load_model(golden("ctc_bpe") / "model.nemo")
    onnx_asr.export(model, "ctc", tmp_path / "one")
    monkeypatch.setattr("fastconformer.export.onnx_files.MAX_FILE_BYTES", 100_000)
    onnx_asr.export(model, "ctc", tmp_path / "two")
    assert (tmp_path / "two" / "model.onnx.data").stat().st_size > 100_000
    assert (tmp_path / "two" / "model.onnx").stat().st_size < 500_000
    inputs = {"audio_signal": np.ones((1, 80, 50), np.float32), "length": np.array([50])}
    one, two = (session(tmp_path / n / "model.onnx").run(None, inputs)[0] for n in ("one", "two"))
    assert np.array_equal(one, two)


def test_sherpa_onnx_folder(tmp_path):
    """Every key that it reads: it ends the process where one is missing."""
    model = load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    for head in model.heads:
        sherpa_onnx.export(model, head, tmp_path / head)
    tokens = (tmp_path / "tdt" / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert len(tokens) == model.config.vocab_size + 1 and tokens[-1] == "<blk> 1024"
    assert len((tmp_path / "tdt" / "bpe.vocab").read_text(encoding="utf-8").splitlines()) == 1024
    encoder = onnx.load(tmp_path / "tdt" / "encoder.onnx")
    metadata = {item.key: item.value for item in encoder.metadata_props}
    wanted = {"vocab_size": "1024", "subsampling_factor": "8", "normalize_type": "per_feature"}
    wanted |= {"pred_rnn_layers": "1", "pred_hidden": "40", "feat_dim": "80", "is_giga_am": "0"}
    assert wanted.items() <= metadata.items() and "tdt" in metadata["url"]
    assert {"model_type", "version", "model_author", "comment"} <= metadata.keys()
    joiner = session(tmp_path / "tdt" / "joiner.onnx")
    assert joiner.get_outputs()[0].shape[-1] == 1024 + 1 + 5
    decoder = session(tmp_path / "tdt" / "decoder.onnx")
    assert [x.type for x in decoder.get_inputs()][:2] == ["tensor(int32)"] * 2
    ctc = onnx.load(tmp_path / "ctc" / "model.onnx")
    assert "tdt" not in {item.key: item.value for item in ctc.metadata_props}["url"]


@pytest.mark.parametrize("client", ["onnx-asr", "sherpa-onnx"])
def test_refused_before_a_byte_is_written(client, tmp_path, capsys):
    refusals = {
        "onnx-asr": [("stream_chunked_hybrid_rnnt", "normalize is 'NA'")],
        "sherpa-onnx": [],
    }
    refusals[client] += [("birwkv7_encoder", "rwkv7_attn")]
    for case, reason in refusals[client]:
        words = [golden(case) / "model.nemo", "-o", tmp_path / "x", "--for", client]
        assert converters.st2onnx.main(list(map(str, words))) == 1
        message = capsys.readouterr().err
        assert reason in message and message.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "case, context", [("stream_hybrid_multi", "ctx_12_5"), ("stream_ctc", "ctx_16_3")]
)
def test_online_form_is_nemos_pad_and_drop(case, context, tmp_path):
    """Windows as sherpa-onnx gives them: 9 zero frames first, then a full chunk at a time."""
    tensors, model = load_case(case).tensors, load_model(golden(case) / "model.nemo")
    head = model.heads[0]
    sherpa_onnx.export(model, head, tmp_path / "x")
    name = "encoder" if model.config.joint else "model"
    document = onnx.load(tmp_path / "x" / f"{name}.onnx")
    metadata = {item.key: item.value for item in document.metadata_props}
    size, shift = int(metadata["window_size"]), int(metadata["chunk_shift"])
    channel, time = (
        [int(metadata[f"cache_last_{kind}_dim{i}"]) for i in (1, 2, 3)]
        for kind in ("channel", "time")
    )
    features = torch.nn.functional.pad(tensors["stream_features"], (size - shift, size)).numpy()
    lengths = tensors["stream_features_len"].numpy() + size - shift
    n = len(features)
    caches = [np.zeros((n, *channel), np.float32), np.zeros((n, *time), np.float32)]
    caches.append(np.zeros(n, np.int64))
    run, frames = session(tmp_path / "x" / f"{name}.onnx"), []
    names = [x.name for x in run.get_inputs()]
    wanted = ["audio_signal", "length", "cache_last_channel", "cache_last_time"]
    assert names == [*wanted, "cache_last_channel_len"]
    for start in range(0, features.shape[2] - size, shift):
        window = features[:, :, start : start + size], np.clip(lengths - start, 0, size)
        out, _, *caches = run.run(None, dict(zip(names, (*window, *caches), strict=True)))
        frames.append(out.transpose(0, 2, 1) if name == "encoder" else out)
    found = np.concatenate(frames, 1)
    expected = tensors[f"{context}/pad_and_drop/stream_encoded"]
    if name == "model":
        with torch.no_grad():
            expected = model.ctc_log_probs(expected)
    for row, length in enumerate(tensors[f"{context}/pad_and_drop/stream_encoded_len"].tolist()):
        n_windows = (int(lengths[row]) - size) // shift + 1  # that are full
        whole = min(length, n_windows * (shift // 8))
        assert whole >= 12
        assert np.abs(found[row, :whole] - expected[row, :whole].numpy()).max() < 1e-4


@pytest.mark.parametrize("look_ahead", [13, 0])
def test_online_form_steps_as_our_stream(look_ahead, tmp_path):
    """Other look-aheads than the first, 6: a window's frames, subsampled by our own
    network, through our stream's step."""
    archive = golden("stream_chunked_hybrid_rnnt") / "model.nemo"
    words = [archive, "-o", tmp_path / "x", "--for", "sherpa-onnx", "--look-ahead", look_ahead]
    assert converters.st2onnx.main(list(map(str, words))) == 0
    model = with_look_ahead(load_model(archive), look_ahead)
    run, shift = session(tmp_path / "x" / "encoder.onnx"), 8 * (look_ahead + 1)
    shapes = {x.name: x.shape for x in run.get_inputs()}
    assert shapes["audio_signal"][2] == shift + 9
    names = ("cache_last_channel", "cache_last_time")
    caches = [np.zeros((1, *shapes[name][1:]), np.float32) for name in names]
    caches.append(np.zeros(1, np.int64))
    features = torch.randn(1, model.config.encoder.feat_in, 9 + 8 * shift)
    state = first_state(model.encoder, 1)
    for start in range(0, 8 * shift, shift):
        window = features[:, :, start : start + shift + 9]
        length = torch.tensor([shift + 9])
        with torch.no_grad():
            frames, _ = model.encoder.pre_encode(window, length)
        frames = frames[:, 2 : 2 + look_ahead + 1]
        expected, state = encode_chunk(model.encoder, frames, state)
        out, _, *caches = run.run(
            None, dict(zip(shapes, (window.numpy(), length.numpy(), *caches), strict=True))
        )
        assert np.abs(out.transpose(0, 2, 1) - expected.numpy()).max() < 1e-4
    assert int(caches[-1][0]) == min(8 * (look_ahead + 1), model.config.encoder.att_contexts[0][0])


def test_a_look_ahead_that_it_was_not_trained_with(tmp_path, capsys):
    archive = golden("stream_chunked_hybrid_rnnt") / "model.nemo"
    words = [archive, "-o", tmp_path / "x", "--for", "sherpa-onnx", "--look-ahead", 7]
    assert converters.st2onnx.main(list(map(str, words))) == 2
    assert "this model was trained with" in capsys.readouterr().err


def test_a_cache_aware_model_offline_too(tmp_path):
    archive = golden("stream_chunked_hybrid_rnnt") / "model.nemo"
    for name, options in (("online", []), ("offline", ["--offline"])):
        words = [archive, "-o", tmp_path / name, "--for", "sherpa-onnx", *options]
        assert converters.st2onnx.main(list(map(str, words))) == 0
    inputs = {
        name: [x.name for x in session(tmp_path / name / "encoder.onnx").get_inputs()]
        for name in ("online", "offline")
    }
    assert inputs["offline"] == ["audio_signal", "length"] and len(inputs["online"]) == 5


@pytest.mark.parametrize("case", ["canary_v2_unified", "canary_flash_agg"])
def test_canary_as_onnx_asr_asks_it(case, tmp_path):
    """The whole prompt first, with "▁" in front, then a token at a time with the caches."""
    tensors, model = load_case(case).tensors, load_model(golden(case) / "model.nemo")
    onnx_asr.export(model, "aed", tmp_path / "x")
    features, lengths = tensors["features"], tensors["features_len"]
    inputs = {"audio_signal": features.numpy(), "length": lengths.numpy().astype(np.int64)}
    states, mask = session(tmp_path / "x" / "encoder-model.onnx").run(None, inputs)
    assert mask.dtype == np.int64 and mask.sum(1).tolist() == tensors["encoded_len"].tolist()
    for row, n in enumerate(mask.sum(1)):
        expected = tensors["enc_states"][row, :n].numpy()
        assert np.abs(states[row, :n] - expected).max() < 1e-4

    lines = (tmp_path / "x" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids = {line.rpartition(" ")[0]: int(line.rpartition(" ")[2]) for line in lines}
    assert len(lines) == model.tokenizer.vocab_size + 1
    assert lines[-1] == f"<blk> {model.tokenizer.vocab_size}"
    prompt = [ids[piece] for piece in (*onnx_asr.PROMPT[:5], "<|en|>", *onnx_asr.PROMPT[5:-1])]
    step = session(tmp_path / "x" / "decoder-model.onnx")
    shapes = {x.name: x.shape for x in step.get_inputs()}
    layers, _, _, width = shapes["decoder_mems"]
    end = ids["<|endoftext|>"]
    encoded, n_frames = tensors["encoded"], tensors["encoded_len"]
    slots = {"source_lang": "en", "target_lang": "en", "pnc": "yes"}
    hypotheses = model.decode(encoded, n_frames, "aed", prompt=slots)
    n_ended = 0
    for row, hypothesis in enumerate(hypotheses):
        tokens, mems = list(prompt), np.zeros((layers, 1, 0, width), np.float32)
        given = np.array([tokens], np.int64)
        while len(tokens) < len(prompt) + len(hypothesis.tokens) + 1:
            parts = (given, states[row : row + 1], mask[row : row + 1], mems)
            logits, mems = step.run(None, dict(zip(shapes, parts, strict=True)))
            tokens.append(int(logits[0, -1].argmax()))
            given = np.array([tokens[-1:]], np.int64)
        found = tokens[len(prompt) :]
        n_ended += found[-1] == end
        assert found[: len(hypothesis.tokens)] == hypothesis.tokens
    assert n_ended >= 2


def test_canary_of_another_prompt_is_refused(tmp_path, capsys):
    words = [golden("canary_v1_agg") / "model.nemo", "-o", tmp_path / "x", "--for", "onnx-asr"]
    assert converters.st2onnx.main(list(map(str, words))) == 1
    assert "the model's is canary" in capsys.readouterr().err
    words[-1] = "sherpa-onnx"
    assert converters.st2onnx.main(list(map(str, words))) == 1
    assert "aed is none" in capsys.readouterr().err
