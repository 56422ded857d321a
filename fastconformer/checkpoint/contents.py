"""A model as data, wherever it lies: config, tensors, files, and the checks on each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ALIGNER = "timestamps_asr_model"  # NeMo's name for the second model, ours for its folder


@dataclass
class Checkpoint:
    """A model as data.

    config: NeMo's model_config.yaml, interpolations resolved, or of another kind of model what
        stands in its place; files are "nemo:<name>", where name is a key of tokenizer_files.
    state_dict: tensors by NeMo's names; may be backed by a private file mapping.
    tokenizer_files: content of every file that the config names, by clean name
        ("tokenizer.model", "vocab.txt", "tokenizer.vocab", ...).
    dropped: members of the archive that the config does not name and that were not read.
    aligner: a second model that the checkpoint holds, with a CTC head for words' times.
    """

    config: dict
    state_dict: dict[str, torch.Tensor]
    tokenizer_files: dict[str, bytes]
    dropped: tuple[str, ...] = ()
    aligner: "Checkpoint | None" = None

    @property
    def kind(self) -> str:
        """Whose config it is: "nemo", or "funasr" (see `funasr_folder`)."""
        return "funasr" if "llm_config" in self.config else "nemo"


def artifacts(config: dict) -> dict[str, str]:
    """The files that a config names: {"tokenizer.model_path": "tokenizer.model", ...}. A file is
    a mapping's value that starts with "nemo:", wherever it stands."""
    found = {}

    def note(key, name):
        found[key] = name
        return name

    rename_artifacts(config, note)
    return found


def rename_artifacts(config: dict, rename: Callable[[str, str], str]) -> dict:
    """A copy of config where each "nemo:<name>" is "nemo:" + rename(dotted key, name)."""

    def walk(value, key):
        if isinstance(value, dict):
            return {
                name: f"nemo:{rename(f'{key}{name}', item[5:])}"
                if isinstance(item, str) and item.startswith("nemo:")
                else walk(item, f"{key}{name}.")
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [walk(item, f"{key}{index}.") for index, item in enumerate(value)]
        return value

    return walk(config, "")


def check_files(checkpoint: Checkpoint) -> None:
    """Raises ValueError unless the config's files and tokenizer_files are the same, each under
    a plain file name."""
    named = artifacts(checkpoint.config)
    for key, name in named.items():
        if name not in checkpoint.tokenizer_files:
            raise ValueError(f"{key} names {name}, which is not among the tokenizer files")
    for name in checkpoint.tokenizer_files:
        check_plain_name(name, "tokenizer file")
        if name not in named.values():
            raise ValueError(f'tokenizer file {name}: the config has no "nemo:{name}" for it')


def check_plain_name(name: str, what: str) -> None:
    plain = name and name not in (".", "..") and not set(name) & set("/\\\0:")
    if not plain or name.lower() in (CONFIG_FILE, WEIGHTS_FILE, ALIGNER):
        raise ValueError(f"{what}: {name!r} is not a plain file name inside the folder")


def check_tensors(wanted: dict[str, torch.Tensor], state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ValueError naming the tensors that are missing, unexpected or of another shape than
    those of a model's own state dict, `wanted`."""
    expected = {name: tuple(t.shape) for name, t in wanted.items()}
    found = {name: tuple(t.shape) for name, t in state_dict.items()}
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            "the checkpoint does not fit its config: " + "; ".join(problems[:5]) + more
        )


def check_finite(state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity.

    Uses the extrema, which NaN passes through, so that nothing as large as a tensor is made.
    """
    for name, tensor in state_dict.items():
        if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if values.element_size() == 1:
            values = values.float()  # 8-bit floats have no comparison
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(values)):
            raise ValueError(
                f"tensor {name} holds NaN or infinity; the checkpoint is damaged or comes from "
                "a diverged run, use an earlier one"
            )


def dense_tensors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values as CPU tensors, contiguous, each alone in its storage; copies only those
    that are not so already (tied weights, views)."""
    dense, seen = {}, set()
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu()
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not (alone and tensor.is_contiguous() and storage.data_ptr() not in seen):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        dense[name] = tensor
    return dense
