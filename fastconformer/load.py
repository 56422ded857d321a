"""From a path, or a checkpoint in memory, to a model: tensors are checked, placed and cast."""

import functools
import logging
from pathlib import Path

import torch

from .checkpoint.contents import Checkpoint, check_tensors
from .checkpoint.files import give_back
from .checkpoint.read import read_checkpoint
from .config import ModelConfig
from .heads import check_vocabulary
from .model import ASRModel, skeleton
from .networks.linear import quantize
from .text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda", "xpu", "mps")  # kinds that a model can be on


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stft_pad: str = "zeros",
) -> ASRModel:
    """Reads a `.nemo` archive, a converted folder or one of FunASR's; gives the model in eval mode.

    Args:
        dtype: precision of the encoder and the heads; features are always float32. torch.int8, on
            a CPU and for inference: 8-bit weights and inputs in the encoder's matrix products.
        stft_pad: "zeros" (NeMo 2.5 and newer) or "reflect" (features as before NeMo 2.5).
    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a damaged archive, an unsupported option, tensors that do not fit, a device
            that is not there.
    """
    device = find_device(device)
    check_usable(device)
    checkpoint = read_checkpoint(path)
    try:
        return model_of(checkpoint, device, dtype, stft_pad)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def model_of(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stft_pad: str = "zeros",
) -> ASRModel:
    """The model of a checkpoint in memory, whose tensors it takes; see `load_model`."""
    if checkpoint.kind == "funasr":
        from .funasr import funasr_of  # a NeMo model needs none of it

        model = funasr_of(checkpoint)
    else:
        model = _nemo_model(checkpoint, stft_pad)
    if checkpoint.aligner:
        model.__dict__["aligner"] = _aligner_of(checkpoint.aligner, device, dtype, stft_pad)
    model.requires_grad_(True)
    _check_dtype(model, dtype, torch.device(device))
    _cast(model, dtype)
    model = model.to(device).eval()
    if dtype == torch.bfloat16 and is_slow_in_bfloat16(model.device):
        _say_slow(model.device)
    return model


def find_device(name: str | torch.device, option: str = "device") -> torch.device:
    """The device of that name. ValueError: there is no such kind, or this torch sees none here;
    `option` is what the user calls it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        raise ValueError(f"{option} is {str(name)!r}, expected {', '.join(DEVICES)} or cuda:N")
    if (device.index or 0) >= _count(device.type):
        seen = ["cpu", *(f"{kind}:{i}" for kind in DEVICES[1:] for i in range(_count(kind)))]
        raise ValueError(f"{option} is {name}, but this torch sees only {', '.join(seen)}")
    return device


def _count(kind: str) -> int:
    return torch.get_device_module(kind).device_count()


def check_usable(device: torch.device) -> None:
    """ValueError: a GPU that is there computes nothing, since another process has it for itself,
    or this torch has no kernels for a card of its age."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{device} cannot be used: {reason}") from None


def is_slow_in_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU that has no bfloat16 and computes it by other means."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) < (8, 0)


@functools.cache
def _say_slow(device: torch.device) -> None:
    logger.warning("%s has no bfloat16, and is slow in it: float16 or float32 is faster", device)


def _nemo_model(checkpoint: Checkpoint, stft_pad: str) -> ASRModel:
    config = ModelConfig.from_nemo(checkpoint.config)
    tokenizer = load_tokenizer(checkpoint.config, checkpoint.tokenizer_files)
    model = skeleton(config, checkpoint.state_dict, stft_pad)
    if config.encoder.adapters:
        names = ", ".join(adapter.name for adapter in config.encoder.adapters)
        logger.warning("with the adapters %s behind each layer of the encoder", names)
    check_tensors(model.state_dict(), checkpoint.state_dict)
    check_vocabulary(config, tokenizer)
    model.tokenizer, model.tokenizer_files = tokenizer, checkpoint.tokenizer_files
    # the tensors become the parameters: no second copy of the weights
    model.load_state_dict(checkpoint.state_dict, assign=True)
    model.tie()
    return model


def _check_dtype(model, dtype: torch.dtype, device: torch.device) -> None:
    whole = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not whole and not (dtype == torch.int8 and model.has_int8):
        known = "torch.float32, bfloat16 or int8" if model.has_int8 else "torch.float32 or bfloat16"
        raise ValueError(f"dtype is {dtype!r}, for this model expected {known}")
    if dtype == torch.int8 and device.type != "cpu":
        raise ValueError(f"dtype int8 is for CPUs, device is {device}; use bfloat16 there")


def _aligner_of(checkpoint: Checkpoint, *options) -> ASRModel:
    try:
        aligner = model_of(checkpoint, *options)
        if aligner.frame_head is None:
            raise ValueError(f"it has {', '.join(aligner.heads)}, expected a CTC head")
    except ValueError as error:
        raise ValueError(f"the CTC model for times: {error}") from None
    return aligner


def check_state_dict(config: ModelConfig, state_dict: dict[str, torch.Tensor]):
    """Raises ValueError naming the tensors that are missing, unexpected or of another shape."""
    check_tensors(skeleton(config, state_dict).state_dict(), state_dict)


def _cast(model, dtype: torch.dtype):
    """Parameters and statistics to `dtype`; the front end stays in float32. int8: the matrix
    products of the encoder's layers, the prediction network and the joint's output, all else in
    float32."""
    if dtype == torch.int8:
        _cast(model, torch.float32)
        quantize(model.encoder.layers)
        for name in model.heads:
            for part in model.head(name).int8_parts():
                quantize(part, plain=True)  # decoding has a kernel of its own
        return
    model.preprocessor.float()

    def convert(tensor):
        converted = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype)
        if converted is not tensor:
            give_back(tensor)  # or both would be in memory until the last is converted
        return converted

    for child in (
        model.encoder,
        *(m for name, m in model.named_children() if name != "preprocessor"),
    ):
        child._apply(convert)
