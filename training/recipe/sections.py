"""Recipe sections of the model, of what it learns from, and of how it is trained and kept."""

import dataclasses

from training.recipe.fields import key

REDUCTIONS = (None, "mean_batch", "mean", "mean_volume", "sum")


@dataclasses.dataclass(frozen=True)
class ModelRecipe:
    init_from: str | None = None  # .nemo file or converted folder
    config: str | dict | None = None  # from scratch instead: a NeMo-style model config
    # A folder or file; with init_from: change the vocabulary to it. {language: file} is a tokenizer
    # for each; with init_from it adds languages to a model that has such.
    tokenizer: str | dict[str, str] | None = None
    labels: tuple[str, ...] = ()  # characters, in the place of a tokenizer
    # Rows to the new vocabulary; none: all are random.
    transfer: str = key("by_piece", one_of=("by_piece", "none"))
    new_rows: str = key("mean", one_of=("mean", "zeros", "random"))  # of pieces without a row
    dropout: float | None = key(None, share=True)  # of all encoder layers; null: the checkpoint's
    sample_rate: int | None = key(None, at_least=1000)  # e.g. 8000: a front end of this rate
    # Of its mel filters: where they were, or (Fun-ASR-Nano) all below half of the new rate.
    mel_edges: str = key("keep", one_of=("keep", "stretch"))

    def __post_init__(self):
        if self.labels and self.tokenizer is not None:
            raise ValueError("give model.tokenizer or model.labels, not both")

    @property
    def changes_vocabulary(self) -> bool:
        """Whether a trained model gets another tokenizer."""
        return self.init_from is not None and bool(self.tokenizer or self.labels)


@dataclasses.dataclass(frozen=True)
class EncoderRecipe:
    # birwkv7: in the place of self-attention; null: the checkpoint's.
    attention: str | None = key(None, one_of=(None, "birwkv7"))
    warm_start: bool = True  # BiRWKV7 from the attention's projections; false: from random
    direction_dropout: float = key(0.0, share=True)  # BiRWKV7: batches with one direction only


@dataclasses.dataclass(frozen=True)
class LossRecipe:
    heads: str = "all"  # or a family of heads, such as ctc or transducer
    ctc_weight: float | None = key(None, share=True)  # hybrid only; null: the checkpoint's
    sigma: float | None = key(None, at_least=0)  # TDT only; null: the checkpoint's
    omega: float | None = key(None, share=True)  # TDT only; null: the checkpoint's
    fastemit_lambda: float | None = key(None, at_least=0)  # null: the checkpoint's
    eps: float = key(1e-7, share=True)  # transducer: gradients skip cells of a lower occupancy
    transducer_reduction: str | None = key(None, one_of=REDUCTIONS)  # null: the checkpoint's
    ctc_reduction: str | None = key(None, one_of=REDUCTIONS)  # null: the checkpoint's
    reduction: str | None = key(None, one_of=REDUCTIONS)  # of both, instead of the two above
    interctc_layers: tuple[int, ...] | None = None  # from 0; null: the checkpoint's; []: off
    interctc_weights: tuple[float, ...] | None = None  # one for each layer
    use_cr_ctc: bool = False
    cr_ctc_weight: float = key(0.2, at_least=0)  # of the consistency, beside CTC
    cr_ctc_time_mask_ratio: float = key(2.5, above=0)  # times as many time masks
    cr_ctc_time_warp: int = key(80, at_least=0)  # frames, shared by both views; 0: none
    label_smoothing: float | None = key(None, share=True)  # Canary; null: the checkpoint's
    mask_prompt: bool | None = None  # Canary: the prompt is not trained; null: the checkpoint's

    def __post_init__(self):
        if self.reduction and (self.transducer_reduction or self.ctc_reduction):
            raise ValueError("loss.reduction sets both reductions; leave the others out")
        layers, weights = self.interctc_layers, self.interctc_weights
        if (layers is None) != (weights is None) or len(layers or ()) != len(weights or ()):
            raise ValueError(
                "give loss.interctc_layers and loss.interctc_weights, one weight a layer"
            )
        if not all(0 <= weight <= 1 for weight in weights or ()) or sum(weights or ()) > 1:
            raise ValueError(
                f"loss.interctc_weights is {weights}, expected shares of at most 1 together"
            )


