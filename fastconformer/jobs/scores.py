"""Error rates of a model on clips with reference texts, and the difference of two results."""

import json
from collections import Counter
from pathlib import Path

from ..formats.manifest import DURATION_MISMATCH, Clip
from ..text.metrics import (
    ErrorCounts,
    bootstrap_difference,
    char_errors,
    normalize,
    word_errors,
)
from .rounds import transcribe_clips

LISTED = 10  # utterances, or skipped lines, shown on the terminal; the result file has all
CONFIDENCE = 0.95


def evaluate(model, clips, head=None, batch_size=16, normalizer="basic", **decoding) -> dict:
    """Transcribes clips that have a reference text and counts the errors.

    Args:
        model: an ASRModel; clips: from `read_manifest`; head: None is the model's default;
        decoding: see DecodingOptions.
    Returns:
        What the result file holds, of types that JSON has: "raw" and "normalized" counts,
        "empty_outputs", one entry for each of "utterances" and "skipped".
    """
    utterances, skipped = [], []
    with_text = []
    for clip in clips:
        if clip.text is None:
            skipped.append(_skipped(clip, "the line has no text"))
        else:
            with_text.append(clip)
    results = transcribe_clips(model, with_text, head, batch_size, **decoding)
    for clip, transcript, reason in results:
        reason = reason or _duration_mismatch(clip, transcript.duration)
        if reason:
            skipped.append(_skipped(clip, reason))
        else:
            pair = model.head(head).language_pair(decoding | clip.others)
            utterances.append(_utterance(clip, transcript, normalizer, pair))
    references = [u["reference"] for u in utterances]
    hypotheses = [u["hypothesis"] for u in utterances]
    return {
        "head": head or model.heads[0],
        "normalizer": normalizer,
        "n_utterances": len(utterances),
        "audio_s": round(sum(u["duration"] for u in utterances), 3),
        "empty_outputs": sum(not text.strip() for text in hypotheses),
        "raw": _corpus(references, hypotheses, "none"),
        "normalized": _corpus(references, hypotheses, normalizer),
        **_by_pair(utterances, normalizer),
        "n_skipped": len(skipped),
        "skipped": skipped,
        "utterances": utterances,
    }


def _by_pair(utterances: list[dict], normalizer: str) -> dict:
    """{"pairs": {"de>en": counts}} of lines that say what is spoken and what is written; of
    translations also corpus BLEU and chrF, where sacrebleu is installed."""
    pairs: dict[str, list[dict]] = {}
    for utterance in utterances:
        if "pair" in utterance:
            pairs.setdefault(utterance["pair"], []).append(utterance)
    found = {}
    for pair, members in sorted(pairs.items()):
        references = [u["reference"] for u in members]
        hypotheses = [u["hypothesis"] for u in members]
        source, _, target = pair.partition(">")
        found[pair] = {
            "n_utterances": len(members),
            "raw": _corpus(references, hypotheses, "none"),
            "normalized": _corpus(references, hypotheses, normalizer),
            **(translation_scores(references, hypotheses) if source != target else {}),
        }
    return {"pairs": found} if found else {}


def translation_scores(references: list[str], hypotheses: list[str]) -> dict:
    """{"bleu": ..., "chrf": ...} of a corpus, 0 to 100; empty without sacrebleu, which the extra
    `eval` brings."""
    try:
        import sacrebleu  # optional
    except ModuleNotFoundError:
        return {}
    return {
        "bleu": round(sacrebleu.corpus_bleu(hypotheses, [references]).score, 4),
        "chrf": round(sacrebleu.corpus_chrf(hypotheses, [references]).score, 4),
    }


def _skipped(clip: Clip, reason: str) -> dict:
    return {"audio": clip.audio, "reason": f"{clip.place}: {reason}" if clip.place else reason}


def _duration_mismatch(clip: Clip, seconds: float) -> str:
    declared = clip.duration_s
    if declared is None or seconds / DURATION_MISMATCH <= declared <= seconds * DURATION_MISMATCH:
        return ""
    return f"duration is {declared:g} s in the manifest, the audio has {seconds:.3f} s"


