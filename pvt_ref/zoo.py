"""Weights by name: those shipped with the package, and those the authors released."""

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
from pvt_ref.checkpoint.stated import read_json
from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.errors import ArrayTypeError, CheckpointError, DownloadError, MissingFileError, shown
from pvt_ref.models.architecture import architectures, known_variants

SHIPPED = ("digits", "cifar10", "cifar10_v2", "imagenette", "camvid")  # in the package
_FILES = [row.files for row in architectures() if row.files]
#: Where the authors' ImageNet weights are, converted to Hugging Face's layout: name to repository.
RELEASED = {name: repository for files in _FILES for name, repository in files.hub.items()}
_FILE = "model.safetensors"
_SUFFIXES = (".safetensors", ".pth", ".bin")
_RECORD = "fetched.json"  # in the weights folder: the file each name was first fetched as
_SECONDS = 5  # how long a server may take for its first answer


def load(
    name: FilePath,
    config: Any = None,
    *,
    entry: str | None = None,
    eps: Eps | None = None,
    mirror: str | None = None,
) -> Model:
    """A model by name, or from a weights file.

    Known names come first; for a file of such a name write ``"./digits"``.

    - ``"digits"``, ``"cifar10"``, ``"cifar10_v2"`` (a PVT v2), ``"imagenette"``: classifiers in
      the package, trained with its gradients. ``info.training`` says how.
    - ``"camvid"``: likewise a segmentation network for street scenes; ``info.colours`` has the
      colours of its classes.
    - ``"pvt_tiny"``, ``"pvt_small"``, ``"pvt_medium"``, ``"pvt_large"``, ``"pvt_v2_b0"`` to
      ``"pvt_v2_b5"``, ``"pvt_v2_b2_li"``, ``"deit_ti_16"``, ``"deit_s_16"``, ``"deit_b_16"``:
      released for ImageNet. A file in the weights folder called after the variant (.safetensors,
      .pth or .bin) is used if there is one. Otherwise the weights are fetched from the Hugging
      Face Hub, with its cache and its progress bar, which needs the package ``huggingface_hub``.
      The weights folder keeps commit and SHA-256 of the first fetch, and from then on the name
      means that file. The environment variable PVT_REF_WEIGHTS names the weights folder; the
      default is ``~/.cache/pvt_ref``.

    Args:
        name: a known name, or a path that :func:`pvt_ref.checkpoint.load` can read.
        config: for a file, as in that function; known names bring their own.
        entry: for a file, as in that function.
        eps: of the norms, as in that function. Released models have the authors'.
        mirror: address of a server to fetch from that answers like huggingface.co.

    Returns:
        The model, on the host, with class names and preprocessing in ``info`` if they are known.

    Raises:
        DownloadError: if the download fails, or the file is not the same as the first time.
        MissingFileError: if there is no file at the path; the message lists the known names.
        CheckpointError, ArrayTypeError, ConfigError: as :func:`pvt_ref.checkpoint.load`.
    """
    known = name if isinstance(name, str) else ""
    variants = known_variants()
    if known in SHIPPED or known in variants:
        if config is not None or entry is not None:
            what = f"{'entry' if config is None else 'config'} was given with {known!r}"
            raise ArrayTypeError(f"{what}, which brings its own. For a file write './{known}'")
        if known in SHIPPED:
            return load_file(Path(__file__).with_name("weights") / f"{known}.safetensors", eps=eps)
        path, origin = _find(known, mirror)
        from pvt_ref.checkpoint.reading import read_model

        return read_model(path, variants[known], eps=eps, released=origin)
    if mirror is not None:
        what = f"mirror was given with {shown(name)}, which is not downloaded"
        raise ArrayTypeError(f"{what}. {_known_names(known)}")
    if re.match(r"[A-Za-z][\w+.-]*://", known):
        what = f"{cut_path(known)} is an address, but load reads files. Download it and call"
        raise MissingFileError(f"{what} pvt_ref.load('path/to/file'). {_known_names(known)}")
    try:
        return load_file(name, config, entry=entry, eps=eps)
    except MissingFileError as error:
        if os.path.exists(name):  # another file is missing, such as the configuration
            raise
        raise MissingFileError(f"{error}. {_known_names(os.fspath(name))}") from None


def _known_names(given: str) -> str:
    """The known names, and the one that may have been meant."""
    import difflib

    names = (*SHIPPED, *RELEASED)
    last = given.rstrip("/").rpartition("/")[2].lower().replace("-", "_")
    near = difflib.get_close_matches(re.sub(r"(_224)?(\.\w+)?$", "", last), names, 1)
    meant = f". Did you mean {near[0]!r}?" if near else ""
    return f"Known names: {', '.join(names)}{meant}"


def weights_folder() -> Path:
    """The first place to look for released models; PVT_REF_WEIGHTS in the environment sets it."""
    return Path(os.path.expanduser(os.environ.get("PVT_REF_WEIGHTS") or "~/.cache/pvt_ref"))


