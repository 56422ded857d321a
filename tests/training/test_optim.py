"""Learning rates, groups of parameters, 8-bit moments, and updates of bfloat16 weights."""

import io
import json
import math

import pytest
import torch
from conftest import golden, make_corpus
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from train_case import Run, changed, recipe_of

from converters import nemo2st
from fastconformer import load_model
from fastconformer.networks.heads import StableEmbedding
from training.finetune import main
from training.optim.optim import (
    RoundedAdamW,
    _portions,
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    schedule_of,
    stochastic_round,
)
from training.recipe.sections import ScheduleRecipe

# Recorded from NeMo 3.0.0's nemo.core.optim.lr_scheduler with lr 0.5, 4 steps of warm-up, 20 steps,
# min_lr 0.01; Noam: lr 2, d_model 144, min_lr 0.05; a hold of 8 steps.
NEMO = {
    ("cosine", "linear"): {
        0: 0.1,
        1: 0.2,
        3: 0.4,
        4: 0.5,
        5: 0.495292393699,
        6: 0.481350485465,
        20: 0.01,
        21: 0.01,
        11: 0.302797128894,
        13: 0.207202871106,
        16: 0.081758838609,
        19: 0.014707606301,
    },
    ("linear", "linear"): {
        0: 0.1,
        4: 0.5,
        5: 0.469375,
        12: 0.255,
        16: 0.1325,
        19: 0.040625,
        20: 0.01,
        21: 0.01,
    },
    ("inverse_sqrt", "linear"): {
        0: 0.1,
        4: 0.5,
        5: 0.456435464588,
        11: 0.322748612184,
        20: 0.243975018237,
        21: 0.01,
    },
    ("wsd", "linear"): {
        0: 0.1,
        4: 0.5,
        5: 0.5,
        11: 0.5,
        12: 0.5,
        13: 0.43875,
        16: 0.255,
        19: 0.07125,
        21: 0.01,
    },
    ("wsd", "sqrt"): {
        3: 0.4,
        12: 0.5,
        13: 0.323223304703,
        16: 0.146446609407,
        19: 0.032292826653,
        20: 0.01,
    },
    ("noam", "linear"): {
        0: 0.020833333333,
        1: 0.020833333333,
        3: 0.0625,
        4: 0.083333333333,
        5: 0.07453559925,
        6: 0.068041381744,
        11: 0.050251890763,
        12: 0.05,
        21: 0.05,
    },
    ("constant", "linear"): {0: 0.1, 3: 0.4, 4: 0.5, 5: 0.5, 19: 0.5},
}


@pytest.mark.parametrize(("name", "shape"), NEMO)
def test_schedules_are_nemos(name, shape):
    lr, min_lr = (2.0, 0.05) if name == "noam" else (0.5, 0.01)
    recipe = ScheduleRecipe(
        name=name, warmup_steps=4, min_lr=min_lr, hold_steps=8, decay_shape=shape, d_model=144
    )
    rate = schedule_of(recipe, lr, 20)
    for step, expected in NEMO[name, shape].items():
        assert rate(step) == pytest.approx(expected, abs=1e-11), step


def test_noam_without_warm_up_is_nemos():
    rate = schedule_of(ScheduleRecipe(name="noam", min_lr=0.05), 2.0, 20, d_model=144)
    expected = {0: 0.166666666667, 1: 0.166666666667, 5: 0.07453559925, 12: 0.05}
    assert {step: rate(step) for step in expected} == pytest.approx(expected)


def test_warm_up_as_a_share_of_the_run():
    rate = schedule_of(ScheduleRecipe(warmup_ratio=0.25, min_lr=0.01), 0.5, 20)
    nemo = {0: 0.083333333333, 4: 0.416666666667, 5: 0.5, 11: 0.330709163622, 19: 0.01535383782}
    assert {step: rate(step) for step in nemo} == pytest.approx(nemo)


def test_hold_as_a_share_and_by_default():
    share = schedule_of(ScheduleRecipe(name="wsd", warmup_ratio=0.1, hold_ratio=0.5), 1.0, 100)
    assert share(59) == share(60) == 1.0 > share(61)
    default = schedule_of(ScheduleRecipe(name="wsd", warmup_steps=10), 1.0, 100)
    assert default(80) == 1.0 > default(81) and default(90) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "inverse_sqrt", "wsd"])
