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
    values: dict[str, Any] = {
        "corpus": str(corpus),
        "tokens": TOKENS,
        "base": "",
        "folder": Path("store/stats"),
        "emit": silent,
    }
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


# ---------------------------------------------------------------------------------------------------------------------
# inspect


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`editctl model inspect`, in a workspace of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        found: Result = CliRunner().invoke(model, ["inspect", *arguments], obj=Workspace(store="store", config=None))
        if found.exception is not None and not isinstance(found.exception, EditctlError):
            raise found.exception
        return found

    return run


def facts_of(found: Result) -> dict[str, Any]:
    """The one object of the JSON stream."""
    (row,) = rows_of(found)
    assert row.pop("type") == "model"
    return row


def told(found: Result) -> dict[str, str]:
    """The printed table, by the names on its left."""
    assert found.exit_code == 0, found.exception
    rows, last = dict[str, str](), ""
    for line in found.stdout.splitlines():
        name, value = line[:16].strip(), line[16:].strip()
        last = name or last
        rows[last] = f"{rows[last]} {value}" if last in rows else value
    return rows


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration of a Llama of 8 billion parameters, and nothing else."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("eight")
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_inspected_is_what_is_loaded(look: Any, folders: dict[str, Path], loaded: Any, kind: str) -> None:
    """Blocks, modules, widths and parameters are those of the loaded model; sizes are those on disk."""
    from editctl.engine.methods import profile_of
    from editctl.engine.source import configuration

    facts, whole = facts_of(look(str(folders[kind]), "--json")), loaded(kind)
    profile = profile_of(configuration(folders[kind]))
    assert (facts["layers"], facts["why"]) == (list(profile.layers), profile.why)
    assert facts["modules"] == [whole.blocks[layer].down_name for layer in profile.layers]
    assert (facts["hidden"], facts["key"]) == tuple(whole.blocks[0].weight.shape)
    assert facts["blocks"] == len(whole.blocks) and facts["architecture"] == type(whole.net).__name__
    assert facts["parameters"] == sum(p.numel() for p in whole.net.parameters())
    assert facts["weights_bytes"] == (folders[kind] / "model.safetensors").stat().st_size
    assert facts["tied_head"] == (kind == "gpt2")
    assert facts["cached"] == [] and (facts["method"], facts["edits"]) == ("alphaedit", 2000)
    assert not Path("store").exists()


def test_the_built_in_model_is_inspected_by_default(look: Any) -> None:
    """As a table: what is edited and why, what it needs, what is measured."""
    rows = told(look())
    assert rows == told(look("atlas"))
    assert rows["model"] == "atlas (LlamaForCausalLM), 5.5 M parameters"
    assert rows["blocks"] == "7, hidden width 160"
    assert rows["edited"] == "blocks 1, 2, 3: the blocks whose keys atlas's training shapes"
    assert rows["modules"] == " ".join(f"model.layers.{i}.mlp.down_proj" for i in (1, 2, 3))
    assert rows["matrices"] == "160 × 1280 each, keys of width 1280"
    assert rows["head"] == "tied to the embedding"
    assert rows["second moments"].endswith("measured: none")
    assert rows["for 2000 edits"].startswith("projector at most 9.4 MB, history 18.8 MB; on disk ")


def test_eight_billion_parameters_are_inspected_from_their_configuration(look: Any, eight: str) -> None:
    """Alone, without a weight: 2000 edits take at most a third of what dense matrices take. Control: a thousand more,
    or MEMIT, which needs the whole basis, take more."""
    facts = facts_of(look(eight, "--json"))
    assert (facts["blocks"], facts["hidden"], facts["key"]) == (32, 4096, 14336)
    assert facts["layers"] == [4, 5, 6, 7, 8] and facts["why"] == "published for this model"
    assert facts["modules"] == [f"model.layers.{i}.mlp.down_proj" for i in facts["layers"]]
    assert facts["parameters"] == 8_030_261_248 and facts["weights_bytes"] == 0 and not facts["tied_head"]
    assert facts["held_bytes"] == facts["projector_bytes"] + facts["history_bytes"]
    assert 100 * facts["held_bytes"] <= 33 * facts["reference_bytes"]
    for more in (("--edits", "3000"), ("--method", "memit")):
        other = facts_of(look(eight, "--json", *more))
        assert 100 * other["held_bytes"] > 33 * other["reference_bytes"]
    rows = told(look(eight))
    assert rows["model"].endswith("(LlamaForCausalLM), 8,030.3 M parameters") and rows["head"] == "of its own"
    assert rows["held in memory"] == "2.45 GB, 32 % of the 7.66 GB that dense P and K_p K_pᵀ take"


def test_blocks_that_somebody_set_are_said_to_be(look: Any, eight: str, tmp_path: Path) -> None:
    """By a flag or the configuration; otherwise the model's own reason is given."""
    assert facts_of(look(eight, "--json", "--layers", "20,3"))["layers"] == [3, 20]
    assert told(look(eight, "--layers", "20"))["edited"] == "blocks 20: set by --layers or settings"
    (tmp_path / "editctl.toml").write_text("[settings]\nlayers = [9, 10]\n")
    facts = facts_of(look(eight, "--json"))
    assert (facts["layers"], facts["why"]) == ([9, 10], "set by --layers or settings")
    (tmp_path / "editctl.toml").write_text('method = "rome"\n')
    facts = facts_of(look(eight, "--json"))
    assert (facts["layers"], facts["why"]) == ([5], "published for this model")


def test_what_was_measured_is_listed(look: Any, ask: Any, folders: dict[str, Path]) -> None:
    """Block and tokens, once `model statistics` has been there; not for another model of the same store."""
    ask("--layers", "2,1")
    found = facts_of(look(str(folders["llama"]), "--json"))["cached"]
    assert [(one["layer"], one["seen"]) for one in found] == [(1, TOKENS), (2, TOKENS)]
    assert all(len(one["corpus"]) == 16 for one in found)
    rows = told(look(str(folders["llama"])))
    assert rows["second moments"].endswith(f"measured: block 1 ({TOKENS} tokens), block 2 ({TOKENS} tokens)")
    assert facts_of(look(str(folders["gpt2"]), "--json"))["cached"] == []


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (("mixture",), "mixture of experts", "hint: mixtures of experts are not supported"),
        (("empty",), "empty is not a model folder", "hint: "),
        (("atlas", "--layers", "7"), "are not all among the model's blocks 0 to 6", ""),
        (("atlas", "--method", "rmoe"), "unknown method rmoe", "hint: did you mean rome?"),
    ],
)
def test_what_cannot_be_inspected_is_refused_with_a_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
    hint: str,
) -> None:
    """Of a few lines, and no traceback."""
    from builds import REFUSED

    from editctl.cli import main

    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    REFUSED["Mixtral"][0].config().save_pretrained("mixture")
    arguments = (f"./{arguments[0]}", *arguments[1:]) if arguments[0] != "atlas" else arguments
    monkeypatch.setattr(sys, "argv", ["editctl", "model", "inspect", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code in (1, 2) and out == ""
    assert said in err and hint in err and "Traceback" not in err
    assert len(err.splitlines()) <= 4
