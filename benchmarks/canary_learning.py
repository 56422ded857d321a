"""A tiny Canary learns two languages and a behaviour of its own, from embedded corpora.

    python -m benchmarks.canary_learning

Short commands and numbers in English and Hindi, spoken by eSpeak; a new decoder on the encoder of
models/base_tiny.nemo, which has heard English eSpeak alone. A slot's two values, each a free token
of the prompt, ask for numbers as digits or as words. recipes/canary_from_scratch.yaml is run twice,
with the prompt masked in the loss and without; both are measured on voices and sentences that the
training never heard, each clip under both values.

The work lies in `--folder`, and a second call goes on where the first was cut; what is
finished stays. The result goes to
`--out` as JSON.
"""

import copy
import json
import re
import sys
from pathlib import Path

from benchmarks import REPOSITORY, add_out, machine, versions, write_result
from fastconformer import cli

BASE = REPOSITORY / "models" / "base_tiny.nemo"
TEMPLATE = REPOSITORY / "tests" / "golden" / "canary_flash_agg" / "model.nemo"  # special tokens
RECIPE = REPOSITORY / "recipes" / "canary_from_scratch.yaml"
LANGUAGES = {"en": "quickstart", "hi": "hindi"}
VALUES = ("digits", "words")
RUNS = {"masked": "true", "unmasked": "false"}  # loss.mask_prompt
WIDTH, DECODER_LAYERS, PIECES = 144, 2, 160
MOST_WORDS = 6
PAUSES_S, SCALED_S = (0.3, 0.9), (3, 4)


def number_table(lang: str) -> dict[str, str]:
    """How numbers of the grammar are spoken -> in digits."""
    from training.speech.texts import HINDI_DIGITS, HINDI_NUMBERS, number_words

    if lang == "hi":
        return {HINDI_DIGITS[0]: "0"} | {w: str(i) for i, w in enumerate(HINDI_NUMBERS, 1)}
    return {number_words(i): str(i) for i in range(100)}


def in_digits(text: str, lang: str) -> str:
    table = number_table(lang)
    longest_first = sorted(table, key=len, reverse=True)
    pattern = rf"(?<!\S)({'|'.join(longest_first)})(?!\S)"
    return re.sub(pattern, lambda match: table[match[1]], text)


def obeyed(text: str, value: str, lang: str) -> bool:
    """Whether numbers are in digits alone, or in words alone, and there are some."""
    has_digits, has_words = bool(re.search(r"\d", text)), in_digits(text, lang) != text
    return (has_digits, has_words) == (value == "digits", value == "words")


def speak(folder: Path, lang: str, count: int, seed: int, heldout: bool) -> list[dict]:
    """Manifest lines of clips with a number in at most six words; made once."""
    import numpy as np

    from training.speech.corpus import synthesize
    from training.speech.texts import GRAMMARS, draw

    if not (folder / "manifest.jsonl").is_file():
        rng = np.random.default_rng(seed)
        make = GRAMMARS[LANGUAGES[lang]][1]

        def short():
            while True:
                text = make(rng)
                if len(text.split()) <= MOST_WORDS and in_digits(text, lang) != text:
                    return text

        synthesize(folder, draw(short, count, heldout), seed, heldout, lang=lang)
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [line | {"audio_filepath": f"{folder.name}/{line['audio_filepath']}"} for line in found]


def asked(line: dict, value: str) -> dict:
    lang = line["lang"]
    text = in_digits(line["text"], lang) if value == "digits" else line["text"]
    return line | {"text": text, "source_lang": lang, "target_lang": lang, "itn": value}


