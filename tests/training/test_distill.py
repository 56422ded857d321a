"""Distillation: blocks come near the attention, the model near its teacher, from audio alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import golden, load_case

from fastconformer import load_model
from training.distill import main
from training.loop.distill import _resume
from training.loop.run_folder import alone_in
from training.objective.distillation import block_losses, model_losses, relative_error
from training.optim.optim import schedule_of
from training.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
    """A recipe file over a golden model's own utterances; none has a text, one cannot be read."""
    case = load_case("hybrid_tdt_ctc_bpe")
    lines = []
    for i, (audio, n) in enumerate(zip(case.tensors["audio"], case.tensors["audio_len"].tolist())):
        soundfile.write(tmp_path / f"{i}.wav", audio[:n].numpy(), 16000)
        lines.append({"audio_filepath": f"{i}.wav", "duration": n / 16000})
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    lines.append({"audio_filepath": "bad.wav", "duration": 1.0})
    (tmp_path / "audio.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
output: {tmp_path}/run
model: {{init_from: {golden("hybrid_tdt_ctc_bpe") / "model.nemo"}}}
data: {{train: {tmp_path}/audio.jsonl}}
optim: {{lr: 1.0e-2}}
schedule: {{name: constant}}
trainer: {{max_steps: 1, threads: 1}}
distill: {{block_steps: 30, model_steps: 30, model_lr: 1.0e-3}}
""")
    return path


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_both_stages_come_near_the_teacher(recipe, tmp_path):
    assert main([str(recipe)]) == 0
    log = log_of(tmp_path / "run_distilled")
    blocks, model = ([r for r in log if r["stage"] == s] for s in ("blocks", "model"))
    assert [r["step"] for r in log] == list(range(1, 61))
    assert blocks[-1]["loss"] < 0.3 * blocks[0]["loss"]
    assert model[-1]["loss"] < 0.7 * model[0]["loss"]
    student = load_model(tmp_path / "run_distilled" / "model")
    teacher = load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    assert student.config.encoder.self_attention_model == "rwkv7_attn"
    for name, tensor in teacher.state_dict().items():
        if not name.startswith("encoder.layers."):  # the heads and the subsampling stay
            assert torch.equal(tensor, student.state_dict()[name]), name


def test_goes_on_where_it_was_stopped(recipe, tmp_path):
    small = ["distill.block_steps=4", "distill.model_steps=3", "trainer.save_every_steps=2"]
    assert main([str(recipe), *small, f"distill.output={tmp_path}/whole"]) == 0
    broken = [str(recipe), *small, f"distill.output={tmp_path}/broken"]
    code = (
        "import os, sys\n"
        "from training.distill import main\n"
        "from training.loop.distill import StageLoop\n"
        "keep = StageLoop.backward\n"
        "calls = []\n"
        "def dying(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == int(sys.argv[1]): os._exit(9)\n"
        "    return keep(*args)\n"
        "StageLoop.backward = dying\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    for dies_at in (4, 4):  # in each stage once
        done = subprocess.run([sys.executable, "-c", code, str(dies_at), *broken], cwd=ROOT)
        assert done.returncode == 9
    assert main(broken) == 0
    whole, parts = (log_of(tmp_path / name) for name in ("whole", "broken"))
    assert whole == parts
    a, b = (load_model(tmp_path / name / "model").state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_losses_see_valid_frames_only():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    valid = torch.arange(9) < torch.tensor([9, 5])[:, None]
    loss = relative_error(student, teacher, valid)
    a, b = student[valid].double(), teacher[valid].double()
    assert float(loss) == pytest.approx(float(((a - b) ** 2).sum() / (b**2).sum()), rel=1e-5)
    student[~valid] = 1e4
    assert float(relative_error(student, teacher, valid)) == pytest.approx(float(loss))
    assert float(relative_error(teacher, teacher, valid)) == 0


def test_a_model_beside_itself_loses_nothing():
    model = load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    features, lengths = torch.randn(2, 80, 100), torch.tensor([100, 60])
    losses = model_losses(model, model, features, lengths)
    # with gradients other matrix kernels run than without
    assert losses["encoder"].item() < 1e-9 and abs(losses["frames"].item()) < 1e-6


def test_data_keys_mean_what_they_mean_in_fine_tuning(recipe, tmp_path, capsys):
    """Caps, names that stand for many, filters; what has no effect is told."""
    (tmp_path / "audio0.jsonl").write_text((tmp_path / "audio.jsonl").read_text())
    few = [f"data.train=[{{manifest: '{tmp_path}/audio{{0..0}}.jsonl', max_clips: 2}}]"]
    few += ["distill.block_steps=1", "distill.model_steps=0", "optim.layer_decay=0.9"]
    assert main([str(recipe), *few]) == 0
    told = capsys.readouterr().out
    assert "2 clips, " in told
    assert "without effect on distillation: optim.layer_decay, trainer.max_steps\n" in told


def test_a_schedule_is_fine_tunings(recipe, tmp_path, capsys):
    few = ["distill.block_steps=10", "distill.model_steps=0"]
    wsd = ["schedule.name=wsd", "schedule.warmup_ratio=0.2", "schedule.hold_steps=3"]
    assert main([str(recipe), *few, *wsd]) == 0
    rates = [record["lr"] for record in log_of(tmp_path / "run_distilled")]
    made = load_recipe(recipe, wsd)
    rate = schedule_of(made.schedule, made.optim.lr, 10)
    assert rates == [rate(step) for step in range(1, 11)] and max(rates) == made.optim.lr
    assert main([str(recipe), *few, "trainer.precision=bf16_pure"]) == 1
    assert "bf16_pure belongs to training.finetune" in capsys.readouterr().err


def test_two_do_not_work_in_one_folder(recipe, tmp_path, capsys):
    folder = tmp_path / "run_distilled"
    folder.mkdir()
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from training.loop.run_folder import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        assert main([str(recipe)]) == 1
        other.kill()
    assert "another run is at work there" in capsys.readouterr().err
    with alone_in(folder):
        pass


def test_what_cannot_be_done(recipe, tmp_path, capsys):
    birwkv7 = golden("birwkv7_encoder") / "model.nemo"
    assert main([str(recipe), f"model.init_from={birwkv7}"]) == 1
    assert "has BiRWKV7 already" in capsys.readouterr().err
    assert main([str(recipe), "data.min_duration_s=30"]) == 1
    assert "no usable training clip" in capsys.readouterr().err
    assert main([str(recipe), "distill.blocksteps=1"]) == 2
    done = subprocess.run(
        [sys.executable, "-m", "training.distill", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "example: python -m training.distill" in done.stdout


def test_every_block_gets_its_own_loss():
    from fastconformer.load import model_of
    from fastconformer.surgery.birwkv7 import to_birwkv7

    teacher = load_model(golden("hybrid_tdt_ctc_bpe") / "model.nemo")
    student = model_of(to_birwkv7(teacher.to_checkpoint()))
    features, lengths = torch.randn(2, 80, 100), torch.tensor([100, 60])
    losses = list(block_losses(teacher, student, features, lengths))
    assert len(losses) == len(teacher.encoder.layers)
    losses[-1].backward()
    first, *_, last = student.encoder.layers
    assert last.self_attn.key.weight.grad.abs().max() > 0
    assert first.self_attn.key.weight.grad is None
    assert last.feed_forward1.linear1.weight.grad is None


def test_a_checkpoint_is_read_to_the_host(monkeypatch, tmp_path):
    """Where AdamW wants its numbers of steps: on a GPU it would wait for each, each step."""
    asked = []

    def load(path, map_location, weights_only):
        asked.append(map_location)
        raise KeyError("enough")

    monkeypatch.setattr(torch, "load", load)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match="cannot resume"):
        _resume(tmp_path / "checkpoint.pt", torch.nn.Linear(1, 1))
    assert asked == ["cpu"]
