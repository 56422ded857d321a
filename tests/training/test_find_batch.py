"""The search for the largest data.batch_duration_s, on a CPU under a memory limit."""

import json
import re

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconformer import load_model, process_memory
from training.data.batching import effective_s, epoch_batches
from training.data.sources import load_data
from training.data.stream import batch_rules
from training.find_batch import main, write_batch_duration
from training.recipe.recipe import load_recipe, recipe_from_dict
from training.setup.batch_search import (
    find_batch_duration,
    largest_limit,
    synthetic_batch,
    worst_shapes,
)
from training.setup.device import as_it_was

RATE = 16000


@settings(max_examples=50, deadline=None)
@given(true=st.floats(1.0, 900.0), smallest=st.floats(0.5, 40.0))
def test_the_search_ends_at_the_limit(true, smallest):
    tried = []

    def fits(limit):
        tried.append(limit)
        return limit <= true

    found = largest_limit(fits, smallest, 1000.0)
    if true < smallest:
        assert found is None and len(tried) == 1
    else:
        assert found <= true <= 1.03 * found + 1e-9
        assert len(tried) < 20
    assert largest_limit(lambda limit: True, smallest, 100.0) == 100.0


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.lists(st.floats(0.5, 30.0), min_size=1, max_size=80),
    limit=st.floats(31.0, 300.0),
    quadratic=st.none() | st.floats(5.0, 60.0),
    batch_size=st.none() | st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_no_batch_costs_more_than_the_worst_shapes(seconds, limit, quadratic, batch_size, seed):
    tokens = np.random.default_rng(seed).integers(1, 60, len(seconds))
    shapes = worst_shapes(np.array(seconds), tokens, limit, batch_size, quadratic)
    assert 1 <= len(shapes) <= 4
    for shape in shapes:  # and none is above the limit itself
        cost = shape.clips * effective_s(shape.seconds, quadratic)
        assert cost <= limit + 1e-6 or shape.clips == 1
        assert batch_size is None or shape.clips <= batch_size
    for batch in epoch_batches(seconds, batch_size, limit, seed, 0, quadratic):
        longest = max(seconds[i] for i in batch)
        most = max(tokens[i] for i in batch)
        assert len(batch) * longest**2 <= max(s.clips * s.seconds**2 for s in shapes) * (1 + 1e-9)
        most_loss = max(s.clips * s.seconds * s.tokens for s in shapes)
        assert len(batch) * longest * most <= most_loss * (1 + 1e-9)


