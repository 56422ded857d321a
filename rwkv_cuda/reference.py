"""The WKV7 recurrence, one frame after another: the definition that all else is measured against.

Per clip and head, with a state S of shape (N, N), [value, key], and decay_t = exp(-exp(w_t)):

    S_t = S_{t-1} diag(decay_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T
    y_t = S_t r_t

Any device, any length, any floating dtype, differentiable by autograd. Source: RWKV-7
(Peng et al. 2025, arXiv:2503.14456), in the form of the BiRWKV7 fork, which passes
a = -kappa and b = kappa * rate.
"""

import torch
from torch import Tensor


def wkv7_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    reverse: bool = False,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as a loop over frames; see `rwkv_cuda.wkv7` for the arguments.

    Args:
        r, w, k, v, a, b: (B, T, H, N); w is the raw decay.
        reverse: from each clip's last frame to its first.
        lengths: valid frames of each clip, (B,); y is 0 beyond, whatever the inputs hold there.
        initial_state: (B, H, N, N), [value, key]; zeros if None.
    Returns:
        y (B, T, H, N) in the dtype of r, and the state after the last frame, (B, H, N, N), in
        float32, or in float64 if r is.
    """
    batch, frames, heads, width = r.shape
    dtype = torch.promote_types(r.dtype, torch.float32)
    output_dtype = r.dtype
    r, w, k, v, a, b = (x.to(dtype) for x in (r, w, k, v, a, b))
    decay = torch.exp(-torch.exp(w))
    if initial_state is None:
        state = r.new_zeros(batch, heads, width, width)
    else:
        state = initial_state.to(dtype)
    outputs = [r.new_zeros(batch, heads, width)] * frames
    for t in reversed(range(frames)) if reverse else range(frames):
        new = (
            state * decay[:, t, :, None, :]
            + (state @ a[:, t, :, :, None]) * b[:, t, :, None, :]
            + v[:, t, :, :, None] * k[:, t, :, None, :]
        )
        y = (new @ r[:, t, :, :, None]).squeeze(-1)
        if lengths is not None:
            valid = (lengths > t).view(batch, 1, 1)
            y = torch.where(valid, y, 0)
            new = torch.where(valid[..., None], new, state)
        state = new
        outputs[t] = y
    y = torch.stack(outputs, dim=1) if frames else r
    return y.to(output_dtype), state
