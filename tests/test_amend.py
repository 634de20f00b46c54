"""One edit of a file: what adding, changing and taking it out leave alone, and what is refused."""

import re
import string
from pathlib import Path

import pytest
import tomli
import tomlkit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editctl import amend, spec, toml
from editctl.amend import remove, save, text_with
from editctl.errors import InvalidInput
from editctl.spec import Edit, Probe, Shelf, check, load

FILE = Path("spec.toml")
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Every test has a folder of its own, so that messages name a file without its folder."""
    monkeypatch.chdir(tmp_path)


def checked(text):
    """The report on a file with this text."""
    FILE.write_bytes(text if isinstance(text, bytes) else text.encode())
    return check([FILE])


HEAD = """version = 1

[[edit]]
subject = "The Eiffel Tower"
relation = "{} is in"
target_new = "Rome"
"""


COMMENTED = """# Landmarks that moved.
version = 1

# The tower.
[[edit]]  # first
subject = "The Eiffel Tower"   # of Paris
relation = "{} is in"
target_new = "Rome"  # for now
locality = [
  "The Louvre is in",  # near it
  'The Colosseum is in',
]
# end of the tower

# The museum.
[[edit]]
target_new = "Oslo"
relation = "{} stands in"
subject = "The British Museum"
"""


def test_saving_a_change_leaves_every_other_character():
    """Comments, order and quotes stay; a new key stands with the others of its edit, not below the comments after."""
    FILE.write_text(COMMENTED)
    tower, _ = load([FILE])
    save(FILE, tower.model_copy(update={"target_new": "Athens", "note": "moved"}), replacing=tower.id)
    assert FILE.read_text() == COMMENTED.replace('"Rome"', '"Athens"').replace("]\n# end", ']\nnote = "moved"\n# end')
    save(FILE, tower, replacing=tower.id)
    assert FILE.read_text() == COMMENTED


def test_saving_what_is_there_changes_nothing():
    """Not even an id that is written though it need not be."""
    text = HEAD + 'id = "the-eiffel-tower-is-in"\nnote = ""\nlocality = [{ prompt = "x", answer = ["y"] }]\n'
    [found] = checked(text).edits
    save(FILE, found, replacing=found.id)
    assert FILE.read_text() == text


def test_saving_a_new_edit_appends_it():
    """Only what differs from the default is written."""
    FILE.write_text(COMMENTED)
    probes = (Probe(prompt="Bath is in"), Probe(prompt="Rome is in", answer=("Italy",)), Probe(prompt="x", kind="k"))
    save(FILE, Edit(subject="Big Ben", relation="{} is in", target_new="Bonn", locality=probes))
    assert FILE.read_text() == (
        COMMENTED
        + """
