"""Several processes that train one network, as torchrun starts them; the only torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Group:
    """The processes of one run; a group of one does nothing.

    Attributes:
        device: where tensors lie that the processes exchange.
        rank: number of this process, from 0.
        size: number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place; every process gets the same bytes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of parameters over all processes; all have the same ones."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not gradients:
            return
        flat = self.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def share_statistics(self, network: nn.Module) -> None:
        """Let batch norms that are trained see the batches of all processes, on GPUs.

        On the CPU, for which torch has none such, each process keeps those of its own part.
        """
        if self.size > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)

    def agree(self, number: int) -> bool:
        """Whether all processes have the same number."""
        if self.size == 1:
            return True
        bounds = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        highest, lowest = bounds.tolist()
        return highest == -lowest

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.all_reduce(torch.zeros(1, device=self.device)).tolist()


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """Join the other processes where a launcher has set RANK and WORLD_SIZE; else be alone.

    On CUDA each process takes the GPU of its LOCAL_RANK, by NCCL; on the CPU they talk by Gloo.
    If the block fails, the process must end: the others wait for it in vain until they are told.

    Raises:
        PipelineError: the launcher's variables make no sense, there are too few GPUs, or the device
            cannot be shared.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield Group(device)
        return
    if device.type == "mps":
        raise PipelineError("params.yaml: device: mps has one GPU; train without torchrun")
    on_gpu = device.type == "cuda"
    if on_gpu:
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        _join_group("nccl" if on_gpu else "gloo")
    except ValueError as error:
        raise PipelineError(
            f"RANK and WORLD_SIZE ({size}) are set, but {error}; start the processes with torchrun"
        ) from None
    group = Group(device, dist.get_rank(), size)
    yield group
    group.barrier()  # the main process is still writing, and may keep the others' meeting point
    dist.destroy_process_group()


def _join_group(backend: str) -> None:
    """Exchange addresses through the launcher's store.

    torchrun restarts processes with the store of the dead ones, where their addresses still lie
    (github.com/pytorch/pytorch/issues/135712), so every attempt gets keys of its own. Only on one
    node, where one torchrun counts: over several, the counts differ.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _take_gpu(number: int) -> None:
    """Make GPU `number` the one that `cuda` means."""
    count = torch.cuda.device_count()
    if number >= count:
        raise PipelineError(
            f"LOCAL_RANK: {number}, but there are {count} GPUs here; "
            f"start torchrun with --nproc-per-node {count}"
        )
    torch.cuda.set_device(number)
