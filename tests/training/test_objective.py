"""The losses that a recipe can name, and that a batch in pieces has the batch's gradient."""

import dataclasses

import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import after_each
from safetensors.torch import load_file
from torch.nn import functional as F

from fastconformer.networks.subsampling import ConvSubsampling
from training.data.store import Batch
from training.data.utterances import Utterance
from training.loop.batch_norm import StepStatistics
from training.loop.ranks import BatchShare
from training.loop.step import gradients
from training.objective.cr_ctc import consistency, time_warp
from training.objective.objective import Objective, batch_loss, make_views, objective_of, views_loss
from training.recipe.recipe import recipe_from_dict
from training.recipe.sections import LossRecipe, ModelRecipe
from training.setup.freeze import train_mode
from training.setup.start import build_model


@pytest.fixture
def batch():
    tensors = load_file(golden("train_parity") / "golden.safetensors")
    names = ("audio", "audio_len", "targets", "targets_len")
    parts = [tensors[f"batch0/{name}"] for name in names]
    utterances = [
        Utterance(f"{i}.wav", "", 1.0, None, "m.jsonl", i + 1) for i in range(len(parts[1]))
    ]
    return Batch(tuple(utterances), *parts)


def model_with(**loss):
    torch.set_num_threads(1)
    path = str(golden("train_parity") / "model.nemo")
    return build_model(ModelRecipe(init_from=path, dropout=0.0), LossRecipe(**loss), seed=0)


def objective_with(model, **sections):
    tree = {"output": "x", "model": {"init_from": "x"}, "data": {"train": "x"}}
    recipe = recipe_from_dict(tree | {"trainer": {"max_steps": 1}} | sections)
    bf16 = recipe.trainer.precision == "bf16"
    return objective_of(model, recipe.loss, recipe.spec_augment, bf16)


def by_layer(model, batch):
    """The encoder by hand, to every layer's output: (list of (B, T', D), lengths)."""
    features, lengths = model.featurize(batch.audio, batch.audio_lengths)
    x, lengths = model.encoder.pre_encode(features, lengths)
    x, *rest = model.encoder.prepare(x, lengths)
    outputs = []
    for layer in model.encoder.layers:
        x = layer(x, *rest)
        outputs.append(x)
    return outputs, lengths


def ctc(model, encoded, lengths, batch):
    log_probs = model.ctc_log_probs(encoded).transpose(0, 1)
    arguments = batch.targets, lengths, batch.target_lengths, model.blank_id
    return F.ctc_loss(log_probs, *arguments, reduction="none", zero_infinity=True).mean()


@pytest.mark.parametrize("heads", ["all", "ctc", "transducer"])
def test_interctc_is_nemos(batch, heads):
    options = {"interctc_layers": [0], "interctc_weights": [0.3], "heads": heads}
    model = model_with(interctc_layers=(0,), interctc_weights=(0.3,))
    model.eval()
    total, parts = batch_loss(model, batch, objective_with(model, loss=options))
    plain, _ = batch_loss(
        model_with().eval(), batch, objective_with(model_with(), loss={"heads": heads})
    )
    outputs, lengths = by_layer(model, batch)
    inner = ctc(model, outputs[0], lengths, batch)
    torch.testing.assert_close(parts["interctc_0"], inner, rtol=1e-5, atol=0)
    torch.testing.assert_close(total, 0.7 * plain + 0.3 * inner, rtol=1e-5, atol=0)
    assert model.config.nemo["interctc"] == {"loss_weights": [0.3], "apply_at_layers": [0]}


def test_interctc_teaches_the_lower_layers_alone(batch):
    model = model_with(interctc_layers=(0,), interctc_weights=(1.0,))
    objective = objective_with(model, loss={"heads": "ctc"})
    batch_loss(model.train(), batch, objective)[0].backward()
    upper = [p.grad for p in model.encoder.layers[1].parameters()]
    assert all(grad is None or not grad.any() for grad in upper)
    assert model.encoder.layers[0].feed_forward1.linear1.weight.grad.any()


def test_interctc_asks_for_what_the_model_has():
    with pytest.raises(ValueError, match="names layer 1; this encoder's middle layers are 0 to 0"):
        objective_with(model_with(interctc_layers=(1,), interctc_weights=(0.3,)))


