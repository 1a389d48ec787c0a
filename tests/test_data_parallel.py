"""Trainings on several ranks: the same bits as on one, and one message where a rank fails."""

import ctypes
import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loose import loose
from small_photos import write_colours, write_photos
from small_training import CONFIG, DATA, HELD_OUT, RECIPE
from strategies import random_params

import pvt_ref
from pvt_ref.errors import CheckpointError, TrainingError
from pvt_ref.train import (
    Options,
    data_parallel,
    evaluate,
    fit,
    from_folder,
    read_metrics,
    train_folder,
)
from pvt_ref.train.data_parallel import (
    ALONE,
    Part,
    Ranks,
    add_part,
    add_up_parts,
    share_of,
    subtrees,
)
from pvt_ref.train.loop import BEST, METRICS, STATE

HERE = Path(__file__).parent
SCRIPT = str(HERE / "mpi_training.py")
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
MISSING = "mpiexec" if MPIEXEC is None else "mpi4py"
THERE = MPIEXEC is not None and importlib.util.find_spec("mpi4py") is not None
MPI = pytest.mark.skipif(not THERE, reason=f"no ranks ran: {MISSING} is missing (extra 'mpi')")


def run(ranks: int, *arguments: object) -> subprocess.CompletedProcess:
    """The program on so many ranks; without MPI if it is none."""
    before = [] if not ranks else [str(MPIEXEC), "-n", str(ranks)]
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    if not ranks:  # what a launcher of the tests themselves may have set
        for name in data_parallel._OF_MPI:
            environment.pop(name, None)
    return subprocess.run(
        [*before, *command],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip


def train(ranks: int, folder: Path, *arguments: object) -> None:
    done = run(ranks, SCRIPT, folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank ") == max(ranks, 1)


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same bits, and measured the same."""
    clocks = ("images_per_second", "data_wait")
    metrics = [
        [{k: v for k, v in line.items() if k not in clocks} for line in read_metrics(x / METRICS)]
        for x in (a, b)
    ]
    files = [(x / name).read_bytes() for name in (STATE, BEST) for x in (a, b)]
    return files[0] == files[1] and files[2] == files[3] and metrics[0] == metrics[1]


# The order of sums --------------------------------------------------------------------------------


def named(leaves: range) -> list[Part]:
    """Parts whose values say in which order they were added."""
    parts: list[Part] = []
    for i in leaves:
        add_part(parts, Part(0, i, str(i)), lambda a, b: f"({a}+{b})")
    return parts


def test_the_tree_is_balanced_and_fixed():
    def order(count: int) -> str:
        return add_up_parts(named(range(count)), lambda a, b: f"({a}+{b})")

    assert [order(n) for n in (1, 2, 3, 4)] == ["0", "(0+1)", "((0+1)+2)", "((0+1)+(2+3))"]
    assert order(6) == "(((0+1)+(2+3))+(4+5))"
    assert order(7) == "(((0+1)+(2+3))+((4+5)+6))"


@given(count=st.integers(1, 70), size=st.integers(1, 9))
def test_any_number_of_ranks_adds_in_the_same_order(count, size):
    expected = add_up_parts(named(range(count)), lambda a, b: f"({a}+{b})")
    merged: list[Part] = []
    covered = []
    for rank in range(size):
        mine = share_of(count, rank, size)
        parts = named(mine)
        assert [(part.level, part.index) for part in parts] == list(subtrees(mine))
        for part in parts:
            covered += range(part.index << part.level, (part.index + 1) << part.level)
            add_part(merged, part, lambda a, b: f"({a}+{b})")
    assert covered == list(range(count))
    assert add_up_parts(merged, lambda a, b: f"({a}+{b})") == expected


def test_one_process_is_all_ranks():
    assert (ALONE.rank, ALONE.size, ALONE.is_first) == (0, 1, True)
    assert ALONE.share(5) == range(5)
    assert ALONE.gather("x") == ["x"]
    assert ALONE.from_first(lambda: 3) == 3
    ALONE.fail(TrainingError("nobody hears it"))
    ALONE.abort()


class Told(Ranks):
    """A rank that is asked after those before it; told holds what these have said."""

    def __init__(self, rank: int, size: int, told: list) -> None:
        self.rank, self.size, self.told = rank, size, told

    def gather(self, value):
        self.told.append(value)
        return self.told


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_any_number_of_ranks_measures_the_same_to_the_bit(size):
    """Losses of float64 are rounded when added up, so batches have to come in their order."""
    params = random_params(CONFIG, 0, np.float64)
    told: list = []
    found = None
    for rank in range(size):
        found = evaluate(params, CONFIG, DATA, 2, Told(rank, size, told))
    assert len(told) == size
    assert found == evaluate(params, CONFIG, DATA, 2)


def test_a_signal_to_any_rank_stops_all(tmp_path):
    """As seen by the first one, while the second one is told to stop in the third step."""

    class Second(Ranks):
        asked = 0

        def gather(self, value):
            if not isinstance(value, bool):
                return [value]
            self.asked += 1
            return [value, self.asked > 3]

    done = fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "run", ranks=Second())
    assert (done.state.step, done.finished) == (3, False)
    assert fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "run", resume=True).finished


def test_without_mpi_there_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name in data_parallel._OF_MPI:
        monkeypatch.delenv(name, raising=False)
    assert data_parallel.ranks_here() is ALONE
    monkeypatch.setenv("PMI_RANK", "0")
    with pytest.raises(TrainingError, match=r"MPI cannot be used here .* pip install mpi4py mpich"):
        data_parallel.ranks_here()


# NCCL ---------------------------------------------------------------------------------------------


class Room:
    """What ranks in threads share: values to gather, and bytes on their way."""

    def __init__(self, size: int) -> None:
        self.barrier, self.said = threading.Barrier(size), [None] * size
        self.on_the_way = {(a, b): queue.Queue() for a in range(size) for b in range(size)}


class InRoom(Ranks):
    def __init__(self, room: Room, rank: int, size: int) -> None:
        self.room, self.rank, self.size = room, rank, size

    def gather(self, value):
        self.room.said[self.rank] = value
        self.room.barrier.wait(60)
        said = list(self.room.said)
        self.room.barrier.wait(60)
        return said


class Wire:
    """An NCCL communicator on the host's memory: it moves bytes by their addresses alone."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.waiting = room, rank, []

    def send(self, address, count, kind, peer, stream):
        assert stream == 7
        piece = ctypes.string_at(address, count * kind)
        self.room.on_the_way[self.rank, peer].put(piece)

    def recv(self, address, count, kind, peer, stream):
        self.waiting.append((address, count * kind, peer))

    def end(self):
        for address, size, peer in self.waiting:
            piece = self.room.on_the_way[peer, self.rank].get(timeout=60)
            assert len(piece) == size
            ctypes.memmove(address, piece, size)
        self.waiting.clear()


def nccl_in_room(room: Room, rank: int, size: int) -> data_parallel.NCCLRanks:
    """NCCLRanks as they are, with a wire that needs no GPU."""
    ranks = object.__new__(data_parallel.NCCLRanks)
    ranks._host, ranks.rank, ranks.size = InRoom(room, rank, size), rank, size
    ranks._comm = Wire(room, rank)
    ranks._stream = lambda: types.SimpleNamespace(ptr=7)
    ranks._nccl = types.SimpleNamespace(
        NCCL_FLOAT32=4, NCCL_FLOAT64=8, groupStart=lambda: None, groupEnd=ranks._comm.end
    )
    return ranks


def some_gradients(seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    a, b, c = (rng.standard_normal(shape) for shape in ((3, 5), (4,), (7, 1, 2)))
    return a.astype(np.float32), b, c.astype(np.float32)


@pytest.mark.parametrize(("size", "count"), [(1, 3), (2, 2), (2, 5), (3, 7), (4, 4), (4, 9)])
def test_slices_by_nccl_have_the_bits_of_one_process(size, count):
    """All but the wire is what runs on GPUs; several of these are not to be had here."""

    def parts(leaves: range) -> list[Part]:
        made: list[Part] = []
        for i in leaves:
            add_part(made, Part(0, i, some_gradients(i)), data_parallel.add_trees)
        return made

    expected = ALONE.sum(parts(range(count)), count)
    room = Room(size)

    def run_rank(rank: int) -> tuple[np.ndarray, ...]:
        ranks = nccl_in_room(room, rank, size)
        return ranks.sum(parts(ranks.share(count)), count)

    with ThreadPoolExecutor(size) as pool:
        totals = list(pool.map(run_rank, range(size)))
    for total in totals:
        for got, value in zip(total, expected, strict=True):
            assert got.dtype == value.dtype
            np.testing.assert_array_equal(got, value)


def test_ranks_with_nccl_speak_as_before():
    host: Any = InRoom(Room(1), 0, 1)
    ranks = object.__new__(data_parallel.NCCLRanks)
    ranks._host, ranks.rank, ranks.size = host, 0, 1
    assert ranks.gather("x") == ["x"]
    assert ranks.from_first(lambda: 3) == 3
    heard = []
    host.fail, host.abort = heard.append, lambda: heard.append("abort")
    ranks.fail(loose("why"))
    ranks.abort()
    assert heard == ["why", "abort"]


@pytest.mark.gpu
def test_one_gpu_by_nccl_changes_no_bit(cupy):
    """All that one GPU can show: slices that it sends to itself. Several were not to be had."""
    if not data_parallel.has_nccl(cupy):
        pytest.skip("this CuPy finds no NCCL")
    parts: list[Part] = []
    for i in range(5):
        gradients = tuple(map(cupy.asarray, some_gradients(i)))
        add_part(parts, Part(0, i, gradients), data_parallel.add_trees)
    ranks = data_parallel.NCCLRanks(ALONE)
    total, expected = ranks.sum(parts, 5), ALONE.sum(parts, 5)
    for got, value in zip(total, expected, strict=True):
        np.testing.assert_array_equal(got.get(), value.get())


def test_ranks_on_the_host_stay_as_they_are():
    assert ALONE.for_device("cuda") is ALONE


# The same bits ------------------------------------------------------------------------------------


@MPI
@pytest.mark.parametrize("network", ["pvt", "pvt_v2", "vit"])
def test_ranks_change_no_bit(network, tmp_path):
    train(0, tmp_path / "alone", "--network", network)
    for ranks in (1, 2, 4) if network == "pvt" else (4,):
        train(ranks, tmp_path / str(ranks), "--network", network)
        assert same(tmp_path / "alone", tmp_path / str(ranks)), ranks


@MPI
def test_the_training_examples_run_on_ranks_and_the_first_one_reports(tmp_path):
    given = ("--epochs", 1, "--warmup-epochs", 0.5, "--accumulate", 2)
    program = HERE.parent / "examples" / "train_digits.py"
    told = []
    for ranks in (0, 2):
        done = run(ranks, program, *given, "--folder", tmp_path / str(ranks))
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert same(tmp_path / "0", tmp_path / "2")
    assert [x.count("389,098 parameters") for x in told] == [1, 1]
    assert [x.count("held_out_accuracy: ") for x in told] == [1, 1]


@MPI
def test_uneven_shares_and_float64(tmp_path):
    given = ("--accumulate", 5, "--double")
    train(0, tmp_path / "alone", *given)
    train(3, tmp_path / "three", *given)
    assert same(tmp_path / "alone", tmp_path / "three")


@MPI
@pytest.mark.parametrize("network", ["pvt", "pvt_v2", "vit"])
def test_gradients_are_those_of_the_whole_batch(network, tmp_path):
    """In float64, without chance: four ranks with a micro-batch each, and one process without."""
    given = ("--network", network, "--double", "--calm", "--stop", 1)
    train(0, tmp_path / "alone", "--accumulate", 1, "--gradients", tmp_path / "a.npz", *given)
    train(4, tmp_path / "four", "--accumulate", 4, "--gradients", tmp_path / "b.npz", *given)
    a, b = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert set(a) == set(b)
    for key in a:
        scale = np.abs(a[key]).max()
        np.testing.assert_allclose(b[key], a[key], rtol=0, atol=1e-12 * max(scale, 1e-3))


@MPI
def test_photos_are_read_by_the_rank_that_needs_them(tmp_path):
    write_photos(tmp_path / "learnt", 27, 1)
    write_photos(tmp_path / "held_out", 9, 2)
    train(0, tmp_path / "alone", "--photos", tmp_path)
    done = run(2, SCRIPT, tmp_path / "two", "--photos", tmp_path, "--count")
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "alone", tmp_path / "two")
    # 3 epochs of 4 steps of 6 samples, in 4 micro-batches: 2, 2, 1, 1
    assert "rank 0 read 48 photos" in done.stdout
    assert "rank 1 read 24 photos" in done.stdout


@MPI
def test_stopped_and_resumed_with_another_number_of_ranks(tmp_path):
    train(0, tmp_path / "alone")
    train(4, tmp_path / "run", "--stop", 5)
    train(2, tmp_path / "run", "--stop", 9, "--resume")
    train(0, tmp_path / "run", "--resume")
    assert same(tmp_path / "alone", tmp_path / "run")


# Failures -----------------------------------------------------------------------------------------


@MPI
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_fails_ends_all_and_the_first_says_why(rank, tmp_path):
    done = run(3, SCRIPT, tmp_path / "run", "--fail", rank, 5, "error")
    assert done.returncode == 2
    said = "made to fail" if rank == 0 else "rank 2 of 3 has failed: made to fail"
    assert f"rank 0: {said}" in done.stderr
    assert "rank 1: rank" in done.stderr


@MPI
@pytest.mark.parametrize("stop", [None, 7])
def test_a_last_save_that_fails_ends_all(stop, tmp_path):
    """After it no step follows, in which the others would hear of it."""
    ends = () if stop is None else ("--stop", stop)
    done = run(2, SCRIPT, tmp_path / "run", "--fail", 0, stop or 12, "save", *ends)
    assert done.returncode == 2
    assert "rank 0: made to fail at saving" in done.stderr
    assert "rank 1: rank 0 of 2 has failed: made to fail at saving" in done.stderr


class Noting(Ranks):
    """One rank that notes what it says and when."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def gather(self, value):
        self.said.append("gather")
        return [value]

    def from_first(self, make):
        self.said.append("from first")
        return make()

    def fail(self, error):
        self.said.append(f"fail: {error}")


def test_a_run_on_a_folder_ends_with_a_word_and_so_does_reading_its_photos(tmp_path, monkeypatch):
    write_colours(tmp_path / "data", 4)
    config = pvt_ref.PVTConfig(img_size=32, embed_dims=(4, 8, 12, 16), num_heads=(1, 1, 1, 1))
    options = Options(size=32, recipe={"epochs": 1, "batch_size": 4})
    for name in ("_split", "_finish"):
        inner = getattr(from_folder, name)

        def note(*args, inner=inner, name=name):
            ranks.said.append(name)
            return inner(*args)

        monkeypatch.setattr(from_folder, name, note)
    ranks = Noting()
    train_folder(tmp_path / "data", tmp_path / "run", options, config=config, ranks=ranks)
    after_split = ranks.said.index("_split") + 1
    assert ranks.said[after_split : after_split + 2] == ["gather", "from first"]
    assert ranks.said[-2:] == ["_finish", "gather"]

    def full_disk(path, *args):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(from_folder, "_finish", full_disk)
    ranks = Noting()
    with pytest.raises(CheckpointError):
        train_folder(tmp_path / "data", tmp_path / "again", options, config=config, ranks=ranks)
    assert ranks.said[-1] == "fail: the disk is full"


@MPI
@pytest.mark.parametrize("rank", [0, 2])
def test_a_bug_in_a_rank_ends_all(rank, tmp_path):
    done = run(3, SCRIPT, tmp_path / "run", "--fail", rank, 5, "bug")
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr


@MPI
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_the_run_goes_on(rank, tmp_path):
    train(0, tmp_path / "alone")
    done = run(2, SCRIPT, tmp_path / "run", "--fail", rank, 6, "kill")
    assert done.returncode != 0
    assert "KILLED" in done.stdout.upper()
    train(2, tmp_path / "run", "--resume")
    assert same(tmp_path / "alone", tmp_path / "run")


@MPI
def test_more_ranks_than_micro_batches_are_refused(tmp_path):
    done = run(4, SCRIPT, tmp_path / "run", "--accumulate", 3)
    assert done.returncode == 2
    assert "there are 4 ranks, and the recipe has accumulate=3" in done.stderr
    assert not (tmp_path / "run").exists()


@MPI
def test_a_folder_of_another_run_is_refused_by_all(tmp_path):
    train(2, tmp_path / "run", "--stop", 1)
    done = run(2, SCRIPT, tmp_path / "run")
    assert done.returncode == 2
    assert "rank 0: " in done.stderr
    assert "rank 1: rank 0 of 2 has failed: " in done.stderr
    assert done.stderr.count("holds a training already") == 2


@MPI
def test_ranks_with_other_threads_are_refused(tmp_path):
    done = run(2, SCRIPT, tmp_path / "run", "--threads-by-rank")
    assert done.returncode == 2
    assert "their last bits would differ" in done.stderr


# The command line ---------------------------------------------------------------------------------


@MPI
def test_train_on_two_ranks_is_train_with_two_micro_batches(tmp_path):
    data = write_colours(tmp_path / "data", 8)
    command = ["-m", "pvt_ref", "train", data, "--variant", "pvt_v2_b0", "--size", 32]
    command += ["--epochs", 1, "--batch-size", 7]
    for ranks, name in ((0, "alone"), (2, "two")):
        more = [] if ranks else ["--accumulate", 2]
        done = run(ranks, *command, *more, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("photos held out are right") == 1  # one speaks
    assert same(tmp_path / "alone", tmp_path / "two")
    model = pvt_ref.load(tmp_path / "two" / "model.safetensors")
    assert model.info.training["recipe"]["accumulate"] == 2


@MPI
def test_the_command_line_says_once_what_is_wrong(tmp_path):
    done = run(3, "-m", "pvt_ref", "train", tmp_path / "none", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.count("there is no folder") == 1
