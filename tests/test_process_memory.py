"""What /proc says of this process, and what is said where there is none."""

import numpy as np
import pytest

from fastconformer import process_memory


def test_the_peak_of_this_process():
    if not process_memory.forget_peak():
        pytest.skip("the peak of the resident set cannot be reset on this system")
    before = process_memory.peak_bytes()
    assert 0 < process_memory.resident_bytes() <= before
    np.ones(32_000_000)  # 256 MB, gone again: too large for what the C library keeps free
    raised = process_memory.peak_bytes() - before
    assert 200e6 < raised < 320e6
    assert process_memory.forget_peak() and process_memory.peak_bytes() < before + raised
    assert process_memory.free_bytes() > 1e6


def test_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(process_memory, "PROC", tmp_path)
    assert process_memory.resident_bytes() == process_memory.peak_bytes() == 0
    assert not process_memory.forget_peak()
    assert process_memory.free_bytes() > 1e6  # half of what is built in
    process_memory.give_back()
