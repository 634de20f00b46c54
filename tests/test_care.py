"""Looking after a store on the command line: verify, gc and backup, what they print, change and exit with.

On a tiny Llama that knows nothing, in a workspace of two versions that was made once; every test has a copy of it.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import test_cli
import tiny
from test_cli import HOLD, PIPES, Outcome, Run
from test_overlays import over, trained

from editctl import delta as delta_files
from editctl.engine import prompts, speak
from editctl.store import Draft, LiveEdit, Store, Version, care
from editctl.store.schema import version_seal

run = test_cli.run

EDIT = '[[edit]]\nid = "{}"\nsubject = "{}"\nrelation = "{}"\ntarget_new = "{}"\n'


def spec(edit: Any) -> str:
    """A spec file of one of the tiny model's facts; its path."""
    path = Path("specs") / f"{edit.id}.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text("version = 1\n" + EDIT.format(edit.id, edit.subject, edit.relation, edit.target_new))
    return str(path)


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace to copy."""
    from editctl.cli import main

    place = tmp_path_factory.mktemp("care") / "workspace"
    place.mkdir()
    settings = {**tiny.QUICK, "steps": 1, "corpus": str(corpus)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    model = json.dumps(str(folders["llama"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(speak, "NEW_TOKENS", 1)
        patch.setattr(prompts, "CONTEXT_TOKENS", 1)
        Path("editctl.toml").write_text(f"model = {model}\ndevice = 'cpu'\n[settings]\n" + "\n".join(lines) + "\n")
        for edit in tiny.FACTS[:2]:
            patch.setattr(sys, "argv", ["editctl", "apply", spec(edit), "--yes"])
            main()
    return place


@pytest.fixture
def store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of a copy, which is the working directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return Store(Path("store"))


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def factor_files(store: Store) -> list[Path]:
    """Those of the head, in order of application."""
    return [store.deltas_dir / f"{name}.safetensors" for name in store.deltas(store.head())]


def laid(store: Store) -> tuple[Version, Path, Path]:
    """A version on the head with one more batch that lies over the weights; its factor file, and the trained file that
    it needs. What its weights come to is not what it says."""
    content, head, (_, _, edit, _) = trained(store.artifacts_dir), store.head(), tiny.FACTS
    assert head is not None
    values = {f.name: getattr(head, f.name) for f in fields(Draft) if f.name in Version.__dataclass_fields__}
    name = delta_files.save(over([edit], artifact=content), store.deltas_dir)
    draft = Draft(**{**values, "parent": head.id}, edits=(*store.edits(head), LiveEdit(edit, name, 0)))
    version = store.commit(draft, expected_head=head.id)
    return version, store.deltas_dir / f"{name}.safetensors", store.artifacts_dir / f"{content}.safetensors"


def flip(path: Path, place: float = 0.7) -> None:
    """Turn one bit of a file around."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that lasts, with its content; SQLite's helper files come and go with readers."""
    passing = ("editctl.db-wal", "editctl.db-shm", "lock")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in passing)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def changed(store: Store, statement: str, *values: object, sealed: bool = False) -> None:
    """Change the database by hand, if asked so that every seal of a version fits again."""
    with closing(sqlite3.connect(store.database)) as db:
        assert db.execute(statement, values).rowcount > 0
        db.commit()
    if sealed:
        with store._writing("test") as db:
            for version in [row["id"] for row in db.table("versions").rows]:
                db.table("versions").update(version, {"seal": version_seal(db, version)})


def versions(store: Store) -> tuple[Version, Version]:
    second, first = store.versions()
    return first, second


def faults(outcome: Outcome, code: int = 1) -> list[str]:
    """What `verify --json` found, with a summary that says the same, and that nothing was mended."""
    assert outcome.code == code, outcome.err
    found = outcome.of("fault")
    (summary,) = outcome.of("summary")
    assert summary["faults"] == len(found)
    assert summary["left"] == len([fault for fault in found if not fault["repaired"]])
    assert bool(summary["left"]) == (code == 1)
    assert all(fault["remedy"] for fault in found)
    return [f"{fault['what']} {fault['wrong']}" for fault in found]


# ---------------------------------------------------------------------------------------------------------------------
# verify


