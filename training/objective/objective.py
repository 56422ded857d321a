"""What a run minimises: the losses of one batch, and what each of them weighs.

`objective_of` reads the recipe, `batch_loss` is the forward pass with every loss it can name.

Every loss of a batch is a sum over clips of `weight * loss of the clip`, with weights from the
whole batch, so that a batch in pieces, or dealt out to processes, gives the gradient of the batch.

Letters of shapes: B clips of a batch, T frames, T' encoder frames, V tokens without blank.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastconformer import ASRModel
from fastconformer.heads import HEADS
from fastconformer.transfers import sent
from training.augment.spec_augment import spec_augment
from training.data.store import Batch
from training.objective.cr_ctc import consistency, time_warp
from training.recipe.data_sections import MASKS, SpecAugmentRecipe
from training.recipe.sections import LossRecipe

log = logging.getLogger("finetune")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run minimises.

    heads: those whose loss is trained. interctc: {encoder layer, from 0: weight} (NeMo's InterCTC).
    cr_weight: of CR-CTC's consistency, None without it; warp_frames: reach of its time warp.
    eps: of the transducer loss (`fused_transducer_loss`).
    kept: (features, lengths, encoded, batch) -> {name: (B,)}, distances from a frozen original
    (`training.objective.retain.Retain.distances`), and kept_weights of them by name.
    """

    heads: tuple[str, ...]
    augment: Callable[[Tensor, Tensor], Tensor] | None = None
    bf16: bool = False
    interctc: dict[int, float] = dataclasses.field(default_factory=dict)
    cr_weight: float | None = None
    warp_frames: int = 0
    eps: float = 0.0
    kept: Callable | None = None
    kept_weights: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def has_lattice(self) -> bool:
        """Whether a loss sums over frames and tokens, and may skip cells."""
        return any(HEADS[head].has_lattice for head in self.heads)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what is logged: the losses, and how much of the transducer's lattice the
        gradient visits."""
        consistent = () if self.cr_weight is None else ("cr",)
        visits = ("active_share",) if self.eps and self.has_lattice else ()
        inner = (f"interctc_{layer}" for layer in self.interctc)
        return (*self.heads, *inner, *consistent, *self.kept_weights, *visits)


def objective_of(
    model: ASRModel,
    loss: LossRecipe,
    spec_augment_recipe: SpecAugmentRecipe = SpecAugmentRecipe(),  # noqa: B008 (frozen)
    bf16: bool = False,
) -> Objective:
    """The recipe's `loss` and `spec_augment`, and where they are silent the checkpoint's config.

    Raises:
        ValueError: a loss that this model cannot have.
    """
    heads = trained_heads(model, loss.heads)
    section = model.config.record.get("interctc") or {}
    layers, weights = section.get("apply_at_layers") or (), section.get("loss_weights") or ()
    interctc = dict(zip(layers, weights, strict=True))
    last = len(model.encoder.layers) - 1
    for layer in interctc:
        if not 0 <= layer < last:
            raise ValueError(
                f"loss.interctc_layers names layer {layer}; this encoder's middle layers are "
                f"0 to {last - 1}"
            )
    if sum(interctc.values()) > 1:
        raise ValueError(f"loss.interctc_weights add up to {sum(interctc.values())}, at most 1")
    frame_head = model.frame_head
    if interctc and frame_head is None:
        raise ValueError("loss.interctc_layers: this model has no ctc head")
    if interctc and model.config.encoder.reduces:
        raise ValueError("loss.interctc_layers: not with an encoder that has a reduction")
    if loss.use_cr_ctc and (frame_head is None or frame_head.name not in heads):
        raise ValueError("loss.use_cr_ctc: no ctc head is trained; check loss.heads and the model")
    reductions = {head: model.head(head).reduction for head in heads}
    if len(set(reductions.values())) > 1:
        log.warning(
            "losses are reduced differently (%s), so that their weights mean different things; "
            "loss.reduction sets all",
            ", ".join(f"{head} by {reduction}" for head, reduction in reductions.items()),
        )
    more_time = loss.cr_ctc_time_mask_ratio if loss.use_cr_ctc else 1.0
    mask = augmentation(spec_augment_recipe, model.config.record, more_time)
    augment = None
    if mask is not None:

        def augment(features: Tensor, lengths: Tensor) -> Tensor:
            front_end = model.preprocessor
            return front_end.augmented(features, lengths, mask, spec_augment_recipe.lfr)

    if loss.use_cr_ctc and augment is None:
        raise ValueError(
            "loss.use_cr_ctc compares two SpecAugment views; set spec_augment.time_masks, "
            "for example 10 with time_width 0.05"
        )
    return Objective(
        heads,
        augment=augment,
        bf16=bf16,
        interctc=interctc,
        cr_weight=loss.cr_ctc_weight if loss.use_cr_ctc else None,
        warp_frames=loss.cr_ctc_time_warp if loss.use_cr_ctc else 0,
        eps=loss.eps,
    )


def trained_heads(model: ASRModel, family: str) -> tuple[str, ...]:
    """The model's heads of a family, or "all". ValueError: it has none."""
    families = {head: model.head(head).family for head in model.heads}
    heads = tuple(head for head in model.heads if family in ("all", families[head]))
    if not heads:
        known = ", ".join(dict.fromkeys(("all", *families.values())))
        raise ValueError(f"loss.heads is {family!r}, this model has {known}")
    return heads


