"""The loop itself, on a tiny model and the golden case's eight short clips."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import golden, ledger, logged
from processes import after_each

from fastconformer import load_model
from fastconformer.networks.heads import CTCHead
from fastconformer.networks.subsampling import ConvSubsampling
from training.finetune import main
from training.loop.run_folder import load_batch
from training.loop.step import seed_step
from training.objective.objective import batch_loss, clip_weights, objective_of
from training.optim.optim import learning_rate
from training.recipe.recipe import load_recipe
from training.recipe.sections import LossRecipe, ModelRecipe
from training.setup.freeze import train_mode
from training.setup.start import build_model, tokenizer_files

ROOT = Path(__file__).parents[2]


def number_of(name: str) -> int:
    return int(re.search(r"line (\d+)\)$", name)[1]) - 1


def test_a_run_leaves_what_it_promises(corpus, capsys):
    recipe, run = corpus
    assert main([str(recipe), "trainer.val_every_steps=2", "trainer.log_clips=true"]) == 0
    assert [record["step"] for record in logged(run)] == [1, 2, 3, 4]
    first = [record["clips"] for record in logged(run) if record["epoch"] == 0]
    names = [name for (batch,) in first for name in batch]  # one batch a step
    lines = (recipe.parent / "train.jsonl").read_text().splitlines()
    assert len(names) == len(set(names)) > len(first)
    assert all(json.loads(lines[number_of(name)])["audio_filepath"] in name for name in names)
    assert {"loss", "tdt", "ctc", "lr", "grad_norm", "epoch"} <= logged(run)[0].keys()
    records = ledger(run)
    assert [record["step"] for record in records] == [0, 2, 4]
    assert records[0]["train_loss"] is None and records[1]["train_loss"] > 0
    assert records[0]["sets"]["dev"]["ctc"].keys() == {"wer", "cer", "raw_wer", "raw_cer"}
    names = {"recipe.yaml", "dropped.jsonl", "tensorboard", "checkpoints", "best", "last"}
    assert names <= {path.name for path in run.iterdir()}
    shown = capsys.readouterr().out
    assert "said:" in shown and "WER" in shown
    # the untouched model is the first line of the ledger
    untouched = load_model(golden("train_parity") / "model.nemo")
    clip = str(recipe.parent / "clip0.wav")
    assert untouched.transcribe([clip])[0].text in shown
    last, best, archive = (
        load_model(run / name).state_dict() for name in ("last", "best", "model.nemo")
    )
    assert all(torch.equal(value, best[name]) for name, value in archive.items())
    before = untouched.state_dict()
    assert sum(not torch.equal(value, before[name]) for name, value in last.items()) > 50
    # a second call has nothing left to do, and breaks nothing
    log = (run / "log.jsonl").read_text()
    assert main([str(recipe), "trainer.val_every_steps=2", "trainer.log_clips=true"]) == 0
    assert (run / "log.jsonl").read_text() == log
    assert ledger(run) == records


def test_loss_falls_on_two_clips(corpus):
    recipe, run = corpus
    lines = (recipe.parent / "train.jsonl").read_text().splitlines(keepends=True)
    (recipe.parent / "train.jsonl").write_text("".join(lines[:2]))
    options = ["trainer.max_steps=40", "optim.lr=3e-3", "schedule.warmup_steps=3"]
    assert main([str(recipe), *options]) == 0
    losses = [record["loss"] for record in logged(run)]
    assert losses[-1] < 0.7 * losses[0]
    assert losses[-1] == min(losses) or losses[-1] < 1.1 * min(losses)


NOISY = [  # everything random is on, and steps cross the ends of epochs
    "trainer.max_steps=21",
    "trainer.val_every_steps=7",
    "trainer.save_every_steps=3",
    "trainer.accumulate=2",
    "trainer.ema_decay=0.9",
    "optim.name=adamw8bit",
    "data.batch_size=null",
    "data.batch_duration_s=3.5",
    "data.num_workers=2",
    "model.dropout=0.1",
    "loss.omega=0.3",
    "spec_augment.freq_masks=2",
    "spec_augment.time_masks=2",
    "spec_augment.time_width=0.2",
    "schedule.warmup_steps=5",
]


def start(recipe, output, *options):
    command = [sys.executable, "-m", "training.finetune", str(recipe), f"output={output}"]
    return subprocess.Popen(
        [*command, *NOISY, *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(process, run: Path, steps: int):
    until = time.monotonic() + 400
    while time.monotonic() < until and process.poll() is None:
        log = run / "log.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"no step {steps}: {process.communicate()[1]}")


def test_a_killed_run_goes_on_bit_for_bit(corpus, tmp_path, capsys):
    recipe, _ = corpus
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(recipe, whole)
    step = random.randrange(1, 20)
    killed = start(recipe, broken)
    wait_for_steps(killed, broken, step)
    killed.send_signal(signal.SIGSTOP)
    assert main([str(recipe), f"output={broken}"]) == 1  # its folder is taken
    assert "another run is at work there" in capsys.readouterr().err
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    with open(broken / "log.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a torn last line
    again = start(recipe, broken)
    for running in (process, again):
        assert running.wait(timeout=400) == 0, running.stderr.read()
        running.stderr.close()
    assert (broken / "log.jsonl").read_text() == (whole / "log.jsonl").read_text(), f"step {step}"
    assert ledger(broken) == ledger(whole)
    for name in ("last/model.safetensors", "best/model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), f"{name}, step {step}"


@pytest.mark.slow  # eight minutes on a busy machine
def test_ten_kills_leave_no_trace(corpus, tmp_path):
    """Of two stages: a kill falls into the start, a step, an evaluation or a half-written file."""
    recipe, _ = corpus
    options = ["stages=[{optim: {lr: 2.0e-3}}, {trainer: {max_steps: 30}}]", "keep.top_k=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def log_lines() -> int:
        return sum(log.read_bytes().count(b"\n") for log in broken.glob("stage_*/log.jsonl"))

    chance = random.Random(seed := random.randrange(10**6))
    kills = []
    for _ in range(10):
        killed = start(recipe, broken, *options)
        before, more = log_lines(), chance.randrange(5)  # 0: while it starts
        while killed.poll() is None and log_lines() < before + more:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.5 if more else 5))
        killed.kill()
        killed.communicate()
        kills.append((log_lines(), killed.returncode))
    told = f"(lines, exit status) {kills}, seed {seed}"
    assert {status for _, status in kills} == {-signal.SIGKILL}, told
    assert kills[-1][0] > 10, told
    for run in (broken, whole):
        running = start(recipe, run, *options)
        problems = running.communicate(timeout=400)[1]
        assert running.returncode == 0, problems
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    for name in sorted(name for name in names if "tensorboard" not in name):
        path = broken / name
        assert path.is_file(), f"no {name}: {told}"
        if path.name in ("log.jsonl", "model.nemo") or path.suffix == ".safetensors":
            assert path.read_bytes() == (whole / name).read_bytes(), f"{name}: {told}"
        if path.name == "ledger.jsonl":
            assert ledger(path.parent) == ledger((whole / name).parent), f"{name}: {told}"


@pytest.mark.parametrize("option", ["optim.name=adamw8bit", "trainer.precision=bf16"])
def test_every_kind_of_step_resumes_bit_for_bit(corpus, tmp_path, option):
    recipe, run = corpus
    options = ["trainer.max_steps=6", "trainer.save_every_steps=2", "trainer.keep_last=9", option]
    assert main([str(recipe), *options]) == 0
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    name = "checkpoints/step_00000002.pt"
    (tmp_path / "again" / name).write_bytes((run / name).read_bytes())
    shutil.copytree(run / "best", tmp_path / "again" / "best")
    assert main([str(recipe), *options, f"output={tmp_path / 'again'}"]) == 0
    assert logged(tmp_path / "again") == logged(run)[2:]


def test_a_step_that_fails_names_its_clips(corpus, capsys):
    def broken(module, inputs, output):
        raise RuntimeError("CUDA error: an illegal memory\naccess was encountered")

    recipe, run = corpus
    with after_each(ConvSubsampling, broken):
        assert main([str(recipe), "data.validation={}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 1 failed on a batch of (2, ") and error.count("\n") == 1
    assert "an illegal memory access" in error
    failed = json.loads((run / "failed.jsonl").read_text())
    assert len(failed["utterances"]) == 2 and "train.jsonl, line" in failed["utterances"][0]
    batch, _ = load_batch(run / "failed" / "step_00000001_batch_0.pt")
    assert [u.name for u in batch.utterances] == failed["utterances"]


def test_a_polite_stop_saves_and_goes_on(corpus, tmp_path):
    recipe, _ = corpus
    run = tmp_path / "stopped"
    process = start(recipe, run, "trainer.save_every_steps=1000")
    wait_for_steps(process, run, 2)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert error.startswith("error: stopped by SIGTERM; saved ")
    assert error.count("\n") == 1
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert int(checkpoint.stem.removeprefix("step_")) == len(logged(run))


def test_what_is_frozen_stays_and_the_rest_moves(corpus):
    recipe, run = corpus
    options = ["freeze.encoder_layers=half", "freeze.modules=[joint]", "loss.heads=all"]
    assert main([str(recipe), *options]) == 0
    before = load_model(golden("train_parity") / "model.nemo").state_dict()
    after = load_model(run / "last").state_dict()
    frozen = ("encoder.pre_encode.", "encoder.layers.0.", "joint.")
    for name, value in before.items():
        if name.startswith(frozen):  # BatchNorm's statistics too
            assert torch.equal(after[name], value), name
    moving = [name for name in before if not name.startswith((*frozen, "preprocessor."))]
    moved = [name for name in moving if not torch.equal(after[name], before[name])]
    assert len(moved) > 0.9 * len(moving)


@pytest.mark.parametrize(("heads", "still"), [("ctc", "joint."), ("transducer", "ctc_decoder.")])
def test_one_head_alone(corpus, heads, still):
    recipe, run = corpus
    assert main([str(recipe), f"loss.heads={heads}"]) == 0
    name = {"ctc": "ctc", "transducer": "tdt"}[heads]
    assert all(record["loss"] == pytest.approx(record[name]) for record in logged(run))
    assert ledger(run)[0]["head"] == name
    before = load_model(golden("train_parity") / "model.nemo").state_dict()
    after = load_model(run / "last").state_dict()
    for key, value in before.items():
        assert not key.startswith(still) or torch.equal(after[key], value)


@pytest.mark.parametrize("option", ["trainer.precision=bf16", "optim.name=adamw8bit"])
def test_lower_precision_stays_near(corpus, option):
    recipe, run = corpus
    assert main([str(recipe)]) == 0
    assert main([str(recipe), option, f"output={run}2"]) == 0
    exact = [record["loss"] for record in logged(run)]
    lower = [record["loss"] for record in logged(Path(f"{run}2"))]
    assert lower == pytest.approx(exact, rel=0.03)
    assert lower != exact


def test_a_step_that_is_not_finite_is_skipped_saved_and_named(corpus, capsys):
    recipe, run = corpus
    calls = []

    def second_is_nan(module, inputs, output):
        calls.append(output.shape)
        if len(calls) == 2:
            output = output.clone()
            output[1] *= float("nan")
        return output

    options = ["data.validation={}", "loss.heads=ctc"]
    with after_each(CTCHead, second_is_nan):
        assert main([str(recipe), *options]) == 0
    assert [record["loss"] is None for record in logged(run)] == [False, True, False, False]
    bad = json.loads((run / "nonfinite.jsonl").read_text())
    (saved,) = (run / "nonfinite").iterdir()
    batch, facts = load_batch(saved)
    # the one clip, not its whole batch
    assert bad["step"] == 2 and bad["utterances"] == [batch.utterances[1].name]
    assert facts["seeds"] == [1234, 1, 0]
    state = load_model(run / "last").state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    # BatchNorm has seen three batches, not four
    assert state["encoder.layers.0.conv.batch_norm.num_batches_tracked"] == 3 + _tracked()
    # too many of them end the run, with the clips in the message
    with after_each(CTCHead, lambda module, inputs, output: output * float("nan")):
        options += [f"output={run}2", "trainer.max_nonfinite_steps=2"]
        assert main([str(recipe), *options]) == 1
    error = capsys.readouterr().err
    assert "2 steps were not finite; lower optim.lr, or look at these clips: " in error
    assert "train.jsonl, line" in error and error.count("\n") == 1


def test_a_saved_batch_gives_the_same_loss_again(corpus):
    recipe, run = corpus
    calls = []

    def nan_gradient(module, inputs, output):
        calls.append(1)
        if len(calls) == 1:
            output[0].register_hook(lambda gradient: gradient * float("nan"))
        return output

    options = ["data.validation={}", "spec_augment.time_masks=3", "spec_augment.time_width=0.2"]
    with after_each(ConvSubsampling, nan_gradient):
        assert main([str(recipe), *options]) == 0
    [record, *_] = logged(run)
    assert record["loss"] is not None and record["grad_norm"] is None
    batch, facts = load_batch(run / "nonfinite" / "step_00000001_batch_0.pt")
    used = load_recipe(run / "recipe.yaml")
    model = build_model(used.model, used.loss, used.trainer.seed)  # the weights have not moved
    train_mode(model)
    seed_step(*facts["seeds"])
    loss, _ = batch_loss(model, batch, objective_of(model, used.loss, used.spec_augment))
    assert float(loss.detach()) == pytest.approx(record["loss"], rel=1e-6)


def _tracked() -> int:
    state = load_model(golden("train_parity") / "model.nemo").state_dict()
    return int(state["encoder.layers.0.conv.batch_norm.num_batches_tracked"])


def test_bad_clips_are_listed_and_the_run_goes_on(corpus, capsys):
    recipe, run = corpus
    folder = recipe.parent
    (folder / "clip3.wav").write_bytes(b"RIFF is not enough")
    with open(folder / "train.jsonl", "a") as file:
        file.write("{broken\n")
        for change in ({"duration": -3, "text": "no"}, {"duration": 1.2, "text": "né"}):
            file.write(json.dumps({"audio_filepath": "clip0.wav"} | change) + "\n")
    assert main([str(recipe)]) == 0
    dropped = [json.loads(line) for line in (run / "dropped.jsonl").read_text().splitlines()]
    assert [(d["line"], d["reason"]) for d in dropped] == [
        (9, "not_json"),
        (10, "bad_duration"),
        (11, "unknown_characters"),
        (4, "unreadable_audio"),
    ]
    shown = capsys.readouterr().out
    assert "left out 3 manifest lines: 1 not_json, 1 bad_duration, 1 unknown_characters" in shown
    assert "clip3.wav" in shown


def test_no_usable_clip_is_one_clear_line(corpus, capsys):
    recipe, _ = corpus
    (recipe.parent / "train.jsonl").write_text("{broken\n" * 3)
    assert main([str(recipe)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        "no usable training clip among 3 lines" in error
        and "3 not_json; the first, line 1: " in error
    )


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("optim.lrr=1", 2, "did you mean optim.lr?"),
        ("data.train=gone.jsonl", 1, "manifest gone.jsonl is not a file"),
        ("model.init_from=gone.nemo", 1, "gone.nemo"),
        ("freeze.modules=[encodr]", 1, "did you mean encoder?"),
        ("freeze.encoder_layers=3", 1, "the encoder has 2 layers"),
        ("schedule.warmup_steps=10", 1, "the run has 4 steps"),
        ("trainer.device=tpu", 1, "trainer.device is 'tpu'"),
    ],
)
def test_errors_are_one_line_and_have_their_exit_code(corpus, capsys, option, code, message):
    recipe, _ = corpus
    assert main([str(recipe), option]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_never_resuming_does_not_touch_a_run(corpus, capsys):
    recipe, _ = corpus
    assert main([str(recipe)]) == 0
    assert main([str(recipe), "resume=never"]) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_a_damaged_checkpoint_falls_back_to_the_one_before(corpus, capsys):
    recipe, run = corpus
    assert main([str(recipe), "trainer.save_every_steps=1"]) == 0
    before, newest = sorted((run / "checkpoints").iterdir())
    expected = logged(run)[-1]["loss"]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main([str(recipe), "trainer.save_every_steps=1"]) == 0
    told = capsys.readouterr().out
    assert f"{newest} is damaged" in told and f"from {before}" in told
    assert newest.with_name(f"{newest.name}.damaged").exists() and newest.exists()
    assert logged(run)[-1]["loss"] == expected


def test_ctrl_c_ends_with_130_and_no_error(corpus, tmp_path):
    recipe, _ = corpus
    run = tmp_path / "stopped"
    process = start(recipe, run, "trainer.save_every_steps=1000")
    wait_for_steps(process, run, 2)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error.startswith("stopped by SIGINT; saved ") and error.count("\n") == 1


def test_a_full_disk_in_best_is_one_line(corpus):
    """From the first model on, no file may grow beyond 100 kB, which the model's does."""
    recipe, _ = corpus
    code = (
        "import resource, signal, sys\n"
        "import training.loop.run_folder as folder\n"
        "from training.finetune import main\n"
        "write = folder.write_folder\n"
        "def full(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "    write(*arguments)\n"
        "folder.write_folder = full\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, str(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ") and "best" in done.stderr.splitlines()[-1]
    assert done.stderr.count("\n") == 1


