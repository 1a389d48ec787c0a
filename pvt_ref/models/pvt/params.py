"""The parameters of a PVT: plain records whose field names are the authors' key names."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from pvt_ref.arrays import Array
from pvt_ref.blocks.transformer import BlockParams
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import PatchEmbedParams
from pvt_ref.models import parts
from pvt_ref.models.architecture import Leaf
from pvt_ref.models.pvt.config import NUM_STAGES, PVTConfig, warn_of_stage
from pvt_ref.tree import branches, record, short_repr, zeros_like


class StageParams(NamedTuple):
    """The weights of stage i; pos_embed is (1, n_i, C_i), or (1, 1 + n_i, C_i) with a cls row."""

    patch_embed: PatchEmbedParams
    pos_embed: Array
    blocks: tuple[BlockParams, ...]

    __repr__ = short_repr


class Staged:
    """Parameters of a network with stages: access to one stage, and assembly of gradients."""

    __slots__ = ()
    _stage_type: ClassVar[Any] = StageParams

    def _stage_fields(self, i: int) -> tuple[str, ...]:
        return f"patch_embed{i}", f"pos_embed{i}", f"block{i}"

    def of_stage(self, i: int) -> Any:
        """The weights of stage i, from 1 as in the paper: the same arrays, not copies."""
        return self._stage_type(*(getattr(self, name) for name in self._stage_fields(i)))

    def gradients(self, stages: Sequence[Any], **others: Any) -> Any:
        """A record of the gradients of its parts, with zeros for what a pass did not use."""
        given = {name: gradient for name, gradient in others.items() if gradient is not None}
        for i, stage in enumerate(stages, start=1):
            given |= zip(self._stage_fields(i), stage, strict=True)
        grads = {n: given[n] if n in given else zeros_like(w) for n, w in branches(self)}
        return type(self)(**grads)


@record
class PVTParams(Staged):
    """The weights of a model, or their gradients, float32 or float64.

    Stage i has n_i tokens for an image of config.img_size; C_0 is in_chans.

    Attributes:
        pos_embed1: (1, n_1, C_1); pos_embed2 and pos_embed3 likewise.
        pos_embed4: (1, 1 + n_4, C_4), row 0 is the cls token's; (1, n_4, C_4) in a backbone.
        cls_token: (1, 1, C_4); None in a backbone.
        patch_embed1: projection (C_1, C_0, P_1, P_1), its bias and the norm, (C_1,) each.
        block1: L_1 blocks of width C_1; patch_embed2 to block4 likewise.
        norm: the final norm, weight and bias (C_4,) each; None in a backbone.
        head: weight (num_classes, C_4), bias (num_classes,); None in a backbone.
    """

    pos_embed1: Array
    pos_embed2: Array
    pos_embed3: Array
    pos_embed4: Array
    cls_token: Array | None
    patch_embed1: PatchEmbedParams
    block1: tuple[BlockParams, ...]
    patch_embed2: PatchEmbedParams
    block2: tuple[BlockParams, ...]
    patch_embed3: PatchEmbedParams
    block3: tuple[BlockParams, ...]
    patch_embed4: PatchEmbedParams
    block4: tuple[BlockParams, ...]
    norm: LayerNormParams | None
    head: LinearParams | None

    def stage(self, i: int) -> StageParams:
        """The old name of :meth:`of_stage`, which counts from 0. It warns, and will go.

        Args:
            i: 0 to 3.

        Returns:
            The weights of stage i + 1.
        """
        warn_of_stage("params")
        return self.of_stage(i + 1)


def build_params(config: PVTConfig, make: Callable[[Leaf], Array]) -> PVTParams:
    """A record of parameters, every array made by ``make(leaf)``, in the authors' order."""
    has_cls = config.has_classifier
    C_4 = config.embed_dims[-1]
    tree: dict[str, Any] = {}
    for i in range(NUM_STAGES):
        rows = config.table_sides[i] ** 2 + (has_cls and i == NUM_STAGES - 1)
        shape = (1, rows, config.embed_dims[i])
        tree[f"pos_embed{i + 1}"] = make(Leaf(f"pos_embed{i + 1}", shape, "normal"))
    tree["cls_token"] = make(Leaf("cls_token", (1, 1, C_4), "normal")) if has_cls else None
    for i, C_in in enumerate((config.in_chans, *config.embed_dims[:-1])):
        key, C, P = f"patch_embed{i + 1}", config.embed_dims[i], config.patch_sizes[i]
        proj = parts.projection(make, f"{key}.proj", C, C_in, P)
        tree[key] = PatchEmbedParams(proj, parts.norm(make, f"{key}.norm", C))
        key, s = f"block{i + 1}", config.of_stage(i + 1)  # once: it is as long as the stage
        tree[key] = tuple(
            parts.block(make, f"{key}.{b}", C, s.hidden_dim, s.sr_ratio, config.qkv_bias)
            for b in range(s.depth)
        )
    tree["norm"] = parts.norm(make, "norm", C_4) if has_cls else None
    tree["head"] = parts.linear(make, "head", config.num_classes, C_4) if has_cls else None
    return PVTParams(**tree)