def augmentation(
    recipe: SpecAugmentRecipe, config: dict, more_time: float = 1.0
) -> Callable | None:
    """SpecAugment as the recipe says, and where it is silent as NeMo's `spec_augment` section;
    `more_time` multiplies the number of time masks."""
    section = config.get("spec_augment") or {}
    given = {k: v for k, v in dataclasses.asdict(recipe).items() if v is not None}
    options = {k: given.get(k, section.get(k, v)) for k, v in MASKS.items()}
    options["time_masks"] = round(options["time_masks"] * more_time)
    if not any(options[name] for name in ("freq_masks", "time_masks", "rect_masks")):
        return None
    return lambda features, lengths: spec_augment(features, lengths, **options)


def clip_weights(target_lengths: Tensor, reduction: str) -> Tensor:
    """(B,) weights with which clips' losses add up to a batch's; NeMo's four reductions.

    mean_batch: 1 / B; mean: 1 / (B * tokens of the clip); mean_volume: 1 / tokens of all clips;
    sum: 1.
    """
    ones = torch.ones_like(target_lengths, dtype=torch.float32)
    if reduction == "mean_batch":
        return ones / len(target_lengths)
    if reduction == "mean":
        return ones / target_lengths / len(target_lengths)
    if reduction == "mean_volume":
        return ones / target_lengths.sum()
    assert reduction == "sum"
    return ones


@dataclasses.dataclass(frozen=True)
class Views:
    """A batch's features as the losses take them; `batch` is the one its clips come from.

    features (N * B, M, T): N = 2 views of each clip for CR-CTC, else 1; all clips of the first
    view, then all of the second. weights: {head: (B,)} of the whole batch, and "mean_batch".
    """

    features: Tensor
    lengths: Tensor
    batch: Batch
    weights: dict[str, Tensor]

    def rows(self, rows: Tensor) -> "Views":
        """Only these clips."""
        n_clips = len(self.batch.target_lengths)
        both = torch.cat([rows + start for start in range(0, len(self.lengths), n_clips)])
        device = self.features.device
        there = sent(rows, device)
        batch = Batch(
            tuple(self.batch.utterances[i] for i in rows.tolist()) if self.batch.utterances else (),
            self.batch.audio[there],
            *(getattr(self.batch, n)[rows] for n in ("audio_lengths", "targets", "target_lengths")),
        )
        weights = {name: values[there] for name, values in self.weights.items()}
        return Views(self.features[sent(both, device)], self.lengths[both], batch, weights)


def make_views(model: ASRModel, batch: Batch, objective: Objective) -> Views:
    """Features of a batch, augmented: once, or twice from one time-warped input for CR-CTC."""
    features, lengths = model.featurize(batch.audio, batch.audio_lengths)  # always float32
    if objective.cr_weight is not None:
        if objective.warp_frames:
            features = time_warp(features, lengths, objective.warp_frames)
        features, lengths = features.repeat(2, 1, 1), lengths.repeat(2)
    if objective.augment is not None:
        features = objective.augment(features, lengths)
    weights = {"mean_batch": clip_weights(batch.target_lengths, "mean_batch")}
    for head in map(model.head, model.heads):
        weights[head.name] = clip_weights(head.target_counts(batch), head.reduction)
    weights = {name: sent(values, features.device) for name, values in weights.items()}
    return Views(features, lengths, batch, weights)


