"""Models of Parakeet's sizes without a checkpoint, and clips for them.

A hybrid TDT-CTC with random weights, untrained, would emit at random, so two biases of the joint's
output layer are set: the duration classes' to favour 2 and 4 frames over 0, 1 and 3, as trained
Parakeets do, and the blank's by bisection until the greedy decoder emits so many tokens a second of
the given speech (English with 1024 pieces: about 4). The decoder then does a real model's work; the
texts mean nothing, but equal weights must give equal texts.
"""

from pathlib import Path

from benchmarks import REPOSITORY

TOKENIZER = REPOSITORY / "tests" / "golden" / "hybrid_tdt_ctc_bpe" / "model.nemo"  # 1024 pieces
SIZES = {  # layers, width, mels, LSTM layers: of parakeet-tdt_ctc-110m, parakeet-tdt-0.6b-v2
    "random-110m": (17, 512, 80, 1),
    "random-0.6b": (24, 1024, 128, 2),
}


def parakeet(tokenizer_archive: Path, layers: int, width: int, mels: int, lstm_layers: int):
    """(config, tokenizer files) of a hybrid of these sizes with the archive's 1024 pieces."""
    from fastconformer.checkpoint.nemo_archive import read_nemo

    checkpoint = read_nemo(tokenizer_archive)
    config = checkpoint.config
    config["preprocessor"]["features"] = mels
    config["encoder"] |= {
        "feat_in": mels,
        "n_layers": layers,
        "d_model": width,
        "n_heads": 8,
        "subsampling_conv_channels": 256,
        "conv_kernel_size": 9,
        "ff_expansion_factor": 4,
        "xscaling": False,
    }
    config["model_defaults"] |= {"enc_hidden": width, "pred_hidden": 640, "joint_hidden": 640}
    config["decoder"]["prednet"] |= {"pred_hidden": 640, "pred_rnn_layers": lstm_layers}
    config["joint"]["jointnet"] |= {
        "joint_hidden": 640,
        "encoder_hidden": width,
        "pred_hidden": 640,
    }
    config["aux_ctc"]["decoder"]["feat_in"] = width
    return config, checkpoint.tokenizer_files


def random_model(
    clips,
    tokens_per_second: float,
    sizes,
    tokenizer=TOKENIZER,
    device="cpu",
    attention="rel_pos",
    **sections: dict,
):
    """A random model of `sizes` in memory, with the 1024 pieces of the archive `tokenizer`, and the
    tokens per second that its decoder emits on the clips. `sections`: further keys of the config's
    sections (`encoder={...}`)."""
    import torch

    from fastconformer import ASRModel, ModelConfig
    from fastconformer.text.tokenizer import load_tokenizer

    torch.manual_seed(1)
    raw, files = parakeet(tokenizer, *sizes)
    raw["encoder"]["self_attention_model"] = attention
    if attention == "rel_pos_local_attn":
        raw["encoder"]["att_context_size"] = [128, 128]
    for name, keys in sections.items():
        raw[name] |= keys
    config = ModelConfig.from_nemo(raw)
    model = ASRModel(config, load_tokenizer(raw, files), files).to(device).eval()
    seconds = sum(len(c) for c in clips) / model.sample_rate
    audio = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in clips], batch_first=True)
    lengths = torch.tensor([len(c) for c in clips])
    with torch.inference_mode():
        encoded, lengths = model.encode(*model.featurize(audio.to(device), lengths.to(device)))
    output = model.joint.joint_net[-1]
    blank, durations = model.blank_id, config.loss.durations
    more = [{2: 1.0, 4: 1.5}.get(d, 0.0) for d in durations]
    with torch.no_grad():
        output.bias[blank + 1 :] += torch.tensor(more, device=device)
    start, low, high = output.bias[blank].item(), -10.0, 30.0
    rate = 0.0
    for _ in range(22):  # more blank, fewer tokens
        middle = (low + high) / 2
        with torch.no_grad():
            output.bias[blank] = start + middle
        rate = sum(len(h.tokens) for h in model.decode_greedy(encoded, lengths, "tdt")) / seconds
        low, high = (middle, high) if rate > tokens_per_second else (low, middle)
    return model, rate


def write_model(path: Path, clips, tokens_per_second: float, sizes, tokenizer=TOKENIZER):
    """Writes a random model of `sizes` with the 1024 pieces of the archive `tokenizer`; returns
    (parameters, tokens per second that its decoder emits on the clips)."""
    from fastconformer.checkpoint.nemo_archive import write_nemo

    model, rate = random_model(clips, tokens_per_second, sizes, tokenizer)
    write_nemo(path, model.to_checkpoint())
    return sum(p.numel() for p in model.parameters()), rate


def cut_clips(audio: Path, n_clips: int, shortest_s: float, longest_s: float):
    """Consecutive pieces of a long recording, float32 at 16 kHz, lengths spread evenly; from its
    start again where it ends."""
    from fastconformer.audio.files import audio_duration, load_audio

    clips, offset, total = [], 0.0, audio_duration(audio)
    for i in range(n_clips):
        # strided, so that neighbours differ in length as in real batches
        step = (i * 5 % n_clips) / max(1, n_clips - 1)
        duration = min(total, shortest_s + (longest_s - shortest_s) * step)
        offset = offset if offset + duration <= total else 0.0
        clips.append(load_audio(audio, 16000, offset_s=offset, duration_s=duration))
        offset += duration
    return clips
