"""Records a golden case: what real NeMo computes with a tiny model, stage by stage.

Run it with the Python of an environment that has NeMo (any 2.x or 3.x); nothing of this project is
imported, so what it writes cannot echo our own mistakes:

    python make_golden.py OUT --list                                 names of the built-in cases
    python make_golden.py OUT --case NAME [--case NAME ...]          builds and records OUT/NAME
    python make_golden.py OUT --nemo model.nemo --audio a.wav ...    records an existing model

A case folder holds model.nemo (written by NeMo's `save_to`, and restored from there before anything
is recorded), golden.safetensors, expected.json and state_dict_keys.json, with the names and shapes
that the golden data's README gives. Everything is float32 on CPU in eval mode.

A built-in case is a `Case` below: options of the encoder, decoder, joint and preprocessor over one
tiny default. Its weights are random but non-degenerate (norms, BatchNorm statistics and every bias
moved away from their initial values); the heads are then fitted for some hundred steps to the
case's texts, so that greedy decoding emits tokens, blanks and several durations with clear margins.
"""

import argparse
import contextlib
import copy
import json
import logging
import math
import os
import platform
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from safetensors.torch import save_file

TEXTS = (
    "please turn off the lights in the kitchen.",
    "yes, of course! it is raining.",
    "seven nine two",
)
# Rare ones last: NeMo's texts of TDT character models lack the last len(durations) characters
CHARACTERS = [" ", *"abcdefghiklmnoprstuvwy", *"jqxz'"]
CORPUS = """please turn off the lights in the kitchen. yes, of course! it is raining. seven nine two
the quick brown fox jumps over the lazy dog. we should stay at home today, and read a good book.
my name is Anna and I live near the river. could you call me back at half past four? one two three
four five six seven eight nine zero. bring the signed report, the budget table, and three copies.
if the train is late, please send a message to the front desk. questions can wait until next week!
it was a bright cold day in April, and the clocks were striking thirteen. who goes there? not I.
she sells sea shells by the sea shore. peter piper picked a peck of pickled peppers. open the door."""  # noqa: E501 - a line is a sentence for the tokenizer


@dataclass
class Case:
    """Options of a built-in case over the tiny defaults of `model_config`.

    kind: ctc, rnnt, tdt, hybrid_rnnt or hybrid_tdt. tokenizer: char, or SentencePiece's bpe or
    unigram.
    seconds: length of each utterance; the texts are TEXTS, in order.
    """

    about: str
    kind: str
    tokenizer: str = "bpe"
    encoder: dict = field(default_factory=dict)
    preprocessor: dict = field(default_factory=dict)
    decoder: dict = field(default_factory=dict)
    joint: dict = field(default_factory=dict)
    durations: tuple = (0, 1, 2, 3, 4)
    loss: dict = field(default_factory=dict)
    top: dict = field(default_factory=dict)
    normalization: str = "identity"
    seconds: tuple = (2.0, 1.3, 0.7)
    seed: int = 1