def test_min_lr_is_a_floor(name):
    rates = [
        learning_rate(step, 1.0, 0.9, 2, 30, name, hold_steps=2, decay_shape="sqrt")
        for step in range(2, 40)
    ]
    assert min(rates) == 0.9 and max(rates) == 1.0 and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ScheduleRecipe(warmup_steps=20), "the run has 20 steps"),
        (ScheduleRecipe(name="wsd", warmup_steps=4, hold_steps=16), "nothing of 20 steps"),
        (ScheduleRecipe(name="wsd", warmup_steps=18), "nothing of 20 steps"),
    ],
)
def test_schedules_that_do_not_fit_the_run(schedule, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(schedule, 0.5, 20)


# --- groups -------------------------------------------------------------------------------------


def rates_of(run: Run) -> dict[str, float]:
    return {n: group["lr"] for group in run.optimizer.param_groups for n in group["names"]}


def test_rates_by_part_reach_the_weights():
    """Adam's first step moves every weight with a clear gradient by its learning rate."""
    groups = {"encoder": 1e-4, "layers.1": 3e-4, "layers.1.conv": 5e-4, "prediction": 7e-4}
    run = Run(recipe_of(optim={"lr": 1e-3, "lr_groups": groups, "weight_decay": 0.0}))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.steps(1)
    expected = {
        "encoder.pre_encode.out.weight": 1e-4,
        "encoder.layers.0.norm_out.weight": 1e-4,
        "encoder.layers.1.norm_out.weight": 3e-4,
        "encoder.layers.1.conv.pointwise_conv1.weight": 5e-4,
        "decoder.prediction.dec_rnn.lstm.weight_ih_l0": 7e-4,
        "joint.pred.weight": 1e-3,
        "ctc_decoder.decoder_layers.0.weight": 1e-3,
    }
    parameters = dict(run.model.named_parameters())
    for name, rate in expected.items():
        moved = (parameters[name] - before[name]).abs()[parameters[name].grad.abs() > 1e-5]
        assert len(moved) > 10
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0.02, atol=1e-7)
        assert rates_of(run)[name] == rate


def test_every_group_follows_the_schedule():
    schedule = {"name": "cosine", "warmup_steps": 1, "min_lr": 2e-4}
    optim = {"lr": 1e-3, "lr_groups": {"joint": 4e-4, "ctc": 1e-4}}
    run = Run(recipe_of(optim=optim, schedule=schedule, trainer={"max_steps": 3}))
    seen = []
    for _ in range(3):
        run.steps(1)
        rates = rates_of(run)
        seen.append([rates["decoder.prediction.embed.weight"], rates["joint.pred.weight"]])
        # a highest rate below min_lr stays, it does not rise to it
        assert rates["ctc_decoder.decoder_layers.0.bias"] == (0.5e-4, 1e-4, 1e-4)[run.step - 1]
    expected = [[5e-4, 2e-4], [1e-3, 4e-4], [6e-4, 3e-4]]  # halfway to min_lr, each from its own
    assert [pytest.approx(e) for e in expected] == seen


def test_rates_decay_with_the_distance_from_the_heads():
    groups = {"encoder": 1e-2}
    run = Run(recipe_of(optim={"lr": 1.0, "layer_decay": 0.5, "lr_groups": groups}))
    rates = rates_of(run)
    assert rates["joint.pred.bias"] == rates["ctc_decoder.decoder_layers.0.weight"] == 1.0
    assert rates["encoder.layers.1.norm_out.bias"] == pytest.approx(0.5e-2)
    assert rates["encoder.layers.0.norm_out.bias"] == pytest.approx(0.25e-2)
    assert rates["encoder.pre_encode.out.weight"] == pytest.approx(0.125e-2)


