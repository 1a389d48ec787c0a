"""Files of PVT v2 and ViT in the layouts of other projects, damaged at random, and what is right.

fuzz_checkpoints.py draws them as the kinds ``pvt_v2`` and ``vit``. A case is a file of one of nine
layouts (spelt_layouts.py), as a zip or a legacy .pth or as .safetensors, at the top or in an entry,
under a prefix or not, alone or beside other tensors, with a config.json where there is one; and one
damage or several: to bytes, to the header of .safetensors, to keys, shapes, dtypes and numbers, to
config.json, or to what load is asked for.

Damaged content is often as well-formed as before, so that what is right is decided by a second
reader: the numbers of the model must be those that the file has under the names of one layout, as
the libraries read it, no array more may be in it unsaid, and the configuration must be the one that
was given, or that config.json says.
"""

import dataclasses
import functools
import io
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import spelt_layouts as spelt

from pvt_ref import Model, PVTConfig, PVTv2Config, ViTConfig
from pvt_ref.models.architecture import param_shapes

STAGES: Any = {"img_size": 32, "in_chans": 1, "num_classes": 3, "embed_dims": (2, 4, 6, 4)}
STAGES |= {"num_heads": (1, 2, 3, 2), "mlp_ratios": (2, 1, 1, 1.5), "depths": (1, 2, 1, 1)}
V2 = PVTv2Config(**STAGES, sr_ratios=(4, 2, 1, 1))
COLUMN: Any = {"img_size": 8, "patch_size": 4, "embed_dim": 6, "depth": 3, "num_heads": 3}
VIT = ViTConfig(**COLUMN, mlp_ratio=2, in_chans=1, num_classes=3)
V1 = PVTConfig(**STAGES, sr_ratios=(4, 2, 1, 1))
CONFIGS: dict[str, tuple[Any, ...]] = {
    "pvt_v2": (
        V2,
        dataclasses.replace(V2, linear=True),
        dataclasses.replace(V2, qkv_bias=False),
    ),
    "vit": (VIT, dataclasses.replace(VIT, qkv_bias=False, mlp_ratio=0.5)),
    "pvt": (V1,),
}
#: Networks whose files are drawn; the third is what they are mixed with.
KINDS = ("pvt_v2", "vit")


@dataclasses.dataclass(frozen=True)
class Spelt:
    """A layout: its names, whether it has a head, its code's eps, a config.json or not."""

    name: str
    write: Callable[[dict[str, Any]], dict[str, Any]]
    head: bool | None = None  # None: with and without
    eps: tuple[float, ...] = (1e-6, 1e-6)
    json: bool = False


LAYOUTS = {
    "pvt_v2": (
        Spelt("authors", spelt.same, eps=(1e-6, 1e-5)),
        Spelt("timm", spelt.timm_v2, eps=(1e-6, 1e-5)),
        Spelt("hugging face", spelt.hugging_face_v2, True, json=True),
        Spelt("hugging face, bare", spelt.hugging_face_v2_bare, False, json=True),
        Spelt("mmdetection", spelt.mmdetection_v2, False),
    ),
    "vit": (
        Spelt("deit", spelt.same, eps=(1e-6,)),
        Spelt("hugging face", spelt.hugging_face_vit, True, (1e-12,), json=True),
        Spelt("hugging face, bare", spelt.hugging_face_vit_bare, False, (1e-12,), json=True),
        Spelt("mmsegmentation", spelt.mmsegmentation_vit, False, (1e-6,)),
    ),
    "pvt": (Spelt("authors", spelt.same, eps=(1e-6, 1e-5)),),
}
#: What a bare model leaves out of its own keys.
UNUSED = {
    "pvt_v2": ("head.",),
    "pvt": (),
    "vit": ("head.", "norm.", "layernorm.", "pooler.dense.", "ln1."),
}
COUNTERS = ("total_ops", "total_params", "num_batches_tracked")


@dataclasses.dataclass
class Case:
    """What lies in a folder, and what load is asked for."""

    network: str
    layout: Spelt
    config: Any  # of the good model
    state: dict[str, Any]  # of the file, by its keys; arrays or torch tensors
    container: str  # "zip", "legacy" or "safetensors"
    entry: str = ""
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)  # in the same tree
    json_text: bytes | None = None  # of config.json
    argument: Any = None  # load's config
    eps: Any = None
    folder: bool = False  # load is given the folder, not the file
    data: bytes = b""
    written: bytes = b""  # before bytes were damaged
    done: list[str] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        if self.container == "safetensors":
            return "model.safetensors"
        return "pytorch_model.bin" if self.folder else "model.pth"

    @property
    def arguments(self) -> dict[str, Any]:
        """Of load, beside the path."""
        return {"config": self.argument} | ({} if self.eps is None else {"eps": self.eps})