def views_masked_apart(features, lengths):
    """A SpecAugment that can be repeated by hand: the first view loses its first frames, the second
    its last mel bins."""
    masked = features.clone()
    half = len(masked) // 2
    masked[:half, :, :7] = 0
    masked[half:, -5:] = 0
    return masked


@pytest.mark.parametrize("heads", [("ctc",), ("tdt", "ctc")])
def test_cr_ctc_is_the_papers(batch, heads):
    model = model_with().eval()
    objective = Objective(heads, views_masked_apart, cr_weight=500.0)  # they lie close
    total, parts = batch_loss(model, batch, objective)
    features, lengths = model.featurize(batch.audio, batch.audio_lengths)
    pair = views_masked_apart(features.repeat(2, 1, 1), lengths.repeat(2)).chunk(2)
    losses, log_probs = [], []
    for view in pair:
        encoded, frames = model.encode(view, lengths)
        arguments = encoded, frames, batch.targets, batch.target_lengths
        losses.append({k: v.mean() for k, v in model.losses(*arguments, heads=heads).items()})
        log_probs.append(model.ctc_log_probs(encoded).double())
    distance = 0.0
    for clip, n_frames in enumerate(frames.tolist()):
        for t in range(n_frames):
            a, b = (log_prob[clip, t] for log_prob in log_probs)
            distance += 0.5 * ((b.exp() * (b - a)).sum() + (a.exp() * (a - b)).sum())
    distance = (distance / len(frames)).float()
    mean = {head: (losses[0][head] + losses[1][head]) / 2 for head in heads}
    torch.testing.assert_close(parts["cr"], distance, rtol=1e-4, atol=0)
    assert distance > 0.001  # the two views do differ
    expected = mean["ctc"] + 500.0 * distance
    if "tdt" in heads:
        weight = model.config.loss.ctc_weight
        expected = weight * expected + (1 - weight) * mean["tdt"]
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


def test_each_view_is_drawn_to_the_other_as_it_stands():
    """The gradient at a view is the softmax of its own minus the other's: sg on the target."""
    logits = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, 2, 3, 2])
    consistency(logits.log_softmax(-1), lengths)[:2].sum().backward()
    probabilities = logits.detach().softmax(-1)
    difference = 0.5 * (probabilities - probabilities.roll(2, 0))
    difference[[1, 3], 2:] = 0  # padding
    torch.testing.assert_close(logits.grad, difference, rtol=1e-5, atol=1e-7)


def test_cr_ctc_as_a_recipe_has_it():
    model = model_with()
    loss = {"use_cr_ctc": True, "cr_ctc_weight": 0.4, "cr_ctc_time_warp": 9}
    masks = {"time_masks": 4, "time_width": 0.1, "freq_masks": 0}
    objective = objective_with(model, loss=loss, spec_augment=masks)
    assert objective.cr_weight == 0.4 and objective.warp_frames == 9
    # 2.5 times as many time masks as without it
    usual = objective_with(model, spec_augment=masks)
    features = torch.ones(400, model.config.preprocessor.features, 200)
    lengths = torch.full((400,), 200)
    shares = []
    for augment in (usual.augment, objective.augment):
        torch.manual_seed(0)
        shares.append(float((augment(features, lengths) == 0).float().mean()))
    # widths are 0 to 19 frames of 200, 9.5 in the mean, and masks overlap
    mean = 1 - 9.5 / 200
    assert shares == pytest.approx([1 - mean**4, 1 - mean**10], abs=0.02)
    with pytest.raises(ValueError, match="compares two SpecAugment views"):
        objective_with(model, loss=loss, spec_augment=masks | {"time_masks": 0})
    with pytest.raises(ValueError, match="no ctc head is trained"):
        objective_with(model, loss=loss | {"heads": "transducer"}, spec_augment=masks)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    reach=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_time_warp_bends_time_alone(lengths, reach, seed):
    lengths = torch.tensor(lengths)
    n_frames = int(lengths.max())
    ramp = torch.arange(n_frames, dtype=torch.float32).expand(len(lengths), 3, -1)
    torch.manual_seed(seed)
    warped = time_warp(ramp, lengths, reach)
    for clip, length in enumerate(lengths.tolist()):
        inside = warped[clip, 0, :length]
        assert torch.equal(warped[clip, :, length:], ramp[clip, :, length:])
        assert torch.equal(warped[clip], warped[clip, :1].expand(3, -1))  # all bins alike
        if length < 2 * reach + 2:
            assert torch.equal(inside, ramp[clip, 0, :length])
            continue
        assert inside.diff().min() >= 0  # time goes forward
        assert (inside - ramp[clip, 0, :length]).abs().max() <= reach + 1


