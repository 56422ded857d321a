"""Validation: greedy texts of each set, their word and character error rates."""

import logging

import torch

from fastconformer.text.metrics import char_errors, word_errors
from training.data.store import AudioStore, batches_ahead
from training.loop.ranks import ONE, Ranks
from training.recipe.data_sections import DataRecipe

log = logging.getLogger("finetune")

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
) -> tuple[list[str], dict]:
    """Greedy texts of a validation set: (references, {head: hypotheses}); model in eval mode. Each
    process reads its share, and all get all."""
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
    texts = {}  # line -> (reference, text of each head)
    for batch in batches_ahead(store, batches[ranks.rank :: ranks.world], data.num_workers):
        check_stop()
        if batch is None:
            continue
        batch = batch.to(device)
        features, lengths = model.featurize(batch.audio, batch.audio_lengths)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            encoded, lengths = model.encode(features, lengths)
            found = [model.decode_greedy(encoded, lengths, head) for head in heads]
        for utterance, *hypotheses in zip(batch.utterances, *found, strict=True):
            decoded = [model.tokenizer.decode(hypothesis.tokens) for hypothesis in hypotheses]
            texts[utterance.line] = (utterance.text, *decoded)
    texts = {line: text for share in ranks.gather(texts) for line, text in share.items()}
    if not texts:
        raise ValueError("no clip of a validation set can be read; see dropped.jsonl")
    # In the manifest's order, so that the samples shown stay the same from run to run.
    references, *by_head = zip(*(texts[line] for line in sorted(texts)), strict=True)
    return list(references), {h: list(t) for h, t in zip(heads, by_head, strict=True)}


def validate(
    model,
    validation: dict[str, AudioStore],
    heads,
    data: DataRecipe,
    bf16: bool,
    check_stop,
    ranks: Ranks = ONE,
) -> dict:
    """{"sets": {name: {head: {"wer", "cer"}}}, "all": {head: {...}}}; prints a few predictions."""
    model.eval()
    sets, all_references, all_hypotheses = {}, [], {head: [] for head in heads}
    for name, store in validation.items():
        references, hypotheses = predict(model, store, heads, data, bf16, check_stop, ranks)
        sets[name] = {head: _rates(references, hypotheses[head]) for head in heads}
        for head in heads:
            all_hypotheses[head] += hypotheses[head]
        all_references += references
        for i in range(0, len(references), -(-len(references) // SAMPLES_SHOWN)):
            log.info("  %s  said: %s", name, references[i])
            for head in heads:
                log.info("  %s  %4s: %s", " " * len(name), head, hypotheses[head][i])
    return {"sets": sets, "all": {h: _rates(all_references, all_hypotheses[h]) for h in heads}}


def results_table(record: dict, baseline: dict | None = None) -> str:
    """Error rates in percent of every set and head, one a line, beside the untouched model's."""
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
    return "\n".join(lines)


def _rates(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    return {
        "wer": word_errors(references, hypotheses).rate,
        "cer": char_errors(references, hypotheses).rate,
    }


def percent(rates: dict[str, float]) -> tuple[float, float]:
    return 100 * rates["wer"], 100 * rates["cer"]
