"""What a model costs: parameters, multiply-accumulates (MACs) and memory, item by item.

MACs, by the rule that reproduces the paper's GFLOPs: every linear and convolution weight counts
once per token it is applied to, the cls token included; the two products of attention count
2 n m C per block, patch tokens only; norms, softmax, GELU and biases are free.

Memory is what inference with the reference operations holds at its fullest: the image, and every
array alive at the same moment, weights not counted. The formulas follow layers/ line by line, and
a test holds them against what Python really allocates.

A columnar ViT (Dosovitskiy et al. 2021) is counted by the same code, since it is one stage with
R = 1: that is the comparison the paper makes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from pvt_ref.arrays import FLOAT_DTYPES
from pvt_ref.checks import TOO_LARGE, as_size, is_whole
from pvt_ref.errors import ArrayTypeError, ConfigError, RangeError, ShapeError, shown
from pvt_ref.models.pvt.config import NUM_STAGES, PVTConfig


@dataclass(frozen=True, slots=True)
class CostItem:
    """One operation of one stage, all its repetitions together.

    Attributes:
        stage: 1 to 4; 0 is the classifier.
        operation: named like the weights: ``"patch_embed"``, ``"attn.q"``, ``"mlp.fc1"`` and so on.
        repeats: blocks it occurs in.
        parameters: numbers in its weights, over all repeats.
        macs: multiply-accumulates, over all repeats and the whole batch.
        peak_bytes: bytes of the arrays alive while it runs, image included, weights not.
    """

    stage: int
    operation: str
    repeats: int
    parameters: int
    macs: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class StageShape:
    """What one stage works on.

    Attributes:
        stage: 1 to 4.
        grid: (H_i, W_i).
        channels: C_i.
        tokens: n_i, patch tokens; the cls token is not among them.
        keys: m_i = n_i / R_i^2.
    """

    stage: int
    grid: tuple[int, int]  # (H_i, W_i)
    channels: int  # C_i
    tokens: int  # n_i, patch tokens
    keys: int  # m_i


@dataclass(frozen=True, slots=True)
class Cost:
    """The whole bill.

    Attributes:
        size: (H, W) of the image, in pixels.
        batch: B.
        dtype: of all arrays, ``"float32"`` or ``"float64"``.
        stages: what each stage works on.
        items: one for every operation of every stage.
    """

    size: tuple[int, int]
    batch: int
    dtype: str
    stages: tuple[StageShape, ...]
    items: tuple[CostItem, ...]

    def __repr__(self) -> str:
        height, width = self.size
        return (
            f"Cost(image {height}x{width}, batch {self.batch}, {self.dtype}: "
            f"{self.parameters:,} parameters, {self.macs / 1e6:,.2f} MMACs, "
            f"{self.peak_bytes / 2**20:,.2f} MiB at most)"
        )

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(item.parameters for item in self.items)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a forward pass over the whole batch."""
        return sum(item.macs for item in self.items)

    @property
    def peak_bytes(self) -> int:
        """Largest sum of arrays alive at once in inference, image included, weights not."""
        return max(item.peak_bytes for item in self.items)

    def of_stage(self, stage: int) -> "Cost":
        """The part of one stage.

        Args:
            stage: 1 to 4; 0 is the classifier.

        Returns:
            A bill with the items of that stage only.

        Raises:
            RangeError: if the model has no such stage.
        """
        known = sorted({item.stage for item in self.items})
        if not is_whole(stage) or stage not in known:
            raise RangeError(
                f"stage is {shown(stage)}; this bill has {known} (0 is the classifier)"
            )
        return Cost(
            self.size,
            self.batch,
            self.dtype,
            tuple(s for s in self.stages if s.stage == stage),
            tuple(item for item in self.items if item.stage == stage),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """A columnar ViT: one stage, plain attention, a cls token.

    Dosovitskiy et al. 2021, arXiv 2010.11929; DeiT is the same network.

    Attributes:
        patch_size: P, in pixels.
        embed_dim: C.
        depth: blocks.
        num_heads: N; must divide C.
        mlp_ratio: E.
        img_size: side in pixels of the square image that the position table is made for.
        in_chans: channels of the image.
        num_classes: outputs of the classifier.

    Raises:
        ConfigError: if a field is no positive whole number, the patch does not divide img_size, or
            the heads do not divide the width.
    """

    patch_size: int
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: int = 4
    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_whole(value) or not 1 <= value < TOO_LARGE:
                raise ConfigError(
                    f"{field.name} is {shown(value)}; it must be a positive whole number below "
                    f"2**31"
                )
        if self.img_size % self.patch_size:
            raise ConfigError(
                f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}"
            )


