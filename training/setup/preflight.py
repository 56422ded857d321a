"""Checks of a prepared run before it costs anything: the tokenizer covers the text, durations and
lengths fit, clips can be read, disk and memory suffice."""

import math
import shutil
from collections import Counter
from pathlib import Path

import soundfile
import torch

from fastconformer.audio.files import load_audio
from fastconformer.text.tokenizer import AggregateTokenizer
from training.data.sources import read_source
from training.data.stream import batch_order
from training.data.utterances import Utterance
from training.objective.objective import batch_loss
from training.setup.batch_search import training_step
from training.setup.device import device_memory
from training.setup.prepare import Prepared, run_length

UNKNOWN_SHARE, LEFT_OUT_SHARE = 0.01, 0.1  # above these the preflight fails


def preflight(run: Prepared) -> list[tuple[bool, str]]:
    """(passed, what was found) of each check, cheap ones first."""
    recipe = run.recipe
    checks = [(True, f"weights: {sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M load")]
    lines = [line for source in recipe.data.sources for line in read_source(source, recipe.data)[0]]
    checks += [tokenizer_covers(run, lines), lengths_fit(run, lines), clips_can_be_read(run)]
    checks += [disk_suffices(run), batch_goes_through(run)]
    return checks


def tokenizer_covers(run: Prepared, lines: list[Utterance]) -> tuple[bool, str]:
    """Whether at most one character in a hundred of the training text is unknown; a line with one
    is left out."""
    tokenizer = run.model.tokenizer
    by_lang = isinstance(tokenizer, AggregateTokenizer)
    head, prompt = run.model.head(), run.recipe.data.prompt
    langs = [head.language_of(line.as_line(prompt)) if by_lang else None for line in lines]
    characters = Counter((lang, c) for line, lang in zip(lines, langs) for c in line.text)
    unknown = {key: n for key, n in characters.items() if _is_unknown(tokenizer, *key)}
    share = sum(unknown.values()) / max(1, sum(characters.values()))
    listed = " ".join(c for _, c in sorted(unknown, key=lambda key: -unknown[key])[:20])
    text = f"tokenizer: {tokenizer.vocab_size} pieces, {share:.3%} of characters unknown"
    return share <= UNKNOWN_SHARE, text + (f": {listed}" if unknown else "")


def _is_unknown(tokenizer, lang: str | None, character: str) -> bool:
    if character.isspace():
        return False
    try:
        tokenizer = tokenizer.of_language(lang)
        tokens = tokenizer.encode(character)
    except ValueError:
        return True
    return not tokens or tokenizer.unk_id in tokens


def lengths_fit(run: Prepared, lines: list[Utterance]) -> tuple[bool, str]:
    """Whether the recipe's limits leave out at most a tenth of the lines."""
    seconds, kept = run.train.durations_s, len(run.train.utterances)
    text = f"lengths: {seconds.min():.1f} to {seconds.max():.1f} s"
    if any(source.max_hours or source.max_clips for source in run.recipe.data.sources):
        return True, f"{text}; {kept} clips after the caps"
    share = 1 - kept / max(1, len(lines))
    text += f"; {share:.1%} of {len(lines)} lines left out"
    return share <= LEFT_OUT_SHARE, text + (", see dropped.jsonl of a run" if share else "")


def clips_can_be_read(run: Prepared, count: int = 8) -> tuple[bool, str]:
    """Whether clips spread over the data open, and what their rates are."""
    wanted, rates, trouble = run.model.sample_rate, set(), []
    in_files = [u for u in run.train.utterances if u.tar_member is None]
    for utterance in in_files[:: max(1, len(in_files) // count)]:
        try:
            load_audio(utterance.audio_path, wanted, utterance.offset_s or 0.0, 0.1)
            rates.add(soundfile.info(utterance.audio_path).samplerate)
        except (OSError, ValueError) as error:
            trouble.append(str(error))
    if trouble:
        return False, f"audio: {trouble[0]}"
    text = f"audio: model at {wanted} Hz, clips at {', '.join(f'{r} Hz' for r in sorted(rates))}"
    if min(rates, default=wanted) < wanted:
        text += "; slower ones are resampled up and hold nothing above half their rate"
    return True, text


def disk_suffices(run: Prepared) -> tuple[bool, str]:
    """Whether checkpoints (weights and two moments each) and models have room."""
    recipe = run.recipe
    parameters = sum(p.numel() for p in run.model.parameters())
    state = 2 if recipe.optim.name == "adamw8bit" else 8
    length = run_length(run)
    evaluations = 1 + math.ceil(length.max_steps / length.val_every)
    top = min(evaluations, recipe.keep.top_k or evaluations)
    copies = 4 * (3 + max(0, top - 1)) + (4 if recipe.trainer.ema_decay else 0)
    needed = parameters * ((recipe.trainer.keep_last + 1) * (4 + state) + copies)
    folder = Path(recipe.output).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return free > needed, f"disk: {needed / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free"


def batch_goes_through(run: Prepared) -> tuple[bool, str]:
    """One training step on the batch of the longest clips: its loss, and the memory it took."""
    order = batch_order(run.train, run.rules, 0)
    seconds = run.train.durations_s
    worst = max(order, key=lambda batch: (seconds[batch].max() * len(batch), len(batch)))
    batch = run.train.store.batch(worst)
    if batch is None:
        return False, "batch: no clip of the largest batch can be read"
    batch = batch.to(run.device)
    clips = f"batch: {len(worst)} clips of up to {seconds[worst].max():.1f} s"
    with torch.no_grad():
        loss = float(batch_loss(run.model.eval(), batch, run.objective)[0])
    step = training_step(run)
    with device_memory(run.device, None) as memory:
        peak_gb = memory.peak_gb(lambda: step(batch))
    if peak_gb is None:
        return False, (
            f"{clips} need more than the {memory.limit_gb:.1f} GB that are free; lower "
            "data.batch_duration_s, or let training.find_batch find it"
        )
    text = f"{clips}, loss {loss:.3f}, {peak_gb:.2f} GB in use at most"
    return math.isfinite(loss), text
