"""The language model trainer: a proper distribution, and better than none."""

import gzip
import math

import pytest
import torch
from conftest import golden

from converters.train_lm import main, train_lm
from fastconformer.decoding import read_arpa

TEXT = """the cat sat on the mat
the dog sat on the cat
a dog and a cat sat
the mat is on the dog
yes
on the mat the cat and the dog sat"""


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_after_every_history_sum_to_one(tmp_path, order):
    path = tmp_path / "lm.arpa"
    path.write_text("\n".join(train_lm([line.split() for line in TEXT.splitlines()], order)))
    model = read_arpa(path)
    assert model.order == order
    words = torch.tensor([i for word, i in model.words.items() if word != "<s>"])
    for state in range(len(model.backoff)):
        if state == model.start_state == 0 and order > 1:
            continue
        log_probs, _ = model.score(torch.full_like(words, state), words)
        assert log_probs.exp().sum() == pytest.approx(1, abs=1e-4)
    said = model.sentence(["the", "cat", "sat", "on", "the", "mat"])
    if order > 1:
        assert said > model.sentence(["mat", "the", "on", "sat", "cat", "the"]) + 2
    assert math.isfinite(model.sentence(["zebra"]))


def test_command(tmp_path, capsys):
    text = tmp_path / "text.tsv"
    text.write_text("\n".join(f"id\t{line}" for line in TEXT.splitlines()))
    assert main([str(text), "--order", "2", "-o", str(tmp_path / "lm.arpa.gz")]) == 0
    assert "2-grams of 6 lines" in capsys.readouterr().out
    assert "id" not in read_arpa(tmp_path / "lm.arpa.gz").words
    with gzip.open(tmp_path / "lm.arpa.gz", "rt") as file:
        assert file.readline() == "\\data\\\n"
    nemo = golden("hybrid_tdt_ctc_bpe") / "model.nemo"
    tokens = tmp_path / "tokens.arpa"
    assert main([str(text), "--order", "3", "--tokens", str(nemo), "-o", str(tokens)]) == 0
    assert any(word.startswith("▁") for word in read_arpa(tokens).words)
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main([str(tmp_path / "empty.txt"), "-o", str(tmp_path / "x.arpa")]) == 1
    assert "no text" in capsys.readouterr().err
    assert not (tmp_path / "x.arpa").exists()
    with pytest.raises(SystemExit) as exit_:
        main([str(text), "--order", "0", "-o", "x.arpa"])
    assert exit_.value.code == 2
