"""Texts that are spoken: sentences of files, digits and numbers, small grammars."""

import re
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from fastconformer.text import read_text

HELDOUT_TEXT_SHARE = 20  # one text in twenty is spoken by held-out voices only

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = [
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def plain_text(line: str) -> str | None:
    """Lower case a-z, apostrophes, single spaces; None where a digit stands for unknown words."""
    if re.search(r"\d", line):
        return None
    line = unicodedata.normalize("NFKD", line.lower().replace("\u2019", "'"))
    line = "".join(c for c in line if not unicodedata.combining(c))
    words = (word.strip("'") for word in re.sub(r"[^a-z']+", " ", line).split())
    return " ".join(word for word in words if word)


def read_sentences(paths, rng, max_words=16) -> list[str]:
    """Sentences of the files, one a line (the last column of a `.tsv`), in pieces of 2 to
    `max_words` words cut at random word boundaries."""
    pieces = []
    for path in paths:
        for line in read_text(Path(path)).splitlines():
            words = (plain_text(line.split("\t")[-1]) or "").split()
            while words:
                n_words = int(rng.integers(2, max_words + 1))
                if len(words) <= max_words and rng.random() < 0.5:
                    n_words = len(words)
                if len(words) - n_words == 1:  # a last word alone joins its piece
                    n_words = len(words) if n_words < max_words else n_words - 1
                pieces.append(" ".join(words[:n_words]))
                words = words[n_words:]
    return [piece for piece in dict.fromkeys(pieces) if piece]


def is_heldout(text: str) -> bool:
    """Whether a text belongs to the held-out voices: decided by its checksum, so by it alone."""
    return zlib.crc32(text.encode()) % HELDOUT_TEXT_SHARE == 0


def number_words(number: int) -> str:
    """0 to 999 in words, American style: 412 is "four hundred twelve"."""
    if number >= 100:
        rest = number % 100
        return f"{DIGITS[number // 100]} hundred" + (f" {number_words(rest)}" if rest else "")
    if number < 10:
        return DIGITS[number]
    if number < 20:
        return TEENS[number - 10]
    return TENS[number // 10 - 2] + (f" {DIGITS[number % 10]}" if number % 10 else "")


def digit_text(rng) -> str:
    """A digit, a string of two to eight digits, or a number below 1000."""
    kind = rng.random()
    if kind < 0.4:
        return str(rng.choice(DIGITS))
    if kind < 0.85:
        return " ".join(rng.choice(DIGITS, int(rng.integers(2, 9))))
    return number_words(int(rng.integers(10, 1000)))


PROMPTS = (
    "please {w}", "press {d}", "press {d} for {w}", "to {w} press {d}", "please enter your {w}",
    "your {w} is {w}", "you have {n} new {w}", "enter the {w} followed by the {w}", "{w} and {w}",
    "thank you for {w}", "the {w} is not {w}", "please hold for the next {w}", "{w} at {n} {w}",
    "if you would like to {w} please press {d} now", "the number you have {w} is {d} {d} {d} {d}",
    "{w} not found", "goodbye", "your {w} has been {w}", "no {w} today", "that {w} was {w}",
)  # fmt: skip


def phrase_text(rng, sentences, frequent) -> str:
    """A frequent word alone, one to four words of a sentence, or a prompt around frequent words."""
    kind = rng.random()
    if kind < 0.3:
        return str(rng.choice(frequent))
    if kind < 0.6:
        words = sentences[int(rng.integers(len(sentences)))].split()
        start = int(rng.integers(len(words)))
        return " ".join(words[start : start + int(rng.integers(1, 5))])
    pattern = str(rng.choice(PROMPTS))
    fill = {
        "w": lambda: str(rng.choice(frequent)),
        "d": lambda: str(rng.choice(DIGITS)),
        "n": lambda: number_words(int(rng.integers(1, 100))),
    }
    return re.sub(r"\{(\w)\}", lambda match: fill[match[1]](), pattern)


COLOURS = ["red", "green", "blue", "yellow", "white", "black"]
THINGS = ["lamp", "door", "window", "box", "radio", "camera", "heater", "fan"]
ROOMS = ["kitchen", "garden", "office", "bedroom", "garage", "hall"]
MONTHS = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
]  # fmt: skip
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
QUICKSTART = (
    "turn {on} the {colour} {thing} in the {room}", "open the {room} {thing}",
    "turn {on} the {thing} at {number} o'clock", "call number {digits}", "move to the {room}",
    "close the {colour} {thing}", "set the {room} {thing} to {number}", "play track {number}",
    "the {month} meeting is on {weekday}", "wake me on {weekday} at {number}",
    "{weekday} the {number} of {month}", "the code is {digits}", "put the {thing} in the {room}",
)  # fmt: skip


def quickstart_text(rng) -> str:
    """A household command, a date or a number, over some eighty words."""
    fill = {
        "on": lambda: rng.choice(["on", "off"]),
        "colour": lambda: rng.choice(COLOURS),
        "thing": lambda: rng.choice(THINGS),
        "room": lambda: rng.choice(ROOMS),
        "month": lambda: rng.choice(MONTHS),
        "weekday": lambda: rng.choice(WEEKDAYS),
        "number": lambda: number_words(int(rng.integers(1, 60))),
        "digits": lambda: " ".join(rng.choice(DIGITS, int(rng.integers(3, 6)))),
    }
    return re.sub(r"\{(\w+)\}", lambda match: str(fill[match[1]]()), str(rng.choice(QUICKSTART)))


HINDI_DIGITS = ["शून्य", "एक", "दो", "तीन", "चार", "पाँच", "छह", "सात", "आठ", "नौ"]
HINDI_NUMBERS = [
    *HINDI_DIGITS[1:], "दस", "ग्यारह", "बारह", "तेरह", "चौदह", "पंद्रह", "सोलह", "सत्रह",
    "अठारह", "उन्नीस", "बीस",
]  # fmt: skip
HINDI_WORDS = {
    "on": ["चालू", "बंद"],
    "colour": ["लाल", "हरी", "नीली", "पीली", "सफ़ेद", "काली"],
    "thing": ["बत्ती", "खिड़की", "अलमारी", "घड़ी", "गाड़ी", "किताब"],  # all feminine, as colours are
    "room": ["रसोई", "बगीचे", "दफ़्तर", "कमरे", "गलियारे"],
    "month": [
        "जनवरी", "फ़रवरी", "मार्च", "अप्रैल", "मई", "जून", "जुलाई", "अगस्त", "सितंबर", "अक्टूबर",
        "नवंबर", "दिसंबर",
    ],
    "weekday": ["सोमवार", "मंगलवार", "बुधवार", "गुरुवार", "शुक्रवार", "शनिवार", "रविवार"],
    "drink": ["चाय", "पानी", "दूध"],
    "number": HINDI_NUMBERS,
}  # fmt: skip
HINDI = (
    "{room} की {thing} {on} करो", "{colour} {thing} {on} करो", "{room} का दरवाज़ा खोलो",
    "कोड है {digits}", "{weekday} को {number} बजे मुझे जगाओ", "गाना नंबर {number} चलाओ",
    "{colour} {thing} {room} में रखो",
    "{month} की {number} तारीख को मिलते हैं", "फ़ोन नंबर {digits} मिलाओ",
    "मुझे {number} बजे {drink} चाहिए",
    "{number} और {number} जोड़ो", "{room} में {number} लोग हैं", "आज {weekday} है और कल {weekday}",
)  # fmt: skip


def hindi_text(rng) -> str:
    """A household command, a date or a number in Hindi, over some eighty words."""
    fill = {name: lambda words=words: rng.choice(words) for name, words in HINDI_WORDS.items()}
    fill["digits"] = lambda: " ".join(rng.choice(HINDI_DIGITS, int(rng.integers(3, 6))))
    return re.sub(r"\{(\w+)\}", lambda match: str(fill[match[1]]()), str(rng.choice(HINDI)))


GRAMMARS = {"quickstart": ("en", quickstart_text), "hindi": ("hi", hindi_text)}


def draw(make, count: int, heldout: bool) -> list[str]:
    """`count` different texts of `make()`, all held out or none; ValueError where it runs dry."""
    texts: dict[str, None] = {}
    for _ in range(200 * HELDOUT_TEXT_SHARE + 20 * HELDOUT_TEXT_SHARE * count):
        if len(texts) == count:
            return list(texts)
        text = make()
        if is_heldout(text) == heldout:
            texts[text] = None
    raise ValueError(f"only {len(texts)} different sentences, asked for {count}; lower the count")


def choose_texts(args) -> list[str]:
    """The text of every clip, in a seeded order; `args` of training.synthesize."""
    rng = np.random.default_rng(args.seed)
    heldout = args.voices == "heldout"
    sentences = read_sentences(args.sentences or [], rng, args.max_words)
    frequent = [w for w, _ in Counter(" ".join(sentences).split()).most_common(2000) if len(w) > 1]
    mine = [text for text in sentences if is_heldout(text) == heldout]
    if args.vocabulary:
        _, make = GRAMMARS[args.vocabulary]
        texts = draw(lambda: make(rng), args.count, heldout)
    elif args.count and not mine:
        raise ValueError(
            f"{len(sentences)} sentences in {', '.join(map(str, args.sentences))}, none of them for"
            f" --voices {args.voices} (one in {HELDOUT_TEXT_SHARE} is held out); give more text"
        )
    else:  # each sentence once before any comes twice
        texts = []
        while len(texts) < args.count:
            texts.extend(mine[i] for i in rng.permutation(len(mine)))
        texts = texts[: args.count]
    texts += [digit_text(rng) for _ in range(args.digits)]
    if args.phrases:
        if not mine:
            raise ValueError("--phrases takes its words from --sentences, which gave none")
        texts += [phrase_text(rng, mine, frequent) for _ in range(args.phrases)]
    return [texts[i] for i in rng.permutation(len(texts))]
