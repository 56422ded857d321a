"""Adapters: only they move, what is saved is plain, and it is W + scale * B A."""

import pytest
import torch
from conftest import golden, make_corpus
from safetensors.torch import load_file
from train_case import Run, changed, recipe_of

from fastconformer import load_model
from training.finetune import main
from training.optim.average import average_checkpoints
from training.optim.ema import plain_state_dict, plain_weights
from training.setup.freeze import train_mode
from training.setup.lora import LoRALinear

ATTENTION = {"linear_q", "linear_k", "linear_v", "linear_out", "linear_pos"}
FEED_FORWARD = {"feed_forward1.linear1", "feed_forward1.linear2"}
FEED_FORWARD |= {"feed_forward2.linear1", "feed_forward2.linear2"}


def adapted(run) -> set[str]:
    found = (path for path, m in run.model.named_modules() if isinstance(m, LoRALinear))
    return {path.removeprefix("encoder.layers.0.") for path in found if ".layers.0." in path}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attention"], {f"self_attn.{name}" for name in ATTENTION}),
        (["feed_forward"], FEED_FORWARD),
        (["linear_q", "linear_v"], {"self_attn.linear_q", "self_attn.linear_v"}),
        (["linear_q", "attention"], {f"self_attn.{name}" for name in ATTENTION}),
        (["feed_forward2.linear1"], {"feed_forward2.linear1"}),
    ],
)
def test_only_the_adapters_move(targets, expected):
    run = Run(recipe_of(lora={"rank": 3, "targets": targets}))
    assert adapted(run) == expected
    before = run.state()
    moved = changed(before, run.steps(3).state())
    assert {name.rpartition(".")[2] for name in moved} == {"lora_a", "lora_b"}
    assert len(moved) == 2 * 2 * len(expected)
    held = {name for group in run.optimizer.param_groups for name in group["names"]}
    assert held == moved
    assert all(
        before[name].shape[1] == 3 for name in moved if name.endswith("lora_b")
    )  # the rank, everywhere


def test_it_starts_as_the_model_was():
    plain, lora = Run(recipe_of()), Run(recipe_of(lora={"rank": 2}))
    batch = plain.batches[0]
    features = plain.model.featurize(batch.audio, batch.audio_lengths)
    outputs = [run.model.eval().encode(*features)[0] for run in (plain, lora)]
    assert torch.equal(*outputs)


def test_the_forward_pass_is_the_formula():
    run = Run(recipe_of(lora={"rank": 4, "alpha": 6.0}))
    layer = run.model.encoder.layers[1].feed_forward1.linear1
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 5, layer.in_features)
    weight = layer.weight.double() + 6.0 / 4 * layer.lora_b.double() @ layer.lora_a.double()
    expected = x.double() @ weight.T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    silu = torch.nn.functional.silu(expected)
    torch.testing.assert_close(layer(x, after="swish").double(), silu, rtol=1e-5, atol=1e-5)


def test_alpha_is_the_rank_unless_given():
    assert Run(recipe_of(lora={"rank": 8})).model.encoder.layers[0].self_attn.linear_q.scale == 1


def test_dropout_of_the_adapters_alone():
    run = Run(recipe_of(lora={"rank": 8, "dropout": 0.5}, model={"dropout": 0.5}))
    run.steps(2)
    train_mode(run.model, run.freezing)
    layer = run.model.encoder.layers[0]
    x = torch.randn(1, 3, layer.self_attn.linear_q.in_features)
    assert not torch.equal(layer.self_attn.linear_q(x), layer.self_attn.linear_q(x))
    assert not layer.dropout.training and not run.model.decoder.training
    run.model.eval()
    assert torch.equal(layer.self_attn.linear_q(x), layer.self_attn.linear_q(x))


