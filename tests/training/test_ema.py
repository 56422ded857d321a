"""The moving average: its formula, and that it is what is measured and saved."""

import json

import pytest
import torch
from conftest import make_corpus
from safetensors.torch import load_file
from train_case import Run, changed, recipe_of

from training.finetune import main
from training.optim.average import average_checkpoints
from training.optim.ema import EMA, plain_state_dict, plain_weights


def test_it_is_the_formula():
    run = Run(recipe_of(freeze={"modules": ["joint"]}))
    ema = EMA(run.model, 0.75)
    seen = [run.state()]
    for _ in range(4):
        seen.append(run.steps(1).state())
        ema.update(run.model)
    shares = [0.75**4, *(0.25 * 0.75 ** (4 - k) for k in range(1, 5))]
    assert sum(shares) == pytest.approx(1)
    for name, average in ema.average.items():
        terms = zip(shares, seen, strict=True)
        expected = sum(share * state[name].double() for share, state in terms)
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
    # all that moves, statistics too, and nothing else
    assert ema.average.keys() == {n for n in changed(seen[0], seen[-1]) if "num_batches" not in n}


def test_it_averages_bfloat16_weights_in_float32():
    run = Run(recipe_of(trainer={"precision": "bf16_pure"}))
    ema = EMA(run.model, 0.999)
    run.steps(1)
    ema.update(run.model)
    name = "joint.pred.weight"
    now = run.state()[name].float()
    assert run.state()[name].dtype == torch.bfloat16 and ema.average[name].dtype == torch.float32
    # a thousandth of the way is less than bfloat16 could hold
    assert not torch.equal(ema.average[name], ema.average[name].bfloat16().float())
    assert torch.equal(plain_state_dict(run.model, ema)[name], ema.average[name])
    assert ((ema.average[name] - now).abs() > 0).any()


def test_weights_are_swapped_and_come_back():
    run = Run(recipe_of(lora={"rank": 2, "also": ["joint"]}))
    ema = EMA(run.model, 0.5)
    run.steps(2)
    ema.update(run.model)
    own, plain = run.state(), plain_state_dict(run.model, ema)
    with plain_weights(run.model, ema):
        inside = run.state()
        assert not changed({n: inside[n] for n in plain}, plain)
    assert not changed(own, run.state())
    assert "joint.pred.weight" in changed({n: own[n] for n in plain}, plain)
    # adapters are averaged first, and merged then
    path = "encoder.layers.0.self_attn.linear_q"
    a, b = (ema.average[f"{path}.{n}"] for n in ("lora_a", "lora_b"))
    expected = own[f"{path}.weight"].double() + b.double() @ a.double()
    torch.testing.assert_close(plain[f"{path}.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_an_error_inside_leaves_the_weights_as_they_were():
    run = Run(recipe_of())
    ema = EMA(run.model, 0.5)
    own = run.steps(1).state()
    with pytest.raises(KeyError), plain_weights(run.model, ema):
        raise KeyError
    assert not changed(own, run.state())


def test_an_average_that_begins_later_begins_at_the_weights_of_then():
    run = Run(recipe_of())
    ema = EMA(run.model, 0.5)
    kept = {"joint.pred.weight": ema.average["joint.pred.weight"].clone()}
    state = run.steps(2).state()
    ema.load_state_dict(kept, run.model)
    assert changed({n: state[n] for n in ema.average}, ema.average) == set(kept)
    assert torch.equal(ema.average["joint.pred.weight"], kept["joint.pred.weight"])
    with pytest.raises(ValueError, match=r"joint\.pred\.weight is of another shape"):
        ema.load_state_dict({"joint.pred.weight": torch.ones(2)}, run.model)


def test_the_average_is_measured_saved_and_resumed(tmp_path):
    recipe, run = make_corpus(tmp_path)
    options = ["trainer.save_every_steps=2", "trainer.max_steps=5", "trainer.keep_last=9"]
    options += ["optim.lr=0.02", "trainer.val_every_steps=5"]
    still = "trainer.ema_decay=1.0"  # an average that never moves
    assert main([str(recipe), *options, still]) == 0
    records = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert records[0]["sets"] == records[-1]["sets"] and len(records) == 2
    last = load_file(run / "last" / "model.safetensors")
    raw = torch.load(run / "checkpoints" / "step_00000005.pt", weights_only=True)["model"]
    first = load_file(run / "best" / "model.safetensors")
    counts = {name for name in last if "num_batches" in name}
    assert changed(first, last) == counts and len(changed(last, raw)) > 50

    run = tmp_path / "half"
    assert main([str(recipe), *options, "trainer.ema_decay=0.5", f"output={run}"]) == 0
    last = load_file(run / "last" / "model.safetensors")
    averaged = average_checkpoints([run / "checkpoints" / "step_00000005.pt"]).state_dict
    assert not changed(last, averaged)
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    name = "checkpoints/step_00000002.pt"
    (again / name).write_bytes((run / name).read_bytes())
    options += ["data.validation={}", "trainer.ema_decay=0.5", f"output={again}"]
    assert main([str(recipe), *options]) == 0
    assert not changed(*(load_file(f / "last" / "model.safetensors") for f in (run, again)))
