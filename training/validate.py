"""Validation: greedy texts of each set, their word and character error rates."""

import logging

import torch

from fastconformer.metrics import char_errors, word_errors
from training.data import AudioStore, batches_ahead
from training.recipe import Recipe

log = logging.getLogger("finetune")

SAMPLES_SHOWN = 3  # predictions printed for each validation set


@torch.no_grad()
def predict(model, store, heads, recipe: Recipe, check_stop) -> tuple[list[str], dict]:
    """Greedy texts of a validation set: (references, {head: hypotheses}); model in eval mode."""
    durations = [u.duration_s for u in store.utterances]
    waiting = sorted(range(len(durations)), key=lambda i: (-durations[i], i))
    batches = []
    while waiting:
        count = recipe.data.batch_size or len(waiting)
        if recipe.data.batch_duration_s is not None:
            longest_s = max(durations[waiting[0]], recipe.data.pad_to_s)
            count = min(count, max(1, int(recipe.data.batch_duration_s / longest_s)))
        batches.append(waiting[:count])
        waiting = waiting[count:]
    device = next(model.parameters()).device
    bf16 = recipe.trainer.precision == "bf16"
    texts = {}  # line -> (reference, text of each head)
    for batch in batches_ahead(store, batches, recipe.data.num_workers):
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
    if not texts:
        raise ValueError("no clip of a validation set can be read; see dropped.jsonl")
    # In the manifest's order, so that the samples shown stay the same from run to run.
    references, *by_head = zip(*(texts[line] for line in sorted(texts)), strict=True)
    return list(references), {h: list(t) for h, t in zip(heads, by_head, strict=True)}


def evaluate(model, validation: dict[str, AudioStore], heads, recipe, check_stop) -> dict:
    """{"sets": {name: {head: {"wer", "cer"}}}, "all": {head: {...}}}; prints a few predictions."""
    model.eval()
    sets, all_references, all_hypotheses = {}, [], {head: [] for head in heads}
    for name, store in validation.items():
        references, hypotheses = predict(model, store, heads, recipe, check_stop)
        sets[name] = {head: _rates(references, hypotheses[head]) for head in heads}
        for head in heads:
            all_hypotheses[head] += hypotheses[head]
        all_references += references
        for i in range(0, len(references), -(-len(references) // SAMPLES_SHOWN)):
            log.info("  %s  said: %s", name, references[i])
            for head in heads:
                log.info("  %s  %4s: %s", " " * len(name), head, hypotheses[head][i])
        for head in heads:
            rates = sets[name][head]
            log.info("  %s  %s  WER %.2f %%  CER %.2f %%", name, head, *percent(rates))
    return {"sets": sets, "all": {h: _rates(all_references, all_hypotheses[h]) for h in heads}}


def _rates(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    return {
        "wer": word_errors(references, hypotheses).rate,
        "cer": char_errors(references, hypotheses).rate,
    }


def percent(rates: dict[str, float]) -> tuple[float, float]:
    return 100 * rates["wer"], 100 * rates["cer"]
