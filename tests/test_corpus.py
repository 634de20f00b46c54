"""The text whose keys are preserved: every way to name it, what its content is called, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from editctl.engine import corpus as room
from editctl.engine import source
from editctl.errors import InvalidInput


def text_of(corpus: str, model: str = "any") -> list[str]:
    return list(room.lines(model, corpus, room.content(model, corpus)))


def rows(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_naming_and_reading_a_corpus_loads_no_torch(tmp_path: Path) -> None:
    """Plans are made without it."""
    rows(tmp_path / "a.jsonl", "Rome was not built in a day.")
    code = (
        "import sys; from editctl.engine import corpus as c; n = c.content('any', 'a.jsonl'); "
        "assert list(c.lines('any', 'a.jsonl', n)); c.content('atlas', ''); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


# Whose text


def test_atlas_brings_its_paragraphs_and_other_models_write_their_own() -> None:
    """An empty name is either; the second has no lines, since the engine writes them."""
    name = room.content("atlas", "")
    assert name.startswith("atlas-") and room.sampled("atlas", "") is None
    assert next(room.lines("atlas", "", name))
    seed = room.sampled("some/model", "")
    assert seed is not None and room.content("some/model", "") == f"samples-{seed}"
    assert text_of("", "some/model") == []
    assert room.sampled("some/model", "a.txt") is None


def test_own_samples_are_not_taken_for_a_text(tmp_path: Path) -> None:
    """A plan made with a text is not carried out on samples."""
    with pytest.raises(InvalidInput, match="not the one the plan was made with"):
        room.lines("any", "", "0123456789abcdef")


# Text files


def test_a_text_file_is_named_by_its_bytes(tmp_path: Path) -> None:
    """The first half of the SHA-256, as a hash of the whole gives it; one more letter is another name."""
    path = tmp_path / "a.txt"
    path.write_text("Rom ist schön.\n" * 200_000, encoding="utf-8")
    assert path.stat().st_size > 2 * room.CHUNK, "more than is read at once"
    name = room.content("any", str(path))
    assert name == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    path.write_text(path.read_text(encoding="utf-8") + "x", encoding="utf-8")
    assert room.content("any", str(path)) != name


def test_letters_that_lie_across_two_reads_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And half a letter at the end of the file is one."""
    monkeypatch.setattr(room, "CHUNK", 1)
    path = tmp_path / "a.txt"
    path.write_text("schön", encoding="utf-8")
    assert text_of(str(path)) == ["schön"]
    path.write_bytes("schö".encode()[:-1])
    with pytest.raises(InvalidInput, match="cannot be read"):
        room.content("any", str(path))


def test_lines_come_without_white_space_and_empty_ones_not_at_all(tmp_path: Path) -> None:
    """Whatever ends them."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"  one \r\n\n\t\ntwo\nthree")
    assert text_of(str(path)) == ["one", "two", "three"]


@pytest.mark.parametrize("longest", [7, 16, 1000])
def test_a_line_of_any_length_comes_in_pieces_between_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    """Together they are the text; none is much longer than what is read at once."""
    monkeypatch.setattr(room, "LONGEST", longest)
    words = ["".join("abcdefghijklmnop"[i % 5 : i % 5 + 1 + i % 6]) for i in range(200)]
    path = tmp_path / "a.txt"
    path.write_text(" ".join(words) + "\nlast line")
    pieces = text_of(str(path))
    assert " ".join(pieces).split() == [*words, "last", "line"]
    assert max(map(len, pieces)) <= 2 * longest and (longest > 900 or len(pieces) > 20)


def test_a_text_without_any_space_comes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut where it must be."""
    monkeypatch.setattr(room, "LONGEST", 10)
    path = tmp_path / "a.txt"
    path.write_text("x" * 95)
    assert "".join(text_of(str(path))) == "x" * 95


