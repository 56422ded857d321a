"""Trains an n-gram language model on text: an ARPA file for `--lm` of transcribe and evaluate.

    python -m converters.train_lm texts.txt train.jsonl --order 3 -o words.arpa
    python -m converters.train_lm texts.txt --order 5 --tokens model.nemo -o tokens.arpa.gz

Of words, or with --tokens of the pieces of a model's tokenizer. Inputs are text files with a
sentence a line (of lines with tabs, the last field) and manifests. The words must be written as the
model writes them: in lower case without punctuation, if that is what it was trained on.

Source: interpolated Kneser-Ney with modified discounts (Chen & Goodman 1999), not pruned.
"""

import gzip
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from converters.train_tokenizer import read_texts
from fastconformer import cli
from fastconformer.checkpoint.files import atomic_file
from fastconformer.checkpoint.read import read_checkpoint
from fastconformer.text.tokenizer import load_tokenizer

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
_NEVER = -99.0  # log10 of what no text continues with: a start


def train_lm(sentences: Iterable[Sequence[str]], order: int) -> Iterator[str]:
    """Lines of an ARPA file.

    Args:
        sentences: words (or tokens) of each.
        order: longest n-gram, at least 1.
    Raises:
        ValueError: no words, or a word that is a marker of the format.
    """
    if order < 1:
        raise ValueError(f"order is {order}, expected at least 1")
    counts = [Counter() for _ in range(order)]
    for words in sentences:
        if not words:
            continue
        if {START, END, UNKNOWN} & set(words):
            raise ValueError(f"a sentence holds {START}, {END} or {UNKNOWN}: {' '.join(words)}")
        padded = (START, *words, END)
        counts[-1].update(zip(*(padded[i:] for i in range(order))))
        for n in range(2, order):  # shorter ones count only where nothing can stand before them
            counts[n - 1].update([padded[:n]] if len(padded) >= n else [])
    for n in range(order - 1, 0, -1):
        for gram in counts[n]:  # how many words an n-gram follows, not how often it occurs
            counts[n - 1][gram[1:]] += 1
    counts[0].pop((START,), None)
    if not counts[0]:
        raise ValueError("there is no text to train a language model on")
    probabilities, weights = _smoothed(counts)
    yield "\\data\\"
    for n, found in enumerate(probabilities, start=1):
        yield f"ngram {n}={len(found)}"
    for n, found in enumerate(probabilities, start=1):
        yield f"\n\\{n}-grams:"
        for gram, p in found.items():
            line = f"{math.log10(p) if p else _NEVER:.6f}\t{' '.join(gram)}"
            weight = weights[n - 1].get(gram)
            yield line if weight is None else f"{line}\t{math.log10(weight):.6f}"
    yield "\n\\end\\"


def _smoothed(counts: list[Counter]):
    """Probability of each n-gram, and the back-off weight of each that is a history, by order."""
    vocabulary = len(counts[0]) + 1  # the unknown word, and not the start
    probabilities, weights = [], [{} for _ in counts]
    for n, found in enumerate(counts):
        discounts = _discounts(found.values())
        totals, left = defaultdict(int), defaultdict(float)
        for gram, count in found.items():
            totals[gram[:-1]] += count
            left[gram[:-1]] += discounts[min(count, 3)]
        if n:
            weights[n - 1] = {history: left[history] / totals[history] for history in totals}
        smoothed = {}
        for gram, count in found.items():
            history = gram[:-1]
            shorter = probabilities[n - 1][gram[1:]] if n else 1 / vocabulary
            share = (count - discounts[min(count, 3)]) / totals[history]
            smoothed[gram] = share + left[history] / totals[history] * shorter
        if n == 0:
            smoothed[UNKNOWN,] = left[()] / totals[()] / vocabulary
            smoothed[START,] = 0.0
        probabilities.append(smoothed)
    return probabilities, weights


def _discounts(counts: Iterable[int]) -> list[float]:
    """What is taken off counts of 0, 1, 2, and 3 or more."""
    of = Counter(min(count, 4) for count in counts)
    if not all(of[k] for k in (1, 2, 3)):
        return [0.0, 0.5, 0.75, 0.75]  # too little text for an estimate
    y = of[1] / (of[1] + 2 * of[2])
    estimates = [k - (k + 1) * y * of[k + 1] / of[k] for k in (1, 2, 3)]
    return [0.0, *(min(max(d, 0.1), k - 0.1) for k, d in enumerate(estimates, start=1))]


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser("converters.train_lm", __doc__, "train.jsonl --order 3 -o words.arpa")
    parser.add_argument("inputs", nargs="+", type=Path, help="text files, manifests (.jsonl)")
    parser.add_argument("--order", type=int, default=3, help="longest n-gram (%(default)s)")
    parser.add_argument("--tokens", type=Path, metavar="MODEL", help="model whose pieces to count")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".arpa or .arpa.gz")
    args = parser.parse_args(argv)
    if args.order < 1:
        parser.error(f"--order is {args.order}, expected at least 1")

    def job():
        cli.check_output(args.output, *args.inputs)
        texts = [line.rsplit("\t", 1)[-1] for path in args.inputs for line in read_texts(path)]
        words = (text.split() for text in texts)
        sentences = _pieces(texts, args.tokens) if args.tokens else words
        lines = "\n".join(train_lm(sentences, args.order)) + "\n"
        with atomic_file(args.output) as temporary:
            content = lines.encode()
            gz = args.output.suffix == ".gz"
            temporary.write_bytes(gzip.compress(content, 6, mtime=0) if gz else content)
        print(f"{args.order}-grams of {len(texts)} lines -> {args.output}")

    return cli.run("train_lm", job)


def _pieces(texts: list[str], model: Path) -> Iterator[list[str]]:
    checkpoint = read_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint.config, checkpoint.tokenizer_files)
    for text in texts:
        pieces = tokenizer.ids_to_pieces(tokenizer.encode(text))
        # a file of words between spaces cannot hold a space, and <unk> has its own meaning
        yield ["▁" if piece == " " else piece for piece in pieces if piece != UNKNOWN]


if __name__ == "__main__":
    sys.exit(main())