def bare(config: Any) -> Any:
    return dataclasses.replace(config, num_classes=0)


@functools.cache
def good_state(network: str, layout: Spelt, config: Any) -> dict[str, np.ndarray]:
    """A file's arrays, all of whose numbers differ."""
    native, count = {}, 1
    for key, shape in param_shapes(config).items():
        size = int(np.prod(shape))
        native[key] = np.arange(count, count + size, dtype=np.float32).reshape(shape) / 8
        count += size
    return layout.write(native)


def draw_case(network: str, rng: random.Random) -> Case:
    """A good file."""
    layout = rng.choice(LAYOUTS[network])
    config = rng.choice(CONFIGS[network])
    if layout.head is False or (layout.head is None and rng.random() < 0.3):
        config = bare(config)
    state: dict[str, Any] = dict(good_state(network, layout, config))
    if network == "vit" and not config.has_classifier and rng.random() < 0.5:
        C = config.embed_dim
        stem = {"deit": "norm", "mmsegmentation": "ln1"}.get(layout.name, "layernorm")
        state |= {f"{stem}.{leaf}": np.ones(C, np.float32) for leaf in ("weight", "bias")}
        if layout.json:
            state["pooler.dense.weight"] = np.ones((C, C), np.float32)
            state["pooler.dense.bias"] = np.ones(C, np.float32)
    container = rng.choice((*("safetensors",) * 9, "zip", "zip", "legacy"))
    case = Case(network, layout, config, state, container)
    prefix = rng.choice(("", "", "", "module.", "backbone.", "student.backbone."))
    case.state = {prefix + key: x for key, x in state.items()}
    if rng.random() < 0.2:
        key = rng.choice(("neck.conv.weight", "decode_head.conv_seg.weight", "queue"))
        if prefix:
            case.state[key] = np.ones((2, 2), np.float32)
    if container != "safetensors":
        case.entry = rng.choice(("", "model", "state_dict", "model_ema", "a"))
        if case.entry and rng.random() < 0.3:
            case.beside["epoch"] = 3
            case.beside["optimizer"] = {"state": {0: {"exp_avg": np.ones(3, np.float32)}}}
    said = rng.random() < 0.7
    if layout.json and said:
        fields = spelt.config_json(config)
        fields["layer_norm_eps"] = rng.choice((1e-6, 1e-12, 1e-5))
        case.json_text = json.dumps(fields, indent=2).encode()
        case.folder = rng.random() < 0.5
    if not case.json_text or rng.random() < 0.3:
        case.argument = config
    if rng.random() < 0.1:
        case.eps = 1e-4
    return case


# --- damage --------------------------------------------------------------------------------------


def some_key(case: Case, rng: random.Random) -> str:
    return rng.choice(list(case.state))


def miss_keys(case: Case, rng: random.Random) -> None:
    """Some keys, or all with one part in common."""
    part = rng.choice(some_key(case, rng).split("."))
    how = rng.choice(("one", "one", "some", "part", "block", "head"))
    gone = {some_key(case, rng)}
    if how == "some":
        gone = {some_key(case, rng) for _ in range(rng.randrange(2, 9))}
    elif how == "part":
        gone = {key for key in case.state if part in key.split(".")}
    elif how == "block":
        stem = gone.pop().rpartition(".")[0].rpartition(".")[0]
        gone = {key for key in case.state if key.startswith(stem)}
    elif how == "head":
        gone = {key for key in case.state if "head" in key or "classifier" in key}
    case.state = {key: x for key, x in case.state.items() if key not in gone}


EXTRA = (
    *("dist_token", "head_dist.weight", "head_dist.bias", "mask_token", "fc_norm.weight"),
    *("norm_pre.weight", "pre_logits.fc.weight", "blocks.0.ls1.gamma", "pos_embed1", "cls_token"),
    *("blocks.0.attn.q_norm.weight", "relative_position_bias_table", "reg_token", "pos_embed"),
    *("head.weight", "head.bias", "classifier.weight", "norm.weight", "norm.bias", "norm4.bias"),
    *("pooler.dense.weight", "pooler.dense.bias", "layernorm.weight", "ln1.weight", "total_ops"),
    *("num_batches_tracked", "block1.0.attn.total_params", "block9.0.norm1.weight", "", "."),
    *("block1.7.norm1.weight", "attn.sr.bias", "blocks.9.norm1.weight", "a" * 300),
    *(
        "layers.0.1.0.attn.attn.bias_k",
        "embeddings.distillation_token",
        "block1.0.attn.norm.weight",
    ),
    *("vit.embeddings.mask_token", "patch_embed1.proj.weight", "block3.0.attn.sr.weight"),
    "stages.0.downsample.proj.weight",
)


