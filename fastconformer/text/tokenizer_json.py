"""A SentencePiece model as tokenizer.json, the form of Hugging Face's `tokenizers`, and back.

The model's kind decides the form: unigram stays unigram with its scores, BPE becomes a list of
merges in the order of the scores. Neither package is needed. What differs: a piece that merges in
two ways has one score in SentencePiece and two ranks here, which texts hardly ever show.
Source: tokenizers 0.23, transformers 5.24 (the way back takes the files of its own conversions).
"""

import base64
import binascii
import re

from .sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    NORMALIZER,
    TRAINER,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    spec_bytes,
)

SPACE = "▁"
UNKNOWN_TEXT = " ⁇ "  # what SentencePiece writes for the unknown piece
EXTRA_SPACES, OUTER_SPACES = " {2,}", r"\A +| +\z"  # of spaces alone, as SentencePiece does


def tokenizer_json(model: SentencePieceModel, blank: str) -> dict:
    """The file's content; `blank` is one more token, behind all pieces.

    ValueError: a model of another kind, or with options that `tokenizers` cannot express.
    """
    if model.kind not in ("unigram", "bpe"):
        raise ValueError(f"the tokenizer's model is {model.kind}, expected unigram or bpe")
    for name, wanted in (("escape_whitespaces", 1), ("treat_whitespace_as_suffix", 0)):
        value = {**model.normalizer, **model.trainer}[name]
        if value != wanted:
            raise ValueError(f"the tokenizer's {name} is {value}, expected {wanted}")
    texts = [piece.text for piece in model.pieces]
    if len(set(texts)) < len(texts) or blank in texts:
        raise ValueError("a piece stands twice in the tokenizer's model")
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN), None)
    if unknown is None:
        raise ValueError("the tokenizer's model has no unknown piece")
    added = [
        _added_token(i, piece.text, special=True)
        for i, piece in enumerate(model.pieces)
        if piece.type == CONTROL
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*added, _added_token(len(texts), blank, special=True)],
        "normalizer": _normalizer(model.normalizer),
        "pre_tokenizer": _whole_pieces(model),
        "post_processor": None,
        "decoder": _decoder(model, texts[unknown]),
        "model": _unigram(model, unknown) if model.kind == "unigram" else _bpe(model, unknown),
    }


def _added_token(index: int, text: str, special: bool) -> dict:
    sides = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": text, **sides, "special": special}


def _normalizer(normalizer: dict) -> dict | None:
    steps = []
    if normalizer["precompiled_charsmap"]:
        encoded = base64.b64encode(normalizer["precompiled_charsmap"]).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if normalizer["remove_extra_whitespaces"]:
        steps.append({"type": "Replace", "pattern": {"Regex": OUTER_SPACES}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": EXTRA_SPACES}, "content": " "})
    # Not by the Metaspace pre-tokenizer, which takes a text's own first space for the added one.
    if normalizer["add_dummy_prefix"]:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _whole_pieces(model: SentencePieceModel) -> dict | None:
    """User-defined pieces are found first, and stay whole."""
    texts = [piece.text for piece in model.pieces if piece.type == USER_DEFINED]
    if not texts:
        return None
    pattern = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    return {**split, "behavior": "Isolated", "invert": False}


def _decoder(model: SentencePieceModel, unknown: str) -> dict:
    steps = [{"type": "Replace", "pattern": {"String": unknown}, "content": UNKNOWN_TEXT}]
    steps.append({"type": "Replace", "pattern": {"String": SPACE}, "content": " "})
    if model.trainer["byte_fallback"]:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if model.normalizer["add_dummy_prefix"]:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(model: SentencePieceModel, unknown: int) -> dict:
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
        "byte_fallback": bool(model.trainer["byte_fallback"]),
    }


def _bpe(model: SentencePieceModel, unknown: int) -> dict:
    ids = {piece.text: i for i, piece in enumerate(model.pieces) if piece.type == NORMAL}
    merges = []
    for text, i in ids.items():
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(-model.pieces[i].score, i, list(pair)) for pair in pairs]
    merges.sort(key=lambda merge: merge[:2])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[unknown].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(model.trainer["byte_fallback"]),
        "ignore_merges": any(piece.type == USER_DEFINED for piece in model.pieces),
        "vocab": {piece.text: i for i, piece in enumerate(model.pieces)},
        "merges": [pair for _, _, pair in merges],
    }


