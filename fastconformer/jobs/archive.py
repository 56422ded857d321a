"""A transcription job over an archive: a JSON line a clip, appended as they come, resumable.

Clips that already have a line are not transcribed again. Under torchrun each process has every n-th
clip and a file of its own, which the first process merges at the end, in the order of the clips.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..formats.manifest import Clip
from ..formats.transcripts import to_json
from .results import Progress, all_results, merge_results, part_path, read_results
from .rounds import transcribe_clips

if TYPE_CHECKING:
    from ..model import ASRModel


def processes() -> tuple[int, int]:
    """(number of this process, how many there are), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run_job(
    model: "ASRModel",
    clips: list[Clip],
    output: Path | None,
    on_failure: Callable[[Clip, str], None],
    **options,
) -> int:
    """Appends a line to `output` (None: stdout) for each clip that has none; returns the number of
    clips that failed. `options`: see `transcribe_clips`.

    Every process of several takes its share and waits for the others, the first then merges.
    """
    rank, world_size = processes()
    keys = list(dict.fromkeys(map(_key, clips)))
    clips = list({_key(clip): clip for clip in reversed(clips)}.values())[::-1]
    done = {} if output is None else all_results(output, mend=world_size == 1)
    if world_size > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        dist.barrier()  # everyone has read what was there before anyone writes
    waiting = [clip for clip in clips if _key(clip) not in done]
    if len(waiting) < len(clips) and rank == 0:
        n_done = len(clips) - len(waiting)
        print(f"transcribe: {n_done} of {len(clips)} clips are in {output}", file=sys.stderr)
    waiting = waiting[rank::world_size]
    progress, failed = Progress(len(waiting), False if output is None else None), 0
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if output is not None:
            part = part_path(output, rank, world_size)
            read_results(part, mend=True)
            out = stack.enter_context(open(part, "a", encoding="utf-8", errors="backslashreplace"))
        for clip, transcript, reason in transcribe_clips(model, waiting, **options):
            if transcript is None:
                on_failure(clip, reason)
                failed += 1
                continue
            section = {}
            if clip.offset_s is not None:
                section = {"offset": clip.offset_s, "clip_duration": clip.duration_s}
            fields = {"audio": clip.audio, "path": str(clip.path)} | section
            line = json.dumps(to_json(transcript, **fields), ensure_ascii=False, allow_nan=False)
            print(line, file=out, flush=True)
            progress.add(transcript.duration)
    progress.close()
    if world_size > 1:
        failed = _sum_of_all(failed)  # also waits for all
        if rank == 0:
            merge_results(output, keys)
        dist.destroy_process_group()
    elif output is not None and any(output.parent.glob(f"{output.name}.part-*")):
        merge_results(output, keys)  # of processes that were killed
    if failed and rank == 0:
        print(f"transcribe: {failed} of {len(clips)} inputs failed", file=sys.stderr)
    return failed


def _sum_of_all(number: int) -> int:
    import torch
    import torch.distributed as dist

    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


def _key(clip: Clip) -> tuple:
    return str(clip.path), clip.offset_s, None if clip.offset_s is None else clip.duration_s