@dataclasses.dataclass(frozen=True)
class PromptRecipe:
    """Canary's prompt: further values of its slots, kept in the checkpoint."""

    # {slot: {value: special token}}, such as {pnc: {verse: "<|spltoken0|>"}}
    values: dict[str, dict] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FreezeRecipe:
    encoder_layers: int | str = 0  # the subsampling and this many first layers, or "half"
    modules: tuple[str, ...] = ()  # e.g. [prediction, joint, ctc, subsampling, encoder.layers.0-3]
    until: dict[str, int] = dataclasses.field(default_factory=dict)  # part -> its first step
    # Of frozen parts: fixed, adapt (its statistics move) or affine (its weights too).
    batch_norm: str = key("fixed", one_of=("fixed", "adapt", "affine"))
    dropout: bool = False  # in frozen parts too, as FunASR's training has it

    def __post_init__(self):
        layers = self.encoder_layers
        if layers != "half" and not (isinstance(layers, int) and layers >= 0):
            raise ValueError(f'freeze.encoder_layers is {layers!r}; give a count or "half"')
        for part, step in self.until.items():
            if step < 0:
                raise ValueError(f"freeze.until.{part} is {step}, expected a step, 0 or more")


@dataclasses.dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters are all that moves, besides `also`; merged in what is saved."""

    rank: int = key(0, at_least=0)  # 0: no LoRA
    alpha: float | None = key(None, above=0)  # updates are scaled by alpha / rank; null: as rank
    dropout: float = key(0.0, share=True)  # of the adapters' input
    targets: tuple[str, ...] = ("attention", "feed_forward")  # or linear layers, such as linear_q
    also: tuple[str, ...] = ()  # parts that move as a whole, such as [ctc, joint]

    def __post_init__(self):
        if self.rank and not self.targets:
            raise ValueError("lora.targets is empty; name e.g. attention, or set rank 0")


@dataclasses.dataclass(frozen=True)
class OptimRecipe:
    name: str = key("adamw", one_of=("adamw", "adamw8bit", "adam"))
    lr: float = key(1e-3, above=0)
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = key(1e-3, at_least=0)
    eps: float = key(1e-8, above=0)
    amsgrad: bool = False  # adamw and adam: by the largest second moment that was
    decay_norms_and_biases: bool = True  # NeMo decays every parameter
    lr_groups: dict[str, float] = dataclasses.field(default_factory=dict)  # part -> its lr
    layer_decay: float | None = key(None, above=0, share=True)  # lr times this a layer further down

    def __post_init__(self):
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {self.betas}, expected 0 <= beta < 1")
        if self.amsgrad and self.name == "adamw8bit":
            raise ValueError("optim.amsgrad does not go with optim.name adamw8bit")
        for part, rate in self.lr_groups.items():
            if rate <= 0:
                raise ValueError(f"optim.lr_groups.{part} is {rate}, expected more than 0")


@dataclasses.dataclass(frozen=True)
class ScheduleRecipe:
    name: str = key(
        "cosine", one_of=("cosine", "linear", "inverse_sqrt", "noam", "wsd", "constant")
    )
    warmup_steps: int | None = key(None, at_least=0)
    warmup_ratio: float | None = key(None, share=True)  # of all steps, instead of warmup_steps
    min_lr: float = key(1e-6, at_least=0)
    hold_steps: int | None = key(None, at_least=0)  # wsd: steps at lr between warm-up and decay
    hold_ratio: float | None = key(
        None, share=True
    )  # of all steps; both null: the last fifth decays
    decay_shape: str = key("linear", one_of=("linear", "sqrt"))  # wsd; sqrt: 1 - sqrt
    power: float = key(1.0, above=0)  # linear, wsd: the decay's share that is left, to this power
    constant_steps: int | None = key(None, at_least=0)  # cosine: last steps, at min_lr
    d_model: int | None = key(None, at_least=1)  # noam; null: the encoder's

    def __post_init__(self):
        for kind in ("warmup", "hold"):
            if None not in (getattr(self, f"{kind}_steps"), getattr(self, f"{kind}_ratio")):
                raise ValueError(f"give schedule.{kind}_steps or schedule.{kind}_ratio, not both")


@dataclasses.dataclass(frozen=True)
class RetainRecipe:
    """Keeping what the checkpoint knows; see training/objective/retain.py."""

    lang: str | None = None  # the old language's `lang` in manifests; null: all clips are old
    # The vocabulary from before it grew: a model or a tokenizer; null: model.init_from's, where
    # model.tokenizer changes it.
    tokenizer: str | None = None
    distill_ctc: float = key(0.0, at_least=0)  # weight of KL(original || model), on old clips
    distill_encoder: float = key(0.0, at_least=0)  # weight of the encoder's relative distance
    l2_to_start: float = key(0.0, at_least=0)  # gradient of this times (weight - its start)
    new_rows_steps: int = key(0, at_least=0)  # first steps, in which only new pieces' rows move
    check_clips: int = key(32, at_least=0)  # a changed vocabulary is proven on these; 0: none

    @property
    def distills(self) -> bool:
        return bool(self.distill_ctc or self.distill_encoder)


@dataclasses.dataclass(frozen=True)
class TrainerRecipe:
    max_steps: int | None = key(None, at_least=1)
    epochs: int | None = key(None, at_least=1)  # instead of max_steps
    accumulate: int = key(1, at_least=1)  # batches in one optimizer step
    clip_grad_norm: float | None = key(1.0, above=0)  # null: no clipping
    # bf16: autocast, weights in fp32; bf16_pure: all in bf16.
    precision: str = key("fp32", one_of=("fp32", "bf16", "bf16_pure"))
    activation_checkpointing: bool = False  # encoder layers are computed twice, for less memory
    compile: bool = False  # encoder layers by torch.compile
    ema_decay: float | None = key(None, share=True)  # average of the weights, saved; null: off
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int | None = key(None, at_least=1)  # CPU threads; null: torch's choice
    seed: int = key(1234, at_least=0)
    val_every_steps: int | None = key(None, at_least=1)  # null: as val_every_epochs
    val_every_epochs: float | None = key(None, above=0)  # may be a share of one; null: 1
    log_every_steps: int = key(10, at_least=1)
    log_clips: bool = False  # every line of log.jsonl names the clips of its step
    save_every_steps: int | None = key(None, at_least=1)  # null: as val_every_steps
    keep_last: int = key(2, at_least=1)  # checkpoints that stay on disk
    max_nonfinite_steps: int = key(20, at_least=1)  # skipped steps before the run gives up
    parallel: str = key("ddp", one_of=("ddp", "fsdp"))  # on many processes
    sync_batchnorm: bool = False  # BatchNorm over all processes' clips

    def __post_init__(self):
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give either trainer.max_steps or trainer.epochs")
        if self.val_every_steps is not None and self.val_every_epochs is not None:
            raise ValueError("give either trainer.val_every_steps or trainer.val_every_epochs")


@dataclasses.dataclass(frozen=True)
class DistillRecipe:
    """What `python -m training.distill` reads, and nothing else does."""

    block_steps: int = key(2000, at_least=0)  # stage 1: blocks learn their attention's output
    model_steps: int = key(1000, at_least=0)  # stage 2: the encoder learns the teacher's outputs
    model_lr: float | None = key(None, above=0)  # of stage 2; null: optim.lr
    ctc_weight: float = key(1.0, at_least=0)  # of the CTC divergence beside the encoder's error
    output: str | None = None  # run folder; null: `output` with _distilled after it


@dataclasses.dataclass(frozen=True)
class KeepRecipe:
    metric: str = "wer"  # wer | cer | train_loss | wer/SET/HEAD | cer/SET/HEAD; SET "all": all
    # Best evaluations whose models stay, in `top/`; 1: `best/` alone; null: all.
    top_k: int | None = key(1, at_least=1)
    average: bool = False  # at the end, of the top_k; becomes `best/` if it is better
    patience: int | None = key(None, at_least=1)  # evaluations without a better one before the end
    min_delta: float = key(0.0, at_least=0)  # how much better, for patience

    def __post_init__(self):
        if self.average and self.top_k == 1:
            raise ValueError("keep.average is of the keep.top_k best; set top_k to 2 or more")


@dataclasses.dataclass(frozen=True)
class GuardRecipe:
    """Against forgetting: a model is only "best" while one validation set keeps its WER."""

    set: str | None = None  # name in data.validation; null: no guard
    limit: float = key(0.01, at_least=0)  # WER may rise by this above the untouched model's
    relative: bool = False  # limit is a share of the untouched model's WER
    stop_after: int | None = key(None, at_least=1)  # evaluations beyond the limit before the end
