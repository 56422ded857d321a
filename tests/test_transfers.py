"""What a thread makes ahead: the same, in order, errors and interrupts included."""

import _thread
import contextlib
import threading
import time

import numpy as np
import pytest
import torch
from conftest import golden

from fastconformer import load_model, transfers
from fastconformer.audio.files import as_int16
from fastconformer.recordings.samples import as_float
from fastconformer.transfers import ahead, on_host

CPU = torch.device("cpu")


def test_items_come_in_order_one_ahead():
    made, threads = [], set()

    def make(i):
        made.append(i)
        threads.add(threading.current_thread().name)
        return i, (torch.tensor([i]), torch.tensor([[i, i]]))

    for count in (0, 1, 2, 7):
        made.clear()
        for n, (known, (one, two)) in enumerate(ahead(iter(range(count)), make, CPU)):
            assert known == n and one.tolist() == [n] and two.tolist() == [[n, n]]
            assert len(made) <= n + 2  # no more of it in memory
        assert made == list(range(count))
    assert any(name != threading.main_thread().name for name in threads)


@pytest.mark.parametrize("count", [1, 5])
def test_an_error_of_the_thread_reaches_the_caller(count):
    def make(i):
        if i == count // 2:
            raise OSError("disk gone")
        return i, ()

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        seen += (known for known, _ in ahead(range(count), make, CPU))
    threads = threading.active_count()
    rest = ahead(range(9), lambda i: (i, ()), CPU)
    next(rest)
    rest.close()
    assert threading.active_count() == threads  # nothing is left behind


def test_an_interrupt_ends_it():
    """Ctrl-C while the thread works and the caller waits for it."""

    def make(i):
        if i == 3:
            _thread.interrupt_main()
        time.sleep(0.01)
        return i, ()

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        for _ in ahead(range(10_000), make, CPU):
            pass
    assert threading.active_count() == threads


def test_sixteen_bits_stay_what_they_were():
    """Each value there is, divided on the device or on the host, by every road."""
    values = np.arange(-32768, 32768).astype(np.int16)
    floats = values / np.float32(32768)
    found = as_int16(floats)
    assert found.dtype == np.int16 and np.array_equal(found, values)
    assert np.array_equal(as_float(torch.from_numpy(found)).numpy(), floats)
    for other in (1.0, -1.1, 1e-6, np.nan):  # no 16-bit value, at the end of a clip
        clip = np.append(floats, np.float32(other))
        assert as_int16(clip) is clip


def test_tensors_of_any_kind_reach_the_host_together():
    given = [torch.tensor([True, False]), torch.tensor(3.5), torch.arange(6).view(2, 3)]
    for x, found in zip(given, on_host(*given), strict=True):
        assert torch.equal(x, found)


def test_batches_in_a_row_are_those_alone():
    """Texts and times, tokens and scores of several batches, int16 and float32."""
    model = load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    generator = np.random.default_rng(0)
    clips = [0.1 * generator.standard_normal(n) for n in (9000, 30000, 16000, 24000, 12000)]
    clips = [np.rint(clip * 32768).astype(np.int16) for clip in clips]
    alone = [model.transcribe([clip], timestamps=True)[0] for clip in clips]
    assert any(t.tokens for t in alone)
    for given in (clips, [clip / np.float32(32768) for clip in clips]):
        found = list(model.transcribe_each(given, batch_size=1, timestamps=True))
        assert sorted(place for place, _ in found) == list(range(5))
        for place, transcript in found:
            assert transcript == alone[place]


def test_without_pinned_memory_the_copies_are_ordinary(monkeypatch, caplog):
    """As where WSL or a small container gives no more of it: said once."""
    zeros = torch.zeros

    def refuses(*arguments, pin_memory=False, **more):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might")
        return zeros(*arguments, **more)

    class OnHost(torch.Tensor):
        def pin_memory(self):
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might")

        def to(self, device, non_blocking=False):
            assert not non_blocking
            return "there"

    monkeypatch.setattr(torch, "zeros", refuses)
    transfers._say.cache_clear()
    for _ in range(2):
        assert transfers.host_zeros((2, 3), torch.int16, pinned=True).shape == (2, 3)
        x = torch.arange(3).as_subclass(OnHost)
        assert transfers.sent(x, torch.device("cuda", 0)) == "there"
    (record,) = caplog.records
    assert record.getMessage().endswith("its copies: CUDA error: out of memory")


def test_copies_have_one_stream(monkeypatch):
    """torch's allocator keeps what each has freed apart."""
    made = []

    class Stream:
        def __init__(self, device):
            made.append(device)

        def record_event(self):
            return None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)

    def inside(which):
        entered.append(type(which))
        return contextlib.nullcontext()

    entered = []
    monkeypatch.setattr(torch.cuda, "device", inside)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(transfers, "sent", lambda x, device: x)
    transfers._copy_stream.cache_clear()
    for _ in range(3):
        found = ahead(range(3), lambda i: (i, (torch.tensor(i),)), torch.device("cuda", 0))
        assert [known for known, _ in found] == [0, 1, 2]
    assert made == [torch.device("cuda", 0)]
    assert entered == 9 * [torch.device, Stream]  # else a thread takes memory of the first GPU, too
    transfers._copy_stream.cache_clear()
