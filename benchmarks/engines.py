"""What `benchmarks.rtfx` and `benchmarks.cpu_vs_nemo` measure: our engine and our peers'.

    python -m benchmarks.engines WORK.json ENGINE

ENGINE is `ours:DTYPE` or `PEER:DTYPE`; WORK.json has the model, the clips and the options. A worker
loads its engine, says so (ours with the memory that loading took), and then answers `memory N`,
`files N` and `stages N`, in batches of N. It runs with the Python of an environment that has the
peer, so everything but the standard library is imported where it is used. An engine is a function
of (model, dtype, device, head) that gives (clips, batch_size) -> texts, (paths, batch_size) ->
texts, and `stages` or None.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.onnx_engines import onnx_asr_engine, sherpa_engine
from benchmarks.workers import reply


def our_engine(model_path, dtype, device, head):
    """(samples, batch_size) -> texts, (paths, batch_size) -> texts, stages."""
    import torch

    import fastconformer

    model = fastconformer.load_model(model_path, device, getattr(torch, dtype))

    def transcribe(inputs, batch_size):
        return [t.text for t in model.transcribe(inputs, head, batch_size)]

    def now():
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def stages(clips, batch_size):
        seconds = {"features": 0.0, "encoder": 0.0, "decoding": 0.0}
        order = sorted(clips, key=len, reverse=True)
        for first in range(0, len(order), batch_size):
            batch = [torch.from_numpy(c) for c in order[first : first + batch_size]]
            audio = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
            lengths = torch.tensor([len(c) for c in batch], device=device)

            with torch.inference_mode():
                times = [now()]
                features, frames = model.featurize(audio, lengths)
                times.append(now())
                encoded, frames = model.encode(features, frames)
                times.append(now())
                model.decode_greedy(encoded, frames, head)
                times.append(now())
            for stage, (start, end) in zip(seconds, pairwise(times), strict=True):
                seconds[stage] += end - start
        return seconds

    return transcribe, transcribe, stages


def nemo_engine(model_path, dtype, device, head):
    import logging

    import torch
    from nemo.collections.asr.models import ASRModel
    from nemo.utils import logging as nemo_logging
    from omegaconf import open_dict

    nemo_logging.setLevel(logging.ERROR)
    model = ASRModel.restore_from(model_path, map_location=device).eval()
    with open_dict(model.cfg):  # its transcription of files asks this section
        model.cfg.validation_ds = model.cfg.get("validation_ds") or {"use_start_end_token": False}
    if head == "ctc":
        model.change_decoding_strategy(decoder_type="ctc", verbose=False)
    kind = getattr(torch, dtype)

    def transcribe(inputs, batch_size):
        with torch.autocast(torch.device(device).type, kind, enabled=kind != torch.float32):
            found = model.transcribe(inputs, batch_size=batch_size, verbose=False)
        found = found[0] if isinstance(found, tuple) else found
        return [getattr(h, "text", h) for h in found]

    return transcribe, transcribe, None


def nano_engine(model_path, dtype, device, head):
    import numpy as np
    import sentencepiece
    import soundfile
    import torch
    from nano_parakeet._loader import remap_state_dict
    from nano_parakeet.model import FastConformerEncoder, ParakeetTDT, RNNTDecoder, TDTJoint

    archive = torch.load(Path(model_path).with_suffix(".weights.pt"), weights_only=True)
    weights, sizes = archive["weights"], archive["sizes"]
    model = ParakeetTDT()  # its sizes are fixed, so its parts are made again in the model's
    layers, width, mels, lstm_layers, vocabulary = (
        sizes[k] for k in ("layers", "width", "mels", "lstm_layers", "vocabulary")
    )
    model.preprocessor.register_buffer("fb", torch.zeros(1, mels, 257))
    model.encoder = FastConformerEncoder(width, layers, 8, 4 * width, mels)
    model.decoder = RNNTDecoder(vocabulary, 640, lstm_layers)
    model.joint = TDTJoint(width, 640, 640, vocabulary)
    model.BLANK_ID = model.VOCAB_SIZE = vocabulary
    missing, _ = model.load_state_dict(remap_state_dict(weights), strict=False)
    if missing:
        raise SystemExit(f"nano-parakeet lacks {missing[:5]}")
    model = model.to(device).eval()
    if dtype != "float32":
        for part in (model.encoder, model.decoder, model.joint):
            part.to(getattr(torch, dtype))
    pieces = sentencepiece.SentencePieceProcessor(
        model_proto=Path(model_path).with_suffix(".tokenizer").read_bytes()
    )

    def from_memory(clips, batch_size):
        texts = []
        for clip in clips:
            clip = np.pad(clip, max(0, 16000 - len(clip)) // 2)
            texts.append(pieces.decode(model.transcribe_audio(torch.from_numpy(clip))))
        return texts

    def from_files(paths, batch_size):
        return from_memory([soundfile.read(p, dtype="float32")[0] for p in paths], 1)

    return from_memory, from_files, None


def transformers_engine(model_path, dtype, device, head):
    import soundfile
    import torch
    from transformers import ParakeetCTCConfig, ParakeetFeatureExtractor, ParakeetForCTC

    sizes = json.loads(Path(model_path).with_suffix(".sizes.json").read_text())
    torch.manual_seed(1)
    encoder = {
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "intermediate_size": 4 * sizes["width"],
        "num_mel_bins": sizes["mels"],
        "scale_input": False,
        "attention_bias": True,
    }
    blank = sizes["vocabulary"]
    config = ParakeetCTCConfig(vocab_size=blank + 1, pad_token_id=blank, encoder_config=encoder)
    model = ParakeetForCTC(config).to(device, getattr(torch, dtype)).eval()
    extract = ParakeetFeatureExtractor(feature_size=sizes["mels"])

    def from_memory(clips, batch_size):
        texts = []
        order = sorted(clips, key=len, reverse=True)
        for first in range(0, len(order), batch_size):
            inputs = extract(
                order[first : first + batch_size], sampling_rate=16000, return_tensors="pt"
            ).to(device)
            features = inputs["input_features"].to(model.dtype)
            with torch.inference_mode():
                logits = model(features, attention_mask=inputs["attention_mask"]).logits
            for row in logits.argmax(-1):
                ids = torch.unique_consecutive(row)
                texts.append(" ".join(map(str, ids[ids != blank].tolist())))
        return texts

    def from_files(paths, batch_size):
        return from_memory([soundfile.read(p, dtype="float32")[0] for p in paths], batch_size)

    return from_memory, from_files, None


ENGINES = {
    "ours": our_engine,
    "nemo": nemo_engine,
    "nano-parakeet": nano_engine,
    "transformers": transformers_engine,
    "onnx-asr": onnx_asr_engine,
    "sherpa-onnx": sherpa_engine,
}
TORCHLESS = ("onnx-asr", "sherpa-onnx")  # their environments need not have torch


def work(work_file: Path, engine: str) -> None:
    """A worker's life."""
    import numpy as np

    task = json.loads(work_file.read_text())
    clips = list(np.load(task["clips"]).values())
    name, dtype = engine.rsplit(":", 1)
    on_gpu = task["device"] != "cpu"
    if name not in TORCHLESS:
        import torch

        torch.set_num_threads(task["threads"])
    before = None
    if name == "ours":
        from fastconformer import process_memory

        before = process_memory.resident_bytes()
    memory, files, stages = ENGINES[name](task["model"], dtype, task["device"], task["head"])
    reply(load_bytes=None if before is None else process_memory.peak_bytes() - before)
    for line in sys.stdin:
        what, batch_size = line.split()
        if what == "stages":
            reply(stages=stages(clips, int(batch_size)) if stages else None)
            continue
        inputs = clips if what == "memory" else task["paths"]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        texts = (memory if what == "memory" else files)(inputs, int(batch_size))
        answer = {"seconds": time.perf_counter() - start, "texts": texts}
        if on_gpu:
            answer["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        reply(**answer)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
