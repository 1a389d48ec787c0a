"""Fuzzes the readers guided by coverage: inputs that reach new lines are kept and damaged further.

    make fuzz-guided                                          each reader for a minute
    python tests/fuzz_atheris.py pickle -max_total_time=60    one; libFuzzer's options follow
    python tests/fuzz_atheris.py pickle crash-0123...         one input again

Beside it, fuzz_checkpoints.py damages files without looking where they lead; this finds deeper
paths, and needs atheris (`pip install '.[fuzz]'`), which has wheels for Linux on x86-64. Readers:

    pickle       the pickle of a .pth, in an archive whose checksums are right
    legacy       a file from before PyTorch 1.6, whole: it has no checksum
    safetensors  a file, whole
    config       a config.json beside good weights
    picture      a picture file

An input must be refused by an error of this project, or read. Anything else is a failure, and so
is work of ten seconds or 2 GiB of memory (libFuzzer counts both). Inputs are kept in build/fuzz/.
"""

import argparse
import functools
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS, MEGABYTES = 10, 2048


@functools.cache
def folder() -> Path:
    """Where an input is written to be read; removed with the process."""
    made = tempfile.TemporaryDirectory(prefix="fuzz-")
    folder.keep = made  # type: ignore[attr-defined]  # its finalizer removes it
    return Path(made.name)


def _load(name: str, data: bytes, config: object = None) -> None:
    from pvt_ref.checkpoint import load

    path = folder() / name
    path.write_bytes(data)
    load(path, config)


def read_pickle(data: bytes) -> None:
    import fuzz_checkpoints as files

    _load("a.pth", files.pack(_archive() | {_pickled(): data}), files.CONFIG)


def read_legacy(data: bytes) -> None:
    import fuzz_checkpoints as files

    _load("legacy.pth", data, files.CONFIG)


def read_safetensors(data: bytes) -> None:
    _load("a.safetensors", data)


def read_config(data: bytes) -> None:
    import fuzz_layouts as layouts

    case = _vit()
    place = layouts.put(case, folder() / "model")
    (place.parent if place.is_file() else place).joinpath("config.json").write_bytes(data)
    from pvt_ref.checkpoint import load

    load(place)


def read_picture(data: bytes) -> None:
    from pvt_ref.data.image import read_rgb

    read_rgb(io.BytesIO(data))


READERS: dict[str, Callable[[bytes], None]] = {
    "pickle": read_pickle,
    "legacy": read_legacy,
    "safetensors": read_safetensors,
    "config": read_config,
    "picture": read_picture,
}


def one_input(reader: str, data: bytes) -> str:
    """``"refused"`` or ``"read"``; another outcome is raised, as it came."""
    from pvt_ref.errors import PVTError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            READERS[reader](data)
        except PVTError:
            return "refused"
    return "read"


# Where to begin -----------------------------------------------------------------------------------


@functools.cache
def _archive() -> dict[str, bytes]:
    """The entries of a good .pth."""
    import zipfile

    import fuzz_checkpoints as files

    with zipfile.ZipFile(io.BytesIO(files.sample("pth").data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _pickled() -> str:
    return next(name for name in _archive() if name.endswith("data.pkl"))


@functools.cache
def _vit():
    """A good file of Hugging Face's layout of a ViT, to have a config.json beside it."""
    import fuzz_layouts as layouts

    layout = next(x for x in layouts.LAYOUTS["vit"] if x.name == "hugging face")
    config = layouts.CONFIGS["vit"][0]
    state = dict(layouts.good_state("vit", layout, config))
    case = layouts.Case("vit", layout, config, state, "safetensors")
    layouts.write(case)
    return case


def seeds(reader: str) -> list[bytes]:
    """Good inputs, each of which must be read."""
    import json

    import fuzz_checkpoints as files
    import numpy as np
    import spelt_layouts
    from PIL import Image

    if reader == "pickle":
        return [_archive()[_pickled()]]
    if reader in ("legacy", "safetensors"):
        return [files.sample(reader).data]
    if reader == "config":
        return [json.dumps(spelt_layouts.config_json(_vit().config)).encode()]
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    made = []
    for form in ("png", "jpeg", "bmp", "gif", "webp", "tiff", "ppm"):
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, form)
            made.append(file.getvalue())
    return made


def main() -> None:
    """Fuzzes one reader until libFuzzer's options say stop, or something fails."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("reader", choices=READERS)
    told, options = parser.parse_known_args()
    try:
        import atheris
    except ImportError:
        sys.exit(
            "atheris is not installed: pip install '.[fuzz]'. It has wheels for Linux on x86-64, "
            "Python 3.11 to 3.13; tests/fuzz_checkpoints.py runs everywhere"
        )
    fuzzer: Any = atheris  # its stubs are behind it
    with fuzzer.instrument_imports(include=["pvt_ref"]):
        import_module("pvt_ref.checkpoint")
        import_module("pvt_ref.data.image")
    kept = ROOT / "build" / "fuzz" / told.reader
    kept.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(told.reader)):
        (kept / f"seed-{number}").write_bytes(data)
    limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-artifact_prefix={kept}/"]
    inputs = [] if any(not option.startswith("-") for option in options) else [str(kept)]
    fuzzer.Setup(
        [sys.argv[0], *limits, *options, *inputs], lambda data: one_input(told.reader, data)
    )
    fuzzer.Fuzz()


if __name__ == "__main__":
    main()