@pytest.mark.parametrize("everything", [True, False])
def test_norms_and_biases_without_decay(everything):
    """Steps too small to be seen, and a decay that takes a tenth."""
    optim = {"lr": 1e-30, "weight_decay": 1e29, "decay_norms_and_biases": everything}
    run = Run(recipe_of(optim=optim, schedule={"min_lr": 0.0}))
    for parameter in run.model.parameters():
        parameter.data[parameter == 0] = 0.01  # a zero has nothing to decay
    before = run.state()
    moved = changed(before, run.steps(1).state())
    names = {name for name, _ in run.model.named_parameters()}
    vectors = {n for n in names if "bias" in n or ".norm" in n or "batch_norm" in n}
    assert len(vectors) > 40 and {n for n in vectors if "pos_bias" in n}
    assert names - moved == (set() if everything else vectors)


def test_an_unknown_group_is_named():
    with pytest.raises(ValueError, match="optim.lr_groups: the model has no 'jiont'; did you mean"):
        Run(recipe_of(optim={"lr_groups": {"jiont": 1.0}}))


# --- 8 bits -------------------------------------------------------------------------------------


def test_8_bit_moments_but_those_of_embeddings():
    """The case's matrices are small: all below bitsandbytes' 4096 are left in 32 bits."""
    run = Run(recipe_of(optim={"name": "adamw8bit"}))
    embed = run.model.decoder.prediction["embed"]
    assert type(embed) is nn.Embedding
    assert not any("embed.norm" in name for name in run.model.state_dict())
    for parameter in run.model.parameters():
        run.optimizer.state.clear()
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    dtypes = {
        name: run.optimizer.state[p]["state1"].dtype for name, p in run.model.named_parameters()
    }
    large = {name for name, p in run.model.named_parameters() if p.numel() >= 4096}
    assert large and all(dtypes[name] == torch.uint8 for name in large if "embed" not in name)
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if name not in large)


def test_a_large_embedding_keeps_32_bits():
    model = Run(recipe_of()).model
    model.decoder.prediction["embed"] = nn.Embedding(300, 32)
    model.decoder.prediction["other"] = nn.Linear(300, 32)
    for _ in range(3):  # nothing is left of a former optimizer
        optimizer = build_optimizer(model, recipe_of(optim={"name": "adamw8bit"}).optim)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        parts = model.decoder.prediction
        assert optimizer.state[parts["embed"].weight]["state1"].dtype == torch.float32
        assert optimizer.state[parts["other"].weight]["state1"].dtype == torch.uint8


def test_a_forks_stable_embedding_is_loaded_and_trained(tmp_path):
    assert (
        nemo2st.main([str(golden("train_parity") / "model.nemo"), "-o", str(tmp_path / "m")]) == 0
    )
    path = tmp_path / "m" / "model.safetensors"
    stock, tensors = load_model(tmp_path / "m"), load_file(path)
    width = tensors["decoder.prediction.embed.weight"].shape[1]
    torch.manual_seed(0)
    scale, shift = torch.randn(width), torch.randn(width)
    key = "decoder.prediction.embed.norm"
    save_file(tensors | {f"{key}.weight": scale, f"{key}.bias": shift}, path, {"format": "pt"})

    model = load_model(tmp_path / "m")
    embed = model.decoder.prediction["embed"]
    assert isinstance(embed, StableEmbedding)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    plain = stock.decoder.prediction["embed"](tokens)
    expected = F.layer_norm(plain.double(), (width,), scale.double(), shift.double())
    torch.testing.assert_close(embed(tokens).double(), expected, rtol=1e-5, atol=1e-5)
    half = load_model(tmp_path / "m", dtype=torch.bfloat16).decoder.prediction["embed"](tokens)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.02, atol=0.05)
    # the decoder's step uses it too
    _, state = model.decoder.start(1)
    alone = model.decoder.step(tokens[:, 0], state)[0]
    torch.testing.assert_close(alone, model.decoder(tokens)[:, 1], rtol=1e-5, atol=1e-6)

    sections = {"model": {"init_from": str(tmp_path / "m")}, "optim": {"name": "adamw8bit"}}
    run = Run(recipe_of(**sections))
    before = run.state()
    assert {f"{key}.weight", f"{key}.bias"} <= changed(before, run.steps(2).state())
    run.model.save(tmp_path / "again")
    assert not changed(run.state(), load_model(tmp_path / "again").state_dict())


