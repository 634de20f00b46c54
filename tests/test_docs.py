"""The pages say what is so: their specs are valid, their commands exist, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from editctl.cli import cli
from editctl.spec import check

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language and marks, content) of every fenced block."""
    for match in FENCE.finditer(text):
        yield match[1].strip(), match[2]


@pages
def test_every_spec_on_a_page_is_valid(page: Path, tmp_path: Path) -> None:
    """Except those marked as wrong, which are there to be."""
    for number, (language, content) in enumerate(blocks(page.read_text(encoding="utf-8"))):
        if language == "toml" and "[[edit]]" in content:
            file = tmp_path / f"{number}.toml"
            # A page may show an edit alone; it stands below the first line that every file has.
            file.write_text(content if re.search(r"^version\b", content, re.MULTILINE) else f"version = 1\n{content}")
            report = check([file])
            assert [str(problem) for problem in report.problems] == []
            assert report.edits


def spoken(text: str) -> Iterator[str]:
    """Command lines on a page: in code spans, and in blocks that are no TOML, Python or JSON."""
    for language, content in blocks(text):
        if not language.startswith(("toml", "python", "json")):
            joined = content.replace("\\\n", " ")
            yield from re.findall(r"^ *(?:\$ )?(?:\S*/)?editctl(?= )[^\n]*", joined, re.MULTILINE)
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text)):
        yield from re.findall(r"^(?:\$ )?editctl (?![=:]).*", span)


def unknown(line: str) -> str:
    """What of a command line does not exist: its verb or one of its options; nothing when all does."""
    line = re.split(r" #|[|;&>]", line.strip().removeprefix("$ ").replace("\\|", "|"))[0]
    try:
        words = shlex.split(line)[1:]
    except ValueError:
        return f"cannot be read: {line}"
    place: click.Command = cli
    while words:
        word = words.pop(0)
        options = {
            name: o for o in place.params if isinstance(o, click.Option) for name in (*o.opts, *o.secondary_opts)
        }
        options |= dict.fromkeys(("-h", "--help"))
        name = word.partition("=")[0]
        if word.startswith("-") and word != "-":
            if name not in options:
                return f"{place.name} {name}"
            option = options[name]
            if option is not None and not option.is_flag and "=" not in word and words:
                words.pop(0)
        elif isinstance(place, click.Group):
            if not re.fullmatch(r"[a-z][a-z-]*", word):
                return ""  # a placeholder such as VERB or …
            if word not in place.commands:
                return word
            place = place.commands[word]
    return ""


@pages
def test_every_command_on_a_page_exists(page: Path) -> None:
    """Its verb and its options."""
    found = {line: unknown(line) for line in spoken(page.read_text(encoding="utf-8"))}
    assert {line: what for line, what in found.items() if what} == {}


def test_the_look_for_unknown_commands_finds_them() -> None:
    """Control: verbs, options and options of verbs that are not there; those that are, are let pass."""
    text = "`editctl nonsense`\n\n```sh\n$ editctl --store x plan specs --nonsense | tail\neditctl study nothing\n```\n"
    assert [unknown(line) for line in spoken(text)] == ["plan --nonsense", "nothing", "nonsense"]
    good = "`editctl --store s apply specs --yes --set energy=0.1`, `editctl study specs --batch 5`, `editctl.toml`"
    assert [unknown(line) for line in spoken(good)] == ["", ""]


def test_every_command_is_on_some_page() -> None:
    """A verb that no page names is a secret."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [verb for verb in cli.commands if not re.search(rf"\b(editctl )?{verb}\b", text)] == []


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pages
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """To a file of the repository and, after #, to a heading in it."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT)
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


@pages
def test_every_make_target_on_a_page_exists(page: Path) -> None:
    """As in `make demo`."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= targets
    named = re.findall(r"(?:`|^ *(?:\$ )?)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in named if name not in targets] == []
