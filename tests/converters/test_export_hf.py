"""Folders of transformers' Parakeet: there and back bit-equal, tokenizers, and what is refused.

What transformers itself makes of them is in tests/clients.
"""

import io
import json
import random

import pytest
import sentencepiece
import torch
import yaml
from conftest import extra, golden, load_case
from safetensors.torch import load_file, save_file

import converters.hf2st
import converters.st2hf
import converters.st2nemo
from fastconformer import load_model
from fastconformer.checkpoint.nemo_archive import read_nemo
from fastconformer.text.sentencepiece_model import SentencePieceModel
from fastconformer.text.tokenizer_json import sentencepiece_model, tokenizer_json

HEADS = [
    ("ctc_bpe", "ctc"),
    ("hybrid_tdt_ctc_bpe", "tdt"),
    ("hybrid_tdt_ctc_bpe", "ctc"),
    ("hybrid_rnnt_ctc_bpe", "rnnt"),
]


def run(module, *words):
    assert module.main(list(map(str, words))) == 0


@pytest.mark.parametrize("case, head", HEADS)
def test_there_and_back(case, head, tmp_path):
    archive = golden(case) / "model.nemo"
    run(converters.st2hf, archive, "-o", tmp_path / "hf", "--head", head)
    run(converters.hf2st, tmp_path / "hf", "-o", tmp_path / "st")
    run(converters.st2nemo, tmp_path / "st", "-o", tmp_path / "back.nemo")
    before, after = read_nemo(archive).state_dict, read_nemo(tmp_path / "back.nemo").state_dict
    other = "ctc_decoder." if head != "ctc" else ("decoder.", "joint.")
    hybrid = "ctc_decoder.decoder_layers.0.weight" in before
    expected = {n: t for n, t in before.items() if not (hybrid and n.startswith(other))}
    expected = {n.replace("ctc_decoder.", "decoder."): t for n, t in expected.items()}
    assert expected.keys() == after.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, after[name]), name

    data = load_case(case)
    one, two = load_model(archive), load_model(tmp_path / "hf")
    features = data.tensors["features"], data.tensors["features_len"]
    with torch.no_grad():
        found = [m.decode(*m.encode(*features), head) for m in (one, two)]
    assert [h.tokens for h in found[0]] == [h.tokens for h in found[1]]
    assert one.tokenizer.decode(found[0][0].tokens) == two.tokenizer.decode(found[1][0].tokens)


def test_of_several_files(tmp_path):
    """The hub's large checkpoints name their parts in an index."""
    run(converters.st2hf, golden("ctc_bpe") / "model.nemo", "-o", tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    parts, names = {}, sorted(tensors)
    for i, chunk in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chunk}, tmp_path / "hf" / file)
        parts |= dict.fromkeys(chunk, file)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    state = load_model(tmp_path / "hf").state_dict()
    assert torch.equal(state["decoder.decoder_layers.0.weight"], tensors["ctc_head.weight"])
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="holds no ../elsewhere"):
        load_model(tmp_path / "hf")


def break_config(folder, key, value):
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document.update({key: value})
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("model_type", "whisper", "model_type is 'whisper'"),
        ("encoder_config", None, "lacks what its kind needs"),
        ("vocab_size", 12, "does not fit"),
        ("vocab_size", 10**12, "97 pieces, the model"),
    ],
)
def test_a_bad_folder_is_one_line(key, value, reason, tmp_path, capsys):
    run(converters.st2hf, golden("ctc_bpe") / "model.nemo", "-o", tmp_path / "hf")
    break_config(tmp_path / "hf", key, value)
    words = [str(tmp_path / "hf"), "-o", str(tmp_path / "st")]
    assert converters.hf2st.main(words) == 1
    message = capsys.readouterr().err
    assert reason in message and message.count("\n") == 1
    assert not (tmp_path / "st").exists()


@pytest.mark.parametrize(
    "case, reason",
    [
        ("tdt_bpe", "pred_hidden is 40 and joint_hidden 48"),
        ("rnnt_bpe", "one width for both"),
        ("local_attn_g1", "self_attention_model is 'rel_pos_local_attn'"),
        ("stream_chunked_hybrid_rnnt", "normalize is 'NA'"),
        ("hybrid_tdt_char", "normalize is 'all_features'"),
        ("striding4_ctc_char", "subsampling is 'striding'"),
    ],
)
def test_refused_before_a_byte_is_written(case, reason, tmp_path, capsys):
    words = [str(golden(case) / "model.nemo"), "-o", str(tmp_path / "hf")]
    assert converters.st2hf.main(words) == 1
    message = capsys.readouterr().err
    assert reason in message and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def sentences(count):
    """Words over a small alphabet, with what texts hold now and then."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnoprstuvwxyz'", k=rng.randint(1, 9))) for _ in range(400)
    ]
    odd = [
        "",
        " ",
        " lead",
        "two  spaces",
        "trail ",
        "tab\there",
        "ﬁne",
        "Ünïcode",
        "日本",
        "a⁇b",
        "▁x",
    ]
    return [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count)] + odd


def trained(**options):
    """A SentencePiece model as NeMo's script trains it."""
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(1500)),
        model_writer=target,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return target.getvalue()


