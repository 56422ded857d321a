"""BiRWKV7: bidirectional RWKV-7 time mixing in the place of self-attention.

Time and memory grow linearly with the frames, and there are no positions. Source: RWKV-7
(arXiv:2503.14456) in both directions, as in the NeMo fork whose checkpoints hold
`self_attention_model: rwkv7_attn`; parameters carry the fork's names. Kept and mended:

- Padding enters neither state, in either direction. The fork gives padded frames k = v = 0 and
  w = -1000, which is a decay of exactly 1, the state kept, though its comment says it is cleared;
  kept is right, since the backward state must reach the last valid frame as zero. Here padding is
  not computed at all, which gives the same numbers. Without a mask the fork pads to a multiple of
  16 and lets the padding speak; here no mask means that all frames are valid.
- The recurrence of the fork has heads of 64 whatever `n_heads` says, while key normalisation,
  direction gate, bonus and group norm have d_model / n_heads. That stays so (`wkv_head_size`
  None), since checkpoints were trained like that. Where 64 does not divide d_model, which the fork
  cannot run, and where `wkv_head_size` is given, that is the width.
- The decay is computed in float32; one layer alone may be built; any number of frames.

Letters: B clips, T frames, D width, H heads, K = D / H, R rank of a low-rank map.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .linear import Linear
from .tiles import in_tiles

KERNEL_HEAD = 64  # the fork's, fixed in its kernel
NORM_EPS = 64e-5


def wkv_width(d_model: int, n_heads: int, wkv_head_size: int | None = None) -> int:
    """Width of the recurrence's heads; see the module's docstring."""
    if wkv_head_size is not None:
        return wkv_head_size
    return KERNEL_HEAD if d_model % KERNEL_HEAD == 0 else d_model // n_heads


class BiRWKV7(nn.Module):
    """One layer's time mixing. With s_t = x_{t-1} - x_t and m_t = x_t + s_t * x_m:

    w = -softplus(-(w0 + tanh(m_w w1) w2)) - 0.5, decay exp(-exp(w)); r, k, v linear maps;
    v mixed with the first layer's v; a = sigmoid(a0 + m_a a1 a2); g = sigmoid(m_g g1) g2;
    kappa = normalize(k * k_k); k = k (1 + (a - 1) k_a);
    y = gate * forward + (1 - gate) * backward, gate = sigmoid(one dot product of s_t a head);
    out = output((group_norm(y) + (r * k * r_k summed over the head) * v) * g).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        layer_id: int,
        n_layers: int,
        wkv_head_size: int | None = None,
        direction_dropout: float = 0.0,
    ):
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        self.layer_id, self.n_layers = layer_id, n_layers
        self.wkv_head_size = wkv_width(d_model, n_heads, wkv_head_size)
        if d_model % self.wkv_head_size:
            raise ValueError(
                f"wkv_head_size is {self.wkv_head_size}, expected a divisor of d_model {d_model}"
            )
        self.direction_dropout = direction_dropout

        def rank(factor: float) -> int:
            return max(32, round(factor * math.sqrt(d_model) / 32) * 32)

        for name in "rwkvag":
            self._weight(f"x_{name}", 1, 1, d_model)
        ranks = {"w": rank(2.5), "a": rank(2.5), "v": rank(1.7), "g": rank(5.0)}
        for name, size in ranks.items():
            if name != "g":
                self._weight(f"{name}0", 1, 1, d_model)
            self._weight(f"{name}1", d_model, size)
            self._weight(f"{name}2", size, d_model)
        self._weight("k_k", 1, 1, d_model)
        self._weight("k_a", 1, 1, d_model)
        self.r_k = nn.Parameter(torch.empty(n_heads, self.d_head))
        self.gate = nn.Conv1d(d_model, n_heads, 1, groups=n_heads, bias=False)
        self.ln_x = nn.GroupNorm(n_heads, d_model, eps=NORM_EPS)
        self.receptance = Linear(d_model, d_model, bias=False)
        self.key = Linear(d_model, d_model, bias=False)
        self.value = Linear(d_model, d_model, bias=False)
        self.output = Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def _weight(self, name: str, *shape: int) -> None:
        if self.layer_id == 0 and name in ("v0", "v1", "v2"):
            # in the checkpoints, but the first layer mixes its values with none: nothing to learn
            self.register_buffer(name, torch.empty(shape))
        else:
            setattr(self, name, nn.Parameter(torch.empty(shape)))

    @torch.no_grad()
    def reset_parameters(self):
        """The fork's (RWKV-7's) initial values: deeper layers look less at the frame before, the
        decay slows from channel to channel, and the block gives 0."""
        d = self.k_k.shape[-1]
        depth = self.layer_id / max(1, self.n_layers - 1)  # 0 ... 1; one layer alone: 0
        left = 1.0 - self.layer_id / self.n_layers  # 1 ... nearly 0
        channel = torch.arange(d, dtype=torch.float32)
        for name, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
            getattr(self, f"x_{name}").copy_(1.0 - (channel / d) ** (power * left))
        line = channel / (d - 1) - 0.5
        zigzag = (channel % self.d_head) * 2.0 / max(1, self.d_head - 1) - 1.0
        zigzag = zigzag * zigzag.abs()
        speed = 6.0 * (channel / (d - 1)) ** (1.0 + depth**0.3) - 6.0
        self.w0.copy_(speed + 0.5 + 2.5 * zigzag)
        self.a0.copy_(0.3 * zigzag + 0.4 * line - 0.19)
        self.v0.copy_(0.73 - 0.4 * line)
        self.k_k.copy_(0.71 - 0.1 * line)
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        for name in "wavg":
            getattr(self, f"{name}1").zero_()
            nn.init.orthogonal_(getattr(self, f"{name}2"), gain=0.1)
        bound = 0.5 / math.sqrt(d)
        self.receptance.weight.uniform_(-bound, bound)
        self.key.weight.uniform_(-0.1 * bound, 0.1 * bound)
        self.value.weight.uniform_(-bound, bound)
        self.output.weight.zero_()

    def forward(
        self,
        x: torch.Tensor,
        v_first: torch.Tensor | None = None,
        pad_mask: torch.Tensor | None = None,
        carry: "Carry | None" = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both directions over the valid frames.

        Args:
            x: (B, T, D).
            v_first: the first layer's values, (B, T, D); None in the first layer.
            pad_mask: (B, T), True on padding, which is at each clip's end; None: all valid.
            carry: of the frames before x, where x is a piece of the clips; moved on.
        Returns:
            (B, T, D), zero on padding, and v_first for the next layers.
        """
        before_x = None if carry is None else carry.before_attention

        def piece(whole, start, stop):
            return None if whole is None else whole[:, start:stop]

        def inputs(start, stop):
            step = _step(x, start, stop, before_x)
            given = (piece(y, start, stop) for y in (x, v_first, pad_mask))
            return self._inputs(step, *given)

        r, w, k, v, a, kappa, v_first, gate = in_tiles(inputs, x)
        lengths = None if pad_mask is None else (~pad_mask).sum(1)
        before, after = self._recurrence((r, w, k, v, kappa.neg(), kappa * a), lengths, carry)
        del w, a, kappa

        def outputs(start, stop):
            step = _step(x, start, stop, before_x)
            given = (piece(y, start, stop) for y in (x, r, k, v, before, after, gate, pad_mask))
            return (self._outputs(step, *given),)

        (out,) = in_tiles(outputs, x)
        if carry is not None:
            carry.before_attention = x[:, carry.n_kept - 1 : carry.n_kept]
        return out, v_first

    def _inputs(self, step, x, v_first, pad_mask):
        """What the recurrence takes: r, w, k, v, a, kappa, v_first (each (B, T, D)) and the
        directions' gate (B, T, H)."""
        r = self.receptance(torch.addcmul(x, step, self.x_r))
        k = self.key(torch.addcmul(x, step, self.x_k))
        v = self.value(torch.addcmul(x, step, self.x_v))
        w = self.w0 + torch.tanh(torch.addcmul(x, step, self.x_w) @ self.w1) @ self.w2
        w = F.logsigmoid(w.float()) - 0.5
        a = torch.sigmoid(self.a0 + torch.addcmul(x, step, self.x_a) @ self.a1 @ self.a2)
        if pad_mask is not None:
            k, v = (y.masked_fill(pad_mask[..., None], 0.0) for y in (k, v))
        if self.layer_id == 0:
            v_first = v
        else:
            share = torch.sigmoid(self.v0 + x @ self.v1 @ self.v2)
            v = torch.lerp(v, v_first, share.to(v.dtype))
        kappa = F.normalize(self._heads(k * self.k_k).float(), dim=-1).flatten(2).to(v.dtype)
        k = k * (1.0 + (a - 1.0) * self.k_a)
        gate = (self._heads(step) * self.gate.weight.view(self.n_heads, -1)).sum(-1)
        return (
            r,
            w,
            k.to(v.dtype),
            v,
            a.to(v.dtype),
            kappa,
            v_first,
            torch.sigmoid(gate).to(v.dtype),
        )

    def _recurrence(self, inputs, lengths, carry):
        """(forward, backward) results (B, T, D); one of them None where direction dropout took it:
        in training one direction alone, with that probability, in a layer and batch."""
        from rwkv_cuda import wkv7, wkv7_bidirectional  # here: attention needs no kernels

        dtype = inputs[0].dtype
        given = torch.float32 if dtype == torch.float16 else dtype  # float16 holds no such decay
        inputs = [x.to(given).unflatten(-1, (-1, self.wkv_head_size)) for x in inputs]
        if self.training and self.direction_dropout and torch.rand(()) < self.direction_dropout:
            reverse = bool(torch.rand(()) < 0.5)
            results = [None, None]
            results[reverse] = wkv7(*inputs, reverse=reverse, lengths=lengths)
        elif carry is None:
            results = wkv7_bidirectional(*inputs, lengths=lengths)
        else:
            results = (
                self._carried(inputs, lengths, carry),
                wkv7(*inputs, reverse=True, lengths=lengths),
            )
        return [None if y is None else y.flatten(2).to(dtype) for y in results]

    def _carried(self, inputs, lengths, carry):
        """The forward direction from the carried state, which moves on by the frames kept."""
        from rwkv_cuda import wkv7

        n, parts = carry.n_kept, []
        state = carry.state
        for start, stop in ((0, n), (n, inputs[0].shape[1])):
            if start < stop:
                y, state = wkv7(
                    *(x[:, start:stop] for x in inputs),
                    lengths=None if lengths is None else (lengths - start).clamp(0, stop - start),
                    initial_state=state,
                    return_state=True,
                )
                parts.append(y)
            if start == 0:
                carry.state = state
        return torch.cat(parts, dim=1)

    def _outputs(self, step, x, r, k, v, before, after, gate, pad_mask):
        """The block's result, (B, T, D)."""
        if before is None or after is None:
            # the gate is not asked; a gradient of zero keeps it in step with other layers and ranks
            y = self._heads(after if before is None else before) + 0.0 * gate[..., None]
        else:
            y = torch.lerp(self._heads(after), self._heads(before), gate[..., None])
        y = F.layer_norm(y.float(), (self.d_head,), eps=NORM_EPS).flatten(2)
        y = y * self.ln_x.weight + self.ln_x.bias  # as the group norm of one frame
        if pad_mask is not None:
            y = y.masked_fill(pad_mask[..., None], 0.0)
        r, k, v = (self._heads(z) for z in (r, k, v))
        y = y + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        g = torch.sigmoid(torch.addcmul(x, step, self.x_g) @ self.g1) @ self.g2
        return self.output((y * g).to(x.dtype))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.n_heads, self.d_head))


@dataclass
class Carry:
    """What a layer keeps of the frames before, where clips come in pieces.

    n_kept: frames of the piece that count; those after are look-ahead and come again.
    before_attention: the attention's input of the frame before, (B, 1, D); None at the start.
    state: of the forward recurrence, (B, H', K', K') of its own heads; None: zero.
    before_convolution: the convolution's input of the frames before, (B, up to its context, D).
    """

    n_kept: int = 0
    before_attention: torch.Tensor | None = None
    state: torch.Tensor | None = None
    before_convolution: torch.Tensor | None = None


def _step(x: torch.Tensor, start: int, stop: int, before: torch.Tensor | None) -> torch.Tensor:
    """The frame before minus the frame, of [start, stop); before the first comes `before`, or
    zero."""
    if start:
        return x[:, start - 1 : stop - 1] - x[:, start:stop]
    if before is None:
        before = x.new_zeros(x.shape[0], 1, x.shape[2])
    return torch.cat((before, x[:, : stop - 1]), dim=1) - x[:, :stop]
