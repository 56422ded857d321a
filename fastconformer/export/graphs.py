"""The parts of a model that clients call, as modules to trace: encoder, CTC head, decoder step.

Names, shapes and order of inputs and outputs are those of NeMo's own exports, which the clients
read. Letters as in the networks; L LSTM layers, H their width.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from ..model import ASRModel
from ..networks.heads import Joint, PredictionNetwork
from .attention import traceable

FRAMES = 97  # of the example that a graph is traced with: no size in the graph comes from it


@dataclass(frozen=True)
class Graph:
    """A module to trace, with an example; `dynamic` names the axes that are free, by input or
    output name."""

    module: nn.Module
    example: tuple[torch.Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)


class Encoded(nn.Module):
    """What heads take: encoded frames, told a language where the model knows some. None named: the
    one that it takes then."""

    def __init__(self, model: ASRModel):
        super().__init__()
        self.encoder, self.prompts = traceable(model.encoder), model.config.prompts
        if self.prompts is not None:
            self.prompt_kernel, self.language = model.prompt_kernel, self.prompts.index({})

    def told(self, encoded: torch.Tensor, lengths: torch.Tensor, languages=None) -> torch.Tensor:
        """encoded (B, T', D), lengths (B,), languages None or (B,) int64 -> (B, T', D)."""
        if self.prompts is None:
            return encoded
        languages = torch.full_like(lengths, self.language) if languages is None else languages
        return self.prompt_kernel(encoded, languages)


class Encoder(Encoded):
    """Features to encoded frames, in NeMo's order (B, D, T')."""

    def forward(self, audio_signal: torch.Tensor, length: torch.Tensor):
        encoded, lengths = self.encoder(audio_signal, length)
        return self.told(encoded, lengths).transpose(1, 2), lengths


class EncoderCTC(Encoded):
    """Features to log-probabilities (B, T', V+1)."""

    def __init__(self, model: ASRModel):
        super().__init__(model)
        layer = model.frame_head.module.decoder_layers[0]
        self.weight, self.bias = nn.Parameter(layer.weight.detach()[..., 0]), layer.bias

    def forward(self, audio_signal: torch.Tensor, length: torch.Tensor):
        encoded, lengths = self.encoder(audio_signal, length)
        return F.linear(self.told(encoded, lengths), self.weight, self.bias).log_softmax(-1)


class Decoder(nn.Module):
    """One step of the prediction network. The blank stands for the start: a zero vector."""

    def __init__(self, decoder: PredictionNetwork, blank_id: int):
        super().__init__()
        self.decoder, self.blank_id = decoder, blank_id

    def forward(self, targets, target_length, h, c):
        """targets (B, 1) int32, h and c (L, B, H) -> (B, H, 1), target_length, h, c."""
        embed = self.decoder.prediction["embed"]
        embedded = embed(targets.long().clamp(max=embed.num_embeddings - 1))
        embedded = embedded.masked_fill((targets == self.blank_id)[..., None], 0.0)
        out, (h, c) = self.decoder.prediction["dec_rnn"](embedded, (h, c))
        return out.transpose(1, 2), target_length, h, c


class Joiner(nn.Module):
    """Encoded frame (B, D, 1) and decoder output (B, H, 1) to logits (B, 1, 1, V+1+N)."""

    def __init__(self, joint: Joint):
        super().__init__()
        self.joint = joint

    def forward(self, encoder_outputs: torch.Tensor, decoder_outputs: torch.Tensor):
        return self.joint(encoder_outputs.transpose(1, 2), decoder_outputs.transpose(1, 2))


class DecoderJoint(nn.Module):
    """A step of decoder and joiner in one."""

    def __init__(self, model: ASRModel):
        super().__init__()
        self.decoder, self.joiner = Decoder(model.decoder, model.blank_id), Joiner(model.joint)

    def forward(self, encoder_outputs, targets, target_length, h, c):
        out, target_length, h, c = self.decoder(targets, target_length, h, c)
        return self.joiner(encoder_outputs, out), target_length, h, c


def features_example(model: ASRModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips, one padded, so that no axis is 1 and the masks are in the graph."""
    features = torch.randn(2, model.config.encoder.feat_in, FRAMES)
    return features, torch.tensor([FRAMES, FRAMES - 40])


_AUDIO = {"audio_signal": {0: "batch", 2: "frames"}, "length": {0: "batch"}}


def encoder_graph(model: ASRModel) -> Graph:
    """audio_signal (B, M, T), length (B,) int64 -> outputs (B, D, T'), encoded_lengths."""
    outputs = {"outputs": {0: "batch", 2: "encoded"}, "encoded_lengths": {0: "batch"}}
    names = ("audio_signal", "length")
    return Graph(Encoder(model), features_example(model), names, tuple(outputs), _AUDIO | outputs)


def ctc_graph(model: ASRModel) -> Graph:
    """audio_signal (B, M, T), length (B,) int64 -> logprobs (B, T', V+1)."""
    outputs = {"logprobs": {0: "batch", 1: "encoded"}}
    names = ("audio_signal", "length")
    return Graph(EncoderCTC(model), features_example(model), names, ("logprobs",), _AUDIO | outputs)


def _step(model: ASRModel) -> tuple[torch.Tensor, ...]:
    state = torch.zeros(model.decoder.n_layers, 2, model.decoder.hidden)
    tokens = torch.zeros(2, 1, dtype=torch.int32)
    return tokens, torch.ones(2, dtype=torch.int32), state, state.clone()


def decoder_joint_graph(model: ASRModel) -> Graph:
    """encoder_outputs (B, D, 1), targets (B, 1), target_length (B,) int32, input_states_1 and _2
    (L, B, H) -> outputs (B, 1, 1, V+1+N), prednet_lengths, output_states_1 and _2."""
    frame = torch.randn(2, model.config.encoder.d_out, 1)
    states = {f"{way}_states_{i}": {1: "batch"} for way in ("input", "output") for i in (1, 2)}
    names = ("encoder_outputs", "targets", "target_length", "input_states_1", "input_states_2")
    outputs = ("outputs", "prednet_lengths", "output_states_1", "output_states_2")
    dynamic = {name: {0: "batch"} for name in (*names[:3], *outputs[:2])} | states
    return Graph(DecoderJoint(model), (frame, *_step(model)), names, outputs, dynamic)


def decoder_graph(model: ASRModel) -> Graph:
    """targets (B, 1), target_length (B,) int32, states (L, B, H) -> outputs (B, H, 1), ..."""
    names = ("targets", "target_length", "states.1", "states.2")
    outputs = ("outputs", "prednet_lengths", "states", "next_states")
    dynamic = {name: {0: "batch"} for name in (*names[:2], *outputs[:2])}
    dynamic |= {name: {1: "batch"} for name in (*names[2:], *outputs[2:])}
    module = Decoder(model.decoder, model.blank_id)
    return Graph(module, _step(model), names, outputs, dynamic)


def joiner_graph(model: ASRModel) -> Graph:
    """encoder_outputs (B, D, 1), decoder_outputs (B, H, 1) -> outputs (B, 1, 1, V+1+N)."""
    names = ("encoder_outputs", "decoder_outputs")
    dynamic = {name: {0: "batch"} for name in (*names, "outputs")}
    example = torch.randn(2, model.config.encoder.d_out, 1), torch.randn(2, model.decoder.hidden, 1)
    return Graph(Joiner(model.joint), example, names, ("outputs",), dynamic)
