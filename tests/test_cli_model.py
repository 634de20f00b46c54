"""`editctl model …`: what it prints, as a table and as JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from editctl.cli_model import BARS, model, sparkline
from editctl.errors import EditctlError, InvalidInput
from editctl.events import header
from editctl.workspace import Workspace

WIDTH, TOKENS = 80, 1500


def test_importing_the_verbs_loads_nothing_heavy(tmp_path: Path) -> None:
    """The command line imports them whatever is asked of it."""
    code = (
        "import sys, editctl.cli_model; "
        "assert not {'torch', 'transformers', 'rich', 'sqlite_utils', 'textual'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


@pytest.fixture
def ask(tmp_path: Path, folders: dict[str, Path], corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`editctl model statistics` on the tiny Llama with its corpus, in a workspace of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, corpus: str = str(corpus)) -> Result:
        flags = ["--model", str(folders["llama"]), "--device", "cpu", "--tokens", str(TOKENS)]
        flags += ["--corpus", corpus] if corpus else []
        found: Result = CliRunner().invoke(
            model, ["statistics", *flags, *arguments], obj=Workspace(store="store", config=None)
        )
        if found.exception is not None and not isinstance(found.exception, EditctlError):
            raise found.exception
        return found

    return run


def rows_of(found: Result) -> list[dict[str, Any]]:
    assert found.exit_code == 0, found.exception
    first, *rest = found.stdout.splitlines()
    assert first == header()
    return [json.loads(line) for line in rest]


def test_json_lines_say_what_was_measured(ask: Any, loaded: Any, corpus: Path, tmp_path: Path) -> None:
    """One object a block after the header, with the numbers of the moments in the store's cache."""
    from editctl.engine.methods import NULL_SPACE
    from editctl.engine.statistics import moments
    from editctl.events import silent

    found = ask("--layers", "2,1", "--json")
    rows = rows_of(found)
    assert "Measuring which directions knowledge uses" in found.stderr
    values = {"corpus": str(corpus), "tokens": TOKENS, "base": "", "folder": Path("store/stats"), "emit": silent}
    kept = moments(loaded("llama"), (1, 2), **values)
    assert [row["layer"] for row in rows] == [1, 2]
    for row in rows:
        moment = kept[row["layer"]]
        assert moment.cached, "the verb measured what a run would"
        assert row["type"] == "statistics" and row["module"] == f"model.layers.{row['layer']}.mlp.down_proj"
        assert (row["width"], row["tokens"], row["tokens_per_dimension"]) == (WIDTH, TOKENS, TOKENS / WIDTH)
        assert row["trace"] == pytest.approx(moment.scale)
        assert row["effective_rank"] == pytest.approx(moment.effective_rank) and 1 < row["effective_rank"] < WIDTH
        assert row["spectrum"] == pytest.approx(moment.spectrum())
        assert (row["rule"], row["value"]) == (NULL_SPACE.rule, NULL_SPACE.value)
        assert row["free"] == moment.null_rank(NULL_SPACE)
        assert Path(row["file"]) == moment.file and row["bytes"] == Path(row["file"]).stat().st_size
        assert row["cached"] is False
    assert rows[0]["trace"] != rows[1]["trace"]


def test_what_is_in_the_cache_is_shown_without_measuring(ask: Any) -> None:
    """Only the block that is new is measured; the table says which was."""
    ask("--layers", "1")
    found = ask("--layers", "1", "--json")
    assert [row["cached"] for row in rows_of(found)] == [True]
    assert "Measuring" not in found.stderr
    lines = ask("--layers", "1,2").stdout.splitlines()
    heads = lines[0].split()
    assert heads == [
        "block",
        "module",
        "width",
        "tokens",
        "a",
        "width",
        "trace",
        "rank",
        "free",
        "spectrum",
        "cached",
        "size",
    ]
    first, second = (line.split() for line in lines[1:3])
    assert (first[0], first[1], first[-3]) == ("1", "model.layers.1.mlp.down_proj", "yes")
    assert (second[0], second[1], second[-3]) == ("2", "model.layers.2.mlp.down_proj", "no")
    assert first[2:5] == [str(WIDTH), str(TOKENS), f"{TOKENS / WIDTH:.1f}"]
    assert len(first[-4]) == 10 and set(first[-4]) <= set(BARS) and first[-4].endswith(BARS[-1])
    assert "rule energy 0.1" in " ".join(lines[3:])


@pytest.mark.parametrize(("rule", "free"), [("quantile = 0.5", WIDTH // 2), ("quantile = 0.25", WIDTH // 4)])
def test_the_rule_is_that_of_the_workspace(ask: Any, tmp_path: Path, rule: str, free: int) -> None:
    """So is the method, whose blocks are measured when none are named."""
    (tmp_path / "editctl.toml").write_text(f"[settings]\n{rule}\nlayers = [3]\n")
    (row,) = rows_of(ask("--json"))
    assert (row["layer"], row["free"]) == (3, free)
    assert f"{row['rule']} = {row['value']:g}" == rule
    assert rule.replace(" = ", " ") in ask().stdout


def test_the_blocks_are_those_the_method_edits(ask: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """One of them under a method of one block."""
    from editctl.engine import methods, source

    for method in ("alphaedit", "rome"):
        (tmp_path / "editctl.toml").write_text(f'method = "{method}"\n')
        wanted = methods.settings(source.configuration(folders["llama"]), method, {}).layers
        assert [row["layer"] for row in rows_of(ask("--json"))] == list(wanted)


def test_a_rule_that_leaves_none_or_all_is_shown_as_refused(ask: Any, tmp_path: Path) -> None:
    """The rest of the row helps to find a better one."""
    (tmp_path / "editctl.toml").write_text("[settings]\nthreshold = 1e9\nlayers = [1]\n")
    (row,) = rows_of(ask("--json"))
    assert row["free"] is None and row["trace"] > 0
    assert "refused" in ask().stdout


def test_without_a_corpus_the_models_own_text_is_measured_and_said(ask: Any) -> None:
    """On standard error; with a corpus it is not said."""
    found = ask("--layers", "1", "--json", corpus="")
    assert rows_of(found)[0]["tokens"] == TOKENS
    assert "note: no corpus was given" in found.stderr
    assert "no corpus" not in ask("--layers", "1", "--json").stderr


@pytest.mark.parametrize(
    ("arguments", "corpus", "said"),
    [
        (("--layers", "1,x"), None, "no list of blocks"),
        (("--layers", "1-3"), None, "no list of blocks"),
        (("--layers", "4"), None, "not all among the model's blocks 0 to 3"),
        ((), "missing.txt", "missing.txt cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused(ask: Any, arguments: Any, corpus: str | None, said: str) -> None:
    """Before the model is loaded, with an error that the command line shows; nothing is left behind."""
    found = ask(*arguments, **({"corpus": corpus} if corpus else {}))
    assert isinstance(found.exception, InvalidInput) and said in found.exception.message
    assert "Loading" not in found.stderr and not Path("store/stats").exists()


def test_a_sparkline_has_a_bar_for_each_share() -> None:
    """Linear from nothing to all."""
    assert sparkline([0.0, 0.124, 0.126, 0.5, 0.874, 0.876, 1.0]) == "▁▁▂▅▇██"
    assert sparkline([-1e-9, 1.0000001]) == "▁█"
    assert sparkline([]) == ""
