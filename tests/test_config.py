"""The workspace's file: defaults without it, and errors that name its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from editctl.config import Config, line_of, load, put
from editctl.errors import Exit, InvalidInput

FILE = Path("editctl.toml")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a folder of its own, so that messages name the file without its folder."""
    monkeypatch.chdir(tmp_path)


def test_without_a_file_there_are_defaults() -> None:
    """An empty folder is a workspace."""
    config = load()
    assert config == Config()
    assert (config.model, config.method, config.store, config.specs) == ("atlas", "alphaedit", "store", ["specs"])


def test_every_key_can_be_set() -> None:
    """And what is not set keeps its default."""
    FILE.write_text(
        'model = "gpt2"\ndevice = "cpu"\ndtype = "float32"\nmethod = "memit"\nstore = "here"\nspecs = ["a", "b.toml"]\n'
        "recheck = 7\ntheme = 'nord'\nchecks = ['drift']\n[settings]\nbatch_size = 5\nlayers = [1, 2]\n"
        "[gates]\nreliability = 0.95\nlocality = 1\n[keys]\napply = 'a'\n'list.filter' = 'f,slash'\n"
    )
    config = load()
    assert config.specs == ["a", "b.toml"]
    assert config.settings == {"batch_size": 5, "layers": [1, 2]}
    assert (config.recheck, config.gates) == (7, {"reliability": 0.95, "locality": 1.0})
    assert config.checks == ["drift"]
    assert (config.theme, config.keys) == ("nord", {"apply": "a", "list.filter": "f,slash"})
    assert set(Config.model_fields) == config.model_fields_set


def test_the_keys_of_the_file_are_known_from_the_defaults() -> None:
    """So that a version's own model is used when the user named none."""
    FILE.write_text('method = "memit"\n')
    assert load().model_fields_set == {"method"}


def test_a_file_that_is_named_must_be_there() -> None:
    """Only the default one may be missing."""
    with pytest.raises(InvalidInput, match=r"elsewhere\.toml cannot be read"):
        load(Path("elsewhere.toml"))


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ('store = "s"\n\nmodle = "gpt2"\n', "editctl.toml:3: unknown key modle", "did you mean model?"),
        ('checks = ["drift",\n"beauty"]\n', "editctl.toml:1: no check is called beauty", "one of: drift, perplexity"),
        ("zzz = 1\n", "editctl.toml:1: unknown key zzz", "known keys: model, device"),
        ('model = "a"\nstore = 3\n', "editctl.toml:2: store: input should be a valid string", "store: Folder of"),
        ('specs = "specs"\n', "editctl.toml:1: specs: input should be a valid list", "specs: Spec files"),
        ("specs = [\n  1,\n]\n", "editctl.toml:2: specs: input should be a valid string", "specs: Spec files"),
        ("\n[setings]\nx = 1\n", "editctl.toml:2: unknown key setings", "did you mean settings?"),
        ("settings = 5\n", "editctl.toml:1: settings: input should be a valid dictionary", "settings: Overrides"),
        ('model = "a"\nmodel = "b"\n', "editctl.toml:2: not TOML", "the same key stands here twice"),
        ("theme = 1\n", "editctl.toml:1: theme: input should be a valid string", "theme: Theme of"),
        ("keys = 'q'\n", "editctl.toml:1: keys: input should be a valid dictionary", "keys: Keys of"),
        ("[keys]\napply = 'a'\nquit = 3\n", "editctl.toml:3: keys: input should be a valid string", "keys: Keys of"),
        ("[keys]\nquit = ['q']\n", "editctl.toml:2: keys: input should be a valid string", "keys: Keys of"),
        ('[keys]\nquit = "\\u001b"\n', "editctl.toml:2: keys.quit contains a control character", "keys: Keys of"),
        ("\n[settings]\nsteps = 1\nlayers = [[1]]\n", "editctl.toml:4: settings.layers is neither", "settings: Over"),
        (
            "settings = { steps = 0x" + "f" * 5000 + " }\n",
            "editctl.toml:1: settings.steps is far too large a number",
            "set",
        ),
        ("settings.steps = " + "9" * 5000, "editctl.toml:1: not TOML: Exceeds the limit", "no key takes"),
        ('\nstore = "a\\u0000b"\n', "editctl.toml:2: store contains a control character", "store: Folder"),
        ('specs = ["a\\u001b"]\n', "editctl.toml:1: specs contains a control character", "specs: Spec files"),
        ("x = " + "[" * 5000, "editctl.toml:1: not TOML: TOML inline arrays/tables are nested", "no key takes"),
        ("x" + ".x" * 50 + " = 1", "editctl.toml:1: not TOML: a key has more than 16 parts", "no key of"),
        ("model = \n", "editctl.toml:1: not TOML", "toml.io"),
    ],
)
def test_a_mistake_is_told_with_its_line(text: str, said: str, hint: str) -> None:
    """And with what was probably meant."""
    FILE.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        load()
    problem = caught.value.problems[0]
    assert str(problem).startswith(said)
    assert hint in problem.hint
    assert caught.value.exit_code is Exit.USAGE