def _find(name: str, mirror: str | None) -> tuple[Path, str]:
    """The file of a released model, fetched if necessary, and where it is from."""
    variants = known_variants()
    names = [name, *(x for x in variants if variants[x] is variants[name] and x != name)]
    for path in (weights_folder() / f"{x}{suffix}" for x in names for suffix in _SUFFIXES):
        if path.exists():
            return path, f"{path.name} of the weights folder"
    name = next((x for x in names if x in RELEASED), name)
    if name not in RELEASED:
        what = f"{name}: its weights were never released. If you have some, put them at"
        raise DownloadError(f"{what} {weights_folder() / name}.pth, or load them by their path")
    address = "https:" if mirror is None else mirror
    if not isinstance(address, str) or not re.match("https?:", address, re.IGNORECASE):
        what = f"mirror is {shown(mirror)}; it must be an address such as 'https://my.server'"
        raise ArrayTypeError(f"{what}. For a file on this machine: pvt_ref.load('path/to/file')")
    first = _read_record().get(name)
    path, commit, announced, found = _fetch(name, mirror, first["commit"] if first else None)
    has = f"{name}: {path} has the SHA-256 {found[:12]}..., and"
    if re.fullmatch("[0-9a-f]{64}", announced) and announced != found:
        said = f"the server announced {announced[:12]}...: it is damaged"
        raise DownloadError(f"{has} {said}. Delete that file and try again")
    place = weights_folder() / _RECORD
    if first and first["sha256"] != found:
        what = f"the first download had {first['sha256'][:12]}...: it was damaged or replaced"
        advice = f"to accept the present file, delete the entry {name!r} in {place}"
        raise DownloadError(f"{has} {what}. Delete it and try again; {advice}")
    if first is None:
        entry = {"repository": RELEASED[name], "commit": commit, "sha256": found}
        record = _read_record() | {name: entry}  # another process may have added an entry
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, f"{json.dumps(record, indent=1)}\n".encode())
        except OSError as error:
            print(f"{place} could not be written ({error.strerror or error})", file=sys.stderr)
    at = f" at commit {commit[:12]}" if commit else ""
    return path, f"from {RELEASED[name]}{at}, SHA-256 {found[:12]}..."


def _read_record() -> dict[str, Any]:
    path = weights_folder() / _RECORD
    try:
        record = read_json(path, path.name) if path.exists() else {}
        return {k: {**x, "commit": x["commit"], "sha256": x["sha256"]} for k, x in record.items()}
    except (CheckpointError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        what = f"{path}, the record of downloads, cannot be read ({why})"
        raise DownloadError(f"{what}. Delete it; then the next download is accepted") from error


def _fetch(name: str, mirror: str | None, commit: str | None) -> tuple[Path, str | None, str, str]:
    """From the Hub's cache or the Hub: file, commit, announced SHA-256 and the file's own."""
    try:
        import huggingface_hub as hub

        download = hub.hf_hub_download  # loads the library, which sets its own log level
    except ImportError as error:
        needed = "downloading it needs a package: pip install huggingface_hub"
        raise DownloadError(f"{name}: {needed}. {_by_hand(name)}") from error
    import logging

    options: dict[str, Any] = {"endpoint": mirror} if mirror else {}
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it reports every retry; the error below reports the failure once
    repository, announced, where = RELEASED[name], "", mirror or "the Hugging Face Hub"
    try:
        kept = hub.try_to_load_from_cache(repository, _FILE, revision=commit)  # asks no network
        if not isinstance(kept, str):
            print(f"{name}: fetching {repository} from {where}", file=sys.stderr, flush=True)
            url = hub.hf_hub_url(repository, _FILE, revision=commit, **options)
            answer = hub.get_hf_file_metadata(url, timeout=_SECONDS)  # a download retries for long
            commit, announced = answer.commit_hash or commit, answer.etag or ""
            options |= {"revision": commit, "etag_timeout": _SECONDS}
            kept = download(repository, _FILE, **options)
        with open(kept, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except Exception as error:  # many kinds, of several libraries: all mean the fetch failed
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DownloadError(f"{name}: {where} did not send it ({why}). {_by_hand(name)}") from error
    finally:
        log.setLevel(level)
    path = Path(kept)  # the cache has a folder for each commit, and names large files by SHA-256
    folder, blob = path.parent.name, path.resolve().name
    announced = blob if re.fullmatch("[0-9a-f]{64}", blob) else announced
    return path, folder if re.fullmatch("[0-9a-f]{40}", folder) else commit, announced, found


def _by_hand(name: str) -> str:
    files = next(files for files in _FILES if name in files.hub)
    url = files.url.format(name=files.file_names.get(name, name))
    hub = f"https://huggingface.co/{RELEASED[name]}/resolve/main/{_FILE}"
    place = weights_folder() / name
    what = f"{url} to {place}.pth, or {hub} to {place}.safetensors"
    return f"By hand: download {what}. Then load finds it by name; elsewhere pass its path"
