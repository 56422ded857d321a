"""Trains a SentencePiece tokenizer on the text of manifests or of a plain text file; with --extend,
adds to an existing one the characters of the text that it cannot write, and nothing else.

Writes tokenizer.model, tokenizer.vocab and vocab.txt, the files a NeMo archive carries.
"""

import io
import json
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import sentencepiece

from fastconformer import cli
from fastconformer.checkpoint.files import filled_folder
from fastconformer.text import read_text
from fastconformer.text.sentencepiece_model import NORMAL, Piece, SentencePieceModel
from fastconformer.text.tokenizer import SentencePieceTokenizer, sentencepiece_files

NORMALIZATIONS = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "nfc", "identity")


def train_tokenizer(
    texts: list[str], vocab_size: int, kind: str = "bpe", normalization: str = "nmt_nfkc"
) -> bytes:
    """The serialised SentencePiece model.

    Args:
        texts: one utterance each.
        vocab_size: pieces, the unknown piece included.
        kind: "bpe" or "unigram".
        normalization: what happens to a text before it is cut into pieces, and so to what a model
            can write: one of NORMALIZATIONS. "nmt_nfkc" (SentencePiece's and NeMo's) takes signs of
            one look for one (a Thai vowel, an Arabic ligature in several letters, a joiner as a
            space); "nfc" composes letters and marks (Unicode's NFC) and changes nothing else;
            "identity" nothing at all; "..._cf" folds case too.
    Raises:
        ValueError: no text, or more pieces than the text supports.
    """
    if not any(text.strip() for text in texts):
        raise ValueError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="ascii") as rules:
        options = {"normalization_rule_name": normalization}
        if normalization == "nfc":  # SentencePiece has no rules of that name
            rules.writelines(nfc_rules())
            rules.flush()
            options = {"normalization_rule_tsv": rules.name}
        _train(texts, model, vocab_size=vocab_size, model_type=kind, **options)
    return model.getvalue()


def nfc_rules() -> Iterator[str]:
    """Lines of SentencePiece's rules, "from\tto" in hexadecimal code points, which compose what
    Unicode's NFC composes; marks that stand in another order than Unicode's keep theirs."""
    rules = {}
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        composed = unicodedata.normalize("NFC", char)
        kinds = {char, unicodedata.normalize("NFD", char)}
        by_one = unicodedata.decomposition(char)
        if by_one and not by_one.startswith("<"):  # as a letter that is half composed, and a mark
            kinds.add("".join(chr(int(part, 16)) for part in by_one.split()))
        rules |= {kind: composed for kind in kinds if kind != composed}
    for source, target in rules.items():
        yield "\t".join(" ".join(f"{ord(c):X}" for c in text) for text in (source, target)) + "\n"


def _train(texts: list[str], model: io.BytesIO, **options) -> None:
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            # Longer lines would be left out without a word; the default is 4192.
            max_sentence_length=max(4192, *(len(text.encode()) + 1 for text in texts)),
            character_coverage=1.0,
            bos_id=-1,
            eos_id=-1,
            unk_id=0,
            shuffle_input_sentence=False,
            minloglevel=2,
            **options,
        )
    except (RuntimeError, OSError) as error:
        size, kind = options["vocab_size"], options["model_type"]
        raise ValueError(f"{size} {kind} pieces cannot be trained: {error}") from None


def extend_tokenizer(model: bytes, texts: list[str]) -> tuple[bytes, list[str]]:
    """The model and one piece more for each character that it cannot write, most frequent first.

    Its own pieces keep their ids, its rules stay, and a text without such characters is written as
    before: no new piece joins with another, and none scores above the lowest of its own.

    Returns:
        The new model, and the characters.
    Raises:
        ValueError: not a SentencePiece model, no text, or the model can write every character.
    """
    if not any(text.strip() for text in texts):
        raise ValueError("there is no text to take characters from")
    old = SentencePieceModel.from_bytes(model)
    normalize = SentencePieceTokenizer(model).processor.normalize
    counts = Counter("".join(normalize(text) for text in texts))
    known = {piece.text for piece in old.pieces}
    missing = sorted((c for c in counts if c not in known and c != "▁"), key=lambda c: -counts[c])
    if not missing:
        raise ValueError(
            f"the tokenizer already has all {len(counts)} characters of the text; "
            "there is nothing to add"
        )
    lowest = min((piece.score for piece in old.pieces if piece.type == NORMAL), default=0.0)
    added = [Piece(char, lowest) for char in missing]
    # Stored samples of the old segmentation, which SentencePiece would check, go.
    return replace(old, pieces=(*old.pieces, *added), rest=b"").to_bytes(), missing


def read_texts(path: Path) -> list[str]:
    """`text` of every line of a .json/.jsonl manifest, or the lines of a text file."""
    content = read_text(path)
    if path.suffix not in (".json", ".jsonl"):
        return content.splitlines()
    texts = []
    # Not splitlines: what Unicode calls a line's end may stand within a JSON string.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: not a JSON line with a text")
        texts.append(text)
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(
        "converters.train_tokenizer", __doc__, "train.jsonl --size 512 -o tokenizer"
    )
    parser.add_argument("inputs", nargs="+", type=Path, help="manifests (.jsonl) or text files")
    parser.add_argument("--size", type=int, help="number of pieces")
    parser.add_argument("--type", choices=("bpe", "unigram"), help="(bpe)")
    parser.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        help="nfc and identity keep a script's own signs (nmt_nfkc)",
    )
    parser.add_argument(
        "--extend", type=Path, metavar="MODEL", help="instead: add missing characters to this one"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if (args.size is None) == (args.extend is None):
        parser.error("give --size to train a tokenizer, or --extend to add characters to one")
    if args.extend is not None and (args.type or args.normalization):
        parser.error("--type and --normalization are of a new tokenizer, --extend keeps the old's")
    if args.size is not None and args.size < 1:
        parser.error(f"--size is {args.size}, expected at least 1")

    def job():
        texts = [text for path in args.inputs for text in read_texts(path)]
        if args.extend is None:
            kind, rules = args.type or "bpe", args.normalization or "nmt_nfkc"
            model = train_tokenizer(texts, args.size, kind, rules)
            made = f"{args.size} pieces"
        else:
            model, added = extend_tokenizer(args.extend.read_bytes(), texts)
            made = f"{len(added)} new characters ({' '.join(added)})"
        files = sentencepiece_files(model)
        with filled_folder(args.output) as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
        print(f"{made} from {len(texts)} lines -> {args.output}")

    return cli.run("train_tokenizer", job)


if __name__ == "__main__":
    sys.exit(main())