def _utterance(clip: Clip, transcript, normalizer: str, pair: str | None) -> dict:
    raw = word_errors([clip.text], [transcript.text])
    normalized = _normalized_errors(clip.text, transcript.text, normalizer)
    section = {} if clip.offset_s is None else {"offset": clip.offset_s}
    section |= {"pair": pair} if pair else {}
    return {"audio": clip.audio} | section | {
        "duration": round(transcript.duration, 6),
        "reference": clip.text,
        "hypothesis": transcript.text,
        "errors": raw.errors,
        "words": raw.words,
        "normalized_errors": normalized.errors,
        "normalized_words": normalized.words,
    }  # fmt: skip


def _normalized_errors(reference: str, hypothesis: str, normalizer: str) -> ErrorCounts:
    return word_errors([normalize(reference, normalizer)], [normalize(hypothesis, normalizer)])


def _corpus(references, hypotheses, normalizer: str) -> dict:
    references = [normalize(text, normalizer) for text in references]
    hypotheses = [normalize(text, normalizer) for text in hypotheses]
    words, characters = word_errors(references, hypotheses), char_errors(references, hypotheses)
    pairs = zip(references, hypotheses, strict=True)
    n_correct = sum(a.split() == b.split() for a, b in pairs)
    return {
        "n_correct": n_correct,
        "sequence_accuracy": n_correct / max(1, len(references)),
        "wer": words.rate,
        "errors": words.errors,
        "words": words.words,
        "insertions": words.insertions,
        "deletions": words.deletions,
        "substitutions": words.substitutions,
        "cer": characters.rate,
        "char_errors": characters.errors,
        "chars": characters.words,
        "char_insertions": characters.insertions,
        "char_deletions": characters.deletions,
        "char_substitutions": characters.substitutions,
    }