# --- pure bfloat16 ------------------------------------------------------------------------------


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    values = torch.cat((torch.randn(200) * 10 ** torch.arange(-30, 30, 0.3), torch.randn(200)))
    draws = torch.stack([stochastic_round(values, generator).double() for _ in range(4000)])
    nearest = values.to(torch.bfloat16).double()
    ulp = 2.0 ** (values.double().abs().log2().floor() - 7)
    assert ((draws - values.double()).abs() < ulp).all()
    # mean of n draws: at most ulp / 2 / sqrt(n) of standard deviation; 400 values, 5 deviations
    error = (draws.mean(0) - values.double()).abs() / ulp
    assert error.max() < 5 * 0.5 / math.sqrt(4000)
    # rounding to nearest is off by a quarter of a unit on average
    assert ((nearest - values.double()).abs() / ulp).mean() > 0.2


def test_rounding_keeps_what_bfloat16_has():
    generator = torch.Generator().manual_seed(0)
    held = torch.randn(1000).to(torch.bfloat16)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, -2.5])
    for values in (held.float(), special):
        rounded = stochastic_round(values, generator)
        assert torch.equal(rounded.float(), values)
    assert stochastic_round(torch.tensor([math.nan]), generator).isnan().all()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_small_updates_add_up(name):
    """Steps of 1e-4 from 1.0, where bfloat16's next numbers are 1/256 below and 1/128 above."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(80, 80, dtype=torch.bfloat16))
            self.norm = nn.Parameter(torch.ones(80))

    model = Model()
    optim = recipe_of(optim={"lr": 1e-4, "name": name, "weight_decay": 0.0}).optim
    optimizer = build_optimizer(model, optim, seed=3)
    for _ in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert model.weight.dtype == torch.bfloat16 and model.weight.grad.dtype == torch.bfloat16
    # 6400 weights, each a walk of 100 steps whose variance is below 1e-4 / 256 a step
    assert float(model.weight.detach().double().mean()) == pytest.approx(0.99, abs=2e-4)
    assert float(model.norm.detach().mean()) == pytest.approx(0.99, abs=1e-5)  # float32: as ever
    assert 2 < len(model.weight.unique()) < 20


def test_updates_in_bfloat16_are_adams():
    """Against torch's AdamW on float32 copies, with steps that differ from one to the next: what
    is left is rounding, below a unit in the last place for each of the steps."""
    torch.manual_seed(0)
    shapes = [(7, 5), (40,), (3, 4, 2), (1,)]
    halves = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
    exact = [nn.Parameter(p.detach().double()) for p in halves]
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8}
    rounded = RoundedAdamW([{"params": halves, "weight_decay": 0.1}], **options, seed=1)
    reference = torch.optim.AdamW(exact, weight_decay=0.1, **options)
    for step in range(6):
        for i, (half, double) in enumerate(zip(halves, exact, strict=True)):
            gradient = torch.randn(half.shape).bfloat16()
            absent = i == 1 and step < 2  # unfrozen later
            half.grad = None if absent else gradient
            double.grad = None if absent else gradient.double()
        rounded.step()
        reference.step()
    assert [rounded.state[p]["step"] for p in halves] == [6, 4, 6, 6]
    for half, double in zip(halves, exact, strict=True):
        assert ((half.double() - double).abs() < 6 * 2**-7 * double.abs().clamp(min=0.05)).all()
        state, expected = rounded.state[half], reference.state[double]
        torch.testing.assert_close(
            state["exp_avg"].double(), expected["exp_avg"], rtol=1e-5, atol=1e-7
        )


@given(st.lists(st.integers(1, 12)), st.integers(1, 20))
def test_portions_hold_everything_in_order_and_little_at_once(sizes, most):
    tensors = [torch.zeros(size) for size in sizes]
    portions = list(_portions(tensors, most))
    assert [id(t) for portion in portions for t in portion] == [id(t) for t in tensors]
    assert all(len(p) == 1 or sum(t.numel() for t in p) <= most for p in portions)


def test_pure_bfloat16_holds_what_it_says():
    run = Run(recipe_of(trainer={"precision": "bf16_pure"}))
    norms = {f"encoder.layers.{i}.conv.batch_norm" for i in (0, 1)}
    for name, tensor in run.model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        full = name.rpartition(".")[0] in norms or name.startswith("preprocessor.")
        assert tensor.dtype == (torch.float32 if full else torch.bfloat16), name
    run.steps(2)
    for parameter, state in run.optimizer.state.items():
        assert parameter.grad.dtype == parameter.dtype
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert isinstance(run.optimizer, RoundedAdamW)


def test_pure_bfloat16_stays_near_float32():
    optim = {"lr": 1e-4}  # an update is far below half a unit of most weights
    exact = Run(recipe_of(optim=optim)).steps(12).losses
    losses = {}
    for seed in (1, 2):
        trainer = {"precision": "bf16_pure", "seed": seed}
        losses[seed] = Run(recipe_of(optim=optim, trainer=trainer)).steps(12).losses
        assert losses[seed] == pytest.approx(exact, rel=0.02)
        assert losses[seed][-1] < losses[seed][-4] < losses[seed][-7]  # of one batch
    assert losses[1] != losses[2]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_moments_come_back_bit_for_bit(name):
    sections = {"trainer": {"precision": "bf16_pure"}, "optim": {"name": name}}
    whole = Run(recipe_of(**sections)).steps(3)
    saved = {k: dict(v) for k, v in optimizer_state(whole.optimizer).items()}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    state = whole.state()
    again = Run(recipe_of(**sections))
    again.model.load_state_dict(state)
    load_optimizer_state(again.optimizer, saved)
    again.step = whole.step
    assert not changed(whole.steps(2).state(), again.steps(2).state())


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
@pytest.mark.parametrize("name", ["adamw", "adam", "adamw8bit"])
def test_what_inference_keeps_of_the_weights_is_made_anew(name, precision):
    """Validation between steps, beside a copy that has computed nothing yet."""
    if (name, precision) == ("adam", "bf16_pure"):
        pytest.skip("refused")
    sections = {"trainer": {"precision": precision}, "optim": {"name": name, "lr": 1e-2}}
    run = Run(recipe_of(**sections))
    batch = run.batches[0]

    def encoded(model):
        with torch.no_grad():
            features = model.eval().featurize(batch.audio, batch.audio_lengths)
            return model.encode(*features)[0]

    before = encoded(run.model)
    fresh = Run(recipe_of(**sections)).model
    fresh.load_state_dict(run.steps(1).state())
    after = encoded(run.model)
    assert not torch.equal(after, before)
    assert torch.equal(after, encoded(fresh))
    for parameter in fresh.parameters():
        parameter.data.mul_(0.9)
    changed_fresh = encoded(fresh)
    run.model.load_state_dict(fresh.state_dict())
    assert torch.equal(changed_fresh, encoded(run.model))


@pytest.mark.parametrize("options", [[], ["optim.name=adamw8bit"], ["lora.rank=3"]])
def test_pure_bfloat16_resumes_bit_for_bit_and_saves_float32(tmp_path, options):
    recipe, run = make_corpus(tmp_path)
    options += ["trainer.precision=bf16_pure", "trainer.ema_decay=0.7", "data.validation={}"]
    options += ["trainer.save_every_steps=2", "trainer.activation_checkpointing=true"]
    assert main([str(recipe), *options]) == 0
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    name = "checkpoints/step_00000002.pt"
    (tmp_path / "again" / name).write_bytes((run / name).read_bytes())
    assert main([str(recipe), *options, f"output={tmp_path / 'again'}"]) == 0
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (run, tmp_path / "again")]
    assert logs[0][2:] == logs[1] and json.loads(logs[1][0])["loss"] > 0
    weights = [load_file(f / "last" / "model.safetensors") for f in (run, tmp_path / "again")]
    assert not changed(*weights)
    dtypes = {tensor.dtype for tensor in weights[0].values()}
    assert dtypes == {torch.float32, torch.int64}