def sentencepiece_model(document: dict, n_pieces: int) -> SentencePieceModel:
    """The SentencePiece model that a tokenizer.json was made from, or one that encodes as it: its
    first `n_pieces` tokens (the tokens behind them are blank and padding).

    ValueError: not of the forms that come from SentencePiece.
    """
    try:
        return _sentencepiece_model(document, n_pieces)
    except (KeyError, TypeError, AttributeError, IndexError, re.error, binascii.Error) as error:
        raise ValueError(f"tokenizer.json is not of a SentencePiece model: {error!r}") from None


def _sentencepiece_model(document: dict, n_pieces: int) -> SentencePieceModel:
    model = document["model"]
    if model["type"] == "Unigram":
        scored = [(text, score) for text, score in model["vocab"][:n_pieces]]
        unknown, kind = model["unk_id"], 1
    elif model["type"] == "BPE":
        scored, kind = _scored(model, n_pieces), 2
        unknown = model["vocab"][model["unk_token"]]
    else:
        raise ValueError(f"tokenizer.json: the model's type is {model['type']!r}")
    # transformers' own conversions turn it on for models that have no bytes
    bytes_too = model.get("byte_fallback", False) and any(text == "<0x00>" for text, _ in scored)
    types = {unknown: UNKNOWN}
    for token in document["added_tokens"]:
        index = token["id"]
        if index == len(scored) < n_pieces:  # an added token continues the vocabulary
            scored.append((token["content"], 0.0))
        if index != unknown:
            types[index] = CONTROL if token["special"] else USER_DEFINED
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split":
            whole = re.compile(step["pattern"]["Regex"])
            types |= {
                i: USER_DEFINED for i, (text, _) in enumerate(scored) if whole.fullmatch(text)
            }
    if len(scored) != n_pieces:
        raise ValueError(f"tokenizer.json has {len(scored)} pieces, the model {n_pieces}")
    pieces = []
    for i, (text, score) in enumerate(scored):
        is_byte = bytes_too and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        pieces.append(Piece(text, score, types.get(i, BYTE if is_byte else NORMAL)))
    trainer = {"model_type": kind, "vocab_size": n_pieces, "byte_fallback": int(bytes_too)}
    trainer["unk_piece"] = pieces[unknown].text
    return SentencePieceModel(
        tuple(pieces),
        spec_bytes(trainer, TRAINER),
        spec_bytes(_normalizer_spec(document), NORMALIZER),
        b"",
    )


def _scored(model: dict, n_pieces: int) -> list[tuple[str, float]]:
    """Pieces with scores that rank them as the merges do. Where the ids rank them alike, as
    SentencePiece numbers them, the scores are its own: minus the number of pieces before."""
    ids = model["vocab"]
    texts = [text for text, i in sorted(ids.items(), key=lambda item: item[1]) if i < n_pieces]
    if [ids[text] for text in texts] != list(range(len(texts))):
        raise ValueError("tokenizer.json: the ids have gaps")
    order = []
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        order.append(ids[left + right])
    order = list(dict.fromkeys(order))
    if order == sorted(order):
        first = next((i for i, text in enumerate(texts) if text != model["unk_token"]), 0)
        return [(text, float(min(0, first - i))) for i, text in enumerate(texts)]
    ranks = {i: rank for rank, i in enumerate(order)}
    return [(text, -float(ranks.get(i, len(order) + i))) for i, text in enumerate(texts)]


def _normalizer_spec(document: dict) -> dict:
    steps = _steps(document.get("normalizer"), "normalizers")
    spaces = _steps(document.get("pre_tokenizer"), "pretokenizers")
    charsmap = b"".join(
        base64.b64decode(step["precompiled_charsmap"], validate=True)
        for step in steps
        if step["type"] == "Precompiled"
    )
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Replace"]
    prefix = any(step["type"] == "Prepend" for step in steps) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in spaces
    )
    return {
        "name": "user_defined" if charsmap else "identity",
        "precompiled_charsmap": charsmap,
        "add_dummy_prefix": int(prefix),
        "remove_extra_whitespaces": int(EXTRA_SPACES in patterns),
    }


def _steps(step: dict | None, name: str) -> list[dict]:
    if step is None:
        return []
    return step[name] if step["type"] == "Sequence" else [step]