def test_one_warp_is_shared_by_both_views(batch):
    model = model_with().eval()
    objective = Objective(("ctc",), lambda f, n: f, cr_weight=0.2, warp_frames=5)
    torch.manual_seed(1)
    views = make_views(model, batch, objective)
    first, second = views.features.chunk(2)
    plain, _ = model.featurize(batch.audio, batch.audio_lengths)
    assert torch.equal(first, second) and not torch.equal(first, plain)


# --- a batch in pieces --------------------------------------------------------------------------


def gradient(model, batch, objective, share=None, trouble=None):
    train_mode(model)
    model.zero_grad()
    for module in model.modules():  # what a piece sees of the batch differs only in BatchNorm
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    share = share or BatchShare()
    with after_each(ConvSubsampling, trouble or (lambda *_: None)):
        batches = [batch] * len(share.mine)
        result = gradients(model, batches, objective, 1, 0, share, StepStatistics(model))
    return result, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def too_large(most_clips):
    def action(module, inputs, output):
        if len(output[0]) > most_clips:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    return action


@pytest.mark.parametrize("reduction", ["mean_batch", "mean", "mean_volume", "sum"])
def test_a_step_without_memory_is_split_and_has_the_same_gradient(batch, reduction):
    model = model_with(reduction=reduction, omega=0.0)
    objective = objective_with(
        model,
        loss={"use_cr_ctc": True, "cr_ctc_time_warp": 5},
        spec_augment={"time_masks": 2, "time_width": 0.1},
    )
    whole, expected = gradient(model, batch, objective)
    split, found = gradient(model, batch, objective, trouble=too_large(2))  # 1 clip, 2 views
    assert whole.splits == 0 and split.splits > 0
    assert split.losses == pytest.approx(whole.losses, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) + 1e-6
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5 * scale, msg=name)


def test_a_clip_that_does_not_fit_alone_is_an_error(batch):
    model = model_with()
    with pytest.raises(ValueError, match=r"step 1 failed on a batch of \(\d+, .*out of memory"):
        gradient(model, batch, Objective(("ctc",)), trouble=too_large(0))


def test_accumulation_is_the_mean_of_its_batches(batch):
    model = model_with()
    once, single = gradient(model, batch, Objective(("ctc",)))
    twice, double = gradient(model, batch, Objective(("ctc",)), BatchShare(n_batches=2))
    assert twice.losses == pytest.approx(once.losses)
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, msg=name)


def test_batchnorm_statistics_of_pieces_are_the_batchs(batch):
    """Pieces' means, weighted, are the batch's mean; torch's own is the reference."""
    model = model_with()
    objective = Objective(("ctc",))
    norm = model.encoder.layers[0].conv.batch_norm
    start = {k: v.clone() for k, v in model.state_dict().items()}
    found = []
    for trouble in (None, too_large(1)):
        model.load_state_dict(start)
        train_mode(model)
        with after_each(ConvSubsampling, trouble or (lambda *_: None)):
            share = BatchShare(n_batches=2)
            gradients(model, [batch] * 2, objective, 1, 0, share, StepStatistics(model))
        found.append((norm.running_mean.clone(), int(norm.num_batches_tracked)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    assert (
        found[0][1]
        == found[1][1]
        == int(start["encoder.layers.0.conv.batch_norm.num_batches_tracked"]) + 2
    )


def test_losses_name_the_clips_that_are_not_finite(batch):
    model = model_with().eval()
    audio = batch.audio.clone()
    audio[1, 100] = float("nan")
    batch = dataclasses.replace(batch, audio=audio)
    objective = Objective(("ctc",))
    _, _, finite = views_loss(model, make_views(model, batch, objective), objective)
    assert finite.tolist() == [i != 1 for i in range(len(finite))]
