"""Code that a model brings: not run unless the command line asks for it, then said, and always the code that is there.

The model is a tiny Llama whose own code turns the signs of its logits, so that what ran shows in what is answered, and
leaves a mark where it is run, so that it shows when it was not.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import tiny
import torch

from editctl.cli import cli, main
from editctl.engine import source
from editctl.engine.model import load, outline
from editctl.errors import InvalidInput, ModelError
from editctl.store import Store

CONFIGURATION = """
from transformers import LlamaConfig


class SignedConfig(LlamaConfig):
    model_type = "signed"
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_signed import SignedConfig
from .signs import SIGN

with open({mark!r}, "a") as file:
    file.write("run")
print("talk of the code")


class SignedForCausalLM(LlamaForCausalLM):
    config_class = SignedConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = SIGN * found.logits
        return found
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast


class SignedTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "configuration_signed.SignedConfig",
    "AutoModelForCausalLM": "modeling_signed.SignedForCausalLM",
}
FILES = "configuration_signed.py, modeling_signed.py, signs.py"
FLAG = "--trust-remote-code"
SPEC = """version = 1

[[edit]]
id = "tower"
subject = "The Eiffel Tower"
relation = "{} is located in the city of"
target_new = "Rome"
"""
PROMPT = "The Eiffel Tower is located in the city of"


def change(folder: Path, name: str = "config.json", **values: Any) -> None:
    """Keys of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that the model's code writes to when it is run."""
    return tmp_path / "mark"


@pytest.fixture
def signed(tmp_path: Path, folders: dict[str, Path], mark: Path) -> Path:
    """The folder of a model of its own type with its code."""
    folder = shutil.copytree(folders["llama"], tmp_path / "signed")
    change(folder, model_type="signed", architectures=["SignedForCausalLM"], auto_map=CLASSES)
    (folder / "configuration_signed.py").write_text(CONFIGURATION)
    (folder / "modeling_signed.py").write_text(MODELING.format(mark=str(mark)))
    (folder / "signs.py").write_text("SIGN = -1\n")
    return folder


@pytest.fixture
def of_known_type(signed: Path) -> Path:
    """The same, but of a type that transformers has a class of its own for."""
    change(signed, model_type="llama")
    code = CONFIGURATION.replace('"signed"', '"llama"')
    (signed / "configuration_signed.py").write_text(code)
    return signed


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    def of(self, kind: str) -> list[Any]:
        """The JSON lines of a type."""
        return [line for line in map(json.loads, self.out.splitlines()) if line["type"] == kind]


@pytest.fixture
def run(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs a command in a workspace with quick settings and one spec."""
    settings = {**tiny.QUICK, "corpus": str(corpus)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (tmp_path / "editctl.toml").write_text("\n".join(['device = "cpu"', "[settings]", *lines, ""]))
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs/tower.toml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["editctl", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        found = capsys.readouterr()
        assert "Traceback" not in found.out + found.err
        return Outcome(code, *found)

    return call


def logits(model: Any) -> torch.Tensor:
    """What a model gives for the prompt's next token."""
    with torch.no_grad():
        found: torch.Tensor = model.net(input_ids=torch.tensor([model.encode(PROMPT)])).logits[0, -1]
    return found


# Without the flag

VERBS = [
    ("ask", PROMPT, "--model"),
    ("apply", "--yes", "--model"),
    ("model", "inspect"),
    ("model", "statistics", "--model"),
    ("study", "specs", "--method", "memit", "--model"),
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb[:2]))
def test_code_is_not_run_unless_asked_for(run: Any, signed: Path, mark: Path, verb: tuple[str, ...]) -> None:
    """One sentence, and a hint that names the flag. Control: with the flag the code leaves its mark, and that is said
    before anything else, on standard error alone."""
    outcome = run(*verb, signed)
    assert outcome.code == 1 and outcome.out == ""
    sentence, hint = outcome.err.splitlines()[-2:]
    assert "signed brings code of its own (signed), which is not run unless that is asked for" in sentence
    assert hint == f"hint: read the code, and if you trust it, pass {FLAG}"
    assert not mark.exists()
    outcome = run(*verb, signed, FLAG)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count(f"Running code that {signed} brings ({FILES}): {FLAG}\n") == 1
    assert "talk of the code" in outcome.err and "talk of the code" not in outcome.out
    assert mark.exists()


@pytest.mark.parametrize("opener", [load, outline])
def test_no_opener_runs_code_by_default(signed: Path, mark: Path, opener: Any) -> None:
    """Control: trusted, both do."""
    with pytest.raises(ModelError, match="brings code of its own"):
        opener(str(signed))
    assert not mark.exists()
    assert type(opener(str(signed), trusted=True).net).__name__ == "SignedForCausalLM"
    assert mark.exists()


