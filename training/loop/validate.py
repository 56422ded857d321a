"""Validation: greedy texts of each set, their word and character error rates.

A text is compared as the tokenizer can write it, `decode(encode(text))`, so that a perfect model
has 0 %; the manifest's own text, with what the tokenizer normalises away, gives the raw rates.
Source: NeMo's WER, which decodes the target tokens.
"""

import logging

import torch

from fastconformer.text.metrics import align, char_errors, word_errors
from fastconformer.text.tokenizer import Tokenizer
from fastconformer.transfers import sent
from training.data.store import AudioStore, batches_ahead
from training.data.utterances import Utterance
from training.loop.ranks import ONE, Ranks
from training.recipe.data_sections import DataRecipe

log = logging.getLogger("finetune")

WORST_KEPT = 50  # clips that the report may show
SAMPLES_SHOWN = 3  # predictions printed for each validation set


@torch.no_grad()
def predict(
    model,
    store: AudioStore,
    heads,
    data: DataRecipe,
    bf16: bool,
    check_stop,
    ranks: Ranks = ONE,
) -> tuple[list[Utterance], dict[str, list[str]]]:
    """Greedy texts of a validation set: (its clips that can be read, {head: their texts}); model in
    eval mode. Each process reads its share, and all get all."""
    durations = [u.duration_s for u in store.utterances]
    waiting = sorted(range(len(durations)), key=lambda i: (-durations[i], i))
    batches = []
    while waiting:
        count = data.batch_size or len(waiting)
        if data.batch_duration_s is not None:
            longest_s = max(durations[waiting[0]], data.pad_to_s)
            count = min(count, max(1, int(data.batch_duration_s / longest_s)))
        batches.append(waiting[:count])
        waiting = waiting[count:]
    device = next(model.parameters()).device
    texts = {}  # line -> (clip, text of each head)
    for batch in batches_ahead(store, batches[ranks.rank :: ranks.world], data.num_workers):
        check_stop()
        if batch is None:
            continue
        batch = batch.to(device)
        features, lengths = model.featurize(batch.audio, sent(batch.audio_lengths, device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            lines = [utterance.as_line(data.prompt) for utterance in batch.utterances]
            chosen = [model.head(head) for head in heads]
            arguments = [head.parted(head.for_lines(lines)) for head in chosen]
            encoded, lengths = model.encode(features, lengths, **arguments[0][0])
            found = [
                model.decode(encoded, lengths, head.name, **own)
                for head, (_, own) in zip(chosen, arguments, strict=True)
            ]
        for utterance, *hypotheses in zip(batch.utterances, *found, strict=True):
            decoded = [head.text(h) for head, h in zip(chosen, hypotheses, strict=True)]
            texts[utterance.line] = (utterance, *decoded)
    texts = {line: text for share in ranks.gather(texts) for line, text in share.items()}
    if not texts:
        raise ValueError("no clip of a validation set can be read; see dropped.jsonl")
    # In the manifest's order, so that the samples shown stay the same from run to run.
    utterances, *by_head = zip(*(texts[line] for line in sorted(texts)), strict=True)
    return list(utterances), {h: list(t) for h, t in zip(heads, by_head, strict=True)}


def as_written(tokenizer: Tokenizer, utterance: Utterance) -> str:
    """A clip's text as the tokenizer writes it; as it stands where its language is none of the
    tokenizer's."""
    try:
        tokens = tokenizer.of_language(utterance.lang).encode(utterance.text)
    except ValueError:
        return utterance.text
    return tokenizer.decode(tokens)


def validate(
    model,
    validation: dict[str, AudioStore],
    heads,
    data: DataRecipe,
    bf16: bool,
    check_stop,
    ranks: Ranks = ONE,
) -> dict:
    """{"sets": {name: {head: rates}}, "all": {head: rates}, "emission": characters of the first
    head over those that were said, "worst": its worst clips}, rates being {"wer", "cer",
    "raw_wer", "raw_cer"}; prints a few predictions."""
    model.eval()
    sets, everything, worst = {}, Texts(heads), []
    for name, store in validation.items():
        utterances, hypotheses = predict(model, store, heads, data, bf16, check_stop, ranks)
        written = [as_written(model.tokenizer, utterance) for utterance in utterances]
        texts = Texts(heads)
        for all_texts in (texts, everything):
            all_texts.add(written, [utterance.text for utterance in utterances], hypotheses)
        sets[name] = texts.rates()
        worst += worst_of(utterances, written, hypotheses[heads[0]])
        for i in range(0, len(written), -(-len(written) // SAMPLES_SHOWN)):
            log.info("  %s  said: %s", name, written[i])
            for head in heads:
                log.info("  %s  %4s: %s", " " * len(name), head, hypotheses[head][i])
    worst.sort(key=lambda item: -item["errors"])
    said = sum(map(len, everything.written))
    heard = sum(map(len, everything.hypotheses[heads[0]]))
    return {
        "sets": sets,
        "all": everything.rates(),
        "emission": heard / max(1, said),
        "worst": worst[:WORST_KEPT],
    }


def worst_of(utterances: list[Utterance], written: list[str], heard: list[str]) -> list[dict]:
    """The clips with the most wrong words, as the report shows them."""
    found = []
    for utterance, said, text in zip(utterances, written, heard, strict=True):
        edits = align(said.split(), text.split())
        errors = sum(edit.reference != edit.hypothesis for edit in edits)
        found.append((errors, utterance, said, text))
    found.sort(key=lambda item: -item[0])
    return [
        {
            "errors": errors,
            "name": utterance.audio_name,
            "audio": utterance.audio_path,
            "offset": utterance.offset_s,
            "duration": utterance.duration_s,
            "tar": utterance.tar_member is not None,
            "channel": utterance.channel,
            "text": utterance.text,
            "said": said,
            "heard": text,
        }
        for errors, utterance, said, text in found[:WORST_KEPT]
    ]


class Texts:
    """References and what each head wrote."""

    def __init__(self, heads):
        self.written, self.raw = [], []
        self.hypotheses: dict[str, list[str]] = {head: [] for head in heads}

    def add(self, written: list[str], raw: list[str], hypotheses: dict[str, list[str]]) -> None:
        self.written += written
        self.raw += raw
        for head, texts in hypotheses.items():
            self.hypotheses[head] += texts

    def rates(self) -> dict[str, dict[str, float]]:
        return {
            head: _rates(self.written, texts)
            | {f"raw_{kind}": rate for kind, rate in _rates(self.raw, texts).items()}
            for head, texts in self.hypotheses.items()
        }


def results_table(record: dict, baseline: dict | None = None) -> str:
    """Error rates in percent of every set and head, one a line, beside the untouched model's; a
    line more where the tokenizer cannot write what the manifests say."""
    rows = [("set", "head", "WER %", "CER %", "WER before", "CER before")]
    sets = {**record["sets"], "all": record["all"]}
    before = {**baseline["sets"], "all": baseline["all"]} if baseline else {}
    for name, heads in sets.items():
        for head, rates in heads.items():
            old = before.get(name, {}).get(head)
            old = percent(old) if old else ()
            cells = [f"{value:.2f}" for value in (*percent(rates), *old)]
            rows.append((name, head, *cells, *[""] * (4 - len(cells))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, head, *cells in rows if before else [row[:4] for row in rows]:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=False))
        lines.append("  ".join((f"  {name:<{widths[0]}}", f"{head:<{widths[1]}}", *numbers)))
    raw = record["all"][record["head"]].get("raw_wer", record["wer"])
    if raw != record["wer"]:
        lines.append(
            f"  raw WER {100 * raw:.2f} %: beside the texts as the manifests have them, which the "
            "tokenizer cannot write"
        )
    return "\n".join(lines)


def _rates(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    return {
        "wer": word_errors(references, hypotheses).rate,
        "cer": char_errors(references, hypotheses).rate,
    }


def percent(rates: dict[str, float]) -> tuple[float, float]:
    return 100 * rates["wer"], 100 * rates["cer"]
