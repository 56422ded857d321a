"""The console command: `fastconformer NAME ...` is `python -m MODULE ...`."""

import importlib
import sys

from . import cli

COMMANDS = {
    "use": {
        "transcribe": ("fastconformer.transcribe", "recordings to text, subtitles, JSON"),
        "evaluate": ("fastconformer.evaluate", "error rates on a manifest, against an older run"),
        "serve": ("fastconformer.serve", "OpenAI's transcription API over HTTP, and a page"),
        "listen": ("fastconformer.listen", "what a microphone hears, as text in the terminal"),
    },
    "train": {
        "finetune": ("training.finetune", "fine-tune a model, or train one, as a recipe says"),
        "compare": ("training.compare", "what a recipe changes, and whether its run can start"),
        "distill": ("training.distill", "teach BiRWKV7 what a model's attention does"),
        "average": ("training.average", "the mean of several checkpoints"),
        "report": ("training.report", "a run on one page"),
        "find_batch": ("training.find_batch", "the largest batch that the device takes"),
        "manifest": ("training.manifest", "a data set of Lhotse or Hugging Face to a manifest"),
        "segment": ("training.segment", "a long recording and its text to training clips"),
        "synthesize": ("training.synthesize", "speak a corpus of clips and texts"),
    },
    "convert": {
        "nemo2st": ("converters.nemo2st", "a NeMo archive to a folder"),
        "st2nemo": ("converters.st2nemo", "a folder to a NeMo archive"),
        "st2onnx": ("converters.st2onnx", "a model to ONNX, for sherpa-onnx or onnx-asr"),
        "st2hf": ("converters.st2hf", "a model to a Hugging Face folder"),
        "hf2st": ("converters.hf2st", "a Hugging Face folder to one of ours"),
        "st2mlx": ("converters.st2mlx", "a model to a folder of parakeet-mlx"),
        "check_export": ("converters.check_export", "an export's texts beside the model's"),
        "funasr2st": ("converters.funasr2st", "a Fun-ASR-Nano folder to one of ours"),
        "st2funasr": ("converters.st2funasr", "a folder to one that FunASR loads"),
        "to_birwkv7": ("converters.to_birwkv7", "a model's attention to BiRWKV7"),
        "train_tokenizer": ("converters.train_tokenizer", "a SentencePiece tokenizer from texts"),
        "merge_tokenizers": ("converters.merge_tokenizers", "a tokenizer that has two's pieces"),
        "train_lm": ("converters.train_lm", "an n-gram language model from texts"),
    },
}


def listed() -> str:
    """What `fastconformer --help` prints."""
    lines = ["usage: fastconformer COMMAND ...", "       fastconformer COMMAND --help", ""]
    lines += ["Speech recognition with FastConformer and Parakeet models.", ""]
    for title, commands in COMMANDS.items():
        lines.append(f"{title}:")
        lines += [f"  {name:18}{text}" for name, (_, text) in commands.items()]
    example = "fastconformer transcribe talk.wav --model model.nemo --format srt -o talk.srt"
    return "\n".join([*lines, "", f"example: {example}"])


def main(argv: list[str] | None = None) -> int:
    """Leads to the command that the first argument names; returns its exit status."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        return cli.run("fastconformer", lambda: print(listed()))
    commands = {key: found for group in COMMANDS.values() for key, found in group.items()}
    if name not in commands:
        print(f"fastconformer: there is no command {name!r}; see --help", file=sys.stderr)
        return 2
    return importlib.import_module(commands[name][0]).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
