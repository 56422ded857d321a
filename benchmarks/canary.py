"""Canary on a CPU, ours against real NeMo: one model, one machine, one run.

    python -m benchmarks.canary --nemo-python nemo-venv/bin/python [--audio long.wav]

Both sides load the same archive, which our own `write_nemo` wrote: canary-180m-flash's sizes (17
layers x 512, projection, 4 decoder layers x 1024, 5,248 pieces) with random weights. Special tokens
never win, and there are positions for about as many tokens a second as speech has, where a text
then ends. Texts must be equal. Workers are separate processes with the same number of threads, and
take turns.

`token_ms`: processor time of our decoder alone, per token of one clip, at the beginning and at the
end of a long text: with its cache a token costs nearly the same wherever it stands.

The last line printed is the result as JSON; it is also written to `--out`.
"""

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import REPOSITORY, SPEECH, add_out, machine, peer_versions, versions, write_result
from benchmarks.random_model import cut_clips
from benchmarks.workers import Worker
from fastconformer import cli

TEMPLATE = REPOSITORY / "tests" / "golden" / "canary_v2_unified" / "model.nemo"
SIDES = {"ours": "ours:float32", "nemo": "nemo:float32"}
TARGET = 2.0  # times NeMo's speed


def random_canary(pieces: int, encoder_layers: int, decoder_layers: int):
    """A model of canary-180m-flash's widths with random weights, and so many pieces."""
    import dataclasses

    import torch

    from fastconformer import ASRModel, ModelConfig
    from fastconformer.checkpoint import read_checkpoint
    from fastconformer.text.sentencepiece_model import Piece, SentencePieceModel
    from fastconformer.text.tokenizer import load_tokenizer, sentencepiece_files

    checkpoint = read_checkpoint(TEMPLATE)
    model = SentencePieceModel.from_bytes(checkpoint.tokenizer_files["tokenizer.model"])
    more = (Piece(f"▁w{i}", -100.0 - i) for i in range(pieces - len(model.pieces)))
    model = dataclasses.replace(model, pieces=(*model.pieces, *more))
    files = sentencepiece_files(model.to_bytes())
    config = checkpoint.config
    config["tokenizer"] |= {
        "model_path": "nemo:tokenizer.model",
        "vocab_path": "nemo:vocab.txt",
        "spe_tokenizer_vocab": "nemo:tokenizer.vocab",
    }
    config["encoder"] |= {
        "n_layers": encoder_layers,
        "d_model": 512,
        "n_heads": 8,
        "subsampling_conv_channels": 256,
        "use_bias": False,
    }
    sizes = {"hidden_size": 1024, "inner_size": 4096, "num_attention_heads": 8}
    config["model_defaults"] = dict(asr_enc_hidden=512, lm_enc_hidden=1024, lm_dec_hidden=1024)
    config["transf_encoder"] |= sizes
    config["transf_decoder"]["config_dict"] |= sizes | {
        "num_layers": decoder_layers,
        "max_sequence_length": 1024,
    }
    config["head"] |= {"hidden_size": 1024, "num_classes": -(-pieces // 8) * 8}
    torch.manual_seed(1)
    return ASRModel(ModelConfig.from_nemo(config), load_tokenizer(config, files), files).eval()


def end_never(model) -> None:
    """Texts are as long as they may be: no special token ever wins."""
    bias = model.log_softmax.mlp["layer0"].bias.data
    for token in model.tokenizer.special_tokens.values():
        bias[token] = -1e4


def bounded(checkpoint, n_tokens: int):
    """The checkpoint with positions for so many tokens, prompt included: its texts end there."""
    import dataclasses

    name = "transf_decoder._embedding.position_embedding.pos_enc"
    state = dict(checkpoint.state_dict)
    state[name] = state[name][:n_tokens].clone()
    config = copy.deepcopy(checkpoint.config)
    config["transf_decoder"]["config_dict"]["max_sequence_length"] = n_tokens
    return dataclasses.replace(checkpoint, config=config, state_dict=state)


def token_times(model, clip) -> dict:
    """Milliseconds of decoding a token, early and late in a text that does not end."""
    import torch

    from fastconformer.decoding import DecodingOptions

    audio, length = torch.from_numpy(clip)[None], torch.tensor([len(clip)])
    with torch.inference_mode():
        encoded, length = model.encode(*model.featurize(audio, length))
    spent = {}
    for n_tokens in (20, 60, 260, 300) * 2:  # the less disturbed of two
        options = DecodingOptions(max_generation_delta=n_tokens)
        start = time.process_time()
        model.decode(encoded[:, :1], torch.ones(1).long(), options=options)
        took = time.process_time() - start
        spent[n_tokens] = min(took, spent.get(n_tokens, took))
    early, late = (spent[60] - spent[20]) / 40, (spent[300] - spent[260]) / 40
    return {"tokens_20_to_60": round(1e3 * early, 2), "tokens_260_to_300": round(1e3 * late, 2)}


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has had, of all its threads: what it costs on a busy machine
    too. 0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(argv=None) -> int:
    parser = cli.parser(
        "benchmarks.canary", __doc__.split("\n\n")[0], "--nemo-python nemo-venv/bin/python"
    )
    parser.add_argument(
        "--nemo-python", required=True, help="Python of an environment that has NeMo"
    )
    parser.add_argument(
        "--audio", type=Path, default=SPEECH, help="long recording that clips are cut from"
    )
    parser.add_argument("--clip-count", type=int, default=8)
    parser.add_argument("--shortest", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--longest", type=float, default=15.0, metavar="SECONDS")
    parser.add_argument("--encoder-layers", type=int, default=17)
    parser.add_argument("--decoder-layers", type=int, default=4)
    parser.add_argument("--pieces", type=int, default=5248)
    parser.add_argument("--tokens-per-second", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    add_out(parser, "canary")
    return cli.run("canary", lambda: run(parser.parse_args(argv)))


def run(arguments) -> int:
    import numpy as np
    import torch

    from fastconformer.checkpoint.nemo_archive import write_nemo

    torch.set_num_threads(arguments.threads)
    peer = peer_versions(arguments.nemo_python, "nemo", "torch")
    result = {"machine": machine(), "versions": versions() | {"nemo": peer["nemo"]}}
    clips = cut_clips(arguments.audio, arguments.clip_count, arguments.shortest, arguments.longest)
    model = random_canary(arguments.pieces, arguments.encoder_layers, arguments.decoder_layers)
    end_never(model)
    audio_s = sum(len(c) for c in clips) / 16000
    n_tokens = round(arguments.tokens_per_second * audio_s / len(clips))
    rate = n_tokens * len(clips) / audio_s
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {rate:.1f} tokens/s, {audio_s:.0f} s of speech")
    result["token_ms"] = token_times(model, clips[0])
    seconds, cpu, texts = {side: [] for side in SIDES}, {side: [] for side in SIDES}, {}
    with tempfile.TemporaryDirectory() as folder:
        archive, clips_path = Path(folder) / "model.nemo", Path(folder) / "clips.npz"
        n_prompt = len(model.prompt_ids())
        write_nemo(archive, bounded(model.to_checkpoint(), n_prompt + n_tokens - 1))
        np.savez(clips_path, **{f"clip{i:03d}": clip for i, clip in enumerate(clips)})
        task = {"model": str(archive), "clips": str(clips_path), "device": "cpu", "head": None}
        work_file = Path(folder) / "work.json"
        work_file.write_text(json.dumps(task | {"threads": arguments.threads}))
        workers = {}
        try:
            for side, engine in SIDES.items():
                python = arguments.nemo_python if side == "nemo" else sys.executable
                words = [str(work_file), engine]
                workers[side] = Worker(side, python, "benchmarks.engines", words, arguments.threads)
                workers[side].answer()
            for number in range(arguments.rounds + 1):
                for side in list(SIDES) if number % 2 else list(SIDES)[::-1]:
                    before = cpu_seconds(workers[side].process.pid)
                    answer = workers[side].ask("memory", len(clips))
                    spent = cpu_seconds(workers[side].process.pid) - before
                    texts[side] = answer["texts"]
                    if number:  # the first is a warm-up
                        seconds[side].append(round(answer["seconds"], 3))
                        cpu[side].append(round(spent, 2))
                        print(f"round {number} {side}: {answer['seconds']:.2f} s", flush=True)
        finally:
            for worker in workers.values():
                worker.close()
    pairs = zip(seconds["nemo"], seconds["ours"], strict=True)
    same = [a == b for a, b in zip(texts["ours"], texts["nemo"], strict=True)]
    faster = statistics.median(nemo / ours for nemo, ours in pairs)
    result |= {
        "parameters_m": round(parameters / 1e6, 1),
        "clips": len(clips),
        "audio_s": round(audio_s, 1),
        "threads": arguments.threads,
        "tokens_per_second": round(rate, 2),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "times_nemo": round(faster, 2),
        "times_nemo_of_cpu": round(sum(cpu["nemo"]) / max(0.01, sum(cpu["ours"])), 2),
        "texts_equal": f"{sum(same)}/{len(same)}",
        "target_met": faster >= TARGET,
    }
    write_result(arguments.out, result)
    print(json.dumps(result))
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