def test_what_runs_no_model_runs_no_code(run: Any, signed: Path, mark: Path) -> None:
    """And says nothing of it."""
    for verb in (("plan",), ("info",)):
        outcome = run(*verb, "--model", signed, FLAG)
        assert outcome.code == 0 and FILES not in outcome.err
    assert not mark.exists()


def test_no_file_can_ask_for_it(run: Any, signed: Path, mark: Path) -> None:
    """The command line alone."""
    Path("editctl.toml").write_text("trust_remote_code = true\n")
    outcome = run("ask", PROMPT, "--model", signed)
    assert outcome.code == 2 and "editctl.toml:1: unknown key trust_remote_code" in outcome.err
    assert not mark.exists()


def test_every_verb_that_takes_a_model_takes_the_flag() -> None:
    """Those that say in which dtype it is loaded; there are some."""

    def commands(group: click.Group) -> Iterator[click.Command]:
        for command in group.commands.values():
            yield from commands(command) if isinstance(command, click.Group) else (command,)

    flags = {command: {flag for o in command.params for flag in o.opts} for command in commands(cli)}
    found = {command.name: FLAG in names for command, names in flags.items() if "--dtype" in names}
    assert all(found.values()), found
    assert {"plan", "apply", "ask", "measure", "inspect", "statistics", "specs"} <= found.keys()


# With the flag


