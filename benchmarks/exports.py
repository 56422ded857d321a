"""An export's 8-bit weights beside its 32 bits, in onnx-asr: error rates, size, speed.

    python -m benchmarks.exports test.jsonl --model model.nemo

Each head of the model is written in both forms, and read by onnx-asr on one thread, clip by clip;
the forms take turns. Speed is seconds of audio per second of processor time, of the median round,
features included. Error rates are of the raw texts, by the manifests' folders; `ours` is the model
itself. Needs onnx-asr and the packages of the extra `export`.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import add_out, machine, versions, write_result
from fastconformer import cli

FORMS = {"float32": None, "int8": "int8"}  # and onnx-asr's word for it


def client(folder: Path, head: str, quantization: str | None):
    import onnx_asr
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnx_asr.load_model(
        f"nemo-conformer-{head}",
        folder,
        quantization=quantization,
        sess_options=options,
        providers=["CPUExecutionProvider"],
    )


def measure(model, head: str, sets: dict, folder: Path, rounds: int) -> dict:
    """sets: {name: (samples of each clip, their texts)}."""
    from fastconformer.export import onnx_asr
    from fastconformer.text.metrics import word_errors

    found: dict[str, dict] = {}
    for form in FORMS:
        onnx_asr.export(model, head, folder, int8=form == "int8")
    clients = {form: client(folder, head, word) for form, word in FORMS.items()}
    for form in FORMS:
        files = [f for f in folder.glob("*.onnx*") if (".int8." in f.name) == (form == "int8")]
        megabytes = round(sum(f.stat().st_size for f in files) / 1e6, 2)
        found[form] = {"megabytes": megabytes, "processor_s": [], "wer": {}}
    for _ in range(rounds):
        for form, asr in clients.items():
            begin, texts = time.process_time(), {}
            for name, (clips, _) in sets.items():
                texts[name] = [asr.recognize(clip) for clip in clips]
            found[form]["processor_s"].append(round(time.process_time() - begin, 3))
            for name, (_, references) in sets.items():
                found[form]["wer"][name] = round(word_errors(references, texts[name]).rate, 5)
    audio_s = sum(len(clip) for clips, _ in sets.values() for clip in clips) / model.sample_rate
    for result in found.values():
        median = statistics.median(result["processor_s"])
        result["times_real_time"] = round(audio_s / median, 1)
    ours = {}
    for name, (clips, references) in sets.items():
        results = model.transcribe(clips, head=head, min_duration_s=0.0, long="full", retry=False)
        ours[name] = round(word_errors(references, [t.text for t in results]).rate, 5)
    found["ours"] = {"wer": ours}
    pairs = zip(*(found[form]["processor_s"] for form in FORMS), strict=True)
    found["speed_int8_over_float32"] = round(statistics.median(a / b for a, b in pairs), 3)
    return found


def main(argv=None) -> int:
    parser = cli.parser(
        "benchmarks.exports",
        "An export's 8-bit weights beside its 32 bits, in onnx-asr.",
        "--model model.nemo test.jsonl",
    )
    parser.add_argument("manifests", type=Path, nargs="+", metavar="MANIFEST")
    parser.add_argument("--model", required=True, help="whatever load_model takes")
    parser.add_argument("--lang", help="only lines of this `lang` (or without one)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    add_out(parser, "exports")
    args = parser.parse_args(argv)
    return cli.run("exports", lambda: run(args))


def run(args) -> None:
    import torch

    from fastconformer import load_model
    from fastconformer.audio.files import load_audio
    from fastconformer.formats.manifest import read_manifest

    try:
        import onnx_asr
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"this needs {error.name}: pip install onnx-asr[cpu] onnx") from None
    torch.set_num_threads(1)
    model, sets = load_model(args.model), {}
    for manifest in args.manifests:
        clips, _ = read_manifest(manifest, args.lang)
        if any(clip.text is None or clip.offset_s is not None for clip in clips):
            raise ValueError(f"{manifest}: each line must have a text, and be a whole file")
        samples = [load_audio(clip.path, model.sample_rate) for clip in clips]
        sets[manifest.parent.name] = samples, [clip.text for clip in clips]
    before = machine()
    result = {"machine": before, "versions": versions(), "model": Path(args.model).name}
    result["versions"]["onnxruntime"] = onnxruntime.__version__
    result["versions"]["onnx_asr"] = onnx_asr.__version__
    result["clips"] = {name: len(clips) for name, (clips, _) in sets.items()}
    result["heads"] = {}
    for head in model.heads:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(model, head, sets, Path(folder) / "x", args.rounds)
        result["heads"][head] = found
        for form in FORMS:
            print(head, form, *(f"{k} {v}" for k, v in found[form].items() if k != "processor_s"))
    write_result(args.out, result)


if __name__ == "__main__":
    sys.exit(main())