def test_merging_is_exact_and_comes_undone():
    run = Run(recipe_of(lora={"rank": 3, "alpha": 5.0})).steps(3)
    own = run.state()
    plain = plain_state_dict(run.model)
    base = load_model(golden("train_parity") / "model.nemo").state_dict()
    assert plain.keys() == base.keys()
    paths = {p for p, m in run.model.named_modules() if isinstance(m, LoRALinear)}
    for name, tensor in plain.items():
        path, _, last = name.rpartition(".")
        if path in paths and last == "weight":
            product = own[f"{path}.lora_b"].double() @ own[f"{path}.lora_a"].double()
            expected = base[name].double() + 5.0 / 3 * product
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
            assert not torch.equal(tensor, base[name])
        else:
            assert torch.equal(tensor, base[name]), name
    # inside, the model is the merged one, bit for bit; outside, it is itself again
    model = run.model.eval()
    features = model.featurize(run.batches[0].audio, run.batches[0].audio_lengths)
    merged = load_model(golden("train_parity") / "model.nemo")
    merged.load_state_dict(plain)
    with torch.no_grad():
        unmerged = model.encode(*features)[0]
        with plain_weights(model):
            inside = model.encode(*features)[0]
        assert torch.equal(inside, merged.encode(*features)[0])
    torch.testing.assert_close(inside, unmerged, rtol=1e-4, atol=1e-4)
    assert not changed(own, run.state())


def test_parts_that_are_trained_beside():
    lora = {"rank": 2, "also": ["ctc", "encoder.layers.1.norm_out"]}
    run = Run(recipe_of(lora=lora, freeze={"batch_norm": "affine", "until": {"joint": 2}}))
    states = [run.state()]
    for _ in range(3):
        states.append(run.steps(1).state())
    moved = changed(states[0], states[2])
    whole = {n for n, _ in run.model.named_parameters() if n.startswith(("ctc_decoder.",))}
    whole |= {f"encoder.layers.1.norm_out.{name}" for name in ("weight", "bias")}
    rest = {n for n in moved if "lora_" not in n and "batch_norm" not in n}
    assert rest == whole and {n for n in moved if "batch_norm.weight" in n}
    assert {n for n in changed(states[2], states[3]) if n.startswith("joint.")}


def test_time_mixing_has_matrices_too():
    sections = {"encoder": {"attention": "birwkv7"}, "lora": {"rank": 2, "targets": ["attention"]}}
    run = Run(recipe_of(**sections))
    assert adapted(run) == {f"self_attn.{n}" for n in ("receptance", "key", "value", "output")}
    before = run.state()
    moved = changed(before, run.steps(2).state())
    assert len(moved) == 2 * 2 * 4 and all("lora_" in name for name in moved)


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match=r"lora.targets: 'linear_z' .* one of attention, feed_f"):
        Run(recipe_of(lora={"rank": 2, "targets": ["linear_z"]}))


def test_a_run_saves_plain_models_and_resumes_bit_for_bit(tmp_path):
    recipe, run = make_corpus(tmp_path)
    options = ["lora.rank=4", "lora.dropout=0.2", "trainer.save_every_steps=2"]
    options += ["lora.alpha=4", "optim.lr=0.01", "trainer.max_steps=5", "trainer.keep_last=9"]
    assert main([str(recipe), *options]) == 0
    base = load_model(golden("train_parity") / "model.nemo").state_dict()
    for name in ("best", "last", "model.nemo"):
        assert load_model(run / name).state_dict().keys() == base.keys()
    last = load_model(run / "last").state_dict()
    moved = changed(base, last)
    assert moved and all("linear" in name and name.endswith("weight") for name in moved)
    state = torch.load(run / "checkpoints" / "step_00000005.pt", weights_only=True)["model"]
    path = "encoder.layers.0.self_attn.linear_q"
    expected = state[f"{path}.weight"] + state[f"{path}.lora_b"] @ state[f"{path}.lora_a"]
    torch.testing.assert_close(last[f"{path}.weight"], expected, rtol=1e-6, atol=1e-7)
    assert not changed(last, average_checkpoints([run / "checkpoints/step_00000005.pt"]).state_dict)
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    name = "checkpoints/step_00000002.pt"
    (again / name).write_bytes((run / name).read_bytes())
    assert main([str(recipe), *options, f"output={again}", "data.validation={}"]) == 0
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (run, again)]
    assert logs[0][2:] == logs[1]
    assert not changed(*(load_file(f / "last" / "model.safetensors") for f in (run, again)))
