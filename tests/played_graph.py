"""A CPU that plays CUDA graphs: operators noted as they run, and run again on the same memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PlayedGraph(TorchDispatchMode):
    """As a graph, a replay knows no Python and makes no tensor: each operator writes its result
    where it lay when it was noted. What the host read then stays as it was."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                if all(r.alias_info is None for r in function._schema.returns):  # no view
                    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)


def captured(cache, function, device):
    """In the place of `networks.graphs.captured`."""
    function()
    graph = PlayedGraph()
    with graph:
        function()
    return graph.replay
