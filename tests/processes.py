"""Runs jobs of `training.finetune` in one process of several: `torchrun tests/processes.py JOBS`.

JOBS is a JSON list of {"arguments": [...], "trouble": ...}, where trouble happens in the process
of rank 1 only: "nan" (its second batch has a loss of NaN) or "memory" (what it encodes is too large
with more than one clip). Ends with the last job's exit code, at the first that is not 0.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

from fastconformer.networks.heads import CTCHead
from fastconformer.networks.subsampling import ConvSubsampling
from training.finetune import main


@contextlib.contextmanager
def after_each(module_type, action):
    """Calls action(module, inputs, output) after every forward pass of a kind of module; what it
    gives takes the output's place."""

    def hook(module, inputs, output):
        return action(module, inputs, output) if isinstance(module, module_type) else None

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def second_is_nan():
    calls = []

    def action(module, inputs, output):
        if module.training:
            calls.append(1)
        return output * float("nan") if len(calls) == 2 and module.training else None

    return after_each(CTCHead, action)


def small_memory(most_clips: int = 1):
    def action(module, inputs, output):
        if module.training and len(output[0]) > most_clips:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")

    return after_each(ConvSubsampling, action)


TROUBLE = {"nan": second_is_nan, "memory": small_memory}

if __name__ == "__main__":
    code = 0
    for job in json.loads(Path(sys.argv[1]).read_text()):
        trouble = job.get("trouble") if os.environ["RANK"] == "1" else None
        with TROUBLE[trouble]() if trouble else contextlib.nullcontext():
            code = code or main(job["arguments"])
    sys.exit(code)