def test_a_damaged_checkpoint_is_named(corpus, capsys):
    recipe, run = corpus
    assert main([str(recipe)]) == 0
    (checkpoint,) = (run / "checkpoints").iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert main([str(recipe)]) == 1
    error = capsys.readouterr().err
    assert str(checkpoint) in error and error.count("\n") == 1


def test_epochs_set_the_number_of_steps(corpus):
    recipe, run = corpus
    options = ["trainer.max_steps=null", "trainer.epochs=2", "trainer.val_every_steps=null"]
    assert main([str(recipe), *options]) == 0
    assert [record["epoch"] for record in logged(run)] == [0] * 4 + [1] * 4
    assert [record["step"] for record in ledger(run)] == [0, 4, 8]
    # a share of an epoch's four batches, rounded as Lightning does; two epochs with accumulation
    for more, steps in (
        (["val_every_epochs=0.8"], [0, 3, 6, 8]),
        (["val_every_epochs=2", "accumulate=2", "epochs=4"], [0, 4, 8]),
    ):
        run = recipe.parent / more[0]
        more = [f"trainer.{option}" for option in more]
        assert main([str(recipe), *options, f"output={run}", *more]) == 0
        assert [record["step"] for record in ledger(run)] == steps


def test_from_scratch(corpus, tmp_path):
    recipe, run = corpus
    base = load_model(golden("train_parity") / "model.nemo")
    (tmp_path / "tokenizer.model").write_bytes(base.tokenizer_files["tokenizer.model"])
    for section in ("decoder", "joint"):
        base.config.nemo[section].pop("vocabulary", None)
    config = tmp_path / "model.yaml"
    config.write_text(json.dumps({"model": base.config.nemo}))
    changes = ["model.init_from=null", f"model.config={config}", f"model.tokenizer={tmp_path}"]
    assert main([str(recipe), *changes]) == 0
    assert load_model(run / "model.nemo").heads == ("tdt", "ctc")
    made = ModelRecipe(config=str(config), tokenizer=str(tmp_path / "tokenizer.model"))
    first, same, other = (build_model(made, LossRecipe(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["joint.enc.weight"], other["joint.enc.weight"])


def test_the_tokenizers_lists_are_nemos(tmp_path):
    files = load_model(golden("train_parity") / "model.nemo").tokenizer_files
    (tmp_path / "tokenizer.model").write_bytes(files["tokenizer.model"])
    written = tokenizer_files(str(tmp_path))
    assert written.keys() == {"tokenizer.model", "vocab.txt", "tokenizer.vocab"}
    assert written["vocab.txt"].split(b"\n")[:63] == files["vocab.txt"].split(b"\n")[:63]
    first_columns = [
        [line.split("\t")[0] for line in lists["tokenizer.vocab"].decode().splitlines()]
        for lists in (written, files)
    ]
    assert first_columns[0] == first_columns[1]


def test_loss_options_reach_the_saved_config(corpus):
    folder = golden("train_parity")
    loss = LossRecipe(sigma=0.05, omega=0.1, ctc_weight=0.5, ctc_reduction="mean_volume")
    model = build_model(ModelRecipe(init_from=str(folder / "model.nemo")), loss, seed=0)
    assert model.config.loss.sigma == 0.05 and model.config.loss.omega == 0.1
    assert model.config.loss.ctc_reduction == "mean_volume"
    assert model.config.nemo["aux_ctc"]["ctc_loss_weight"] == 0.5
    assert model.config.nemo["loss"]["tdt_kwargs"]["durations"] == [0, 1, 2, 3, 4]


def test_reductions():
    losses, lengths = torch.tensor([6.0, 2.0]), torch.tensor([3, 1])
    expected = {"mean_batch": 4.0, "mean": 2.0, "mean_volume": 2.0, "sum": 8.0}
    for name, value in expected.items():
        assert (clip_weights(lengths, name) * losses).sum() == value


def test_learning_rate_ends():
    at = {step: learning_rate(step, 1.0, 0.1, 4, 10) for step in range(13)}
    assert [at[0], at[3], at[4]] == [0.2, 0.8, 1.0]
    assert at[7] == pytest.approx(0.55) and at[10] == pytest.approx(0.1) and at[12] == 0.1
    assert learning_rate(0, 1.0, 0.1, 0, 10) == 1.0
    assert learning_rate(9, 1.0, 0.1, 4, 10, "constant") == 1.0


def test_test_sets_are_measured_once_with_the_kept_model(corpus):
    recipe, run = corpus
    stages = "stages=[{trainer: {max_steps: 1}}, {optim: {lr: 1.0e-4}}]"
    options = [f"data.test={{held: {recipe.parent / 'dev.jsonl'}}}", "trainer.max_steps=2", stages]
    assert main([str(recipe), *options]) == 0
    found = json.loads((run / "test.json").read_text())
    kept = json.loads((run / "stage_2" / "ledger.jsonl").read_text().splitlines()[0])
    assert found["sets"]["held"].keys() == kept["sets"]["dev"].keys()
    assert found["model"] == str(run / "best")
    assert not list(run.glob("stage_*/test.json"))
