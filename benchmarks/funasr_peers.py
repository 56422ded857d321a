"""Fun-ASR-Nano beside FunASR and transformers' own port: loading, memory, seconds a clip on a CPU.

    python -m benchmarks.funasr_peers --scale 0.5 --peers-python funasr-venv/bin/python

Random weights, of the released sizes at --scale 1 (1.0 G parameters), with widths and depths that
much smaller below. Each engine is a process of its own, one after another, on one thread and in
float32: it loads the model (ours and FunASR the same folder, transformers one of the same sizes
that it writes itself), then reads a clip of ten seconds of noise and writes --tokens tokens, three
times; the shortest counts, in seconds of the CPU. The port gives the language model all rows of the
adaptor, eight times as many; its time is without features.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import (
    REPOSITORY,
    add_out,
    machine,
    peer_versions,
    versions,
    write_result,
)

CLIP_S, REPEATS = 10.0, 3


def sizes(scale: float) -> dict:
    """Widths and depths; the released model's at 1."""

    def of(number: int, step: int = 1) -> int:
        return max(step, round(number * scale / step) * step)

    return {
        "d": of(512, 64), "inner": of(2048, 64), "blocks": of(50), "tp": of(20),
        "llm": of(1024, 128), "llm_inner": of(3072, 128), "llm_layers": of(28),
        "heads": of(16, 2), "kv": of(8), "vocab": 151936, "classes": 60515,
    }  # fmt: skip


def write_folder(folder: Path, case: Path, scale: float) -> None:
    """A folder in the released layout with random weights, in bfloat16."""
    import torch

    from fastconformer.checkpoint.contents import Checkpoint
    from fastconformer.checkpoint.funasr_folder import read_funasr, write_funasr
    from fastconformer.config.funasr import FunASRConfig
    from fastconformer.funasr import FunASRNano

    config, files = (lambda c: (c.config, c.tokenizer_files))(read_funasr(case))
    n = sizes(scale)
    config["audio_encoder_conf"] |= {
        "output_size": n["d"], "linear_units": n["inner"], "num_blocks": n["blocks"],
        "tp_blocks": n["tp"],
    }  # fmt: skip
    config["audio_adaptor_conf"] |= {
        "ffn_dim": n["inner"],
        "llm_dim": n["llm"],
        "encoder_dim": n["d"],
    }
    config["ctc_decoder"] = None  # the port has none
    config["llm_config"] |= {
        "hidden_size": n["llm"], "intermediate_size": n["llm_inner"], "head_dim": 128,
        "num_hidden_layers": n["llm_layers"], "num_attention_heads": n["heads"],
        "num_key_value_heads": n["kv"], "vocab_size": n["vocab"],
    }  # fmt: skip
    torch.manual_seed(0)
    model = FunASRNano(FunASRConfig.from_funasr(config), files).to(torch.bfloat16)
    write_funasr(folder, Checkpoint(config, model.state_dict(), files))


def ours(folder: str, tokens: int):
    from fastconformer import load_model

    model = load_model(folder)
    return lambda samples: model.transcribe([samples], max_tokens=tokens, max_repeats=10**6)


def funasr(folder: str, tokens: int):
    import torch
    from funasr import AutoModel

    model = AutoModel(model=folder, device="cpu", disable_update=True, disable_pbar=True)
    return lambda samples: model.generate(
        input=[torch.from_numpy(samples)], cache={}, batch_size=1, max_length=tokens
    )


def transformers(folder: str, tokens: int):
    import torch
    from transformers import FunAsrNanoForConditionalGeneration

    model = FunAsrNanoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def write(samples):
        rows = len(samples) // 960  # its feature extraction needs torchaudio: left out
        mask = torch.ones(1, rows, dtype=torch.long)
        inputs = {"input_features": torch.randn(1, rows, 560), "input_features_mask": mask}
        ids = torch.tensor([[1] * 17 + [model.config.audio_token_id] * rows + [1] * 5])
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )

    return write


