"""What `benchmarks.cpu_share` measures: ours and NeMo's transcription and training step, and our
matrix products alone.

    python -m benchmarks.cpu_share_engines WORK.json ENGINE

ENGINE is `ours:DTYPE` or `nemo:float32`. A worker loads its engine, says so, and then answers
`whole` (all clips, one at a time) and `step` (of training, in float32); ours also `stages` and
`products`. It runs with the Python of an environment that has the engine.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.workers import reply

LEARNING_RATE = 1e-6


class Ours:
    """Our model."""

    def __init__(self, path: str, dtype: str):
        import torch

        import fastconformer

        self.model = fastconformer.load_model(path, "cpu", getattr(torch, dtype))
        self.calls, self.flops = [], 0

    def text(self, clip) -> str:
        return self.model.transcribe([clip], batch_size=1)[0].text

    def stages(self, clips) -> dict:
        """Seconds of all clips, each alone."""
        import torch

        seconds = dict.fromkeys(("features", "encoder", "decoding"), 0.0)
        with torch.inference_mode():
            for clip in clips:
                times = [time.perf_counter()]
                samples, lengths = torch.from_numpy(clip)[None], torch.tensor([len(clip)])
                features = self.model.featurize(samples, lengths)
                times.append(time.perf_counter())
                encoded = self.model.encode(*features)
                times.append(time.perf_counter())
                self.model.decode_greedy(*encoded)
                times.append(time.perf_counter())
                for stage, (start, end) in zip(seconds, pairwise(times), strict=True):
                    seconds[stage] += end - start
        return {"stages": seconds}

    def products(self, clips) -> dict:
        """The encoder's matrix products of all clips in their order, by its own weights, with
        nothing between them; the inputs lie in the caches as far as they can."""
        import torch

        if not self.calls:
            self._record(clips)
        with torch.inference_mode():
            start = time.perf_counter()
            for function, arguments in self.calls:
                function(*arguments)
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "gflop": self.flops / 1e9}

    def _record(self, clips) -> None:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        ops = torch.ops
        # where the activations end among the arguments, and the product's left side is
        places = {
            ops.mkldnn._linear_pointwise.default: (1, 0),
            ops.onednn.qlinear_pointwise.default: (1, 0),
            ops.aten.mm.default: (1, 0),
            ops.aten.bmm.default: (2, 0),
            ops.aten.addmm.default: (2, 1),
            ops.aten.baddbmm.default: (3, 1),
        }
        stand_ins = {}

        def stand_in(x):
            key = x.shape, x.stride(), x.dtype
            if key not in stand_ins:
                stand_ins[key] = torch.empty_strided(*key[:2], dtype=x.dtype).copy_(x)
            return stand_ins[key]

        def recorded(function, arguments, out):
            end, left = places[function]
            self.flops += 2 * out.numel() * arguments[left].shape[-1]
            kept = [stand_in(x) for x in arguments[:end]]
            # without an activation that is fused behind it
            for x in arguments[end:]:
                kept.append("none" if isinstance(x, str) and x in ("swish", "relu") else x)
            self.calls.append((function, kept))

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                out = function(*arguments, **(options or {}))
                if function in places:
                    recorded(function, arguments, out)
                return out

        with torch.inference_mode():
            for clip in clips:
                samples, lengths = torch.from_numpy(clip)[None], torch.tensor([len(clip)])
                features = self.model.featurize(samples, lengths)
                with Recorder():
                    self.model.encode(*features)

    def training_step(self, clips, targets):
        """-> a function that takes a step and gives its loss."""

        from training.data.store import Batch
        from training.loop.step import update
        from training.objective.objective import batch_loss, objective_of
        from training.optim.optim import build_optimizer
        from training.recipe.sections import LossRecipe, OptimRecipe

        model = self.model.train()
        objective = objective_of(model, LossRecipe(heads="ctc"))
        optimizer = build_optimizer(model, OptimRecipe(lr=LEARNING_RATE))
        batch = Batch((), *padded(clips), *padded(targets))

        def step() -> float:
            optimizer.zero_grad()
            loss, _ = batch_loss(model, batch, objective)
            loss.backward()
            update(optimizer, None)
            return float(loss.detach())

        return step


class NeMo:
    """NeMo's, with the same weights and the same config."""

    def __init__(self, path: str, dtype: str):
        import logging

        from nemo.collections.asr.models import ASRModel
        from nemo.utils import logging as nemo_logging

        nemo_logging.setLevel(logging.ERROR)
        self.model = ASRModel.restore_from(path, map_location="cpu").eval()

    def text(self, clip) -> str:
        found = self.model.transcribe([clip], batch_size=1, verbose=False)
        found = found[0] if isinstance(found, tuple) else found
        return getattr(found[0], "text", found[0])

    def training_step(self, clips, targets):
        import torch

        model = self.model.train()
        audio, audio_lengths = padded(clips)
        targets, target_lengths = padded(targets)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-3
        )

        def step() -> float:
            optimizer.zero_grad()
            encoded, lengths = model(input_signal=audio, input_signal_length=audio_lengths)
            loss = model.ctc_loss(
                log_probs=model.ctc_decoder(encoder_output=encoded),
                targets=targets,
                input_lengths=lengths,
                target_lengths=target_lengths,
            )
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step


def padded(rows):
    """Arrays of any lengths -> (B, longest), (B,)."""
    import torch

    rows = [torch.from_numpy(row) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def work(work_file: Path, engine: str) -> None:
    """A worker's life."""
    import numpy as np
    import torch

    task = json.loads(work_file.read_text())
    torch.set_num_threads(task["threads"])
    arrays = np.load(task["arrays"])
    clips, trained, targets = (
        [arrays[name] for name in arrays.files if name.startswith(kind)]
        for kind in ("clip", "trained", "targets")
    )
    name, dtype = engine.split(":")
    model, take = {"ours": Ours, "nemo": NeMo}[name](task["model"], dtype), None
    reply()
    for line in sys.stdin:
        what = line.strip()
        if what in ("stages", "products"):
            reply(**getattr(model, what)(clips))
            continue
        if what == "step" and take is None:
            take = model.training_step(trained, targets)
        start = time.perf_counter()
        found = {"loss": take()} if what == "step" else {"texts": [model.text(c) for c in clips]}
        reply(seconds=time.perf_counter() - start, **found)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