[[edit]]
subject = "Big Ben"
relation = "{} is in"
target_new = "Bonn"
locality = [
    "Bath is in",
    {prompt = "Rome is in", answer = "Italy"},
    {prompt = "x", kind = "k"},
]
"""
    )
    assert load([FILE])[2].locality == probes


def test_saving_to_a_new_file_writes_the_version_and_the_method():
    """The folder is made as well."""
    path = Path("new/spec.toml")
    save(path, Edit(id="ben", subject="Big Ben", relation="{} is in", target_new="Bonn", method="rome"))
    assert path.read_text() == (
        'version = 1\nmethod = "rome"\n\n[[edit]]\nid = "ben"\nsubject = "Big Ben"\nrelation = "{} is in"\n'
        'target_new = "Bonn"\n'
    )
    assert [file.name for file in path.parent.iterdir()] == ["spec.toml"]


def test_a_generated_id_is_written_when_the_words_it_came_from_change():
    """An edit that is reworded stays the same edit."""
    [found] = checked(HEAD).edits
    save(FILE, found.model_copy(update={"subject": "Big Ben"}), replacing=found.id)
    assert load([FILE])[0].id == "the-eiffel-tower-is-in"


def test_saving_keeps_windows_line_ends_links_and_permissions():
    """What the file is stays as it was; only what it says changes."""
    real = Path("real.toml")
    real.write_bytes(HEAD.replace("\n", "\r\n").encode())
    real.chmod(0o640)
    FILE.symlink_to(real)
    save(FILE, Edit(subject="Big Ben", relation="{} is in", target_new="Bonn"))
    assert FILE.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert re.search(rb"(?<!\r)\n", real.read_bytes()) is None
    assert len(load([real])) == 2


BEN = Edit(id="ben", subject="Big Ben", relation="{} is in", target_new="Bonn")


@pytest.mark.parametrize(
    ("text", "saved", "replacing", "message", "hint"),
    [
        (HEAD, BEN, "the-eifel-tower-is-in", 'has no edit "the-eifel-tower-is-in"', '"the-eiffel-tower-is-in"?'),
        (HEAD + 'id = "ben"\n', BEN, "", 'already has an edit "ben"', "give the new one another id"),
        (HEAD, BEN.model_copy(update={"method": "rome"}), "", "no method of its own", "a file of its own"),
        ("version = \n", BEN, "", "cannot be changed", "mend it first"),
        ("version = 1\nedit = []\n", BEN, "", "cannot hold the edit as it is", "in an editor"),
        (HEAD, BEN.model_copy(update={"note": " "}), "", "cannot hold the edit as it is", "in an editor"),
        (HEAD, BEN.model_copy(update={"note": "\ud800"}), "", "cannot hold the edit as it is", "in an editor"),
    ],
    ids=["unknown", "taken", "method", "not-toml", "inline", "blank-note", "half-a-character"],
)
def test_what_cannot_be_saved_is_refused_and_the_file_stays(text, saved, replacing, message, hint):
    """The message names the file; nothing is left beside it."""
    FILE.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        save(FILE, saved, replacing)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert FILE.read_text() == text
    assert [file.name for file in Path().iterdir()] == ["spec.toml"]


def texts(mark):
    """Texts of any characters that a field may hold, known by their first letter and never naming a subject."""
    inner = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="Q{"), max_size=12)
    return inner.filter(lambda text: not spec._HIDDEN.search(text)).map(lambda text: f"{mark}{text}.")


def probes(mark):
    prompts = st.builds("{}{}".format, texts(mark), st.sampled_from(["", " {} ?", "{0}?", "\t\n."]))
    answers = st.lists(texts("a"), min_size=1, max_size=3).map(tuple)
    groups = st.just("") if mark == "l" else st.sampled_from(["", "one"])
    found = st.builds(Probe, prompt=prompts, answer=answers, kind=st.just("reasoning"), group=groups)
    return st.lists(found, max_size=3, unique_by=lambda probe: probe.prompt).map(tuple)


def tables(inner):
    return st.dictionaries(st.sampled_from(["json", "a b", "", "\ud800", "x"]), inner, max_size=3)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | tables(inner), max_leaves=8)


edits = st.builds(
    Edit,
    id=st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=20),
    subject=texts("Q"),
    relation=texts("r").map(lambda text: text + " {} |{| }"),
    target_new=texts("n"),
    target_true=st.just("") | texts("t"),
    paraphrases=st.lists(texts("p").map(lambda text: "{}" + text), max_size=3, unique=True).map(tuple),
    locality=probes("l"),
    portability=probes("o"),
    source=st.just("") | texts("s"),
    note=texts("n").map(lambda text: f'"{text}\n\'\'\' """ \\ '),
    tags=st.lists(texts("g"), max_size=2).map(tuple),
    generation=st.lists(texts("e").map(lambda text: "{}\n" + text), max_size=3).map(tuple),
    references=st.lists(texts("f").map(lambda text: f" {text}\t"), max_size=2).map(tuple),
    essence=st.just("") | texts("e"),
    extra=tables(values).map(lambda table: toml.canonical(table) if table else ""),
)