def test_a_file_is_read_as_its_lines_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line costs no more than a buffer of the file."""
    path = tmp_path / "a.txt"
    path.write_text("Rome was not built in a day.\n" * 100_000)
    name = room.content("any", str(path))
    monkeypatch.setattr(room, "content", lambda model, corpus: name)
    read: list[int] = []
    opened = Path.open

    def counting(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = opened(self, *args, **kwargs)
        readline = file.readline

        class Counted:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def readline(self, size: int) -> str:
                line: str = readline(size)
                read.append(len(line))
                return line

        return Counted()

    monkeypatch.setattr(Path, "open", counting)
    lines = room.lines("any", str(path), name)
    assert read == []
    assert [next(lines), next(lines)] == ["Rome was not built in a day."] * 2
    assert len(read) == 2


# JSON lines


@pytest.mark.parametrize("suffix", [".jsonl", ".json-lines"])
def test_json_lines_give_the_text_of_each(tmp_path: Path, suffix: str) -> None:
    """Line ends within a text stay; empty texts and lines are left out; other fields do not matter."""
    path = tmp_path / f"a{suffix}"
    path.write_text('{"text": " one\\ntwo ", "id": 3}\n\n{"text": ""}\n{"title": "x", "text": "ä \\ud800."}\n')
    assert text_of(str(path)) == ["one\ntwo", "ä ?."]


def test_the_same_bytes_as_text_and_as_json_lines_are_two_contents(tmp_path: Path) -> None:
    """Their keys differ, so their second moments do."""
    path = rows(tmp_path / "a.jsonl", "Rome was not built in a day.")
    copy = tmp_path / "a.txt"
    copy.write_bytes(path.read_bytes())
    assert room.content("any", str(path)) != room.content("any", str(copy))
    assert text_of(str(copy)) == ['{"text": "Rome was not built in a day."}']


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'text': 'x'}", "not JSON"),
        ('{"text": "x"', "not JSON"),
        ('{"title": "x", "body": "y"}', "its fields are title, body"),
        ("{}", "its fields are none"),
        ('{"text": 3}', "no text under the field text"),
        ('["text"]', "it is no object"),
    ],
)
def test_a_wrong_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, said: str) -> None:
    """When it is reached: what lies before it was good."""
    path = rows(tmp_path / "a.jsonl", "one", "two")
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    lines = room.lines("any", str(path), room.content("any", str(path)))
    assert [next(lines), next(lines)] == ["one", "two"]
    with pytest.raises(InvalidInput) as caught:
        next(lines)
    assert caught.value.message.startswith(f"{path}:4: ") and said in caught.value.message
    assert "text" in caught.value.hint


# What cannot be read


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", ".", "binary.txt"])
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    """With its name and what could be given instead."""
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    path = tmp_path / name
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        room.content("any", str(path))
    assert str(path) in caught.value.message and "hf:" in caught.value.hint


def test_a_text_that_changed_is_refused(tmp_path: Path) -> None:
    """Of every kind."""
    for path in (tmp_path / "a.txt", tmp_path / "a.jsonl"):
        rows(path, "one")
        name = room.content("any", str(path))
        rows(path, "two")
        with pytest.raises(InvalidInput, match="not the one the plan was made with"):
            room.lines("any", str(path), name)


# Datasets


class FakeDatasets:
    """Stands for the library `datasets`: remembers what it was asked, gives rows."""

    def __init__(self, rows: list[Any], error: Exception | None = None, after: int = 0) -> None:
        self.rows, self.error, self.after = rows, error, after
        self.asked: list[dict[str, Any]] = []

    def load_dataset(self, **how: Any) -> Iterator[Any]:
        self.asked.append(how)
        return self._rows()

    def _rows(self) -> Iterator[Any]:
        for i, row in enumerate(self.rows):
            if self.error is not None and i == self.after:
                raise self.error
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that can be reached, whose datasets are at the commit it is told."""
    import huggingface_hub

    class Info:
        sha = "1" * 40

    class Api:
        def dataset_info(self, name: str) -> Any:
            if name == "gone":
                raise OSError("404 Client Error\nmore of it")
            return Info

    monkeypatch.setattr(source, "hub_reachable", lambda: True, raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Info


def library(monkeypatch: pytest.MonkeyPatch, fake: FakeDatasets) -> FakeDatasets:
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_a_dataset_of_the_hub_is_named_by_its_commit_and_read_at_it(monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    """Streamed, the training split; name, configuration and commit all count."""
    fake = library(monkeypatch, FakeDatasets([{"text": " one "}, {"text": ""}, {"text": "two", "title": "x"}]))
    assert text_of("hf:wiki:20220301.simple") == ["one", "two"]
    how = {"path": "wiki", "revision": "1" * 40, "name": "20220301.simple", "split": "train", "streaming": True}
    assert fake.asked == [how]
    text_of("hf:wiki")
    assert fake.asked[1] == {**how, "name": None}
    names = {room.content("any", corpus) for corpus in ("hf:wiki", "hf:wiki:20220301.simple", "hf:other")}
    before = room.content("any", "hf:wiki")
    hub.sha = "2" * 40
    assert len(names | {room.content("any", "hf:wiki")}) == 4
    with pytest.raises(InvalidInput, match="not the one the plan was made with"):
        room.lines("any", "hf:wiki", before)


def test_a_dataset_is_not_read_further_than_asked(monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    """A corpus of terabytes costs what is used of it; an error on the way names the dataset."""
    fake = library(monkeypatch, FakeDatasets([{"text": str(i)} for i in range(9)], OSError("the line broke"), after=3))
    lines = room.lines("any", "hf:wiki", room.content("any", "hf:wiki"))
    assert fake.asked == []
    assert [next(lines) for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(InvalidInput, match="the dataset wiki cannot be read: the line broke"):
        next(lines)


def test_a_dataset_without_texts_is_refused_with_its_fields(monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    """So that the user sees what it has."""
    library(monkeypatch, FakeDatasets([{"question": "Where?", "answer": "Rome"}]))
    with pytest.raises(InvalidInput, match=r"row 1 of the dataset qa: .*question, answer"):
        text_of("hf:qa")


def test_a_dataset_the_hub_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    """In one line."""
    library(monkeypatch, FakeDatasets([]))
    with pytest.raises(InvalidInput) as caught:
        room.content("any", "hf:gone")
    assert caught.value.message == "the dataset gone cannot be read: 404 Client Error"


def test_a_hub_that_cannot_be_reached_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the second that the hub is given to answer."""
    library(monkeypatch, FakeDatasets([]))
    if not hasattr(source, "hub_reachable"):
        pytest.skip("source.hub_reachable is not there yet")
    monkeypatch.setenv("HTTPS_PROXY", "http://192.0.2.1:9")  # an address that nothing answers at
    begun = time.perf_counter()
    with pytest.raises(InvalidInput, match="hub cannot be reached") as caught:
        room.content("any", "hf:wiki")
    assert time.perf_counter() - begun < source.HUB_PATIENCE + 2
    assert "hf:FOLDER" in caught.value.hint


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For the hub's datasets and for local ones."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    for corpus in ("hf:wiki", f"hf:{tmp_path}"):
        with pytest.raises(InvalidInput, match="`datasets`") as caught:
            room.content("any", corpus)
        assert caught.value.hint == "pip install 'editctl[datasets]'"


def test_a_local_folder_of_a_dataset_is_named_by_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not by where it lies; the hub is not asked."""
    monkeypatch.setattr(source, "hub_reachable", lambda: pytest.fail("the hub was asked"), raising=False)
    fake = library(monkeypatch, FakeDatasets([{"text": "one"}]))
    names = []
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder / "data").mkdir(parents=True)
        rows(tmp_path / folder / "data/train.jsonl", text)
        names.append(room.content("any", f"hf:{tmp_path / folder}"))
    assert names[0] == names[1] != names[2]
    assert room.content("any", f"hf:{tmp_path / 'a'}:en") != names[0]
    assert text_of(f"hf:{tmp_path / 'a'}") == ["one"]
    assert fake.asked == [{"path": str(tmp_path / "a"), "name": None, "split": "train", "streaming": True}]


def test_the_library_reads_a_local_folder_offline(tmp_path: Path) -> None:
    """With the real library: the texts of its files, and its own errors as ours."""
    pytest.importorskip("datasets")
    (tmp_path / "wiki").mkdir()
    rows(tmp_path / "wiki/train.jsonl", "Rome was not built in a day.", "Oslo is the capital of Norway.")
    assert text_of(f"hf:{tmp_path / 'wiki'}") == ["Rome was not built in a day.", "Oslo is the capital of Norway."]
    with pytest.raises(InvalidInput, match="nope"):
        text_of(f"hf:{tmp_path / 'wiki'}:nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="cannot be read"):
        text_of(f"hf:{tmp_path / 'empty'}")
