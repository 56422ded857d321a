"""Greedy text of a language model behind a prompt of embeddings, for a batch of clips.

Prompts are padded on the left, so that all texts go on in the same column; positions count from
each prompt's own first row, so that a clip in a batch gets the text that it gets alone.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..networks.qwen3 import KeyValueCache, Qwen3
from .confidence import Confidence
from .hypothesis import Hypothesis

MAX_TOKENS = 512
CANDIDATES = 64  # the entropy of 150,000 unlikely tokens would drown that of the likely ones
GUARD_PERIOD = 32  # longest phrase, in tokens, whose repetition is looked for
GUARD_COPIES, GUARD_TOKENS = 6, 32  # so often in a row, and so many tokens together

logger = logging.getLogger(__name__)


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts (S_i, D) -> embeddings (B, S, D), zeros in front, and (B, S), True on prompts."""
    longest = max(len(prompt) for prompt in prompts)
    embeds = prompts[0].new_zeros(len(prompts), longest, prompts[0].shape[1])
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool, device=embeds.device)
    for row, prompt in enumerate(prompts):
        embeds[row, longest - len(prompt) :] = prompt
        valid[row, longest - len(prompt) :] = True
    return embeds, valid


@torch.no_grad()
def llm_greedy(
    llm: Qwen3,
    prompts: Sequence[Tensor],
    max_tokens: int = MAX_TOKENS,
    confidence: Confidence | None = None,
    max_repeats: int | None = None,
) -> list[Hypothesis]:
    """The most likely token, one after the other, until the model ends its answer.

    Args:
        prompts: embeddings of each clip's prompt, speech included, (S_i, D).
        max_tokens: longest answer, its end included.
        confidence: also give the confidence of each token, among the likeliest CANDIDATES.
        max_repeats: a phrase that comes again more often than this right after itself ends the
            answer, and is kept once: so a model runs on when it has lost the speech. None: it takes
            6 copies in a row, of 32 tokens together; negative: nothing does.
    Returns:
        Hypotheses without frames; tokens without the end. The score sums log-probabilities, that
        of the end included.
    Raises:
        ValueError: prompt and answer together are longer than the model's positions.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
    config, end = llm.config, llm.config.eos_token_id
    embeds, valid = left_padded(prompts)
    if embeds.shape[1] + 1 > config.max_positions:
        raise ValueError(
            f"the prompt has {embeds.shape[1]} tokens, the language model {config.max_positions} "
            "positions; give a shorter clip or fewer hotwords"
        )
    max_tokens = min(max_tokens, config.max_positions - embeds.shape[1])
    found = [Hypothesis(confidences=[] if confidence else None) for _ in prompts]
    rows = list(range(len(prompts)))  # clips that are not at their end, by row of the batch
    cache = KeyValueCache(config, len(rows), embeds.shape[1], embeds)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    hidden = llm(embeds, valid, positions, cache)[:, -1]  # (B, D)
    last = positions[:, -1:]
    for _ in range(max_tokens):
        log_probs = llm.lm_head(hidden).float().log_softmax(-1)  # (B, V)
        best, tokens = log_probs.max(-1)
        sure = _confidences(log_probs, confidence) if confidence else None
        going = []
        columns = rows, best.tolist(), tokens.tolist()
        for row, (clip, score, token) in enumerate(zip(*columns, strict=True)):
            hypothesis = found[clip]
            hypothesis.score += score
            if token == end:
                continue
            hypothesis.tokens.append(token)
            if sure:
                hypothesis.confidences.append(sure[row])
            if not cut_repetition(hypothesis, max_repeats):
                going.append(row)
        if not going:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=embeds.device)
            cache.keep(kept)
            rows = [rows[row] for row in going]
            valid, last, tokens = valid[kept], last[kept], tokens[kept]
        valid = torch.cat((valid, valid.new_ones(len(rows), 1)), dim=1)
        last = last + 1
        hidden = llm(llm.embed(tokens[:, None]), valid, last, cache)[:, -1]
    return found


def _confidences(log_probs: Tensor, confidence: Confidence) -> list[float]:
    """(B, V) -> of each text's next token."""
    count = min(CANDIDATES, log_probs.shape[-1])
    return confidence.of(log_probs.topk(count).values.log_softmax(-1), count).tolist()


def cut_repetition(hypothesis: Hypothesis, max_repeats: int | None = None) -> bool:
    """Whether the tokens end in a phrase that came too often; all but its first copy go then."""
    tokens = hypothesis.tokens
    if max_repeats is not None and max_repeats < 0:
        return False
    for period in range(1, GUARD_PERIOD + 1):
        copies = max(GUARD_COPIES, -(-GUARD_TOKENS // period))
        copies = copies if max_repeats is None else max_repeats + 2
        run = copies * period
        if len(tokens) < run or tokens[-1] != tokens[-1 - period]:
            continue
        if tokens[-run + period :] == tokens[-run:-period]:
            first = len(tokens) - run
            while first > 0 and tokens[first - 1] == tokens[first - 1 + period]:
                first -= 1
            logger.warning(
                "a text repeated the same %d tokens %d times, and was cut there", period, copies
            )
            del tokens[first + period :]
            if hypothesis.confidences:
                del hypothesis.confidences[first + period :]
            return True
    return False
