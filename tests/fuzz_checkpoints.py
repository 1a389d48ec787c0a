"""Damages weights files at random and loads them: refused, or exactly what was saved.

    python tests/fuzz_checkpoints.py --count 100000 --seed 0
    python tests/fuzz_checkpoints.py --kind pth --seed 0 --start 4711 --count 1     (one case again)

Case n depends on the kind, the seed and n alone, so that a run can be taken up at any n with
--start, and a failure is one line to repeat. Kinds of file:

    pth          a training checkpoint written by PyTorch
    safetensors  a file of save()
    resealed     the pth, whose pickle is damaged and whose checksums are then made right again: the
                 content is really different, and must be refused or be some model, no more

An outcome other than CheckpointError or the model is a failure: other numbers, another
configuration, a foreign exception (warnings too), ten seconds, or 256 MiB of memory.
"""

import argparse
import contextlib
import functools
import io
import random
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvt_ref import Model, PVTConfig, init_params, to_state_dict
from pvt_ref.checkpoint import load, save
from pvt_ref.errors import CheckpointError

CONFIG = PVTConfig(  # as few bytes as a PVT can have
    img_size=32,
    num_classes=2,
    embed_dims=(2, 2, 2, 2),
    num_heads=(1, 2, 1, 1),
    mlp_ratios=(1, 1, 1, 1),
    depths=(1, 1, 1, 1),
    sr_ratios=(2, 1, 1, 1),
    norm_eps=1e-6,
    projection_norm_eps=1e-6,
)
KINDS = ("pth", "safetensors", "resealed")
MEMORY = 256 * 2**20
SECONDS = 10


class WrongOutcomeError(Exception):
    """An outcome that must not be."""


class Hang(BaseException):
    """Not an Exception, so that nothing on the way turns it into a CheckpointError."""


@dataclass(frozen=True)
class Sample:
    """A good file, its model, and where damage is likeliest to matter."""

    data: bytes
    model: Model
    spots: tuple[tuple[int, int], ...]  # ranges of bytes
    config: PVTConfig | None  # what load is given


