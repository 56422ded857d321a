"""What moves and what does not, on the golden training case (two encoder layers)."""

import json

import pytest
import torch
from conftest import golden, make_corpus
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from train_case import Run, changed, recipe_of

from fastconformer import load_model
from training.finetune import main
from training.recipe.sections import FreezeRecipe
from training.setup.freeze import depth_of, freeze, matching, train_mode, unreached
from training.setup.trainable import GradientWatch, format_table, parameter_table

MODULES = {  # a recipe's name -> prefix of the parameters
    "subsampling": "encoder.pre_encode.",
    "encoder.pre_encode": "encoder.pre_encode.",
    "prediction": "decoder.",
    "decoder": "decoder.",
    "joint": "joint.",
    "ctc": "ctc_decoder.",
    "encoder": "encoder.",
    "layers": "encoder.layers.",
    "layers.1": "encoder.layers.1.",
    "encoder.layers.0-1": "encoder.layers.",
    "encoder.layers.1.self_attn.linear_q": "encoder.layers.1.self_attn.linear_q.",
    "encoder.layers.0.self_attn.pos_bias_u": "encoder.layers.0.self_attn.pos_bias_u",
}


@pytest.fixture(scope="module")
def base():
    return load_model(golden("train_parity") / "model.nemo")


def parameters(run) -> set[str]:
    return {name for name, _ in run.model.named_parameters()}


@pytest.mark.parametrize("name", MODULES)
def test_a_frozen_part_is_bit_equal_and_the_rest_moves(name):
    run = Run(recipe_of(freeze={"modules": [name]}))
    before = run.state()
    moved = changed(before, run.steps(2).state())
    frozen = {n for n in parameters(run) if n.startswith(MODULES[name])}
    assert frozen and not moved & frozen
    assert parameters(run) - frozen <= moved
    # a frozen BatchNorm keeps its statistics, the others follow
    assert not any(n.startswith(MODULES[name]) for n in moved)
    norms = [n for n in before if "running" in n and not n.startswith(MODULES[name])]
    assert set(norms) <= moved


@pytest.mark.parametrize(("layers", "count"), [(0, 0), (1, 1), (2, 2), ("half", 1)])
def test_depth(layers, count):
    run = Run(recipe_of(freeze={"encoder_layers": layers}))
    before = run.state()
    moved = changed(before, run.steps(2).state())
    frozen = tuple(f"encoder.layers.{i}." for i in range(count))
    frozen += ("encoder.pre_encode.",) if count else ()
    assert not any(name.startswith(frozen) for name in moved if frozen)
    assert {n for n in parameters(run) if not (frozen and n.startswith(frozen))} <= moved


def test_a_pattern_means_every_layer(base):
    assert matching(base, "encoder.layers.*.conv.batch_norm", "key") == [
        "encoder.layers.0.conv.batch_norm",
        "encoder.layers.1.conv.batch_norm",
    ]
    assert matching(base, "layers.0-1.self_attn.linear_q", "key") == [
        "encoder.layers.0.self_attn.linear_q",
        "encoder.layers.1.self_attn.linear_q",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("encodr", "did you mean encoder?"),
        ("predicton", "did you mean prediction?"),
        ("encoder.layers.7", "has no 'encoder.layers.7'"),
        ("encoder.layers.0-7", "has no 'encoder.layers.2'"),
        ("", "has no ''"),
    ],
)
def test_an_unknown_part_is_named(base, name, hint):
    with pytest.raises(ValueError, match="freeze.modules") as error:
        freeze(base, FreezeRecipe(modules=(name,)))
    assert hint in str(error.value) and "\n" not in str(error.value)


