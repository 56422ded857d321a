"""FastConformer encoder: subsampling, then Conformer layers. Source: NeMo's ConformerEncoder.

Features (B, M, T) and lengths (B,) in, (B, T', D) and lengths out.
"""

import math
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import EncoderConfig
from .attention import position_encoding
from .birwkv7 import Carry
from .conformer_layer import ConformerLayer
from .graphs import MOST_FRAMES, STEP_FRAMES, GraphCache
from .linear import Linear
from .subsampling import ConvSubsampling, Reduction, encoded_length


class ConformerEncoder(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        d = config.d_model
        channels = config.subsampling_conv_channels
        self.pre_encode = ConvSubsampling(
            config.subsampling,
            config.subsampling_factor,
            config.feat_in,
            d,
            d if channels == -1 else channels,
            config.causal_downsampling,
        )
        biases = ()
        if not config.untie_biases and config.self_attention_model == "rel_pos":
            shape = (config.n_heads, d // config.n_heads)
            # tied biases: one pair, shared by (and saved with) every layer
            biases = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.layers = nn.ModuleList(
            ConformerLayer(config, *biases, layer_id=i) for i in range(config.n_layers)
        )
        self.out_proj = Linear(d, config.d_out) if config.d_out != d else None
        self.reduces_after = None  # a layer, -1: the output
        if config.reduces:
            self.reduces_after = config.reduction_position
            self.reduction_subsampling = Reduction(config.reduction, config.reduction_factor, d)
        self.dropout_input = nn.Dropout(
            config.dropout
            if config.self_attention_model == "rel_pos_local_attn"
            else config.dropout_pre_encoder
        )
        self.dropout_emb = nn.Dropout(config.dropout_emb)
        self.drop_probs = _layer_drop_probs(config)
        self.graphs = GraphCache()  # of small inputs on a GPU, kept between calls
        self.recompute = False  # in training: keep only each layer's input, for less memory

    def tie_biases(self):
        """Makes all layers share the first one's position biases, where the config ties them."""
        if not self.config.untie_biases and self.config.self_attention_model == "rel_pos":
            for layer in self.layers:
                layer.self_attn.pos_bias_u = self.layers[0].self_attn.pos_bias_u
                layer.self_attn.pos_bias_v = self.layers[0].self_attn.pos_bias_v

    def forward(self, features: torch.Tensor, lengths: torch.Tensor):
        """features (B, M, T), lengths (B,) -> encoded (B, T', D), lengths (B,)."""
        x, lengths = self.pre_encode(features, lengths)
        x, pos_emb, att_mask, pad_mask = self.prepare(x, lengths)
        v_first = None
        for i, (layer, drop_prob) in enumerate(zip(self.layers, self.drop_probs)):
            if self.recompute and torch.is_grad_enabled():
                layer = partial(_recomputed, layer)
            if self.training and drop_prob > 0.0:
                # stochastic depth (arXiv:2102.03216), expectation kept
                kept = (torch.rand(()) >= drop_prob).to(x.dtype)
                y, v_first = self._layer(layer, x, pos_emb, att_mask, pad_mask, v_first)
                x = x + (y - x) * kept / (1.0 - drop_prob)
            else:
                x, v_first = self._layer(layer, x, pos_emb, att_mask, pad_mask, v_first)
            if i == self.reduces_after:
                x, lengths = self.reduction_subsampling(x, lengths)
                pos_emb, att_mask, pad_mask = self._positions_and_masks(x, lengths)
        x = x if self.out_proj is None else self.out_proj(x)
        return self.reduction_subsampling(x, lengths) if self.reduces_after == -1 else (x, lengths)

    def replayed(self, features: torch.Tensor, lengths: torch.Tensor):
        """As `forward`, by a CUDA graph where the input is small and on a GPU. Frames are rounded
        up, and clips to a power of two: what is padding changes no valid frame."""
        config = self.config
        # several global tokens are mixed over the clips of a batch
        if not self.graphs.usable(features) or config.mixes_clips or config.global_tokens > 1:
            return self(features, lengths)
        n_clips, n_mels, n_frames = features.shape
        rows = 1 << max(0, n_clips - 1).bit_length()
        frames = -(-n_frames // STEP_FRAMES) * STEP_FRAMES
        if not 0 < n_clips * frames <= rows * frames <= MOST_FRAMES:
            return self(features, lengths)

        def own(encoded, counts):
            n_encoded = encoded_length(config, n_frames)
            return encoded[:n_clips, :n_encoded].clone(), counts[:n_clips].clone()

        shapes = (rows, n_mels, frames), (rows,)
        inputs = features, lengths
        found = self.graphs.run("forward", self, self.forward, inputs, shapes, own)
        return self(features, lengths) if found is None else found

    def encode_in_chunks(
        self,
        features: torch.Tensor,
        lengths: torch.Tensor,
        chunk_frames: int,
        look_ahead_frames: int,
    ):
        """`chunks`, joined: encoded (B, T', D'), lengths (B,)."""
        parts = list(self.chunks(features, lengths, chunk_frames, look_ahead_frames))
        return torch.cat(parts, 1), encoded_length(self.config, lengths)

    @torch.no_grad()
    def chunks(
        self,
        features: torch.Tensor,
        lengths: torch.Tensor,
        chunk_frames: int,
        look_ahead_frames: int,
    ):
        """As `forward`, for BiRWKV7, with the layers' memory bounded whatever the length: yields
        encoded (B, up to chunk_frames, D'), chunk after chunk.

        The forward states, and what the convolutions see, come from the chunks before as in one
        pass; what comes after is seen for `look_ahead_frames` (encoder frames) beyond the chunk.
        Equal to `forward` where that reaches the end.

        Raises:
            ValueError: an encoder with attention, or counts out of range.
        """
        if self.config.self_attention_model != "rwkv7_attn":
            raise ValueError(
                f"chunks with carried state need BiRWKV7, this encoder has "
                f"{self.config.self_attention_model}; convert it with converters.to_birwkv7"
            )
        if chunk_frames < 1 or look_ahead_frames < 0:
            raise ValueError(
                f"chunk_frames is {chunk_frames} and look_ahead_frames {look_ahead_frames}, "
                "expected at least 1 and 0"
            )
        whole, lengths = self.pre_encode(features, lengths)
        whole, _, _, pad_mask = self.prepare(whole, lengths)
        t, carries = whole.shape[1], self.first_carries()
        for start in range(0, t, chunk_frames):
            stop = min(start + chunk_frames, t)
            last = min(stop + look_ahead_frames, t)
            x = self.carried(whole[:, start:last], pad_mask[:, start:last], carries, stop - start)
            yield x[:, : stop - start]

    def first_carries(self) -> list[Carry]:
        """What BiRWKV7's layers keep before the first frame."""
        return [Carry() for _ in self.layers]

    def carried(
        self, x: torch.Tensor, pad_mask: torch.Tensor, carries: list[Carry], n_kept: int
    ) -> torch.Tensor:
        """Subsampled frames x (B, T, D), after those of which BiRWKV7's layers keep `carries` ->
        encoded (B, T, D'); the carries move on by the first `n_kept`."""
        v_first = None
        for layer, carry in zip(self.layers, carries):
            carry.n_kept = n_kept
            x, v_first = layer(x, None, None, pad_mask, v_first, carry)
        return x if self.out_proj is None else self.out_proj(x)

    def _layer(self, layer, x, pos_emb, att_mask, pad_mask, v_first):
        if self.config.self_attention_model == "rwkv7_attn":
            return layer(x, pos_emb, att_mask, pad_mask, v_first)
        return layer(x, pos_emb, att_mask, pad_mask), None

    def prepare(self, x: torch.Tensor, lengths: torch.Tensor):
        """Scales the subsampled frames; gives position encodings and masks for the layers."""
        config, t = self.config, x.shape[1]
        if config.self_attention_model == "rwkv7_attn":
            # no positions, and as in the fork no xscaling, which NeMo does where it adds them
            pad_mask = torch.arange(t, device=x.device) >= lengths[:, None]
            return self.dropout_input(x), None, None, pad_mask
        if config.xscaling:
            x = x * math.sqrt(config.d_model)
        positions_and_masks = self._positions_and_masks(x, lengths)
        return self.dropout_input(x), *positions_and_masks

    def _positions_and_masks(self, x: torch.Tensor, lengths: torch.Tensor):
        config, t = self.config, x.shape[1]
        left, right = self._context()
        local = config.self_attention_model == "rel_pos_local_attn"
        first, last = (left, -right) if local else (t - 1, 1 - t)
        positions = torch.arange(first, last - 1, -1, device=x.device)
        pos_emb = self.dropout_emb(position_encoding(positions, config.d_model).to(x.dtype))
        pad_mask = torch.arange(t, device=x.device) >= lengths[:, None]  # (B, T)
        att_mask = (
            pad_mask if local else pad_mask[:, None, None] | self._hidden(t, left, right, x.device)
        )
        return pos_emb, att_mask, pad_mask

    def _context(self) -> tuple[int, int]:
        contexts = self.config.att_contexts
        if not self.training or len(contexts) == 1:
            return contexts[0]
        weights = torch.tensor(self.config.att_context_probs or [1.0] * len(contexts))
        return contexts[int(torch.multinomial(weights, 1))]

    def _hidden(self, t: int, left: int, right: int, device) -> torch.Tensor:
        """(T or 1, T) True where the context forbids a key."""
        if left < 0 and right < 0:
            return torch.zeros((1, t), dtype=torch.bool, device=device)  # distances would be T x T
        frame = torch.arange(t, device=device)
        if self.config.att_context_style == "chunked_limited" and right >= 0:
            frame = frame // (right + 1)  # whole chunks see each other; right is the look-ahead
            left, right = (left // (right + 1) if left >= 0 else -1), 0
        distance = frame - frame[:, None]  # key minus query
        hidden = torch.zeros((1, t), dtype=torch.bool, device=device)
        if left >= 0:
            hidden = hidden | (distance < -left)
        if right >= 0:
            hidden = hidden | (distance > right)
        return hidden


def _recomputed(layer: nn.Module, *inputs):
    """layer(*inputs), whose inside is computed again in the backward pass (arXiv:1604.06174), with
    the same dropout."""
    return checkpoint(
        layer,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _statistics_kept(layer)),
    )


@contextmanager
def _statistics_kept(layer: nn.Module):
    """BatchNorm normalises by the batch as ever, but its statistics do not see it a second time."""
    norms = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # their new value is the old one
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _layer_drop_probs(config: EncoderConfig) -> list[float]:
    """Probability of skipping each layer; the first `stochastic_depth_start_layer` are
    always kept."""
    n, start = config.n_layers, config.stochastic_depth_start_layer
    probability = config.stochastic_depth_drop_prob
    if config.stochastic_depth_mode == "uniform":
        rest = [probability] * (n - start)
    else:
        rest = [probability * i / (n - start) for i in range(1, n - start + 1)]
    return ([0.0] * start + rest)[:n]
