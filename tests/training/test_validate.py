"""What validation compares: a model that writes its references is perfect, whatever the script."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from converters.train_tokenizer import train_tokenizer
from fastconformer.decoding import Hypothesis
from fastconformer.heads import Head
from fastconformer.text.metrics import word_errors
from fastconformer.text.tokenizer import SentencePieceTokenizer
from training.data.store import AudioStore
from training.data.utterances import Utterance
from training.loop.validate import results_table, validate
from training.recipe.data_sections import DataRecipe

RATE = 16000
TEXTS = {
    "Persian (U+200C)": ["می\u200cخواهم به خانه\u200cام بروم", "کتاب\u200cها را آورد"],
    "Thai (sara am)": ["ผมทำงานที่นี่ น้ำใจ งดงาม", "คำถาม ง่ายมาก"],
    "Arabic (ligature)": ["قال النبي ﷺ ذلك", "محمد ﷺ رسول الله"],
    "English, quotes and signs": ["he said 'hello' to me", "rock 'n' roll", "black & white"],
}


class Writes(nn.Module):
    """Says of each clip, which it knows by its length, one of these texts."""

    config = SimpleNamespace(prompts=None)

    def __init__(self, tokenizer, texts: list[str]):
        super().__init__()
        self.tokenizer, self.texts, self.weight = tokenizer, texts, nn.Parameter(torch.zeros(1))

    def featurize(self, audio, lengths):
        return audio, lengths

    encode = featurize

    def head(self, name):
        return Head(self, name)

    def decode(self, encoded, lengths, head):
        texts = [self.texts[int(n) // 100 - 1] for n in lengths]
        return [Hypothesis(self.tokenizer.encode(text), [], None, 0.0) for text in texts]


def measure(tokenizer, said: list[str], heard: list[str], folder) -> dict:
    clips = []
    for i, text in enumerate(said):
        samples = np.full(100 * (i + 1), 0.1)
        soundfile.write(folder / f"{i}.wav", samples, RATE)
        path, seconds = str(folder / f"{i}.wav"), len(samples) / RATE
        clips.append(Utterance(path, text, seconds, None, "dev.jsonl", i + 1))
    store = AudioStore(clips, RATE, cache_gb=0.0)
    model, data = Writes(tokenizer, heard), DataRecipe(num_workers=0, pad_to_s=0.0)
    return validate(model, {"dev": store}, ("ctc",), data, False, lambda: None)


@pytest.mark.parametrize("script", TEXTS)
def test_a_perfect_model_has_no_errors(script, tmp_path):
    texts = TEXTS[script]
    model = train_tokenizer(texts * 4, len(set("".join(texts))) + 16)
    result = measure(SentencePieceTokenizer(model), texts, texts, tmp_path)
    rates = result["sets"]["dev"]["ctc"]
    assert rates["wer"] == rates["cer"] == result["all"]["ctc"]["wer"] == 0
    assert rates["raw_wer"] > 0.3  # what the tokenizer normalises away
    record = {"head": "ctc", "wer": 0.0, **result}
    assert "raw WER" in results_table(record)
    # a tokenizer that keeps the script's signs has nothing to tell
    model = train_tokenizer(texts * 4, len(set("".join(texts))) + 16, normalization="identity")
    rates = measure(SentencePieceTokenizer(model), texts, texts, tmp_path)["all"]["ctc"]
    assert rates["wer"] == 0
    if "English" not in script:  # whose signs the decoder glues to the word before them
        assert rates["raw_wer"] == 0


def test_errors_are_counted_beside_what_can_be_written(tmp_path):
    texts = TEXTS["Persian (U+200C)"]
    tokenizer = SentencePieceTokenizer(train_tokenizer(texts * 4, 40))
    heard = [texts[0], "کتاب را آورد"]
    rates = measure(tokenizer, texts, heard, tmp_path)["all"]["ctc"]
    written = [tokenizer.decode(tokenizer.encode(text)) for text in (*texts, *heard)]
    assert (
        rates["wer"] == pytest.approx(word_errors(written[:2], written[2:]).rate) and rates["wer"]
    )