def test_until_moves_from_its_step_on():
    run = Run(recipe_of(freeze={"encoder_layers": 1, "until": {"encoder_layers": 2, "joint": 3}}))
    bottom = ("encoder.pre_encode.", "encoder.layers.0.")
    states = [run.state()]
    for step in range(4):
        states.append(run.steps(1).state())
        moved = changed(states[-2], states[-1])
        frozen = (bottom if step < 2 else ()) + (("joint.",) if step < 3 else ())
        expected = {n for n in parameters(run) if not n.startswith(frozen or "nothing")}
        assert not any(name.startswith(frozen or "nothing") for name in moved), step
        assert expected <= moved, step
    assert run.freezing.changes() == [2, 3]
    # Adam's correction of its moments starts with the parameter's own first step
    layer = run.model.encoder.layers
    moments = [run.optimizer.state[layer[i].norm_out.weight]["step"] for i in (0, 1)]
    assert [float(step) for step in moments] == [2, 4]
    assert float(run.optimizer.state[run.model.joint.pred.weight]["step"]) == 1


def test_a_part_frozen_until_a_step_then_moves_as_if_it_had_just_begun():
    """Weight decay and moments of the wait must not show: the first step of a part that waited is
    Adam's first step, of size lr."""
    run = Run(recipe_of(freeze={"until": {"joint": 2}}, optim={"weight_decay": 0.5, "lr": 1e-3}))
    run.steps(2)
    before = run.model.joint.pred.weight.clone()
    gradient = run.steps(1).model.joint.pred.weight.grad
    moved = run.model.joint.pred.weight - before * (1 - 1e-3 * 0.5)
    clear = gradient.abs() > 1e-6
    torch.testing.assert_close(moved[clear], -1e-3 * gradient[clear].sign(), rtol=0.02, atol=1e-6)


@given(
    st.dictionaries(
        st.sampled_from(["encoder", "layers", "layers.0", "layers.0.conv", "joint", "prediction"]),
        st.integers(0, 5),
    ),
    st.sets(st.sampled_from(["encoder", "layers.0", "layers.1.norm_out", "joint", "ctc"])),
)
def test_the_most_specific_name_decides(base, until, modules):
    freezing = freeze(base, FreezeRecipe(modules=tuple(modules), until=until))
    rules = dict.fromkeys(modules) | until
    full = {"layers": "encoder.layers", "prediction": "decoder", "ctc": "ctc_decoder"}
    for name, first in freezing.parameters.items():
        expected, length = 0, -1
        for rule, step in rules.items():
            head, *rest = rule.split(".")
            path = ".".join([full.get(head, head), *rest])
            if name.startswith(path + ".") and len(path) > length:
                expected, length = step, len(path)
        assert first == expected, name


@pytest.mark.parametrize("mode", ["fixed", "adapt", "affine"])
def test_batch_norm_while_frozen(mode):
    run = Run(recipe_of(freeze={"modules": ["encoder"], "batch_norm": mode}))
    before = run.state()
    moved = changed(before, run.steps(2).state())
    statistics = {n for n in before if "batch_norm.running" in n or "num_batches" in n}
    affine = {f"encoder.layers.{i}.conv.batch_norm.{n}" for i in (0, 1) for n in ("weight", "bias")}
    expected = {"fixed": set(), "adapt": statistics, "affine": statistics | affine}[mode]
    assert {n for n in moved if n.startswith("encoder.")} == expected
    assert len(statistics) == 6
    # the rest of the frozen encoder stays as in evaluation
    assert not run.model.encoder.layers[0].dropout.training
    norm = run.model.encoder.layers[0].conv.batch_norm
    assert norm.training == (mode != "fixed")
    # "fixed" normalises by the statistics: the encoder gives what it gives in evaluation
    features, lengths = run.model.featurize(run.batches[0].audio, run.batches[0].audio_lengths)
    torch.manual_seed(0)
    training = run.model.encode(features, lengths)[0]
    run.model.eval()
    difference = (training - run.model.encode(features, lengths)[0]).abs().max()
    assert (difference < 1e-5) == (mode == "fixed")


