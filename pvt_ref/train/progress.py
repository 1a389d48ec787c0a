"""The display of a training: a progress bar in a terminal, one line per epoch anywhere."""

import contextlib
import time
from collections.abc import Generator, Mapping
from typing import Any

from rich import progress
from rich.console import Console

from pvt_ref.errors import printable
from pvt_ref.train.step import StepReport


def show(console: Console | None, text: str) -> None:
    """Prints a line if there is a console. A failed display does not end the training."""
    if console is not None:
        with _shown():
            code = console.encoding
            text = printable(text).encode(code, "backslashreplace").decode(code)
            console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _shown() -> Generator[None]:
    """Where something is shown: a terminal or file may be closed, or a reader have left."""
    try:
        yield
    except (OSError, ValueError):
        pass
    except SystemExit as error:  # rich ends the program if nobody reads its output any more
        if not isinstance(error.__context__, BrokenPipeError):
            raise


class Progress:
    """A bar with loss, accuracy, images a second (smoothed over ten steps) and the time left.

    Where the console is no terminal, only the epochs' lines appear; without one, nothing.
    """

    def __init__(self, console: Console | None, total: int, done: int) -> None:
        self.images_per_second = 0.0
        self._console = console
        self._bar = progress.Progress(
            *("step", progress.MofNCompleteColumn(), progress.BarColumn(bar_width=None)),
            *("{task.fields[text]}", progress.TimeElapsedColumn()),
            *("left", progress.TimeRemainingColumn()),
            console=console or Console(quiet=True),
            disable=console is None or not console.is_terminal,
            speed_estimate_period=300,
        )
        self._task = self._bar.add_task("", total=total, completed=done, text="")
        self._loss = self._accuracy = None
        self._clock = time.monotonic()

    def __enter__(self) -> "Progress":
        with _shown():
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with _shown():
            self._bar.stop()

    def step(self, report: StepReport, batch_size: int, answers: int) -> None:
        """After every step, of so many samples, of which so many classes were asked."""
        now = time.monotonic()
        rate, self._clock = batch_size / max(now - self._clock, 1e-9), now
        self.images_per_second = _smooth(self.images_per_second or None, rate)
        self._loss = _smooth(self._loss, report.loss)
        self._accuracy = _smooth(self._accuracy, report.hits / answers)
        rate = f"{self.images_per_second:,.0f} images/s"
        text = f"loss {self._loss:.3f}  acc {self._accuracy:.3f}  {rate}"
        self._bar.update(self._task, advance=1, text=text)

    def epoch(self, line: Mapping[str, Any]) -> None:
        """After every epoch, with its line of the metrics: a line that stays."""
        best = line.get("best_miou", line.get("best_accuracy"))
        miou = f"  mIoU {line['held_out_miou']:.4f}" if "held_out_miou" in line else ""
        text = (
            f"epoch {line['epoch']:>3}  loss {line['train_loss']:.4f}  "
            f"acc {line['train_accuracy']:.4f}  held out: loss {line['held_out_loss']:.4f}  "
            f"acc {line['held_out_accuracy']:.4f}{miou}  (best {best:.4f})  "
            f"{line['images_per_second']:,.0f} images/s"
        )
        show(self._console, text)
        self._clock = time.monotonic()  # the evaluation is not the next step's time


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + 0.1 * (new - old)