def test_who_knows_what_a_value_means_can_tell_its_line() -> None:
    """However it is spelled; of what stands nowhere, and in a file that cannot be read, it is the first."""
    assert line_of(None, ("keys", "quit")) == 1
    FILE.write_text("theme = 'x'\n\n[keys]\n# a comment\nquit = 'q'\n\"list.filter\" = 'f'\n")
    assert line_of(None, ("keys", "quit")) == line_of(FILE, ("keys", "quit")) == 5
    assert (line_of(FILE, ("keys", "list.filter")), line_of(FILE, ("keys",)), line_of(FILE, ("theme",))) == (6, 3, 1)
    assert line_of(FILE, ("keys", "list", "filter")) == line_of(FILE, ("quit",)) == line_of(FILE, ("recheck",)) == 1
    FILE.write_text("\nkeys.quit = 'q'\nsettings = { steps = 3 }\n")
    assert (line_of(FILE, ("keys", "quit")), line_of(FILE, ("settings", "steps"))) == (2, 3)
    FILE.write_text("\nkeys = \n")
    assert line_of(FILE, ("keys",)) == line_of(Path("elsewhere.toml"), ("keys",)) == 1


def test_all_mistakes_are_told_at_once() -> None:
    """Each with its own line."""
    FILE.write_text('modle = "x"\nstore = 1\nmetod = "memit"\n')
    with pytest.raises(InvalidInput) as caught:
        load()
    assert sorted(problem.line for problem in caught.value.problems) == [1, 2, 3]


def test_a_file_that_is_not_text_is_refused() -> None:
    """With a message, not with a decoder's traceback."""
    FILE.write_bytes(b"model = \xff\xfe")
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        load()
    assert "UTF-8" in caught.value.hint


def test_a_file_from_a_windows_editor_is_read() -> None:
    """With a byte order mark and its line ends."""
    FILE.write_bytes(b'\xef\xbb\xbfmethod = "memit"\r\nstore = "here"\r\n')
    assert (load().method, load().store) == ("memit", "here")


def test_a_file_too_large_or_with_too_many_mistakes_is_refused_at_once() -> None:
    """A configuration is a few lines; of many mistakes the first hundred are told."""
    FILE.write_text("#" * 1_000_001)
    with pytest.raises(InvalidInput, match="larger than 1 MB"):
        load()
    FILE.write_text("\n".join(f"k{i} = 1" for i in range(90_000)))
    with pytest.raises(InvalidInput) as caught:
        load()
    assert len(caught.value.problems) == 100


def test_a_path_that_no_file_has_is_refused() -> None:
    """A NUL ends a path for the operating system."""
    with pytest.raises(InvalidInput, match="no such file"):
        load(Path("a\0b"))


def test_a_folder_of_that_name_is_no_configuration() -> None:
    """The default is used; named, it is refused."""
    FILE.mkdir()
    assert load() == Config()
    with pytest.raises(InvalidInput, match="cannot be read"):
        load(FILE)


# ---------------------------------------------------------------------------------------------------------------------
# Writing one value

LAYERS = ("settings", "layers")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "[settings]\nlayers = [1, 2]\n"),
        ("# mine\nmodel = 'a' # b", "# mine\nmodel = 'a' # b\n[settings]\nlayers = [1, 2]\n"),
        ("[settings]\n# few\nsteps = 3 # x\n", "[settings]\n# few\nsteps = 3 # x\nlayers = [1, 2]\n"),
        ("[settings]\nlayers = [7] # why\nsteps = 3\n", "[settings]\nlayers = [1, 2] # why\nsteps = 3\n"),
        ("[settings]\n[gates]\nlocality = 1\n", "[settings]\nlayers = [1, 2]\n[gates]\nlocality = 1\n"),
        ("settings = { steps = 3 } # s\n", "settings = { steps = 3, layers = [1, 2]} # s\n"),
        ("settings.steps = 3\n", "settings.steps = 3\nsettings.layers = [1, 2]\n"),
        ("[settings]\r\nsteps = 3\r\n", "[settings]\r\nsteps = 3\r\nlayers = [1, 2]\r\n"),
    ],
)
def test_a_value_is_put_where_it_belongs_and_all_else_stays(before: str, after: str) -> None:
    """Comments, order, other tables and line ends; however the table is written. Twice changes nothing more."""
    if before:
        FILE.write_bytes(before.encode())
    for _ in range(2):
        put(FILE, LAYERS, [1, 2])
        assert FILE.read_bytes().decode() == after
    assert load().settings["layers"] == [1, 2]
    assert [path.name for path in Path().iterdir()] == [FILE.name]


@pytest.mark.parametrize("text", ["[settings", "settings = 3\n", "settings = [1]\n"])
def test_a_file_that_cannot_take_a_value_is_left_as_it_is(text: str) -> None:
    """With a remedy; and so is what is no text at all."""
    FILE.write_text(text)
    with pytest.raises(InvalidInput) as refused:
        put(FILE, LAYERS, [1, 2])
    assert FILE.read_text() == text and str(FILE) in refused.value.message
    FILE.write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="cannot be read"):
        put(FILE, LAYERS, [1, 2])


def test_a_link_and_its_permissions_stay_when_a_value_is_put() -> None:
    """What it points to is written."""
    real = Path("real.toml")
    real.write_text("[settings]\n")
    real.chmod(0o640)
    FILE.symlink_to(real)
    put(FILE, LAYERS, [1])
    assert FILE.is_symlink() and "layers = [1]" in real.read_text() and real.stat().st_mode & 0o777 == 0o640
