"""The version graph: its picture says which version stands on which, and which operations are still in effect."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editctl.store import Operation, View
from editctl.tui.desk import Past
from editctl.tui.graph import HEAD, LANES, OTHER, ROOT, WAITS, drawn, lists


@pytest.mark.parametrize(
    ("parents", "head", "candidates", "picture"),
    [
        ("b:a a:", "b", "", "@|○|◇"),
        ("b:a a:", "a", "", "  ○|@─╯|◇"),
        ("b:a a:", "", "", "  ○|  ○|@─╯"),
        ("c:a b:a a:", "b", "c", "  ◆|@ │|○─╯|◇"),
        ("c:a b:a a:", "c", "b", "@|├─◆|○|◇"),
        ("e: d:b c:b b:a a:", "c", "d", "  ○|  │ ◆|@ │ │|○─┼─╯|○ │|◇─╯"),
        ("d:a c:b b: a:", "d", "", "@|│ ○|│ ○|○ │|◇─╯"),
        ("b:lost", "b", "", "@|◇"),
    ],
)
def test_the_picture_of_a_tree(parents: str, head: str, candidates: str, picture: str) -> None:
    """Each line is a version, the newest first, the unedited model last."""
    tree = [tuple(pair.split(":")) for pair in parents.split()]
    assert "|".join(drawn(tree, head, candidates.split())) == picture  # type: ignore[arg-type]


def parents_in(lines: list[str], names: list[str]) -> dict[str, str]:
    """What a picture says: follow the lanes down from each version."""
    found: dict[str, str] = {}
    waiting: dict[int, list[str]] = {}
    for line, name in zip(lines, [*names, ""], strict=True):
        signs = {i // 2: sign for i, sign in enumerate(line) if i % 2 == 0}
        (at,) = (i for i, sign in signs.items() if sign in HEAD + WAITS + OTHER + ROOT)
        hung = [i for i, sign in signs.items() if sign == "├"]
        for i in list(waiting):
            if i == at or signs[i] in "╯┴":
                found |= dict.fromkeys(waiting.pop(i), name)
            else:
                assert signs[i] in "│┼├", "a lane that goes on is drawn"
        if hung:
            waiting[hung[0]].append(name)
        elif name:
            waiting[at] = [name]
    assert not waiting, "every lane comes to its end"
    return found


@given(st.lists(st.integers(0, 10_000), max_size=40), st.integers(0, 40), st.data())
def test_the_lanes_lead_from_every_version_to_its_parent(steps: list[int], head: int, data: st.DataObject) -> None:
    """Read back from the picture, the tree is the tree that was drawn."""
    near = data.draw(st.integers(1, 40))
    ids = [str(i) for i in range(1, len(steps) + 1)]
    tree = [(name, ["", *ids][max(i - step % near, 0)]) for i, (name, step) in enumerate(zip(ids, steps, strict=True))]
    tree.reverse()
    lines = drawn(tree, ["", *ids][min(head, len(ids))], ids[::3])
    if max(map(len, lines)) > 2 * LANES:
        return  # what shares the last lane cannot be told apart
    assert parents_in(lines, [name for name, _ in tree]) == dict(tree)


def test_a_picture_of_very_many_versions_is_narrow_and_soon_there() -> None:
    """Two thousand lines of development that all begin at the unedited model."""
    tree = [(f"tip{i}", f"root{i}") for i in range(2500)] + [(f"root{i}", "") for i in range(2500)]
    begun = time.perf_counter()
    lines = drawn(tree, "tip7", ())
    assert time.perf_counter() - begun < 2
    assert max(map(len, lines)) <= 2 * LANES + 1
    assert len(lines) == 5001


def operation(number: int, verb: str, before: str, after: str, undoes: int = 0, about: str = "") -> Operation:
    return Operation(
        id=number,
        parent=number - 1,
        verb=verb,
        head_before=before,
        head=after,
        at="2026-08-01T12:00:00+00:00",
        who="ada@lab",
        command="",
        undoes=undoes,
        description="",
        about=about,
    )


def test_operations_say_whether_they_are_in_effect() -> None:
    """Undone is what was taken back and not brought again, also where a new line began since."""
    told = [
        operation(1, "apply", "", "a"),
        operation(2, "apply", "a", "b"),
        operation(3, "undo", "b", "a", undoes=2),
        operation(4, "redo", "a", "b", undoes=3),
        operation(5, "undo", "b", "a", undoes=2),
        operation(6, "apply", "a", "a", about="c"),
    ]
    found = lists(Past(view=View("a"), operations=tuple(reversed(told)))).deeds
    assert [(deed.operation.id, deed.current) for deed in found][:2] == [(6, True), (5, False)]
    assert {deed.operation.id for deed in found if deed.undone} == {2}
    assert {deed.operation.id for deed in found if not deed.quiet} == {1, 6}
    assert [deed.version for deed in found] == ["c", "a", "b", "a", "b", "a"]


def test_a_damaged_log_is_listed_as_it_is() -> None:
    """An undo of nothing must not take the list away."""
    found = lists(Past(view=View(), operations=(operation(1, "undo", "", ""),)))
    assert [deed.operation.verb for deed in found.deeds] == ["undo"]
