import pytest
import torch

from training.augment.spec_augment import spec_augment
from training.objective.objective import augmentation
from training.recipe.data_sections import SpecAugmentRecipe

OPTIONS = {"freq_masks": 2, "time_masks": 3, "freq_width": 20, "time_width": 0.1}


def ones(lengths, n_mels=80, n_frames=200):
    return torch.ones(len(lengths), n_mels, n_frames), torch.tensor(lengths)


def augmented(features, lengths, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return spec_augment(features, lengths, **{**OPTIONS, **options}, generator=generator)


def test_same_seed_same_masks_and_the_input_stays():
    features, lengths = ones([200, 150])
    first = augmented(features, lengths, seed=3)
    assert torch.equal(first, augmented(features, lengths, seed=3))
    assert not torch.equal(first, augmented(features, lengths, seed=4))
    assert features.all()


@pytest.mark.parametrize("seed", range(20))
def test_bands_are_whole_and_not_wider_than_asked(seed):
    features, lengths = ones([200, 120, 1])
    masked = augmented(features, lengths, seed, time_masks=0) == 0
    bins = masked.all(dim=2)  # a frequency band covers every frame
    assert torch.equal(bins[:, :, None].expand_as(masked), masked)
    assert (bins.sum(1) <= 2 * 20).all()
    masked = augmented(features, lengths, seed, freq_masks=0) == 0
    frames = masked.all(dim=1)
    assert torch.equal(frames[:, None].expand_as(masked), masked)
    assert (frames.sum(1) <= torch.tensor([3 * 20, 3 * 12, 1])).all()


@pytest.mark.parametrize("time_width", [0.5, 25])
def test_time_masks_stay_inside_each_clip(time_width):
    features, lengths = ones([200, 100, 30])
    for seed in range(50):
        masked = augmented(features, lengths, seed, freq_masks=0, time_width=time_width) == 0
        for row, length in zip(masked[:, 0], lengths.tolist(), strict=True):
            assert not row[length:].any()


def test_widths_and_places_are_nemos():
    """floor(u * w), never w; and u * (length - width), rounded down: the last frames too."""
    features, lengths = ones([100] * 2000, n_mels=40, n_frames=100)
    masked = augmented(features, lengths, freq_masks=1, freq_width=10, time_masks=0, time_width=1)
    counts = torch.bincount((masked[:, :, 0] == 0).sum(1), minlength=10)
    assert len(counts) == 10  # 0..9
    assert counts.min() > 120 and counts.max() < 290  # 200 expected, 6 sigma = 80
    masked = augmented(features, lengths, freq_masks=0, time_masks=1, time_width=10)
    widths = (masked[:, 0] == 0).sum(1)
    counts = torch.bincount(widths, minlength=10)
    assert len(counts) == 10 and counts.min() > 120 and counts.max() < 290
    starts = (masked[:, 0] == 0).float().argmax(1)[widths == 1]
    assert starts.min() == 0 and starts.max() == 98  # u < 1: the very last frame stays


def test_as_many_frames_are_masked_as_in_nemo():
    """The mean of 400 clips of 200 frames, ten masks of at most a tenth: NeMo 3.0 masks 8.8 % of
    a clip by one mask of 0.05, where widths of 0 to w inclusive gave 10.0."""
    features, lengths = ones([200] * 4000, n_mels=1, n_frames=200)
    masked = augmented(features, lengths, freq_masks=0, freq_width=0, time_masks=2, time_width=0.05)
    mean = float((masked == 0).float().sum((1, 2)).mean())
    assert mean == pytest.approx(2 * 4.5, abs=0.3)  # 0..9 frames each, some of them together


def test_draw_for_draw_as_nemo():
    """NeMo's formula, written out: widths, then starts, of time before frequency."""
    lengths, n_mels, n_frames = torch.tensor([200, 77]), 20, 200
    features = torch.ones(2, n_mels, n_frames)
    torch.manual_seed(5)
    masked = spec_augment(features, lengths, 2, 3, 9, 0.2)
    torch.manual_seed(5)
    expected = features.clone()
    widths = (torch.rand(2, 3) * (0.2 * lengths)[:, None]).long()
    starts = (torch.rand(2, 3) * (lengths[:, None] - widths)).long()
    bin_widths = (torch.rand(2, 2) * 9).long()
    bin_starts = (torch.rand(2, 2) * (n_mels - bin_widths)).long()
    for clip in range(2):
        for start, width in zip(starts[clip], widths[clip], strict=True):
            expected[clip, :, start : start + width] = 0
        for start, width in zip(bin_starts[clip], bin_widths[clip], strict=True):
            expected[clip, start : start + width] = 0
    assert torch.equal(masked, expected)


def test_masks_of_nothing_change_nothing():
    features, lengths = ones([50, 20])
    assert augmented(features, lengths, freq_masks=0, time_masks=0).all()
    assert augmented(features, lengths, freq_width=0, time_width=0).all()


def test_wrong_widths_are_named():
    features, lengths = ones([50])
    with pytest.raises(ValueError, match="freq_width is 81"):
        augmented(features, lengths, freq_width=81)
    with pytest.raises(ValueError, match="time_width is 1.5"):
        augmented(features, lengths, time_width=1.5)
    with pytest.raises(ValueError, match="rect_freq is 81"):
        augmented(features, lengths, rect_masks=1, rect_freq=81)


def test_rectangles_are_cut_out_inside_each_clip():
    features, lengths = ones([100, 40, 3] * 300, n_mels=40, n_frames=100)
    options = {"freq_masks": 0, "time_masks": 0, "rect_masks": 1, "rect_time": 8, "rect_freq": 10}
    masked = augmented(features, lengths, **options) == 0
    bins, frames = masked.any(dim=2), masked.any(dim=1)
    assert torch.equal(masked, bins[:, :, None] & frames[:, None, :])  # one rectangle each
    assert set(bins.sum(1).tolist()) == set(range(11))
    assert set(frames[lengths == 100].sum(1).tolist()) == set(range(9))
    assert frames[lengths == 3].sum(1).max() == 3
    for row, length in zip(frames, lengths.tolist(), strict=True):
        assert not row[length:].any()
    for seen, size in ((bins, 40), (frames[lengths == 100], 100)):  # each place is reached
        assert seen.any(dim=0).sum() >= size - 2  # the last ones are rare
    several = augmented(features, lengths, **{**options, "rect_masks": 5}) == 0
    assert several.float().mean() > 3 * masked.float().mean()
    # bands and rectangles together, and the bands are what they were without
    bands = augmented(features, lengths, freq_masks=2, time_masks=2) == 0
    both = augmented(features, lengths, freq_masks=2, time_masks=2, rect_masks=2) == 0
    assert (both & bands).sum() == bands.sum() < both.sum()


@pytest.mark.parametrize("where", ["recipe", "checkpoint"])
def test_rectangles_from_the_recipe_or_the_checkpoints_config(where):
    options = {"rect_masks": 4, "rect_time": 30, "rect_freq": 20}
    recipe = SpecAugmentRecipe(**(options if where == "recipe" else {}))
    section = options if where == "checkpoint" else {"rect_masks": 0}
    features, lengths = ones([200, 150])
    torch.manual_seed(0)
    masked = augmentation(recipe, {"spec_augment": section})(features, lengths) == 0
    assert 0 < masked.float().mean() < 0.2 and not masked.all(dim=1).any()
    assert augmentation(SpecAugmentRecipe(rect_masks=0), {"spec_augment": options}) is None
