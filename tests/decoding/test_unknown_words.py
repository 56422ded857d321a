"""A language model of words that are not spoken changes nothing; one that knows them helps."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import SAMPLES

from fastconformer import load_model
from fastconformer.decoding import read_arpa
from fastconformer.decoding.fusion import Fusion, WordScorer, language_model_scorer

BASE = Path(__file__).parents[2] / "models" / "base_tiny.nemo"
TINY = (
    "\\data\\\nngram 1=6\nngram 2=3\n\n\\1-grams:\n-0.9\t</s>\n-99\t<s>\t-0.3\n"
    "-1.0\tapple\t-0.2\n-1.2\twhich\t-0.2\n-1.2\twere\n-1.5\tpeople\n\n"
    "\\2-grams:\n-0.3\t<s> apple\n-0.4\tapple people\n-0.2\tpeople </s>\n\n\\end\\\n"
)


@pytest.fixture(scope="module")
def model():
    return load_model(BASE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "tiny.arpa"
    path.write_text(TINY)
    return read_arpa(path)


@pytest.fixture(scope="module")
def clips():
    whole = soundfile.read(SAMPLES / "jfk.flac", dtype="float32")[0]
    return [whole[:56000], whole[56000:120000], whole[120000:]]


@pytest.mark.parametrize("head", ["ctc", "tdt"])
def test_a_model_that_knows_no_word_changes_nothing(model, tiny, clips, head):
    without = model.transcribe(clips, head=head, beam=4)
    with_lm = model.transcribe(clips, head=head, beam=4, lm=tiny)
    heard = {word for t in model.transcribe(clips, head=head) for word in t.text.split()}
    assert not heard & set(tiny.words)
    assert [t.tokens for t in with_lm] == [t.tokens for t in without]
    alone = [model.transcribe(clip, head=head, beam=4, lm=tiny)[0].tokens for clip in clips]
    assert alone == [t.tokens for t in with_lm]


def test_trust_grows_with_the_words_that_are_known(model, tiny):
    scorer = language_model_scorer(tiny, model.tokenizer, 0.3, None, "cpu", lambda: [""])
    assert isinstance(scorer, WordScorer)
    shares = ["nothing here known", "apple of a tree", "Apple, people: were which", ""]
    found = [scorer.trust_in(text) for text in shares]
    assert found[0] == found[3] == 0 < found[1] < 0.1 < found[2] == 1


def test_each_clip_has_its_own_trust(model, tiny):
    texts = ["none of it", "apple people"]
    scorer = language_model_scorer(tiny, model.tokenizer, 0.3, None, "cpu", lambda: texts)
    states = Fusion([scorer]).start()
    assert states.shape == (2, 1, 3) and np.diff(states[:, 0, 2])[0] > 0
    asked = language_model_scorer(tiny, model.tokenizer, 0.3, 2.0, "cpu", lambda: 1 / 0)
    assert asked.trust is None  # a bonus of one's own leaves all as it is


def test_kenlms_binary_files_are_named(tmp_path):
    (tmp_path / "lm.bin").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    with pytest.raises(ValueError, match=r"is a KenLM binary file; give the \.arpa"):
        read_arpa(tmp_path / "lm.bin")
