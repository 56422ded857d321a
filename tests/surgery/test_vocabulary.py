"""Changing a model's vocabulary: against the recorded change, and between any two vocabularies."""

import copy
import dataclasses
import hashlib
import io
import json

import pytest
import sentencepiece
import torch
from conftest import golden, load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.merge_tokenizers import merge_tokenizers
from converters.train_tokenizer import train_tokenizer
from fastconformer import ASRModel, ModelConfig, load_model
from fastconformer.checkpoint.nemo_archive import write_nemo
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.surgery.vocabulary import (
    MARGINS,
    Change,
    change_vocabulary,
    check_transfer,
    match_pieces,
    spellings,
)
from fastconformer.text.tokenizer import CharTokenizer, SentencePieceTokenizer, sentencepiece_files
from training.data.store import Batch
from training.data.utterances import Utterance
from training.recipe.sections import LossRecipe, ModelRecipe
from training.setup.start import build_model, read_tokenizer


def tokenizer_of(model: bytes) -> tuple[SentencePieceTokenizer, dict[str, bytes]]:
    return SentencePieceTokenizer(model), sentencepiece_files(model)


def clips(case: str) -> list[Batch]:
    """The audio of a golden case, one clip a batch."""
    tensors = load_case(case).tensors
    batches = []
    for i, (audio, length) in enumerate(zip(tensors["audio"], tensors["audio_len"], strict=True)):
        utterance = Utterance(f"clip{i}", "", 1.0, None, case, i + 1)
        empty = torch.zeros(1, 0, dtype=torch.int64)
        batches.append(
            Batch((utterance,), audio[None, :length], length[None], empty, torch.zeros(1).long())
        )
    return batches