def extra_keys(case: Case, rng: random.Random) -> None:
    prefix = some_key(case, rng).partition(".")[0] + "." if rng.random() < 0.3 else ""
    shape = rng.choice(
        (
            (),
            (1,),
            (3,),
            (6,),
            (1, 1, 6),
            (3, 6),
            tuple(getattr(case.state[some_key(case, rng)], "shape", ())),
        )
    )
    x = np.full(shape, 7, np.float32)
    case.state = {prefix + rng.choice(EXTRA): x} | case.state if rng.random() < 0.2 else {
        **case.state, prefix + rng.choice(EXTRA): x,
    }  # fmt: skip


def rename(case: Case, old: str, new: str) -> None:
    case.state = {new if key == old else key: x for key, x in case.state.items()}


def misspell(case: Case, rng: random.Random) -> None:
    key = some_key(case, rng)
    at = rng.randrange(len(key)) if key else 0
    how = rng.choice(("digit", "letter", "drop", "double", "case", "space", "unicode", "cut"))
    digits = [i for i, c in enumerate(key) if c.isdigit()]
    if how == "digit" and digits:
        at = rng.choice(digits)
        new = key[:at] + rng.choice("0123456789") + key[at + 1 :]
    else:
        new = {
            "letter": key[:at] + rng.choice("abcxyz._") + key[at + 1 :],
            "drop": key[:at] + key[at + 1 :],
            "double": key[: at + 1] + key[at:],
            "case": key[:at] + key[at:].swapcase(),
            "space": key + rng.choice((" ", ".", "\n", "\0", "\x1b[2J")),
            "unicode": key[:at] + "\N{CYRILLIC SMALL LETTER IE}" + key[at + 1 :],
            "cut": key.rpartition(".")[0],
        }.get(how, key + "0")
    rename(case, key, new)


def swap_keys(case: Case, rng: random.Random) -> None:
    """Two arrays, of one shape more often than not, or all of two blocks."""
    a, b = some_key(case, rng), some_key(case, rng)
    shapes = {key: getattr(x, "shape", None) for key, x in case.state.items()}
    alike = [key for key in shapes if shapes[key] == shapes[a]]
    if rng.random() < 0.6:
        b = rng.choice(alike)
    case.state[a], case.state[b] = case.state[b], case.state[a]


def of_another_layout(case: Case, rng: random.Random) -> None:
    """Some keys, or all, as another layout or network has them."""
    network = case.network if rng.random() < 0.5 else rng.choice(list(LAYOUTS))
    layout, config = rng.choice(LAYOUTS[network]), rng.choice(CONFIGS[network])
    other = good_state(network, layout, bare(config) if layout.head is False else config)
    prefix = rng.choice(("", "", "other.", "backbone.", "module."))
    keys = list(other)
    if rng.random() < 0.5:
        keys = rng.sample(keys, rng.randrange(1, min(len(keys), 12)))
    new = {prefix + key: other[key] + np.float32(0.125) for key in keys}
    how = rng.choice(("add", "add", "replace", "first"))
    if how == "replace":
        case.state = new
    else:
        case.state = {**new, **case.state} if how == "first" else {**case.state, **new}


def a_second_model(case: Case, rng: random.Random) -> None:
    """The same keys, with other numbers, in another entry or under another prefix."""
    other = {
        key: x + np.float32(1) if isinstance(x, np.ndarray) else x for key, x in case.state.items()
    }
    if case.container == "safetensors" or rng.random() < 0.3:
        case.state |= {f"ema.{key}": x for key, x in other.items()}
    else:
        case.beside[rng.choice(("model", "ema", "state_dict", "b"))] = other


