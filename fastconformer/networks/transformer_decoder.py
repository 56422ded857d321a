"""The transformer of NeMo's multi-task models (Canary): embedding, decoder with a cache for
step-by-step decoding, the encoder between FastConformer and decoder, and the tied output layer.

Parameters carry NeMo's names. Layers normalise first ("pre-LN") or last, as the config says. In a
pre-LN layer keys and values take the same norm as the queries. U: tokens; S: states attended to.

Source: NeMo 3.0.0, `asr/modules/transformer`; Vaswani et al., arXiv:1706.03762.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .linear import Linear

HIDDEN = -10000.0  # added to the scores of what must not be seen, as in NeMo: finite, so that a
# clip without any frame still has numbers
_CACHE_STEP = 64  # positions by which a cache grows

ACTIVATIONS = ("relu", "gelu")


def sine_positions(n_positions: int, width: int, device=None) -> torch.Tensor:
    """(n_positions, width) float32: sines at even, cosines at odd columns, over sqrt(width)."""
    position = torch.arange(n_positions, dtype=torch.float32, device=device)[:, None]
    rate = torch.exp(
        -math.log(10000.0) / width * torch.arange(0, width, 2, dtype=torch.float32, device=device)
    )
    table = torch.zeros(n_positions, width, dtype=torch.float32, device=device)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table / math.sqrt(width)


class SinePositions(nn.Module):
    """The table of positions, which NeMo stores among the weights."""

    def __init__(self, n_positions: int, width: int):
        super().__init__()
        self.register_buffer("pos_enc", sine_positions(n_positions, width))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return F.embedding(positions, self.pos_enc)

    def extend(self, n_positions: int) -> torch.Tensor:
        """Rows for positions beyond the table, which are none of the checkpoint's."""
        table = sine_positions(n_positions, self.pos_enc.shape[1], self.pos_enc.device)
        return table.to(self.pos_enc.dtype)


