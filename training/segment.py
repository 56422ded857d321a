"""Recordings become training data: an hour of audio and its text, cut into clips with their texts.

    python -m training.segment lecture.mp3 lecture.txt --model parakeet.nemo -o lecture

Writes `clips/NNNNN.flac` and `manifest.jsonl`, which training.finetune takes, and
`left_out.jsonl`: what does not fit (missing or extra words, music, another text), with its time,
score and reason. The text may have other words in front and behind; scripts without spaces are as
good as others. The model need not know the language well: it says what fits worse than the rest.
"""

import sys
from pathlib import Path

from fastconformer import cli


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser(
        "training.segment",
        "Cut a long recording and its transcript into training clips.",
        "lecture.mp3 lecture.txt --model parakeet.nemo -o lecture",
    )
    parser.add_argument("audio", type=Path, help="a recording")
    parser.add_argument("text", type=Path, help="what is said in it: a text file, UTF-8")
    cli.add_model_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--max-s", type=float, default=20.0, help="longest clip (%(default)s)")
    parser.add_argument("--pause-s", type=float, default=0.3, help="shortest pause (%(default)s)")
    parser.add_argument(
        "--min-score",
        type=float,
        metavar="NATS",
        help="nats a token, 0 at best, below which a clip is left out, such as -2 (default: what "
        "is unusual in this recording)",
    )
    parser.add_argument(
        "--lang",
        help="written into every line; picks the tokenizer where each language has one, and is "
        "told to a model that can be told it",
    )
    options = parser.parse_args(arguments)
    return cli.run("segment", lambda: segment(options))


def segment(options) -> int:
    import soundfile

    from fastconformer.audio.files import load_audio
    from fastconformer.checkpoint.files import write_text
    from fastconformer.text import read_text
    from training.data.json_lines import json_line
    from training.data.segments import find_segments

    positive = options.max_s > 0 and options.pause_s > 0  # not a number is neither
    if not positive or not (options.min_score or 0) <= 0:
        raise cli.UsageError("--max-s and --pause-s are seconds, --min-score is 0 or less")
    text = read_text(options.text)
    model = cli.load_model(options)
    prompts = model.config.prompts
    if options.lang and prompts is not None and not prompts.knows(options.lang):
        known = ", ".join(prompts.names)
        print(
            f"segment: the model is told auto, not {options.lang}: it has {known}", file=sys.stderr
        )
    samples = load_audio(options.audio, model.sample_rate)
    found = find_segments(
        model,
        samples,
        text,
        pause_s=options.pause_s,
        max_s=options.max_s,
        min_score=options.min_score,
        head=options.head,
        batch_size=options.batch_size,
        lang=options.lang,
    )
    (options.output / "clips").mkdir(parents=True, exist_ok=True)
    kept, left_out = [], []
    for item in found:
        line = {"start": round(item.start, 3), "end": round(item.end, 3), "score": item.score}
        line["worst"] = item.worst
        if item.reason:
            said = {"text": item.text, "heard": item.heard, "reason": item.reason}
            left_out.append(json_line(line | said))
            continue
        clip = samples[round(item.start * model.sample_rate) : round(item.end * model.sample_rate)]
        name = f"clips/{len(kept):05d}.flac"
        soundfile.write(options.output / name, clip, model.sample_rate, subtype="PCM_16")
        duration = round(len(clip) / model.sample_rate, 4)
        entry = {"audio_filepath": name, "duration": duration, "text": item.text}
        lang = {"lang": options.lang} if options.lang else {}
        kept.append(json_line(entry | lang | line))
    for name, lines in (("left_out.jsonl", left_out), ("manifest.jsonl", kept)):
        write_text(options.output / name, "".join(lines))
    seconds = sum(item.end - item.start for item in found if not item.reason)
    print(
        f"{len(kept)} clips, {seconds / 60:.1f} of {len(samples) / model.sample_rate / 60:.1f} "
        f"minutes: {options.output / 'manifest.jsonl'}; {len(left_out)} left out"
    )
    if not kept:
        raise cli.Failed(f"nothing fits; {options.output / 'left_out.jsonl'} says why")
    return 0


if __name__ == "__main__":
    sys.exit(main())