def reshape(case: Case, rng: random.Random) -> None:
    key = some_key(case, rng)
    x = case.state[key]
    if not isinstance(x, np.ndarray):
        return
    how = rng.choice(
        ("transpose", "flat", "axis", "squeeze", "drop", "more", "empty", "scalar", "factor")
    )
    last = x.ndim - 1
    match how:
        case "transpose":
            x = x.T
        case "flat":
            x = x.reshape(-1)
        case "axis":
            x = np.expand_dims(x, rng.choice((0, -1)))
        case "squeeze":
            x = np.squeeze(x)
        case "drop":
            x = x[:-1] if x.ndim else x
        case "more":
            axis = rng.randrange(x.ndim) if x.ndim else 0
            x = np.concatenate((x, np.take(x, [0], axis)), axis) if x.ndim else x
        case "empty":
            x = x[:0] if x.ndim else x
        case "scalar":
            x = x.reshape(-1)[:1].reshape(())
        case _:
            x = (
                x.reshape(-1, x.shape[last] // 2)
                if last >= 0 and x.size and x.shape[last] % 2 == 0
                else x
            )
    case.state[key] = np.ascontiguousarray(x)


DTYPES = ("float16", "float64", "int64", "int8", "uint8", "bool", "complex64")
NARROW = ("bfloat16", "float8_e4m3fn")  # that NumPy does not have


def rectype(case: Case, rng: random.Random) -> None:
    """One array, some, or all in another dtype."""
    import torch

    everything = list(case.state)
    some = rng.sample(everything, min(5, len(everything)))
    kind = rng.choice(DTYPES + NARROW)
    if kind == NARROW[1] and case.container == "legacy":
        return  # PyTorch writes these, and cannot read them
    for key in rng.choice(([some_key(case, rng)], everything, some)):
        x = case.state[key]
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            continue
        if kind in NARROW:
            case.state[key] = torch.from_numpy(x.astype(np.float32)).to(getattr(torch, kind))
        elif kind == "float64":
            case.state[key] = x.astype(np.float64) + 2.0**-30
        else:
            case.state[key] = x.astype(kind)


def spoil_numbers(case: Case, rng: random.Random) -> None:

    key = some_key(case, rng)
    x = case.state[key]
    if not isinstance(x, np.ndarray) or not x.size or x.dtype.kind != "f":
        return
    x = x.copy()
    x.reshape(-1)[rng.randrange(x.size)] = rng.choice((np.nan, np.inf, -np.inf, 1e-45, -0.0, 3e38))
    case.state[key] = x


def strange_tensors(case: Case, rng: random.Random) -> None:
    """Of PyTorch: transposed, of one storage, negated, a Parameter, expanded; or no tensor."""
    import torch

    if case.container == "safetensors":
        return
    key = some_key(case, rng)
    how = rng.choice(
        ("transposed", "shared", "negated", "parameter", "expanded", "none", "list", "dict", "view")
    )
    if not isinstance(case.state[key], np.ndarray):
        return
    x = torch.from_numpy(np.ascontiguousarray(case.state[key]))
    match how:
        case "transposed":
            case.state[key] = x.mT.contiguous().mT if x.ndim > 1 else x
        case "negated":
            case.state[key] = torch._neg_view(-x) if x.is_floating_point() else x
        case "parameter":
            case.state[key] = torch.nn.Parameter(x) if x.is_floating_point() else x
        case "expanded":
            case.state[key] = x[:1].expand(x.shape) if x.ndim and x.numel() else x
        case "none":
            case.state[key] = None
        case "list":
            case.state[key] = [1.0, 2.0]
        case "dict":
            case.state[key] = {"weight": x}
        case "view":
            case.state[key] = torch.stack((x, x), -1)[..., 0]
        case _:
            arrays = {
                k: v
                for k, v in case.state.items()
                if isinstance(v, np.ndarray) and v.dtype == np.float32
            }
            flat = torch.from_numpy(
                np.concatenate([v.reshape(-1) for v in arrays.values()] or [np.ones(1, "f4")])
            )
            at = 0
            for k, v in arrays.items():
                case.state[k] = flat[at : at + v.size].view(v.shape)
                at += v.size


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 4, 6, 8, 7, 12, 10**30, 10**400, 1e308, -0.0, 0.5, 1e-6),
    *(1e-12, "1e-6", "4", "", [], {}, [1], [1e-6], {"0": 1}, {"0": "a", "1": "b"}, {"1": "a"}),
    *([1, 2, 3, 2], [1, 1, 1, 1], [2, 2, 2, 2], [4, 2, 1, 1], [0, 0, 0, 0], [1.0, 2.0, 3.0, 2.0]),
    *([1, 2, 1, 1], [2, 4, 6, 4], [1, 2, 3, True], [1, 2, 3, "2"], [[1], 2, 3, 2], [3, 3, 3, 3]),
    *([1, 2, 3, 2, 1], [7, 3, 3, 3], [8, 8], [32, 32], [32, 64], {"0": "a", "1": "b", "2": "c"}),
    *("gelu", "relu", "gelu_new", "quick_gelu", "pvt", "pvt_v2", "vit", "deit", float("nan")),
    "multi_label_classification",
)


