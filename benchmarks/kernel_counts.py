"""Counts kernels and memory traffic on a GPU that is not here.

    python -m benchmarks.kernel_counts                             # a table
    python -m benchmarks.kernel_counts --case "0.6b, 64 of 30 s"   # its operators, costliest first

The encoder, its subsampling and a step of decoding run on tensors that hold nothing (device "meta")
and say they are on a GPU, so that the code takes its path for one. Every operator that is no view
counts as one kernel, a custom operator too; its traffic is each tensor that it reads or writes,
once. Attention with a mask counts as one kernel, as torch's memory-efficient one is. A layer in
training counts forward and backward, with its attention in kernels and plain, and besides what it
keeps for the backward pass beside its weights. A graph counts as one launch, beside those that fill
its inputs and keep its results. What a kernel reads twice and what stays in a cache is not seen:
the numbers compare versions, they are no times.

The last line printed is the result as JSON; it is also written to `--out`.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import commit, write_result
from benchmarks.random_model import SIZES, TOKENIZER, parakeet
from fastconformer import ModelConfig
from fastconformer.decoding.label_loop import LabelLoop, window_frames
from fastconformer.model import NoInitialisation
from fastconformer.networks import graphs, kernels, tiles
from fastconformer.networks import state as state_module
from fastconformer.networks.conformer import ConformerEncoder
from fastconformer.networks.graphs import GraphCache
from fastconformer.networks.heads import Joint, PredictionNetwork
from fastconformer.networks.state import encode_next, first_state

ENCODERS = (("0.6b", 1, 10), ("0.6b", 64, 30), ("0.6b", 256, 10), ("110m", 64, 30))
STEPS = (("0.6b", 1), ("0.6b", 64))
TRAINING = (("0.6b", 12, 30), ("0.6b", 3, 120), ("110m", 12, 30))
FRAMES_PER_SECOND = 100  # features
CARD_BYTES = 24 << 30  # long inputs go through in pieces by the card's memory
ALIGNED = 8  # torch's attention copies masks whose rows are no multiple of so many elements
# Operators that launch nothing although they are no views by their schema.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"}
FREE |= {"unsafe_split", "scalar_tensor"}  # the latter, of a Python number, stays on the host


@torch.library.custom_op("benchmarks::attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Stands for torch's; it is never run."""
    raise NotImplementedError


@attention.register_fake
def _(q, k, v, mask):
    # in memory (B, T, H, K), as the memory-efficient kernel gives it
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


@torch.library.custom_op("benchmarks::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    out: torch.Tensor,
) -> list[torch.Tensor]:
    raise NotImplementedError


@attention_backward.register_fake
def _(grad, *inputs_and_out):
    return [torch.empty_like(x) for x in inputs_and_out[:4]]


