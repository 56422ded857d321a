"""CTC: one linear layer, the sum over all alignments, and the best class of each frame.

Source: Graves et al. 2006; NeMo's ConvASRDecoder, and `ctc_decoding` for scores and spans.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from ..config import CTC_CLASSES, ModelConfig
from ..decoding import DecodingOptions, Hypothesis, ctc_beam, ctc_greedy, ctc_next
from ..decoding.ctc import LOG_PROBS
from ..networks.heads import CTCHead
from ..recordings.timestamps import Span, spans_of_tokens
from ..text.tokenizer import Tokenizer
from ..transfers import sent
from .head import Head


def _attribute(config: ModelConfig) -> str:
    # NeMo calls a CTC model's head `decoder`, a hybrid's `ctc_decoder`
    return "decoder" if config.class_name in CTC_CLASSES else "ctc_decoder"


class CTC(Head):
    """See the module's docstring."""

    family = "ctc"
    has_frame_posteriors = True
    needs_frame_per_token = True

    @staticmethod
    def networks(config: ModelConfig) -> dict[str, nn.Module]:
        return {_attribute(config): CTCHead(config.ctc)}

    @property
    def module(self) -> CTCHead:
        return getattr(self.model, _attribute(self.model.config))

    @property
    def modules(self) -> dict[str, str]:
        return {"ctc": _attribute(self.model.config)}

    def token_layers(self) -> dict[str, nn.Module]:
        return {f"{_attribute(self.model.config)}.decoder_layers.0": self.module.decoder_layers[0]}

    def logits(self, encoded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.module(encoded)[0]

    @property
    def reduction(self) -> str:
        return self.model.config.loss.ctc_reduction

    @property
    def share(self) -> float:
        return self.model.config.loss.ctc_weight

    def log_probs(self, encoded: torch.Tensor, lengths: torch.Tensor | None = None):
        return self.module(encoded).float().log_softmax(-1)

    def loss(self, encoded, encoded_lengths, targets, target_lengths) -> torch.Tensor:
        return F.ctc_loss(
            self.log_probs(encoded).transpose(0, 1),
            sent(targets, encoded.device),
            encoded_lengths,
            target_lengths,
            blank=self.model.blank_id,
            reduction="none",
            zero_infinity=True,  # as NeMo: a text longer than the frames trains nothing
        )

    def decode(
        self, encoded: torch.Tensor, lengths: torch.Tensor, options: DecodingOptions
    ) -> list[Hypothesis]:
        tokenizer = self.model.tokenizer
        common = {
            "bias": options.bias(tokenizer, encoded.device),
            "confidence": options.confidence,
        }

        def greedy() -> list[Hypothesis]:
            size = max(1, LOG_PROBS // (max(1, len(encoded)) * (self.model.blank_id + 1)))
            pieces = (self.log_probs(piece) for piece in encoded.split(size, dim=1))
            return ctc_greedy(pieces, lengths, **common)

        if options.is_greedy:
            return greedy()
        fusion = options.fusion(tokenizer, encoded.device, greedy)
        return ctc_beam(self.log_probs(encoded), lengths, options.beam, fusion, **common)

    def first_hypothesis(self) -> Hypothesis:
        return Hypothesis(durations=[])

    def decode_next(self, hypotheses, encoded, first_frames, state) -> list[torch.Tensor]:
        return ctc_next(hypotheses, self.log_probs(encoded), first_frames, state)

    def token_spans(self, hypothesis: Hypothesis, tokenizer: Tokenizer) -> list[Span]:
        """From the token before to its own frame, which is how NeMo counts. Punctuation has no
        extent."""
        frames = hypothesis.frames
        starts = [max(0, frames[0] - 1), *frames[:-1]] if frames else []
        spans = spans_of_tokens(hypothesis, tokenizer, starts, frames)
        for _, span in itertools.pairwise(spans):
            if span.text[:1] and span.text[0] in tokenizer.punctuation:
                span.end = span.start
        return spans
