"""Records ten training steps of NeMo for every form of `model.optim` that a recipe takes.

    python record_optimizers.py OUT.json [KIND|FORM ...]      with the Python of a NeMo environment

Lightning's own Trainer fits the golden CTC, RNNT and TDT models (KIND: ctc, rnnt, tdt), without
dropout, dither, SpecAugment and omega, to one batch; nothing of this project is imported. What
OUT.json has of other kinds and forms stays. OUT.json: {"forms": FORMS, "rates": {form: the rates of
all steps}, KIND: {form: losses}, "spread": {KIND: {form: the largest relative distance of NeMo's
losses from its own, started from weights that differ by less than a rounding}}}.
"""

import json
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

STEPS, LOSSES = 20, 10  # of the run, and recorded
AGAIN = 2  # runs of a transducer from weights beside its own
WARM = {"warmup_steps": 4}
ADAMW = {"name": "adamw", "lr": 5e-4}
FULL = ADAMW | {"betas": [0.9, 0.98], "weight_decay": 1e-3}
FORMS = {
    "adamw alone": ADAMW,
    "adamw, eps, amsgrad": ADAMW | {"eps": 1e-3, "amsgrad": True},
    "adamw, betas, decay": FULL | {"weight_decay": 0.5},
    "adam alone": {"name": "adam", "lr": 5e-4},
    "adam, decay": {"name": "adam", "lr": 5e-4, "betas": [0.8, 0.9], "weight_decay": 0.1},
    "adam, amsgrad": {"name": "adam", "lr": 5e-4, "amsgrad": True},
    "cosine": FULL | {"sched": {"name": "CosineAnnealing"}},
    "cosine, floor": FULL | {"sched": {"name": "CosineAnnealing", **WARM, "min_lr": 1e-4}},
    "cosine, ratio": FULL | {"sched": {"name": "CosineAnnealing", "warmup_ratio": 0.3}},
    "cosine, constant": FULL
    | {"sched": {"name": "CosineAnnealing", **WARM, "constant_steps": 8, "min_lr": 1e-4}},
    "noam": FULL | {"lr": 0.01, "sched": {"name": "NoamAnnealing", "d_model": 48, **WARM}},
    "noam, floor": FULL
    | {"lr": 0.01, "sched": {"name": "NoamAnnealing", "d_model": 48, **WARM, "min_lr": 5e-4}},
    "noam, no warm-up": FULL | {"lr": 0.003, "sched": {"name": "NoamAnnealing", "d_model": 48}},
    "inverse root": FULL | {"sched": {"name": "InverseSquareRootAnnealing", **WARM}},
    "inverse root, floor": FULL | {"sched": {"name": "InverseSquareRootAnnealing", "min_lr": 3e-4}},
    "polynomial": FULL | {"sched": {"name": "PolynomialDecayAnnealing", **WARM}},
    "polynomial, power": FULL
    | {"sched": {"name": "PolynomialDecayAnnealing", **WARM, "power": 2.0, "min_lr": 1e-4}},
    "polynomial, hold": FULL
    | {"sched": {"name": "PolynomialHoldDecayAnnealing", **WARM, "hold_steps": 2, "power": 2.0}},
    "linear": FULL | {"sched": {"name": "WarmupAnnealing", **WARM, "min_lr": 1e-4}},
    "warm-up": FULL | {"sched": {"name": "WarmupPolicy", **WARM}},
    "warm-up, hold": FULL | {"sched": {"name": "WarmupHoldPolicy", **WARM, "hold_steps": 3}},
    "hold, linear": FULL
    | {"sched": {"name": "WarmupHoldAnnealLinear", **WARM, "hold_ratio": 0.1, "min_lr": 1e-4}},
    "hold, root": FULL
    | {"sched": {"name": "WarmupHoldAnnealOneMinusSquareRoot", **WARM, "hold_steps": 2}},
    "hold, no warm-up": FULL | {"sched": {"name": "WarmupHoldAnnealLinear", "hold_steps": 5}},
}
# {kind: (golden case, clips, steps)}; NeMo's TDT loss on a CPU takes seconds a step
KINDS = {
    "ctc": ("ctc_bpe", 2, STEPS),
    "rnnt": ("rnnt_bpe", 2, LOSSES),
    "tdt": ("tdt_bpe", 1, LOSSES),
}


def batch_of(tensors: dict, n_clips: int) -> tuple:
    """(audio, lengths, targets, target lengths) of a case's shortest clips."""
    rows = tensors["audio_len"].argsort()[:n_clips]
    lengths, target_lengths = tensors["audio_len"][rows], tensors["targets_len"][rows]
    audio = tensors["audio"][rows, : int(lengths.max())]
    return audio, lengths, tensors["targets"][rows, : int(target_lengths.max())], target_lengths


