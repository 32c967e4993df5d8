"""What of each batch one process trains on, so that many processes make the same steps as one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from torchtrim.errors import InputError


@dataclass(frozen=True)
class Share:
    """The rows of a batch that are this process's.

    Attributes:
        batch: The rows, in the form they came in. Where there are fewer rows than processes it is a row of another.
        rows: How many of them count: none where the row is another's.
        total: How many rows the whole batch has.
    """

    batch: Any
    rows: int
    total: int


class Shares:
    """A data source, gone through by one of several processes; every epoch anew.

    A `DataLoader` over a data set of known length reads this process's rows alone, from the same batches in the same
    order as in one process, as long as the random state is the same in all when it starts. Of any other source every
    process goes through all batches, and takes its rows of each. Workers start anew with each epoch, so that their
    random numbers are those of the epoch.

    Args:
        data: A `DataLoader`, or any iterable of batches.
        rank: Which process this is, from 0.
        world: How many there are.

    Raises:
        InputError: Not something that can be gone through; or a sampler that shares out rows by itself.

    Example:
        >>> batches = [torch.arange(5), torch.arange(2)]
        >>> [(share.batch.tolist(), share.rows, share.total) for share in Shares(batches, rank=1, world=2)]
        [([1, 3], 2, 5), ([1], 1, 2)]
    """

    def __init__(self, data: Iterable[Any], rank: int = 0, world: int = 1) -> None:
        if isinstance(data, (torch.Tensor, str, bytes)) or not isinstance(data, Iterable):
            raise InputError(
                "data is an iterable of batches",
                path="data",
                found=type(data).__name__,
                expected="a DataLoader, or a list of (inputs, targets)",
            )
        self._data = self._source = data
        self._rank, self._world = rank, world
        self._own: _OwnRows | None = None
        if not isinstance(data, DataLoader):
            return
        if world > 1 and isinstance(data.sampler, DistributedSampler):
            raise InputError(
                "the rows would be shared out twice: each process takes its rows of every batch here",
                path="data",
                found="DistributedSampler",
                hint="DataLoader(..., shuffle=True), with the batch size of all processes together",
            )
        batches, as_usual = data.batch_sampler, type(data).__iter__ is DataLoader.__iter__
        if world > 1 and batches and as_usual and not isinstance(data.dataset, IterableDataset):
            self._own = _OwnRows(batches, rank, world)
            self._source = _narrowed(data, self._own)
        elif data.persistent_workers:
            # What random numbers such workers have left after some epochs cannot be saved.
            self._source = copy.copy(data)
            object.__setattr__(self._source, "persistent_workers", False)

    def __len__(self) -> int:
        """How many batches an epoch has.

        Raises:
            TypeError: That is not known.
        """
        return len(self._source)  # type: ignore[arg-type]

    def begin(self, epoch: int) -> None:
        """Tell samplers and data sets that draw another order for each epoch which one it is, the first being 0."""
        for name in ("sampler", "batch_sampler", "dataset"):
            tell = getattr(getattr(self._data, name, None), "set_epoch", None)
            if callable(tell):
                tell(epoch)

    def __iter__(self) -> Iterator[Share]:
        if self._own is not None:
            self._own.sizes.clear()
            for batch in self._source:
                rows, total = self._own.sizes.pop(0)
                yield Share(batch, rows, total)
            return
        for batch in self._source:
            total = rows_in(batch)
            if self._world == 1:
                yield Share(batch, total, total)
            else:
                own = len(range(self._rank, total, self._world))
                yield Share(_taken(batch, total, self._rank if own else 0, self._world), own, total)


def rows_in(batch: Any) -> int:
    """The number of rows of a batch: the length of its first tensor that has a dimension.

    Raises:
        InputError: It holds no such tensor, or no rows.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors:
        # A dict of another kind (transformers' BatchEncoding) is a leaf of its own.
        values = batch.values() if hasattr(batch, "values") else ()
        tensors = [value for value in values if isinstance(value, torch.Tensor) and value.dim()]
    if not tensors:
        raise InputError("a batch without tensors", path="data", found=type(batch).__name__)
    if not len(tensors[0]):
        raise InputError("a batch without rows", path="data", found=list(tensors[0].shape))
    return len(tensors[0])


class _OwnRows(Sampler[list[int]]):
    """Every batch of indices, less those of other processes; and how many there are, in the order they are drawn."""

    def __init__(self, batches: Iterable[list[int]], rank: int, world: int) -> None:
        self.sizes: list[tuple[int, int]] = []
        self._batches, self._rank, self._world = batches, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            own = batch[self._rank :: self._world]
            self.sizes.append((len(own), len(batch)))
            yield own or batch[:1]

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]


def _narrowed(loader: DataLoader[Any], own: _OwnRows) -> DataLoader[Any]:
    """The same loader with other batches of indices."""
    return DataLoader(
        loader.dataset,
        batch_sampler=own,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


def _taken(batch: Any, total: int, first: int, step: int) -> Any:
    def one(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or len(tensor) != total:
            return tensor
        return tensor[first::step] if step <= total else tensor[first : first + 1]

    if hasattr(batch, "items") and not isinstance(batch, dict):
        batch = dict(batch.items())
    return pytree.tree_map_only(torch.Tensor, one, batch)