def write_manifest(path: Path, lines) -> None:
    from fastconformer.checkpoint.files import write_text

    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def start_model(lines: list[dict]):
    """The base's front end and encoder under a decoder with random weights, and a tokenizer of its
    own for each language."""
    import torch

    from converters.train_tokenizer import train_tokenizer
    from fastconformer import ASRModel, ModelConfig, load_model
    from fastconformer.checkpoint import read_checkpoint
    from fastconformer.text.tokenizer import load_tokenizer, sentencepiece_files

    template, base = read_checkpoint(TEMPLATE), load_model(BASE)
    config = copy.deepcopy(template.config)
    special = config["tokenizer"]["langs"]["spl_tokens"]
    langs, files = {"spl_tokens": special}, {}
    for name in special.values():
        if str(name).startswith("nemo:"):
            files[name[5:]] = template.tokenizer_files[name[5:]]
    for lang in LANGUAGES:
        texts = [line["text"] for line in lines if line["lang"] == lang]
        written = sentencepiece_files(train_tokenizer(texts, PIECES))
        names = zip(("model_path", "spe_tokenizer_vocab", "vocab_path"), written, strict=True)
        langs[lang] = {"dir": lang, "type": "bpe"}
        langs[lang] |= {key: f"nemo:{lang}_{name}" for key, name in names}
        files |= {f"{lang}_{name}": content for name, content in written.items()}
    config["tokenizer"]["langs"] = langs
    tokenizer = load_tokenizer(config, files)
    own = base.config.nemo
    for key in ("preprocessor", "encoder", "spec_augment"):
        config[key] = copy.deepcopy(own[key])
    sizes = {"hidden_size": WIDTH, "inner_size": 4 * WIDTH, "num_attention_heads": 4}
    config["model_defaults"] = dict.fromkeys(config["model_defaults"], WIDTH)
    config["transf_encoder"] |= sizes
    config["transf_decoder"]["config_dict"] |= sizes | {"num_layers": DECODER_LAYERS}
    classes = -(-tokenizer.vocab_size // 8) * 8
    config["head"] |= {"hidden_size": WIDTH, "num_classes": classes}
    torch.manual_seed(1)
    model = ASRModel(ModelConfig.from_nemo(config), tokenizer, files)
    model.encoder.load_state_dict(base.encoder.state_dict())
    return model.eval()


def text_loss(model, lines: list[dict], folder: Path) -> float:
    """Nats per token of text and end, of clips never heard."""
    import torch

    from fastconformer.audio.files import load_audio

    total = count = 0.0
    for line in lines:
        audio = torch.from_numpy(load_audio(folder / line["audio_filepath"], model.sample_rate))
        ids, n_prompt = model.decoder_ids(line)
        with torch.inference_mode():
            encoded, lengths = model.encode(
                *model.featurize(audio[None], torch.tensor([len(audio)]))
            )
            losses = model.losses(
                *(encoded, lengths, torch.tensor([ids]), torch.tensor([len(ids)])),
                prompt_lengths=torch.tensor([n_prompt]),
            )
        total, count = total + losses["aed"].item(), count + len(ids) - n_prompt
    return total / count


def measure(model, lines: list[dict], folder: Path) -> dict:
    """Per language: WER of both values, and how many clips obeyed."""
    from fastconformer.text.metrics import word_errors

    found = {}
    for lang in LANGUAGES:
        mine = [line for line in lines if line["lang"] == lang]
        texts = model.transcribe(
            [folder / line["audio_filepath"] for line in mine],
            prompt=[
                {key: line[key] for key in ("source_lang", "target_lang", "itn")} for line in mine
            ],
        )
        for line, text in zip(mine, texts, strict=True):
            line["said"] = text.text
        row = {"clips": len({line["audio_filepath"] for line in mine})}
        for value in VALUES:
            half = [line for line in mine if line["itn"] == value]
            errors = word_errors([x["text"] for x in half], [x["said"] for x in half])
            row[f"wer_{value}"] = round(100 * errors.rate, 2)
            row[f"obeyed_{value}"] = sum(obeyed(x["said"], value, lang) for x in half) / len(half)
        found[lang] = row
    loss = round(text_loss(model, lines, folder), 4)
    return found | {"loss_per_text_token": loss, "long": long_recordings(model, lines, folder)}


def long_recordings(model, lines: list[dict], folder: Path) -> dict:
    """WER where the clips of a language follow one another in one recording with pauses between,
    cut as NeMo cuts and in pauses. The model knows clips of 3 s, so that pieces are a tenth of
    NeMo's 30 to 40 s; the second that they share stays one."""
    import numpy as np

    from fastconformer.audio.files import load_audio
    from fastconformer.recordings import overlaps
    from fastconformer.text.metrics import word_errors

    found, rng = {}, np.random.default_rng(3)
    for lang in LANGUAGES:
        mine = [line for line in lines if line["lang"] == lang and line["itn"] == "words"]
        parts = []
        for line in mine:
            pause = np.zeros(int(rng.uniform(*PAUSES_S) * model.sample_rate), np.float32)
            parts += [load_audio(folder / line["audio_filepath"], model.sample_rate), pause]
        audio, text = np.concatenate(parts), " ".join(line["text"] for line in mine)
        slots = {"prompt": model.head("aed").slots_of(mine[0])}
        own = overlaps.SHORTEST_S, overlaps.LONGEST_S
        overlaps.SHORTEST_S, overlaps.LONGEST_S = SCALED_S
        try:
            said = {"as NeMo": model.transcribe(audio, **slots)[0].text}
        finally:
            overlaps.SHORTEST_S, overlaps.LONGEST_S = own
        quiet = model.transcribe(audio, long="quiet", window_s=SCALED_S[1], **slots)[0]
        said["in pauses"] = quiet.text
        errors = {way: word_errors([text], [written]) for way, written in said.items()}
        found[lang] = {"seconds": round(len(audio) / model.sample_rate, 1)}
        found[lang] |= {f"wer {way}": round(100 * e.rate, 2) for way, e in errors.items()}
    return found


def main(argv=None) -> int:
    parser = cli.parser(
        "benchmarks.canary_learning", __doc__.split("\n\n")[0], "--folder runs/canary_learning"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/canary_learning"))
    parser.add_argument("--count", type=int, default=700, help="clips of a language to learn from")
    parser.add_argument("--test", type=int, default=60, help="clips of a language to measure on")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    add_out(parser, "canary_learning")
    return cli.run("canary_learning", lambda: run(parser.parse_args(argv)))


def run(arguments) -> None:
    import torch

    from fastconformer import load_model
    from fastconformer.checkpoint.nemo_archive import write_nemo
    from training import finetune

    torch.set_num_threads(1)
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    heard = [
        asked(line, value)
        for lang in LANGUAGES
        for line in speak(folder / lang, lang, arguments.count, 1, heldout=False)
        for value in VALUES
    ]
    unheard = [
        asked(line, value)
        for lang in LANGUAGES
        for line in speak(folder / f"{lang}_test", lang, arguments.test, 2, heldout=True)
        for value in VALUES
    ]
    write_manifest(folder / "train.jsonl", heard)
    write_manifest(folder / "test.jsonl", unheard)
    start = folder / "start.nemo"
    if not start.is_file():
        write_nemo(start, start_model(heard).to_checkpoint())
    result = {"machine": machine(), "versions": versions(), "runs": {}}
    for name in arguments.runs:
        words = [str(RECIPE), f"output={folder / name}", f"model.init_from={start}"]
        words += [f"data.train=[{folder / 'train.jsonl'}]", f"loss.mask_prompt={RUNS[name]}"]
        trained = folder / name / "model.nemo"
        if not trained.is_file() and finetune.main([*words, *arguments.overrides]):
            raise cli.Failed(f"the run in {folder / name} did not end well")
        model = load_model(trained).eval()
        result["runs"][name] = measure(model, unheard, folder)
        print(name, result["runs"][name], flush=True)
    write_result(arguments.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