class Embedding(nn.Module):
    """Token + position, LayerNorm, dropout."""

    def __init__(
        self,
        n_classes: int,
        width: int,
        max_length: int,
        learned_positions: bool,
        dropout: float,
        n_token_types: int = 0,
    ):
        super().__init__()
        # row 0 is a padding index: no gradient reaches it from the input's side
        self.token_embedding = nn.Embedding(n_classes, width, padding_idx=0)
        self.max_length = max_length
        self.position_embedding = (
            nn.Embedding(max_length, width)
            if learned_positions
            else SinePositions(max_length, width)
        )
        if n_token_types:  # in old archives, and read by nothing
            self.token_type_embedding = nn.Embedding(n_token_types, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """tokens and positions (..., U), all positions below `longest` -> (..., U, H).
        ValueError: a position beyond a learned table."""
        table = self.position_embedding
        if longest <= self.max_length:
            at = table(positions)
        elif isinstance(table, SinePositions):
            at = F.embedding(positions, table.extend(longest))
        else:
            raise ValueError(
                f"{longest} tokens with the prompt, but the decoder has learned positions for "
                f"{self.max_length}; shorten the prompt or the text"
            )
        return self.dropout(self.layer_norm(self.token_embedding(tokens) + at))


class Attention(nn.Module):
    """Attention of several heads; scores over sqrt(K)."""

    def __init__(self, width: int, n_heads: int, score_dropout: float, dropout: float):
        super().__init__()
        self.n_heads, self.score_dropout = n_heads, score_dropout
        self.query_net = Linear(width, width)
        self.key_net = Linear(width, width)
        self.value_net = Linear(width, width)
        self.out_projection = Linear(width, width)
        self.layer_dropout = nn.Dropout(dropout)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, heads, U, K)

    def keys_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """states (B, S, H) -> keys and values, (B, heads, S, K) each."""
        return self._split(self.key_net(states)), self._split(self.value_net(states))

    def forward(
        self,
        x: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """x (B, U, H); bias, added to the scores: (B, 1, 1 or U, S) -> (B, U, H)."""
        dropout = self.score_dropout if self.training else 0.0
        queries = self._split(self.query_net(x))
        context = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, dropout_p=dropout, is_causal=causal
        )
        return self.layer_dropout(self.out_projection(context.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, activation: str, dropout: float):
        super().__init__()
        self.dense_in, self.dense_out = Linear(width, inner), Linear(inner, width)
        self.activation = activation
        self.layer_dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dense_in(x, "relu") if self.activation == "relu" else F.gelu(self.dense_in(x))
        return self.layer_dropout(self.dense_out(x))


class Layer(nn.Module):
    """Self-attention, where `cross` is set attention to the encoder's states, feed-forward; each
    with a residual and a LayerNorm before (pre_ln) or after it."""

    def __init__(
        self,
        width: int,
        inner: int,
        n_heads: int,
        cross: bool,
        activation: str = "relu",
        pre_ln: bool = True,
        dropouts: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ):
        """dropouts: of attention scores, of attention's output, of the feed-forward's output."""
        super().__init__()
        score, after, feed_forward = dropouts
        self.pre_ln, self.cross = pre_ln, cross
        self.layer_norm_1 = nn.LayerNorm(width, eps=1e-5)
        self.first_sub_layer = Attention(width, n_heads, score, after)
        self.layer_norm_2 = nn.LayerNorm(width, eps=1e-5)
        last = FeedForward(width, inner, activation, feed_forward)
        if cross:
            self.second_sub_layer = Attention(width, n_heads, score, after)
            self.layer_norm_3 = nn.LayerNorm(width, eps=1e-5)
            self.third_sub_layer = last
        else:
            self.second_sub_layer = last

    def _around(self, norm: nn.Module, block, x: torch.Tensor) -> torch.Tensor:
        return x + block(norm(x)) if self.pre_ln else norm(x + block(x))

    def forward(self, x: torch.Tensor, attend_self, attend_states=None) -> torch.Tensor:
        """x (B, U, H) -> (B, U, H). `attend_self` and `attend_states` call the two attentions on
        normalised x: what they look at is for the caller to know (all tokens, or a cache)."""
        x = self._around(self.layer_norm_1, attend_self, x)
        if self.cross:
            x = self._around(self.layer_norm_2, attend_states, x)
            return self._around(self.layer_norm_3, self.third_sub_layer, x)
        return self._around(self.layer_norm_2, self.second_sub_layer, x)


class Layers(nn.Module):
    """A stack of layers, and a last LayerNorm where the config has one."""

    def __init__(self, n_layers: int, width: int, final_norm: bool, **layer):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, **layer) for _ in range(n_layers))
        self.final_layer_norm = nn.LayerNorm(width, eps=1e-5) if final_norm else None

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.final_layer_norm is None else self.final_layer_norm(x)


