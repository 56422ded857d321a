"""Merges two SentencePiece models, so that a model can learn a new language and keep the old one.

The pieces of A keep their ids, the new pieces of B follow. A's normalisation rules and trainer spec
stay. With --old-text and --new-text (an utterance a line, or manifests) the scores of the new
pieces are chosen so that at most 2 % of unseen lines of the old language are written otherwise and
the new language uses as many of its pieces as that allows; without --old-text only pieces with a
character that A lacks are used, which changes no line that A can write.

Writes tokenizer.model, tokenizer.vocab, vocab.txt and report.json.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import sentencepiece

from converters.train_tokenizer import read_texts
from fastconformer import cli
from fastconformer.checkpoint.files import filled_folder
from fastconformer.surgery.pieces import processor, score_pieces
from fastconformer.text.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)
from fastconformer.text.tokenizer import sentencepiece_files

MAX_SEARCH_LINES = 20_000  # of each text; the report counts all lines


def merge_tokenizers(
    old: bytes,
    new: bytes,
    old_text: list[str] | None = None,
    new_text: list[str] | None = None,
) -> tuple[bytes, dict]:
    """The merged model and its report.

    Args:
        old, new: serialised SentencePiece models, A and B.
        old_text, new_text: utterances of A's and of B's language; lines without text are ignored.
    Raises:
        ValueError: not SentencePiece models, model types that cannot be merged, or a merge that
            would change nothing.
    """
    a, b = _read(old, "A"), _read(new, "B")
    _check_types(a, b)
    old_text, new_text = _lines(old_text), _lines(new_text)
    added, left_out = new_pieces(a, b, old_text)
    if not added:
        raise ValueError(
            f"every piece of B ({len(b.pieces)}) is in A ({len(a.pieces)}) or is not a piece of "
            "text: merging changes nothing"
        )
    sample = [None if text is None else text[:MAX_SEARCH_LINES] for text in (old_text, new_text)]
    merged, decided = score_pieces(_without_self_test(a), added, b.kind, *sample)
    used = [piece for piece in merged.pieces[len(a.pieces) :] if piece.type != UNUSED]
    if not used:
        advice = (
            "no price keeps A's segmentation and uses one"
            if old_text is not None
            else "all their characters are A's, so give --old-text and --new-text"
        )
        raise ValueError(
            f"none of B's {len(added)} new pieces would ever be used: merging changes nothing; "
            f"{advice}"
        )
    data = merged.to_bytes()
    report = {
        "pieces": {"A": len(a.pieces), "B": len(b.pieces), "merged": len(merged.pieces)},
        "types": {"A": a.kind, "B": b.kind, "merged": merged.kind},
        "overlap": len(_texts(a) & _texts(b)),
        "new": len(added),
        "new_that_can_be_used": len(used),
        "left_out_of_B": left_out,
        "scores": decided,
        "old_language": _compare(a, merged, old_text),
        "new_language": _compare(a, merged, new_text),
        "normalisation": _normalisation(a, b, added, new_text),
    }
    if old_text is None:
        report["old_language"] = {
            "segmentation_changed": "0 % of the lines that A writes without unknown characters"
        }
    return data, report


def _read(data: bytes, name: str) -> SentencePieceModel:
    try:
        model = SentencePieceModel.from_bytes(data)
        sentencepiece.SentencePieceProcessor(model_proto=data)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is not a SentencePiece model: {error}") from None
    return model


def _check_types(a: SentencePieceModel, b: SentencePieceModel) -> None:
    if a.kind in ("bpe", "unigram") and b.kind in ("bpe", "unigram", "char"):
        return
    if a.kind == b.kind == "char":
        return
    if a.kind == "char":
        raise ValueError(
            f"A splits text into characters, B is {b.kind}: its longer pieces would never be used. "
            "To add only characters: python -m converters.train_tokenizer TEXT --extend A.model"
        )
    which = "A" if a.kind not in ("bpe", "unigram") else "B"
    raise ValueError(
        f"{which} is a {(a if which == 'A' else b).kind} model, whose pieces are whole words; "
        "expected bpe, unigram or char"
    )


def _texts(model: SentencePieceModel) -> set[str]:
    return {piece.text for piece in model.pieces if piece.type in (NORMAL, UNUSED, USER_DEFINED)}


def _lines(text: list[str] | None) -> list[str] | None:
    lines = [line.strip() for line in text or () if line.strip()]
    return lines or None


def _without_self_test(model: SentencePieceModel) -> SentencePieceModel:
    """A's stored test samples hold A's segmentation, which SentencePiece would check on loading."""
    return replace(model, rest=b"")


def new_pieces(a: SentencePieceModel, b: SentencePieceModel, old_text: list[str] | None):
    """B's pieces that A lacks, in B's order, and the names of those that cannot follow.

    Unknown, byte and the four special pieces are left out: A has its own, or, by its trainer spec,
    none. Other control pieces follow. User-defined ones stay so, except where A's text holds them:
    they would always win there, so they compete as normal ones.
    """
    have = {piece.text for piece in a.pieces}
    lines = processor(a).normalize(old_text or [])
    special = set(b.special_pieces)
    added, left_out = [], {}
    for piece in b.pieces:
        if piece.text in have:
            continue
        if piece.type in (UNKNOWN, BYTE) or (piece.type == CONTROL and piece.text in special):
            left_out[piece.text] = {UNKNOWN: "unknown", BYTE: "byte", CONTROL: "control"}[
                piece.type
            ]
            continue
        kind = piece.type
        if kind == UNUSED or (kind == USER_DEFINED and any(piece.text in line for line in lines)):
            kind = NORMAL
        have.add(piece.text)
        added.append(replace(piece, type=kind))
    return added, left_out


def _compare(a: SentencePieceModel, merged: SentencePieceModel, lines: list[str] | None):
    """How A and the merged model write a text."""
    if lines is None:
        return None
    before, after = processor(a).encode(lines), processor(merged).encode(lines)
    words = max(1, sum(len(line.split()) for line in lines))
    unknown = {p.text: i for i, p in enumerate(a.pieces) if p.type == UNKNOWN}
    unknown_ids = set(unknown.values())

    def of(ids):
        tokens = [i for line in ids for i in line]
        n = max(1, len(tokens))
        return {
            "tokens_per_word": round(len(tokens) / words, 3),
            "unknown_rate": round(sum(i in unknown_ids for i in tokens) / n, 5),
            "new_piece_share": round(sum(i >= len(a.pieces) for i in tokens) / n, 4),
        }

    changed = sum(x != y for x, y in zip(before, after, strict=True))
    return {
        "lines": len(lines),
        "lines_changed": changed,
        "segmentation_changed": round(changed / len(lines), 4),
        "A": of(before),
        "merged": of(after),
    }


def _normalisation(a, b, added, new_text) -> dict:
    """What A's rules do to B's pieces and text, where B's own are other rules."""
    from_a, from_b = processor(a), processor(b)
    differing = [key for key, value in a.normalizer.items() if b.normalizer[key] != value]
    found = {"rules": a.normalizer["name"], "rules_of_B": b.normalizer["name"],
             "differing": differing}  # fmt: skip
    if not differing:
        return found
    dead = [p.text for p in added if p.type == NORMAL and not _survives(from_a, p.text)]
    found["pieces_that_A_never_makes"] = len(dead)
    found["such_as"] = dead[:8]
    if new_text is not None:
        pairs = [(from_a.normalize(line), from_b.normalize(line), line) for line in new_text]
        other = [(x, y, line) for x, y, line in pairs if x.strip("▁") != y.strip("▁")]
        found["new_lines_written_otherwise"] = len(other)
        found["examples"] = [{"text": t, "with_A": x, "with_B": y} for x, y, t in other[:3]]
    return found