def test_frozen_parts_have_no_dropout():
    run = Run(recipe_of(freeze={"modules": ["prediction", "encoder"]}, model={"dropout": 0.5}))
    train_mode(run.model, run.freezing)
    dropouts = [m for m in run.model.encoder.modules() if isinstance(m, nn.Dropout)]
    assert dropouts and not any(m.training for m in dropouts)
    assert not run.model.decoder.training and run.model.joint.training and run.model.training
    freezing = freeze(run.model, FreezeRecipe(modules=("layers.0",)))
    train_mode(run.model, freezing)
    assert [layer.dropout.training for layer in run.model.encoder.layers] == [False, True]
    assert run.model.encoder.dropout_input.training and run.model.encoder.training


@pytest.mark.parametrize(
    ("loss", "unused"),
    [
        ({}, set()),
        ({"heads": "ctc"}, {"decoder", "joint"}),
        ({"heads": "transducer"}, {"ctc_decoder"}),
        ({"ctc_weight": 0.0}, {"ctc_decoder"}),
        ({"ctc_weight": 1.0}, {"decoder", "joint"}),
        ({"heads": "transducer", "interctc_layers": [0], "interctc_weights": [0.3]}, set()),
        ({"ctc_weight": 0.0, "interctc_layers": [0], "interctc_weights": [0.3]}, set()),
        (
            {"interctc_layers": [0], "interctc_weights": [1.0]},
            {"decoder", "joint", "encoder.layers.1"},
        ),
    ],
)
def test_what_the_loss_cannot_reach_stays(loss, unused):
    """Weight decay alone would move it, where its gradient is zero and not missing."""
    run = Run(recipe_of(loss=loss, optim={"weight_decay": 0.5}))
    assert set(unreached(run.model, run.objective)) == unused
    before, watch = run.state(), GradientWatch(run.model, patience=2)
    for _ in range(3):
        run.steps(1)
        watch.check()
    moved = changed(before, run.state())
    still = {n for n in parameters(run) if n.startswith(tuple(f"{u}." for u in unused) or "-")}
    assert bool(still) == bool(unused) and not moved & still
    assert parameters(run) - still <= moved
    rows = parameter_table(run.model, run.freezing, run.optimizer)
    noted = {row["module"] for row in rows if "unused" in row["note"]}
    assert noted == unused


def test_a_parameter_without_a_gradient_is_named_at_once(base):
    run = Run(recipe_of())
    run.model.encoder.layers[1].spare = nn.Parameter(torch.ones(3))
    run.freezing = freeze(run.model, FreezeRecipe())
    watch = GradientWatch(run.model)
    run.gradients()
    with pytest.raises(ValueError, match="layers.1.spare: trainable, but the loss gives no"):
        watch.check()


def test_a_parameter_with_only_zeros_is_named_in_time():
    run = Run(recipe_of())
    run.model.joint.pred.bias.register_hook(torch.zeros_like)
    watch = GradientWatch(run.model, patience=3)
    for _ in range(2):
        run.steps(1)
        watch.check()
    run.steps(1)
    with pytest.raises(ValueError, match="joint.pred.bias: trainable, .* only zeros in 3 steps"):
        watch.check()


def test_the_watch_begins_again_when_something_unfreezes():
    run = Run(recipe_of(freeze={"until": {"joint": 3}}))
    run.model.joint.spare = nn.Parameter(torch.ones(1))
    run.freezing = freeze(run.model, run.recipe.freeze)
    watch = GradientWatch(run.model)
    for _ in range(3):
        run.steps(1)
        watch.check()
    assert not watch.left  # satisfied
    run.gradients()
    with pytest.raises(ValueError, match="joint.spare"):
        watch.check()


