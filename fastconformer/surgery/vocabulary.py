"""Moving a model to another vocabulary, piece by piece.

`match_pieces` says which old token each new one is. `change_vocabulary` gives a model in which
every row that belongs to a piece (of the layers that the heads name) is at its new place; blank,
start and duration rows keep theirs, and nothing else changes: encoder, prediction LSTM, joint
projections, the loss with its sigma, omega, durations and reductions. (NeMo's change_vocabulary
resets a TDT loss to RNNT and the reduction to mean_batch, and makes all rows anew.)

`check_transfer` compares the two models on audio before the first step.

Letters of shapes: B clips, T' encoder frames, U tokens, V old and W new tokens, N duration classes.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..config.changes import with_vocabulary
from ..text.sentencepiece_model import BYTE, CONTROL, UNKNOWN, SentencePieceModel
from ..text.tokenizer import AggregateTokenizer, CharTokenizer, Tokenizer

NOISE = 0.02  # of new rows made by "mean", in standard deviations of the old rows
# Logits that new tokens start below the best old one. A mean of old rows is below it anyway; what
# zeros and random rows do on other audio is unknown.
MARGINS = {"mean": 0.5, "zeros": 2.0, "random": 2.0}
LATTICE = 20_000_000  # logits looked at in one piece while checking


# --- which token is which -----------------------------------------------------------------------


def match_pieces(old: Tokenizer, new: Tokenizer) -> list[int | None]:
    """For each new token the id of the same old one, None where there is none.

    The same: equal text and both of them text, both bytes, or both control pieces; the unknown
    piece whatever its name. A character vocabulary's blank is the piece "▁".
    """
    ids = {}
    for i, key in enumerate(_identities(old)):
        ids.setdefault(key, i)
    return [ids.get(key) for key in _identities(new)]


def _identities(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    if isinstance(tokenizer, AggregateTokenizer):  # a piece is of its language
        return [
            (f"{lang} {kind}", text)
            for lang, part in tokenizer.languages.items()
            for kind, text in _identities(part)
        ]
    if isinstance(tokenizer, CharTokenizer):
        return [("text", "▁" if label == " " else label) for label in tokenizer.pieces]
    pieces = SentencePieceModel.from_bytes(tokenizer.processor.serialized_model_proto()).pieces
    kinds = {UNKNOWN: "unknown", BYTE: "byte", CONTROL: "control"}
    return [
        (kinds.get(piece.type, "text"), "" if piece.type == UNKNOWN else piece.text)
        for piece in pieces
    ]


def spellings(old: Tokenizer, new: Tokenizer, sources: list[int | None]) -> list[list[int]]:
    """For each new token that has no source, how the old tokenizer writes the same characters
    (without unknown tokens); empty for all others."""
    identities = _identities(new)
    if isinstance(old, AggregateTokenizer):
        return _spellings_by_language(old, new, sources)
    found = []
    for source, (kind, text) in zip(sources, identities, strict=True):
        ids = _spell(old, text) if source is None and kind == "text" else []
        found.append([i for i in ids if i != old.unk_id])
    return found


def _spellings_by_language(old, new, sources) -> list[list[int]]:
    """A piece of a language that the old tokenizer has is spelled in it; of another language by the
    piece of the same text that comes first in any."""
    anywhere: dict[str, int] = {}
    for i, piece in enumerate(old.pieces):
        anywhere.setdefault(piece, i)
    found, at = [], 0
    for lang, part in new.languages.items():
        for kind, text in _identities(part):
            ids = []
            if sources[at] is None and kind == "text":
                known = old.languages.get(lang)
                ids = _spell(known, text) if known else [anywhere[text]] if text in anywhere else []
                ids = [i for i in ids if known is None or i != known.unk_id]
            found.append(ids)
            at += 1
    return found


def _spell(old: Tokenizer, text: str) -> list[int]:
    if isinstance(old, CharTokenizer):
        return old.encode(text.replace("▁", " ") if " " in old.ids else text)
    if text.startswith("▁"):
        return old.encode(text.replace("▁", " ").strip()) if text != "▁" else []
    # Inside a word: what follows a known letter, so that no "▁" stands in front.
    for letter in "a", "1":
        with_letter, alone = old.encode(f"{letter}{text}"), old.encode(letter)
        if with_letter[: len(alone)] == alone:
            return with_letter[len(alone) :]
    return [i for i in old.encode(text) if old.pieces[i] != "▁"]


# --- moving the rows ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """What a change of vocabulary moved. `sources`: old id of each new token, None for new ones."""

    sources: tuple[int | None, ...]
    n_old: int

    @property
    def moved(self) -> list[int]:
        """New ids that an old row went to."""
        return [i for i, source in enumerate(self.sources) if source is not None]

    @property
    def new(self) -> list[int]:
        return [i for i, source in enumerate(self.sources) if source is None]

    @property
    def keeps_all(self) -> bool:
        """Whether every old token is still there, so that the old output still can be."""
        return {s for s in self.sources if s is not None} == set(range(self.n_old))

    def old_outputs(self, blank: bool = True) -> tuple[Tensor, Tensor]:
        """(old, new) positions of the outputs that are in both, blank included where there is one;
        in old order."""
        pairs = [(s, i) for i, s in enumerate(self.sources) if s is not None]
        pairs = [*sorted(pairs), *([(self.n_old, len(self.sources))] if blank else [])]
        old, new = torch.tensor(pairs).T
        return old, new


def change_vocabulary(
    model,
    tokenizer: Tokenizer,
    files: dict[str, bytes],
    transfer: str = "by_piece",
    new_rows: str = "mean",
    seed: int = 0,
    section: dict | None = None,
) -> tuple:
    """A model with another tokenizer over the same tensors, but for rows of tokens.

    Args:
        files: the tokenizer's, by name, as a checkpoint keeps them; empty for characters.
        transfer: "by_piece", or "none": every token's row is random.
        new_rows: of tokens that the old vocabulary lacks. "mean": of the old tokens that write the
            same characters (of all tokens where none does), with a little noise; "zeros"; "random":
            as NeMo initialises them. Where all old tokens stay, the output biases of new ones are
            lowered so that they do not win.
        seed: of noise and random rows.
        section: keys of the config's `tokenizer` section that name the files, for a model whose
            config names no pieces.
    Returns:
        (the new model, the Change).
    Raises:
        ValueError: unknown names of the rules, or tokenizers of two kinds.
    """
    if model.tokenizer.kind == "agg" and model.tokenizer.bos_id is None:
        raise ValueError(
            f"the model has a tokenizer for each of {', '.join(model.tokenizer.languages)}; such a "
            "vocabulary is changed in multi-task models only, leave model.tokenizer away"
        )
    if (model.tokenizer.kind == "agg") != (tokenizer.kind == "agg"):
        names = ", ".join(getattr(model.tokenizer, "languages", None) or [model.tokenizer.kind])
        raise ValueError(
            f"the model's tokenizer ({names}) and the new one ({tokenizer.kind}) are of two kinds; "
            "give a model with a tokenizer for each language {language: tokenizer}, others one file"
        )
    if transfer not in ("by_piece", "none"):
        raise ValueError(f"transfer is {transfer!r}, expected by_piece or none")
    if new_rows not in ("mean", "zeros", "random"):
        raise ValueError(f"new_rows is {new_rows!r}, expected mean, zeros or random")
    old = model.tokenizer
    sources = match_pieces(old, tokenizer)
    if transfer == "none":
        sources, new_rows = [None] * len(sources), "random"
    change = Change(tuple(sources), old.vocab_size)
    spelled = spellings(old, tokenizer, sources)
    generator = torch.Generator().manual_seed(seed)

    def rows(table: Tensor, fresh: Tensor) -> Tensor:
        """(W, ...) of the old tokens' rows (V, ...); `fresh` are random ones."""
        made = fresh if new_rows == "random" else torch.zeros_like(fresh)
        if new_rows == "mean":
            noise = torch.randn(fresh.shape, generator=generator) * table.float().std() * NOISE
            average = table.float().mean(0)
            for i in change.new:
                ids = spelled[i]
                made[i] = table[ids].float().mean(0) if ids else average
            made = made + noise.to(made)
        made[change.moved] = table[[s for s in sources if s is not None]].to(made)
        return made

    def outputs(weight: Tensor, bias: Tensor, fresh_weight: Tensor, fresh_bias: Tensor):
        """Rows of an output layer, whose last ones (blank, durations) keep their order."""
        n_old = old.vocab_size
        new_bias = rows(bias[:n_old], fresh_bias)
        if change.keeps_all and change.new:
            # The mean of some logits is below the highest; of other rows nothing is known here.
            ceiling = new_bias[change.new] if new_rows == "mean" else bias[:n_old].min()
            new_bias[change.new] = ceiling - MARGINS[new_rows]
        weights = rows(weight[:n_old], fresh_weight)
        return torch.cat([weights, weight[n_old:]]), torch.cat([new_bias, bias[n_old:]])

    n_new, tensors = tokenizer.vocab_size, {}
    for head in map(model.head, model.heads):
        for path, layer in head.token_layers().items():
            weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
            fresh = _fresh_rows(layer, n_new, generator)
            if bias is None:  # an embedding; its padding stays last
                moved = rows(weight[: old.vocab_size], fresh[0])
                made = {"weight": torch.cat([moved, weight[old.vocab_size :]])}
            else:
                moved = outputs(weight, bias.detach(), *fresh)
                made = dict(zip(("weight", "bias"), moved, strict=True))
            n_rows = head.n_rows(path, n_new)
            for part, values in made.items():
                tensors[f"{path}.{part}"] = _padded_rows(values, n_new, n_rows)
    config = ModelConfig.from_nemo(with_vocabulary(model.config.nemo, tokenizer, section))
    return model.changed(config, tensors, tokenizer, files), change