def read_results(path) -> dict:
    """An older result file. FileNotFoundError, or ValueError if it is not one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such result file; write one with --output")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for utterance in results["utterances"]:
            for key in ("audio", "reference", "hypothesis"):
                if not isinstance(utterance[key], str):
                    raise ValueError(f"{key} is not a string")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is not a result file of fastconformer.evaluate --output: {reason}"
        ) from None
    return results


def _by_key(items, key_of) -> dict:
    """Items by key; the second of equal keys becomes (key, 2) and so on."""
    seen, found = Counter(), {}
    for item in items:
        key = key_of(item)
        seen[key] += 1
        found[key, seen[key]] = item
    return found


def _utterance_key(utterance: dict):
    return utterance["audio"], utterance.get("offset")


def compare(new: dict, old: dict, normalizer: str, seed: int = 0) -> dict:
    """Two results on the same utterances: who was lost and won, and an interval for the difference.

    Errors of both are counted anew under `normalizer`, so that results written with different ones
    compare. Returns, besides WER of both and their difference (new minus old), its 95 % bootstrap
    interval, whether zero lies inside, and the utterances with more (lost) and fewer (won) errors,
    the largest change first. Raises ValueError where the utterances or their references differ.
    """
    after, before = (_by_key(r["utterances"], _utterance_key) for r in (new, old))
    _same_utterances(after, before)
    changes, counts = [], []
    for key, utterance in after.items():
        reference = utterance["reference"]
        if reference != before[key]["reference"]:
            raise ValueError(
                f"the reference of {utterance['audio']} differs: {reference!r} here, "
                f"{before[key]['reference']!r} in the older result"
            )
        texts = utterance["hypothesis"], before[key]["hypothesis"]
        now, then = (_normalized_errors(reference, text, normalizer) for text in texts)
        counts.append((now, then))
        changes.append(
            {
                "audio": utterance["audio"],
                "change": now.errors - then.errors,
                "words": now.words,
                "reference": reference,
                "before": texts[1],
                "after": texts[0],
            }
        )
    if not counts:
        raise ValueError("the two results have no utterances to compare")
    wer_after, wer_before = (sum((pair[k] for pair in counts), ErrorCounts()).rate for k in (0, 1))
    low, high = bootstrap_difference(
        [now.errors for now, _ in counts],
        [then.errors for _, then in counts],
        [now.words for now, _ in counts],
        confidence=CONFIDENCE,
        seed=seed,
    )
    changes.sort(key=lambda c: -abs(c["change"]))
    return {
        "normalizer": normalizer,
        "wer_before": wer_before,
        "wer_after": wer_after,
        "difference": wer_after - wer_before,
        "interval": [low, high],
        "confidence": CONFIDENCE,
        "zero_inside": low <= 0 <= high,
        "lost": [c for c in changes if c["change"] > 0],
        "won": [c for c in changes if c["change"] < 0],
    }


def check_comparable(clips: list[Clip], old: dict) -> None:
    """ValueError where an older result has utterances that these clips lack: no transcription will
    bring them."""
    here = _by_key(clips, lambda clip: (clip.audio, clip.offset_s))
    there = _by_key(old["utterances"], _utterance_key)
    _same_utterances({key: here[key] for key in here if key in there}, there)


def _same_utterances(after: dict, before: dict):
    differences = []
    for one, other, where in ((after, before, "only here"), (before, after, "only in the older")):
        names = [key[0][0] for key in one if key not in other]
        if names:
            more = ", ..." if len(names) > 3 else ""
            differences.append(f"{len(names)} {where} ({', '.join(names[:3])}{more})")
    if differences:
        raise ValueError(
            "the two results have different utterances: " + "; ".join(differences)
            + "; evaluate both models on one manifest"
        )  # fmt: skip


def table(results: dict) -> str:
    """The counts of a result, as lines."""
    name = results["normalizer"]
    summary = (
        f"{results['n_utterances']} utterances, {results['audio_s'] / 60:.1f} min, "
        f"head {results['head']}, {results['empty_outputs']} empty outputs, "
        f"{results['n_skipped']} skipped"
        + (f", {results['n_skipme']} left out by _skipme" if results.get("n_skipme") else "")
    )
    lines = [
        summary,
        f"{'':12}{'rate %':>8}{'errors':>9}{'of':>9}{'ins':>7}{'del':>7}{'sub':>7}",
    ]
    for unit, rate, prefix, total in (
        ("WER", "wer", "", "words"),
        ("CER", "cer", "char_", "chars"),
    ):
        for label, part in (("raw", results["raw"]), (name, results["normalized"])):
            counts = [part[prefix + key] for key in ("insertions", "deletions", "substitutions")]
            lines.append(
                f"{unit + ' ' + label:12}{100 * part[rate]:8.2f}{part[prefix + 'errors']:9d}"
                f"{part[total]:9d}{counts[0]:7d}{counts[1]:7d}{counts[2]:7d}"
            )
    right = [
        f"{100 * part['sequence_accuracy']:.2f} % {label}"
        for label, part in (("raw", results["raw"]), (name, results["normalized"]))
    ]
    lines.append(f"utterances without an error: {', '.join(right)}")
    for pair, scores in results.get("pairs", {}).items():
        text = f"{pair}: {scores['n_utterances']} utterances, WER {name} "
        text += f"{100 * scores['normalized']['wer']:.2f} %"
        if "bleu" in scores:
            text += f", BLEU {scores['bleu']:.2f}, chrF {scores['chrf']:.2f}"
        elif len(set(pair.split(">"))) > 1:
            text += '; BLEU and chrF need pip install -e ".[eval]"'
        lines.append(text)
    return "\n".join(lines)


def comparison_table(comparison: dict) -> str:
    """The difference of two results, as lines."""
    low, high = (100 * end for end in comparison["interval"])
    verdict = (
        "zero lies inside: may be chance" if comparison["zero_inside"] else "zero lies outside"
    )
    summary = (
        f"WER {comparison['normalizer']}: {100 * comparison['wer_before']:.2f} % before, "
        f"{100 * comparison['wer_after']:.2f} % after; difference "
        f"{100 * comparison['difference']:+.2f} points, "
        f"{100 * comparison['confidence']:.0f} % interval [{low:+.2f}, {high:+.2f}], {verdict}"
    )
    lines = [summary]
    for title in ("lost", "won"):
        changed = comparison[title]
        total = abs(sum(c["change"] for c in changed))
        lines.append(f"{title}: {len(changed)} utterances, {total} words")
        for change in changed[:LISTED]:
            lines.append(f"  {change['change']:+d} of {change['words']}  {change['audio']}")
            lines += [f"      {key:10}{change[key]}" for key in ("reference", "before", "after")]
        if len(changed) > LISTED:
            lines.append(f"  and {len(changed) - LISTED} more")
    return "\n".join(lines)
