"""Output heads: CTC, prediction networks and joint, and what tells them a language.

Source: NeMo's ConvASRDecoder, RNNTDecoder, StatelessTransducerDecoder, RNNTJoint, HATJoint and
PromptStreamingMixin. All return logits or states; losses and decoders are functions elsewhere.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from ..config import CTCConfig, JointConfig, PredictionConfig
from .linear import Int8Weight, Linear, linear

_ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class CTCHead(nn.Module):
    """One linear layer to V + 1 classes, blank last; a convolution of width 1, as in NeMo."""

    def __init__(self, config: CTCConfig):
        super().__init__()
        self.decoder_layers = nn.Sequential(nn.Conv1d(config.d_in, config.vocab_size + 1, 1))

    def forward(self, encoded: torch.Tensor) -> torch.Tensor:
        """(B, T', D) -> logits (B, T', V+1)."""
        layer = self.decoder_layers[0]
        return linear(encoded, layer.weight[..., 0], layer.bias)


class PromptKernel(nn.Sequential):
    """Tells each frame which of `n_prompts` prompts its clip has: a one-hot vector beside it, and
    two linear layers back to the frame's width."""

    def __init__(self, n_prompts: int, width: int):
        super().__init__(Linear(width + n_prompts, 2 * width), nn.ReLU(), Linear(2 * width, width))
        self.n_prompts = n_prompts

    def forward(self, encoded: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """(B, T', D), (B,) -> (B, T', D)."""
        prompt = F.one_hot(indices, self.n_prompts).to(encoded)[:, None]
        prompt = prompt.expand(-1, encoded.shape[1], -1)
        return super().forward(torch.cat((encoded, prompt), -1))


class LSTM(nn.Module):
    """Keeps NeMo's name `dec_rnn.lstm`; dropout between layers and after the last."""

    def __init__(self, hidden: int, n_layers: int, dropout: float):
        super().__init__()
        self.lstm = nn.LSTM(
            hidden, hidden, n_layers, batch_first=True, dropout=dropout if n_layers > 1 else 0.0
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, state=None):
        with _for_cudnn(self.lstm) if x.is_cuda else nullcontext():
            x, state = self.lstm(x, state)
        return self.dropout(x), state


@contextmanager
def _for_cudnn(lstm: nn.LSTM):
    """What an LSTM on a GPU needs: autocast makes it float16, whatever its type is, and the small
    ones of its gradients zero; and cuDNN goes back through it in training mode alone, also where it
    is frozen and only what stands before it learns."""
    eval_mode = torch.is_grad_enabled() and not lstm.training
    if eval_mode:
        dropout, lstm.dropout, lstm.training = lstm.dropout, 0.0, True
    try:
        with torch.autocast("cuda", enabled=False):
            yield
    finally:
        if eval_mode:
            lstm.dropout, lstm.training = dropout, False


class StableEmbedding(nn.Embedding):
    """An embedding with a LayerNorm behind it, in float32. Source: bitsandbytes' StableEmbedding,
    which forks of NeMo put in for 8-bit optimizers; no stock checkpoint has its `embed.norm`."""

    def __init__(self, rows: int, width: int, padding_idx: int | None):
        super().__init__(rows, width, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        embedded, weight, bias = super().forward(tokens).float(), norm.weight, norm.bias
        y = F.layer_norm(embedded, norm.normalized_shape, weight.float(), bias.float(), norm.eps)
        return y.to(self.weight.dtype)


class PredictionNetwork(nn.Module):
    """An LSTM over the tokens emitted so far (NeMo's `decoder`)."""

    embedding_norm = "prediction.embed.norm.weight"  # a tensor that only StableEmbedding has

    def __init__(self, config: PredictionConfig):
        super().__init__()
        self.n_layers, self.hidden = config.pred_rnn_layers, config.pred_hidden
        rows = config.vocab_size + 1 if config.blank_as_pad else config.vocab_size
        padding = config.vocab_size if config.blank_as_pad else None
        self.prediction = nn.ModuleDict(
            {
                "embed": nn.Embedding(rows, config.pred_hidden, padding_idx=padding),
                "dec_rnn": LSTM(config.pred_hidden, config.pred_rnn_layers, config.dropout),
            }
        )

    def embeddings(self) -> dict[str, nn.Embedding]:
        """The layers with a row for each token, by their names in `prediction`."""
        return {"embed": self.prediction["embed"]}

    def add_embedding_norm(self) -> None:
        """For a checkpoint that has one. No config says so: only its tensors do."""
        embed = self.prediction["embed"]
        shape = embed.num_embeddings, embed.embedding_dim
        self.prediction["embed"] = StableEmbedding(*shape, embed.padding_idx)

    def forward(self, targets: torch.Tensor) -> torch.Tensor:
        """targets (B, U) -> states (B, U+1, H); row 0 follows the start, a zero vector."""
        embedded = F.pad(self.prediction["embed"](targets), (0, 0, 1, 0))
        if not isinstance(self.prediction["dec_rnn"].lstm.weight_hh_l0, Int8Weight):
            return self.prediction["dec_rnn"](embedded)[0]
        zeros = embedded.new_zeros(len(targets), self.hidden)
        state, outputs = [(zeros, zeros)] * self.n_layers, []
        for x in embedded.unbind(1):
            x, state = self._cells(x, state)
            outputs.append(x)
        return torch.stack(outputs, 1)

    def start(self, batch: int):
        """(output (B, H), state) after the start symbol, for step-by-step decoding."""
        weight = self.prediction["embed"].weight
        zeros = weight.new_zeros(batch, self.hidden)
        state = [(zeros, zeros)] * self.n_layers
        return self._cells(zeros, state)

    def step(self, tokens: torch.Tensor, state):
        """tokens (B,), state of the step before -> (output (B, H), state)."""
        return self._cells(self.prediction["embed"](tokens), state)

    def _cells(self, x, state):
        lstm, after = self.prediction["dec_rnn"].lstm, []
        for layer, (h, c) in enumerate(state):
            weights = [getattr(lstm, f"{name}_l{layer}") for name in lstm_weight_names]
            int8 = isinstance(weights[0], Int8Weight)
            if int8 or (x.device.type == "cpu" and not torch.is_grad_enabled()):
                x, c = _cell(x, h, c, *weights)
            else:
                x, c = torch.lstm_cell(x, (h, c), *weights)
            after.append((x, c))
        return x, after


def _cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    """torch.lstm_cell by `linear`: for a CPU and weights of any kind."""
    gates = linear(x, weight_ih, bias_ih).add_(linear(h, weight_hh, bias_hh))
    take, keep, new, show = gates.chunk(4, dim=1)
    c = torch.addcmul(keep.sigmoid() * c, take.sigmoid(), new.tanh())
    return show.sigmoid() * c.tanh(), c


lstm_weight_names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class StatelessNetwork(nn.Module):
    """Embeddings of the last tokens, side by side, in the place of `PredictionNetwork`; the last
    token has more than half of the width. Before the first token all is zero.

    What a token adds to later outputs is added up as soon as it is known: `state` has a pair for
    each of these outputs, the sum and zeros (an LSTM has a second tensor).
    """

    def __init__(self, config: PredictionConfig):
        super().__init__()
        self.hidden, size = config.pred_hidden, config.context_size
        self.n_layers = max(1, size - 1)
        least = config.pred_hidden // 2 // size
        widths = [config.pred_hidden - least * (size - 1)] + [least] * (size - 1)
        rows, padding = config.vocab_size + 1, config.vocab_size
        self.prediction = nn.ModuleDict(
            {
                "embeds": nn.ModuleList(nn.Embedding(rows, n, padding) for n in widths),
                "dropout": nn.Dropout(config.dropout),
            }
        )
        if config.normalized:
            self.prediction["norm"] = nn.LayerNorm(config.pred_hidden, elementwise_affine=False)

    def forward(self, targets: torch.Tensor) -> torch.Tensor:
        """targets (B, U) -> states (B, U+1, H); row 0 follows the start, a zero vector."""
        length = targets.shape[1] + 1
        parts = [
            F.pad(embed(targets), (0, 0, place + 1, 0))[:, :length]
            for place, embed in enumerate(self.prediction["embeds"])
        ]
        return self._normalized(self.prediction["dropout"](torch.cat(parts, -1)))

    def embeddings(self) -> dict[str, nn.Embedding]:
        """As `PredictionNetwork.embeddings`."""
        return {f"embeds.{i}": embed for i, embed in enumerate(self.prediction["embeds"])}

    def start(self, batch: int):
        """As `PredictionNetwork.start`."""
        zeros = self.prediction["embeds"][0].weight.new_zeros(batch, self.hidden)
        return zeros, [(zeros, zeros)] * self.n_layers

    def step(self, tokens: torch.Tensor, state):
        """tokens (B,), state of the step before -> (output (B, H), state)."""
        rows, first = [], 0
        for embed in self.prediction["embeds"]:
            behind = self.hidden - first - embed.embedding_dim
            rows.append(F.pad(embed(tokens), (first, behind)))
            first += embed.embedding_dim
        none = torch.zeros_like(rows[0])
        sums = [*(h for h, _ in state), none]
        later = [row + before for row, before in zip(rows[1:], sums[1:])] or [none]
        return self._normalized(rows[0] + sums[0]), [(after, none) for after in later]

    def _normalized(self, states: torch.Tensor) -> torch.Tensor:
        return self.prediction["norm"](states) if "norm" in self.prediction else states


class Joint(nn.Module):
    """Combines encoder frames and prediction states: V tokens, blank, then duration classes.

    HAT (Variani et al. 2020, arXiv:2003.07705): `blank_pred` gives log p(blank), and the others
    share what is left: log(1 - p(blank)) + log_softmax(token logits). What it returns then are
    log-probabilities.
    """

    def __init__(self, config: JointConfig):
        super().__init__()
        self.pred = Linear(config.pred_hidden, config.joint_hidden)
        self.enc = Linear(config.encoder_hidden, config.joint_hidden)
        self.activation = config.activation
        n_out = config.vocab_size + (not config.hat) + config.n_durations
        # NeMo has no Dropout module where dropout is 0, which moves the output layer's index
        dropout = [nn.Dropout(config.dropout)] if config.dropout else []
        self.joint_net = nn.Sequential(
            _ACTIVATIONS[config.activation](), *dropout, Linear(config.joint_hidden, n_out)
        )
        self.blank_pred = None
        if config.hat:
            layers = nn.Tanh(), nn.Dropout(config.dropout), Linear(config.joint_hidden, 1)
            self.blank_pred = nn.Sequential(*layers, nn.LogSigmoid())

    @property
    def dropout(self) -> float:
        """Probability that a hidden channel is dropped now, in this mode."""
        layers = (m for m in self.joint_net if isinstance(m, nn.Dropout) and m.training)
        return sum(m.p for m in layers)

    def forward(self, encoded: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """(B, T', D), (B, U+1, H) -> logits (B, T', U+1, V+1+N)."""
        return self.step(self.enc(encoded)[:, :, None], self.pred(predicted)[:, None])

    def step(self, encoded: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """Already projected frames and states (..., J) -> logits (..., V+1+N)."""
        summed = encoded + predicted
        logits = self.joint_net(summed)
        if self.blank_pred is None:
            return logits
        blank = self.blank_pred(summed).float()
        rest = (1 - blank.exp()).clamp(min=1e-6).log()  # as NeMo bounds it
        return torch.cat((rest + logits.float().log_softmax(-1), blank), -1)


def is_plain(decoder: nn.Module, joint: Joint) -> bool:
    """Whether the prediction network is an LSTM and the joint gives logits, as steps that are
    compiled or fused take for granted."""
    return isinstance(decoder, PredictionNetwork) and joint.blank_pred is None
