"""The parameters of a PVT: plain records whose field names are the authors' key names."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pvt_ref.arrays import Array
from pvt_ref.blocks.transformer import BlockParams
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import PatchEmbedParams
from pvt_ref.models import parts
from pvt_ref.models.architecture import Leaf
from pvt_ref.models.pvt.config import NUM_STAGES, PVTConfig
from pvt_ref.tree import record, short_repr, zeros_like


class StageParams(NamedTuple):
    """The weights of stage i, a view into :class:`PVTParams`.

    Attributes:
        patch_embed: projection (C_i, C_{i-1}, P_i, P_i) and norm (C_i,).
        pos_embed: (1, n_i, C_i); with a cls row, (1, 1 + n_i, C_i).
        blocks: of each of the L_i blocks.
    """

    patch_embed: PatchEmbedParams
    pos_embed: Array
    blocks: tuple[BlockParams, ...]

    __repr__ = short_repr


@record
class PVTParams:
    """The weights of a model, or their gradients, float32 or float64.

    Stage i has n_i tokens for an image of config.img_size; C_0 is in_chans.

    Attributes:
        pos_embed1: (1, n_1, C_1).
        pos_embed2: (1, n_2, C_2).
        pos_embed3: (1, n_3, C_3).
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

    def of_stage(self, i: int) -> StageParams:
        """The weights of one stage.

        Args:
            i: 1 to 4, as in the paper.

        Returns:
            The same arrays, not copies.
        """
        names = (f"patch_embed{i}", f"pos_embed{i}", f"block{i}")
        return StageParams(*(getattr(self, name) for name in names))

    def gradients(
        self,
        stages: Sequence[StageParams],
        cls_token: Any = None,
        norm: Any = None,
        head: Any = None,
    ) -> "PVTParams":
        """Gradients of the whole from those of its parts; zeros for what a pass did not use.

        Args:
            stages: of each stage, in the shapes of its weights.
            cls_token: (1, 1, C_4), or None.
            norm: of the final norm, or None.
            head: of the head, or None.

        Returns:
            A record of the weights' shapes.
        """
        named: dict[str, Any] = {"cls_token": cls_token, "norm": norm, "head": head}
        for name, gradient in named.items():
            named[name] = zeros_like(getattr(self, name)) if gradient is None else gradient
        for i, stage in enumerate(stages, start=1):
            named[f"patch_embed{i}"], named[f"pos_embed{i}"], named[f"block{i}"] = stage
        return PVTParams(**named)

    def stage(self, i: int) -> StageParams:
        """The old name of :meth:`of_stage`, which counts from 0. It warns, and will go.

        Args:
            i: 0 to 3.

        Returns:
            The weights of stage i + 1.
        """
        warnings.warn(
            "params.stage(i) counts stages from 0; params.of_stage(i) counts them from 1, as the "
            "paper does",
            FutureWarning,
            stacklevel=2,
        )
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