def change_json(case: Case, rng: random.Random) -> None:
    if not case.json_text:
        case.json_text = json.dumps(spelt.config_json(case.config)).encode()
    fields = json.loads(case.json_text)
    told = [k for k in fields if k not in ("dtype", "initializer_range", "transformers_version")]
    name = rng.choice(told or list(fields))
    how = rng.choice(
        (
            "delete",
            "delete",
            "value",
            "value",
            "value",
            "misspell",
            "swap",
            "number",
            "own",
            "other",
        )
    )
    match how:
        case "delete":
            for key in [name, *rng.sample(told, rng.choice((0, 0, 1, 4)) % len(told))]:
                fields.pop(key, None)
        case "value":
            fields[name] = rng.choice(VALUES)
        case "misspell":
            fields[name + rng.choice("s_ ")] = fields.pop(name)
        case "swap":
            other = rng.choice(told)
            fields[name], fields[other] = fields[other], fields[name]
        case "number":
            value = fields[name]
            if isinstance(value, list) and value:
                at = rng.randrange(len(value))
                value[at] = rng.choice((0, 1, 2, 3, 4, 6, 8, -1, 2.0, 0.5, True, "1", None))
            elif isinstance(value, int | float):
                fields[name] = value * 2 or 1
        case "own":  # this project's own names
            own = dataclasses.asdict(case.config)
            fields = (
                own
                if rng.random() < 0.5
                else fields | {k: own[k] for k in rng.sample(list(own), 3)}
            )
        case _:
            network = rng.choice(KINDS)
            fields = spelt.config_json(rng.choice(CONFIGS[network]))
    case.json_text = json.dumps(fields).encode()


OTHER_FIELDS: dict[str, dict[str, Any]] = {
    "pvt_v2": {"num_heads": (1, 1, 1, 1), "linear": True, "sr_ratios": (1, 1, 1, 1)},
    "vit": {"num_heads": 1, "depth": 2, "img_size": 16},
}


def ask_otherwise(case: Case, rng: random.Random) -> None:
    """Another configuration, a variant's name, another eps, or nothing."""
    changes = OTHER_FIELDS[case.network] | {"qkv_bias": False}
    changes |= {"num_classes": rng.choice((0, 5)), "in_chans": 3, "norm_eps": 1e-3, "qk_scale": 0.3}
    name = rng.choice(list(changes))
    case.argument = rng.choice(
        (
            None,
            dataclasses.replace(case.config, **{name: changes[name]}),
            *(bare(case.config), bare(case.config), case.config),
            *(rng.choice(CONFIGS[rng.choice(list(CONFIGS))]), V1),
            rng.choice(("pvt_tiny", "pvt_v2_b0", "pvt_v2_b2_li", "deit_ti_16", "vit_s_16")),
        )
    )
    case.eps = rng.choice((None, None, 1e-3, (1e-6, 1e-5)))


