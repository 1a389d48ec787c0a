"""Weights by name: those that come with the package, and those the authors released.

``digits`` and ``cifar10`` were trained with this package's gradients and lie in its wheel. The
released models are large and lie on the Hugging Face Hub; they are fetched when they are asked for,
or taken from a folder where somebody has put them.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from pvt_ref.app import Model
from pvt_ref.checkpoint import load as load_file
from pvt_ref.checkpoint.files import Eps, FilePath, cut_path
from pvt_ref.errors import ArrayTypeError, CheckpointError, DownloadError, MissingFileError, shown
from pvt_ref.models.architecture import architectures, known_variants

SHIPPED = ("digits", "cifar10", "imagenette")  # in the package
_FILES = [row.files for row in architectures() if row.files]
#: Where the authors' ImageNet weights are, converted to Hugging Face's layout: name to repository.
RELEASED = {name: repository for files in _FILES for name, repository in files.hub.items()}
#: The authors' own files.
_URLS = {name: files.url.format(name=name) for files in _FILES for name in files.hub}
_FILE = "model.safetensors"
_SUFFIXES = (".safetensors", ".pth", ".bin")
_RECORD = "fetched.json"  # in the weights folder: what each name meant when it was fetched first
_SECONDS = 5  # that a server may take for its first answer


def load(
    name: FilePath,
    config: Any = None,
    *,
    entry: str | None = None,
    eps: Eps | None = None,
    mirror: str | None = None,
) -> Model:
    """A model by name, or from a weights file.

    Known names come first; a file called like one of them is ``"./digits"``.

    - ``"digits"``, ``"cifar10"``, ``"imagenette"``: in the package. Their ``info.training`` says how they came about.
    - ``"pvt_tiny"``, ``"pvt_small"``, ``"pvt_medium"``, ``"pvt_large"``: released for ImageNet. A
      file of that name (.safetensors, .pth or .bin) in the weights folder is taken if there is one;
      else they are fetched from the Hugging Face Hub, with its cache and its progress bar, which
      needs the package ``huggingface_hub``. Commit and SHA-256 of what was fetched first are kept
      in the weights folder, and the name means that file from then on. The weights folder is what
      the environment variable PVT_REF_WEIGHTS names, or ``~/.cache/pvt_ref``.

    Everything else is a path, and :func:`pvt_ref.checkpoint.load` says what it may be.

    Args:
        name: a known name, or a path.
        config: of a file; names bring theirs.
        entry: of a file; see :func:`pvt_ref.checkpoint.load`.
        eps: of the norms; see :func:`pvt_ref.checkpoint.load`. Released models have the authors'.
        mirror: address of a server that answers like huggingface.co, to fetch from instead.

    Returns:
        The model, on the host, with class names and preprocessing in ``info`` if they are known.

    Raises:
        DownloadError: if it has to be fetched and cannot be, which is known after some seconds, or
            is not what it was the first time; the message says how to get it by hand.
        MissingFileError: if there is no file at the path; the message has the known names.
        CheckpointError: if the file is damaged, unsafe, of an unknown kind, or does not fit.
        ArrayTypeError: if an argument is of another type, config or entry comes with a known name,
            or mirror with what is not fetched.
        ConfigError: if eps or config is one that no model can have.
    """
    known = name if isinstance(name, str) else ""
    variants = known_variants()
    if known in SHIPPED or known in variants:
        if config is not None or entry is not None:
            raise ArrayTypeError(
                f"{'entry' if config is None else 'config'} was given with {known!r}, which brings "
                f"its own. Leave it out, or name a file: './{known}'"
            )
        if known in SHIPPED:
            return load_file(Path(__file__).with_name("weights") / f"{known}.safetensors", eps=eps)
        path, origin = _find(known, mirror)
        from pvt_ref.checkpoint.reading import read_model

        return read_model(path, variants[known], eps=eps, released=origin)
    if mirror is not None:
        raise ArrayTypeError(
            f"mirror was given with {shown(name)}, which is not fetched. Known names are "
            f"{', '.join((*SHIPPED, *RELEASED))}"
        )
    if re.match(r"[A-Za-z][\w+.-]*://", known):
        raise MissingFileError(
            f"{cut_path(known)} is an address, and load reads files. Download it, and load the "
            f"file that came: pvt_ref.load('path/to/file'). {_known_names(known)}"
        )
    try:
        return load_file(name, config, entry=entry, eps=eps)
    except MissingFileError as error:
        if os.path.exists(name):  # what is missing is another file, such as that of config
            raise
        raise MissingFileError(f"{error}. {_known_names(os.fspath(name))}") from None


def _known_names(given: str) -> str:
    """The names, and which of them somebody may have meant."""
    import difflib

    names = (*SHIPPED, *RELEASED)
    last = given.rstrip("/").rpartition("/")[2].lower().replace("-", "_")
    last = re.sub(r"(_224)?(\.\w+)?$", "", last)
    near = difflib.get_close_matches(last, names, 1)
    meant = f". Did you mean {near[0]!r}?" if near else ""
    return f"Names that are known without a file: {', '.join(names)}{meant}"


def weights_folder() -> Path:
    """Where files of released models are looked for first; PVT_REF_WEIGHTS in the environment."""
    return Path(os.path.expanduser(os.environ.get("PVT_REF_WEIGHTS") or "~/.cache/pvt_ref"))


def _find(name: str, mirror: str | None) -> tuple[Path, str]:
    """The file of a released model, fetched if it has to be, and where it is from."""
    variants = known_variants()
    names = [name, *(x for x in variants if variants[x] is variants[name] and x != name)]
    for path in (weights_folder() / f"{x}{suffix}" for x in names for suffix in _SUFFIXES):
        if path.exists():
            return path, f"{path.name} of the weights folder"
    if name not in RELEASED:
        raise DownloadError(
            f"{name}: its weights were not released. If you have some, name the file: "
            f"pvt_ref.load('path/to/file'), or put it at {weights_folder() / name}.pth"
        )
    address = "https:" if mirror is None else mirror
    if not isinstance(address, str) or not re.match("https?:", address, re.IGNORECASE):
        raise ArrayTypeError(
            f"mirror is {shown(mirror)}; it must be an address such as 'https://my.server'. "
            f"For a file on this machine: pvt_ref.load('path/to/file')"
        )
    first = _read_record().get(name)
    path, commit, announced = _fetch(name, mirror, first["commit"] if first else None)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        what = f"{type(error).__name__}: {error.strerror or error}"
        raise DownloadError(
            f"{name}: what was fetched cannot be read from {path} ({what}). {_by_hand(name)}"
        ) from error
    if re.fullmatch("[0-9a-f]{64}", announced) and announced != found:
        raise DownloadError(
            f"{name}: {path} has the SHA-256 {found[:12]}..., and the server announced "
            f"{announced[:12]}...: it is damaged. Delete that file, and try again"
        )
    if first and first["sha256"] != found:
        raise DownloadError(
            f"{name}: {path} has the SHA-256 {found[:12]}..., and what was fetched first had "
            f"{first['sha256'][:12]}...: it was damaged or exchanged. Delete it, and try again; if "
            f"you want what is there now, delete the entry {name!r} in {weights_folder() / _RECORD}"
        )
    if first is None:
        entry = {"repository": RELEASED[name], "commit": commit, "sha256": found}
        _write_record(_read_record() | {name: entry})  # another may have been fetched meanwhile
    at = f" at commit {commit[:12]}" if commit else ""
    return path, f"from {RELEASED[name]}{at}, SHA-256 {found[:12]}..."


def _read_record() -> dict[str, Any]:
    """What each name meant when it was fetched first: its repository, commit and SHA-256."""
    from pvt_ref.checkpoint.stated import read_json

    path = weights_folder() / _RECORD
    try:
        record = read_json(path, path.name) if path.exists() else {}
        return {k: {**x, "commit": x["commit"], "sha256": x["sha256"]} for k, x in record.items()}
    except (CheckpointError, TypeError, KeyError) as error:
        raise DownloadError(
            f"{path}, which says what was fetched, cannot be read ({type(error).__name__}: "
            f"{error}). Delete it: what is fetched next is then taken as it comes"
        ) from error


def _write_record(record: dict[str, Any]) -> None:
    from pvt_ref.checkpoint.whole_file import write_whole

    path = weights_folder() / _RECORD
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{json.dumps(record, indent=1)}\n".encode())
    except OSError as error:
        print(f"{path} could not be written ({error.strerror or error})", file=sys.stderr)


def _fetch(name: str, mirror: str | None, commit: str | None) -> tuple[Path, str | None, str]:
    """From the Hub's cache or the Hub: the file, its commit, and the SHA-256 announced for it."""
    try:
        from huggingface_hub import (
            get_hf_file_metadata,
            hf_hub_download,
            hf_hub_url,
            try_to_load_from_cache,
        )
    except ImportError as error:
        raise DownloadError(
            f"{name}: fetching it needs the package huggingface_hub: pip install huggingface_hub. "
            f"{_by_hand(name)}"
        ) from error
    import logging

    options: dict[str, Any] = {"endpoint": mirror} if mirror else {}
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it reports every retry; the end is told below, once
    repository, announced = RELEASED[name], ""
    try:
        kept = try_to_load_from_cache(repository, _FILE, revision=commit)  # asks no network
        if not isinstance(kept, str):
            where = mirror or "the Hugging Face Hub"
            print(f"{name}: fetching {repository} from {where}", file=sys.stderr, flush=True)
            url = hf_hub_url(repository, _FILE, revision=commit, **options)
            answer = get_hf_file_metadata(url, timeout=_SECONDS)  # a download tries for long
            commit, announced = answer.commit_hash or commit, answer.etag or ""
            kept = hf_hub_download(
                repository, _FILE, revision=commit, etag_timeout=_SECONDS, **options
            )
    except Exception as error:  # many kinds, of several libraries: all mean that it is not here
        reason = " ".join(str(error).split())[:300]
        raise DownloadError(
            f"{name}: {mirror or 'the Hugging Face Hub'} did not give it "
            f"({type(error).__name__}: {reason}). {_by_hand(name)}"
        ) from error
    finally:
        log.setLevel(level)
    folder = Path(kept).parent.name  # the cache has one for each commit
    blob = Path(os.path.realpath(kept)).name  # and names large files by their SHA-256
    announced = blob if re.fullmatch("[0-9a-f]{64}", blob) else announced
    return Path(kept), folder if re.fullmatch("[0-9a-f]{40}", folder) else commit, announced


def _by_hand(name: str) -> str:
    hub = f"https://huggingface.co/{RELEASED[name]}/resolve/main/{_FILE}"
    folder = weights_folder()
    return (
        f"By hand: download {_URLS[name]} to {folder / name}.pth, or {hub} to "
        f"{folder / name}.safetensors; either is then found by its name. (Or keep it anywhere, and "
        f"load it by its path.)"
    )