CASES = {
    "stream_chunked_hybrid_rnnt": Case(
        "cache-aware streaming style: causal dw_striding x8, list of chunked_limited contexts, "
        "layer norm, causal convolution",
        "hybrid_rnnt",
        encoder={
            "causal_downsampling": True,
            "att_context_size": [[28, 6], [70, 13], [70, 0]],
            "att_context_style": "chunked_limited",
            "conv_norm_type": "layer_norm",
            "conv_context_size": "causal",
        },
        preprocessor={"normalize": "NA"},
        seconds=(2.4, 1.6, 0.7),
    ),
    "striding4_ctc_char": Case(
        "characters; striding x4, xscaling, tied position biases, group norm, kernel 31, ff x2",
        "ctc",
        tokenizer="char",
        encoder={
            "subsampling": "striding",
            "subsampling_factor": 4,
            "xscaling": True,
            "untie_biases": False,
            "conv_norm_type": "group_norm4",
            "conv_kernel_size": 31,
            "ff_expansion_factor": 2,
        },
        top={"ctc_reduction": "mean_volume"},
    ),
    "dw2_tdt_nobias": Case(
        "dw_striding x2, no biases, durations 0 1 2 4 8, sigmoid joint, no dropout (joint_net.1)",
        "tdt",
        encoder={"subsampling_factor": 2, "use_bias": False, "conv_context_size": [6, 2]},
        joint={"activation": "sigmoid", "dropout": 0.0},
        durations=(0, 1, 2, 4, 8),
        loss={"sigma": 0.05, "omega": 0.0},
        seconds=(1.4, 1.1, 0.6),
    ),
    "striding8_rnnt_char": Case(
        "characters; causal striding x8, limited context [8,4], 2-layer LSTM, tanh joint",
        "rnnt",
        tokenizer="char",
        encoder={
            "subsampling": "striding",
            "causal_downsampling": True,
            "att_context_size": [8, 4],
            "conv_context_size": [8, 0],
            "xscaling": True,
        },
        decoder={"pred_rnn_layers": 2},
        joint={"activation": "tanh"},
        top={"rnnt_reduction": "mean_volume"},
        seconds=(2.6, 1.3, 0.7),
    ),
    "local_g2_separate_tdt": Case(
        "rel_pos_local_attn [6,6], two global tokens with projections of their own; tied biases "
        "asked for (NeMo unties them here)",
        "tdt",
        encoder={
            "subsampling_factor": 4,
            "self_attention_model": "rel_pos_local_attn",
            "att_context_size": [6, 6],
            "global_tokens": 2,
            "global_attn_separate": True,
            "untie_biases": False,
            "xscaling": True,
        },
        decoder={"pred_rnn_layers": 2},
    ),
    "hybrid_char_chunked_16_3": Case(
        "characters; causal dw_striding x4 and convolution, chunked_limited [16,3], no biases",
        "hybrid_rnnt",
        tokenizer="char",
        encoder={
            "subsampling_factor": 4,
            "causal_downsampling": True,
            "att_context_size": [16, 3],
            "att_context_style": "chunked_limited",
            "conv_context_size": "causal",
            "use_bias": False,
        },
        seconds=(1.7, 1.2, 0.7),
    ),
    "ctc_8khz_featout": Case(
        "8 kHz, 64 mels, lower-casing unigram pieces, feat_out 24 of d_model 32, instance norm",
        "ctc",
        tokenizer="unigram",
        normalization="nmt_nfkc_cf",
        encoder={"feat_out": 24, "conv_norm_type": "instance_norm", "d_model": 32},
        preprocessor={"sample_rate": 8000, "n_fft": 256, "features": 64},
        seconds=(2.4, 1.6, 0.7),
    ),
    "hybrid_tdt_nobias_featout": Case(
        "hybrid TDT-CTC, no biases, feat_out 40 of d_model 32, tied position biases, pad_to 16",
        "hybrid_tdt",
        encoder={"use_bias": False, "feat_out": 40, "untie_biases": False, "xscaling": True},
        preprocessor={"pad_to": 16, "features": 128},
        loss={"omega": 0.0},
        seconds=(2.4, 1.6, 0.7),
    ),
    "hybrid_tdt_char": Case(
        "characters; striding x4, context [-1,3], layer norm, all_features, no pre-emphasis",
        "hybrid_tdt",
        tokenizer="char",
        encoder={
            "subsampling": "striding",
            "subsampling_factor": 4,
            "att_context_size": [-1, 3],
            "conv_norm_type": "layer_norm",
        },
        preprocessor={"dither": 0.0, "preemph": None, "normalize": "all_features"},
        seconds=(1.6, 1.2, 0.7),
    ),
    "rnnt_no_blank_pad": Case(
        "blank_as_pad false, list of contexts [[10,5],[5,2]], log_zero_guard clamp, window 20 ms",
        "rnnt",
        encoder={"att_context_size": [[10, 5], [5, 2]], "stochastic_depth_drop_prob": 0.1},
        decoder={"blank_as_pad": False},
        preprocessor={
            "window_size": 0.02,
            "log_zero_guard_type": "clamp",
            "log_zero_guard_value": 1e-5,
        },
        joint={"fuse_loss_wer": False},
    ),
    "dw4_regular_zero_right": Case(
        "dw_striding x4 causal, context [20,0], convolution [8,0], tied biases, unigram pieces",
        "hybrid_rnnt",
        tokenizer="unigram",
        encoder={
            "subsampling_factor": 4,
            "causal_downsampling": True,
            "att_context_size": [20, 0],
            "conv_context_size": [8, 0],
            "untie_biases": False,
        },
        seconds=(1.7, 1.2, 0.7),
    ),
    "chunked_unlimited_left": Case(
        "chunked_limited [-1,3] with striding x2, group norm, xscaling, characters",
        "ctc",
        tokenizer="char",
        encoder={
            "subsampling": "striding",
            "subsampling_factor": 2,
            "att_context_size": [-1, 3],
            "att_context_style": "chunked_limited",
            "conv_norm_type": "group_norm8",
            "xscaling": True,
        },
        seconds=(1.4, 1.1, 0.6),
    ),
    "local_g1_spacing2": Case(
        "rel_pos_local_attn with sides [7,3], one global token, spacing 2, layer norm, no biases",
        "hybrid_tdt",
        encoder={
            "self_attention_model": "rel_pos_local_attn",
            "att_context_size": [7, 3],
            "global_tokens": 1,
            "global_tokens_spacing": 2,
            "conv_norm_type": "layer_norm",
            "use_bias": False,
        },
        seconds=(2.6, 1.6, 0.7),
    ),
    "local_asymmetric": Case(
        "rel_pos_local_attn with different sides [7,3], no global token, striding x4, xscaling",
        "ctc",
        encoder={
            "subsampling": "striding",
            "subsampling_factor": 4,
            "self_attention_model": "rel_pos_local_attn",
            "att_context_size": [7, 3],
            "xscaling": True,
        },
    ),
    "heads8_dim40": Case(
        "head width 5, ff x3, kernel 5, conv channels as d_model, frame splicing 2, hamming window",
        "tdt",
        encoder={
            "d_model": 40,
            "n_heads": 8,
            "ff_expansion_factor": 3,
            "conv_kernel_size": 5,
            "subsampling_conv_channels": -1,
            "n_layers": 3,
            "feat_in": 80,
        },
        preprocessor={
            "features": 40,
            "frame_splicing": 2,
            "window": "hamming",
            "n_fft": 1024,
            "mag_power": 1.0,
        },
        decoder={"pred_hidden": 24},
        joint={"joint_hidden": 36, "activation": "tanh"},
        seconds=(2.6, 1.8, 0.7),
    ),
    "reduction_striding": Case(
        "striding reduction by 2 after the first layer (few checkpoints use it)",
        "ctc",
        encoder={
            "subsampling": "striding",
            "subsampling_factor": 4,
            "reduction": "striding",
            "reduction_position": 0,
            "reduction_factor": 2,
        },
    ),
}


