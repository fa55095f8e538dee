"""Tables in Markdown, and the numbers in them."""

import statistics
from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Args:
        header: Titles of the columns.
        rows: Text of the cells, as many per row as there are columns.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(values: Sequence[float], sign: str = "", digits: int = 2) -> str:
    """Return mean ± sample standard deviation; only the value if there is one, nothing if there is none.

    Args:
        values: The values.
        sign: ``+`` for a sign before positive means too.
        digits: Number of decimals.
    """
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"
