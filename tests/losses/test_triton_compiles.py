"""The Triton kernels compile for GPUs, by the library's own launches; no GPU is asked for."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ATTENTION = {"_attention_kernel", "_query_kernel", "_key_kernel", "_distance_kernel"}
ENCODER = {*ATTENTION, "_convolution_kernel"}
SUBSAMPLING = {"_start_kernel", "_stage_kernel", "_end_kernel"}
STEP = {"_window_kernel", "_read_kernel", "_label_kernel", "_lstm_kernel"}
KERNELS = {
    "_hidden_kernel",
    "_scores_kernel",
    "_lattice_kernel",
    "_occupancy_kernel",
    "_gradient_kernel",
    "_enc_kernel",
    "_pred_kernel",
}


def compiled(*arguments):
    # A process of its own: this one may have asked for Triton's interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.triton_kernels", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(result):
    return [row for part in result["parts"].values() for row in part["kernels"]]


def test_kernels_compile():
    rows = rows_of(compiled("--target", "90", "--few"))
    assert {row["kernel"] for row in rows} == KERNELS | ENCODER | SUBSAMPLING | STEP
    for row in rows:
        # none by Triton 3.9; 3.8, of torch 2.14, spills a little of attention's gradients
        assert row["stack"] <= 64 and row["spills"] <= 64, row
        if row["kernel"] in ("_scores_kernel", "_attention_kernel"):
            assert row["tensor_core"].get("HGMMA"), row  # float32 in three parts, too
        if row["kernel"] in ATTENTION:
            assert row["tensor_core"], row


def test_new_shapes_compile_nothing():
    """Fifty random batches: seven kernels, those of dense and sparse backward twice, and again for
    batches of more than 64 clips or texts of more than 127 tokens."""
    assert compiled("--batches", "50")["compilations"] <= 16


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 120])
def test_every_kernel_compiles(target):
    """Each dtype, RNNT and TDT, dense and sparse backward, odd and large sizes."""
    rows = rows_of(compiled("--target", str(target)))
    assert {row["kernel"] for row in rows} == KERNELS | ENCODER | SUBSAMPLING | STEP
