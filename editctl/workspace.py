"""A workspace: the configuration with the command line's flags over it, and what is found through it.

Knows: which store, specs, model and settings a command works with. Refuses: to compute; torch, transformers and
sqlite-utils are imported inside the methods that need them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from editctl.errors import InvalidInput, Problem, StoreError

if TYPE_CHECKING:
    from editctl.config import Config
    from editctl.engine.cost import Expected
    from editctl.engine.model import Model
    from editctl.plan import Plan
    from editctl.spec import Edit
    from editctl.store import Store, Version


_EXAMPLES = {"--set": "--set energy=0.1", "--gate": "--gate reliability=0.95"}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Look for cycles seldom: specs and live edits are many small objects without any. Measured on 10,000 specs against
    100,000 live edits, looking as often as Python does took 27 % of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


class Workspace:
    """The configuration with the command line's flags over it, and what is found through it."""

    def __init__(self, **flags: Any) -> None:
        self._flags = flags

    @cached_property
    def config(self) -> Config:
        """The file's keys, the flags over them."""
        from editctl import config

        loaded = config.load(self.config_path)
        apart = ("config", "trust_remote_code")
        given = {k: v for k, v in self._flags.items() if k not in apart and v not in (None, ())}
        gates = {**loaded.gates, **_pairs("--gate", given.pop("gates", ()))}
        settings = (
            dict(loaded.settings)
            | _pairs("--set", given.pop("set", ()))
            | {key: given.pop(key) for key in ("preserve", "batch_size", "corpus", "layers") if key in given}
        )
        _check_gates(gates)
        return loaded.model_copy(update={**given, "settings": settings, "gates": gates})

    @property
    def config_path(self) -> Path | None:
        """The configuration file that was named; None is the default one, which may not be there."""
        return Path(self._flags["config"]) if self._flags.get("config") else None

    def with_flags(self, **flags: Any) -> Workspace:
        """The same workspace with a verb's own flags."""
        return Workspace(**{**self._flags, **flags})

    def arguments(self, verb: str, *more: str, model: bool = False, device: bool = False) -> list[str]:
        """The command line, after `editctl`, that runs a verb in this workspace.

        Args:
            model: whether to say which model and dtype, where a flag says so.
            device: whether to say on which device, where a flag says so.
        """
        given = {name: value for name, value in self._flags.items() if value not in (None, (), False)}
        line = [part for name in ("store", "config") if name in given for part in (f"--{name}", str(given[name]))]
        line += [verb, *more]
        named = (("model", "dtype") if model else ()) + (("device",) if model or device else ())
        line += [part for name in named if name in given for part in (f"--{name}", str(given[name]))]
        return line + ["--trust-remote-code"] * (self.trusting and (model or device))

    def store(self) -> Store:
        """The store of versions."""
        from editctl.store import Store

        return Store(Path(self.config.store))

    @_undisturbed()
    def edits(self, paths: Sequence[str]) -> tuple[Edit, ...]:
        """The edits of the spec files named, or of the workspace's; warnings go to standard error."""
        from editctl import spec

        def warn(warning: Problem) -> None:
            click.echo(spec.visible(f"warning: {warning}", 10_000), err=True)

        return spec.load([Path(p) for p in paths or self.config.specs], warn)

    def source(self) -> tuple[Path, str]:
        """The model's folder and its content hash."""
        from editctl.engine import source

        folder = source.locate(self.config.model)
        return folder, source.identity(folder, trusted=self.trusting)

    def usual(self) -> int:
        """How many blocks of the model the method edits, whatever the configuration names."""
        from editctl.engine import methods, source

        folder, _ = self.source()
        others = {name: value for name, value in self.config.settings.items() if name != "layers"}
        return len(methods.settings(source.configuration(folder), self.config.method, others).layers)

    @property
    def trusting(self) -> bool:
        """Whether code that the model brings may be run: said on the command line each time, in no file."""
        return bool(self._flags.get("trust_remote_code"))

    def load(self) -> Model:
        """The model, ready to be asked and edited."""
        from editctl.engine import model

        config = self.config
        with self._trust() as trusted:
            return model.load(config.model, device=config.device, dtype=config.dtype, trusted=trusted)

    def outline(self) -> Model:
        """The model's shapes without its weights."""
        from editctl.engine import model

        with self._trust() as trusted:
            return model.outline(self.config.model, trusted=trusted)

    @contextmanager
    def _trust(self) -> Iterator[bool]:
        """Whether the model's own code is run inside, which is said; what that code prints is talk."""
        from editctl.engine import source
        from editctl.spec import visible

        name = self.config.model
        files = source.code(source.locate(name)) if self.trusting else ()
        if not files:
            yield False
            return
        text = f"Running code that {name} brings ({', '.join(files)}): --trust-remote-code"
        click.echo(visible(text, 10_000), err=True)
        with redirect_stdout(sys.stderr):
            yield True

    def untrusted(self, base: str) -> str:
        """The remedy where the model's content is `base` but for its own code, run there and not here or here and not
        there; else nothing."""
        other = self.with_flags(trust_remote_code=not self.trusting)
        if other.source()[1] != base:
            return ""
        return "leave --trust-remote-code away, as then" if self.trusting else "pass --trust-remote-code, as then"

    @_undisturbed()
    def make_plan(self, edits: Sequence[Edit], version: Version | None, store: Store, *, prune: bool) -> Plan:
        """The plan from a version to the edits.

        Raises:
            StoreError: the version is of another model.
            InvalidInput: a method or a setting is unknown.
        """
        from editctl import artifacts, plan
        from editctl.engine import corpus, methods, source

        folder, base = self.source()
        config, shape = self.config, source.configuration(folder)

        def params(method: str) -> dict[str, Any]:
            settings = methods.settings(shape, method, config.settings)
            settings = artifacts.settled(settings, base, store.artifacts_dir)
            dtype = version.dtype.removeprefix("torch.") if version and config.dtype == "auto" else config.dtype
            content = corpus.content(config.model, settings.corpus)
            return replace(settings, dtype=dtype, corpus_content=content).to_params()

        if prune and not edits:
            raise InvalidInput("there are no edits in these specs; --prune would drop everything", "restore base")
        if version is not None and version.base != base:
            raise StoreError(
                f"the store {store.root} holds versions of another model ({version.model}, content {version.base})",
                self.untrusted(version.base) or "name that model with --model, or another store with --store",
            )
        names = {name for edit in edits for name in (edit.id, edit.prompt)}
        lives, others = (store.edits(version), 0) if prune else store.near(version, names)
        return plan.make(
            edits,
            [live.known for live in lives],
            model=config.model,
            base=base,
            head=version.id if version else "",
            params=params(config.method),
            methods={name: params(name) for name in dict.fromkeys(e.method for e in edits) if name},
            gates=config.gates,
            prune=prune,
            others=others,
        )

    def expected(self, plan: Plan, store: Store) -> Expected:
        """What carrying a plan out will probably take."""
        from editctl import events
        from editctl.engine import cost, methods, source
        from editctl.metrics.edits import questions
        from editctl.plan import ADD, DROP, REPLACE

        folder, _ = self.source()
        shape = cost.shape_of(source.configuration(folder), folder)
        last, head = None, store.resolve(plan.head or "base")
        if head is not None:
            started = (events.from_line(line) for line in store.events(head))
            new = next((event.edits for event in started if isinstance(event, events.RunStarted)), 0)
            last = cost.Pace(head.id, new, len(store.answers(head)), head.seconds)
        staying = [action.edit for action in plan.actions if action.kind != DROP]
        asked = sum(len(questions(edit)) for edit in staying)
        settings = methods.Settings.from_params(plan.params)
        return cost.expected(shape, settings, len(plan.of(ADD, REPLACE)), asked, self.config.device, last)

    def made_for(self, versions: Sequence[Version | None]) -> Workspace:
        """The workspace with the model the versions were made for, in the dtype they were made in unless another is
        asked for.

        Raises:
            StoreError: the model named has other content.
            InvalidInput: the versions were made in different dtypes and none is asked for.
        """
        space = self
        if space.config.dtype == "auto" and (dtypes := {v.dtype.removeprefix("torch.") for v in versions if v}):
            if len(dtypes) > 1:
                raise InvalidInput("these versions were made in different dtypes", f"pass --dtype, one of: {dtypes}")
            space = space.with_flags(dtype=dtypes.pop())
        named = next((v for v in versions if v is not None), None)
        if named is not None and "model" not in space.config.model_fields_set:
            space = space.with_flags(model=named.model)
        _, base = space.source()
        for version in versions:
            if version is not None and version.base != base:
                raise StoreError(
                    f"version {version.id} was made for another model ({version.model}, content {version.base})",
                    space.untrusted(version.base)
                    or f"{space.config.model} has content {base}; name the right one with --model",
                )
        return space


def _check_gates(gates: dict[str, Any]) -> None:
    """Make sure that gates are thresholds of metrics there are.

    Raises:
        InvalidInput: they are not.
    """
    from editctl.metrics import gates as gate_room

    for name, wanted in gates.items():
        if isinstance(wanted, bool) or not isinstance(wanted, int | float):
            raise InvalidInput(f"--gate {name}={wanted} is no number", "for example --gate reliability=0.95")
    gate_room.check(gates)


def _pairs(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Values given as NAME=VALUE, as in TOML."""
    from editctl.config import unfit
    from editctl.spec import NotToml, parse

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidInput(f"{flag} {pair} has no value", f"write {flag} NAME=VALUE, for example {_EXAMPLES[flag]}")
        try:
            given = parse(f"value = {value}")["value"]
        except NotToml:
            given = value
        if wrong := unfit(given):
            raise InvalidInput(f"{flag} {pair}: the value {wrong}", f"for example {_EXAMPLES[flag]}")
        found[name.strip()] = given
    return found
