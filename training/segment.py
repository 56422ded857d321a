"""Recordings become training data: an hour of audio and its text, cut into clips with their texts.

    python -m training.segment lecture.mp3 lecture.txt --model parakeet.nemo -o lecture

Writes `clips/NNNNN.flac` and `manifest.jsonl`, which training.finetune takes, and
`left_out.jsonl`: what does not fit (missing or extra words, music, another text), with its time,
score and reason. The text may have other words in front and behind; scripts without spaces are as
good as others. The model must know the language a little: it says when what is said.
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
        "--min-score", type=float, default=0.75, help="share of characters that agree (%(default)s)"
    )
    parser.add_argument("--lang", help="written into every line")
    options = parser.parse_args(arguments)
    return cli.run("segment", lambda: segment(options))


def segment(options) -> int:
    import soundfile

    from fastconformer.audio.files import load_audio
    from training.data.json_lines import json_line
    from training.data.segments import find_segments

    if not 0 < options.min_score <= 1 or options.max_s <= 0 or options.pause_s < 0:
        raise cli.UsageError("--min-score is 0 to 1, --max-s and --pause-s are seconds")
    text = options.text.read_text(encoding="utf-8-sig")
    model = cli.load_model(options)
    samples = load_audio(options.audio, model.sample_rate)
    heard = model.transcribe([samples], head=options.head, timestamps=True)[0]
    if not heard.words:
        raise ValueError(f"{options.audio}: the model heard no word")
    found = find_segments(
        heard.words,
        text,
        len(samples) / model.sample_rate,
        pause_s=options.pause_s,
        max_s=options.max_s,
        min_score=options.min_score,
    )
    (options.output / "clips").mkdir(parents=True, exist_ok=True)
    kept, left_out = [], []
    for item in found:
        line = {"start": round(item.start, 3), "end": round(item.end, 3), "score": item.score}
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
        (options.output / name).write_text("".join(lines), encoding="utf-8")
    seconds = sum(item.end - item.start for item in found if not item.reason)
    print(
        f"{len(kept)} clips, {seconds / 60:.1f} of {len(samples) / model.sample_rate / 60:.1f} "
        f"minutes: {options.output / 'manifest.jsonl'}; {len(left_out)} left out"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
