"""Canary's prompts: slots and their values -> what the decoder is told before it speaks.

Two formats, as NeMo's prompt formatters `canary` and `canary2` have them. A prompt is a row of
special tokens, one for each slot; canary2 may begin with a text, `decodercontext`.

Source: NeMo 3.0.0, `common/prompts/canary.py`, `canary2.py` and `formatter.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .tokenizer import BOS, CONTEXT, EOS, SPECIAL, Tokenizer

# What a prompt consists of, in order: special tokens, and slots by name.
FORMATS = {
    "canary": (BOS, "source_lang", "task", "target_lang", "pnc"),
    "canary2": (
        *(CONTEXT, "decodercontext", BOS, "emotion", "source_lang", "target_lang"),
        *("pnc", "itn", "timestamp", "diarize"),
    ),
}
# What a training line must bring itself, as in NeMo; all else has a value of its own.
NEEDED = {
    "canary": ("source_lang", "target_lang", "task", "pnc"),
    "canary2": ("source_lang", "target_lang"),
}
DEFAULTS = {
    "source_lang": "en",
    "target_lang": "en",
    "task": "asr",
    "pnc": "yes",
    "decodercontext": "",
    "emotion": "<|emo:undefined|>",
    "itn": "no",
    "timestamp": "no",
    "diarize": "no",
}
SLOTS = (*DEFAULTS, "taskname")  # all names that a manifest line may give to slots
LANGUAGES, TEXTS = ("source_lang", "target_lang"), ("decodercontext",)
_OTHER_NAMES = {"taskname": "task"}
_SWITCHES = ("pnc", "itn", "timestamp", "diarize")
_ON = ("yes", "true", "True", "1")
# NeMo quirk kept: "Yes" passes its check, but is not among the words for "on"
_OFF = ("no", "No", "false", "False", "0", "Yes")
_EMOTIONS = ("undefined", "neutral", "angry", "happy", "sad")
_LANGUAGE = re.compile(r"<\|([a-z]{2}(-[A-Z]{2})?|unklang)\|>")


def _values_of(slot: str) -> dict[str, str]:
    """The values that NeMo admits, and the special token of each."""
    if slot in _SWITCHES:
        on, off = f"<|{slot}|>", f"<|no{slot}|>"
        return {
            **dict.fromkeys((*_ON, slot, on), on),
            **dict.fromkeys((*_OFF, f"no{slot}", off), off),
        }
    if slot == "task":
        asr, ast = "<|transcribe|>", "<|translate|>"
        return {
            **dict.fromkeys(("asr", "transcribe", asr), asr),
            **dict.fromkeys(("ast", "translate", "s2t_translation", ast), ast),
        }
    return {f"<|emo:{name}|>": f"<|emo:{name}|>" for name in _EMOTIONS}


@dataclass(frozen=True)
class Prompt:
    """A model's prompts.

    format: "canary" or "canary2". defaults: values of slots that a caller leaves out. values:
    further values of slots, {slot: {value: special token}}, for behaviours of one's own.
    """

    format: str
    tokenizer: Tokenizer
    defaults: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(
                f"prompt_format is {self.format!r}, supported are {', '.join(FORMATS)}"
            )
        tokens = self.tokenizer.special_tokens
        for slot, values in self.values.items():
            self._slot(slot)
            if slot in TEXTS or not isinstance(values, Mapping):
                raise ValueError(f"prompt.values.{slot} is {values!r}, expected value: token pairs")
            for value, token in values.items():
                if token not in tokens:
                    raise ValueError(
                        f"prompt.values.{slot}.{value} is {token!r}, no special token of this "
                        f"model; there are {_few(tokens)}"
                    )
                if slot not in LANGUAGES and value in _values_of(slot):
                    raise ValueError(
                        f"prompt.values.{slot}.{value}: the slot has such a value already; choose "
                        "another word"
                    )
        own = {self._slot(slot): value for slot, value in self.defaults.items()}
        object.__setattr__(self, "defaults", own)
        for slot, value in own.items():
            self._token(slot, value)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the format's slots."""
        return tuple(part for part in FORMATS[self.format] if not part.startswith("<"))

    def ids(self, **slots) -> list[int]:
        """The prompt as token ids. A slot that is left out or None has the model's default.
        ValueError: an unknown slot or value; the message lists what there is."""
        given = {self._slot(name): value for name, value in slots.items() if value is not None}
        full = DEFAULTS | self.defaults | given
        return self._encode({slot: self._token(slot, full[slot]) for slot in self.slots})

    def languages(self, **slots) -> tuple[str, str]:
        """What `ids` of the same slots says is spoken, and what is to be written."""
        full = DEFAULTS | self.defaults | slots
        source, target = (_bare(str(full[name])) for name in LANGUAGES)
        return source, target

    def of_line(self, line: Mapping) -> list[int]:
        """The prompt of a manifest line in training; keys that are no slots are passed over.
        ValueError: a slot that a line must bring, or an unknown value."""
        given = {_OTHER_NAMES.get(key, key): line[key] for key in line if line[key] is not None}
        missing = [slot for slot in NEEDED[self.format] if slot not in given]
        if missing:
            raise ValueError(
                f"no {' and '.join(missing)}; prompts of format {self.format} need "
                f"{', '.join(NEEDED[self.format])} on each line, or in data.prompt"
            )
        full = DEFAULTS | given
        return self._encode({slot: self._token(slot, full[slot]) for slot in self.slots})

    def answer_ids(self, line: Mapping) -> list[int]:
        """The text of a manifest line with the end token; its language is `lang`, else the target
        language."""
        text = line.get("text") or ""
        if not isinstance(text, str):
            raise ValueError(f"text is {text!r}, expected a string")
        return self.tokenizer.of_language(self.language_of(line)).encode(text + EOS)

    def language_of(self, line: Mapping) -> str | None:
        """Of a line's text."""
        return line.get("lang") or (line.get("target_lang") and _bare(str(line["target_lang"])))

    def _encode(self, tokens: dict[str, str]) -> list[int]:
        text = "".join(tokens.get(part, part) for part in FORMATS[self.format])
        special = {token for slot, token in tokens.items() if slot not in TEXTS}
        missing = (special | {BOS}) - self.tokenizer.special_tokens.keys()
        if missing:
            raise ValueError(f"this model's tokenizer has no token {', '.join(sorted(missing))}")
        try:
            return self.tokenizer.of_language(SPECIAL).encode(text)
        except ValueError as error:
            raise ValueError(f"the prompt cannot be written: {error}") from None

    def _slot(self, name: str) -> str:
        name = _OTHER_NAMES.get(name, name)
        if name not in self.slots:
            raise ValueError(
                f"the prompt has no slot {name!r}; slots of format {self.format} are "
                f"{', '.join(self.slots)}"
            )
        return name

    def _token(self, slot: str, value) -> str:
        """What stands in the prompt for a value: a special token, or the text of a context."""
        if slot in TEXTS:
            if not isinstance(value, str):
                raise ValueError(f"slot {slot} is {value!r}, expected a text")
            return value
        if isinstance(value, int):  # also a bool
            value = {0: "no", 1: "yes"}.get(value, str(value))
        own = self.values.get(slot, {})
        if not isinstance(value, str):
            known = [*own, "words"]
        elif value in own:
            return own[value]
        elif slot in LANGUAGES:
            token = value if _is_token(value) else f"<|{value}|>"
            if token in self.tokenizer.special_tokens:
                return token
            found = map(_LANGUAGE.fullmatch, self.tokenizer.special_tokens)
            known = [*own, *(match[1] for match in found if match)]
        else:
            values = _values_of(slot)
            if value in values:
                return values[value]
            known = [*own, *values]
        raise ValueError(f"slot {slot} is {value!r}, expected one of {', '.join(known)}")


def _is_token(value) -> bool:
    return isinstance(value, str) and value.startswith("<|") and value.endswith("|>")


def _bare(language: str) -> str:
    return language[2:-2] if _is_token(language) else language


def _few(tokens) -> str:
    names = list(tokens)
    return ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