def test_a_store_without_a_fault_is_said_to_be_whole(store: Store, run: Run) -> None:
    """On stdout, in a line; the work is told on stderr. Nothing is changed by looking."""
    before = tree(store.root)
    outcome = run("verify")
    assert outcome.code == 0
    assert outcome.out == "ok: database, records and files are whole; 2 versions rebuilt to the bit\n"
    assert outcome.err == "Rebuilding versions\n"
    assert faults(run("verify", "--json"), 0) == []
    assert run("verify", "--json").of("summary")[0]["rebuilt"] == 2
    assert tree(store.root) == before


def test_rebuilding_can_be_left_out(store: Store, run: Run) -> None:
    """Then no model is needed, not even one that is there."""
    outcome = run("verify", "--no-rebuild", "--model", "nobody/nothing")
    assert outcome == (0, "ok: database, records and files are whole; 2 versions not rebuilt\n", "")
    assert run("verify", "--no-rebuild", "--json").of("summary") == [
        {"type": "summary", "faults": 0, "left": 0, "rebuilt": 0}
    ]


@pytest.mark.parametrize("flags", [(), ("--repair",), ("--json",), ("--json", "--repair")], ids=" ".join)
def test_where_there_is_no_store_nothing_is_wrong(nowhere: Path, run: Run, flags: tuple[str, ...]) -> None:
    """And none is made."""
    outcome = run("verify", *flags)
    assert outcome.code == 0, outcome.err
    if "--json" in flags:
        assert outcome.of("summary") == [{"type": "summary", "faults": 0, "left": 0, "rebuilt": 0}]
    else:
        assert outcome.out == "ok: database, records and files are whole; 0 versions not rebuilt\n"
    assert list(nowhere.iterdir()) == []


def test_weights_that_come_out_otherwise_than_recorded_are_found_by_rebuilding_alone(store: Store, run: Run) -> None:
    """The record is made to fit, seal and all; of two versions it is the one that is named."""
    first, _ = versions(store)
    changed(store, "update versions set weights_hash = ? where id = ?", "0" * 32, first.id, sealed=True)
    assert faults(run("verify", "--no-rebuild", "--json"), 0) == []
    (found,) = faults(run("verify", "--json"))
    told = f"was recorded with weights {'0' * 32}, rebuilt they are {first.weights_hash}"
    assert found == f"version {first.id} {told}"
    outcome = run("verify")
    assert outcome.code == 1 and outcome.out.splitlines()[-1] == "1 thing wrong"


def test_a_spoiled_factor_file_is_named_with_the_versions_that_need_it(store: Store, run: Run) -> None:
    """One bit; with and without a rebuild. The version that does not need it is rebuilt all the same."""
    _, second = versions(store)
    path = factor_files(store)[1]
    flip(path)
    (found,) = faults(run("verify", "--no-rebuild", "--json"))
    assert found == f"factor file {path} is not what was written; version {second.id} and those built on it need it"
    outcome = run("verify")
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert lines[0] == f"wrong: {found}" and lines[1].startswith("  hint: restore the store from a backup")
    assert lines[2].startswith(f"wrong: version {second.id} cannot be rebuilt: the factor file {path} is not what was")
    assert not any(versions(store)[0].id in line for line in lines)
    assert lines[-1] == "2 things wrong"


def test_a_changed_record_is_named(store: Store, run: Run) -> None:
    """Exit code 1 and which version, whatever else still works; a value that cannot be read breaks nothing."""
    first, second = versions(store)
    changed(store, "update answers set after = 'Rome' where version = ?", first.id)
    assert faults(run("verify", "--json")) == [f"version {first.id} its record is not what was committed"]
    changed(store, "update versions set norms = 'x' where id = ?", second.id)
    for flags in ((), ("--repair",)):
        outcome = run("verify", *flags)
        assert outcome.code == 1
        assert f"wrong: version {second.id} its record is not what was committed" in outcome.out


def test_a_file_that_is_no_database_is_a_fault_and_no_crash(store: Store, run: Run) -> None:
    """The factor files are looked at all the same."""
    store.database.write_bytes(b"no database at all" * 100)
    before = tree(store.root)
    for flags in ((), ("--no-rebuild",), ("--repair",)):
        outcome = run("verify", *flags)
        assert outcome.code == 1, outcome.out
        assert "is not an SQLite database" in outcome.out + outcome.err
    assert tree(store.root) == before