MODELS = {
    "unigram": {"model_type": "unigram", "vocab_size": 200},
    "bpe": {"model_type": "bpe", "vocab_size": 200, "remove_extra_whitespaces": False},
    "bytes": {"model_type": "bpe", "vocab_size": 480, "byte_fallback": True},
    "digits": {"model_type": "bpe", "vocab_size": 150, "user_defined_symbols": "<|en|>,1,2"},
    "no_prefix": {"model_type": "unigram", "vocab_size": 150, "add_dummy_prefix": False},
    "controls": {"model_type": "bpe", "vocab_size": 150, "control_symbols": "<pad>"},
}


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_rebuilt(name):
    """A SentencePiece model -> tokenizer.json -> a model that encodes and decodes as the first."""
    model = SentencePieceModel.from_bytes(trained(**MODELS[name]))
    document = json.loads(json.dumps(tokenizer_json(model, "<blank>")))
    kinds = {"unigram": "Unigram", "bpe": "BPE"}
    assert document["model"]["type"] == kinds[MODELS[name]["model_type"]]
    back = sentencepiece_model(document, len(model.pieces))
    assert [p.text for p in back.pieces] == [p.text for p in model.pieces]
    assert [p.type for p in back.pieces] == [p.type for p in model.pieces]
    one, two = (
        sentencepiece.SentencePieceProcessor(model_proto=m.to_bytes()) for m in (model, back)
    )
    for text in [*sentences(300), "x<|en|>12 3"]:
        ids = one.encode(text)
        assert two.encode(text) == ids and two.decode(ids) == one.decode(ids), text


@pytest.mark.parametrize("case", ["hybrid_tdt_ctc_bpe", "tdt_bpe", "train_parity", "ctc_bpe"])
def test_tokenizer_of_real_text(case):
    """1,000 lines of books; NVIDIA's own English tokenizer among the models."""
    lines = (extra("data", "text_corpora") / "librispeech_devclean_text.txt").read_text()
    model = load_model(golden(case) / "model.nemo").tokenizer.processor
    content = SentencePieceModel.from_bytes(model.serialized_model_proto())
    back = sentencepiece_model(tokenizer_json(content, "<blank>"), len(content.pieces))
    assert back.pieces == content.pieces
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=back.to_bytes())
    for text in [t for line in lines.splitlines()[:500] for t in (line, line.lower())]:
        assert rebuilt.encode(text) == model.encode(text)


def test_tokenizer_of_transformers_own_conversion():
    """It prefixes by Metaspace, and turns byte_fallback on without bytes."""
    model = SentencePieceModel.from_bytes(trained(**MODELS["bpe"]))
    document = tokenizer_json(model, "<blank>")
    steps = document["normalizer"]["normalizers"]
    charsmap = [step for step in steps if step["type"] == "Precompiled"]
    document["normalizer"] = {"type": "Sequence", "normalizers": charsmap}
    document["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always",
        "split": True,
    }
    document["model"]["byte_fallback"] = True
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    back = sentencepiece_model(document, len(model.pieces))
    assert back.pieces == model.pieces
    assert back.normalizer["add_dummy_prefix"] == 1 and back.trainer["byte_fallback"] == 0


def test_model_card(tmp_path):
    """Front matter that the hub takes, error rates with their normaliser, the run's recipe."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    archive = run_folder / "model.nemo"
    archive.write_bytes((golden("ctc_bpe") / "model.nemo").read_bytes())
    recipe = "model: {init_from: nvidia/parakeet-ctc-0.6b}\ndata: {train: [corpus/train.jsonl]}\n"
    (run_folder / "recipe.yaml").write_text(recipe + "trainer: {max_steps: 500}\n")
    counts = {"wer": 0.125, "cer": 0.05}
    results = {"manifest": "sets/dev.jsonl", "n_utterances": 20, "normalizer": "basic"}
    results |= {"normalized": counts, "raw": {"wer": 0.25, "cer": 0.1}, "audio_s": 36.0}
    (tmp_path / "dev.json").write_text(json.dumps(results))
    words = ["--results", tmp_path / "dev.json", "--licence", "cc-by-4.0", "--languages", "en,de"]
    run(converters.st2hf, archive, "-o", tmp_path / "hf", *words)
    card = (tmp_path / "hf" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0" and front["language"] == ["en", "de"]
    assert front["base_model"] == "nvidia/parakeet-ctc-0.6b"
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 12.5 and "basic" in result["metrics"][0]["name"]
    assert "| dev | 20 | basic | 12.50 % | 5.00 % | 25.00 % |" in card
    assert "corpus/train.jsonl" in card and "max_steps: 500" in card
    # for the archive, beside it; one that is there stays
    run(converters.hf2st, tmp_path / "hf", "-o", tmp_path / "st")
    out = tmp_path / "out" / "model.nemo"
    out.parent.mkdir()
    for _ in range(2):
        run(converters.st2nemo, tmp_path / "st", "-o", out, "--card")
    card = (out.parent / "README.md").read_text()
    assert "| licence | not stated" in card and "restore_from" in card
    (tmp_path / "dev.json").write_text("{}")
    words = [archive, "-o", tmp_path / "x", "--results", tmp_path / "dev.json"]
    assert converters.st2hf.main(list(map(str, words))) == 1
    assert not (tmp_path / "x").exists()