_VIT_SMALL = {"embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3}

#: Columnar models to compare with: DeiT-Small (deit_s_16 is in the paper's Table 2), the same on
#: other patches, and the paper's ViT-Small (vit_s_16 in Table 2, the other two in Table 8).
VITS: dict[str, ViTConfig] = {
    "deit_s_32": ViTConfig(patch_size=32),
    "deit_s_16": ViTConfig(patch_size=16),
    "deit_s_4": ViTConfig(patch_size=4),
    "vit_s_32": ViTConfig(patch_size=32, **_VIT_SMALL),
    "vit_s_16": ViTConfig(patch_size=16, **_VIT_SMALL),
    "vit_s_4": ViTConfig(patch_size=4, **_VIT_SMALL),
}


def count_cost(
    config: PVTConfig | ViTConfig,
    size: int | tuple[int, int] | None = None,
    batch: int = 1,
    dtype: str = "float32",
    pyramid: bool = False,
) -> Cost:
    """Parameters, MACs and peak activation bytes of a forward pass.

    MACs are counted by the rule in the head of this file, which reproduces the paper's Table 2.

    Args:
        config: a PVT or a ViT.
        size: (H, W) of the image, or a side, in pixels; None takes config.img_size.
        batch: B.
        dtype: ``"float32"`` or ``"float64"``.
        pyramid: count the dense pyramid instead of the classifier: no cls token, final norm or
            head, and all four maps stay alive.

    Returns:
        The bill. Parameters do not depend on size; the weights that a pyramid leaves unused are
        not in its bill.

    Raises:
        ShapeError: if size is not one or two whole numbers, or the model cannot take it.
        ArrayTypeError: if config is neither a PVTConfig nor a ViTConfig.
        RangeError: if batch is not a positive whole number, dtype another, or pyramid neither
            True nor False.
        ConfigError: if the pyramid of a ViT is asked for.
    """
    if not isinstance(config, PVTConfig | ViTConfig):
        raise ArrayTypeError(
            f"config is a {type(config).__name__}; it must be a PVTConfig or ViTConfig, such as "
            f"VARIANTS['pvt_tiny'] or VITS['deit_s_16']"
        )
    if not is_whole(batch) or batch < 1:
        raise RangeError(f"batch is {shown(batch)}; it must be a whole number, 1 or more")
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        raise RangeError(f"dtype is {shown(dtype)}; it must be 'float32' or 'float64'")
    if not isinstance(pyramid, bool | np.bool_):
        raise RangeError(f"pyramid is {shown(pyramid)}; it must be True or False")
    height, width = as_size(config.img_size if size is None else size)
    scalar = np.dtype(dtype).itemsize
    batch = int(batch)
    if isinstance(config, ViTConfig):
        if pyramid:
            raise ConfigError("a columnar ViT has one scale and no pyramid; leave pyramid=False")
        stages, items = _count_vit(config, height, width, batch, scalar)
    else:
        with_classifier = config.has_classifier and not pyramid
        stages, items = _count_pvt(config, height, width, batch, scalar, with_classifier)
    return Cost((height, width), batch, dtype, tuple(stages), tuple(items))


def _count_pvt(
    config: PVTConfig, height: int, width: int, batch: int, scalar: int, with_classifier: bool
) -> tuple[list[StageShape], list[CostItem]]:
    grids = config.grids(height, width)
    stages: list[StageShape] = []
    items: list[CostItem] = []
    held = batch * config.in_chans * height * width * scalar  # the image, for the whole pass
    C_in = config.in_chans
    before = 0  # bytes of F_{i-1}, or of all earlier maps in a pyramid
    for i in range(NUM_STAGES):
        stage, grid = config.stage(i), grids[i]
        cls = with_classifier and i == NUM_STAGES - 1
        count = _StageCount(
            stage=i + 1,
            C_in=C_in,
            P=stage.patch_size,
            C=stage.embed_dim,
            N=stage.num_heads,
            hidden=stage.hidden_dim,
            depth=stage.depth,
            R=stage.sr_ratio,
            grid=grid,
            table_side=config.table_sides[i],
            cls=cls,
            qkv_bias=config.qkv_bias,
            patch_norm=True,
            batch=batch,
            scalar=scalar,
            held=held + before,
        )
        stages.append(count.shape())
        items += count.items()
        before = count.token_bytes if with_classifier else before + count.token_bytes
        C_in = stage.embed_dim
    if with_classifier:
        items += _count_head(batch, scalar, held, grids[-1], C_in, config.num_classes)
    return stages, items


def _count_vit(
    config: ViTConfig, height: int, width: int, batch: int, scalar: int
) -> tuple[list[StageShape], list[CostItem]]:
    P, C = config.patch_size, config.embed_dim
    if height < 1 or width < 1 or height % P or width % P:
        raise ShapeError(
            f"image size {height}x{width} must be positive multiples of the patch size {P}"
        )
    held = batch * config.in_chans * height * width * scalar
    grid = (height // P, width // P)
    count = _StageCount(
        stage=1,
        C_in=config.in_chans,
        P=P,
        C=C,
        N=config.num_heads,
        hidden=config.mlp_ratio * C,
        depth=config.depth,
        R=1,
        grid=grid,
        table_side=config.img_size // P,
        cls=True,
        qkv_bias=True,
        patch_norm=False,
        batch=batch,
        scalar=scalar,
        held=held,
    )
    head = _count_head(batch, scalar, held, grid, C, config.num_classes)
    return [count.shape()], [*count.items(), *head]


def _count_head(
    batch: int, scalar: int, held: int, grid: tuple[int, int], C: int, classes: int
) -> list[CostItem]:
    rows = batch * (1 + grid[0] * grid[1])
    tokens = rows * C * scalar
    logits = batch * classes * scalar
    return [
        CostItem(0, "norm", 1, 2 * C, 0, held + 3 * tokens + rows * scalar),
        CostItem(0, "head", 1, classes * (C + 1), batch * classes * C, held + tokens + logits),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _StageCount:
    """Counts one stage. Capital letters are the paper's; held is what outlives the stage."""

    stage: int
    C_in: int
    P: int
    C: int
    N: int
    hidden: int
    depth: int
    R: int
    grid: tuple[int, int]
    table_side: int
    cls: bool
    qkv_bias: bool
    patch_norm: bool
    batch: int
    scalar: int
    held: int

    @property
    def n(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def m(self) -> int:
        return self.n // self.R**2

    @property
    def token_bytes(self) -> int:
        """One (B, n, C) array, the cls token included."""
        return self.batch * (self.n + self.cls) * self.C * self.scalar

    def shape(self) -> StageShape:
        return StageShape(self.stage, self.grid, self.C, self.n, self.m)

    def items(self) -> Iterator[CostItem]:
        yield from self._entry()
        yield from self._block()

    def _item(self, operation: str, parameters: int, macs_per_image: int, live: int) -> CostItem:
        repeats = self.depth if operation not in ("patch_embed", "pos_embed") else 1
        return CostItem(
            self.stage,
            operation,
            repeats,
            repeats * parameters,
            repeats * self.batch * macs_per_image,
            self.held + live,
        )

    def _entry(self) -> Iterator[CostItem]:
        C, n, scalar = self.C, self.n, self.scalar
        kernel = self.C_in * self.P**2 * C
        rows = self.batch * n * scalar  # one number a token
        T = rows * C  # tokens without cls
        blocks = rows * self.C_in * self.P**2
        norm = 2 * C if self.patch_norm else 0
        in_norm = 3 * T + rows if self.patch_norm else 0  # tokens, centred, squared, variance
        live = kernel * scalar + max(blocks + T, in_norm)
        yield self._item("patch_embed", kernel + C + norm, n * kernel, live)

        table = self.table_side**2 + self.cls  # rows, the cls token's own included
        resized = self.grid != (self.table_side, self.table_side)
        P_rows = (n + self.cls) * C * scalar if resized or self.cls else 0
        # resizing holds the two matrices, the table with its rows done, twice (in two orders), and
        # the result; then the result, twice
        matrices = sum(self.grid) * self.table_side * (np.float64().itemsize + scalar)
        across = self.grid[0] * self.table_side * C * scalar
        resizing = matrices + n * C * scalar + max(2 * across, n * C * scalar) if resized else 0
        adding = 2 * self.token_bytes + P_rows  # before, after, and the table
        concat = (T + self.token_bytes) if self.cls else 0
        live = max(adding, self.token_bytes + resizing, concat)
        cls_token = C if self.cls else 0  # the token itself, beside its row of the table
        yield self._item("pos_embed", table * C + cls_token, 0, live)

    def _block(self) -> Iterator[CostItem]:
        C, R, scalar, batch = self.C, self.R, self.scalar, self.batch
        n_all, m_all = self.n + self.cls, self.m + self.cls
        bias = C if self.qkv_bias else 0
        rows = batch * n_all * scalar
        T = self.token_bytes  # one (B, n, C)
        M = batch * m_all * C * scalar  # one (B, m, C)
        S = batch * self.N * n_all * m_all * scalar  # scores
        U = batch * n_all * self.hidden * scalar  # hidden units

        # first half: alive are the block's input x, then norm1(x), then q beside them, T each
        yield self._item("norm1", 2 * C, 0, 3 * T + rows)
        yield self._item("attn.q", C * C + bias, n_all * C * C, 3 * T)
        x_norm_q = 3 * T
        reduced = 0
        if R > 1:
            kernel = R * R * C * C
            live = x_norm_q + kernel * scalar + T + M  # the norm over M needs less
            yield self._item("attn.sr", kernel + C + 2 * C, self.m * kernel, live)
            reduced = M
        kv = 2 * M
        attending = x_norm_q + reduced + kv
        yield self._item("attn.kv", 2 * (C * C + bias), 2 * m_all * C * C, attending)
        live = attending + max(3 * S, S + T)  # scores, shifted, exponential; then A and A v
        yield self._item("attn.weights", 0, 2 * self.n * self.m * C, live)
        merged = T if self.N > 1 else 0  # one head needs no reordering
        yield self._item("attn.proj", C * C + C, n_all * C * C, attending + 2 * T + merged)

        # second half: the block's input, the sum x, and the branch
        yield self._item("norm2", 2 * C, 0, 5 * T + rows)
        x_sum_norm = 3 * T
        yield self._item(
            "mlp.fc1", C * self.hidden + self.hidden, n_all * C * self.hidden, x_sum_norm + U
        )
        yield self._item("mlp.gelu", 0, 0, x_sum_norm + 3 * U)  # hidden, its multiple, erf of that
        yield self._item(
            "mlp.fc2", self.hidden * C + C, n_all * C * self.hidden, x_sum_norm + U + T
        )
