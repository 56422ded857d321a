"""A transcription job over an archive: a JSON line a clip, written as they are done, resumable.

A line holds the transcript, or the reason why there is none, with the model and the options. Clips
that have a transcript are not transcribed again; those that failed are. Under torchrun, on one
machine or on several that share the disk, each process has every n-th clip and a file of its own,
which the first process merges at the end, in the order of the clips.
"""

import contextlib
import datetime
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.files import ESCAPES, naming_file, only_process
from ..formats.manifest import Clip
from .outputs import json_line, naming
from .results import Progress, all_results, merge_results, part_path, read_results
from .rounds import transcribe_clips

if TYPE_CHECKING:
    from ..model import ASRModel

WAIT = datetime.timedelta(days=1)  # at the end, for the slowest process of several


def processes() -> tuple[int, int]:
    """(number of this process, how many there are), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run_job(
    model: "ASRModel",
    clips: list[Clip],
    output: Path | None,
    made_by: dict,
    on_told: Callable[[Clip, str], None],
    progress: Progress,
    **options,
) -> int:
    """Appends a line to `output` (None: stdout) for each clip that has no transcript there; returns
    how many have none at the end.

    made_by: the model and the options, as the lines tell them; on_told: called with each failure
    and each note; options: see `transcribe_clips`. ValueError: another process is writing there, or
    what is there was made by another model or with other options, or a process of several ended
    before it was done.
    """
    if output is None:
        return _append(model, clips, sys.stdout, made_by, on_told, progress, options)
    rank, world_size = processes()
    part = part_path(output, rank, world_size)
    with contextlib.ExitStack() as stack:
        if rank == 0:
            stack.enter_context(only_process(output))
        if part != output:
            stack.enter_context(only_process(part))
        clips = list({_key(clip): clip for clip in reversed(clips)}.values())[::-1]
        done = all_results(output, mend=world_size == 1)
        _check_same(output, done, made_by)
        there = _transcribed(done)
        waiting = [clip for clip in clips if _key(clip) not in there]
        if len(waiting) < len(clips) and rank == 0:
            n_done = len(clips) - len(waiting)
            print(f"transcribe: {n_done} of {len(clips)} clips are in {output}", file=sys.stderr)
        if world_size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo")
            dist.barrier()  # everyone has read what was there before anyone writes
        waiting = waiting[rank::world_size]
        progress.n_clips = len(waiting)
        read_results(part, mend=True)
        with naming_file(part), open(part, "a", encoding="utf-8", errors=ESCAPES) as out:
            failed = _append(model, waiting, out, made_by, on_told, progress, options)
        if world_size > 1:
            failed = _sum_of_all(failed)  # also waits for all
        if rank == 0:
            merge_results(output, [_key(clip) for clip in clips])
        if world_size > 1:
            dist.destroy_process_group()
    return failed


def _append(model, clips, out, made_by, on_told, progress, options) -> int:
    """Writes a line for each of these clips; the number of those that failed."""
    failed, options = 0, options | progress.options
    for clip, transcript, reason in transcribe_clips(model, clips, in_order=False, **options):
        for note in clip.notes:
            on_told(clip, note)
        fields = {"path": str(clip.path)}
        if clip.offset_s is not None:
            fields["clip_duration"] = clip.duration_s
        if transcript is None:
            on_told(clip, reason)
            failed += 1
            line = json.dumps(naming(clip) | fields | {"error": reason} | made_by)
        else:
            line = json_line(clip, transcript, **fields, **made_by)
            progress.add(transcript.duration)
            if transcript.doubtful:
                on_told(clip, f"the text is doubtful: {transcript.doubtful}")
        progress.clear()
        print(line, file=out, flush=True)
    return failed


def fingerprint(model: "ASRModel") -> str:
    """What tells two models apart, wherever their files lie: a digest of the config and of some
    values of each tensor."""
    digest = hashlib.sha256(json.dumps(model.config.nemo, sort_keys=True, default=str).encode())
    for name, tensor in model.named_parameters():
        some = tensor.detach().flatten()[:16].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:12]


def _check_same(output: Path, done: dict[tuple, str], made_by: dict) -> None:
    for line in done.values():
        found = json.loads(line)
        for name in ("model_id", "head", "options"):
            if name in found and name in made_by and found[name] != made_by[name]:
                raise ValueError(
                    f"{output} holds transcripts with {name} {_short(found[name])}, this is "
                    f"{_short(made_by[name])}; name another file with -o"
                )


def _short(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _key(clip: Clip) -> tuple:
    return str(clip.path), clip.offset_s, None if clip.offset_s is None else clip.duration_s


def _transcribed(done: dict[tuple, str]) -> set[tuple]:
    """Keys of clips that have a transcript; of all channels, where they are apart."""
    n_missing: dict[tuple, int] = {}
    for key, line in done.items():
        result = json.loads(line)
        if "error" not in result:
            clip = key[:3]
            n_missing[clip] = n_missing.get(clip, result.get("n_channels", 1)) - 1
    return {key for key, number in n_missing.items() if number <= 0}


def _sum_of_all(number: int) -> int:
    """Over all processes, once the last of them is done."""
    import torch
    import torch.distributed as dist

    try:
        dist.monitored_barrier(timeout=WAIT)
        total = torch.tensor(number)
        dist.all_reduce(total)
    except RuntimeError:  # its connection is gone, with its process or its machine
        raise ValueError(
            "another process of this job ended early; what is done is kept, start it again"
        ) from None
    return int(total)