def spoil_bytes(
    data: bytes, rng: random.Random, spots: list[tuple[int, int]], damages: Sequence[Any]
) -> bytes:
    """Damaged, more often than not in one of the spots, which are ranges."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        low, high = rng.choice(spots) if spots and rng.random() < 0.6 else (0, len(spoilt))
        high = min(high, len(spoilt))
        if low < high:
            rng.choice(damages)(spoilt, rng, low, high)
    return bytes(spoilt)


def change_header(case: Case, rng: random.Random) -> bool:
    """The JSON of a .safetensors file, which stays JSON; False if it is none any more."""
    length = int.from_bytes(case.data[:8], "little")
    try:
        header, numbers = json.loads(case.data[8 : 8 + length]), case.data[8 + length :]
        keys = [key for key in header if key != "__metadata__"]
        if not all(len(header[key]["data_offsets"]) == 2 for key in keys):
            return False
    except (ValueError, LookupError, TypeError):
        return False
    if not keys:
        return False
    a, b = rng.choice(keys), rng.choice(keys)
    text = ""
    how = rng.choice(
        (
            "offsets",
            "dtype",
            "shape",
            "metadata",
            "twice",
            "order",
            "field",
            "wide",
            "number",
            "shift",
        )
    )
    match how:
        case "offsets":
            header[a], header[b] = header[b], header[a]
        case "shift":
            header[a]["data_offsets"], header[b]["data_offsets"] = (
                header[b]["data_offsets"],
                header[a]["data_offsets"],
            )
        case "dtype":
            header[a]["dtype"] = rng.choice(
                ("F16", "BF16", "I32", "U32", "F64", "F8_E4M3", "f32", "", None, "F4")
            )
        case "shape":
            shape = header[a]["shape"]
            header[a]["shape"] = rng.choice(
                (shape[::-1], [1, *shape], [], [*shape, 1], shape[1:], [2**62, 4], [-1])
            )
        case "metadata":
            header["__metadata__"] = rng.choice(
                (
                    {},
                    {"format": "np"},
                    {"format": 5},
                    [],
                    "x",
                    {"pvt_ref": "{}"},
                    {"a": "x" * 10**5},
                    {"pvt_reff": "{}"},
                )
            )
        case "twice":
            text = json.dumps(header)[:-1] + f", {json.dumps(a)}: {json.dumps(header[b])}" + "}"
        case "order":
            items = list(header.items())
            rng.shuffle(items)
            header = dict(items)
        case "field":
            header[a][rng.choice(("x", "strides", "data_offsets", "shape"))] = rng.choice(
                VALUES[:30]
            )
        case "wide":
            text = json.dumps(header) + " " * rng.choice((1, 7, 10**4))
        case _:
            header[a]["data_offsets"][rng.randrange(2)] += rng.choice((1, -1, 4, -4, 2**63, 0.5))
    data = (text or json.dumps(header)).encode()
    case.data = len(data).to_bytes(8, "little") + data + numbers
    return True


OF_CONTENT: tuple[Callable[[Case, random.Random], None], ...] = (
    *(miss_keys, extra_keys, misspell, swap_keys, of_another_layout, a_second_model, reshape),
    *(rectype, spoil_numbers, strange_tensors, change_json, change_json, ask_otherwise),
)


def make_case(network: str, rng: random.Random, damages: Sequence[Any]) -> Case:
    """A damaged file; one in thirty is left as it was. damages are those of bytes."""
    case = draw_case(network, rng)
    times = rng.choice((1, 1, 1, 1, 2, 2, 3)) if rng.random() > 1 / 30 else 0
    late = [rng.random() < 0.25 for _ in range(times)]
    for _ in range(times - sum(late)):
        how = rng.choice(OF_CONTENT)
        if case.state or how in (change_json, ask_otherwise):
            with np.errstate(all="ignore"):  # of numbers that a dtype cannot hold
                how(case, rng)
            case.done.append(how.__name__)
    if rng.random() < 0.05 and case.json_text:
        case.json_text = spoil_bytes(case.json_text, rng, [], damages)
        case.done.append("bytes of config.json")
    write(case)
    case.written = case.data
    for _ in range(sum(late)):
        if rng.random() < 0.4 and case.container == "safetensors" and change_header(case, rng):
            case.done.append("change_header")
            continue
        header = 8 + int.from_bytes(case.data[:8], "little")
        own = [(0, 8), (8, header)] if case.container == "safetensors" else [(0, 1500)]
        spots = [*own, (max(len(case.data) - 3000, 0), len(case.data))]
        case.data = spoil_bytes(case.data, rng, spots, damages)
        case.done.append("bytes")
    return case


def as_tensor(x: Any) -> Any:
    import torch

    if isinstance(x, dict):
        return {key: as_tensor(value) for key, value in x.items()}
    return torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray | np.generic) else x


def write(case: Case) -> None:
    """Makes the file's bytes."""
    import safetensors.numpy
    import safetensors.torch
    import torch

    plain = all(isinstance(x, np.ndarray) for x in case.state.values())
    if case.container == "safetensors" and plain:
        arrays = {key: np.ascontiguousarray(x) for key, x in case.state.items()}
        case.data = safetensors.numpy.save(arrays, {"format": "pt"})
        return
    tensors = {key: as_tensor(x) for key, x in case.state.items()}
    if case.container == "safetensors":
        tensors = {key: x.clone() for key, x in tensors.items()}  # it refuses shared memory
        case.data = safetensors.torch.save(tensors, {"format": "pt"})
        return
    tree: Any = tensors
    if case.entry or case.beside:
        tree = {case.entry or "model": tensors} | as_tensor(case.beside)
    stream = io.BytesIO()
    torch.save(tree, stream, _use_new_zipfile_serialization=case.container == "zip")
    case.data = stream.getvalue()