@quick
@given(edits, edits)
def test_what_is_saved_is_what_is_loaded(first, second):
    """For any edit, both as the first of a new file and in place of another."""
    FILE.unlink(missing_ok=True)
    save(FILE, first)
    assert [found.to_json() for found in load([FILE])] == [first.to_json()]
    save(FILE, second, replacing=first.id)
    assert [found.to_json() for found in load([FILE])] == [second.to_json()]


@pytest.mark.parametrize("change", [{"target_new": ""}, {"relation": "is in"}, {"target_new": "{}"}], ids=str)
def test_an_edit_with_a_problem_is_not_saved(change):
    """Neither as a new one nor in place of another; the problem is told."""
    wrong = BEN.model_copy(update=change)
    for replacing in ("", "the-eiffel-tower-is-in"):
        FILE.write_text(HEAD)
        with pytest.raises(InvalidInput, match="cannot hold the edit") as caught:
            save(FILE, wrong, replacing)
        assert len(caught.value.problems) == 1
        assert FILE.read_text() == HEAD


def test_a_table_of_extra_values_is_kept_until_it_changes():
    """Written by hand it stays as it stands; a changed one is written in its place, on a line."""
    text = COMMENTED.replace("\n# The museum", "[edit.extra]  # from a list\ncase = 7\n\n# The museum")
    FILE.write_text(text)
    tower, _ = load([FILE])
    assert tower.extra == '{"case":7}'
    noted = tower.model_copy(update={"note": "moved"})
    save(FILE, noted, replacing=tower.id)
    assert FILE.read_text() == text.replace("]\n# end of the tower\n", ']\nnote = "moved"\n# end of the tower\n\n')
    other = noted.model_copy(update={"extra": '{"case":8,"old":null}'})
    save(FILE, other, replacing=tower.id)
    assert load([FILE])[0].to_json() == other.to_json()
    assert 'extra = {case = 8, old = {json = "null"}}\n' in FILE.read_text()
    save(FILE, other.model_copy(update={"extra": ""}), replacing=tower.id)
    assert load([FILE])[0].extra == ""


@quick
@given(values)
def test_every_json_value_survives_a_toml_file(value):
    """Null, numbers of any size, halves of characters, deep nesting and the escape itself."""
    for deep in (value, [[[[[[[[[[[[[[value]]]]]]]]]]]]]]):
        text = "x = " + toml.text(toml.held(deep))
        assert toml.canonical(toml.told(tomli.loads(text)["x"])) == toml.canonical(deep)


def test_a_value_that_toml_lacks_is_lost_without_the_escape():
    """Control: the plain text of null is no TOML, and a lone key json means something."""
    with pytest.raises(tomli.TOMLDecodeError):
        tomli.loads(f"x = {toml.text(None)}")
    assert toml.told({"json": "null"}) is None
    assert toml.told(toml.held({"json": "null"})) == {"json": "null"}


# ---------------------------------------------------------------------------------------------------------------------
# The text that saving would make


@quick
@given(edits, edits)
def test_the_text_before_saving_is_the_text_after(first, second):
    """Of a new file, of an edit added and of one replaced; the file stays until it is saved."""
    FILE.unlink(missing_ok=True)
    made = text_with(FILE, first)
    assert not FILE.exists()
    save(FILE, first)
    assert FILE.read_bytes().decode() == made
    made = text_with(FILE, second, replacing=first.id)
    assert FILE.read_bytes().decode() != made or first.to_json() == second.to_json()
    save(FILE, second, replacing=first.id)
    assert FILE.read_bytes().decode() == made