def write_port(folder: str, scale: float) -> None:
    """The same sizes in transformers' layout."""
    import torch
    from transformers import FunAsrNanoConfig, FunAsrNanoForConditionalGeneration

    n = sizes(scale)
    config = FunAsrNanoConfig(
        audio_config={
            "model_type": "fun_asr_nano_encoder", "hidden_size": n["d"],
            "intermediate_size": n["inner"], "num_hidden_layers": n["blocks"] + n["tp"],
            "num_timestamp_prediction_layers": n["tp"],
        },
        adaptor_config={"hidden_size": n["llm"], "intermediate_size": n["llm"] // 4,
                        "projector_hidden_size": n["inner"]},
        text_config={
            "model_type": "qwen3", "hidden_size": n["llm"], "intermediate_size": n["llm_inner"],
            "num_hidden_layers": n["llm_layers"], "num_attention_heads": n["heads"],
            "num_key_value_heads": n["kv"], "head_dim": 128, "vocab_size": n["vocab"],
            "tie_word_embeddings": True,
        },
        audio_token_id=3,
    )  # fmt: skip
    FunAsrNanoForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)


ENGINES = {"ours": ours, "FunASR": funasr, "transformers": transformers}


def measure(engine: str, folder: str, tokens: int) -> dict:
    """In this process: CPU seconds to load, of the shortest run, and the peak of memory."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    samples = np.random.default_rng(0).normal(size=int(CLIP_S * 16000)).astype(np.float32) * 0.1
    start = time.process_time()
    write = ENGINES[engine](folder, tokens)
    loaded_s, runs = time.process_time() - start, []
    for _ in range(REPEATS):
        start = time.process_time()  # on one thread; the machine may have other work
        write(samples)
        runs.append(time.process_time() - start)
    from fastconformer.process_memory import peak_bytes  # getrusage would count the parent's too

    found = {"load_s": loaded_s, "clip_s": min(runs), "peak_gb": peak_bytes() / 1e9}
    return {"engine": engine} | {name: round(number, 2) for name, number in found.items()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.funasr_peers",
        description=__doc__,
        epilog="example: python -m benchmarks.funasr_peers --scale 0.5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes (%(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="to write (%(default)s)")
    parser.add_argument("--peers-python", help="of an environment with funasr and transformers")
    add_out(parser, "funasr_peers")
    parser.add_argument("--case", type=Path, default=Path("tests/golden/fun_asr_nano_tiny"))
    parser.add_argument("--measure", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--write-port", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(*args.measure, args.tokens)))
        return 0
    if args.write_port:
        write_port(args.write_port, args.scale)
        return 0
    result = {"machine": machine(), **versions()}
    result |= {"scale": args.scale, "tokens": args.tokens, "clip_seconds": CLIP_S, "threads": 1}
    peers = args.peers_python
    if peers:
        result["peers"] = peer_versions(peers, "funasr", "transformers", "torch")

    def run(python: str, *words: str) -> str:
        common = ["--scale", str(args.scale), "--tokens", str(args.tokens)]
        command = [python, "-m", "benchmarks.funasr_peers", *common, *words]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, cwd=REPOSITORY
        )
        return done.stdout

    with tempfile.TemporaryDirectory() as work:
        folder, port = Path(work) / "released", Path(work) / "port"
        write_folder(folder, args.case, args.scale)
        if peers:
            run(peers, "--write-port", str(port))
        result["engines"] = []
        for engine in ENGINES if peers else ("ours",):
            python = sys.executable if engine == "ours" else peers
            where = port if engine == "transformers" else folder
            said = run(python, "--measure", engine, str(where))
            found = json.loads(said.splitlines()[-1])
            result["engines"].append(found)
            print(f"{engine:13} load {found['load_s']:6.2f} s  clip {found['clip_s']:6.2f} s  "
                  f"peak {found['peak_gb']:5.2f} GB", flush=True)  # fmt: skip
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