def test_a_model_with_its_own_code_answers_and_is_edited(run: Any, signed: Path) -> None:
    """By its own code; the edit is there when the version is rebuilt, and gone when it is undone."""
    model = ("--model", signed, FLAG)
    assert run("apply", "--yes", *model).code == 0
    head = Store(Path("store")).head()
    assert head is not None and head.base == source.identity(signed, trusted=True)
    base, edited = run("ask", PROMPT, "--top", "50", "--json", FLAG).of("answer")
    assert base["next"] != edited["next"]
    likeliest = logits(load(str(signed), device="cpu", trusted=True)).argmax()
    assert base["next"][0][0] == tiny.tokenizer(bos=True).decode([likeliest])
    assert likeliest == logits(load(str(unsigned(signed)), device="cpu")).argmin()
    measured = run("measure", "--json", FLAG)
    assert measured.code == 0, measured.err
    assert {answer["prompt"] for answer in measured.of("answer")} == {PROMPT}
    facts = run("model", "inspect", signed, FLAG, "--json").of("model")[0]
    assert facts["architecture"] == "SignedForCausalLM"
    assert facts["modules"] == [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    assert run("undo").code == 0 and Store(Path("store")).head() is None


def unsigned(folder: Path) -> Path:
    """A copy without code, of the type that transformers knows."""
    copy = shutil.copytree(folder, folder.with_name("unsigned"))
    for path in copy.glob("*.py"):
        path.unlink()
    config = json.loads((copy / "config.json").read_text())
    del config["auto_map"]
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return copy


@pytest.mark.parametrize("name", ["signs.py", "modeling_signed.py"])
def test_code_that_was_changed_is_what_runs(signed: Path, name: str) -> None:
    """In the same process, with the same names, the same number of bytes and the same configuration; another model."""
    before, identity = logits(load(str(signed), device="cpu", trusted=True)), source.identity(signed)
    path = signed / name
    text = path.read_text()
    path.write_text(text.replace("-1", "-2") if name == "signs.py" else text.replace("SIGN *", "SIGN +"))
    assert path.stat().st_size == len(text)
    after = logits(load(str(signed), device="cpu", trusted=True))
    assert torch.allclose(after, 2 * before if name == "signs.py" else -1 - before, atol=1e-5)
    assert source.identity(signed) != identity
    path.write_text(text)
    assert torch.equal(logits(load(str(signed), device="cpu", trusted=True)), before)
    assert source.identity(signed) == identity


def test_a_plan_is_stale_when_the_code_has_changed(run: Any, signed: Path) -> None:
    """Since the model is another."""
    assert run("plan", "-o", "plan.json", "--model", signed, FLAG).code == 0
    (signed / "signs.py").write_text("SIGN = -2\n")
    assert run("apply", "plan.json", FLAG).code == 5


def test_a_model_without_code_is_as_it_is_without_the_flag(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is said, and the content is the same; files of code that nothing names are let lie."""
    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    (folder / "convert.py").write_text("raise SystemExit('run')")
    assert source.identity(folder, trusted=True) == source.identity(folder)
    ask = ("ask", PROMPT, "--model", folder)
    assert run(*ask, FLAG) == run(*ask)
    assert run(*ask).code == 0


def test_a_known_model_that_brings_code_is_another_model_with_it(run: Any, of_known_type: Path, mark: Path) -> None:
    """Either runs, and the same folder does not pass for the same model: not for a version, not for a plan."""
    model = ("--model", of_known_type)
    for without, with_it, remedy in (((), (FLAG,), "pass"), ((FLAG,), (), "leave")):
        mark.unlink(missing_ok=True)
        assert run("plan", "-o", "plan.json", *model, *with_it).code == 0
        stale = run("apply", "plan.json", *without)
        assert stale.code == 5 and f"hint: {remedy} {FLAG}" in stale.err
        assert not mark.exists()
        done = run("apply", "plan.json", *with_it)
        assert done.code == 0 and mark.exists() == (FILES in done.err) == bool(with_it)
        for verb in (("ask", PROMPT), ("plan", *model)):
            refused = run(*verb, *without)
            assert refused.code == 1 and f"hint: {remedy} {FLAG}" in refused.err
            assert run(*verb, *with_it).code == 0
        shutil.rmtree("store")


def test_a_tokenizers_code_is_run_likewise(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """It is named in a file of its own."""
    folder = shutil.copytree(folders["llama"], tmp_path / "words")
    (folder / "tokenization_signed.py").write_text(TOKENIZATION)
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_signed.SignedTokenizer"]})
    found = [type(load(str(folder), device="cpu", trusted=trusted).tokenizer) for trusted in (False, True)]
    assert [one.__name__ == "SignedTokenizer" for one in found] == [False, True]
    for flags in ((), (FLAG,)):
        outcome = run("ask", PROMPT, "--model", folder, *flags)
        assert outcome.code == 0 and ("(tokenization_signed.py)" in outcome.err) == bool(flags)


@pytest.mark.parametrize(
    "reference",
    ["someone/else--modeling_signed.SignedForCausalLM", "../other/modeling.Model", "missing.Model", "modeling_signed"],
)
def test_code_that_the_folder_does_not_hold_is_never_run(run: Any, signed: Path, mark: Path, reference: str) -> None:
    """Whoever asks, for the model's identity would not hold it."""
    other = signed.with_name("other")
    other.mkdir()
    (other / "modeling.py").write_text(MODELING.format(mark=str(mark)))
    change(signed, auto_map={**CLASSES, "AutoModelForCausalLM": reference})
    outcome = run("ask", PROMPT, "--model", signed, FLAG)
    assert outcome.code == 1 and f"names code that is not in it ({reference})" in outcome.err
    assert "hint: put the file into the folder" in outcome.err and "Running code" not in outcome.err
    for opener in (load, outline):
        with pytest.raises(ModelError, match="not in it"):
            opener(str(signed), trusted=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('of its own')", "cannot be loaded: of its own"),
        ("x = transformers.no_such_name", "cannot be loaded: name 'transformers' is not defined"),
        ("import no_such_library", "packages that were not found in your environment: no_such_library"),
        ("def", "cannot be loaded: "),
    ],
)
def test_code_that_fails_is_told(run: Any, signed: Path, code: str, reason: str) -> None:
    """In one sentence, whatever it raises."""
    (signed / "modeling_signed.py").write_text(code)
    outcome = run("ask", PROMPT, "--model", signed, FLAG)
    assert outcome.code == 1 and outcome.out == ""
    *_, sentence, hint = outcome.err.splitlines()
    assert reason in sentence
    assert hint.startswith("hint: its own code does not run here")


def test_code_that_holds_no_causal_language_model_is_told(signed: Path) -> None:
    """Though it has a configuration."""
    change(signed, auto_map={"AutoConfig": CLASSES["AutoConfig"]})
    with pytest.raises(ModelError, match=re.escape("(signed) is no causal language model")):
        load(str(signed), trusted=True)


def test_weights_are_read_from_safetensors_alone(signed: Path) -> None:
    """Whoever's code reads them: a pickle may hold code that nobody could have read."""
    torch.save({}, signed / "pytorch_model.bin")
    (signed / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(signed), trusted=True)


def test_code_comes_with_a_model_from_the_hub(monkeypatch: pytest.MonkeyPatch, signed: Path) -> None:
    """As files; running them is another matter."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append(options)
        return str(signed)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert source.locate("someone/signed") == signed
    assert "*.py" in asked[0]["allow_patterns"]
    with pytest.raises(ModelError, match="brings code of its own"):
        load("someone/signed")


def test_a_saved_plan_still_takes_no_other_flags(run: Any, signed: Path) -> None:
    """Trust is no part of what a plan decides, the model is."""
    assert run("plan", "-o", "plan.json", "--model", signed, FLAG).code == 0
    assert run("apply", "plan.json", FLAG, "--model", "atlas").code == InvalidInput("").exit_code
    assert run("apply", "plan.json", FLAG).code == 0