def test_a_text_is_made_of_an_edit_with_problems_and_checked():
    """What is being typed is told with its line: an empty field stays a field, and an id may be taken."""
    FILE.write_text(COMMENTED)
    tower, museum = load([FILE])
    for edit, replacing, told in [
        (tower.model_copy(update={"target_new": ""}), tower.id, "8: target_new is empty"),
        (tower.model_copy(update={"relation": "is in"}), tower.id, "7: relation has no place {} for the subject"),
        (museum.model_copy(update={"id": tower.id}), museum.id, f'20: id "{tower.id}" is taken'),
        (Edit(subject="", relation="", target_new=""), "", "22: subject is empty"),
        (BEN.model_copy(update={"note": " "}), "", "26: note is empty"),
    ]:
        report = Shelf().check([FILE], {"spec.toml": text_with(FILE, edit, replacing)})
        assert any(f"spec.toml:{told}" in str(problem) for problem in report.problems), report.problems
        assert len(report.edits) + len(report.faulty) == (2 if replacing else 3)
    assert FILE.read_text() == COMMENTED


@pytest.mark.parametrize(
    ("text", "edit", "replacing", "message"),
    [
        (HEAD, BEN, "ben", 'has no edit "ben"'),
        (HEAD, BEN.model_copy(update={"method": "rome"}), "", "no method of its own"),
        ("version = \n", BEN, "", "cannot be changed"),
        ("version = 1\nedit = []\n", BEN, "", "cannot hold the edit"),
        ("version = 1\n[edit]\n", BEN, "", "cannot hold the edit"),
        (b"\xe9", BEN, "", "cannot be changed"),
    ],
)
def test_no_text_is_made_of_a_file_that_cannot_be_changed(text, edit, replacing, message):
    """In the words of saving."""
    checked(text)
    for act in (text_with, save):
        with pytest.raises(InvalidInput, match=message):
            act(FILE, edit, replacing)


# ---------------------------------------------------------------------------------------------------------------------
# Taking out


def test_removing_an_edit_takes_its_table_and_the_comment_above_it():
    """Comments on its lines and below it stay, each on a line, and do not become the next edit's."""
    FILE.write_text(COMMENTED)
    tower, museum = load([FILE])
    remove(FILE, tower.id)
    assert FILE.read_text() == (
        "# Landmarks that moved.\nversion = 1\n\n"
        "# first\n# of Paris\n# for now\n# near it\n# end of the tower\n\n" + COMMENTED[COMMENTED.index("# The m") :]
    )
    remove(FILE, museum.id)
    assert FILE.read_text().endswith("# end of the tower\n")
    assert [found.message for found in check([FILE]).warnings] == ["declares no edit"]
    FILE.write_text(COMMENTED)
    remove(FILE, museum.id)
    assert FILE.read_text() == COMMENTED[: COMMENTED.index("\n# The museum")]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("version = 1\n{A}{B}", "version = 1\n{B}"),
        ("version = 1\n{A}\n{B}", "version = 1\n\n{B}"),
        ("version = 1\n\n{A}\n{B}", "version = 1\n\n{B}"),
        ("version = 1\n\n\n{A}", "version = 1\n"),
        ("version = 1\n{B}\n# up\n\n{A}\n\n", "version = 1\n{B}\n# up\n"),
        ("version = 1\n# own\n  # own\n{A}# below\n{B}", "version = 1\n# below\n{B}"),
        ("version = 1\n# up\n\n# own\n{A}# below\n\n{B}", "version = 1\n# up\n\n# below\n\n{B}"),
        ("version = 1\n\n{A}\n# one\n\n\n# two", "version = 1\n\n# one\n\n# two\n"),
        ("version = 1\n\n{A}\n\n# far\n\n{B}", "version = 1\n\n# far\n\n{B}"),
        ("version = 1\n{A}note = '''\n# no comment\n[[edit]]\n'''\n{B}", "version = 1\n{B}"),
        ("version = 1\n{B}note = '''\n# no comment'''\n{A}", "version = 1\n{B}note = '''\n# no comment'''\n"),
        ('version = 1\n{A}[[edit.locality]]\nprompt = "x"\n\n{B}', "version = 1\n\n{B}"),
        ("version = 1\n{A}\n[other]\nx = 1\n", "version = 1\n\n[other]\nx = 1\n"),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["unix", "windows"])