def without_chance(config: dict) -> dict:
    """The model's config with nothing random in training, in place."""
    for key in [key for key in config["encoder"] if key.startswith("dropout")]:
        config["encoder"][key] = 0.0
    config["preprocessor"]["dither"] = 0.0
    config["spec_augment"] |= {"freq_masks": 0, "time_masks": 0}
    if "joint" in config:
        config["decoder"]["prednet"]["dropout"] = 0.0
        if "tdt_kwargs" in config["loss"]:
            config["loss"]["tdt_kwargs"]["omega"] = 0.0
    return config


def model_of(path: Path):
    """The golden model in NeMo, with nothing random in training."""
    import torch
    from nemo.collections.asr.losses.rnnt_pytorch import TDTLossPytorch
    from nemo.collections.asr.models import ASRModel
    from omegaconf import OmegaConf, open_dict

    config = ASRModel.restore_from(str(path), return_config=True, map_location="cpu")
    config = OmegaConf.create(without_chance(OmegaConf.to_container(config, resolve=True)))
    with open_dict(config):
        config.pop("train_ds", None), config.pop("validation_ds", None)
    model = ASRModel.restore_from(str(path), override_config_path=config, map_location="cpu")
    if config.get("loss", {}).get("tdt_kwargs"):  # in the place of one that has no CPU, and omega
        options = config.loss.tdt_kwargs
        model.loss._loss = TDTLossPytorch(
            blank=model.decoder.vocab_size,
            durations=list(options.durations),
            reduction="none",
            sigma=options.sigma,
        )
    for module in model.modules():  # the joint's, which NeMo would leave out at 0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def steps(model, batch: tuple, optim: dict, count: int) -> tuple[list[float], list[float]]:
    """(losses, rates) of NeMo's first `count` steps of STEPS."""
    import lightning.pytorch as pl
    from omegaconf import OmegaConf, open_dict
    from torch.utils.data import DataLoader

    with open_dict(model.cfg):
        model.cfg.optim = OmegaConf.create(optim)
    losses, rates = [], []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            losses.append(float(outputs["loss"]))

        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        max_epochs=1,
        callbacks=[Recorder()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.set_trainer(trainer)
    trainer.fit(model, train_dataloaders=DataLoader([batch] * count, batch_size=None))
    return losses, rates


def beside(state: dict, seed: int) -> dict:
    """The weights, each moved by at most one rounding to float32."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, value in state.items():
        moved[name] = value
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator) - 0.5
            moved[name] = value * (1 + noise * 2**-23)
    return moved


def main(out: str, names: list[str]) -> None:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    torch.Tensor.cuda = lambda self, *_, **__: self  # NeMo's plain TDT loss asks for a GPU
    warnings.simplefilter("ignore")
    for name in ("nemo_logger", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    forms = {name: FORMS[name] for name in FORMS if name in names or not set(names) & set(FORMS)}
    found = json.loads(Path(out).read_text()) if Path(out).exists() else {}
    found.setdefault("forms", {}).update(forms)
    rates, spread = found.setdefault("rates", {}), found.setdefault("spread", {})
    for kind in [kind for kind in KINDS if kind in names] or KINDS:
        case, n_clips, count = KINDS[kind]
        folder = Path(__file__).parent / case
        batch = batch_of(load_file(folder / "golden.safetensors"), n_clips)
        with tempfile.TemporaryDirectory() as scratch:  # NeMo unpacks beside it
            shutil.copy(folder / "model.nemo", scratch)
            model = model_of(Path(scratch) / "model.nemo")
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for form, optim in forms.items():
            model.load_state_dict(start)
            losses, rates_of_form = steps(model, batch, optim, count)
            losses = losses[:LOSSES]
            found.setdefault(kind, {})[form] = [float(f"{loss:.7g}") for loss in losses]
            if count == STEPS:
                rates[form] = rates_of_form
            else:
                worst = 0.0
                for seed in range(AGAIN):
                    model.load_state_dict(beside(start, seed))
                    others, _ = steps(model, batch, optim, count)
                    off = [abs(b / a - 1) for a, b in zip(losses, others, strict=True)]
                    worst = max(worst, *off)
                spread.setdefault(kind, {})[form] = float(f"{worst:.2g}")
            print(kind, form, found[kind][form], spread.get(kind, {}).get(form), file=sys.stderr)
    import nemo

    found["nemo"] = nemo.__version__
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    Path(out).write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
