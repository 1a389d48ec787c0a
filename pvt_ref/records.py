"""The records of operations that there are, and which of them is the default."""

from pvt_ref.arrays import Array
from pvt_ref.block import block_backward, block_forward
from pvt_ref.layers.attention import attention_backward, attention_forward
from pvt_ref.layers.drop import drop_backward, drop_path_forward, dropout_forward
from pvt_ref.layers.gelu import gelu_backward, gelu_forward
from pvt_ref.layers.layer_norm import layer_norm_backward, layer_norm_forward
from pvt_ref.layers.linear import linear_backward, linear_forward
from pvt_ref.layers.mlp import mlp_backward, mlp_forward
from pvt_ref.layers.patch_embed import patch_embed_backward, patch_embed_forward
from pvt_ref.layers.position import position_backward, position_forward
from pvt_ref.layers.softmax import softmax_backward, softmax_forward
from pvt_ref.layers.sra import sra_backward, sra_forward
from pvt_ref.ops import Operation, Ops

#: The layers as the paper writes them.
REFERENCE = Ops(
    name="reference",
    linear=Operation(linear_forward, linear_backward),
    layer_norm=Operation(layer_norm_forward, layer_norm_backward),
    gelu=Operation(gelu_forward, gelu_backward),
    softmax=Operation(softmax_forward, softmax_backward),
    dropout=Operation(dropout_forward, drop_backward),
    drop_path=Operation(drop_path_forward, drop_backward),
    patch_embed=Operation(patch_embed_forward, patch_embed_backward),
    position=Operation(position_forward, position_backward),
    attention=Operation(attention_forward, attention_backward),
    sra=Operation(sra_forward, sra_backward),
    mlp=Operation(mlp_forward, mlp_backward),
    block=Operation(block_forward, block_backward),
)


def default_ops(x: Array) -> Ops:
    """The record used when the caller names none, by the kind and dtype of the array x."""
    del x  # there is one record so far, and it serves every array
    return REFERENCE