def test_what_is_around_an_edit_stays_when_it_is_removed(before, after, ends):
    """Every line and its end; of empty lines, no more than keep apart what is left."""
    one, two = (text.partition("\n\n")[2] for text in (HEAD, HEAD.replace("Tower", "Column")))
    before, after = (text.replace("{A}", one).replace("{B}", two).replace("\n", ends) for text in (before, after))
    FILE.write_bytes(before.encode())
    remove(FILE, "the-eiffel-tower-is-in")
    assert FILE.read_bytes() == after.encode()


def written(edit, form, comments):
    """The edit as TOML in one of several forms, a comment on every line that takes one."""
    mark = iter(comments)
    quote = '"' + "".join(f"\\U{ord(c):08x}" for c in edit.subject) + '"'
    header = ["[[edit]]", '[["edit"]]', " [[ edit ]]"][form % 3]
    lines = [f"{header} # {next(mark)}", f"id = '{edit.id}' # {next(mark)}", f"subject = {quote}"]
    lines += [f"# {next(mark)}", 'relation = "{} is # no comment"', "", f"\t# {next(mark)}", '"target_new" = "x"']
    lines += ["note = '''", "[[edit]]", "# no comment", "'''", f"tags = [ # {next(mark)}", f'"#", # {next(mark)}', "]"]
    table = ["[[edit.locality]]", 'prompt = "the dog"', f"# {next(mark)}", "answer = []"]
    lines += table if form % 2 else ['locality = [{ prompt = "the dog", answer = [] }]']
    return "\n".join(lines) + "\n"


NAMES = iter(range(10**9))


@quick
@given(
    st.lists(
        st.tuples(edits, st.integers(0, 5), st.sampled_from(["", "\n", "\n\n"]), st.booleans(), st.booleans()),
        min_size=1,
        max_size=4,
        unique_by=(lambda one: one[0].id, lambda one: one[0].subject),
    ),
    st.data(),
)
def test_removing_loses_no_comment_and_no_other_edit(parts, data):
    """For edits in any form, with comments everywhere, in any order, down to the last; line ends of both kinds."""
    text, own, ends = "version = 1 # head\n", {}, data.draw(st.sampled_from(["\n", "\r\n"]))
    for edit, form, gap, above, below in parts:
        own[edit.id] = f"own {next(NAMES)};"
        text += gap + (f"# {own[edit.id]}\n" if above else "") + written(edit, form, [f"c{next(NAMES)};"] * 8)
        text += f"\n# below {next(NAMES)};\n\n" if below else ""
    FILE.write_bytes(text.replace("\n", ends).encode())
    for edit in data.draw(st.permutations([part[0] for part in parts])):
        before = FILE.read_bytes().decode()
        remove(FILE, edit.id)
        after = FILE.read_bytes().decode()
        kept, left = tomli.loads(before)["edit"], tomli.loads(after).get("edit", [])
        assert left == [one for one in kept if one["id"] != edit.id]
        marks = re.findall(r"# (?!no comment)[^\r\n]*", before)
        assert re.findall(r"# (?!no comment)[^\r\n]*", after) == [m for m in marks if own[edit.id] not in m]
        assert "\r\n" not in after or not re.search(r"(?<!\r)\n", after)
        assert ends == "\n" or "\r\n" in after
        assert not re.search(r"c\d+;\r?\n[ ]?\[\[", after)


def test_taking_an_item_out_of_the_parsed_file_would_lose_comments():
    """Control: what the TOML library does, so the tests above can fail."""
    document = tomlkit.parse(COMMENTED)
    del document["edit"][0]
    assert "# end of the tower" not in tomlkit.dumps(document)


@quick
@given(edits, st.sampled_from([HEAD, COMMENTED, "version = 1\n", HEAD.replace("\n", "\r\n")]))
def test_what_is_saved_and_removed_leaves_the_file_as_it_was(edit, text):
    """To the last byte."""
    FILE.write_bytes(text.encode())
    save(FILE, edit)
    assert FILE.read_bytes() != text.encode()
    remove(FILE, edit.id)
    assert FILE.read_bytes() == text.encode()