def put(case: Case, folder: Path) -> Path:
    """Writes what lies in the folder, and gives what load is asked for."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / case.name).write_bytes(case.data)
    if case.json_text is not None:
        (folder / "config.json").write_bytes(case.json_text)
    return folder if case.folder else folder / case.name


# --- what is right -------------------------------------------------------------------------------


def contents(case: Case) -> list[dict[str, Any]]:
    """All states in the file, as PyTorch or safetensors reads it; ValueError if they do not."""
    import torch

    try:
        if case.container == "safetensors":
            import safetensors.torch

            return [as_arrays(safetensors.torch.load(case.data))]
        data = case.written if case.container == "zip" else case.data  # that has checksums
        tree = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    states = [tree, *(x for x in tree.values() if isinstance(x, dict))]
    return [as_arrays(state) for state in states]


def as_arrays(state: dict[str, Any]) -> dict[str, Any]:
    import torch

    wide = {torch.bfloat16, torch.float16, torch.float8_e4m3fn}
    arrays = {}
    for key, x in state.items():
        if isinstance(x, torch.Tensor):
            x = x.detach().resolve_neg()
            arrays[key] = (x.float() if x.dtype in wide else x).numpy()
    return arrays


def wrong(case: Case, model: Model) -> str:
    """What is wrong with a model that was loaded; "" if nothing is."""
    try:
        states = contents(case)
    except ValueError as error:
        return f"it was read, and its own library refuses it: {error}"
    native = {key: np.asarray(x) for key, x in model_state(model).items()}
    for layout in LAYOUTS[network_of(model.config)]:
        if layout.head not in (None, model.config.has_classifier):
            continue  # what is read without its head is of the layout without
        theirs = layout.write(native)
        for state in states:
            for prefix in prefixes(state, theirs):
                if all(equal(state.get(prefix + key), x) for key, x in theirs.items()):
                    if unwritten(theirs, native):
                        return "it has numbers that are in no file"
                    left = {
                        key: x
                        for key, x in state.items()
                        if key.removeprefix(prefix) not in theirs or not key.startswith(prefix)
                    }
                    return extra(model, prefix, left) or wrong_config(case, layout, model)
    return f"other numbers than the file has, or of no layout ({model.source})"


def unwritten(theirs: dict[str, Any], native: dict[str, Any]) -> bool:
    """Whether a layout has no place for some numbers, and they are not 0."""
    if sum(x.size for x in theirs.values()) == sum(x.size for x in native.values()):
        return False
    return any(x.any() for key, x in native.items() if key.endswith("attn.proj.bias"))


def network_of(config: Any) -> str:
    return next(name for name, configs in CONFIGS.items() if type(configs[0]) is type(config))


def model_state(model: Model) -> dict[str, Any]:
    from pvt_ref import to_state_dict

    return to_state_dict(model.params)


def prefixes(state: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    first = next(iter(theirs))
    return [key.removesuffix(first) for key in state if key.endswith(first)]


def equal(found: Any, x: np.ndarray) -> bool:
    """In every bit of every number, whatever the width."""
    if found is None or found.shape != x.shape or found.dtype.kind != "f":
        return False
    return bool(np.array_equal(found.astype(np.float64), x.astype(np.float64))) and bool(
        np.array_equal(np.signbit(found), np.signbit(x))
    )


def extra(model: Model, prefix: str, left: dict[str, Any]) -> str:
    """Arrays that the model does not have: those of its own must be known, all must be named."""
    network = network_of(model.config)
    others = re.findall(r"entry='([^']+)'", model.source)  # with the dict's name before the prefix
    others += [name.partition(".")[2] for name in others]
    named = tuple(f"{name}." for name in others if name)
    for key, x in left.items():
        counter = key.rpartition(".")[2] in COUNTERS and x.size == 1
        name = key.removeprefix(prefix)
        own = key.startswith(prefix) and not key.startswith(named)
        unused = not model.config.has_classifier and name.startswith(UNUSED[network])
        if own and not counter and not unused:
            return f"it has {key!r}, which was left out"
        if counter and not own:
            continue
        if counter and "counters beside" not in model.source:
            return f"{key!r} was left out, and nothing says so"
        said = ("left out", "other weights", "the classifier is left out", "counters beside")
        if not any(words in model.source for words in said):
            return f"{key!r} was left out, and nothing says so ({model.source})"
    return ""


JSON_FIELDS: dict[str, dict[str, str]] = {
    "pvt_v2": {
        "depths": "depths",
        "hidden_sizes": "embed_dims",
        "linear_attention": "linear",
        "mlp_ratios": "mlp_ratios",
        "num_attention_heads": "num_heads",
        "num_channels": "in_chans",
        "qkv_bias": "qkv_bias",
        "sr_ratios": "sr_ratios",
        "image_size": "img_size",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "drop_rate",
        "attention_probs_dropout_prob": "attn_drop_rate",
        "drop_path_rate": "drop_path_rate",
    },
    "vit": {
        "hidden_size": "embed_dim",
        "image_size": "img_size",
        "layer_norm_eps": "norm_eps",
        "num_attention_heads": "num_heads",
        "num_channels": "in_chans",
        "num_hidden_layers": "depth",
        "patch_size": "patch_size",
        "qkv_bias": "qkv_bias",
        "intermediate_size": "hidden_dim",
        "hidden_dropout_prob": "drop_rate",
        "attention_probs_dropout_prob": "attn_drop_rate",
    },
}
FIXED = {
    "pvt_v2": {"hidden_act": "gelu", "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2]}
    | {"num_encoder_blocks": 4, "model_type": "pvt_v2"},
    "vit": {"hidden_act": "gelu", "model_type": "vit"},
}


def read_json(case: Case) -> dict[str, Any] | None:
    """config.json as anybody would read it; None if it cannot be read."""
    try:
        fields = json.loads((case.json_text or b"").decode("utf-8-sig"))
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def wrong_config(case: Case, layout: Spelt, model: Model) -> str:
    """A model must be what was asked for, or else what config.json says."""
    config, network = model.config, network_of(model.config)
    fields = read_json(case) if layout.json else None
    not_used = "not used: config.json" in model.source
    if case.argument is not None:
        if isinstance(case.argument, str):
            return "a variant's name fits no model of these"
        free = {name: getattr(config, name) for name in eps_names(config)}
        if dataclasses.replace(case.argument, **free) != config:
            return f"the configuration is not the one that was given: {config}"
    elif fields is None or not_used:
        return f"the configuration comes from nowhere: {config}"
    elif is_own(fields, config):
        for name, value in fields.items():
            asked = case.eps is not None and name in eps_names(config)
            if not asked and plain(value) != plain(getattr(config, name)):
                return f"{name} is {getattr(config, name)}, and config.json has {value!r}"
        return ""
    else:
        for name, ours in JSON_FIELDS.get(network, {}).items():
            if name in fields and not (name == "layer_norm_eps" and case.eps is not None):
                value = fields[name]
                if name == "image_size" and isinstance(value, list) and len(set(value)) == 1:
                    value = value[0]
                if name == "patch_size" and isinstance(value, list) and len(set(value)) == 1:
                    value = value[0]
                if plain(value) != plain(getattr(config, ours)):
                    return f"{ours} is {getattr(config, ours)}, and config.json has {value!r}"
        for name, value in FIXED.get(network, {}).items():
            if name in fields and plain(fields[name]) != plain(value):
                return f"config.json has {name} {fields[name]!r}, which is not computed so"
    return wrong_labels(fields, model) or wrong_eps(case, layout, model, fields, not_used)


def is_own(fields: dict[str, Any], config: Any) -> bool:
    return fields.keys() <= {field.name for field in dataclasses.fields(config)}


def eps_names(config: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(config) if f.name.endswith("norm_eps")]


def plain(value: Any) -> Any:
    """For a comparison in which True is no 1, and 1.0 is."""
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return value if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def wrong_labels(fields: dict[str, Any] | None, model: Model) -> str:
    labels = (fields or {}).get("id2label")
    if not labels or not model.config.has_classifier or not model.classes:
        return ""
    if "labels from config.json" not in model.source and "configuration from" not in model.source:
        return ""
    names = [labels.get(str(k)) for k in range(model.config.num_classes)]
    return "" if names == list(model.classes) else f"classes are {model.classes}, not {names}"


def wrong_eps(
    case: Case, layout: Spelt, model: Model, fields: dict[str, Any] | None, not_used: bool
) -> str:
    found = tuple(getattr(model.config, name) for name in eps_names(model.config))
    if case.eps is not None:
        pair = case.eps if isinstance(case.eps, tuple) else (case.eps,) * 2
        right = pair[: len(found)]
    elif fields and not not_used and is_own(fields, model.config):
        names = eps_names(model.config)
        defaults = {field.name: field.default for field in dataclasses.fields(model.config)}
        right = tuple(fields.get(name, defaults[name]) for name in names)
        if not fields.keys() & set(names):
            right = layout.eps
    elif fields and not not_used and "layer_norm_eps" in fields:
        right = (fields["layer_norm_eps"],) * len(found)
    else:
        right = layout.eps
        given = (
            [getattr(case.argument, name) for name in eps_names(case.argument)]
            if case.argument is not None
            else []
        )
        default = [
            f.default for f in dataclasses.fields(type(model.config)) if f.name.endswith("norm_eps")
        ]
        if given and given != default:
            right = tuple(given)
    return "" if found == tuple(right) else f"eps is {found}, not {right}"
