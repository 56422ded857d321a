"""A tokenizer for each language, as NVIDIA's multilingual checkpoints have them (`type: agg`)."""

import copy
import json

import pytest
import torch
from conftest import golden, load_case

import fastconformer
from fastconformer.checkpoint.nemo_archive import read_nemo, write_nemo
from fastconformer.config import ModelConfig
from fastconformer.model import ASRModel
from fastconformer.surgery.vocabulary import change_vocabulary
from fastconformer.text.tokenizer import SentencePieceTokenizer, load_tokenizer, sentencepiece_files
from training.data.limits import Limits, check_for_training
from training.data.utterances import read_utterances

LANGUAGES = {"en": "rnnt_bpe", "xx": "hybrid_tdt_ctc_bpe"}


@pytest.fixture(scope="module")
def parts():
    """{language: its own tokenizer}"""
    models = {
        lang: read_nemo(golden(case) / "model.nemo").tokenizer_files["tokenizer.model"]
        for lang, case in LANGUAGES.items()
    }
    return {lang: SentencePieceTokenizer(model) for lang, model in models.items()}


@pytest.fixture(scope="module")
def archive(parts, tmp_path_factory):
    """A hybrid model of both vocabularies, as a .nemo."""
    config = copy.deepcopy(read_nemo(golden("hybrid_rnnt_ctc_bpe") / "model.nemo").config)
    languages, files = {}, {}
    for lang, part in parts.items():
        model = part.processor.serialized_model_proto()
        named = {f"{lang}_{name}": data for name, data in sentencepiece_files(model).items()}
        files |= named
        keys = dict(zip(("model_path", "spe_tokenizer_vocab", "vocab_path"), named))
        languages[lang] = {"dir": "tokenizer", "type": "bpe"}
        languages[lang] |= {key: f"nemo:{name}" for key, name in keys.items()}
    config["tokenizer"] = {"type": "agg", "dir": None, "langs": languages}
    n = sum(part.vocab_size for part in parts.values())
    config["decoder"]["vocab_size"] = n
    for section in (config["joint"], config["aux_ctc"]["decoder"]):
        section |= {"num_classes": n, "vocabulary": ["x"] * n}
    torch.manual_seed(0)
    model = ASRModel(ModelConfig.from_nemo(config), load_tokenizer(config, files), files)
    path = tmp_path_factory.mktemp("aggregate") / "model.nemo"
    write_nemo(path, model.to_checkpoint())
    return path


def test_ids_follow_one_another(archive, parts):
    tokenizer = fastconformer.load_model(archive).tokenizer
    english, other = parts.values()
    assert tokenizer.vocab_size == english.vocab_size + other.vocab_size
    text = "please turn off the lights, it is raining."
    ids = tokenizer.of_language("xx").encode(text)
    assert ids == [english.vocab_size + i for i in other.encode(text)]
    assert tokenizer.ids_to_pieces(ids) == other.ids_to_pieces(other.encode(text))
    mixed = tokenizer.of_language("en").encode("please turn") + ids
    assert tokenizer.decode(mixed) == f"please turn {text}"
    for lang in (None, "de"):
        with pytest.raises(ValueError, match="one of en, xx"):
            tokenizer.of_language(lang)


def test_it_transcribes_with_times_and_comes_back(archive, tmp_path):
    model = fastconformer.load_model(archive)
    model.save(tmp_path / "folder")
    again = fastconformer.load_model(tmp_path / "folder")
    tensors = load_case("hybrid_rnnt_ctc_bpe").tensors
    clips = [clip[:n] for clip, n in zip(tensors["audio"], tensors["audio_len"].tolist())]
    for head in model.heads:
        first, second = (m.transcribe(clips, head=head, timestamps=True) for m in (model, again))
        assert first == second
        for transcript in first:
            ids = transcript.tokens
            pieces = "".join(model.tokenizer.ids_to_pieces(ids)).replace("▁", " ").split()
            assert ids and "".join(transcript.text.split()) == "".join(pieces)
            assert "".join(w.text for w in transcript.words).replace(" ", "") == "".join(pieces)


def test_training_text_needs_its_language(archive, parts, tmp_path):
    tokenizer = fastconformer.load_model(archive).tokenizer
    line = {"audio_filepath": "a.wav", "duration": 3.0, "text": "it is raining"}
    lines = [line | {"lang": "en"}, line | {"lang": "xx"}, line]
    (tmp_path / "a.wav").touch()
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept, dropped = check_for_training(
        read_utterances(tmp_path / "m.jsonl")[0], tokenizer, Limits()
    )
    n = parts["en"].vocab_size
    assert list(kept[0].tokens) == parts["en"].encode("it is raining")
    assert [i - n for i in kept[1].tokens] == parts["xx"].encode("it is raining")
    assert [(d.line, d.reason) for d in dropped] == [(3, "unknown_lang")]


def test_its_vocabulary_is_not_changed(archive, parts):
    model = fastconformer.load_model(archive)
    with pytest.raises(ValueError, match="tokenizer for each of en, xx"):
        change_vocabulary(model, parts["en"], {})


@pytest.mark.parametrize(
    "section, name",
    [
        ({"type": "wpe", "vocab_path": "nemo:vocab.txt"}, "tokenizer.type is 'wpe'"),
        ({"type": "agg"}, "tokenizer.langs"),
        ({"type": "agg", "langs": ["en"]}, "tokenizer.langs"),
        ({"type": "agg", "langs": {"en": None}}, "tokenizer.langs"),
        ({"type": "agg", "langs": {"en": {"type": "wpe"}}}, "tokenizer.langs.en.type is 'wpe'"),
        ({"type": "agg", "langs": {"en": {}}}, "tokenizer.langs.en.model_path"),
    ],
)
def test_other_tokenizers_are_refused_by_name(section, name):
    with pytest.raises(ValueError, match=name):
        load_tokenizer({"tokenizer": section}, {})
