"""Weights by name: those that come with the package, and those the authors released.

``digits`` and ``cifar10`` were trained with this package's gradients and lie in its wheel. The
released models are large and lie on the Hugging Face Hub; they are fetched when they are asked for,
or taken from a folder where somebody has put them.
"""

import logging
import os
import urllib.parse
from pathlib import Path
from typing import Any

from pvt_ref.checkpoint import load as load_file
from pvt_ref.checkpoint.files import Eps
from pvt_ref.config import VARIANTS, PVTConfig
from pvt_ref.errors import ArrayTypeError, DownloadError
from pvt_ref.face import Model

#: Names whose weights are in the package.
SHIPPED = ("digits", "cifar10")

#: Where the authors' ImageNet weights are, converted to Hugging Face's layout: name to repository.
RELEASED = {name: f"Zetatech/{name.replace('_', '-')}-224" for name in list(VARIANTS)[:4]}

#: The authors' own files, by name.
_AUTHORS_URL = "https://github.com/whai362/PVT/releases/download/v2/{name}.pth"

_FILE = "model.safetensors"
_SUFFIXES = (".safetensors", ".pth", ".bin")

#: The authors trained with these; Hugging Face's port, whose layout the files have, with others.
_AUTHORS_EPS = (1e-6, 1e-5)


def load(
    name: str | os.PathLike[str],
    config: PVTConfig | None = None,
    eps: Eps | None = None,
    *,
    mirror: str | None = None,
) -> Model:
    """A model by name, or from a weights file.

    Known names come first; a file called like one of them is ``"./digits"``.

    - ``"digits"``, ``"cifar10"``: in the package. Their ``info.training`` says how they came about.
    - ``"pvt_tiny"``, ``"pvt_small"``, ``"pvt_medium"``, ``"pvt_large"``: released for ImageNet. A
      file of that name (.safetensors, .pth or .bin) in the weights folder is taken if there is one;
      else they are fetched from the Hugging Face Hub, with its cache and its progress bar, which
      needs the extra ``hub``. The weights folder is what the environment variable PVT_REF_WEIGHTS
      names, or ``~/.cache/pvt_ref``.

    Everything else is a path, and :func:`pvt_ref.checkpoint.load` says what it may be.

    Args:
        name: a known name, or a path.
        config: of a file; names bring theirs.
        eps: of the norms; see :func:`pvt_ref.checkpoint.load`. Released models have the authors'.
        mirror: address of a server that answers like huggingface.co, to fetch from instead.

    Returns:
        The model, float32 or float64 as stored, on the host, with class names and preprocessing in
        its ``info`` if they are known.

    Raises:
        DownloadError: if it has to be fetched and cannot be (which takes half a minute of trying);
            the message says what to download by hand, and where to put it.
        MissingFileError: if there is no file at the path.
        CheckpointError: if the file is damaged, unsafe, of an unknown kind, or does not fit.
        ArrayTypeError: if name, config or mirror is of another type, config comes with a known
            name, or mirror with what is not fetched.
        ConfigError: if eps is not one or two numbers that can be one.
    """
    known = name if isinstance(name, str) else ""
    if known in (*SHIPPED, *VARIANTS):
        if config is not None:
            raise ArrayTypeError(
                f"config was given with {known!r}, which brings its own. Leave it out, or name a "
                f"file: './{known}'"
            )
        if known in SHIPPED:
            return load_file(Path(__file__).with_name("weights") / f"{known}.safetensors", eps=eps)
        return load_file(
            _find(known, mirror), VARIANTS[known], _AUTHORS_EPS if eps is None else eps
        )
    if mirror is not None:
        raise ArrayTypeError(
            f"mirror was given with {name!r}, which is not fetched. Known names are "
            f"{', '.join((*SHIPPED, *RELEASED))}"
        )
    return load_file(name, config, eps)


def weights_folder() -> Path:
    """Where files of released models are looked for before they are fetched.

    Returns:
        What the environment variable PVT_REF_WEIGHTS names, or ``~/.cache/pvt_ref``.
    """
    named = os.environ.get("PVT_REF_WEIGHTS")
    return Path(named) if named else Path.home() / ".cache" / "pvt_ref"


def _find(name: str, mirror: str | None) -> Path:
    """The file of a released model, fetched if it has to be."""
    for suffix in _SUFFIXES:
        path = weights_folder() / f"{name}{suffix}"
        if path.exists():
            return path
    if name not in RELEASED:
        raise DownloadError(
            f"{name}: its weights were not released. If you have some, name the file: "
            f"pvt_ref.load('path/to/file'), or put it at {weights_folder() / name}.pth"
        )
    if mirror is not None:
        scheme = urllib.parse.urlsplit(mirror).scheme if isinstance(mirror, str) else ""
        if scheme not in ("http", "https"):
            raise ArrayTypeError(
                f"mirror is {mirror!r}; it must be an address such as 'https://my.server'. For a "
                f"file on this machine: pvt_ref.load('path/to/file')"
            )
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise DownloadError(
            f"{name}: fetching it needs the package huggingface_hub: pip install 'pvt_ref[hub]' "
            f"(from a checkout: pip install -e '.[hub]'). {_by_hand(name)}"
        ) from error
    options: dict[str, Any] = {"endpoint": mirror} if mirror else {}
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it reports every retry; the end is told below, once
    try:
        kept = try_to_load_from_cache(RELEASED[name], _FILE)  # without asking the network
        if isinstance(kept, str):
            return Path(kept)
        return Path(hf_hub_download(RELEASED[name], _FILE, **options))
    except Exception as error:  # many kinds, of several libraries: all mean that it is not here
        reason = " ".join(str(error).split())[:300]
        raise DownloadError(
            f"{name}: {mirror or 'the Hugging Face Hub'} did not give it "
            f"({type(error).__name__}: {reason}). {_by_hand(name)}"
        ) from error
    finally:
        log.setLevel(level)


def _by_hand(name: str) -> str:
    hub = f"https://huggingface.co/{RELEASED[name]}/resolve/main/{_FILE}"
    folder = weights_folder()
    return (
        f"By hand: download {_AUTHORS_URL.format(name=name)} to {folder / name}.pth, or {hub} to "
        f"{folder / name}.safetensors; either is then found by its name. (Or keep it anywhere, and "
        f"load it by its path.)"
    )
