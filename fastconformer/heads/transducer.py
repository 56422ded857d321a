"""Transducers: RNNT, and TDT, whose joint also says how many frames to advance.

Source: Graves 2012 (arXiv:1211.3711), Xu et al. 2023 (arXiv:2304.06795); NeMo's RNNTDecoder and
RNNTJoint, and its timestamps for the spans.
"""

import itertools

import torch
from torch import nn

from ..config import ModelConfig
from ..decoding import (
    DecodingOptions,
    Hypothesis,
    transducer_beam,
    transducer_greedy,
    transducer_next,
)
from ..losses import fused_transducer_loss, rnnt_loss
from ..networks.graphs import GraphCache
from ..networks.heads import Joint, PredictionNetwork, StatelessNetwork
from ..networks.linear import Int8Weight
from ..recordings.timestamps import Span
from ..text.tokenizer import Tokenizer
from ..transfers import sent
from .head import Head


class Transducer(Head):
    """RNNT where the config names no durations, else TDT."""

    family = "transducer"
    has_lattice = True
    can_stall = True
    bounds_tokens_per_frame = True
    loss_arguments = ("eps", "report")

    @staticmethod
    def networks(config: ModelConfig) -> dict[str, nn.Module]:
        network = StatelessNetwork if config.decoder.context_size else PredictionNetwork
        decoder, joint = network(config.decoder), Joint(config.joint)
        joint.graphs = GraphCache()  # decoding's steps as CUDA graphs, kept between calls
        return {"decoder": decoder, "joint": joint}

    @staticmethod
    def n_layers(config: ModelConfig) -> int:
        return config.decoder.context_size or config.decoder.pred_rnn_layers

    @staticmethod
    def frame_bytes(config: ModelConfig, itemsize: int) -> int:
        return config.joint.joint_hidden * itemsize  # its projection in the joint

    @staticmethod
    def fit(networks: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
        if f"decoder.{PredictionNetwork.embedding_norm}" in state_dict:
            networks.decoder.add_embedding_norm()

    @property
    def durations(self) -> tuple[int, ...]:
        """Frames that each duration class advances; empty for RNNT."""
        return self.model.config.loss.durations

    @property
    def modules(self) -> dict[str, str]:
        return {"prediction": "decoder", "joint": "joint"}

    def token_layers(self) -> dict[str, nn.Module]:
        joint, decoder = self.model.joint, self.model.decoder
        embeddings = decoder.embeddings()
        return {
            **{f"decoder.prediction.{name}": layer for name, layer in embeddings.items()},
            f"joint.joint_net.{len(joint.joint_net) - 1}": joint.joint_net[-1],
        }

    @property
    def blank_competes(self) -> bool:
        return not self.tokens_share

    @property
    def tokens_share(self) -> bool:
        return self.model.joint.blank_pred is not None

    def logits(self, encoded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        joint, predicted = self.model.joint, self.model.decoder(tokens[None])
        summed = joint.enc(encoded)[:, :, None] + joint.pred(predicted)[:, None]
        return joint.joint_net(summed).flatten(0, 2)

    def int8_parts(self) -> list[nn.Module]:
        return [self.model.decoder, self.model.joint.joint_net]

    @property
    def reduction(self) -> str:
        return self.model.config.loss.rnnt_reduction

    @property
    def share(self) -> float:
        return 1 - self.model.config.loss.ctc_weight

    def lattice_logits(self, encoded, targets, target_lengths=None) -> torch.Tensor:
        """See `ASRModel.joint_logits`."""
        if target_lengths is not None:
            targets = _without_padding(targets, target_lengths)
        return self.model.joint(encoded, self.model.decoder(targets))

    def loss(
        self,
        encoded: torch.Tensor,
        encoded_lengths: torch.Tensor,
        targets: torch.Tensor,
        target_lengths: torch.Tensor,
        eps: float = 0.0,
        report: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The joint's logits are never all in memory, but for a HAT joint, whose gradient skips no
        cells; `eps` and `report` as in `fused_transducer_loss`. ValueError: an int8 model."""
        loss, joint = self.model.config.loss, self.model.joint
        if isinstance(joint.joint_net[-1].weight, Int8Weight):
            raise ValueError("an int8 model has no losses; load it with another dtype for that")
        there = sent(targets, encoded.device), sent(target_lengths, encoded.device)
        if joint.blank_pred is not None:
            if report is not None:
                report["active_share"] = torch.ones_like(encoded_lengths, dtype=torch.float32)
            targets, target_lengths = there
            return rnnt_loss(
                self.lattice_logits(encoded, targets, target_lengths),
                *(targets, encoded_lengths, target_lengths, self.model.blank_id),
                fastemit_lambda=loss.fastemit_lambda,
                clamp=loss.clamp,
                reduction="none",
            )
        predicted = self.model.decoder(_without_padding(*there))
        return fused_transducer_loss(
            joint.enc(encoded),
            joint.pred(predicted),
            joint.joint_net[-1].weight,
            joint.joint_net[-1].bias,
            targets,
            encoded_lengths,
            target_lengths,
            durations=loss.durations or None,
            blank=self.model.blank_id,
            sigma=loss.sigma if loss.durations else 0.0,
            omega=loss.omega if loss.durations and self.model.training else 0.0,
            fastemit_lambda=loss.fastemit_lambda,
            clamp=loss.clamp,
            activation=joint.activation,
            dropout=joint.dropout,
            eps=eps,
            reduction="none",
            report=report,
        )

    def decode(
        self, encoded: torch.Tensor, lengths: torch.Tensor, options: DecodingOptions
    ) -> list[Hypothesis]:
        model = self.model
        parts = encoded, lengths, model.decoder, model.joint, model.blank_id
        common = {
            "bias": options.bias(model.tokenizer, encoded.device),
            "confidence": options.confidence,
            "durations": self.durations,
            "max_symbols": model.config.max_symbols,
        }

        def greedy() -> list[Hypothesis]:
            graphs = model.joint.graphs if encoded.is_cuda else None
            return transducer_greedy(*parts, graphs=graphs, **common)

        if options.is_greedy:
            return greedy()
        fusion = options.fusion(model.tokenizer, encoded.device, greedy)
        return transducer_beam(
            *parts,
            options.beam,
            fusion=fusion,
            blank_scale=options.lm_weight * fusion.trust if options.lm is not None else 0.0,
            score_norm=options.score_norm,
            **common,
        )

    def first_hypothesis(self) -> Hypothesis:
        return Hypothesis(durations=[] if self.durations else None)

    def decode_next(self, hypotheses, encoded, first_frames, state) -> list[torch.Tensor]:
        model = self.model
        return transducer_next(
            *(hypotheses, encoded, first_frames, state),
            *(model.decoder, model.joint, model.blank_id),
            self.durations,
            model.config.max_symbols,
        )

    def token_spans(self, hypothesis: Hypothesis, tokenizer: Tokenizer) -> list[Span]:
        """TDT: from frame to frame + duration, punctuation at the end of the token before. RNNT:
        the frame."""
        spans = super().token_spans(hypothesis, tokenizer)
        for before, span in itertools.pairwise(spans if self.durations else ()):
            if span.text[:1] and span.text[0] in tokenizer.punctuation:
                span.start = span.end = before.end
        return spans


def _without_padding(targets: torch.Tensor, target_lengths: torch.Tensor) -> torch.Tensor:
    beyond = torch.arange(targets.shape[1], device=targets.device) >= target_lengths[:, None]
    return targets.masked_fill(beyond, 0)