@functools.cache
def sample(kind: str) -> Sample:
    model = Model(init_params(CONFIG, np.random.default_rng(0)), CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"good.{kind}"
        if kind == "safetensors":
            path = path.with_suffix(".safetensors")
            save(path, model)
            data = path.read_bytes()
            header = 8 + int.from_bytes(data[:8], "little")
            metadata = data.index(b"__metadata__")
            end = data.index(b"}", data.index(b"sha256", metadata)) + 4
            return Sample(data, model, ((0, 8), (0, header), (metadata, end)), None)
        write_training_checkpoint(path, model)
        data = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            directory = archive.start_dir
            local = tuple((i.header_offset, i.header_offset + 60) for i in infos)
            pickled = next(i for i in infos if i.filename.endswith("data.pkl"))
        start = data.index(archive_read(data, pickled.filename))
        spots = (
            (directory, len(data)),
            (len(data) - 22, len(data)),
            (start, start + pickled.file_size),
            *random.Random(0).sample(local, 3),
        )
        return Sample(data, model, spots, CONFIG)


def write_training_checkpoint(path: Path, model: Model) -> None:
    import torch

    state = {key: torch.from_numpy(x.copy()) for key, x in to_state_dict(model.params).items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    args = argparse.Namespace(model="pvt_tiny", betas=(0.9, None))
    torch.save({"model": state, "optimizer": optimizer, "epoch": 3, "args": args}, path)


def archive_read(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(name)


# --- damage: each takes the bytes, the generator and a range to aim at ---------------------------

Damage = Callable[[bytearray, random.Random, int, int], None]


def flip_bits(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    at = rng.randrange(low, high)
    values = rng.randbytes(rng.choice((1, 2, 4, 8, 16, 64)))
    data[at : at + len(values)] = values[: len(data) - at]


def extreme(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    at, size = rng.randrange(low, high), rng.choice((1, 2, 4, 8))
    data[at : at + size] = (rng.choice((b"\xff", b"\x7f", b"\x80", b"\0")) * size)[: len(data) - at]


def change_character(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    """A digit or letter becomes another one: the text stays well-formed."""
    text = [i for i in range(low, high) if chr(data[i]).isalnum() and data[i] < 128]
    if text:
        at = rng.choice(text)
        kind = b"0123456789" if chr(data[at]).isdigit() else b"abcdefghijklmnopqrstuvwxyzFI"
        data[at] = rng.choice(kind)


def truncate(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    del data[rng.randrange(low, high) :]


def insert(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    at = rng.choice((0, len(data), rng.randrange(low, high)))
    size = rng.choice((1, 2, 8, 64))
    data[at:at] = rng.choice((rng.randbytes(size), bytes(size), b" " * size, data[at : at + size]))


def delete(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    at = rng.randrange(low, high)
    del data[at : at + rng.choice((1, 2, 8, 46, 64, 512))]


def block(data: bytearray, rng: random.Random, low: int, high: int) -> tuple[int, int, int]:
    """Two places and a size that fits at both."""
    a, b = rng.randrange(low, high), rng.randrange(len(data))
    size = min(rng.choice((4, 8, 16, 64, 512)), len(data) - max(a, b))
    return a, b, size


def swap_blocks(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    a, b, size = block(data, rng, low, high)
    first, second = bytes(data[a : a + size]), bytes(data[b : b + size])
    data[a : a + size] = second
    data[b : b + size] = first


def copy_block(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    a, b, size = block(data, rng, low, high)
    data[a : a + size] = data[b : b + size]


def blank_block(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    a, _, size = block(data, rng, low, high)
    data[a : a + size] = rng.choice((b"\0", b" ", b"\xff")) * size


DAMAGES: tuple[Damage, ...] = (
    flip_bits,
    overwrite,
    extreme,
    change_character,
    truncate,
    insert,
    delete,
    swap_blocks,
    copy_block,
    blank_block,
)


def damage(good: Sample, rng: random.Random) -> tuple[bytes, str]:
    """A damaged file, and what was done to it."""
    data = bytearray(good.data)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        low, high = 0, len(good.data)
        if rng.random() < 0.6:
            low, high = rng.choice(good.spots)
        high = min(high, len(data))
        if low < high:
            how = rng.choice(DAMAGES)
            how(data, rng, low, high)
            done.append(how.__name__)
    return bytes(data), "+".join(done) or "nothing"


def damage_resealed(good: Sample, rng: random.Random) -> tuple[bytes, str]:
    """The pickle, the byte order or a storage damaged under checksums that are right."""
    with zipfile.ZipFile(io.BytesIO(good.data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    name = pickled if rng.random() < 0.9 else rng.choice(list(entries))
    inner = Sample(entries[name], good.model, ((0, len(entries[name])),), good.config)
    entries[name], done = damage(inner, rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue(), done


# --- judgement -----------------------------------------------------------------------------------


def make_case(kind: str, seed: int, index: int) -> tuple[Sample, bytes, str]:
    rng = random.Random(f"{kind} {seed} {index}")
    good = sample("safetensors" if kind == "safetensors" else "pth")
    data, done = (damage_resealed if kind == "resealed" else damage)(good, rng)
    return good, data, done


def check_case(kind: str, seed: int, index: int, path: Path) -> str:
    """``"refused"``, ``"the same"`` or, for a resealed file only, ``"another model"``.

    Raises:
        WrongOutcomeError: for anything else, with the line that repeats the case.
    """
    good, data, done = make_case(kind, seed, index)
    path.write_bytes(data)
    try:
        with time_limit():
            model = load(path, good.config)
    except CheckpointError as error:
        if str(path) in str(error):
            return "refused"
        problem = f"a message without the path: {error}"
    except (Exception, Hang) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        if is_same(model, good.model):
            return "the same"
        if kind == "resealed":
            return "another model"
        problem = "loaded silently different"
    raise WrongOutcomeError(
        f"{kind}, {done}: {problem}\n  python tests/fuzz_checkpoints.py --kind {kind} "
        f"--seed {seed} --start {index} --count 1"
    )


def is_same(model: Model, other: Model) -> bool:
    """Bitwise, keys, shapes and dtypes included."""
    found, wanted = to_state_dict(model.params), to_state_dict(other.params)
    return (
        model.config == other.config
        and list(found) == list(wanted)
        and all(
            x.dtype == wanted[key].dtype
            and x.shape == wanted[key].shape
            and x.tobytes() == wanted[key].tobytes()
            for key, x in found.items()
        )
    )


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def give_up(*args: object) -> None:
        raise Hang(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit() -> Iterator[bool]:
    """Lets the process take MEMORY more than it has, and no more, where the system can do that."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield False
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield True
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(
    kinds: tuple[str, ...], seed: int, start: int, count: int, report: Callable[[str], None]
) -> tuple[Counter, list[WrongOutcomeError]]:
    """count cases of each kind, from number start. Counts by (kind, outcome), and the failures."""
    outcomes: Counter = Counter()
    failures: list[WrongOutcomeError] = []
    for kind in kinds:
        make_case(kind, seed, start)  # loads and makes what is needed before the limit
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        memory_limit() as limited,
    ):
        warnings.simplefilter("error")
        path = Path(folder) / "damaged"
        for index in range(start, start + count):
            for kind in kinds:
                try:
                    outcomes[kind, check_case(kind, seed, index, path)] += 1
                except WrongOutcomeError as failure:
                    outcomes[kind, "FAILED"] += 1
                    failures.append(failure)
                    report(str(failure))
            if (index + 1) % 5000 == 0 or index == start + count - 1:
                counts = ", ".join(f"{k} {o} {n}" for (k, o), n in sorted(outcomes.items()))
                seconds = time.monotonic() - began
                report(f"up to {index}: {counts}; {seconds:.0f} s (--start {index + 1} goes on)")
        if not limited:
            report("memory was not limited on this system")
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage weights files at random and load them.")
    parser.add_argument("--kind", choices=(*KINDS, "all"), default="all")
    parser.add_argument("--count", type=int, default=100_000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    kinds = KINDS if options.kind == "all" else (options.kind,)
    _, failures = run(
        kinds, options.seed, options.start, options.count, lambda line: print(line, flush=True)
    )
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