attention.register_autograd(
    lambda ctx, grad: tuple(attention_backward(grad, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


@torch.library.custom_op("benchmarks::lstm_cell", mutates_args=())
def lstm_cell(
    of_input: torch.Tensor, of_state: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for torch's, behind its two products; it is never run."""
    raise NotImplementedError


@lstm_cell.register_fake
def _(of_input, of_state, c):
    return torch.empty_like(c), torch.empty_like(c)


class AsOnGpu(TorchFunctionMode):
    """Tensors without data say that they are on a GPU; attention and LSTM cells have a kernel of
    their own there, which torch without a GPU has not; Triton works."""

    def __enter__(self):
        self.triton = mock.patch.object(kernels, "triton_works", lambda device: True)
        self.triton.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.triton.stop()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function is torch.lstm_cell:
            x, (h, c), w_ih, w_hh, b_ih, b_hh = args
            return lstm_cell(F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh), c)
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.stride(-2) % ALIGNED:
            mask = F.pad(mask, (0, -mask.shape[-1] % ALIGNED))[..., : mask.shape[-1]]
        return attention(*args[:3], mask)


class Count(TorchDispatchMode):
    """Kernels and bytes, by operator."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        aliases = [r.alias_info for r in function._schema.returns]
        if name in FREE or any(a is not None and not a.is_write for a in aliases):
            return result
        touched = tree_leaves((args[1:] if name == "copy_" else args, kwargs, result))
        touched = [x for x in touched if isinstance(x, torch.Tensor)]
        if touched:
            self.kernels[name] += 1
            self.bytes[name] += sum(map(memory_of, touched))
        return result


def memory_of(x: torch.Tensor) -> int:
    """Bytes of the elements of `x`; what is expanded counts once."""
    shape = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * torch.Size(shape).numel() if x.numel() else 0


def on_gpu(make, work) -> Count:
    """What `work(*make())` gives launches when it is called. `make()` gives networks; the first of
    two calls is for what is kept between them."""
    count = Count()
    with torch.device("meta"), torch.no_grad():
        with NoInitialisation():
            networks = [network.eval().to(torch.bfloat16) for network in make()]
        with AsOnGpu(), mock.patch.object(tiles, "gpu_memory", lambda device: CARD_BYTES):
            run = work(*networks)
            run()
            with count:
                run()
    return count


def config_of(size: str) -> ModelConfig:
    return ModelConfig.from_nemo(parakeet(TOKENIZER, *SIZES[f"random-{size}"])[0])


def encoder_case(size: str, batch: int, seconds: int) -> Count:
    """One layer: what two launch, less what one does."""
    config = config_of(size).encoder

    def of_layers(n_layers: int) -> Count:
        def work(encoder):
            shape = batch, config.feat_in, seconds * FRAMES_PER_SECOND
            features = torch.empty(shape, dtype=torch.bfloat16)
            lengths = torch.full((batch,), shape[2])
            return lambda: encoder(features, lengths)

        sized = dataclasses.replace(config, n_layers=n_layers)
        return on_gpu(lambda: [ConformerEncoder(sized)], work)

    two, one = of_layers(2), of_layers(1)
    two.kernels.subtract(one.kernels)
    two.bytes.subtract(one.bytes)
    return two


def subsampling_case(size: str, batch: int, seconds: int) -> Count:
    config = config_of(size).encoder

    def make():
        return [ConformerEncoder(dataclasses.replace(config, n_layers=1)).pre_encode]

    def work(subsampling):
        features = torch.empty(
            batch, config.feat_in, seconds * FRAMES_PER_SECOND, dtype=torch.bfloat16
        )
        lengths = torch.full((batch,), features.shape[2])
        return lambda: subsampling(features, lengths)

    return on_gpu(make, work)


def training_case(size: str, batch: int, seconds: int, in_kernels: bool) -> tuple[Count, int]:
    """One layer, as in `encoder_case`, forward and backward: counts, and bytes that it keeps."""
    config = config_of(size).encoder
    shape = batch, config.feat_in, seconds * FRAMES_PER_SECOND

    def of_layers(n_layers: int) -> tuple[Count, int]:
        count, kept = Count(), {}

        def keep(x):
            kept[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        sized = dataclasses.replace(config, n_layers=n_layers)
        with torch.device("meta"), AsOnGpu(), count:
            with NoInitialisation():
                encoder = ConformerEncoder(sized).train().to(torch.bfloat16)
            for x in encoder.parameters():
                keep(x)
            weights = set(kept)
            features = torch.empty(shape, dtype=torch.bfloat16)
            count.kernels.clear()
            count.bytes.clear()
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
                mock.patch.object(kernels, "takes", lambda x: in_kernels),
                mock.patch.object(tiles, "gpu_memory", lambda device: CARD_BYTES),
            ):
                encoded, _ = encoder(features, torch.full((batch,), shape[2]))
            encoded.backward(torch.empty_like(encoded))
        return count, sum(x.nbytes() for key, x in kept.items() if key not in weights)

    (two, kept), (one, kept_by_one) = of_layers(2), of_layers(1)
    two.kernels.subtract(one.kernels)
    two.bytes.subtract(one.bytes)
    return two, kept - kept_by_one


def replaying():
    """Graphs whose replay launches nothing, beside the launch that is counted by hand."""

    def get(cache, key, make, most, device):
        if key not in cache.graphs:
            buffers, function = make()
            function()
            cache.graphs[key] = buffers, lambda: None
        return cache.graphs[key]

    return mock.patch.object(GraphCache, "get", get)


def launches_case(size: str, replayed: bool) -> Count:
    """All of the encoder for a clip of 10 s."""
    config = config_of(size).encoder

    def work(encoder):
        shape = 1, config.feat_in, 10 * FRAMES_PER_SECOND
        features, lengths = torch.empty(shape, dtype=torch.bfloat16), torch.full((1,), shape[2])
        return lambda: (encoder.replayed if replayed else encoder)(features, lengths)

    return counted_replay(lambda: [ConformerEncoder(config)], work, replayed)


def streaming_config(size: str, look_ahead: int = 13):
    """Of an encoder for streams, with chunks of 1.12 s."""
    return dataclasses.replace(
        config_of(size).encoder,
        att_context_style="chunked_limited",
        att_context_size=[70, look_ahead],
        conv_context_size="causal",
        causal_downsampling=True,
    )


def chunk_case(size: str, replayed: bool) -> Count:
    """A chunk of one stream, amid it."""
    config = streaming_config(size)

    def work(encoder):
        features = torch.empty(1, config.feat_in, 16 * 8, dtype=torch.bfloat16)
        state = first_state(encoder, 1)
        frames = graphs.MOST_FRAMES if replayed else 0

        def run():
            with mock.patch.object(state_module, "MOST_FRAMES", frames):
                encode_next(encoder, features, 2, 14, state)

        return run

    return counted_replay(lambda: [ConformerEncoder(config)], work, replayed)


def counted_replay(make, work, replayed: bool) -> Count:
    with replaying():
        count = on_gpu(make, work)
    if replayed:
        count.kernels["a graph"] += 1
    return count


def step_case(size: str, batch: int) -> Count:
    config = config_of(size)

    def work(decoder, joint):
        n_outputs, durations = joint.pred.out_features, config.loss.durations
        window = window_frames(batch, torch.device("cuda"))
        options = decoder, joint, config.vocab_size, durations, 10, None, None
        loop = LabelLoop(*options, batch, window)
        loop.projected = torch.empty(batch * 512, n_outputs, dtype=torch.bfloat16)
        return lambda: loop.step(0)

    return on_gpu(lambda: [PredictionNetwork(config.decoder), Joint(config.joint)], work)


def measure() -> dict[str, tuple[Count, str, int, int]]:
    """{case: (its counts, what its traffic is told by and how many of it; 0 for a step; what it
    keeps for a backward pass, bytes)}"""
    cases = {}
    for size, batch, seconds in ENCODERS:
        count = subsampling_case(size, batch, seconds)
        cases[f"{size}, subsampling {batch} of {seconds} s"] = count, "second", batch * seconds, 0
    for size, batch, seconds in ENCODERS:
        name = f"{size}, {batch} of {seconds} s"
        cases[name] = encoder_case(size, batch, seconds), "frame", frames_of(batch, seconds), 0
    for size, batch, seconds in TRAINING:
        for what, in_kernels in (("training", True), ("training, plain attention", False)):
            count, kept = training_case(size, batch, seconds, in_kernels)
            name = f"{size}, {what}, {batch} of {seconds} s"
            cases[name] = count, "frame", frames_of(batch, seconds), kept
    for name, case in (("one clip of 10 s", launches_case), ("a chunk of 1.12 s", chunk_case)):
        cases[f"0.6b, all of {name}"] = case("0.6b", False), "frame", 0, 0
        cases[f"0.6b, all of {name}, by a graph"] = case("0.6b", True), "frame", 0, 0
    for size, batch in STEPS:
        cases[f"{size}, a step of decoding {batch}"] = step_case(size, batch), "frame", 0, 0
    return cases


def frames_of(batch: int, seconds: int) -> int:
    return batch * -(-seconds * FRAMES_PER_SECOND // 8)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_counts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", metavar="NAME", help="one case, by operator")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the JSON here")
    args = parser.parse_args(argv)
    cases = measure()
    if args.case is not None:
        if args.case not in cases:
            parser.error(f"--case is {args.case!r}, expected one of {'; '.join(cases)}")
        count, unit, n, _ = cases[args.case]
        for name, total in count.bytes.most_common():
            if count.kernels[name]:
                traffic = f"{total / n / 1e3:10.1f} KB a {unit}" if n else ""
                print(f"{name:<40} {count.kernels[name]:4} {traffic}")
        return 0
    rows = [
        {
            "case": name,
            "kernels": count.kernels.total(),
            f"kb_a_{unit}": round(count.bytes.total() / n / 1e3, 1) if n else None,
        }
        | ({"kb_kept_a_frame": round(kept / n / 1e3, 1)} if kept else {})
        for name, (count, unit, n, kept) in cases.items()
    ]
    print(f"{'a layer, subsampling, all, or a step':<44} kernels  KB a frame, or a second  KB kept")
    for row in rows:
        traffic = row.get("kb_a_second", row.get("kb_a_frame")) or "-"
        kept = row.get("kb_kept_a_frame", "-")
        print(f"{row['case']:<44} {row['kernels']:7}  {traffic:>23}  {kept:>7}")
    result = {
        "benchmark": "kernel_counts",
        "commit": commit(),
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.out:
        write_result(args.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
