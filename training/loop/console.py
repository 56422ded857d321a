"""What a run shows and hears: printed lines, a progress bar, TensorBoard, signals to stop."""

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fastconformer import cli


class Stopped(Exception):
    """SIGINT or SIGTERM asked for an end; `signal` says which."""

    def __init__(self, text: str, number: signal.Signals = signal.SIGTERM):
        super().__init__(text)
        self.signal = number

    def end(self) -> int:
        """A command's exit status: of Ctrl-C 130, after the line that says where it stands.

        Raises:
            Failed: it was another signal.
        """
        if self.signal != signal.SIGINT:
            raise cli.Failed(str(self)) from None
        print(self, file=sys.stderr)
        return 130


def tensorboard(folder: Path, step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step or None)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """Gives a function that raises Stopped once SIGINT or SIGTERM has come."""
    received = []

    def note(number, frame):
        if received:  # the second one does not wait
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}

    def check_stop():
        if received:
            raise Stopped(f"stopped by {received[0].name}", received[0])

    try:
        yield check_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bar(max_steps: int, step: int) -> Iterator[Callable[[int, float], None]]:
    """A rich bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task("training", total=max_steps, completed=step, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.3f}")


class Lines(logging.Handler):
    """Prints; unlike a StreamHandler it follows sys.stdout, which rich replaces above its bar."""

    def emit(self, record: logging.LogRecord):
        print(self.format(record), flush=True)
