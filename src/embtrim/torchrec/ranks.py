"""The processes of a torch.distributed group, called ranks: sums, one plan for all, and batches in step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from embtrim.errors import ModelError
from embtrim.system.ranks import group_size

T = TypeVar("T")

_END = object()


def num_ranks() -> int:
    """Number of processes of the default group; 1 without one."""
    return group_size() or 1


def own_rank() -> int:
    """The number of this process."""
    return dist.get_rank() if num_ranks() > 1 else 0


def summed(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on the device and of the type of the given one, which stays as it is."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest(values: Tensor) -> Tensor:
    """The elementwise maximum of a tensor over all ranks; see `summed`."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, how: Any) -> Tensor:
    if num_ranks() == 1:
        return values
    found = values.to(device_of_group(), copy=True)
    dist.all_reduce(found, how)
    return found.to(values.device)


def gathered(values_N: Tensor) -> list[Tensor]:
    """The values (N,) of every rank, in order of the ranks; N differs from rank to rank."""
    if num_ranks() == 1:
        return [values_N]
    sizes = torch.zeros(num_ranks(), dtype=torch.int64)
    sizes[own_rank()] = len(values_N)
    sizes = summed(sizes).tolist()
    own = torch.zeros(max(sizes), dtype=values_N.dtype, device=device_of_group())
    own[: len(values_N)] = values_N
    found = own.new_empty(len(sizes) * len(own))
    dist.all_gather_into_tensor(found, own)
    return [part[:size].to(values_N.device) for part, size in zip(found.view(len(sizes), -1), sizes, strict=True)]


def device_of_group() -> torch.device:
    """Where tensors must lie for the default group to exchange them."""
    is_gpu = num_ranks() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")


def from_first(value: T) -> T:
    """The value of rank 0; other ranks give their own."""
    if num_ranks() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0, device=device_of_group())
    return found[0]


class Running:
    """The batch whose loss is computed last."""

    batch: Any = None

    @property
    def counts(self) -> bool:
        """Whether it is a batch of this rank's own, and not a Filler."""
        return not isinstance(self.batch, Filler)


class Filler:
    """A batch that a rank runs again, without counting it, while other ranks run a batch of theirs.

    All ranks must run a sharded model equally often, or the others wait for ever.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch


class InStep:
    """Batches of this rank, filled up so that all ranks have equally many; a Filler also takes the place of an empty one.

    Args:
        batches: The batches of this rank; there may be fewer than others have.
        example: Batches from which one is taken if there is none.
        split: Name of the split, for errors.
        weight_of: Gives the weight of a batch; an empty one has none.

    Raises:
        ModelError: A rank has neither a batch nor an example, on all ranks alike.
    """

    def __init__(
        self, batches: Iterable[Any], example: Iterable[Any], split: str, weight_of: Callable[[Any], float]
    ) -> None:
        self.batches, self.example, self.split, self.weight_of = batches, example, split, weight_of

    def __iter__(self) -> Iterator[Any]:
        if num_ranks() == 1:
            yield from self.batches
            return
        left, last = iter(self.batches), _END
        while True:
            batch = next(left, _END)
            is_full = batch is not _END and self.weight_of(batch) > 0
            if is_full:
                last = batch
            elif last is _END:
                last = next((some for some in self.example if self.weight_of(some)), _END)
            goes_on, lacks_any = largest(torch.tensor([batch is not _END, last is _END], dtype=torch.int32)).tolist()
            if not goes_on:
                return
            if lacks_any:
                raise ModelError(
                    f"a rank has no {self.split} row at all, and no train row to run in its place; give each rank some"
                )
            yield batch if is_full else Filler(last)
