"""Damages weights files at random and loads them: refused, or exactly what was saved.

    python tests/fuzz_checkpoints.py --count 100000 --seed 0
    python tests/fuzz_checkpoints.py --kind pth --seed 0 --start 4711 --count 1     (one case again)

Case n depends on the kind, the seed and n alone, so that a run can be taken up at any n with
--start, and a failure is one line to repeat. Kinds of file:

    pth          a training checkpoint written by PyTorch
    safetensors  a file of save()
    legacy       the same checkpoint in the format from before PyTorch 1.6, which has no checksum
    resealed     the pth, whose pickle is damaged and whose checksums are then made right again
    lies         either format, its pickle rewritten by whole instructions (other names, numbers,
                 memo slots and order, repeated thousands of times), its list of storages and
                 their sizes changed: well-formed, which random damage hardly ever is
    pvt_v2       a PVT v2 as other projects write it, in five layouts, with a config.json where
                 there is one; damaged in bytes, headers, keys, shapes, dtypes, values, or asked for
                 as something else: see fuzz_layouts.py
    vit          a ViT in four layouts, likewise

In legacy, resealed and lies the content is really different where no checksum can tell: it must be
refused or be some model, no more. In the last two, a second reader says what is right. An outcome
other than CheckpointError or the model is a failure: other numbers, another configuration, a
foreign exception (warnings too), ten seconds of work, or 256 MiB of memory.
"""

import argparse
import contextlib
import functools
import io
import pickle
import pickletools
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
from typing import Any, NamedTuple

import fuzz_layouts
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
KINDS = ("pth", "safetensors", "legacy", "resealed", "lies", *fuzz_layouts.KINDS)
CHECKSUMMED = ("pth", "safetensors")
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
        write_training_checkpoint(path, model, new=kind != "legacy")
        data = path.read_bytes()
        if kind == "legacy":
            *heads, saved, keys = legacy_pickles(data)
            spots = (heads[0], heads[-1], saved, saved, keys, (keys[1], keys[1] + 60))
            return Sample(data, model, spots, CONFIG)
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


def legacy_pickles(data: bytes) -> list[tuple[int, int]]:
    """Where the five pickles of the older format lie."""
    stream = io.BytesIO(data)
    places = []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        places.append((start, stream.tell()))
    return places