@pytest.fixture
def case(tmp_path):
    """(recipe file, a tree of it) over 48 lines about clips of 7 and 8 s."""
    lines = []
    for seconds in (7, 8):
        samples = np.random.default_rng(seconds).integers(-3000, 3000, RATE * seconds)
        soundfile.write(tmp_path / f"c{seconds}.wav", samples.astype(np.int16), RATE)
        entry = {"audio_filepath": f"c{seconds}.wav", "duration": seconds, "text": "good day"}
        lines += [json.dumps(entry) + "\n"] * 24
    (tmp_path / "train.jsonl").write_text("".join(lines))
    data = {
        "train": [str(tmp_path / "train.jsonl")],
        "batch_size": None,
        "batch_duration_s": "auto",
    }
    tree = {
        "output": str(tmp_path / "run"),
        "model": {"init_from": str(golden("train_parity") / "model.nemo")},
        "data": data,
        "loss": {"heads": "ctc"},
        "trainer": {"max_steps": 2, "threads": 1, "device": "cpu", "log_every_steps": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path, tree


def limit_above_now(recipe, gb: float) -> float:
    """A limit for this process that leaves this much beside what it holds already, the libraries
    that a first step loads included."""
    assert main([str(recipe), "data.batch_size=1", "--memory-gb=50"]) == 0
    process_memory.give_back()
    return round(process_memory.resident_bytes() / 1e9 + gb, 3)


@pytest.mark.parametrize("memory", ["0", "-1", "nan", "inf"])
def test_a_memory_that_is_none_is_bad_usage(memory, capsys):
    assert main(["recipe.yaml", f"--memory-gb={memory}"]) == 2
    assert capsys.readouterr().err.count("--memory-gb is") == 1


def test_a_cpu_with_a_limit(case, capsys):
    """More memory, larger batches; all that was taken is within the limit, what was not is above
    what was found."""
    path, _ = case
    found = []
    for more_gb in (0.06, 0.24):
        limit = limit_above_now(path, more_gb)
        capsys.readouterr()
        assert main([str(path), f"--memory-gb={limit}"]) == 0
        shown = capsys.readouterr().out
        found.append(float(re.search(r"^data.batch_duration_s: ([\d.]+)$", shown, re.M)[1]))
        tried = re.findall(r"(\d+) s: +\d+ clips of +[\d.]+ s with +\d+ tokens: (.*)", shown)
        too_much = {int(seconds) for seconds, result in tried if result == "does not fit"}
        taken = {int(seconds) for seconds, _ in tried} - too_much
        assert max(taken) <= found[-1] + 1 and found[-1] - 1 <= min(too_much)
        sizes = [float(result[:-3]) for _, result in tried if result.endswith("GB")]
        assert max(sizes) <= limit + 0.005
    assert found[1] > 1.3 * found[0], found
    assert main([str(path), "--memory-gb=0.01"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a single clip of 8.0 s does not fit into 0.01 GB")


def test_auto_runs_with_what_it_found_and_resumes_with_it(case, capsys):
    from training.finetune import main as finetune

    path, _ = case
    options = [f"data.batch_memory_gb={limit_above_now(path, 0.08)}"]
    assert finetune([str(path), *options]) == 0
    run = path.parent / "run"
    found = json.loads((run / "batch_duration.json").read_text())["batch_duration_s"]
    assert load_recipe(run / "recipe.yaml").data.batch_duration_s == found > 8
    (run / "batch_duration.json").write_text('{"batch_duration_s": 30.0}')
    assert finetune([str(path), *options, "trainer.max_steps=3"]) == 0
    assert load_recipe(run / "recipe.yaml").data.batch_duration_s == 30.0
    assert f"data.batch_duration_s was {found}, is 30.0" in capsys.readouterr().out


def test_the_model_is_afterwards_as_it_was(case, tmp_path):
    _, tree = case
    recipe = recipe_from_dict(tree)
    model = load_model(tree["model"]["init_from"])
    train, _ = load_data(recipe.data, recipe.augment, 1234, model, ("ctc",))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    calls = []

    def step(batch):
        calls.append(tuple(batch.audio.shape))
        model.train()
        torch.rand(3)
        few = model.featurize(batch.audio[:1, :RATE], batch.audio_lengths[:1].clamp(max=RATE))
        model.encode(*few)[0].sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(float("nan"))
        if batch.audio.numel() > 60 * RATE:  # as the allocator says it
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")

    rules = batch_rules(recipe.data, (), 1234)
    found = find_batch_duration(train, model, step, rules, memory_gb=100)
    assert 60 <= found < 64 and len(calls) > 5  # seven clips of 8 s fit, eight do not
    assert not model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    def broken(batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        find_batch_duration(train, model, broken, rules, memory_gb=100)
    with pytest.raises(ZeroDivisionError), as_it_was(model):
        model.encoder.layers[0].norm_out.weight.data.zero_()
        raise ZeroDivisionError
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_shapes_become_batches():
    batch = synthetic_batch(worst_shapes(np.array([2.0]), np.array([7]), 9.0)[0], RATE, 30)
    assert batch.audio.shape == (4, 2 * RATE) and batch.targets.shape == (4, 7)
    assert (
        batch.audio_lengths.tolist() == [2 * RATE] * 4 and batch.target_lengths.tolist() == [7] * 4
    )
    assert batch.targets.min() >= 0 and batch.targets.max() < 30


HEAD = "output: a # the folder\nmodel: {init_from: x.nemo}\ntrainer: {max_steps: 3}\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("data:\n  train: [t]\n  batch_duration_s: 60.0 # seconds\n",
         "data:\n  train: [t]\n  batch_duration_s: 480.0 # seconds\n"),
        ("data: {train: [t], batch_duration_s: auto}\n",
         "data: {train: [t], batch_duration_s: 480.0}\n"),
        ("data: {train: [t]}\n", "data: {batch_duration_s: 480.0, train: [t]}\n"),
        ("data: # mine\n\n    # all\n    train: [t]\n",
         "data: # mine\n\n    # all\n    batch_duration_s: 480.0\n    train: [t]\n"),
    ],
)  # fmt: skip
def test_writing_into_a_recipe_keeps_the_rest(tmp_path, data, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + data)
    write_batch_duration(path, 480.0)
    assert path.read_text() == HEAD + expected
    assert load_recipe(path).data.batch_duration_s == 480.0


def test_a_recipe_that_hides_the_place_is_left_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = HEAD + '"data": {"train": ["t"]}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"add batch_duration_s: 480\.0 to it by hand"):
        write_batch_duration(path, 480.0)
    assert path.read_text() == text and not list(tmp_path.glob(".*"))