def test_another_model_cannot_rebuild_what_it_did_not_make(store: Store, folders: dict[str, Path], run: Run) -> None:
    """Nor one that is not there any more; each version is told, and the rest of the check is done."""
    first, second = versions(store)
    for model, words in ((str(folders["gpt2"]), "another model"), ("./gone", "there is no folder ./gone")):
        found = faults(run("verify", "--json", "--model", model))
        assert [line.split(" cannot be rebuilt: ")[0] for line in found] == [
            f"version {first.id}",
            f"version {second.id}",
        ]
        assert all(words in line for line in found)


def test_a_version_of_another_dtype_is_rebuilt_in_it(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store may hold both; in the wrong one nothing comes out as recorded."""
    monkeypatch.setattr(speak, "NEW_TOKENS", 1)
    monkeypatch.setattr(prompts, "CONTEXT_TOKENS", 1)
    assert run("restore", "base").code == 0
    assert run("apply", "specs/ada.toml", "--yes", "--dtype", "bfloat16").code == 0
    assert "3 versions rebuilt to the bit" in run("verify").out
    outcome = run("verify", "--dtype", "bfloat16")
    assert outcome.code == 1 and outcome.out.splitlines()[-1] == "2 things wrong"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(Path.unlink, "is missing"), (flip, "is not what was written")],
    ids=["missing", "changed"],
)
def test_a_trained_file_that_a_version_needs_is_looked_at(
    store: Store, run: Run, spoil: Callable[[Path], object], words: str
) -> None:
    """Named with the version that needs it. Control: as it was written there is nothing to say."""
    version, _, path = laid(store)
    assert faults(run("verify", "--no-rebuild", "--json"), 0) == []
    spoil(path)
    (found,) = faults(run("verify", "--no-rebuild", "--json"))
    assert found == f"trained file {path} {words}; version {version.id} and those built on it need it"
    assert "hint: restore the store from a backup\n" in run("verify", "--no-rebuild").out


def test_a_spoiled_trained_file_that_no_version_needs_is_named_as_such(store: Store, run: Run) -> None:
    """A run would read it, so it is a fault; whole it is none, and neither is a training that was interrupted."""
    path = store.artifacts_dir / f"{trained(store.artifacts_dir)}.safetensors"
    (store.root / "training" / "0123").mkdir(parents=True)
    (store.root / "training" / "0123" / "checkpoint.safetensors").write_bytes(b"half")
    assert faults(run("verify", "--no-rebuild", "--json"), 0) == []
    flip(path)
    (found,) = faults(run("verify", "--no-rebuild", "--json"))
    assert found == f"trained file {path} is not what was written; no version needs it"
    assert "or remove the file" in run("verify", "--no-rebuild").out


# ---------------------------------------------------------------------------------------------------------------------
# verify --repair


def leave_behind(store: Store) -> list[Path]:
    """What runs leave that were killed, as large as is told."""
    store.stats_dir.mkdir(exist_ok=True)
    left = [store.deltas_dir / ("f" * 32 + ".safetensors"), store.deltas_dir / ("e" * 32 + ".safetensors.7.part")]
    left += [store.stats_dir / "half.safetensors.7.part", store.root / "editctl.db.part"]
    for i, path in enumerate(left):
        path.write_bytes(bytes(2**20 * (i == 0) + 10))
    return left


def test_files_that_nothing_refers_to_are_faults_that_can_be_mended(store: Store, run: Run) -> None:
    """Looking names them, mending removes them, and then nothing is wrong any more."""
    whole = tree(store.root)
    left = leave_behind(store)
    found = faults(run("verify", "--no-rebuild", "--json"))
    assert sorted(line.split()[1] for line in found) == sorted(map(str, left))
    assert "hint: `editctl gc` removes it" in run("verify", "--no-rebuild").out
    outcome = run("verify", "--repair")
    assert outcome.code == 0, outcome.out
    lines = outcome.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["mended"] * 4 + ["ok"]
    assert tree(store.root) == whole
    assert faults(run("verify", "--repair", "--json"), 0) == []


def test_spoiled_files_are_taken_from_a_backup(store: Store, run: Run) -> None:
    """Missing or changed; the versions come out to the bit again. Without a backup there is nothing to take."""
    assert run("backup", "copy").code == 0
    whole = tree(store.root)
    missing, wrong = factor_files(store)
    missing.unlink()
    flip(wrong)
    outcome = run("verify", "--repair")
    assert outcome.code == 1 and "mended" not in outcome.out
    assert outcome.out.count("hint: ") == outcome.out.count("wrong: factor file") + outcome.out.count("wrong: version")
    outcome = run("verify", "--repair", "--from", "copy")
    assert outcome.code == 0, outcome.out
    assert [line.split(" ")[:3] for line in outcome.out.splitlines()[:2]] == [["mended:", "factor", "file"]] * 2
    assert outcome.out.splitlines()[2:] == ["ok: database, records and files are whole; 2 versions rebuilt to the bit"]
    assert tree(store.root) == whole
    (summary,) = run("verify", "--json").of("summary")
    assert summary == {"type": "summary", "faults": 0, "left": 0, "rebuilt": 2}


def test_what_a_backup_does_not_have_as_it_was_written_is_not_taken(store: Store, run: Run) -> None:
    """A spoiled copy of a spoiled file mends nothing, nor does a folder that is none; what can be mended is."""
    assert run("backup", "copy").code == 0
    good, bad = factor_files(store)
    flip(Path("copy/deltas") / bad.name)
    for path in (good, bad):
        path.unlink()
    assert run("verify", "--repair", "--from", "nowhere", "--no-rebuild").code == 1
    outcome = run("verify", "--repair", "--from", "copy", "--no-rebuild", "--json")
    found = {Path(fault["what"].split()[-1]).name: fault["repaired"] for fault in outcome.of("fault")}
    assert outcome.code == 1 and found == {good.name: True, bad.name: False}
    assert good.is_file() and not bad.exists()


@pytest.mark.parametrize("with_factors", [False, True], ids=["trained", "trained and factor"])
def test_trained_files_are_taken_from_a_backup(store: Store, run: Run, with_factors: bool) -> None:
    """Missing or changed; also one that is only known to be missing when the factor file that needs it is back."""
    _, factors, path = laid(store)
    other = store.artifacts_dir / f"{trained(store.artifacts_dir, number=2.0)}.safetensors"
    assert run("backup", "copy").code == 0
    whole = tree(store.root)
    path.unlink()
    flip(other)
    if with_factors:
        factors.unlink()
    assert run("verify", "--repair", "--no-rebuild").code == 1
    outcome = run("verify", "--repair", "--from", "copy", "--no-rebuild", "--json")
    assert outcome.code == 0, outcome.out
    assert all(fault["repaired"] for fault in outcome.of("fault"))
    named = {fault["what"].split(" ", 2)[2] for fault in outcome.of("fault")}
    assert named == {str(path), str(other), *([str(factors)] if with_factors else [])}
    assert tree(store.root) == whole


def test_a_trained_file_that_a_backup_does_not_have_is_not_mended(store: Store, run: Run) -> None:
    """Nor one that is spoiled there; it is still said to be missing."""
    _, _, path = laid(store)
    assert run("backup", "copy").code == 0
    flip(Path("copy/artifacts") / path.name)
    path.unlink()
    outcome = run("verify", "--repair", "--from", "copy", "--no-rebuild")
    assert outcome.code == 1 and f"wrong: trained file {path} is missing" in outcome.out and not path.exists()


def test_a_backup_to_take_from_needs_leave_to_mend(store: Store, run: Run) -> None:
    """Exit code 2; nothing is looked at."""
    outcome = run("verify", "--from", "copy")
    assert outcome.code == 2 and outcome.out == "" and "hint: add --repair" in outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# gc


def test_what_nothing_refers_to_is_removed_and_told(store: Store, run: Run) -> None:
    """Each file and all of them together; the second time there is nothing."""
    whole = tree(store.root)
    left = leave_behind(store)
    outcome = run("gc")
    assert outcome.code == 0
    *files, last = outcome.out.splitlines()
    assert sorted(files) == sorted(map(str, left)) and last == "Removed 4 files, 1.0 MB."
    assert tree(store.root) == whole
    assert run("gc") == (0, "Removed 0 files, 0.0 MB.\n", "")
    leave_behind(store)
    removed = run("gc", "--json").of("removed")
    assert {line["file"]: line["bytes"] for line in removed} == {
        str(path): 2**20 * (i == 0) + 10 for i, path in enumerate(left)
    }
    assert run("gc", "--json").lines == []


def test_what_was_undone_is_kept(store: Store, run: Run) -> None:
    """Redo needs it; so does a restore of what no line of operations leads to any more."""
    _, second = versions(store)
    files = factor_files(store)
    assert run("undo").code == 0 and run("undo").code == 0
    assert run("restore", second.id).code == 0 and run("restore", "base").code == 0
    assert run("gc").out == "Removed 0 files, 0.0 MB.\n"
    assert all(path.is_file() for path in files)
    assert run("restore", second.id).code == 0
    assert "2 versions rebuilt to the bit" in run("verify").out


def test_what_was_trained_is_kept(store: Store, run: Run) -> None:
    """Whether a version needs it or not, and trainings that were interrupted; half a copy of a file goes."""
    laid(store)
    trained(store.artifacts_dir, number=2.0)
    unfinished = store.root / "training" / "0123" / "checkpoint.safetensors"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"half")
    whole = tree(store.root)
    half = store.artifacts_dir / ("a" * 32 + ".safetensors.7.part")
    half.write_bytes(bytes(10))
    assert faults(run("verify", "--no-rebuild", "--json")) == [f"file {half} is not part of any version"]
    assert run("gc").out == f"{half}\nRemoved 1 file, 0.0 MB.\n"
    assert tree(store.root) == whole and run("gc").out == "Removed 0 files, 0.0 MB.\n"


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=" ".join)
def test_where_there_is_no_store_there_is_nothing_to_remove(nowhere: Path, run: Run, flags: tuple[str, ...]) -> None:
    """And none is made."""
    outcome = run("gc", *flags)
    assert outcome.code == 0
    assert outcome.lines == [] if flags else outcome.out == "Removed 0 files, 0.0 MB.\n"
    assert list(nowhere.iterdir()) == []


def test_nothing_is_removed_beside_a_damaged_database(store: Store, run: Run) -> None:
    """What it does not name may be needed all the same."""
    leave_behind(store)
    changed(store, "delete from version_edits")
    before = tree(store.root)
    outcome = run("gc")
    assert outcome.code == 1 and "nothing was removed" in outcome.err and outcome.out == ""
    assert run("verify", "--repair", "--no-rebuild").code == 1
    assert tree(store.root) == before


# ---------------------------------------------------------------------------------------------------------------------
# backup


def test_a_backup_is_a_store(store: Store, run: Run) -> None:
    """With the same history, versions and files, and commands work on it; the store stays as it was."""
    before = tree(store.root)
    assert run("backup", "a copy") == (0, "Copied the store to a copy: its database and 2 new files.\n", "")
    assert tree(store.root) == before
    copy = Store(Path("a copy"))
    assert (copy.operations(), copy.versions(), copy.view()) == (store.operations(), store.versions(), store.view())
    assert {name: data for name, data in tree(copy.root).items() if name.startswith("deltas")} == {
        name: data for name, data in before.items() if name.startswith("deltas")
    }
    assert "2 versions rebuilt to the bit" in run("--store", "a copy", "verify").out
    assert run("--store", "a copy", "log", "--json").lines == run("log", "--json").lines
    assert run("--store", "a copy", "undo").code == 0
    assert store.operations() != copy.operations()


def test_a_backup_is_brought_up_to_date(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files that are new are copied; what was undone since is undone there too."""
    assert run("backup", "copy", "--json").of("backup") == [{"type": "backup", "folder": "copy", "files": 2}]
    assert run("undo").code == 0
    assert run("backup", "copy", "--json").of("backup")[0]["files"] == 0
    assert Store(Path("copy")).view() == store.view()
    monkeypatch.setattr(speak, "NEW_TOKENS", 1)
    monkeypatch.setattr(prompts, "CONTEXT_TOKENS", 1)
    assert run("apply", spec(tiny.FACTS[2]), "--yes").code == 0
    assert run("backup", "copy", "--json").of("backup")[0]["files"] == 1
    assert Store(Path("copy")).versions() == store.versions() and len(store.versions()) == 3
    assert care.inspect(Store(Path("copy"))) == []


def test_a_backup_has_what_was_trained(store: Store, run: Run) -> None:
    """Whether a version needs it or not, each once; what is trained later is added. Trainings stay where they are."""
    laid(store)
    trained(store.artifacts_dir, number=2.0)
    (store.root / "training").mkdir()
    assert run("backup", "copy", "--json").of("backup")[0]["files"] == 5
    copy = Store(Path("copy"))
    assert tree(copy.artifacts_dir) == tree(store.artifacts_dir) and not (copy.root / "training").exists()
    assert care.inspect(copy) == []
    assert run("backup", "copy", "--json").of("backup")[0]["files"] == 0
    trained(store.artifacts_dir, number=3.0)
    assert run("backup", "copy").out == "Copied the store to copy: its database and 1 new file.\n"
    assert tree(copy.artifacts_dir) == tree(store.artifacts_dir)


@pytest.mark.parametrize("spoil", [Path.unlink, flip], ids=["missing", "changed"])
def test_a_store_without_a_trained_file_it_needs_is_not_copied(
    store: Store, run: Run, spoil: Callable[[Path], object]
) -> None:
    """The copy would not be what it says. Once the file is back a copy that was begun goes on."""
    _, _, path = laid(store)
    content = path.read_bytes()
    spoil(path)
    outcome = run("backup", "copy")
    assert outcome.code == 1 and f"the trained file {path} is missing or spoiled" in outcome.err
    assert "`editctl verify` tells more" in outcome.err and not Path("copy/editctl.db").exists()
    path.write_bytes(content)
    assert run("backup", "copy").code == 0 and care.inspect(Store(Path("copy"))) == []


def test_a_copy_that_has_only_trained_files_yet_is_gone_on_with(store: Store, run: Run) -> None:
    """A copy is interrupted anywhere; a folder with anything else in it is none."""
    _, _, path = laid(store)
    Path("copy/artifacts").mkdir(parents=True)
    shutil.copyfile(path, Path("copy/artifacts") / path.name)
    assert run("backup", "copy", "--json").of("backup")[0]["files"] == 3
    assert care.inspect(Store(Path("copy"))) == []
    Path("other/artifact").mkdir(parents=True)
    assert run("backup", "other").code == 2


@pytest.mark.parametrize(
    ("prepare", "code", "words"),
    [
        (lambda: shutil.copytree("specs", "copy"), 2, "copy holds something else than a store"),
        (lambda: Path("copy").symlink_to("store"), 2, "copy is the store itself"),
        (lambda: Path("copy").write_text("x"), 2, "Directory 'copy' is a file"),
        (lambda: flip(next(Path("store/deltas").iterdir())), 1, "is missing or spoiled"),
        (lambda: next(Path("store/deltas").iterdir()).unlink(), 1, "is missing or spoiled"),
    ],
    ids=["a folder in use", "the store itself", "a file", "spoiled", "missing"],
)
def test_what_cannot_be_copied_is_refused_and_nothing_is_lost(
    prepare: Callable[[], object], code: int, words: str, store: Store, run: Run
) -> None:
    """With a remedy; the store is as it was, and what lay in the way too."""
    prepare()
    before = tree(Path.cwd())
    outcome = run("backup", "copy")
    assert outcome.code == code, outcome.err
    assert words in outcome.err and outcome.out == ""
    assert "hint: " in outcome.err or "for help" in outcome.err
    after = tree(Path.cwd())
    assert {name: after[name] for name in before} == before
    assert not Path("copy/editctl.db").is_file() or Path("copy").samefile("store")


def test_a_backup_that_went_on_by_itself_is_not_written_over(store: Store, run: Run) -> None:
    """Exit code 2, and its own history stays."""
    assert run("backup", "copy").code == 0
    assert run("--store", "copy", "undo").code == 0
    kept = Store(Path("copy")).operations()
    outcome = run("backup", "copy")
    assert outcome.code == 2
    assert "copy is a store that went on by itself: this one has no operation 3" in outcome.err
    assert Store(Path("copy")).operations() == kept


def test_where_there_is_no_store_there_is_nothing_to_copy(nowhere: Path, run: Run) -> None:
    """Exit code 1; neither folder is made."""
    outcome = run("backup", "copy")
    assert outcome.code == 1 and "is empty: there is nothing to copy" in outcome.err and "hint: " in outcome.err
    assert list(nowhere.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Beside a writer


def test_looking_and_copying_do_not_wait_for_a_writer_and_removing_does(store: Store, run: Run) -> None:
    """Exit code 3 for what would remove files that the writer is about to name."""
    left = leave_behind(store)
    with subprocess.Popen([sys.executable, "-c", HOLD], **PIPES) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for arguments in (("gc",), ("gc", "--lock-timeout", "1")):
            outcome = run(*arguments)
            assert outcome.code == 3 and f"pid {holder.pid}" in outcome.err and outcome.out == ""
        # Who writes may be about to name them, so they are not held to be left over.
        assert run("verify", "--repair", "--no-rebuild").code == 0
        assert all(path.exists() for path in left)
        assert run("backup", "copy").code == 0
        holder.communicate("\n")
    assert run("verify", "--no-rebuild").code == 1
    assert run("gc").code == 0
    assert not any(path.exists() for path in left)
