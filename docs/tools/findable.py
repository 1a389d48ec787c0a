"""A hook of mkdocs: the search knows the field's words, and finds what explains before what lists.

Material multiplies a page's score by ``search.boost`` of its front matter, and looks for words in
its ``tags`` first. Both are set here, so that no page has to.
"""

from typing import Any

#: By the beginning of a page's path; the first that fits. What fits none keeps 1.
BOOSTS = (
    ("course/index.md", 1.0),
    ("course/", 3.0),
    ("how_to/", 2.5),
    ("api/", 0.4),
    ("results/", 0.5),
)

#: What people type, where the page that answers it says it in other words, or is one of many. A
#: common word in here ("layer", "norm") would outrank the titles of other pages.
WORDS = {
    "course/notation.md": ("VJP", "vector-Jacobian", "elementwise", "autograd"),
    "course/whole_backward.md": ("backpropagation", "backprop"),
    "course/attention.md": ("self-attention", "MHSA", "multi-head"),
    "course/position.md": ("positional",),
    "course/block.md": ("stochastic", "dropout", "feed-forward", "FFN"),
    "course/stages.md": ("receptive field", "cls token"),
    "course/semantic_fpn.md": ("BatchNorm", "mIoU"),
    "course/pvt_v2.md": ("Swin",),
    "course/training.md": ("AdamW", "EMA"),
    "how_to/fine_tune.md": ("finetune", "fine-tune", "finetuning", "transfer"),
    "how_to/head.md": ("downstream",),
    "how_to/load.md": ("pretrained", "state_dict"),
    "how_to/export.md": ("ONNX", "deploy"),
    "how_to/many_machines.md": ("DDP", "distributed", "multi-GPU"),
    "how_to/other_libraries.md": ("PyTorch", "JAX", "timm"),
    "how_to/attention_pictures.md": ("visualise", "visualize", "heatmap"),
    "field.md": ("ConvNeXt",),
}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> None:
    """Called by mkdocs with every page."""
    path = page.file.src_uri
    if path in WORDS:
        page.meta.setdefault("tags", list(WORDS[path]))
    for beginning, boost in BOOSTS:
        if path.startswith(beginning):
            page.meta.setdefault("search", {}).setdefault("boost", boost)
            return