def _survives(processor_of_a, text: str) -> bool:
    surface = text.replace("▁", " ").strip()
    if not surface:
        return True
    return processor_of_a.normalize(surface).strip("▁") == surface.replace(" ", "▁")


def describe(report: dict) -> str:
    """The report as lines to read."""
    pieces, types, scores = report["pieces"], report["types"], report["scores"]
    lines = [
        f"A {pieces['A']} pieces ({types['A']}), B {pieces['B']} ({types['B']}), "
        f"{report['overlap']} in both: {pieces['merged']} pieces ({types['merged']}), "
        f"{report['new']} of them new",
        f"scores: {scores['rule']}; {report['new_that_can_be_used']} new pieces can be used",
    ]
    if "held_out_changed" in scores:
        share = 100 * scores["held_out_changed"] / scores["lines"]
        of = report.get("measured_on", {}).get("old_language", "the old text")
        lines.append(
            f"held-out lines of {of} that change: {scores['held_out_changed']} of "
            f"{scores['lines']} ({share:.1f} %; cross-validation); of another domain more may, but "
            "training writes lines of retain.lang as before"
        )
    for name in ("old_language", "new_language"):
        found = report[name]
        if not found:
            continue
        if "lines" not in found:
            lines.append(f"{name.replace('_', ' ')}: changed {found['segmentation_changed']}")
            continue
        before, after = found["A"], found["merged"]
        lines.append(
            f"{name.replace('_', ' ')}: {100 * found['segmentation_changed']:.1f} % of "
            f"{found['lines']} lines change; new pieces {100 * after['new_piece_share']:.1f} % of "
            f"tokens; tokens per word {before['tokens_per_word']:.2f} -> "
            f"{after['tokens_per_word']:.2f}; unknown {100 * before['unknown_rate']:.2f} % -> "
            f"{100 * after['unknown_rate']:.2f} %"
        )
    if report["left_out_of_B"]:
        kinds = Counter(report["left_out_of_B"].values())
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(f"left out of B: {listed}")
    rules = report["normalisation"]
    if rules["differing"]:
        lines.append(
            f"normalisation: A's rules ({rules['rules'] or 'unnamed'}) stay, B's "
            f"({rules['rules_of_B'] or 'unnamed'}) differ in {', '.join(rules['differing'])}; A "
            f"never makes {rules['pieces_that_A_never_makes']} new pieces {rules['such_as']}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(
        "converters.merge_tokenizers",
        __doc__,
        "english.model hindi.model -o merged --old-text english.txt --new-text hindi.txt",
    )
    parser.add_argument("old", metavar="A.model", type=Path, help="its pieces keep their ids")
    parser.add_argument("new", metavar="B.model", type=Path, help="its new pieces follow")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--old-text", type=Path, metavar="FILE", help="A's language, a line each")
    parser.add_argument("--new-text", type=Path, metavar="FILE", help="B's language, a line each")
    args = parser.parse_args(argv)

    def job():
        model, report = merge_tokenizers(
            args.old.read_bytes(),
            args.new.read_bytes(),
            *(path and read_texts(path) for path in (args.old_text, args.new_text)),
        )
        named = {"old_language": args.old_text, "new_language": args.new_text}
        report["measured_on"] = {key: str(path) for key, path in named.items() if path}
        text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
        files = sentencepiece_files(model) | {"report.json": text.encode()}
        with filled_folder(args.output) as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
        print(describe(report))
        print(f"-> {args.output}")

    return cli.run("merge_tokenizers", job)


if __name__ == "__main__":
    sys.exit(main())
