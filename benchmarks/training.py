"""Stores command, log and curves of finished trainings in docs/results/.

    python benchmarks/training.py runs/digits runs/cifar10 runs/cifar10_v2

Reads each run's model.safetensors and metrics.jsonl, writes training.md, and for each run the log
of its epochs as JSON lines and its curves as SVG. Nothing is trained or measured here.
"""

import json
import sys
from pathlib import Path

import matplotlib

import pvt_ref
from pvt_ref.train import draw_curves, read_metrics

RESULTS = Path(__file__).parents[1] / "docs" / "results"

HEADING = """# Trainings

Results of `examples/train_digits.py` and `examples/train_cifar10.py`.
`python benchmarks/training.py` wrote this page from the files of the runs.
[Training](../training.md) describes how a training works. The weights are those that
`pvt_ref.load` has by the names of the headings, measured in half precision.

On the same machine, with the same NumPy and the same number of threads, a command gives the same
weights, bit by bit. Elsewhere the last digits differ, and after some hundred steps the trainings
have diverged. All ran on two cores shared with other work; that of `cifar10_v2` as two ranks, which
gives [the same bits](../training.md#many-machines) as the command below with one thread.

CIFAR-10 was trained and measured on a copy that had been stored as JPEG and converted back to the
binary layout: same images, labels and split, but pixels differ by a few grey levels. On the
original the weights may score a little better or worse, and a training ends with other weights.
"""


def keep(folder: Path) -> str:
    """Copies one run's log and curves, and returns its section of the page."""
    name = folder.name
    model = pvt_ref.load(folder / "model.safetensors")
    epochs = [
        line for line in read_metrics(folder / "metrics.jsonl") if "held_out_accuracy" in line
    ]
    log = RESULTS / f"training_{name}.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in epochs))
    with matplotlib.rc_context({"svg.hashsalt": "pvt_ref", "font.size": 9}):
        draw_curves(log, RESULTS / f"training_{name}.svg")
    cost = pvt_ref.count_cost(model.config)
    seconds = sum(
        model.info.training["samples"] / line["images_per_second"] for line in epochs
    )  # without the evaluation after each epoch
    rows = {
        "parameters": f"{cost.parameters:,}",
        "MACs an image": f"{cost.macs / 1e6:.1f} M",
        **{
            key.replace("_", " "): f"{value:.4f}" if isinstance(value, float) else f"{value}"
            for key, value in model.info.training.items()
            if key != "command"
        },
        "time in steps, about": f"{seconds / 60:.0f} minutes",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""
## {name}

{model.info.title}.

```sh
{model.info.training["command"]}
```

| | |
| --- | --- |
{table}

![Over the epochs the loss falls, the accuracy rises, and both flatten](training_{name}.svg)

Every epoch is in [training_{name}.jsonl](training_{name}.jsonl).
"""


def main(folders: list[str]) -> None:
    sections = [keep(Path(folder)) for folder in folders]
    (RESULTS / "training.md").write_text(HEADING + "".join(sections))


if __name__ == "__main__":
    main(sys.argv[1:])
