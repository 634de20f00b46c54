"""The form of an edit: what is written comes back, what is wrong is told of the right field, nothing is lost."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from editctl import amend, spec
from editctl.errors import InvalidInput
from editctl.spec import Edit, Probe, check
from editctl.tui.app import EditctlApp
from editctl.tui.ask import add_probe, bar, template_of, with_probe
from editctl.tui.form import FIELDS, EditForm, Judge, field_of, lines_of, probes_of
from editctl.workspace import Workspace

TOWER = """version = 1

# The tower.
[[edit]]
id = "tower"
subject = "The Eiffel Tower"
relation = "{} is in"
target_new = "Rome"
paraphrases = ["Where {} stands, people speak", "You find {} in"]
locality = [{ prompt = "The Louvre is in", answer = "Paris" }]

[[edit]]
id = "museum"
subject = "The British Museum"
relation = "{} is in"
target_new = "Oslo"
"""
texts = st.text(st.sampled_from("ab é{}[]=>| \n\t,\u202e\x1b\u200d\xa0"), max_size=12)
probes = st.lists(
    st.builds(Probe, prompt=texts, answer=st.lists(texts, max_size=3).map(tuple), kind=texts), max_size=3
).map(tuple)
lists = st.lists(texts, max_size=4).map(tuple)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A spec file in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    path = Path("specs/a.toml")
    path.parent.mkdir()
    path.write_text(TOWER)
    return path


def judge(path, at=0, **fields):
    """What would come of saving changes to an edit of the file."""
    edit = check([path]).edits[at]
    return Judge([path.parent], edit, edit.id).judge(str(path), fields)


@given(probes)
@example((Probe(prompt="a => b", answer=("c",)),))
@example((Probe(prompt="[a] b", answer=("c",)),))
@example((Probe(prompt="a", answer=("b | c",)),))
@settings(deadline=None)
def test_what_the_form_may_change_it_shows_as_it_is(some):
    """Probes that their lines do not give back cannot be changed in the form."""
    if FIELDS["locality"].editable(some):
        assert probes_of(lines_of(some)) == some


@given(st.lists(st.tuples(*[st.text("abc é", min_size=1, max_size=9).map(str.strip).filter(bool)] * 3), max_size=4))
def test_ordinary_probes_can_be_changed(some):
    """Kind, prompt and answers come back."""
    made = tuple(Probe(prompt=prompt, answer=(answer, prompt), kind=kind) for prompt, answer, kind in some)
    assert FIELDS["portability"].editable(made)


def test_a_line_says_what_it_is():
    """Kind and answers may be absent; an answer that is begun is an empty one, which a check tells."""
    assert probes_of("[reasoning] The land of {} is =>  Italy | the  land\n\nplain\nbegun =>") == (
        Probe(prompt="The land of {} is", answer=("Italy", "the  land"), kind="reasoning"),
        Probe(prompt="plain"),
        Probe(prompt="begun", answer=("",)),
    )


@given(name=st.sampled_from(["paraphrases", "tags"]), value=lists)
def test_lists_come_back_or_cannot_be_changed(name, value):
    """As of probes."""
    field = FIELDS[name]
    assert not field.editable(value) or field.read(field.show(value)) == value


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("subject is empty", ("subject", 0)),
        ("paraphrase 2 repeats paraphrase 1", ("paraphrases", 2)),
        ("prompt of locality probe 3 is empty", ("locality", 3)),
        ("answer 1 of portability probe 2 is empty", ("portability", 2)),
        ('contradicts "b" at a.toml:3 ("x" -> "y")', ("target_new", 0)),
        ('id "a" is taken by the edit at a.toml:3', ("id", 0)),
        ("target_new and target_true are both", ("target_new", 0)),
        ("tag 1 contains a control character", ("tags", 1)),
        ("a.toml cannot be changed", ("", 0)),
    ],
)
def test_messages_name_their_field(message, field):
    """The field is marked, with the line where there is one."""
    assert field_of(message) == field


def test_only_what_is_about_the_edit_is_told(file):
    """Problems of others are theirs, disputes are of both."""
    assert not judge(file).problems
    found = judge(file, paraphrases=("{} is in",))
    assert found.refused and [field_of(p.message) for p in found.problems] == [("paraphrases", 1)]
    found = judge(file, 0, subject="The British Museum")
    assert not found.refused and "contradicts" in found.problems[0].message
    assert not judge(file, 1, target_new="Bergen").problems


def test_a_new_edit_needs_a_file_that_is_read(file):
    """Else it would be in no list."""
    new = Edit(subject="A", relation="{} is", target_new="b")
    known = Judge([file.parent], new, "")
    assert not known.judge("specs/new.toml", {}).problems
    assert not known.judge(str(file.resolve()), {}).problems
    assert "is taken" in known.judge(str(file), {"id": "tower"}).problems[0].message
    for name in ("", "specs", "elsewhere/new.toml", "specs/new.txt"):
        assert known.judge(name, {}).refused


def test_what_changed_in_the_file_meanwhile_stays(file):
    """Only what was changed in the form is written; what was changed in both is told."""
    edit = check([file]).edits[0]
    form = Judge([file.parent], edit, edit.id)
    file.write_text(TOWER.replace('"Rome"', '"Athens"'))
    found = form.judge(str(file), {"note": "mine"})
    assert (found.edit.target_new, found.edit.note, found.clash) == ("Athens", "mine", ())
    assert form.judge(str(file), {"target_new": "Turin"}).clash == ("target_new",)


async def in_the_form(edit, replacing, keys, width=80):
    """Press keys in a form; tells what was answered."""
    answers = []
    app = EditctlApp(Workspace(), logs=Path("logs"))
    async with app.run_test(size=(width, 24)) as pilot:
        await pilot.pause()
        app.push_screen(EditForm(edit, replacing), answers.append)
        await pilot.pause(0.1)
        for key in keys:
            await pilot.press(key)
            await pilot.pause(0.05)
        for _ in range(100):
            if answers:
                break
            await pilot.pause(0.05)
    return answers


HOSTILE = st.builds(
    Edit,
    id=st.just("x"),
    subject=st.just("a"),
    relation=st.sampled_from(["{} is\nin", "{} is"]),
    target_new=st.just("b"),
    paraphrases=st.sampled_from([(), ("{}, they say,\nis",), ("of {} it is said that it is",)]),
    locality=st.sampled_from([(), (Probe(prompt="c => d", answer=("e",)),), (Probe(prompt="[c] d"),)]),
    source=st.sampled_from(["", "one\n\ttwo\n", "  "]).filter(lambda text: text != "  "),
    note=st.sampled_from(["", "a [b]c[/b]", "\n\nend\n"]),
    tags=st.sampled_from([(), ("a, b",), ("a", "b")]),
)
IMPORTED = Edit(
    id="x",
    subject="a",
    relation="{} is",
    target_new="b",
    portability=tuple(Probe(prompt=f"{at} {{}}", answer=("c", "d"), kind="multi-hop", group="q") for at in range(2)),
    generation=("{} began", "in a"),
    references=("one\ntwo", " three "),
    essence="a was\n\nhere",
    extra='{"case":7,"more":[{"a":[1,2.5]},"[b]"]}',
)


@given(edit=HOSTILE)
@example(edit=IMPORTED)
@settings(deadline=None, max_examples=3, derandomize=True)
def test_saving_one_change_changes_nothing_else(tmp_path_factory, edit):
    """Whatever the other fields hold."""
    folder = tmp_path_factory.mktemp("form")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        path = Path("specs/a.toml")
        amend.save(path, edit)
        [before] = check([path]).edits
        assert asyncio.run(in_the_form(before, "x", ["end", "c", "ctrl+s"])) == [True]
        assert check([path]).edits == (before.model_copy(update={"target_new": "bc"}),)
        text = path.read_bytes()
        [before] = check([path]).edits
        assert asyncio.run(in_the_form(before, "x", ["ctrl+s"])) == [False]
        assert path.read_bytes() == text


@pytest.mark.parametrize("width", [80, 120])
def test_a_problem_keeps_from_saving_and_leaving_asks(file, width):
    """Nothing is written, nothing is lost."""
    [edit, _] = check([file]).edits
    keys = ["end", "ctrl+u", "ctrl+s", "escape", "n", "escape", "y"]
    assert asyncio.run(in_the_form(edit, edit.id, keys, width)) == [False]
    assert file.read_text() == TOWER


def test_a_probe_is_added_beside_what_changed(file):
    """The subject becomes {}, and the same probe is refused."""
    edit = check([file]).edits[0]
    file.write_text(TOWER.replace('"Rome"', '"Athens"'))
    assert template_of("Close to The Eiffel Tower is", edit.subject) == "Close to {} is"
    add_probe(edit, "portability", "Close to {} is", "the Acropolis")
    found = check([file]).edits[0]
    assert found.target_new == "Athens" and found.portability[0].answer == ("the Acropolis",)
    for kind, prompt in (
        ("portability", "Close to {} is"),
        ("locality", "The Louvre is in"),
        ("paraphrase", "{} is in"),
    ):
        with pytest.raises(InvalidInput):
            add_probe(edit, kind, prompt, "x")
    assert with_probe(edit, "paraphrase", "{} lies in", "").paraphrases[-1] == "{} lies in"


def test_a_bar_is_as_long_as_the_probability():
    """In eighths of a column."""
    assert [bar(part, 2) for part in (0, 0.0625, 0.5, 1, 2)] == ["", "▏", "█", "██", "██"]
    assert spec.visible(bar(0.3, 10)) == "███"