def sha(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()


# --- the recorded change ------------------------------------------------------------------------


def recorded(new_rows="mean"):
    case = load_case("vocab_expansion")
    merged = (case.folder / "tokenizers" / "merged" / "tokenizer.model").read_bytes()
    model = load_model(case.folder / "model_before.nemo")
    model, change = change_vocabulary(model, *tokenizer_of(merged), new_rows=new_rows)
    return case, model, change


@pytest.mark.parametrize("new_rows", ["mean", "zeros", "random"])
def test_the_recorded_change(new_rows):
    case, model, change = recorded(new_rows)
    assert change.sources == (*range(1024), *[None] * 254) and change.keeps_all
    state = model.state_dict()
    for name, table in case.expected["transferred_rows"].items():
        assert list(state[name].shape) == table["shape_after"]
        for row in table["rows"]:
            assert sha(state[name][slice(*row["slice"])]) == row["sha256_after"]
    reference = load_model(case.folder / "model_after.nemo")
    changed = case.expected["transferred_rows"].keys()
    for name, value in reference.state_dict().items():
        if name not in changed:
            assert torch.equal(state[name], value), name
    # with the recorded new rows, everything is the recorded model's
    for name in changed:
        rows = reference.state_dict()[name]
        assert torch.equal(rows[:1024], state[name][:1024])
    encoded, lengths = case.tensors["encoded"], case.tensors["encoded_len"]
    targets, n_targets = case.tensors["targets"], case.tensors["targets_len"]
    ctc = model.ctc_head(encoded)
    old_ctc = torch.cat([ctc[..., :1024], ctc[..., -1:]], -1)
    expected = case.tensors["after/ctc_logits_old"]
    n_frames = expected.shape[1]
    torch.testing.assert_close(old_ctc[:, :n_frames], expected, rtol=1e-5, atol=1e-4)
    joint = model.joint_logits(encoded, targets, n_targets)
    old_joint = torch.cat([joint[..., :1024], joint[..., 1278:]], -1)
    expected = case.tensors["after/joint_logits_old"]
    shape = expected.shape
    torch.testing.assert_close(old_joint[:, : shape[1], : shape[2]], expected, rtol=1e-5, atol=3e-4)
    predicted = model.decoder(targets)
    torch.testing.assert_close(predicted, case.tensors["after/pred_out"], rtol=1e-5, atol=1e-5)
    for head, key in (("tdt", "rnnt_greedy_batch"), ("ctc", "ctc_greedy")):
        found = model.decode_greedy(encoded, lengths, head)
        assert [h.tokens for h in found] == [e["ids"] for e in case.expected["after"][key]]
    # the loss and all of its options stay, where NeMo's own change loses some
    before = load_model(case.folder / "model_before.nemo").config
    assert dataclasses.replace(model.config.loss) == before.loss and model.heads == ("tdt", "ctc")
    assert model.config.nemo["loss"] == before.nemo["loss"]


def test_the_changed_model_is_an_archive_that_loads(tmp_path):
    case, model, _ = recorded()
    write_nemo(tmp_path / "model.nemo", model.to_checkpoint())
    again = load_model(tmp_path / "model.nemo")
    assert again.tokenizer.pieces == model.tokenizer.pieces
    reference = read_checkpoint(case.folder / "model_after.nemo").config
    config = read_checkpoint(tmp_path / "model.nemo").config
    for section in ("joint", "decoder", "aux_ctc", "tokenizer"):
        theirs, ours = reference[section], config[section]
        for key in ("num_classes", "vocabulary", "vocab_size", "type", "decoder"):
            if key in theirs:
                assert ours[key] == theirs[key], (section, key)
    assert config["target"] == reference["target"]


# --- any two vocabularies -----------------------------------------------------------------------

TEXT = [
    "the quick brown fox jumps over the lazy dog", "press one to hear the menu again",
    "all circuits are busy now", "please enter your number followed by the pound key",
]  # fmt: skip


def rows_of(model):
    tables = {"embed": model.decoder.prediction["embed"].weight}
    tables["joint"] = model.joint.joint_net[-1].weight
    tables["joint bias"] = model.joint.joint_net[-1].bias
    tables["ctc"] = model.ctc_head.decoder_layers[0].weight
    tables["ctc bias"] = model.ctc_head.decoder_layers[0].bias
    return {name: table.detach().clone() for name, table in tables.items()}


CASES = {
    "smaller": lambda: tokenizer_of(train_tokenizer(TEXT, 40)),
    "unigram": lambda: tokenizer_of(train_tokenizer(TEXT, 40, "unigram")),
    "same size": lambda: tokenizer_of(train_tokenizer([t * 2 for t in TEXT[::-1]], 64)),
    "characters": lambda: (CharTokenizer([" ", *"etaoinshr'"]), {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("new_rows", ["mean", "zeros", "random"])
def test_rows_follow_their_pieces(name, new_rows):
    model = load_model(golden("train_parity") / "model.nemo")
    old, before = model.tokenizer, rows_of(model)
    others = {k: v.clone() for k, v in model.state_dict().items()}
    loss, heads = model.config.loss, model.heads
    tokenizer, files = CASES[name]()
    model, change = change_vocabulary(model, tokenizer, files, new_rows=new_rows, seed=3)
    after, n_old, n_new = rows_of(model), old.vocab_size, tokenizer.vocab_size
    texts = [" " if p == "▁" else p for p in old.pieces] if name == "characters" else old.pieces
    shared = {p: texts.index(p) for p in tokenizer.pieces if p in texts}
    assert len(shared) > 3 and [tokenizer.pieces[i] for i in change.moved] == list(shared)
    for table in before:
        assert len(after[table]) - n_new == len(before[table]) - n_old
        for i in change.moved:
            assert torch.equal(after[table][i], before[table][shared[tokenizer.pieces[i]]])
        assert torch.equal(after[table][n_new:], before[table][n_old:])
    changed = {
        key
        for key, value in model.state_dict().items()
        if value.shape != others[key].shape or not torch.equal(value, others[key])
    }
    assert len(changed) == 5
    assert (model.config.loss, model.heads) == (loss, heads)
    assert model.config.vocab_size == n_new == model.blank_id
    assert model.decoder.prediction["embed"].padding_idx == n_new
    if new_rows == "zeros":
        assert not after["embed"][change.new].any() and not after["ctc"][change.new].any()
    if new_rows == "mean":
        spelled = spellings(old, tokenizer, list(change.sources))
        for i in change.new:
            written = "".join(old.pieces[token] for token in spelled[i])
            assert written == tokenizer.pieces[i] or not spelled[i]
            mean = before["embed"][spelled[i] or slice(0, n_old)].mean(0)
            noise = (after["embed"][i] - mean).std() / before["embed"].std()
            assert 0.005 < noise < 0.05
    # it still reads, hears, loses and saves
    features = torch.randn(1, model.config.preprocessor.n_features, 64)
    encoded, lengths = model.encode(features, torch.tensor([64]))
    targets = torch.tensor([tokenizer.encode("the hat")])
    losses = model.losses(encoded, lengths, targets, torch.tensor([targets.shape[1]]))
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    checkpoint = model.to_checkpoint()
    again = copy.deepcopy(model)
    again.load_state_dict(checkpoint.state_dict)
    assert ("Char" in type(tokenizer).__name__) == ("BPE" not in checkpoint.config["target"])


def test_there_and_back_again():
    """A model whose vocabulary is permuted, or goes to characters and back, is the same again."""
    model = load_model(golden("train_parity") / "model.nemo")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    old, files = model.tokenizer, model.tokenizer_files
    larger, _ = merge_tokenizers(
        files["tokenizer.model"], train_tokenizer(["привет всем", "все свои"], 20)
    )
    model, _ = change_vocabulary(model, *tokenizer_of(larger))
    assert model.config.vocab_size > old.vocab_size
    model, change = change_vocabulary(model, old, files)
    assert not change.new
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_identities():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, unk_piece="[UNK]", minloglevel=2,
    )  # fmt: skip
    with_bytes = SentencePieceTokenizer(model.getvalue())
    plain = SentencePieceTokenizer(train_tokenizer(TEXT, 40))
    sources = match_pieces(with_bytes, plain)
    assert sources[plain.unk_id] == with_bytes.unk_id
    assert all(with_bytes.pieces[s] == plain.pieces[i] for i, s in enumerate(sources) if s and i)
    assert match_pieces(plain, plain) == list(range(40))
    text_that_looks_like_a_byte = CharTokenizer(["a", " "])
    assert match_pieces(with_bytes, text_that_looks_like_a_byte) == [
        with_bytes.pieces.index("a"), with_bytes.pieces.index("▁")
    ]  # fmt: skip


def test_labels_from_a_file(tmp_path):
    (tmp_path / "labels.txt").write_text("\na\nb\né\n", encoding="utf-8")
    for path in (tmp_path, tmp_path / "labels.txt"):
        tokenizer, files = read_tokenizer(str(path))
        assert tokenizer.pieces == [" ", "a", "b", "é"] and files == {}
    (tmp_path / "labels.txt").write_text("a\nbb\n")
    with pytest.raises(ValueError, match="'bb'"):
        read_tokenizer(str(tmp_path))


def test_a_recipe_changes_the_vocabulary(tmp_path):
    tokenizer, files = CASES["smaller"]()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    source = str(golden("train_parity") / "model.nemo")
    recipe = ModelRecipe(init_from=source, tokenizer=str(tmp_path))
    model = build_model(recipe, LossRecipe(), seed=1)
    assert model.tokenizer.pieces == tokenizer.pieces and model.tokenizer_files == files
    again = build_model(recipe, LossRecipe(), seed=1).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    fresh = build_model(dataclasses.replace(recipe, transfer="none"), LossRecipe(), seed=1)
    old = load_model(source)
    shared = model.tokenizer.pieces.index("▁")
    row = rows_of(old)["embed"][old.tokenizer.pieces.index("▁")]
    assert torch.equal(rows_of(model)["embed"][shared], row)
    assert not torch.equal(rows_of(fresh)["embed"][shared], row)


# --- the proof ----------------------------------------------------------------------------------


def extended(case: str, new_rows: str = "mean", original=None):
    original = original or load_model(golden(case) / "model.nemo")
    b = train_tokenizer([*TEXT, "привет мир", "ça va très bien", "où est la clé"], 90)
    model, _ = merge_tokenizers(original.tokenizer_files["tokenizer.model"], b)
    changed = copy.deepcopy(original)
    changed, change = change_vocabulary(changed, *tokenizer_of(model), new_rows=new_rows, seed=5)
    return original, changed, change


@pytest.mark.parametrize("case", ["hybrid_tdt_ctc_bpe", "rnnt_bpe", "tdt_bpe", "ctc_bpe"])
@pytest.mark.parametrize("new_rows", ["mean", "zeros", "random"])
def test_greedy_output_is_unchanged(case, new_rows):
    original, changed, change = extended(case, new_rows)
    assert change.keeps_all and len(change.new) > 10
    said = check_transfer(original, changed, change, clips(case), MARGINS[new_rows])
    assert "unchanged" in said
    tensors = load_case(case).tensors
    for head in original.heads:
        outputs = []
        for model in (original, changed):
            features = model.featurize(tensors["audio"], tensors["audio_len"])
            outputs.append(model.decode_greedy(*model.encode(*features), head))
        assert [(h.tokens, h.frames, h.durations) for h in outputs[0]] == [
            (h.tokens, h.frames, h.durations) for h in outputs[1]
        ]


@pytest.mark.parametrize("new_rows", ["mean", "zeros", "random"])
def test_a_hat_joint_whose_blank_has_no_row(new_rows):
    """Its tokens share what blank leaves; their logits are compared before that."""
    trained = load_model(golden("rnnt_bpe") / "model.nemo")
    config = copy.deepcopy(trained.config.nemo)
    config["joint"]["_target_"] = "nemo.HATJoint"
    torch.manual_seed(0)
    hat = ASRModel(ModelConfig.from_nemo(config), trained.tokenizer, trained.tokenizer_files).eval()
    state = hat.state_dict()
    for name, tensor in trained.state_dict().items():
        is_output = name.startswith("joint.joint_net")
        state[name] = tensor[: state[name].shape[0]] if is_output else tensor
    hat.load_state_dict(state)
    hat.joint.blank_pred[-2].bias.data -= 1.0  # or blank wins everywhere
    original, changed, change = extended("rnnt_bpe", new_rows, hat)
    said = check_transfer(original, changed, change, clips("rnnt_bpe"), MARGINS[new_rows])
    assert "logits are equal" in said and "greedy outputs are unchanged" in said and change.new
    rows = changed.joint.joint_net[-1].weight.shape[0]
    assert rows == changed.tokenizer.vocab_size, "no row of blank"
    with torch.no_grad():
        changed.joint.joint_net[-1].weight[0] += 1
    with pytest.raises(ValueError, match="logits of old tokens"):
        check_transfer(original, changed, change, clips("rnnt_bpe"))


def test_new_rows_that_would_win_are_lowered_or_found():
    original, changed, change = extended("hybrid_tdt_ctc_bpe")
    batches = clips("hybrid_tdt_ctc_bpe")
    with torch.no_grad():
        changed.joint.joint_net[-1].bias[change.new[0]] += 50
    said = check_transfer(original, changed, change, batches)
    assert "tdt: biases of new tokens lowered by" in said
    assert check_transfer(original, changed, change, batches).count("lowered") == 0
    # rows that a hard-coded index would have moved are not the pieces' own
    with torch.no_grad():
        embed = changed.decoder.prediction["embed"].weight
        embed[: change.n_old] = embed[: change.n_old].roll(1, 0)
    with pytest.raises(ValueError, match="logits of old tokens"):
        check_transfer(original, changed, change, batches)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5))
def test_old_outputs_pair_the_same_tokens(seed, n_old, n_new):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(n_old + n_new, generator=generator)[:n_new].tolist()
    sources = [i if i < n_old else None for i in drawn]
    change = Change(tuple(sources), n_old)
    old, new = change.old_outputs()
    assert old.tolist() == [*sorted(s for s in sources if s is not None), n_old]
    for i, j in zip(old[:-1].tolist(), new[:-1].tolist(), strict=True):
        assert sources[j] == i
    assert new[-1] == n_new
    assert json.dumps(change.moved + change.new)
    assert sorted(change.moved + change.new) == list(range(n_new))
