"""Processes that do a benchmark's work on demand, each an engine with the Python that it needs.

A worker prints what it likes, and its answers on lines of their own, marked; it reads a line of its
stdin for each task. Workers need the standard library only: peers' environments have little more.
"""

import contextlib
import json
import os
import subprocess
import tempfile

from benchmarks import REPOSITORY

MARK = "@reply "


class WorkerFailed(ValueError):
    """A worker ended without an answer; the message has the last line of what it printed."""


def reply(**values) -> None:
    """In a worker: an answer."""
    print(MARK + json.dumps(values), flush=True)


class Worker:
    """A process that runs `python -m MODULE ARGUMENTS...` with so many threads."""

    def __init__(self, name: str, python: str, module: str, arguments: list[str], threads: int):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        numbers = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        try:
            self.process = subprocess.Popen(
                [python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                cwd=REPOSITORY,
                env=os.environ | numbers,
            )
        except OSError as error:
            raise WorkerFailed(f"{name} failed: {python}: {error.strerror}") from None

    def answer(self) -> dict:
        """Its next answer."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self.log.seek(0)
        said = [line for line in self.log.read().splitlines() if line.strip()]
        raise WorkerFailed(f"{self.name} failed: {said[-1] if said else 'it ended without a word'}")

    def ask(self, *words) -> dict:
        """Its answer to a task, words on a line."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; its log says why
            self.process.stdin.write(" ".join(map(str, words)) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def peak_bytes(self) -> int:
        """The most that it has held; it must be alive."""
        from fastconformer import process_memory

        return process_memory.peak_bytes(self.process.pid)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()
