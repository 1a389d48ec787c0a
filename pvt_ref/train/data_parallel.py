"""One training on several processes (ranks), bit for bit as on one.

The batch of a step is split into micro-batches; each draws its own random numbers, wherever it is
computed. A rank takes some consecutive ones. But sums of floats depend on their order. So the
gradients of all micro-batches are always summed along one tree, whose leaves are the micro-batches
and whose shape depends only on their number::

    ((g_0 + g_1) + (g_2 + g_3)) + (g_4 + g_5)

A rank sums the complete subtrees that it has. Then the ranks exchange slices: each gets one slice
of all subtrees, sums it along the tree, and sends the sum to all, so every rank has the same bits.
If a rank's share is one whole subtree, each number crosses the network twice, for any number of
ranks; each further part adds one crossing.
"""

import operator
import os
import sys
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pvt_ref.arrays import Array, address, array_module, dtype_name, from_host, import_cupy
from pvt_ref.errors import PVTError, TrainingError
from pvt_ref.tree import map_arrays, named_arrays, to_numpy


class Part(NamedTuple):
    """A subtree: the sum over micro-batches ``index * 2**level`` up to the next index's."""

    level: int
    index: int
    value: Any


def add_part(parts: list[Part], part: Part, add: Callable[[Any, Any], Any]) -> None:
    """Appends a subtree, the next one from the left. Two halves of a larger one become it."""
    parts.append(part)
    while len(parts) > 1:
        left, right = parts[-2:]
        if left.level != right.level or left.index % 2 or right.index != left.index + 1:
            return
        parts[-2:] = [Part(left.level + 1, left.index // 2, add(left.value, right.value))]


def add_up_parts(parts: list[Part], add: Callable[[Any, Any], Any]) -> Any:
    """The sum over all, from the right: the rest of a tree that is not full."""
    total = parts[-1].value
    for part in reversed(parts[:-1]):
        total = add(part.value, total)
    return total


def add_trees(a: Any, b: Any) -> Any:
    """a + b, array by array."""
    return map_arrays(lambda x, y: x + y, a, b)


class Failure(NamedTuple):
    """A rank's message in place of a result: why it cannot go on."""

    why: str


class Ranks:
    """One process alone: the only rank. Others derive from it.

    Attributes:
        rank: of this process, from 0. Rank 0 writes files and messages.
        size: the number of ranks.
    """

    rank, size = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The range of count items, such as micro-batches, that this rank takes."""
        return share_of(count, self.rank, self.size)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; small ones. All ranks have to call it.

        Raises:
            TrainingError: if a rank has failed meanwhile, on all others.
        """
        return [value]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The result of make(), called on rank 0 only; on other ranks its arrays are NumPy's.

        Raises:
            PVTError: what make raises; on the other ranks a TrainingError that says so.
        """
        return make()

    def sum(self, parts: list[Part], count: int) -> Any:
        """The sum over all micro-batches.

        Args:
            parts: subtrees of this rank's micro-batches, from the left; trees of arrays.
            count: micro-batches of all ranks.

        Returns:
            A tree as the parts', with the same bits on every rank and for any number of ranks.
        """
        return add_up_parts(parts, add_trees)

    def for_device(self, device: str) -> "Ranks":
        """These ranks, computing there: on "cuda" each on a GPU of its own, if there are enough.

        Then gradients go by NCCL. Where ranks share a GPU, or NCCL is missing, they go through the
        host. All ranks have to call it.

        Raises:
            DeviceError: if CUDA cannot be used; on the other ranks a TrainingError that says so.
        """
        return self

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks, once, in their current or next :meth:`gather` why it ends."""

    def abort(self) -> None:
        """Ends all ranks at once, wherever they are."""


ALONE = Ranks()


class ManyRanks(Ranks, ABC):
    """Several ranks that sum their gradients slice by slice. Subclasses transfer the slices."""

    def sum(self, parts: list[Part], count: int) -> Any:
        """See :meth:`Ranks.sum`."""
        like = parts[0].value
        dtypes = {dtype_name(x) for _, x in named_arrays(like)}
        total = {name: self._sum_flat(parts, count, name) for name in sorted(dtypes)}
        used = dict.fromkeys(total, 0)

        def take(x: Any) -> Any:
            name = dtype_name(x)
            start = used[name]
            used[name] += x.size
            return from_host(total[name][start : used[name]].reshape(x.shape), like=x)

        return map_arrays(take, like)

    def _sum_flat(self, parts: list[Part], count: int, dtype: str) -> Array:
        """All arrays of that dtype one behind the other, (L,), summed over all micro-batches."""
        flat = [Part(p.level, p.index, self._flat(p.value, dtype)) for p in parts]
        length = len(flat[0].value)
        bounds = [length * r // self.size for r in range(self.size + 1)]
        sizes = [b - a for a, b in pairwise(bounds)]
        mine = sizes[self.rank]
        of_rank = [list(subtrees(share_of(count, r, self.size))) for r in range(self.size)]

        # send every rank its slice of all my subtrees, receive my slice of theirs
        xp = array_module(flat[0].value)
        send = xp.concat([p.value[a:b] for a, b in pairwise(bounds) for p in flat])
        send_counts = [len(flat) * size for size in sizes]
        received = self._all_to_all(send, send_counts, [len(names) * mine for names in of_rank])
        merged: list[Part] = []
        start = 0
        for level, index in (name for names in of_rank for name in names):
            add_part(merged, Part(level, index, received[start : start + mine]), operator.add)
            start += mine
        return self._all_gather(add_up_parts(merged, operator.add), sizes)

    def _flat(self, tree: Any, dtype: str) -> Array:
        """The arrays of that dtype one behind the other, (L,), where the slices travel from."""
        arrays = [x for _, x in named_arrays(tree) if dtype_name(x) == dtype]
        xp = array_module(arrays[0])
        return xp.concat([xp.reshape(x, (-1,)) for x in arrays])

    @abstractmethod
    def _all_to_all(self, send: Array, send_counts: list[int], counts: list[int]) -> Array:
        """What all ranks send this one, by rank, (sum of counts,); send is cut by send_counts."""

    @abstractmethod
    def _all_gather(self, mine: Array, sizes: list[int]) -> Array:
        """Every rank's slice, by rank, (sum of sizes,)."""


class MPIRanks(ManyRanks):
    """The processes that ``mpiexec -n R python -m pvt_ref train ...`` started, by mpi4py.

    Arrays on a device travel through the host.

    Raises:
        TrainingError: if mpi4py, or the MPI library that it needs, is not installed.
    """

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
            how = "pip install mpi4py mpich brings it, and an MPI library that needs no root"
            raise TrainingError(f"MPI cannot be used here ({error}). {how}") from error
        self._comm, self._one_machine = MPI.COMM_WORLD, MPI.COMM_TYPE_SHARED
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self.over = False  # whether this rank has failed, or knows that another has

    def for_device(self, device: str) -> Ranks:
        """See :meth:`Ranks.for_device`."""
        if device != "cuda":  # the host, or a device that the user has chosen
            return self
        try:
            cupy, here = import_cupy(), self._comm.Split_type(self._one_machine)
            devices = cupy.cuda.runtime.getDeviceCount()
            cupy.cuda.Device(here.Get_rank() % devices).use()
            one_each = here.Get_size() <= devices and has_nccl(cupy)
        except PVTError as error:
            self.fail(error)
            raise
        return NCCLRanks(self) if all(self.gather(one_each)) else self

    def gather(self, value: Any) -> list[Any]:
        """See :meth:`Ranks.gather`."""
        values = self._comm.allgather(value)
        failed = [(r, x) for r, x in enumerate(values) if isinstance(x, Failure)]
        if failed and not self.over:
            self.over = True
            rank, failure = failed[0]
            raise TrainingError(f"rank {rank} of {self.size} has failed: {failure.why}")
        return values

    def from_first(self, make: Callable[[], Any]) -> Any:
        """See :meth:`Ranks.from_first`. What it raises there, all raise."""
        if self.is_first:
            try:
                made = make()
            except PVTError as error:
                self.over = True
                self._comm.bcast(Failure(str(error)))
                raise
            self._comm.bcast(to_numpy(made))
            return made
        made = self._comm.bcast(None)
        if isinstance(made, Failure):
            self.over = True
            raise TrainingError(f"rank 0 of {self.size} has failed: {made.why}")
        return made

    def _flat(self, tree: Any, dtype: str) -> np.ndarray:
        return super()._flat(to_numpy(tree), dtype)

    def _all_to_all(self, send: Array, send_counts: list[int], counts: list[int]) -> Array:
        received = np.empty(sum(counts), send.dtype)
        self._comm.Alltoallv([send, send_counts], [received, counts])
        return received

    def _all_gather(self, mine: Array, sizes: list[int]) -> Array:
        total = np.empty(sum(sizes), mine.dtype)
        self._comm.Allgatherv(np.ascontiguousarray(mine), [total, sizes])
        return total

    def fail(self, error: BaseException) -> None:
        """See :meth:`Ranks.fail`."""
        if not self.over:
            self.over = True
            self.gather(Failure(str(error)))

    def abort(self) -> None:
        """See :meth:`Ranks.abort`. Says first what is being raised."""
        sys.stderr.write(traceback.format_exc())
        sys.stderr.flush()
        time.sleep(0.5)  # until it is passed on: what is under way when the ranks end is lost
        self._comm.Abort(1)


class NCCLRanks(ManyRanks):
    """Ranks with a GPU each: gradients go from one to another by NCCL, all else as before.

    Args:
        host: the same ranks, and how they speak of what is not on a device.

    Raises:
        DeviceError: if CUDA cannot be used.
    """

    def __init__(self, host: Ranks) -> None:
        cupy = import_cupy()
        self._host, self.rank, self.size = host, host.rank, host.size
        self._nccl, self._stream = cupy.cuda.nccl, cupy.cuda.get_current_stream
        (name, *_) = host.gather(self._nccl.get_unique_id() if self.is_first else None)
        self._comm = self._nccl.NcclCommunicator(self.size, name, self.rank)

    def gather(self, value: Any) -> list[Any]:
        """See :meth:`Ranks.gather`."""
        return self._host.gather(value)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """See :meth:`Ranks.from_first`."""
        return self._host.from_first(make)

    def fail(self, error: BaseException) -> None:
        """See :meth:`Ranks.fail`."""
        self._host.fail(error)

    def abort(self) -> None:
        """See :meth:`Ranks.abort`."""
        self._host.abort()

    def _all_to_all(self, send: Array, send_counts: list[int], counts: list[int]) -> Array:
        starts = [sum(send_counts[:r]) for r in range(self.size)]
        pieces = [send[a : a + n] for a, n in zip(starts, send_counts, strict=True)]
        return self._exchange(pieces, counts)

    def _all_gather(self, mine: Array, sizes: list[int]) -> Array:
        return self._exchange([mine] * self.size, sizes)

    def _exchange(self, pieces: list[Array], counts: list[int]) -> Array:
        """Sends every rank its piece; gives what they send this one, (sum of counts,)."""
        xp = array_module(pieces[0])
        received = xp.empty(sum(counts), dtype=pieces[0].dtype)
        kind = getattr(self._nccl, f"NCCL_{dtype_name(received).upper()}")
        stream, start = self._stream().ptr, 0
        self._nccl.groupStart()
        for rank, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            self._comm.send(address(piece), piece.size, kind, rank, stream)
            self._comm.recv(address(received[start:]), count, kind, rank, stream)
            start += count
        self._nccl.groupEnd()
        return received


def has_nccl(cupy: Any) -> bool:
    """Whether CuPy finds NCCL, which it warns of if not: here the host is as good."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(cupy.cuda.nccl.available)


def share_of(count: int, rank: int, size: int) -> range:
    """The consecutive items of count that a rank takes, divided as evenly as possible."""
    return range(count * rank // size, count * (rank + 1) // size)


def subtrees(leaves: range) -> Iterator[tuple[int, int]]:
    """Level and index of the largest subtrees that consecutive micro-batches make up."""
    names: list[Part] = []
    for index in leaves:
        add_part(names, Part(0, index, None), lambda a, b: None)
    yield from ((part.level, part.index) for part in names)


#: What launchers of MPI programs set: MPICH and its relatives, Open MPI, Slurm's srun with PMI.
_OF_MPI = ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")


def ranks_here() -> Ranks:
    """The ranks that mpiexec started with this process, or this process alone."""
    started = any(name in os.environ for name in _OF_MPI)
    return MPIRanks() if started else ALONE