def views_loss(
    model: ASRModel, views: Views, objective: Objective
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss of these clips as a scalar, its named parts (`objective.parts`), and (B,) whether each
    clip is finite."""
    batch, frame_head, report = views.batch, model.frame_head, {}
    n_views = len(views.lengths) // len(batch.target_lengths)
    targets = {name: _repeated(t, n_views) for name, t in model.targets_of(batch).items()}
    with (
        torch.autocast(views.features.device.type, dtype=torch.bfloat16, enabled=objective.bf16),
        layer_outputs(model, tuple(objective.interctc)) as inner,
    ):
        asked = model.encoder_inputs(batch.utterances * n_views)
        encoded, lengths = model.encode(views.features, views.lengths, **asked)
        lattice = {"eps": objective.eps, "report": report} if objective.has_lattice else {}
        by_clip = model.losses(encoded, lengths, **targets, heads=objective.heads, **lattice)
        for layer in objective.interctc:
            inner_encoded = inner[layer]
            if model.encoder.out_proj is not None:
                inner_encoded = model.encoder.out_proj(inner_encoded)
            name = frame_head.name
            losses = model.losses(inner_encoded, lengths, **targets, heads=(name,))
            by_clip[f"interctc_{layer}"] = losses[name]
        if objective.cr_weight is not None:
            by_clip["cr"] = consistency(frame_head.log_probs(encoded), lengths)
        if objective.kept is not None:
            by_clip |= objective.kept(views.features, views.lengths, encoded, batch)
    by_clip = {
        name: losses.float().view(-1, len(batch.target_lengths)).mean(0)
        for name, losses in by_clip.items()
    }
    finite = torch.stack([losses.detach().isfinite() for losses in by_clip.values()]).all(0)
    parts = {}
    for name, losses in by_clip.items():
        if name in objective.kept_weights:
            weight = "mean_batch"
        else:  # InterCTC's and CR-CTC's are of the frames' head
            weight = name if name in model.heads else frame_head.name
        parts[name] = (views.weights[weight] * losses).sum()
    trained = {head: parts[head] for head in objective.heads}
    if objective.cr_weight is not None:
        name = frame_head.name
        trained[name] = trained[name] + objective.cr_weight * parts["cr"]
    if len(trained) == 1:
        (total,) = trained.values()
    else:
        total = sum(model.head(head).share * value for head, value in trained.items())
    if objective.interctc:
        total = total * (1 - sum(objective.interctc.values()))
        for layer, weight in objective.interctc.items():
            total = total + weight * parts[f"interctc_{layer}"]
    if "active_share" in objective.parts:
        share = report["active_share"].view(n_views, -1).mean(0)
        parts["active_share"] = (views.weights["mean_batch"] * share).sum()
    for name, weight in objective.kept_weights.items():
        total = total + weight * parts[name]
    return total, parts, finite


def _repeated(values: Tensor | list, times: int) -> Tensor | list:
    """Values of the clips, for so many views of each."""
    if isinstance(values, list):
        return values * times
    return values.repeat(times, *[1] * (values.ndim - 1))


def batch_loss(
    model: ASRModel, batch: Batch, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch, and its parts, as scalars.

    One head: its loss; more: the sum of `share * loss`, which for a hybrid is `(1 - w) * transducer
    + w * ctc` with w = model.config.loss.ctc_weight (NeMo's EncDecHybridRNNTCTCModel). InterCTC:
    `(1 - sum of v) * that + sum of v * CTC at the layer`, by the one CTC head (NeMo's
    InterCTCMixin; Lee and Watanabe 2021, arXiv:2102.03216). CR-CTC: every loss is the mean of both
    views', and ctc is `ctc + alpha * consistency` (Yao et al. 2024, arXiv:2410.05101).
    """
    total, parts, _ = views_loss(model, make_views(model, batch, objective), objective)
    return total, parts


@contextlib.contextmanager
def layer_outputs(model: ASRModel, layers: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Collects what the encoder hands from these layers to the next ones, (B, T', D)."""
    found = {}

    def note(layer):
        def hook(module, arguments):
            found[layer] = arguments[0]

        return hook

    # The next layer's input: stochastic depth acts between a layer and it.
    hooks = [
        model.encoder.layers[layer + 1].register_forward_pre_hook(note(layer)) for layer in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