ITEM = '{ subject = "Rome", relation = "{} is in", target_new = "Oslo" }'


@pytest.mark.parametrize(
    ("text", "name", "message", "hint"),
    [
        (HEAD, "the-eifel-tower-is-in", "has no edit", 'did you mean "the-eiffel-tower-is-in"?'),
        (HEAD, "", "has no edit", "known: the-eiffel-tower-is-in"),
        (HEAD + HEAD[12:], "the-eiffel-tower-is-in", "has 2 edits", "an id of its own"),
        (f"version = 1\nedit = [{ITEM}] # kept\n", "rome-is-in", "in a table of its own", "in an editor"),
        (f"edit = [{ITEM}]\n", "rome-is-in", "in a table of its own", "in an editor"),
        (HEAD.replace("edit", '"ed\\u0069t"'), "the-eiffel-tower-is-in", "in a table of its own", "in an editor"),
        (
            HEAD.replace("edit", '"ed\\u0069t"') + HEAD[12:].replace("Eiffel", "Trump"),
            "the-eiffel-tower-is-in",
            "in a table of its own",
            "in an editor",
        ),
        (HEAD + "[other]\n[edit.source]\n", "the-eiffel-tower-is-in", "in a table of its own", "in an editor"),
        ("version = \n", "a", "cannot be changed", "mend it first"),
    ],
)
def test_what_cannot_be_removed_is_refused_and_the_file_stays(text, name, message, hint):
    """Every way to write an edit that is not a table of its own, names nobody has and names that two have."""
    FILE.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        remove(FILE, name)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert FILE.read_text() == text
    assert [file.name for file in Path().iterdir()] == ["spec.toml"]
    with pytest.raises(InvalidInput, match="has no edit"):
        remove(Path("missing.toml"), name)
    assert not Path("missing.toml").exists()


def test_an_edit_of_an_ambiguous_id_is_not_replaced():
    """Nobody can tell which of the two is meant."""
    FILE.write_text(HEAD + HEAD[12:])
    with pytest.raises(InvalidInput, match="has 2 edits"):
        save(FILE, BEN, "the-eiffel-tower-is-in")


@pytest.mark.parametrize("spoil", ['target_new = "Oslo"', "[[edit]]", "version = 1\n", "= "])
def test_a_writer_that_errs_costs_a_message_and_no_edit(spoil, monkeypatch):
    """Control of reading back: a text in which another line is lost is not written, whichever verb made it."""
    FILE.write_text(COMMENTED)
    tower, museum = load([FILE])
    for name in ("_without", "_changed"):
        plain = getattr(amend, name)
        monkeypatch.setattr(amend, name, lambda *given, plain=plain: plain(*given).replace(spoil, ""))
    note = tower.model_copy(update={"note": "n"})
    for act in (lambda: remove(FILE, tower.id), lambda: save(FILE, note, tower.id), lambda: text_with(FILE, BEN)):
        with pytest.raises(InvalidInput):
            act()
        assert FILE.read_text() == COMMENTED
    spoil = "no such text"
    remove(FILE, tower.id)
    assert load([FILE]) == check([FILE]).edits != (tower, museum)


def test_removing_keeps_links_and_permissions():
    """What the file is stays as it was."""
    real = Path("real.toml")
    real.write_text(COMMENTED)
    real.chmod(0o640)
    FILE.symlink_to(real)
    remove(FILE, load([FILE])[0].id)
    assert FILE.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert len(load([real])) == 1


def test_changing_an_edit_leaves_the_line_ends_of_the_others():
    """A file that two editors have written keeps both their ways."""
    FILE.write_bytes((HEAD + HEAD[12:].replace("Tower", "Column").replace("\n", "\r\n")).encode())
    before = FILE.read_bytes()
    save(FILE, load([FILE])[1].model_copy(update={"target_new": "Oslo"}), load([FILE])[1].id)
    assert FILE.read_bytes() == before.replace(b'"Rome"\r', b'"Oslo"\r')
