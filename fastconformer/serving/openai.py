"""OpenAI's shapes: what a transcription request says, and what the answers look like.

Source: the OpenAI API reference and the `openai` client 3.57, whose types the answers satisfy.
"""

import json
from dataclasses import dataclass

from ..decoding import token_bias, unwritable
from ..formats.subtitles import to_srt, to_vtt
from ..recordings.transcript import Transcript

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
# What the client sends and this server has no use for; it is said in the answer's headers.
UNUSED = ("temperature", "include", "chunking_strategy")
KNOWN = {
    "file", "model", "language", "languages", "languages[]", "prompt", "keywords", "keywords[]",
    "response_format", "timestamp_granularities", "timestamp_granularities[]", "stream", *UNUSED,
    "include[]",
}  # fmt: skip


class BadRequest(ValueError):
    """A request that cannot be served as it is; `param` names the field, `status` is HTTP's."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True)
class Request:
    """One request for a transcription or a translation.

    options: keyword arguments of `model.transcribe`. unused: names of fields that change nothing.
    """

    response_format: str
    language: str | None
    words: bool
    segments: bool
    stream: bool
    options: dict
    unused: tuple[str, ...]


def read_request(form, model, head: str | None, translate: bool) -> Request:
    """The fields of a form (Starlette's FormData, or a mapping with `getlist`). Raises BadRequest.

    `prompt` and `keywords` are phrases to expect; `languages`, and `language` where the model does
    not take a language, are the letters that may occur only where this library knows their script.
    """
    unknown = sorted(set(form) - KNOWN)
    if unknown:
        raise BadRequest(f"unknown field {unknown[0]!r}", unknown[0])

    def texts(name: str) -> list[str]:
        values = [*form.getlist(name), *form.getlist(f"{name}[]")]
        for value in values:
            if not isinstance(value, str):
                raise BadRequest(f"{name} is a file, expected text", name)
        return [value.strip() for value in values if value.strip()]

    def one(name: str) -> str | None:
        values = texts(name)
        if len(values) > 1:
            raise BadRequest(f"{name} is given {len(values)} times", name)
        return values[0] if values else None

    response_format = one("response_format") or "json"
    if response_format not in FORMATS:
        raise BadRequest(
            f"response_format is {response_format!r}, expected one of {', '.join(FORMATS)}",
            "response_format",
        )
    granularities = texts("timestamp_granularities")
    for value in granularities:
        if value not in ("word", "segment"):
            raise BadRequest(
                f"timestamp_granularities holds {value!r}, expected word or segment",
                "timestamp_granularities",
            )
    stream = (one("stream") or "false").lower()
    if stream not in ("true", "false", "1", "0"):
        raise BadRequest(f"stream is {stream!r}, expected true or false", "stream")
    streams = stream in ("true", "1")
    if streams and response_format != "json":
        raise BadRequest("stream=true gives events, with response_format json only", "stream")

    unused = [name for name in UNUSED if texts(name)]
    if granularities and response_format != "verbose_json":
        unused.append("timestamp_granularities")
    options: dict = {"head": head, "timestamps": response_format in ("srt", "vtt", "verbose_json")}
    prompt = [line.strip() for line in (one("prompt") or "").splitlines() if line.strip()]
    language = one("language")
    languages = texts("languages")
    chosen = model.head(head)
    slots = chosen.slots
    for name, phrases in (("keywords", texts("keywords")), ("prompt", prompt)):
        if "hotwords" not in slots and len(unwritable(phrases, chosen.tokenizer)) == len(phrases):
            unused += [name] if phrases else []
        elif phrases:  # a head that is asked in words is told them
            options.setdefault("hotwords" if "hotwords" in slots else "boost", []).extend(phrases)
    if translate and "task" not in slots and not {"source_lang", "target_lang"} <= set(slots):
        raise BadRequest("this model transcribes and does not translate", "model", 404)
    if language:
        options |= spoken_in(language, slots)
        if not spoken_in(language, slots):
            unused.append("language")
    if translate:
        options["target_lang"] = "en"
        if "task" in slots:
            options["task"] = "ast"
    try:
        chosen.asked({name: options[name] for name in slots if name in options}, False)
    except ValueError as error:
        raise BadRequest(f"language: {error}", "language") from None
    if languages:
        options["allow"] = tuple(languages)
        try:
            token_bias(chosen.tokenizer, languages)
        except ValueError as error:
            raise BadRequest(f"languages: {error}", "languages") from None
    words = "word" in granularities
    if words and response_format == "verbose_json":
        options["confidence"] = True
    return Request(
        response_format,
        language,
        words,
        not words or "segment" in granularities,
        streams,
        options,
        tuple(unused),
    )


def spoken_in(language: str, slots) -> dict:
    """Options that name the language of speech and text, for a head with these slots."""
    names = ("source_lang", "target_lang", "language")
    return {name: language for name in names if name in slots}


def answer(transcript: Transcript, request: Request, task: str) -> str:
    """The body of an answer, in the request's format."""
    if request.response_format == "text":
        return transcript.text + "\n"
    if request.response_format == "srt":
        return to_srt(transcript)
    if request.response_format == "vtt":
        return to_vtt(transcript)
    usage = {"type": "duration", "seconds": round(transcript.duration, 3)}
    if request.response_format == "json":
        return json.dumps({"text": transcript.text, "usage": usage}, ensure_ascii=False)
    document = {
        "task": task,
        "language": request.language or "",
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "usage": usage,
    }
    if request.segments:
        document["segments"] = [_segment(i, s) for i, s in enumerate(transcript.segments)]
    if request.words:
        document["words"] = [timed_word(word) for word in transcript.words]
        document["srt"] = to_srt(transcript)  # ours: the page offers it without asking again
    return json.dumps(document, ensure_ascii=False)


def timed_word(span) -> dict:
    """A word as the answers show it, live ones too."""
    times = {"word": span.text, "start": round(span.start, 3), "end": round(span.end, 3)}
    sure = {} if span.confidence is None else {"confidence": round(span.confidence, 4)}
    return times | sure


def _segment(number: int, span) -> dict:
    # Whisper's measures have no counterpart here; the client's types want them all the same.
    return {
        "id": number,
        "seek": 0,
        "start": round(span.start, 3),
        "end": round(span.end, 3),
        "text": span.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": 0.0,
        "compression_ratio": 0.0,
        "no_speech_prob": 0.0,
    }


def event(fields: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