def write_training_checkpoint(path: Path, model: Model, new: bool = True) -> None:
    import torch

    state = {key: torch.from_numpy(x.copy()) for key, x in to_state_dict(model.params).items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    args = argparse.Namespace(model="pvt_tiny", betas=(0.9, None))
    tree = {"model": state, "optimizer": optimizer, "epoch": 3, "args": args}
    torch.save(tree, path, _use_new_zipfile_serialization=new)


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
    return pack(entries), done


def pack(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


# --- lies ----------------------------------------------------------------------------------------

NAMES = (
    b"argparse\nNamespace", b"collections\nOrderedDict", b"collections\ndefaultdict",
    b"torch._utils\n_rebuild_tensor", b"torch._utils\n_rebuild_tensor_v2",
    b"torch._utils\n_rebuild_tensor_v3", b"torch._utils\n_rebuild_parameter",
    b"torch._utils\n_rebuild_parameter_with_state", b"torch._utils\n_rebuild_qtensor",
    b"torch._utils\n_rebuild_sparse_tensor", b"torch._tensor\n_rebuild_from_type_v2",
    b"torch\nDoubleStorage", b"torch\nHalfStorage", b"torch\nQInt8Storage", b"torch\nFloatTensor",
    b"torch.storage\nUntypedStorage", b"torch\nbfloat16", b"torch\nfloat8_e4m3fn",
    b"numpy.core.multiarray\n_reconstruct", b"mmengine.config\nConfig", b"posix\nsystem",
    b"copy_reg\n_reconstructor", b"a" * 300 + b"\nb", b"x\ny z",
)  # fmt: skip
SNIPPETS = (
    b"]", b"}", b")", b"(", b"N", b"0", b"1", b"2", b"t", b"e", b"u", b"a", b"s", b"b", b"R", b"Q",
    b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x93",
    b"\x94",
    b"o", b"l", b"d", b"(l", b"(d", b"(t", b"]\x94", b"}q\x05", b"I1\n", b"X\x01\0\0\0a", b"U\x01a",
    b"G\x7f\xf8\0\0\0\0\0\0", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"(ia\nB\n",
    b"(ca\nB\no",
    b"P1\n", b"\x82\x01", b"\x97", b"\x96\x01\0\0\0\0\0\0\0a", b"X\x03\0\0\0neg",
    b"X\x04\0\0\0conj",
)  # fmt: skip


def instructions(pickled: bytes) -> list[bytes]:
    starts = [at or 0 for _, _, at in pickletools.genops(pickled)]
    return [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]


def number(rng: random.Random) -> bytes:
    """An instruction for a whole number that matters."""
    exact = rng.choice((0, 1, 2, 3, 7, 8, 255, 2**31, 2**32, 2**61 - 1, 2**62, 2**63, 2**64, -1))
    value = rng.choice((1, 1, -1)) * exact + rng.choice((0, 0, 1, -1))
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def lie(parts: list[bytes], rng: random.Random) -> str:
    """Changes a program by whole instructions, and says how."""
    at = rng.randrange(1, len(parts))
    size = rng.choice((1, 1, 2, 3, 5, 20))
    here, there = parts[at : at + size], rng.randrange(1, len(parts))
    how = rng.choice(
        ("delete", "copy", "move", "number", "number", "slot", "name", "name", "insert", "repeat")
    )
    match how:
        case "delete":
            del parts[at : at + size]
        case "copy":
            parts[there:there] = here
        case "move":
            del parts[at : at + size]
            parts[there:there] = here
        case "number":
            places = [i for i, x in enumerate(parts) if x[:1] in (b"K", b"M", b"J")]
            if places:
                parts[rng.choice(places)] = number(rng)
        case "slot":
            places = [i for i, x in enumerate(parts) if x[:1] in b"hjqr"]
            if places:
                place = rng.choice(places)
                other = parts[rng.choice(places)] if rng.random() < 0.5 else None
                opcode = b"j" if parts[place][:1] in b"hj" else b"r"
                wild = opcode + rng.choice((0, 1, 50, 10**3, 10**6, 2**32 - 1)).to_bytes(
                    4, "little"
                )
                parts[place] = other or wild
        case "name":
            places = [i for i, x in enumerate(parts) if x[:1] == b"c"]
            place = rng.choice(places) if places else at
            parts[place : place + bool(places)] = [b"c" + rng.choice(NAMES) + b"\n"]
        case "insert":
            parts[at:at] = [rng.choice(SNIPPETS) for _ in range(size)]
        case _:
            parts[at:at] = [b"".join(here or [rng.choice(SNIPPETS)]) * rng.choice((2, 100, 10**4))]
    return how


def make_lies(rng: random.Random) -> tuple[Sample, bytes, str]:
    """A file of either format that is well-formed and says something else."""
    legacy = rng.random() < 0.5
    good = sample("legacy" if legacy else "pth")
    if not legacy:
        with zipfile.ZipFile(io.BytesIO(good.data)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in entries if name.endswith("data.pkl"))
        parts = instructions(entries[name])
        done = [lie(parts, rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        entries[name] = b"".join(parts)
        return good, pack(entries), "+".join(done)
    places = legacy_pickles(good.data)
    parts = instructions(good.data[slice(*places[3])])
    keys = pickle.loads(good.data[slice(*places[4])])
    blocks, at = [], places[4][1]
    while at < len(good.data):
        size = 8 + 4 * int.from_bytes(good.data[at : at + 8], "little")
        blocks.append(good.data[at : at + size])
        at += size
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        at, other = rng.randrange(len(keys)), rng.randrange(len(keys))
        how = rng.choice(("pickle", "pickle", "pickle", "keys", "order", "blocks", "length", "end"))
        done.append(how)
        match how:
            case "pickle":
                done[-1] = lie(parts, rng)
            case "keys":
                keys[at] = rng.choice((keys[other], "0", 0, None, [], "x" * 10**5, keys))
            case "order":
                keys[at], keys[other] = keys[other], keys[at]
            case "blocks":
                blocks[at], blocks[other] = blocks[other], blocks[at]
            case "length":
                wrong = rng.choice((0, 1, 2**31, 2**61, 2**62, 2**63 - 1, 2**64 - 1))
                blocks[at] = wrong.to_bytes(8, "little") + blocks[at][8:]
            case _:
                blocks.append(rng.choice((b"\0", bytes(8), good.data, blocks[at])))
    heads = good.data[: places[2][1]]
    written = [heads, b"".join(parts), pickle.dumps(keys, 2), *blocks]
    return good, b"".join(written), "legacy " + "+".join(done)


# --- judgement -----------------------------------------------------------------------------------


class Case(NamedTuple):
    """A file, what load is asked for, and who judges the model that comes."""

    path: Path
    arguments: dict[str, Any]
    done: str  # what was done to it
    judge: Callable[[Model], tuple[str, str]]  # the outcome, and what is wrong with it


def make_case(kind: str, seed: int, index: int, path: Path) -> Case:
    rng = random.Random(f"{kind} {seed} {index}")
    if kind in fuzz_layouts.KINDS:
        case = fuzz_layouts.make_case(kind, rng, DAMAGES)
        done = "+".join(case.done) or "nothing"
        place = fuzz_layouts.put(case, path.with_name("folder"))
        return Case(place, case.arguments, done, lambda m: ("right", fuzz_layouts.wrong(case, m)))
    if kind == "lies":
        good, data, done = make_lies(rng)
    else:
        good = sample("pth" if kind == "resealed" else kind)
        data, done = (damage_resealed if kind == "resealed" else damage)(good, rng)
    path.write_bytes(data)

    def judge(model: Model) -> tuple[str, str]:
        if is_same(model, good.model):
            return "the same", ""
        return "another model", "loaded silently different" if kind in CHECKSUMMED else ""

    return Case(path, {"config": good.config}, done, judge)


def check_case(kind: str, seed: int, index: int, path: Path) -> str:
    """``"refused"``, ``"the same"``, ``"right"`` or, where nothing can tell, ``"another model"``.

    Raises:
        WrongOutcomeError: for anything else, with the line that repeats the case.
    """
    case = make_case(kind, seed, index, path)
    try:
        with time_limit():
            model = load(case.path, **case.arguments)
    except CheckpointError as error:
        problem = "" if str(case.path) in str(error) else f"a message without the path: {error}"
        if not problem and case.done == "nothing" and kind in fuzz_layouts.KINDS:
            problem = f"a good file was refused: {error}"
        outcome = "refused"
    except (Exception, Hang) as error:
        outcome, problem = "", f"{type(error).__name__}: {error}"
    else:
        outcome, problem = case.judge(model)
    if not problem:
        return outcome
    raise WrongOutcomeError(
        f"{kind}, {case.done}: {problem}\n  python tests/fuzz_checkpoints.py --kind {kind} "
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
        raise Hang(f"not done after {SECONDS} s of work")

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of work, however busy the machine is
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


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
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "damaged"
        for kind in kinds:
            make_case(kind, seed, start, path)  # loads what is needed before the limit
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        limited = stack.enter_context(memory_limit())
        for index in range(start, start + count):
            for kind in kinds:
                try:
                    outcomes[kind, check_case(kind, seed, index, path)] += 1
                except WrongOutcomeError as failure:
                    outcomes[kind, "FAILED"] += 1
                    failures.append(failure)
                    report(str(failure))
            if (index + 1) % 1000 == 0 or index == start + count - 1:
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
