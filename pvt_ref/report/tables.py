"""Costs as text tables for the terminal."""

import io
from collections.abc import Iterable

from pvt_ref.errors import printable
from pvt_ref.report.cost import Cost, CostItem


def one_line(text: str) -> str:
    """An untrusted name or label on one line; see :func:`~pvt_ref.errors.printable`."""
    return printable(text).replace("\n", r"\n")


def text_table(
    columns: Iterable[str], rows: Iterable[Iterable[str]], total: Iterable[str] | None = None
) -> str:
    """An aligned table in ASCII; cells are shown as text, whatever brackets they hold."""
    from rich.box import Box  # slow to import, and needed only when something is printed
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cells(row: Iterable[str]) -> Iterable[Text]:
        return (Text(one_line(cell)) for cell in row)  # a plain str would be read as markup

    # a rule under the heading and nothing else, in characters that every terminal and file can hold
    plain = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    table = Table(box=plain, pad_edge=False, show_edge=False)
    for index, column in enumerate(cells(columns)):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    if total is not None:
        table.add_section()
        table.add_row(*cells(total))
    text = io.StringIO()
    Console(file=text, width=200, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def format_cost(cost: Cost) -> str:
    """The bill as a table by stage and operation, with totals."""
    height, width = cost.size

    def row(name: str, items: list[CostItem]) -> list[str]:
        return [
            name,
            f"{sum(item.parameters for item in items):,}",
            f"{sum(item.macs for item in items) / 1e6:,.2f}",
            f"{max(item.peak_bytes for item in items) / 2**20:,.2f}",
            f"{sum(item.cache_bytes for item in items) / 2**20:,.2f}",
        ]

    rows: list[list[str]] = []
    titles = {
        s.stage: f"stage {s.stage}: grid {s.grid[0]}x{s.grid[1]}, {s.channels} channels, "
        f"{s.tokens} tokens, {s.keys} keys"
        for s in cost.stages
    }
    for stage in sorted({item.stage for item in cost.items}, key=lambda s: (s == 0, s)):
        items = [item for item in cost.items if item.stage == stage]
        rows.append(row(titles.get(stage, "classifier"), items))
        for item in items:
            times = f" x{item.repeats}" if item.repeats > 1 else ""
            rows.append(row(f"  {item.operation}{times}", [item]))
    total = row("total (peak: the largest)", list(cost.items))
    heading = (
        f"image {height}x{width}, batch {cost.batch}, {cost.dtype}\n"
        f"MACs as the paper counts them. Memory of the reference operations, weights not counted: "
        f"peak is what\nlives at once in inference, cache what a forward keeps for its backward\n\n"
    )
    return heading + text_table(["", "parameters", "MMACs", "peak MiB", "cache MiB"], rows, total)
