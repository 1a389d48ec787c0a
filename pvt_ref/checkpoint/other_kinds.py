"""Files that are mistaken for weights: what they are, and what to do."""

import os
from typing import BinaryIO

from pvt_ref.checkpoint.pickles import Record, read_pickle
from pvt_ref.checkpoint.stored import NEEDED, PACK, SAFE_LOAD
from pvt_ref.errors import CheckpointError, shown

_DOWNLOAD = "Download it again, and look at its size and at the first bytes"
_UNPACK = "Unpack it, and load the file inside"
_PICTURE = "a picture, not weights: pictures go to predict or to `python -m pvt_ref classify`"
_GRAPH = f"It is a compiled program whose names are not those of the layers; {NEEDED}"

#: Place and value of the first bytes, and what they mean.
_MAGIC = (
    (0, b"version https://git-lfs", "not the weights, but a Git LFS pointer to them: the "
     "repository was cloned without LFS. Run 'git lfs install' and 'git lfs pull' there"),
    (0, b"GGUF", f"a GGUF file (llama.cpp). {NEEDED}"),
    (0, b"\x89HDF\r\n\x1a\n", f"an HDF5 file (Keras .h5, say). {NEEDED}"),
    (0, b"\x93NUMPY", f"a single NumPy array (.npy). {NEEDED}"),
    (4, b"TFL3", f"a TensorFlow Lite model. {_GRAPH}"),
    (257, b"ustar", "a tar archive. If it has entries 'pickle', 'tensors' and 'storages', it is "
     "PyTorch's format from before 0.1.10, and if you trust its source, PyTorch can convert it "
     "(weights_only=True cannot): torch.save(torch.load(path, weights_only=False, "
     f"map_location='cpu'), new_path). Any other archive: {_UNPACK.lower()}"),
    (0, b"\x1f\x8b", f"compressed with gzip. {_UNPACK}"),
    (0, b"BZh", f"compressed with bzip2. {_UNPACK}"),
    (0, b"\xfd7zXZ\0", f"compressed with xz. {_UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"compressed with zstd. {_UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7-Zip archive. {_UNPACK}"),
    (0, b"Rar!\x1a\x07", f"a RAR archive. {_UNPACK}"),
    (0, b"PK\x05\x06", "an empty zip archive. The folder that was packed had nothing in it"),
    (0, b"\x89PNG\r\n", _PICTURE),
    (0, b"\xff\xd8\xff", _PICTURE),
    (0, b"%PDF-", "a PDF document, not weights"),
)  # fmt: skip


def refuse_other_kind(file: BinaryIO, readable: str) -> CheckpointError:
    """The refusal of a file that is neither of PyTorch's formats nor .safetensors, by its kind."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(512)
    if not size:
        return CheckpointError(f"the file is empty. The download or copy was cut off. {_DOWNLOAD}")
    for place, magic, meaning in _MAGIC:
        if head[place : place + len(magic)] == magic:
            return CheckpointError(meaning)
    if head[:1] == b"\x80" and head[1:2] in b"\x00\x01\x02\x03\x04\x05":
        return _refuse_pickle(file)
    if head[:1] == b"\x08" and b"\x12" in head[2:4] and size > len(head):  # fields 1, 2 of protobuf
        return CheckpointError(f"a protobuf message, such as an ONNX model. {_GRAPH}")
    file.seek(max(0, size - 8))
    if file.read(8) == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb":
        return CheckpointError(f"the index of a TensorFlow checkpoint. {NEEDED}")
    if head.lstrip()[:1] == b"<":
        return CheckpointError(f"an HTML or XML page, not weights, such as a login. {_DOWNLOAD}")
    return CheckpointError(
        f"neither a zip archive (.pth, .bin) nor .safetensors: it has {size} bytes and begins with "
        f"{head[:8]!r}. {_DOWNLOAD}. This project reads {readable}"
    )


def _refuse_pickle(file: BinaryIO) -> CheckpointError:
    """A pickle that torch.save did not write, or only a part of what it wrote."""
    file.seek(0)
    try:
        tree, foreign, storages = read_pickle(file)
    except CheckpointError as error:
        return CheckpointError(f"a bare pickle, not a file of torch.save, and {error}")
    if storages:
        what = "the entry data.pkl of a PyTorch file that was unpacked"
        return CheckpointError(f"{what}. {PACK} folder")
    keys = tree if isinstance(tree, dict) else {}
    # in newer files only the name shows that they are Paddle's; a parameter is (its name, array)
    by_name = os.path.splitext(str(getattr(file, "name", "")))[1] in (".pdparams", ".pdopt")
    by_content = "StructuredToParameterName@@" in keys or any("paddle" in x for x in foreign)
    if by_name or by_content:
        return CheckpointError("a file of PaddlePaddle (paddle.save). Get the PyTorch weights")
    what = f"a {shown(tree.name)}" if isinstance(tree, Record) else f"a {type(tree).__name__}"
    return CheckpointError(
        f"a bare pickle ({what}; it names {', '.join(map(shown, foreign[:3])) or 'no classes'}), "
        f"not a file of torch.save; what pickle.dump wrote can only be read by running it. Safe: "
        f"get the weights as .safetensors or from torch.save. If you trust the source, make one: "
        f"torch.save of pickle.load(open(path, 'rb')) as a dict from names to tensors, then read "
        f"without running it: {SAFE_LOAD}"
    )
