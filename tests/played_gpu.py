"""A CPU that plays a GPU, to count how often the host would wait for it."""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique"}
READS |= {"__bool__", "__int__", "__float__", "__index__", "__contains__", "equal"}
SENDS = {"to", "cuda", "tensor", "as_tensor", "new_tensor", "copy_", "__getitem__", "__setitem__"}
SENDS |= {"index_select", "index_put", "index_put_", "type_as"}
# what takes tensors of both places: lengths and targets may stay on the host
MIXES = {"copy_", "to", "type_as", "__get__", "__set__", "pack_padded_sequence", "ctc_loss"}
MIXES |= {"transducer_forward.default"}


class PlayedGpu(TorchFunctionMode):
    """Tensors that were sent to the GPU, and what is made of them, say that they are there. Noted
    is each look at their values, and each time that memory which is not pinned is sent, with the
    line of these packages that did it. AssertionError where torch would not compute: tensors of
    both places in one operator (numbers of the host may be), numpy of one that is there, or an LSTM
    that cuDNN would not differentiate."""

    def __init__(self, model, *packages: str):
        super().__init__()
        self.waits, self.packages = [], packages
        for x in (*model.parameters(), *model.buffers()):
            x.there = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(map(_is_there, given))
        if there and any(x.ndim for x in given if not _is_there(x)):
            assert name in MIXES or _mixes_by_index(name, args), f"{name} of tensors of both places"
        assert not there or name not in ("numpy", "__array__"), "numpy of a tensor of the GPU"
        if name == "lstm" and there and torch.is_grad_enabled():
            assert args[6], "cuDNN goes back through an LSTM in training mode alone"
        if function == torch.Tensor.is_cuda.__get__:
            return there
        if function == torch.Tensor.device.__get__:
            return GPU if there else function(*args)
        if name == "pin_memory":
            pinned = args[0].view_as(args[0])
            pinned.pinned = True
            return pinned
        sent = any(x in (GPU, "cuda", "cuda:0") for x in (*args, *kwargs.values()) if _is_place(x))
        back = name == "cpu" or (name == "to" and any(map(_is_host, args[1:])))
        if there and (name in READS or back or _by_mask(name, args)):
            self._note(f"{name} waits")
        elif name in SENDS and (sent or there) and self._from_pageable(args, kwargs):
            self._note(f"{name} sends")
        pins = kwargs.get("pin_memory")
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
        result = function(*tree_map(_here, args), **tree_map(_here, kwargs))
        if pins:
            result.pinned = True
        if (there or sent) and not back:
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    x.there = True
        elif back:  # a new one: on a CPU it is the same
            result = result.clone()
        return result

    def _from_pageable(self, args, kwargs) -> bool:
        """Whether a copy begins in memory of the host that a GPU cannot read by itself."""
        first, *others = args
        if not isinstance(first, torch.Tensor) or any(isinstance(x, list) for x in others):
            return True  # a number or a list
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        from_host = [x for x in tensors if not _is_there(x) and x.ndim]
        pinned = all(getattr(x, "pinned", False) for x in from_host)
        return bool(from_host) and not (pinned and kwargs.get("non_blocking"))

    def _note(self, what: str) -> None:
        stack = traceback.extract_stack()
        frames = [f for f in stack if any(f.filename.startswith(p) for p in self.packages)]
        self.waits.append(f"{frames[-1].filename}:{frames[-1].lineno} {what}")


def _is_there(x) -> bool:
    return getattr(x, "there", False)


def _is_host(x) -> bool:
    """Whether `to` gives what is on the host, asked for this: a name, a device, another tensor."""
    return not _is_there(x) if isinstance(x, torch.Tensor) else _is_place(x) and str(x) == "cpu"


def _mixes_by_index(name: str, args) -> bool:
    """Whether it reads or writes places of a tensor, as torch does it across devices."""
    if name not in ("__getitem__", "__setitem__"):
        return False
    whole, keys, *values = args
    values = [x for x in values if isinstance(x, torch.Tensor) and x.ndim]
    if any(isinstance(x, torch.Tensor) for x in tree_leaves(keys)):
        return _is_there(whole) and all(map(_is_there, values))
    return True


def _is_place(x) -> bool:
    return isinstance(x, torch.device | str)


def _by_mask(name: str, args) -> bool:
    if name not in ("__getitem__", "__setitem__"):
        return False
    keys = tree_leaves(args[1])
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in keys)


def _here(x):
    return torch.device("cpu") if isinstance(x, torch.device) else x
