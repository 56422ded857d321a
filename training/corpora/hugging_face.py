"""Hugging Face data sets, saved ones, files and those of the hub, as items of a manifest.

Rows come one after another, and a column of audio undecoded: its files and contents are read as all
audio here, where `datasets` would ask for torchcodec.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastconformer.audio.files import audio_duration
from fastconformer.checkpoint.hub import is_hub_id
from training.corpora.written import Item, Unusable, fields_of, suffix_of

SAVED = ("dataset_dict.json", "state.json")  # by save_to_disk
FILES = {".parquet": "parquet", ".arrow": "arrow"}
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text")
LANG_COLUMN = "lang"


@dataclass(frozen=True)
class Wanted:
    """What a user may say of a data set; None: what is there alone, or has the usual name."""

    split: str | None = None
    config: str | None = None
    audio_column: str | None = None
    text_column: str | None = None
    lang_column: str | None = None


def is_dataset(source: str) -> bool:
    """Whether `datasets` is to open it: saved, files, a folder of them, or a name of the hub."""
    path = Path(source)
    if path.is_dir():
        files = (p for suffix in FILES for p in path.rglob(f"*{suffix}"))
        return any((path / name).is_file() for name in SAVED) or any(files)
    return (path.is_file() and path.suffix in FILES) or is_hub_id(source)


@dataclass(frozen=True)
class Columns:
    """Names of columns; labels: of those that hold numbers of classes, number -> name."""

    audio: str
    text: str
    lang: str | None
    plain: list[str]  # that are read: these and single values
    left: frozenset[str]
    labels: dict[str, Callable[[int], str]]


def read_dataset(source: str, wanted: Wanted) -> Iterator[Item | Unusable]:
    """ValueError: it cannot be opened, or has not the split or the columns."""
    import datasets

    datasets.disable_progress_bars()
    rows = _split(_opened(source, wanted.config), source, wanted.split)
    features = rows.features or {}
    columns = _columns(source, features, wanted)
    rows = rows.select_columns(columns.plain)
    if isinstance(features[columns.audio], datasets.Audio):
        rows = rows.cast_column(columns.audio, datasets.Audio(decode=False))
    n_rows = 0
    try:
        for row in rows:
            yield _of_row(row, f"{source}, row {n_rows}", Path(source), columns)
            n_rows += 1
    except ImportError:  # of torchcodec, by which datasets makes rows of files
        raise ValueError(f"{source} is a set of loose audio files, which is not read") from None
    except Exception as error:  # datasets raises its own errors, pyarrow's and the network's
        yield Unusable(source, f"left after {n_rows} rows: {_reason(error)}")


def _opened(source: str, config: str | None):
    """A data set, or {split: data set}."""
    import datasets

    path = Path(source)
    is_saved = path.is_dir() and any((path / name).is_file() for name in SAVED)
    if config is not None and (is_saved or path.is_file()):
        raise ValueError(f"{source} has no configurations; leave out --config {config}")
    try:
        if is_saved:
            return datasets.load_from_disk(source)
        if path.is_file():
            return datasets.load_dataset(FILES[path.suffix], data_files=source, streaming=True)
        name, _, revision = (source, "", "") if path.exists() else source.partition("@")
        return datasets.load_dataset(name, config, revision=revision or None, streaming=True)
    except Exception as error:  # as above
        raise ValueError(f"{source}: {_reason(error)}") from None


def _split(found, source: str, split: str | None):
    if not isinstance(found, dict):
        if split is not None:
            raise ValueError(f"{source} is one split; leave out --split {split}")
        return found
    names = ", ".join(found)
    if split is None and len(found) > 1:
        raise ValueError(f"{source} has the splits {names}; give one of them with --split")
    if split is not None and split not in found:
        raise ValueError(f"{source} has no split {split!r}; it has {names}")
    return found[split or names]


def _columns(source: str, features: dict, wanted: Wanted) -> Columns:
    import datasets

    known = ", ".join(features)
    for name in (wanted.audio_column, wanted.text_column, wanted.lang_column):
        if name is not None and name not in features:
            raise ValueError(f"{source} has no column {name!r}; it has {known}")
    sounds = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    if not sounds:  # files that another library wrote
        sounds = [name for name, f in features.items() if isinstance(f, dict) and "bytes" in f]
    if wanted.audio_column is None and len(sounds) != 1:
        seen = f"columns of audio {', '.join(sounds)}" if sounds else f"columns {known}"
        raise ValueError(f"{source} has the {seen}; name the one of audio with --audio-column")
    texts = [name for name in TEXT_COLUMNS if name in features]
    if wanted.text_column is None and not texts:
        raise ValueError(f"{source} has the columns {known}; name the texts' with --text-column")
    audio, text = wanted.audio_column or sounds[0], wanted.text_column or texts[0]
    lang = wanted.lang_column or (LANG_COLUMN if LANG_COLUMN in features else None)
    single = datasets.Value | datasets.ClassLabel
    plain = [n for n, f in features.items() if isinstance(f, single) or n in (audio, text, lang)]
    labels = {n: f.int2str for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
    return Columns(audio, text, lang, plain, frozenset(features.keys() - plain), labels)


def _of_row(row: dict, name: str, source: Path, columns: Columns) -> Item | Unusable:
    try:
        for column, name_of in columns.labels.items():
            row[column] = None if row[column] in (None, -1) else name_of(row[column])
        sound, suffix = _sound(row.pop(columns.audio), source)
        text = row.pop(columns.text)
        if not isinstance(text, str):
            raise ValueError(f"{columns.text} is {text!r}, expected a string")
        line = {"duration": audio_duration(sound), "text": text}
        lang = None if columns.lang is None else row.pop(columns.lang)
        if lang is not None:
            line["lang"] = str(lang)
    except (OSError, ValueError) as error:
        return Unusable(name, _reason(error))
    own, left = fields_of(row)
    return Item(name, line | own, sound, suffix, columns.left | left)


def _sound(value, source: Path) -> tuple[Path | bytes, str]:
    """A file, or a content with its suffix, of what a column of audio has undecoded."""
    if isinstance(value, bytes | str):
        value = {"bytes": value} if isinstance(value, bytes) else {"path": value}
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise ValueError(f"its audio is {str(value)[:80]}, expected a file or its content")
    if value.get("bytes"):
        return value["bytes"], suffix_of(value["bytes"], value.get("path"))
    folder = source if source.is_dir() else source.parent
    found = [path for path in (Path(value["path"]), folder / value["path"]) if path.is_file()]
    if not found:
        raise ValueError(f"no such audio file: {value['path']}")
    return found[0], ""


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
