"""Models by the name that they have on the Hugging Face hub (the extra `hub`)."""

import importlib.util
import re
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
LOCAL_SUFFIXES = (".nemo", ".ckpt", ".pt", ".pth", ".safetensors", ".onnx", ".yaml", ".gz")
FOLDER_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.vocab")


def is_hub_id(path: str | Path) -> bool:
    """Whether `owner/name`, or `owner/name@revision`, is meant: nothing of that name, or of that
    folder's, lies here."""
    text = str(path)
    there = Path(text).exists() or Path(text).parent.exists()
    return bool(HUB_ID.fullmatch(text)) and not there and not text.endswith(LOCAL_SUFFIXES)


def fetch(hub_id: str) -> Path:
    """The path of a model on this machine, downloaded if it is not in huggingface_hub's cache: its
    .nemo archive, else a folder of safetensors. Token, offline mode, cache and progress are as
    that library has them. ValueError: it is not there, or cannot be reached."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f"{hub_id}: no such .nemo file or folder; for a model of the Hugging Face hub "
            'pip install "fastconformer[hub]", or download its .nemo'
        )
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = hub_id.partition("@")
    revision = revision or None
    try:
        if HF_HUB_OFFLINE:
            return _in_cache(huggingface_hub.snapshot_download, repo, revision)
        found = huggingface_hub.HfApi().model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in found.siblings or ()]
        paths = [
            Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
            for name in _wanted(repo, names)
        ]
        return paths[0] if paths[0].suffix == ".nemo" else paths[0].parent
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise ValueError(f"{hub_id} on the Hugging Face hub: {_meaning(status)}") from None
    except LocalEntryNotFoundError:
        raise ValueError(f"{hub_id} is not in the cache, and the hub is offline") from None
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{hub_id}: the Hugging Face hub cannot be reached: {reason}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests"):
            raise
        raise ValueError(f"{hub_id}: the Hugging Face hub cannot be reached: {error}") from None


def _meaning(status) -> str:
    if status in (401, 403):
        return f"access refused ({status}); check the name, and the token in HF_TOKEN"
    return f"{'no such model or revision' if status == 404 else 'it failed'} ({status})"


def _wanted(repo: str, names: list[str]) -> list[str]:
    """One archive, or the files of a folder at the top; config.json first."""
    archives = sorted(name for name in names if name.endswith(".nemo"))
    usual = f"{repo.rpartition('/')[2]}.nemo"
    if usual in archives or len(archives) == 1:
        return [usual if usual in archives else archives[0]]
    if archives:
        raise ValueError(f"{repo} holds {', '.join(archives)}; download one of them")
    files = [n for n in names if any(Path(n).match(p) for p in FOLDER_FILES) and "/" not in n]
    if "config.json" not in files or not any(n.endswith(".safetensors") for n in files):
        raise ValueError(f"{repo} holds neither a .nemo archive nor config.json and safetensors")
    return sorted(files, key=lambda name: name != "config.json")


def _in_cache(snapshot_download, repo: str, revision: str | None) -> Path:
    folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    first = folder / _wanted(repo, names)[0]
    return first if first.suffix == ".nemo" else folder
