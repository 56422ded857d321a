"""Language lock: which tokens may occur, by the script of their letters."""

import re
import unicodedata
from collections.abc import Sequence

import torch

from ..text.tokenizer import Tokenizer

# Scripts of languages that the models speak; any other name is taken as a script.
SCRIPTS = {
    script: codes.split()
    for script, codes in {
        "latin": "en de fr es it pt nl pl cs sk sl hr ro hu sv da fi et lv lt mt no nb nn is ga cy"
        " ca eu gl sq bs tr az uz vi id ms sw tl af",
        "cyrillic": "ru uk be bg mk sr kk ky mn tg",
        "greek": "el",
        "arabic": "ar fa ur ps",
        "hebrew": "he yi",
        "devanagari": "hi mr ne sa",
        "armenian": "hy",
        "georgian": "ka",
        "thai": "th",
        "hangul": "ko",
        "cjk": "zh",
        "hiragana": "ja",
    }.items()
}
_TOGETHER = {"ja": ("hiragana", "katakana", "cjk")}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bias(tokenizer: Tokenizer, allow: Sequence[str]) -> torch.Tensor:
    """(V+1,) 0 for what may occur and -inf for what may not; blank may.

    Args:
        allow: scripts as Unicode names them ("latin", "cyrillic"), language codes, which stand for
            their scripts ("en", "ru"), or single pieces of the tokenizer. A piece may occur if all
            its letters are of these scripts; marks, digits and special tokens always may.
    Raises:
        ValueError: a name that no piece has to do with.
    """
    names = [allow] if isinstance(allow, str) else list(allow)
    of_code = {code: (script,) for script, codes in SCRIPTS.items() for code in codes} | _TOGETHER
    of_pieces = [_scripts(piece) for piece in tokenizer.pieces]
    scripts, pieces = set(), set()
    for name in names:
        if name in tokenizer.pieces and name.lower() not in of_code:
            pieces.add(name)
            continue
        wanted = of_code.get(name.lower(), (name.lower(),))
        if not any(script in found for found in of_pieces for script in wanted):
            present = sorted(set().union(*of_pieces) - {"bytes"})
            raise ValueError(
                f"allow is {name!r}, but no piece of the tokenizer has letters of it; "
                f"its scripts are {', '.join(present)}"
            )
        scripts.update(wanted)
    allowed = [
        not found or found <= scripts or piece in pieces
        for piece, found in zip(tokenizer.pieces, of_pieces)
    ]
    bias = torch.zeros(tokenizer.vocab_size + 1, dtype=torch.float32, device="cpu")
    bias[:-1].masked_fill_(~torch.tensor(allowed, device="cpu"), -torch.inf)
    return bias


def _scripts(piece: str) -> set[str]:
    """Scripts of a piece's letters, in lower case; bytes beyond ASCII may be of any script."""
    byte = _BYTE.fullmatch(piece)
    if byte:
        return {"bytes"} if int(byte[1], 16) > 127 else set()
    if piece.startswith("<") and piece.endswith(">"):
        return set()
    letters = (c for c in piece if unicodedata.category(c)[0] == "L")
    return {unicodedata.name(c, "unnamed").split()[0].split("-")[0].lower() for c in letters}