def test_the_table_counts_every_parameter_once():
    sections = {
        "freeze": {"encoder_layers": 1, "until": {"subsampling": 50}},
        "optim": {"lr_groups": {"joint": 1e-4}, "decay_norms_and_biases": False, "lr": 2e-3},
        "loss": {"heads": "transducer"},
    }
    run = Run(recipe_of(**sections))
    *rows, total = parameter_table(run.model, run.freezing, run.optimizer)
    table = {row["module"]: row for row in rows}
    assert list(table) == [
        "encoder.pre_encode",
        "encoder.layers.0",
        "encoder.layers.1",
        "decoder",
        "joint",
        "ctc_decoder",
    ]
    assert total["parameters"] == sum(p.numel() for p in run.model.parameters())
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert total["trainable"] == sum(p.numel() for p in held)
    assert table["encoder.pre_encode"]["note"] == "from step 50"
    assert table["encoder.layers.0"]["trainable"] == 0
    assert table["encoder.layers.0"]["note"] == "frozen"
    assert table["joint"]["lr"] == [1e-4] and table["decoder"]["lr"] == [2e-3]
    assert table["joint"]["decay"] == [0.0, 1e-3]
    assert table["ctc_decoder"]["note"] == "unused by this loss"
    lines = format_table([*rows, total]).splitlines()
    assert lines[0].split() == ["module", "parameters", "trainable", "lr", "decay"]
    assert lines[5].split()[3:] == ["0.0001", "0", "-", "0.001"]
    assert len(lines) == 8


def test_layers_that_are_alike_share_a_row():
    run = Run(recipe_of())
    rows = parameter_table(run.model, run.freezing, run.optimizer)
    (layers,) = (row for row in rows if row["module"] == "encoder.layers.0-1")
    assert layers["parameters"] == sum(p.numel() for p in run.model.encoder.layers.parameters())
    assert layers["trainable"] == layers["parameters"]


def test_depth_of(base):
    depths = {name: depth_of(base, name) for name, _ in base.named_parameters()}
    assert {d for n, d in depths.items() if n.startswith("encoder.pre_encode.")} == {3}
    assert {d for n, d in depths.items() if n.startswith("encoder.layers.0.")} == {2}
    assert {d for n, d in depths.items() if n.startswith("encoder.layers.1.")} == {1}
    assert {d for n, d in depths.items() if not n.startswith("encoder.")} == {0}


def test_unfreezing_resumes_bit_for_bit(tmp_path):
    recipe, run = make_corpus(tmp_path)
    options = [
        "trainer.max_steps=6",
        "trainer.save_every_steps=2",
        "trainer.keep_last=9",
        "freeze.until={encoder: 3, joint: 4}",
        "freeze.batch_norm=adapt",
        "data.validation={}",
    ]
    assert main([str(recipe), *options]) == 0
    whole = (run / "log.jsonl").read_text().splitlines()
    shown = (run / "trainable.txt").read_text()
    assert "from step 3" in shown and "from step 4" in shown
    for step in (2, 4):  # before and after a change
        again = tmp_path / f"again{step}"
        name = f"checkpoints/step_{step:08d}.pt"
        (again / "checkpoints").mkdir(parents=True)
        (again / name).write_bytes((run / name).read_bytes())
        assert main([str(recipe), *options, f"output={again}"]) == 0
        assert (again / "log.jsonl").read_text().splitlines() == whole[step:]
        for name in ("last/model.safetensors", "trainable.txt"):
            assert (again / name).read_bytes() == (run / name).read_bytes()


def test_freezing_may_change_between_two_parts_of_a_run(tmp_path):
    """Moments go by name, so that a stopped run may go on with more or less of it frozen."""
    recipe, run = make_corpus(tmp_path)
    assert main([str(recipe), "trainer.max_steps=2", "freeze.modules=[encoder]"]) == 0
    options = ["trainer.max_steps=4", "freeze.modules=[ctc]", "optim.lr_groups={joint: 1e-5}"]
    assert main([str(recipe), *options]) == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    state = torch.load(run / "checkpoints" / "step_00000004.pt", weights_only=True)["optimizer"]
    assert float(state["joint.pred.weight"]["step"]) == 4
    assert float(state["encoder.layers.0.norm_out.weight"]["step"]) == 2
    assert not any(name.startswith("ctc_decoder.") for name in state)
