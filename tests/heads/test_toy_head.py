"""A head of a few lines, named by a config and nowhere else, does all that a head of ours does."""

import copy

import numpy as np
import pytest
import torch
from conftest import golden, ledger, logged
from torch import nn
from torch.nn import functional as F

from fastconformer import ASRModel, ModelConfig, load_model
from fastconformer.config import nemo
from fastconformer.config.heads import HEADS_OF_CLASS
from fastconformer.decoding import Hypothesis
from fastconformer.heads import HEADS, Head
from fastconformer.surgery.local_attention import with_local_attention
from fastconformer.surgery.sample_rate import with_sample_rate
from fastconformer.surgery.vocabulary import change_vocabulary
from fastconformer.text.tokenizer import CharTokenizer
from training.finetune import main


class Toy(Head):
    """A linear layer; its loss spreads the text evenly over the frames, decoding takes the best
    class of each frame and keeps every one that is no blank."""

    family = "toy"

    @staticmethod
    def networks(config):
        return {"toy": nn.Linear(config.encoder.d_out, config.vocab_size + 1)}

    @property
    def modules(self):
        return {"toy": "toy"}

    def token_layers(self):
        return {"toy": self.model.toy}

    def loss(self, encoded, encoded_lengths, targets, target_lengths):
        logits = self.model.toy(encoded).float().log_softmax(-1)
        values = []
        for clip, n, text, count in zip(logits, encoded_lengths, targets, target_lengths):
            at = (torch.arange(int(n)) * int(count)).div(int(n), rounding_mode="floor")
            values.append(F.nll_loss(clip[: int(n)], text[at], reduction="sum"))
        return torch.stack(values)

    def decode(self, encoded, lengths, options):
        found = []
        for clip, n in zip(self.model.toy(encoded).float().log_softmax(-1), lengths.tolist()):
            best, tokens = clip[:n].max(-1)
            frames = (tokens != self.model.blank_id).nonzero()[:, 0].tolist()
            score = float(best.sum())
            found.append(Hypothesis(tokens[frames].tolist(), frames, None, score))
        return found


def toy_section(cfg, encoder, names):
    return {"vocab_size": len(cfg["labels"])}


@pytest.fixture(params=[("toy",), ("transducer", "toy")], ids=["alone", "beside a transducer"])
def folder(request, monkeypatch, tmp_path):
    """A converted folder of a model with the head, alone or as the second of two."""
    monkeypatch.setitem(HEADS, "toy", Toy)
    monkeypatch.setitem(HEADS_OF_CLASS, "EncDecToyModel", request.param)
    monkeypatch.setitem(nemo.HEAD_SECTIONS, "toy", toy_section)
    source = load_model(golden("rnnt_bpe") / "model.nemo")
    config = copy.deepcopy(source.config.nemo)
    config |= {"target": "toys.EncDecToyModel", "labels": source.tokenizer.pieces}
    torch.manual_seed(0)
    model = ASRModel(ModelConfig.from_nemo(config), source.tokenizer, source.tokenizer_files)
    model.load_state_dict(source.state_dict(), strict=False)
    model.save(tmp_path / "model")
    return tmp_path / "model"


def noise(seconds, seed=0, rate=16000):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(int(seconds * rate))).astype(np.float32)


def test_it_transcribes(folder, tmp_path):
    model = load_model(folder)
    assert "toy" in model.heads
    found = model.transcribe([noise(2), noise(1.2, 1)], head="toy", timestamps=True)
    for transcript in found:
        assert transcript.head == "toy" and transcript.tokens and transcript.text
        assert transcript.words[0].start < transcript.words[0].end <= 2.1
    alone = model.transcribe(noise(1.2, 1), head="toy")[0]
    assert alone.tokens == found[1].tokens
    for long in ("local", "chunks"):
        assert model.transcribe(noise(3), head="toy", long=long, window_s=1.0)[0].tokens
    model.save(tmp_path / "again")
    again = load_model(tmp_path / "again").transcribe(noise(2), head="toy", timestamps=True)
    assert again[0] == found[0]
    with pytest.raises(ValueError, match="no ctc|head is 'ctc'"):
        model.align(noise(2), "a word")


def test_it_has_a_loss(folder):
    model = load_model(folder)
    encoded, lengths = torch.randn(2, 20, model.config.encoder.d_out), torch.tensor([20, 11])
    targets, counts = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([3, 2])
    losses = model.losses(encoded, lengths, targets, counts)
    assert set(losses) == set(model.heads) and losses["toy"].shape == (2,)
    alone = model.losses(encoded[1:, :11], lengths[1:], targets[1:, :2], counts[1:], ("toy",))
    torch.testing.assert_close(losses["toy"][1:], alone["toy"])
    with pytest.raises(ValueError, match="prompt is an argument of none"):
        model.losses(encoded, lengths, targets, counts, prompt=[1])


def test_it_goes_along_with_a_changed_model(folder):
    model = load_model(folder)
    changed, change = change_vocabulary(
        model, CharTokenizer([" ", *"abcdefg"]), {}, new_rows="mean"
    )
    assert changed.toy.weight.shape[0] == 9
    kept = model.toy.weight[[s for s in change.sources if s is not None]]
    assert torch.equal(changed.toy.weight[change.moved], kept)
    assert changed.toy.weight[-1].equal(model.toy.weight[-1])  # blank
    assert changed.encoder.layers[0].norm_out.weight is model.encoder.layers[0].norm_out.weight
    assert model.config.vocab_size == model.blank_id == len(model.toy.bias) - 1  # as it was
    for other in (with_local_attention(model), with_sample_rate(model, 8000)):
        assert other.toy.weight is model.toy.weight and other.transcribe(noise(2), head="toy")


def test_a_recipe_trains_it(folder, corpus):
    recipe, run = corpus
    options = [f"model.init_from={folder}", "trainer.max_steps=2", "trainer.val_every_steps=2"]
    assert main([str(recipe), *options, "optim.lr=1e-3"]) == 0
    before, after = load_model(folder), load_model(run / "last")
    assert len(logged(run)) == 2
    for record in logged(run):
        assert all(record[head] > 0 for head in before.heads)
        parts = [record[head] for head in before.heads]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert not torch.equal(after.toy.weight, before.toy.weight)
    assert "toy" in ledger(run)[-1]["sets"]["dev"]
    # trained by itself, and named as a part to freeze
    options += ["loss.heads=toy", "freeze.modules=[toy]", f"output={run}2"]
    assert main([str(recipe), *options]) == 0
    assert torch.equal(load_model(f"{run}2/last").toy.weight, before.toy.weight)
    other = [name for name, _ in before.named_parameters() if name.startswith(("joint", "decoder"))]
    state, frozen = before.state_dict(), load_model(f"{run}2/last").state_dict()
    assert all(torch.equal(state[name], frozen[name]) for name in other)
    assert not torch.equal(
        state["encoder.layers.0.norm_out.weight"], frozen["encoder.layers.0.norm_out.weight"]
    )
