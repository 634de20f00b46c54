"""Plots: well-formed pictures in which every name is data."""

from __future__ import annotations

import builtins
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from editctl import plots
from editctl.errors import InvalidInput

HOSTILE = (
    "$\\frac{1}{0}$",
    "_hidden",
    "<script>&amp;",
    "\x1b[31mred\x1b[0m",
    "a\u202eb",
    "x$y$",
    "名前",
    "^{",
    "%s {0}",
)


def texts(path: Path) -> list[str]:
    """All text in an SVG file, by element."""
    return ["".join(node.itertext()) for node in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def draw_curves(path: Path, *names: str) -> Path:
    series = {name: [(0.0, 1.0), (10.0, 0.5 + i), (20.0, math.nan), (30.0, 2.0)] for i, name in enumerate(names)}
    plots.curves(path, series, title=names[0], xlabel=names[0], ylabel="value")
    return path


def draw_cells(path: Path, *names: str) -> Path:
    values = [[float(i * j) if i != j else math.inf for j in range(len(names))] for i in range(len(names))]
    plots.heatmap(path, values, rows=names, columns=names, title=names[0], label=names[0])
    return path


@pytest.mark.parametrize("draw", [draw_curves, draw_cells])
def test_pictures_are_well_formed_in_both_formats(draw: Any, tmp_path: Path) -> None:
    """An SVG that parses and names every series or cell; a PNG by its first bytes; the same numbers the same bytes."""
    found = texts(draw(tmp_path / "a.svg", "one", "two"))
    assert {"one", "two"} <= set(found)
    assert draw(tmp_path / "a.png", "one", "two").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "a.svg").read_bytes() == draw(tmp_path / "b.svg", "one", "two").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() != draw(tmp_path / "c.svg", "one", "three").read_bytes(), "control"


@pytest.mark.parametrize("draw", [draw_curves, draw_cells])
@pytest.mark.parametrize("suffix", plots.SUFFIXES)
def test_hostile_names_are_shown_as_they_are(draw: Any, suffix: str, tmp_path: Path) -> None:
    """No mathtext, no control character, nothing left out, no element of its own."""
    path = draw(tmp_path / f"a{suffix}", *HOSTILE)
    if suffix == ".svg":
        shown = "\n".join(texts(path))
        for name in ("$\\frac{1}{0}$", "_hidden", "<script>&amp;", "\\x1b[31mred", "a\\u202eb", "名前", "^{", "%s {0}"):
            assert name in shown, name
        raw = path.read_text(encoding="utf-8")
        assert not re.search(r"<script|[\x00-\x08\x0b-\x1f\u202e]", raw)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another suffix, nothing to draw, no folder to write to, no matplotlib: said with the remedy."""
    for draw in (draw_curves, draw_cells):
        with pytest.raises(InvalidInput, match="no picture's name"):
            draw(tmp_path / "a.pdf", "one")
    with pytest.raises(InvalidInput, match="no curve"):
        plots.curves(tmp_path / "a.svg", {"one": []}, title="", xlabel="", ylabel="")
    with pytest.raises(InvalidInput, match="no cell"):
        plots.heatmap(tmp_path / "a.svg", [], rows=[], columns=[], title="", label="")
    with pytest.raises(ValueError):
        plots.heatmap(tmp_path / "a.svg", [[1.0]], rows=["a"], columns=["b", "c"], title="", label="")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot be written"):
        draw_curves(tmp_path / "file" / "a.svg", "one")
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidInput) as error:
        draw_curves(tmp_path / "a.svg", "one")
    assert "editctl[plots]" in error.value.hint