class TransformerEncoder(Layers):
    """Between FastConformer and decoder, in models that have one."""

    def forward(self, states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """states (B, S, H), bias (B, 1, 1, S) from `hide_padding` -> (B, S, H)."""
        for layer in self.layers:

            def attend(x, block=layer.first_sub_layer):
                return block(x, *block.keys_values(x), bias)

            states = layer(states, attend)
        return self.finish(states)


def hide_padding(lengths: torch.Tensor, n_states: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, 1, S) to be added to attention scores: 0 where a state is valid, HIDDEN where not."""
    pad = torch.arange(n_states, device=lengths.device) >= lengths[:, None]
    return (pad * HIDDEN).to(dtype)[:, None, None]


class Cache:
    """Keys and values of one decoder layer: of the clip's states, computed once, and of the tokens
    so far, `rows` hypotheses a clip. Position p of a hypothesis lies in slot p."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.states = keys, values  # (B, heads, S, K)
        self.tokens: torch.Tensor | None = None  # (2, B * rows, heads, slots, K)

    def write(self, keys, values, positions: torch.Tensor, longest: int):
        """keys, values (B * rows, heads, U, K) into slots `positions` (B * rows, U)."""
        if self.tokens is None or self.tokens.shape[3] < longest:
            n, heads, _, width = keys.shape
            slots = -(-longest // _CACHE_STEP) * _CACHE_STEP
            grown = keys.new_zeros(2, n, heads, slots, width)
            if self.tokens is not None:
                grown[:, :, :, : self.tokens.shape[3]] = self.tokens
            self.tokens = grown
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        self.tokens[0, rows, :, positions] = keys.transpose(1, 2)
        self.tokens[1, rows, :, positions] = values.transpose(1, 2)

    def read(self, longest: int):
        return self.tokens[0, :, :, :longest], self.tokens[1, :, :, :longest]

    def reorder(self, hypotheses: torch.Tensor):
        """Hypothesis i becomes a copy of hypothesis `hypotheses[i]`."""
        self.tokens = self.tokens.index_select(1, hypotheses)

    def keep(self, clips: torch.Tensor, hypotheses: torch.Tensor):
        """Leaves out all other clips and hypotheses."""
        self.states = tuple(part.index_select(0, clips) for part in self.states)
        self.reorder(hypotheses)


class TransformerDecoder(nn.Module):
    """Tokens and encoder states -> one state a token, which knows the tokens up to its own."""

    def __init__(self, embedding: Embedding, layers: Layers):
        super().__init__()
        self._embedding, self._decoder = embedding, layers

    def forward(self, tokens: torch.Tensor, states: torch.Tensor, bias: torch.Tensor):
        """tokens (B, U), right-padded: what lies behind a clip's tokens cannot reach them; states
        (B, S, H), bias (B, 1, 1, S) -> (B, U, H)."""
        longest = tokens.shape[1]
        positions = torch.arange(longest, device=tokens.device)
        x = self._embedding(tokens, positions, longest)
        for layer in self._decoder.layers:
            own, other = layer.first_sub_layer, layer.second_sub_layer

            def attend_self(x, block=own):
                return block(x, *block.keys_values(x), causal=True)

            def attend_states(x, block=other):
                return block(x, *block.keys_values(states), bias)

            x = layer(x, attend_self, attend_states)
        return self._decoder.finish(x)

    def start(self, states: torch.Tensor) -> list[Cache]:
        """An empty cache for each layer; the states' keys and values are computed here, once."""
        return [
            Cache(*layer.second_sub_layer.keys_values(states)) for layer in self._decoder.layers
        ]

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        longest: int,
        bias: torch.Tensor,
        caches: list[Cache],
    ) -> torch.Tensor:
        """The next tokens of each hypothesis, appended to the cache.

        Args:
            tokens: (B * rows, U), right-padded; the first call brings the prompts, later ones one
                token each.
            positions: (B * rows, U) of the tokens; padding may have any of a slot that a later
                call writes over.
            longest: more than all positions.
            bias: (B, 1, 1, S) of the states.
        Returns:
            (B * rows, U, H).
        """
        x = self._embedding(tokens, positions, longest)
        n, n_tokens, width = x.shape
        slots = torch.arange(longest, device=x.device)
        later = slots > positions[..., None]
        own_bias = (later * HIDDEN).to(x.dtype)[:, None]  # (B * rows, 1, U, longest)
        clips = len(bias)
        for layer, cache in zip(self._decoder.layers, caches):

            def attend_self(x, block=layer.first_sub_layer, cache=cache):
                cache.write(*block.keys_values(x), positions, longest)
                return block(x, *cache.read(longest), own_bias)

            def attend_states(x, block=layer.second_sub_layer, cache=cache):
                # the hypotheses of a clip are so many queries to the same states
                together = x.reshape(clips, -1, width)
                return block(together, *cache.states, bias).view(n, n_tokens, width)

            x = layer(x, attend_self, attend_states)
        return self._decoder.finish(x)


class TiedOutput(nn.Module):
    """States -> log-probabilities, by the token embedding's matrix and a bias. NeMo stores the
    matrix a second time under this module's name; `tie` makes both one tensor."""

    def __init__(self, width: int, n_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.ModuleDict({"layer0": Linear(width, n_classes)})

    def tie(self, embedding: Embedding) -> None:
        self.mlp["layer0"].weight = embedding.token_embedding.weight

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., V8)."""
        return self.mlp["layer0"](self.dropout(states))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., V8) float32."""
        return self.logits(states).float().log_softmax(-1)