def speak(text: str, seconds: float, sample_rate_hz: int, seed: int) -> np.ndarray:
    """Speech-like sound, (L,): each character is a buzz with formants of its own, or noise.

    Deterministic, needs no voice, and distinct enough that a tiny head learns to spell it. Samples
    are exact multiples of 1/32768.
    """
    rng = np.random.default_rng(seed)
    n = int(seconds * sample_rate_hz)
    t = np.arange(n) / sample_rate_hz
    pitch = 110 + 15 * np.sin(2 * np.pi * 1.3 * t + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate_hz
    position = np.minimum((np.arange(n) * len(text)) // n, len(text) - 1)
    codes = np.frombuffer(text.lower().encode("ascii"), np.uint8).astype(int)[position]
    low, high = 250 + (codes * 37 % 11) * 55, 900 + (codes * 53 % 13) * 190
    buzz = np.zeros(n)
    for k in range(1, 40):
        f = k * pitch
        gain = np.exp(-(((f - low) / 120) ** 2)) + 0.6 * np.exp(-(((f - high) / 200) ** 2))
        buzz += np.where(f < sample_rate_hz / 2.2, gain * np.sin(k * phase), 0)
    noise = rng.standard_normal(n)
    voiced = np.isin(codes, [ord(c) for c in "aeiouymnlrwvbdgjz"])
    sound = np.where(voiced, buzz, 0.3 * buzz + 0.4 * noise) * np.where(codes == 32, 0.05, 1.0)
    sound = 0.12 * sound + 0.002 * noise
    return (np.round(np.clip(sound, -1, 1) * 32767) / 32768).astype(np.float32)


def train_tokenizer(folder: Path, model_type: str, normalization: str):
    """A 96-piece (unigram: 80) SentencePiece tokenizer with NeMo's three files."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text(CORPUS)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=96 if model_type == "bpe" else 80,
        model_type=model_type,
        normalization_rule_name=normalization,
        bos_id=-1,
        eos_id=-1,
        character_coverage=1.0,
        minloglevel=2,
    )
    corpus.unlink()
    pieces = [line.split("\t")[0] for line in (folder / "tokenizer.vocab").read_text().splitlines()]
    words = [p[1:] if p.startswith("▁") else f"##{p}" for p in pieces[1:]]
    (folder / "vocab.txt").write_text("\n".join(w for w in words if w) + "\n")


def model_config(case: Case, tokenizer_folder: Path) -> dict:
    """NeMo's model config of a tiny model."""
    asr = "nemo.collections.asr.modules."
    preprocessor = {
        "_target_": asr + "AudioToMelSpectrogramPreprocessor",
        "sample_rate": 16000,
        "normalize": "per_feature",
        "window_size": 0.025,
        "window_stride": 0.01,
        "window": "hann",
        "features": 80,
        "n_fft": 512,
        "log": True,
        "frame_splicing": 1,
        "dither": 1e-5,
        "pad_to": 0,
        "pad_value": 0.0,
    }
    preprocessor |= case.preprocessor
    encoder = {
        "_target_": asr + "ConformerEncoder",
        "feat_in": preprocessor["features"],
        "feat_out": -1,
        "n_layers": 2,
        "d_model": 32,
        "use_bias": True,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "subsampling_conv_channels": 16,
        "causal_downsampling": False,
        "reduction": None,
        "reduction_position": None,
        "reduction_factor": 1,
        "ff_expansion_factor": 4,
        "self_attention_model": "rel_pos",
        "n_heads": 4,
        "att_context_size": [-1, -1],
        "att_context_style": "regular",
        "xscaling": False,
        "untie_biases": True,
        "pos_emb_max_len": 5000,
        "conv_kernel_size": 9,
        "conv_norm_type": "batch_norm",
        "conv_context_size": None,
        "dropout": 0.1,
        "dropout_pre_encoder": 0.1,
        "dropout_emb": 0.0,
        "dropout_att": 0.1,
    }
    encoder |= case.encoder
    d_encoder = encoder["feat_out"] if encoder["feat_out"] > 0 else encoder["d_model"]
    characters = case.tokenizer == "char"
    vocabulary = CHARACTERS if characters else []
    ctc_head = {
        "_target_": asr + "ConvASRDecoder",
        "feat_in": d_encoder,
        "num_classes": len(vocabulary) or -1,
        "vocabulary": list(vocabulary),
    }
    config = {
        "sample_rate": preprocessor["sample_rate"],
        "log_prediction": False,
        "skip_nan_grad": False,
        "train_ds": None,
        "validation_ds": None,
        "test_ds": None,
        "preprocessor": preprocessor,
        "spec_augment": {
            "_target_": asr + "SpectrogramAugmentation",
            "freq_masks": 2,
            "time_masks": 10,
            "freq_width": 27,
            "time_width": 0.05,
        },
        "encoder": encoder,
        "optim": {"name": "adamw", "lr": 1e-3},
    }
    if characters:
        config["labels"] = list(vocabulary)
    else:
        config["tokenizer"] = {"dir": str(tokenizer_folder), "type": "bpe"}
    config |= case.top
    if case.kind == "ctc":
        return config | {"decoder": ctc_head, "decoding": {"strategy": "greedy_batch"}}

    net = {"pred_hidden": 28, "pred_rnn_layers": 1, "t_max": None, "dropout": 0.2}
    options = {"normalization_mode": None, "random_state_sampling": False, "blank_as_pad": True}
    for key, value in case.decoder.items():
        (options if key in options else net)[key] = value
    joint = {
        "log_softmax": None,
        "preserve_memory": False,
        "fuse_loss_wer": True,
        "fused_batch_size": 2,
    }
    joint_net = {"joint_hidden": 32, "activation": "relu", "dropout": 0.2}
    for key, value in case.joint.items():
        (joint if key in joint else joint_net)[key] = value
    tdt = case.kind.endswith("tdt")
    loss = {"fastemit_lambda": 0.0, "clamp": -1.0} | case.loss
    if tdt:
        joint["num_extra_outputs"] = len(case.durations)
        loss = {"durations": list(case.durations), "sigma": 0.02, "omega": 0.1} | loss
    config |= {
        "compute_eval_loss": False,
        "model_defaults": {
            "enc_hidden": d_encoder,
            "pred_hidden": net["pred_hidden"],
            "joint_hidden": joint_net["joint_hidden"],
        },
        "decoder": dict(_target_=asr + "RNNTDecoder", **options, prednet=net),
        "joint": dict(_target_=asr + "RNNTJoint", **joint, jointnet=joint_net),
        "decoding": {"strategy": "greedy_batch", "greedy": {"max_symbols": 10}},
        "loss": {"loss_name": "tdt", "tdt_kwargs": loss}
        if tdt
        else {"loss_name": "default", "warprnnt_numba_kwargs": loss},
    }
    if tdt:
        config["model_defaults"] |= {
            "tdt_durations": list(case.durations),
            "num_tdt_durations": len(case.durations),
        }
        config["decoding"] |= {"model_type": "tdt", "durations": list(case.durations)}
    if case.kind.startswith("hybrid"):
        config["aux_ctc"] = {
            "ctc_loss_weight": 0.3,
            "use_cer": False,
            "ctc_reduction": "mean_batch",
            "decoder": ctc_head,
            "decoding": {"strategy": "greedy_batch"},
        }
    return config


def build(case: Case, tokenizer_folder: Path):
    """The case's NeMo model with non-degenerate random weights, in eval mode."""
    from nemo.collections.asr import models
    from omegaconf import OmegaConf

    torch.manual_seed(case.seed)
    if case.tokenizer != "char":
        train_tokenizer(tokenizer_folder, case.tokenizer, case.normalization)
    bpe = case.tokenizer != "char"
    cls = {
        "ctc": models.EncDecCTCModelBPE if bpe else models.EncDecCTCModel,
        "rnnt": models.EncDecRNNTBPEModel if bpe else models.EncDecRNNTModel,
        "hybrid": models.EncDecHybridRNNTCTCBPEModel if bpe else models.EncDecHybridRNNTCTCModel,
    }[{"tdt": "rnnt"}.get(case.kind, case.kind.split("_")[0])]
    model = cls(cfg=OmegaConf.create(model_config(case, tokenizer_folder)))
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, tensor in model.encoder.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_mean"):
                tensor.copy_(0.1 * noise)
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif "pos_bias" in name:
                tensor.copy_(0.3 * noise)
            elif name.endswith("bias"):
                tensor.add_(0.1 * noise)
    return model.eval()


def fit_heads(model, encoded, encoded_len, targets, durations, steps=400):
    """Fits the heads to `targets` on fixed encoder output, so that decoding emits something.

    The transducer learns one path (tokens spread evenly over the frames) by cross entropy, which
    needs no transducer loss; its frames alternate so that several durations occur.
    """
    torch.manual_seed(7)
    ctc_head = ctc_of(model)
    heads = [h for h in (ctc_head, getattr(model, "joint", None)) if h is not None]
    if hasattr(model, "joint"):
        heads.append(model.decoder)
    parameters = [p for head in heads for p in head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    blank = blank_of(model)
    target_len = torch.tensor([len(t) for t in targets])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], batch_first=True)
    for _ in range(steps):
        loss = torch.zeros(())
        if ctc_head is not None:
            log_probs = ctc_head(encoder_output=encoded)
            loss = loss + torch.nn.functional.ctc_loss(
                log_probs.transpose(0, 1),
                padded,
                encoded_len,
                target_len,
                blank,
                zero_infinity=True,
            )
        if hasattr(model, "joint"):
            logits = joint_logits(model, encoded, padded, target_len)[1]
            for b, tokens in enumerate(targets):
                loss = loss + path_loss(logits[b], tokens, int(encoded_len[b]), blank, durations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def path_loss(logits, tokens, n_frames, blank, durations):
    """Mean cross entropy of one alignment path; logits (T', U+1, V+1+D)."""
    # Pairs share a frame and gaps follow, so that durations 0 and >1 and runs of blanks all occur
    frames = [
        min(n_frames - 1, (i - i % 2) * n_frames // max(1, len(tokens))) for i in range(len(tokens))
    ]
    rows, columns, labels, steps = [], [], [], []
    t = u = 0
    while t < n_frames:
        rows.append(t)
        columns.append(u)
        emits = u < len(tokens) and frames[u] <= t
        labels.append(tokens[u] if emits else blank)
        target = (frames[u + emits] if u + emits < len(tokens) else n_frames) - t
        if durations:
            allowed = [i for i, d in enumerate(durations) if d <= target and (emits or d > 0)]
            steps.append(max(allowed, key=lambda i: durations[i]))
            t += durations[steps[-1]]
        elif not emits:
            t += 1
        u += emits
    path = logits[rows, columns]
    loss = torch.nn.functional.cross_entropy(path[:, : blank + 1], torch.tensor(labels))
    if durations:
        loss = loss + torch.nn.functional.cross_entropy(path[:, blank + 1 :], torch.tensor(steps))
    return loss


def ctc_of(model):
    """The CTC head, or None."""
    return getattr(model, "ctc_decoder", None if hasattr(model, "joint") else model.decoder)


def blank_of(model) -> int:
    """Number of tokens, which is the blank's id."""
    head = ctc_of(model)
    return len(model.joint.vocabulary) if head is None else head.num_classes_with_blank - 1


def durations_of(model) -> list[int]:
    if not hasattr(model, "joint") or not model.joint.num_extra_outputs:
        return []
    return list(model.cfg.decoding.durations)


def joint_logits(model, encoded, targets, target_len):
    """(prediction output (B, U+1, H), raw logits (B, T', U+1, V+1+D)); encoded (B, D, T')."""
    output = model.decoder(targets=targets, target_length=target_len)[0]  # (B, H, U+1)
    before, model.joint.log_softmax = (
        model.joint.log_softmax,
        False,
    )  # NeMo normalises on CPU otherwise
    try:
        logits = model.joint.joint(encoded.transpose(1, 2), output.transpose(1, 2))
    finally:
        model.joint.log_softmax = before
    return output.transpose(1, 2), logits


@contextlib.contextmanager
def float64_on_cpu():
    """NeMo's PyTorch TDT loss allocates its lattice in the default dtype and calls `.cuda()`."""
    cuda, dtype = torch.Tensor.cuda, torch.get_default_dtype()
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda
        torch.set_default_dtype(dtype)


def transducer_losses(logits, targets, encoded_len, target_len, blank, durations, sigma):
    """{name: (B,)} in float64: the model's loss and, for TDT, plain RNNT on the token logits."""
    from nemo.collections.asr.losses.rnnt_pytorch import RNNTLossPytorch, TDTLossPytorch

    arguments = {"labels": targets, "act_lens": encoded_len, "label_lens": target_len}
    rnnt = RNNTLossPytorch(blank=blank, reduction="none")
    with float64_on_cpu():
        tokens = logits[..., : blank + 1].double()
        plain = rnnt.forward(acts=tokens, **arguments)
        if not durations:
            return {"rnnt_loss": plain}
        tdt = TDTLossPytorch(blank=blank, durations=durations, reduction="none", sigma=sigma)
        return {
            "tdt_loss": tdt.forward(acts=logits.double(), **arguments),
            "rnnt_branch_loss": plain,
        }


def reductions(losses, target_len) -> dict:
    losses, target_len = losses.double(), target_len.double()
    return {
        "mean_batch": float(losses.mean()),
        "mean": float((losses / target_len).mean()),
        "mean_volume": float(losses.sum() / target_len.sum()),
        "sum": float(losses.sum()),
    }


def loss_options(model) -> dict:
    from omegaconf import OmegaConf

    loss = OmegaConf.to_container(model.cfg.get("loss") or OmegaConf.create({}))
    name = loss.get("loss_name", "default")
    return loss.get(f"{name}_kwargs") or loss.get("warprnnt_numba_kwargs") or {}


def hypothesis(hyp) -> dict:
    entry = {
        "text": hyp.text,
        "ids": [int(i) for i in hyp.y_sequence],
        "timestamp": [int(t) for t in stamps(hyp)],
        "score": float(hyp.score),
    }
    durations = getattr(hyp, "token_duration", None)
    if durations is not None:
        entry["durations"] = [int(d) for d in durations]
    return entry


def stamps(hyp):
    """Frames of the tokens: a list, or under timestamps a dictionary that holds them."""
    value = hyp.timestamp if hasattr(hyp, "timestamp") else hyp.timestep
    return value.get("timestep", []) if isinstance(value, dict) else value


def plain(value):
    """JSON's own types from tensors, numpy numbers and containers."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def timed(hyp) -> dict:
    offsets = dict(hyp.timestamp if hasattr(hyp, "timestamp") else hyp.timestep)
    entry = {"text": hyp.text} | {
        k: offsets.get(k) for k in ("char", "word", "segment", "timestep")
    }
    durations = getattr(hyp, "token_duration", None)
    if durations is not None and len(durations):
        entry["durations"] = durations
    return plain(entry)


def attempt(function):
    """The function's value, or a record that NeMo itself fails."""
    try:
        return function()
    except Exception as error:  # whatever NeMo raises is part of the record
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def set_decoding(model, head: str, **overrides):
    """Rebuilds NeMo's decoding with dotted `overrides` of the archive's; head rnnt or ctc."""
    from omegaconf import OmegaConf, open_dict

    hybrid = hasattr(model, "ctc_decoder")
    config = copy.deepcopy(model.original_decoding[head])
    with open_dict(config):
        for key, value in overrides.items():
            OmegaConf.update(config, key, value, force_add=True)
    level = logging.getLogger("nemo_logger").level
    if hybrid:
        model.change_decoding_strategy(config, decoder_type=head, verbose=False)
    else:
        model.change_decoding_strategy(config, verbose=False)
    logging.getLogger("nemo_logger").setLevel(level)
    model.eval()


def decode(model, head, encoded, encoded_len):
    """NeMo's hypotheses from encoder output (B, D, T')."""
    if head == "rnnt":
        result = model.decoding.rnnt_decoder_predictions_tensor(
            encoder_output=encoded, encoded_lengths=encoded_len, return_hypotheses=True
        )
    else:
        decoding = model.ctc_decoding if hasattr(model, "ctc_decoding") else model.decoding
        result = decoding.ctc_decoder_predictions_tensor(
            ctc_of(model)(encoder_output=encoded),
            decoder_lengths=encoded_len,
            return_hypotheses=True,
        )
    if isinstance(result, tuple):  # NeMo before 2.3 also gives all hypotheses
        result = result[0]
    return [h[0] if isinstance(h, list) else h for h in result]


@torch.no_grad()
def greedy_reference(model, encoded, length):
    """One utterance, (D, T'): ids, frames, durations and the smallest top-two gap of the path.

    Ours, written for this record: it stands beside NeMo's decoders (`independent_greedy_agrees`).
    """
    blank, durations = blank_of(model), durations_of(model)
    max_symbols = model.original_decoding["rnnt"].greedy.get("max_symbols") or 10
    ids, frames, steps, margin, t, here = [], [], [], math.inf, 0, 0
    while t < length:
        targets = torch.tensor([ids], dtype=torch.long).reshape(1, len(ids))
        logits = joint_logits(
            model, encoded[None, :, t : t + 1], targets, torch.tensor([len(ids)])
        )[1]
        logits = logits[0, 0, -1]
        parts = [logits[: blank + 1]] + ([logits[blank + 1 :]] if durations else [])
        for part in parts:
            top = part.topk(2).values
            margin = min(margin, float(top[0] - top[1]))
        token = int(parts[0].argmax())
        step = durations[int(parts[1].argmax())] if durations else int(token == blank)
        if token == blank:
            t, here = t + max(step, 1), 0
            continue
        ids.append(token)
        frames.append(t)
        steps.append(step)
        here = here + 1 if step == 0 else 0
        t += step
        if here >= max_symbols:
            t, here = t + 1, 0
    return ids, frames, steps, margin


def record_transducer(model, case_out, tensors, encoded, encoded_len, targets, target_len):
    blank, durations, options = blank_of(model), durations_of(model), loss_options(model)
    leaf = encoded.clone().requires_grad_()
    pred_out, logits = joint_logits(model, leaf, targets, target_len)
    losses = transducer_losses(
        logits, targets, encoded_len, target_len, blank, durations, options.get("sigma", 0.0)
    )
    main = losses["tdt_loss" if durations else "rnnt_loss"]
    model.zero_grad()
    main.mean().backward()
    output = model.joint.joint_net[-1]
    embedding = model.decoder.prediction["embed"].weight.grad
    tensors |= {name: loss.detach() for name, loss in losses.items()} | {
        "pred_out": pred_out.detach(),
        "joint_logits": logits.detach(),
        "grad_encoded": leaf.grad.transpose(1, 2),
        "grad_joint_out": output.weight.grad,
        "grad_joint_out_bias": output.bias.grad,
        "grad_embed": embedding,
    }
    model.zero_grad()

    decoding = {}
    strategies = {
        "greedy": {"strategy": "greedy"},
        "greedy_batch": {"strategy": "greedy_batch"},
        "greedy_batch_max_symbols_2": {"strategy": "greedy_batch", "greedy.max_symbols": 2},
    }
    if durations:
        strategies["greedy_batch_bs1_with_durations"] = {
            "strategy": "greedy_batch",
            "tdt_include_token_duration": True,
            "batch_size": 1,
        }
    for name, overrides in strategies.items():
        strategy = overrides.pop("strategy")
        one_by_one = overrides.get("batch_size") == 1
        changes = {k: v for k, v in overrides.items() if k != "batch_size"}

        def run(strategy=strategy, changes=changes, one_by_one=one_by_one):
            set_decoding(model, "rnnt", strategy=strategy, **changes)
            n = len(encoded_len)
            batches = [slice(i, i + 1) for i in range(n)] if one_by_one else [slice(0, n)]
            hyps = [h for b in batches for h in decode(model, "rnnt", encoded[b], encoded_len[b])]
            return {"hyps": [hypothesis(h) for h in hyps]}

        decoding[name] = {"strategy": strategy, "overrides": overrides} | attempt(run)
    pairs = zip(encoded, encoded_len.tolist(), strict=True)
    references = [greedy_reference(model, clip, length) for clip, length in pairs]
    hyps = decoding["greedy_batch"].get("hyps")
    case_out["transducer"] = {
        "blank_id": blank,
        "num_durations": len(durations),
        "durations": durations,
        "loss_kwargs": options,
        "joint_output_order": "[V tokens, blank, durations]",
        "loss_impl": ("TDT" if durations else "RNNT")
        + "LossPytorch (float64, on the float32 logits); omega and FastEmit NOT applied",
        "loss_reductions": reductions(main.detach(), target_len),
        "grad_of": "mean_batch of the per-utterance loss above (FastEmit 0, clamp off)",
        "decoding": decoding,
        "max_symbols": model.original_decoding["rnnt"].greedy.get("max_symbols"),
        "argmax_min_margin": min(r[3] for r in references),
        "independent_greedy_agrees": hyps
        and [
            hyp["ids"] == ids and hyp["timestamp"] == frames
            for hyp, (ids, frames, *_) in zip(hyps, references, strict=True)
        ],
        "greedy_durations": [r[2] for r in references] if durations else None,
    }


def record_ctc(model, case_out, tensors, encoded, encoded_len, targets, target_len):
    blank = blank_of(model)
    log_probs = ctc_of(model)(encoder_output=encoded)
    losses = torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        targets,
        encoded_len,
        target_len,
        blank,
        reduction="none",
        zero_infinity=True,
    )
    tensors |= {"ctc_log_probs": log_probs.detach(), "ctc_loss": losses.detach()}
    decoding = {}
    for strategy in ("greedy", "greedy_batch"):

        def run(strategy=strategy):
            set_decoding(model, "ctc", strategy=strategy)
            return {"hyps": [hypothesis(h) for h in decode(model, "ctc", encoded, encoded_len)]}

        decoding[strategy] = {"config": {}} | attempt(run)
    for entry in decoding.values():  # timestamps are tokens' frames; ids are collapsed as `text` is
        for b, hyp in enumerate(entry.get("hyps", [])):
            best = log_probs[b, : int(encoded_len[b])].argmax(-1).tolist()
            starts = [t for t, i in enumerate(best) if i != blank and (t == 0 or best[t - 1] != i)]
            hyp["ids"], hyp["timestamp"] = [best[t] for t in starts], starts
    valid = torch.cat([p[: int(n)] for p, n in zip(log_probs, encoded_len, strict=True)]).detach()
    top = valid.topk(2).values
    case_out["ctc"] = {
        "blank_id": blank,
        "loss_reductions": reductions(losses.detach(), target_len),
        "argmax_min_margin": float((top[:, 0] - top[:, 1]).min()),
        "decoding": decoding,
    }


def record_transcripts(model, expected, clips, encoded, encoded_len, heads):
    """Texts and times from `transcribe` and from the stored encoder output."""
    names = ("timestamps_from_encoded_bs1", "transcribe_timestamps_bs1")
    names += ("transcribe_timestamps_batched", "transcribe_plain_batched")
    for name in names:
        expected[name] = {}
    for head in heads:

        def from_encoded(b, head=head):
            n = encoded_len[b : b + 1]
            return timed(decode(model, head, encoded[b : b + 1, :, : int(n)], n)[0])

        durations = (
            {"tdt_include_token_duration": True} if head == "rnnt" and durations_of(model) else {}
        )
        set_decoding(model, head, compute_timestamps=True, **durations)
        expected[names[0]][head] = [attempt(lambda b=b: from_encoded(b)) for b in range(len(clips))]

        def transcribe(head=head, batch=None, **kwargs):
            set_decoding(model, head)
            chosen = clips if batch is None else clips[batch : batch + 1]
            hyps = model.transcribe(
                [c.copy() for c in chosen],
                batch_size=len(chosen),
                verbose=False,
                return_hypotheses=True,
                **kwargs,
            )
            model.eval()  # NeMo leaves its modules in train mode
            hyps = hyps[0] if isinstance(hyps, tuple) else hyps
            return [h[0] if isinstance(h, list) else h for h in hyps]

        expected[names[1]][head] = [
            attempt(lambda b=b: timed(transcribe(batch=b, timestamps=True)[0]))
            for b in range(len(clips))
        ]
        expected[names[2]][head] = attempt(lambda: [timed(h) for h in transcribe(timestamps=True)])
        expected[names[3]][head] = attempt(lambda: [h.text for h in transcribe()])
        set_decoding(model, head)


def record(
    model, out: Path, clips: list[np.ndarray], texts: list[str] | None, about: str, seed: int
):
    """Writes golden.safetensors, expected.json and state_dict_keys.json of `model` into `out`."""
    import nemo
    from omegaconf import OmegaConf

    torch.manual_seed(seed)
    random.seed(seed)
    model.eval()
    transducer, ctc = hasattr(model, "joint"), ctc_of(model) is not None
    model.original_decoding = {"rnnt": copy.deepcopy(model.cfg.decoding)} if transducer else {}
    if ctc:
        section = model.cfg.aux_ctc if transducer else model.cfg
        model.original_decoding["ctc"] = copy.deepcopy(section.decoding)

    audio_len = torch.tensor([len(c) for c in clips])
    audio = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in clips], batch_first=True)
    seen = {}
    hooks = [
        model.encoder.pre_encode.register_forward_hook(
            lambda m, a, o: seen.update(subsampled=o[0])
        ),
        model.encoder.layers[0].register_forward_hook(lambda m, a, o: seen.update(layer0_out=o)),
    ]
    with torch.no_grad():
        features, features_len = model.preprocessor(input_signal=audio, length=audio_len)
        encoded, encoded_len = model.encoder(audio_signal=features, length=features_len)
    for hook in hooks:
        hook.remove()

    blank = blank_of(model)
    generator = torch.Generator().manual_seed(seed)
    n_tokens = [max(1, min(6 - b % 3, int(n) // 2)) for b, n in enumerate(encoded_len)]
    if texts:
        rows = [tokenize(model, t)[:n] for t, n in zip(texts, n_tokens, strict=True)]
    else:
        rows = [torch.randint(blank, (n,), generator=generator).tolist() for n in n_tokens]
    target_len = torch.tensor([len(r) for r in rows])
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)

    tensors = {
        "audio": audio,
        "audio_len": audio_len,
        "features": features,
        "features_len": features_len,
        **seen,
        "encoded": encoded.transpose(1, 2),
        "encoded_len": encoded_len,
        "targets": targets,
        "targets_len": target_len,
    }
    expected = {
        "case": out.name,
        "description": about,
        "versions": {
            "nemo_toolkit": nemo.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "texts": texts,
        "generator_seed": seed,
        "vocab_size": blank,
        "lengths": {
            "audio": audio_len.tolist(),
            "features": features_len.tolist(),
            "encoded": encoded_len.tolist(),
        },
    }
    arguments = (model, expected, tensors, encoded, encoded_len, targets, target_len)
    if ctc:
        record_ctc(*arguments)
    if transducer:
        record_transducer(*arguments)
    window_stride = OmegaConf.to_container(model.cfg.preprocessor)["window_stride"]
    expected["seconds_per_frame"] = model.encoder.subsampling_factor * window_stride
    record_noise(model, expected, tensors, features, features_len, targets, target_len)
    heads = (["rnnt"] if transducer else []) + (["ctc"] if ctc else [])
    record_transcripts(model, expected, clips, encoded, encoded_len, heads)

    tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
    save_file(tensors, out / "golden.safetensors")
    (out / "golden.safetensors").chmod(0o644)
    (out / "expected.json").write_text(
        json.dumps(plain(expected), indent=1, ensure_ascii=False) + "\n"
    )
    keys = {k: list(v.shape) for k, v in model.state_dict().items()}
    (out / "state_dict_keys.json").write_text(json.dumps(keys, indent=1) + "\n")
    return expected


def record_noise(model, expected, tensors, features, features_len, targets, target_len):
    """The same model in float64 gives the noise floor; tolerances are about ten times it."""
    alone = []
    with torch.no_grad():
        for b, n in enumerate(features_len):
            one, m = model.encoder(
                audio_signal=features[b : b + 1, :, : int(n)], length=features_len[b : b + 1]
            )
            gap = one[0, :, : int(m)].T - tensors["encoded"][b, : int(m)]
            alone.append(float(gap.abs().max()))
    model.double()  # float32 -> float64 -> float32 changes no weight
    with torch.no_grad():
        encoded, encoded_len = model.encoder(audio_signal=features.double(), length=features_len)
        stored = {"encoded": encoded.transpose(1, 2)}
        inputs = tensors["encoded"].transpose(1, 2).double()
        if "ctc_log_probs" in tensors:
            stored["ctc_log_probs"] = ctc_of(model)(encoder_output=inputs)
        if "joint_logits" in tensors:
            stored["joint_logits"] = joint_logits(model, inputs, targets, target_len)[1]
    model.float()
    # Large where NeMo itself mixes the batch's padding in: group and instance norm, global tokens
    floor = {"unbatched_vs_batched_encoded_maxabs": max(alone)}
    for name, value in stored.items():
        gaps = [
            float((value[b, : int(n)] - tensors[name][b, : int(n)]).abs().max())
            for b, n in enumerate(encoded_len)
        ]
        floor[f"{name}_maxabs"] = max(gaps)
    expected["noise_floor_f32_vs_f64"] = floor
    least = {"encoded": 1e-4, "ctc_log_probs": 2e-4, "joint_logits": 3e-4}
    expected["suggested_tolerance"] = (
        {"features": 3e-4}
        | {name: max(least[name], 10 * floor[f"{name}_maxabs"]) for name in stored}
        | {"loss_relative": 1e-4, "grad_relative_to_max": 1e-3}
        | {"note": "absolute, on frames < length only, float32 CPU; decoding must match exactly"}
    )


def tokenize(model, text: str) -> list[int]:
    if hasattr(model, "tokenizer"):
        return model.tokenizer.text_to_ids(text)
    labels = list((ctc_of(model) or model.joint).vocabulary)
    return [labels.index(c) for c in text if c in labels]


def make_case(name: str, out: Path):
    """Builds, saves, restores and records the built-in case `name` in out/name."""
    case = CASES[name]
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(TEXTS)
    if case.tokenizer == "char":
        texts = ["".join(c for c in t if c in CHARACTERS) for t in texts]
    rate = case.preprocessor.get("sample_rate", 16000)
    spoken = enumerate(zip(texts, case.seconds, strict=True), start=case.seed)
    clips = [speak(text, seconds, rate, seed) for seed, (text, seconds) in spoken]
    with tempfile.TemporaryDirectory() as scratch:
        model = build(case, Path(scratch))
        audio_len = torch.tensor([len(c) for c in clips])
        audio = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(c) for c in clips], batch_first=True
        )
        with torch.no_grad():
            features, features_len = model.preprocessor(input_signal=audio, length=audio_len)
            encoded, encoded_len = model.encoder(audio_signal=features, length=features_len)
        # A short clip has fewer frames than its text has tokens: fit what fits
        room = [max(2, int(n * 0.8)) for n in encoded_len.tolist()]
        targets = [tokenize(model, text)[:n] for text, n in zip(texts, room, strict=True)]
        fit_heads(model, encoded, encoded_len, targets, durations_of(model))
        model.save_to(str(folder / "model.nemo"))
    model = type(model).restore_from(str(folder / "model.nemo"), map_location="cpu")
    return record(model, folder, clips, texts, case.about, case.seed)


def read_audio(path: Path, sample_rate_hz: int) -> np.ndarray:
    import soundfile

    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if rate != sample_rate_hz:
        raise SystemExit(
            f"{path} has {rate} Hz, the model expects {sample_rate_hz}; resample it first"
        )
    return (np.round(audio.mean(axis=1) * 32767) / 32768).astype(np.float32)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="example: python make_golden.py cases --case striding4_ctc_char",
    )
    parser.add_argument("out", type=Path, help="folder for the case(s)")
    parser.add_argument(
        "--case", action="append", default=[], choices=[*CASES, "all"], help="built-in case"
    )
    parser.add_argument("--list", action="store_true", help="print the built-in cases")
    parser.add_argument("--nemo", type=Path, help="existing archive to record")
    parser.add_argument("--audio", type=Path, nargs="+", default=[], help="clips for --nemo")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name}: {case.about}" for name, case in CASES.items()))
        return
    if bool(arguments.case) == bool(arguments.nemo) or bool(arguments.nemo) != bool(
        arguments.audio
    ):
        parser.error("give --case NAME, or --nemo FILE with --audio FILES, or --list")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel("ERROR")
    if arguments.nemo:
        from nemo.collections.asr.models import ASRModel

        model = ASRModel.restore_from(str(arguments.nemo), map_location="cpu")
        arguments.out.mkdir(parents=True, exist_ok=True)
        clips = [
            read_audio(path, int(model.cfg.preprocessor.sample_rate)) for path in arguments.audio
        ]
        record(model, arguments.out, clips, None, f"recorded from {arguments.nemo.name}", seed=1)
        (arguments.out / "model.nemo").write_bytes(arguments.nemo.read_bytes())
        return
    for name in list(CASES) if "all" in arguments.case else arguments.case:
        expected = make_case(name, arguments.out)
        for part, key in (("transducer", "greedy_batch"), ("ctc", "greedy_batch")):
            if part in expected:
                decoded = expected[part]["decoding"][key]
                margin = expected[part]["argmax_min_margin"]
                texts = [h["text"] for h in decoded.get("hyps", [])] or decoded
                agrees = expected[part].get("independent_greedy_agrees")
                print(f"{name} {part}: margin {margin:.4f} {agrees or ''} {texts}", file=sys.stderr)


if __name__ == "__main__":
    main()