def _padded_rows(values: Tensor, n_tokens: int, n_rows: int | None) -> Tensor:
    """So many rows; those behind the tokens' are padding, of tokens that do not occur. None:
    as they are."""
    if n_rows is None:
        return values
    padding = values[:n_tokens].amin(0, keepdim=True) if values.dim() == 1 else values[:1] * 0
    return torch.cat([values[:n_tokens], padding.expand(n_rows - n_tokens, *values.shape[1:])])


def _fresh_rows(layer: nn.Module, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Weight and bias of n rows as NeMo initialises a layer of this kind."""
    weight = layer.weight
    if isinstance(layer, nn.Embedding):
        return (torch.randn(n, layer.embedding_dim, generator=generator).to(weight),)
    width = weight[0].numel()
    edge = 1 / math.sqrt(width)
    if isinstance(layer, nn.Linear):
        rows = torch.empty(n, width + 1).uniform_(-edge, edge, generator=generator).to(weight)
        return rows[:, :-1], rows[:, -1]
    bound = math.sqrt(6 / (width + n + 1))  # xavier_uniform
    rows = torch.empty(n, *weight.shape[1:]).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(n).uniform_(-edge, edge, generator=generator)
    return rows.to(weight), bias.to(layer.bias)


# --- the proof before the first step ------------------------------------------------------------


class Clips(Protocol):
    """Clips of a batch as `check_transfer` reads them: audio (B, L), audio_lengths (B,), and
    utterances, each with a name."""

    audio: Tensor
    audio_lengths: Tensor
    utterances: Sequence


@torch.no_grad()
def check_transfer(
    original,
    model,
    change: Change,
    batches: Iterable[Clips],
    margin: float = MARGINS["mean"],
) -> str:
    """Raises ValueError unless, on these clips, every old token's logits are what they were and,
    where all old tokens stayed, every head's greedy output too; of one whose tokens share what
    blank leaves it is counted, as a further token takes a little from all.

    New tokens that come within `margin` logits of winning somewhere get lower biases first: the
    only change made here. Both models are left in evaluation mode.

    Returns:
        A line that says what was checked.
    """
    original.eval()
    model.eval()
    new_id = dict(zip(*(ids.tolist() for ids in change.old_outputs(blank=False)), strict=True))
    lowered, largest, scale, n_clips, n_same = {}, 0.0, 1.0, 0, 0
    heard = []
    for batch in batches:
        features = original.featurize(batch.audio, batch.audio_lengths)
        encoded, lengths = original.encode(*features, **original.encoder_inputs(batch.utterances))
        found = {head: original.decode_greedy(encoded, lengths, head) for head in original.heads}
        heard.append((batch, encoded, lengths, found))
        n_clips += len(batch.utterances)
        for head, hypotheses in found.items():
            has_blank = original.head(head).blank_competes
            old_ids, new_ids = change.old_outputs(has_blank)
            n_compared = change.n_old + has_blank  # outputs that compete; durations lie behind them
            for old, new in _logits(original, model, new_id, encoded, lengths, head, hypotheses):
                n_durations = old.shape[-1] - n_compared if has_blank else 0
                pairs = [(old[:, old_ids], new[:, new_ids])]
                if n_durations:
                    pairs.append((old[:, -n_durations:], new[:, -n_durations:]))
                for before, after in pairs:
                    largest = max(largest, float((before - after).abs().max()))
                    scale = max(scale, float(before.abs().max()))
                if change.keeps_all and change.new:
                    rival = new[:, change.new].amax(-1) - old[:, :n_compared].amax(-1)
                    excess = float(rival.max()) + margin
                    if excess > lowered.get(head, 0.01):
                        lowered[head] = excess
    if largest > 1e-5 * scale:
        raise ValueError(
            f"the change of vocabulary alters the logits of old tokens by up to {largest:.2g}"
        )
    for head, by in lowered.items():
        model.head(head).output_layer().bias[change.new] -= by
    for batch, encoded, lengths, found in heard if change.keeps_all else ():
        for head, hypotheses in found.items():
            again = model.decode_greedy(encoded, lengths, head)
            for utterance, x, y in zip(batch.utterances, hypotheses, again, strict=True):
                moved = [new_id[token] for token in x.tokens], x.frames, x.durations
                is_same = moved == (y.tokens, y.frames, y.durations)
                if not is_same and not original.head(head).tokens_share:
                    raise ValueError(
                        f"the change of vocabulary alters what {head} hears in {utterance.name}: "
                        f"{original.tokenizer.decode(x.tokens)!r} becomes "
                        f"{model.tokenizer.decode(y.tokens)!r}"
                    )
                n_same += is_same
    said = [
        f"{len(change.moved)} of {change.n_old} old tokens moved, {len(change.new)} are new",
        f"their logits are equal within {largest:.1g} on {n_clips} clips",
    ]
    if change.keeps_all:
        n_heard = sum(len(hypotheses) for *_, found in heard for hypotheses in found.values())
        of_all = "" if n_same == n_heard else f" of {n_heard}"
        said.append(f"{n_same}{of_all} greedy outputs are unchanged")
    said += [
        f"{head}: biases of new tokens lowered by {by:.1f}" for head, by in lowered.items() if by
    ]
    return "; ".join(said)


def _logits(original, model, new_id, encoded, lengths, head, hypotheses):
    """(n, V+1+N) of the old model and (n, W+1+N) of the new one, in portions: of every frame, and
    where a head reads tokens of every prefix of what it heard, of tokens that both have."""
    before, after = original.head(head), model.head(head)
    n_outputs = len(after.output_layer().bias)
    for clip, length, hypothesis in zip(encoded, lengths.tolist(), hypotheses, strict=True):
        kept = [token for token in hypothesis.tokens if token in new_id]
        tokens = torch.tensor([kept, [new_id[token] for token in kept]], dtype=torch.int64)
        tokens = tokens.to(clip.device)
        size = max(1, LATTICE // (n_outputs * (len(kept) + 1)))
        for portion in clip[None, :length].split(size, 1):
            yield before.logits(portion, tokens[0]), after.logits(portion, tokens[1])
