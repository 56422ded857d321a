"""Restores pairs of archives in real NeMo and compares what they compute, bit for bit.

Run by test_nemo_roundtrip.py with the Python of an environment that has NeMo (any 2.x or
3.x); imports nothing of this project:

    python nemo_restore.py ORIGINAL.nemo OURS.nemo [ORIGINAL.nemo OURS.nemo ...]

Prints one JSON line a pair: {"original": path, "differences": [...]}; an empty list means that
weights, encoder output, head outputs, tokens of a text and greedy transcripts are all equal, those
of ours by paths too. An archive that NeMo does not restore is a difference too.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch

FOLDER = tempfile.TemporaryDirectory()


def compute(path: str, by_paths: bool) -> dict:
    """Everything that is compared, by name: the weights and the outputs on fixed noise.
    `by_paths`: recordings are given as NeMo's users give them, as paths."""
    from nemo.collections.asr.models import ASRModel

    model = ASRModel.restore_from(path, map_location="cpu").eval()
    found = {f"weight {name}": tensor.clone() for name, tensor in model.state_dict().items()}
    found["class"] = type(model).__name__
    rate = int(model.cfg.preprocessor.sample_rate)
    rng = np.random.default_rng(1)
    lengths = torch.tensor([int(1.7 * rate), int(1.1 * rate)])
    envelope = 0.1 + 0.1 * np.sin(np.arange(int(lengths.max())) / rate * 20)
    audio = torch.from_numpy(
        (rng.standard_normal((2, int(lengths.max()))) * envelope).astype(np.float32)
    )
    audio = (audio * 32768).round().clamp(-32768, 32767) / 32768  # as a WAV file holds it
    audio[1, int(lengths[1]) :] = 0
    clips = [row[:length].numpy() for row, length in zip(audio, lengths.tolist(), strict=True)]
    if by_paths:
        clips = [written(clip, rate) for clip in clips]
    with torch.no_grad():
        features, feature_lengths = model.preprocessor(input_signal=audio, length=lengths)
        encoded, encoded_lengths = model.encoder(audio_signal=features, length=feature_lengths)
        found |= {"features": features, "encoded": encoded, "encoded_lengths": encoded_lengths}
        if hasattr(model, "transf_decoder"):
            return found | compute_multitask(model, audio, lengths, clips)
        transducer = hasattr(model, "joint")
        head = getattr(model, "ctc_decoder", None if transducer else model.decoder)
        if head is not None:
            found["ctc_log_probs"] = head(encoder_output=encoded)
        if transducer:
            targets = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
            predicted = model.decoder(targets=targets, target_length=torch.tensor([4, 3]))[0]
            found["joint"] = model.joint.joint(encoded.transpose(1, 2), predicted.transpose(1, 2))
            found["loss"] = f"{type(model.loss._loss).__name__} {model.loss.reduction}"
    if hasattr(model, "tokenizer"):
        found["tokens"] = model.tokenizer.text_to_ids("please turn off the lights, Anna")
        found["pieces"] = model.tokenizer.vocab
    hypotheses = model.transcribe(clips, batch_size=2, verbose=False)
    hypotheses = hypotheses[0] if isinstance(hypotheses, tuple) else hypotheses
    found["texts"] = [getattr(h, "text", h) for h in hypotheses]
    return found


def written(clip: np.ndarray, rate: int) -> str:
    """The path of a file that holds the clip, gone when the process ends."""
    path = Path(FOLDER.name) / f"{len(clip)}.wav"
    soundfile.write(path, clip, rate, subtype="PCM_16")
    return str(path)


def compute_multitask(model, audio, lengths, clips) -> dict:
    """Of Canary: what the decoder says, texts, prompts, and the model for times."""
    ids = torch.tensor([[4, 5, 6, 7, 8, 9, 10], [4, 6, 7, 8, 9, 10, 11]])
    log_probs, _, states, _ = model.forward(
        input_signal=audio,
        input_signal_length=lengths,
        transcript=ids,
        transcript_length=torch.tensor([7, 5]),
    )
    found = {"log_probs": log_probs, "states": states, "pieces": model.tokenizer.vocab}
    asked = {"source_lang": "en", "target_lang": "en", "pnc": "yes"}
    if model.cfg.prompt_format == "canary":
        asked["task"] = "asr"
    texts = model.transcribe(clips, batch_size=2, verbose=False, **asked)
    found["texts"] = [hypothesis.text for hypothesis in texts]
    aligner = model.timestamps_asr_model
    found["has aligner"] = aligner is not None
    if aligner is not None:
        features = aligner.preprocessor(input_signal=audio, length=lengths)
        encoded, _ = aligner.encoder(audio_signal=features[0], length=features[1])
        found["aligner log_probs"] = aligner.decoder(encoder_output=encoded)
        found |= {f"aligner {name}": t.clone() for name, t in aligner.state_dict().items()}
    return found


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return a == b


def compare(original: str, ours: str) -> list[str]:
    first = compute(original, by_paths=False)
    try:
        second = compute(ours, by_paths=True)
    except Exception as error:  # NeMo may raise anything on an archive that it does not take
        return [f"NeMo does not take it: {type(error).__name__}: {error}"]
    differences = [f"{name} only in one" for name in first.keys() ^ second.keys()]
    return differences + [
        f"{name} differs"
        for name in first.keys() & second.keys()
        if not equal(first[name], second[name])
    ]


def main():
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    paths = sys.argv[1:]
    for original, ours in zip(paths[::2], paths[1::2], strict=True):
        print(
            json.dumps({"original": original, "differences": compare(original, ours)}), flush=True
        )


if __name__ == "__main__":
    main()
