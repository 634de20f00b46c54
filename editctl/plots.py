"""Pictures of numbers: curves and heat maps as SVG or PNG files.

Knows: how a plot is laid out, and that names in it are data: no mathtext, no control character, no label lost because
it begins with an underscore. Refuses: to choose numbers, and to need matplotlib before something is drawn.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editctl.errors import InvalidInput
from editctl.files import write_atomically
from editctl.spec import visible

SUFFIXES = (".svg", ".png")
"""File formats, by the file's suffix."""
WIDTH = 80
"""Characters of a text in a picture."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's eight, which colour-blind readers can tell apart; a ninth curve has the first again, dashed."""
STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X"


def check(path: Path) -> None:
    """Make sure that a picture can be drawn there, before its numbers are made.

    Raises:
        InvalidInput: the suffix names no format, or matplotlib is not installed.
    """
    _figure(path, 1, 1)


def curves(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draw one line a series.

    Args:
        path: where to; its suffix, .svg or .png, decides the format.
        series: points (x, y) in the order in which they are joined, by the name in the legend. A point that is not
            finite is a gap.

    Raises:
        InvalidInput: the suffix is another, there is nothing to draw, or matplotlib is not installed.
    """
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        raise InvalidInput(f"there is no curve to draw into {path}", "measure something first")
    figure = _figure(path, 7.2, 4.2)
    axes = figure.add_subplot()
    for number, points in enumerate(drawn.values()):
        xs, ys = zip(*((x, y if math.isfinite(y) else math.nan) for x, y in points), strict=True)
        lap = number // len(COLOURS)
        axes.plot(
            xs,
            ys,
            color=COLOURS[number % len(COLOURS)],
            linestyle=STYLES[lap % len(STYLES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=3.5,
            linewidth=1.3,
        )
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.set_xlabel(_shown(xlabel), parse_math=False)
    axes.set_ylabel(_shown(ylabel), parse_math=False)
    axes.set_title(_shown(title), parse_math=False, fontsize="medium")
    # The names are put in afterwards: matplotlib leaves out those that begin with an underscore.
    legend = axes.legend(
        axes.get_lines(),
        [str(number) for number in range(len(drawn))],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize="small",
        frameon=False,
    )
    for text, name in zip(legend.get_texts(), drawn, strict=True):
        text.set_parse_math(False)
        text.set_text(_shown(name, 40))
    _save(figure, path)


def heatmap(
    path: Path,
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    label: str,
) -> None:
    """Draw a matrix as coloured cells.

    Args:
        path: where to; its suffix, .svg or .png, decides the format.
        values: rows × columns; a value that is not finite is an empty cell.
        rows: names of the rows, the first on top.
        label: what the colours mean.

    Raises:
        InvalidInput: the suffix is another, there is nothing to draw, or matplotlib is not installed.
        ValueError: a row has not one value a column, or there is not one name a row.
    """
    if not rows or not columns:
        raise InvalidInput(f"there is no cell to draw into {path}", "measure something first")
    cells = [
        [value if math.isfinite(value) else math.nan for value, _ in zip(row, columns, strict=True)]
        for row, _ in zip(values, rows, strict=True)
    ]
    figure = _figure(path, min(3.2 + 0.28 * len(columns), 24), min(2.0 + 0.24 * len(rows), 24))
    axes = figure.add_subplot()
    image = axes.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest")
    for ticks, labels, names in (
        (axes.set_xticks, axes.set_xticklabels, columns),
        (axes.set_yticks, axes.set_yticklabels, rows),
    ):
        ticks(range(len(names)))
        turned: dict[str, Any] = {"rotation": 90} if names is columns else {}
        labels([_shown(name, 24) for name in names], parse_math=False, fontsize="x-small", **turned)
    axes.set_title(_shown(title), parse_math=False, fontsize="medium")
    figure.colorbar(image, ax=axes).set_label(_shown(label), parse_math=False)
    _save(figure, path)


def _shown(text: str, width: int = WIDTH) -> str:
    return visible(text, width)


def _figure(path: Path, width: float, height: float) -> Any:
    """An empty figure of that many inches; no window and no state that another figure shares.

    Raises:
        InvalidInput: the file's suffix names no format, or matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidInput(f"{path} is no picture's name", f"let it end in {' or '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidInput("plots need the library `matplotlib`", "pip install 'editctl[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """Write the picture; the same numbers give the same bytes.

    Raises:
        InvalidInput: the file cannot be written.
    """
    from matplotlib import rc_context

    data = io.BytesIO()
    # Without a date and with fixed names of elements; letters stay letters, which can be searched and read aloud.
    options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "editctl"}), warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes in a PNG, and as it is in an SVG.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        figure.savefig(data, format=path.suffix[1:], **options)
    try:
        write_atomically(path, data.getvalue())
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error}", "name a folder that can be written to") from None
