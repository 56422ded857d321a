"""The processes of one run: `torchrun -m training.finetune`, or one alone.

A recipe means the same on any number of processes: a step has `trainer.accumulate` batches, which
are dealt out (whole batches where their number allows, else the clips of each), and its loss,
gradient and BatchNorm statistics are those of one process.

Nothing collective happens inside a forward or backward pass: each process works alone until all
have agreed that the step went well, and only then does torch's DistributedDataParallel or FSDP2
add the gradients up. So a process that runs out of memory or meets a NaN never leaves the others
waiting. (SyncBatchNorm is the exception: it must talk in the forward pass; there a failure ends the
run, and torchrun ends the other processes.)
"""

import dataclasses
import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

WAIT = datetime.timedelta(hours=1)  # a process may read, evaluate or save while the others wait


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many. Every method is called by all of them, in step."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """The one that writes files and prints."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def add(self, tensor: Tensor) -> None:
        """In-place sum over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def gather(self, item) -> list:
        """What each process has, in their order."""
        if self.world == 1:
            return [item]
        items = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        """Waits for all; after the main one has written what the others read."""
        self.total(0.0)


ONE = Ranks()


def join() -> Ranks:
    """The process group that torchrun's environment describes; alone without it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return ONE
    if not dist.is_initialized():
        # Flags and texts go over gloo, also on GPUs: they do not wait for the stream.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=WAIT)
    return Ranks(dist.get_rank(), world)


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another process, its machine or the network between is gone.

    NCCL and torch's store have classes of their own; gloo's is a bare RuntimeError that names it.
    """
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """How the batches of a step are dealt out.

    n_batches: of a step. by_clips: every process takes some clips of each batch; else whole
    batches in turn. synced: BatchNorm talks in the forward pass.
    """

    ranks: Ranks = ONE
    n_batches: int = 1
    by_clips: bool = False
    synced: bool = False

    @property
    def turns(self) -> tuple[int, int]:
        """(rank, world size) for the stream of batches: whose are taken in turns."""
        return (0, 1) if self.by_clips else (self.ranks.rank, self.ranks.world)

    @property
    def mine(self) -> range:
        """Numbers, within a step, of the batches that this process takes."""
        rank, world = self.turns
        return range(rank, self.n_batches, world)

    def rows(self, n_clips: int) -> Tensor:
        """Indices of this process's clips of a batch; empty where there are too few."""
        if not self.by_clips:
            return torch.arange(n_clips)
        return torch.arange(self.ranks.rank, n_clips, self.ranks.world)


def batch_share(ranks: Ranks, accumulate: int, sync_batchnorm: bool) -> BatchShare:
    """Whole batches where every process gets as many; the clips of each batch otherwise, and with
    synced BatchNorm, whose statistics are then those of a batch on one process."""
    uneven = accumulate % ranks.world != 0
    synced = ranks.world > 1 and sync_batchnorm
    return BatchShare(ranks, accumulate, synced or uneven, synced)


# --- weights and gradients of all processes ------------------------------------------------------


class ZeroLoss(nn.Module):
    """What is wrapped: its loss is 0 times every trainable parameter, so that its backward pass
    adds nothing to the gradients and makes the wrapper add them up over the processes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return 0.0 * sum(p.sum() for p in self.model.parameters() if p.requires_grad)


class Parallel:
    """The model as all processes train it; alone, all of this does nothing.

    Args:
        kind: "ddp" (DistributedDataParallel: every process holds everything) or "fsdp" (FSDP2:
            weights, gradients and optimizer state lie in shards between steps).
    """

    def __init__(self, model: nn.Module, ranks: Ranks, kind: str, device: torch.device):
        self.model, self.kind = model, kind if ranks.world > 1 else "alone"
        self.wrapped, self._known = ZeroLoss(model), None
        if self.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            # One unit: gathered before the first batch of a step, sharded after its last, so that
            # there is nothing to wait for in between.
            fully_shard(self.wrapped, mesh=dist.init_device_mesh(device.type, (ranks.world,)))
            # FSDP frees a weight's memory, and fills it anew under the same version: nothing may
            # keep a view of it, as compiled decoding does.
            for module in model.modules():
                module.weights_in_shards = True

    def gather_weights(self) -> None:
        """Whole weights on every process, before a forward pass."""
        if self.kind == "fsdp":
            self.wrapped.unshard()

    def release_weights(self) -> None:
        """Back to shards, as the optimizer and the checkpoint want them."""
        if self.kind == "fsdp":
            self.wrapped.reshard()

    def average_gradients(self) -> None:
        """`.grad` of every trainable parameter becomes the mean over the processes (its shard, with
        FSDP), also where this process had no gradient; weights are released."""
        if self.kind == "alone":
            return
        if self.kind == "ddp":
            # Made again when something was unfrozen: DDP knows the parameters of its beginning.
            trainable = [id(p) for p in self.model.parameters() if p.requires_grad]
            if self._known != trainable:
                from torch.nn.parallel import DistributedDataParallel

                self.wrapped = DistributedDataParallel(
                    ZeroLoss(self.model), gradient_as_bucket_view=True
                )
                self._known = trainable
        self.wrapped().backward()
        self.release_weights()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state):
    """A state dict with every shard gathered; all processes call it."""
    return tree_map(lambda t: t.full_tensor() if isinstance(t, DTensor) else t, state)


def cut_like(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, cut into the shards that `own` has under their names."""
    return {name: _cut(tensor, own.get(name)) for name, tensor in state.items()}


def cut_moments(state: dict[str, dict], optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """{parameter name: its moments}, cut into the shards that the parameters have."""
    own = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    return {
        name: {key: _cut(value, own.get(name)) for key, value in moments.items()}
        for name, moments in state.items()
    }


def _cut(tensor, like):
    if isinstance(like, DTensor) and isinstance(tensor, Tensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor
