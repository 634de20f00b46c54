"""A study from its trials to its results: what all studies share.

Knows: which edits, questions and texts a study is about, the configuration its folder is bound to, and the order of
trials. Refuses: what a study compares; its verb does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editctl import artifacts, atlas
from editctl.engine import corpus, lessons, methods, source
from editctl.engine.methods import Settings
from editctl.engine.run import libraries
from editctl.errors import InvalidInput
from editctl.events import Emit, json_line
from editctl.metrics.edits import Question
from editctl.spec import Edit, Probe
from editctl.studies import sequential
from editctl.studies.bench import Bench, Pace, Trial
from editctl.studies.journal import opened
from editctl.studies.prepare import HELD_OUT
from editctl.studies.tables import Result

if TYPE_CHECKING:
    from editctl.workspace import Workspace


DECISIVE = ("editctl", "torch", "transformers", "tokenizers")
"""Libraries of other versions make other numbers."""


@dataclass(frozen=True)
class Matter:
    """What a study is about."""

    edits: tuple[Edit, ...]
    kept: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    """Questions beside the edits' own whose answers should stay."""
    checks: tuple[str, ...] = ()
    """What is checked beside the answers."""
    text: tuple[str, ...] = ()
    """What perplexity is measured on."""


def matter(
    space: Workspace,
    specs: Sequence[str] = (),
    *,
    made: int,
    edits: int | None = None,
    unrelated: int = 0,
    seed: int = 0,
    probes: int = 0,
    checks: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Matter:
    """The first edits of the specs, or made-up ones of atlas.

    Args:
        edits: how many; None for all of the specs, or `made`.
        probes: at most so many locality probes an edit are asked; 0 for all.
        texts: files that perplexity is measured on; by default the text that was held out when the model was prepared,
            or ordinary sentences.

    Raises:
        InvalidInput: there are fewer edits, or no specs were named and the model is another than atlas.
    """
    if not specs:
        if space.config.model != atlas.NAME:
            raise InvalidInput("made-up edits are of what atlas knows", "name spec files that fit the model")
        found, kept = sequential.make(edits or made, unrelated, seed)
        return Matter(tuple(found), kept, tuple(checks), tuple(_text(space, texts)))
    read = space.edits(specs)
    if edits is not None and len(read) < edits:
        raise InvalidInput(f"the specs hold {len(read)} edits, not {edits}", "ask for fewer --edits")
    chosen = read[:edits]
    if probes:
        chosen = tuple(edit.model_copy(update={"locality": edit.locality[:probes]}) for edit in chosen)
    return Matter(tuple(chosen), {}, tuple(checks), tuple(_text(space, texts)))


def taught(space: Workspace, specs: Sequence[str], seed: int) -> tuple[Edit, ...]:
    """The edits of the specs that a method is to be trained on, or made-up ones of everything atlas knows.

    Raises:
        InvalidInput: no specs were named and the model is another than atlas.
    """
    if specs:
        return space.edits(specs)
    if space.config.model != atlas.NAME:
        raise InvalidInput("made-up edits are of what atlas knows", "name spec files that fit the model")
    return tuple(sequential.lessons(seed))


def one_each(edits: Iterable[Edit], most: int) -> list[Edit]:
    """The first edits, one a subject, without locality probes that ask what another of them changes."""
    chosen = list({edit.subject: edit for edit in reversed(list(edits))}.values())[::-1][:most]
    changed = [(re.compile(rf"(?<!\w){re.escape(edit.subject)}(?!\w)"), edit.target_true) for edit in chosen]

    def stays(probe: Probe) -> bool:
        return not any(old in probe.answer and named.search(probe.prompt) for named, old in changed)

    return [edit.model_copy(update={"locality": tuple(filter(stays, edit.locality))}) for edit in chosen]


def unseen(space: Workspace, edits: int, unrelated: int, seed: int, **more: Any) -> Matter:
    """Made-up edits of atlas, one a subject, of subjects that no trained file of the store was taught, with probes of
    what must stay; beside them facts of other subjects and other facts of the same.

    Raises:
        InvalidInput: there are not so many, or the model is another than atlas.
    """
    made = taught(space, (), seed)
    library, base = space.store().artifacts_dir, space.source()[1]
    known = [one.about for one in artifacts.found(library, base=base)]
    splits = {(float(about["held_out_share"]), int(about["seed"])) for about in known}
    if any(about.get("model") != atlas.NAME for about in known):
        raise InvalidInput("a trained file was taught on another model's name", "train it again with --model atlas")
    held = list(made)
    for share, number in splits:
        held = [edit for edit in held if edit in set(lessons.split(made, share, number)[1])]
    chosen = one_each(held, edits)
    if len(chosen) < edits:
        raise InvalidInput(
            f"{len(chosen)} subjects were held out of all trainings, fewer than {edits} edits need",
            "ask for fewer --edits, or train with the same --held-out and --seed",
        )
    kept = sequential.beside(chosen, unrelated, seed)
    checks, texts = more.get("checks", ()), more.get("texts", ())
    return Matter(tuple(chosen), kept, tuple(checks), tuple(_text(space, texts)))


def _text(space: Workspace, texts: Sequence[str]) -> Sequence[str]:
    if texts:
        return [line for path in texts for line in corpus.lines("", path, corpus.content("", path))]
    if space.config.model == atlas.NAME:
        return []
    held_out = space.source()[0] / HELD_OUT
    return list(corpus.lines("", str(held_out), corpus.content("", str(held_out)))) if held_out.is_file() else []


def settings_maker(space: Workspace, *, trained: bool = True) -> Callable[..., Settings]:
    """Settings by a method's name and overrides, which the command line's own beat.

    Args:
        trained: whether the file that the method reads has to be there.
    """
    folder, base = space.source()
    shape, config, library = source.configuration(folder), space.config, space.store().artifacts_dir

    def settings(name: str, **overrides: Any) -> Settings:
        made = methods.settings(shape, name, {**overrides, **config.settings})
        made = artifacts.settled(made, base, library) if trained else made
        # A study measures one model in one dtype; what is preserved is bound by content.
        return replace(made, corpus_content=corpus.content(config.model, made.corpus))

    return settings


def about(space: Workspace, name: str, of: Matter, trials: Sequence[Trial], **more: object) -> dict[str, Any]:
    """The configuration that a study's folder is bound to: everything that decides its numbers."""
    return {
        "study": name,
        "libraries": {name: version for name, version in libraries().items() if name in DECISIVE},
        "model": {"name": space.config.model, "content": space.source()[1]},
        "device": space.config.device,
        "dtype": space.config.dtype,
        "edits": {"count": len(of.edits), "content": _digest([edit.model_dump(mode="json") for edit in of.edits])},
        "kept": _digest([[name, [vars(q) for q in asked]] for name, asked in of.kept.items()]),
        "checks": list(of.checks),
        "text": {"pieces": len(of.text), "content": _digest(of.text)},
        "trials": {trial.name: trial.settings.to_params() for trial in trials},
        **more,
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json_line(value).encode()).hexdigest()[:16]


def results(
    space: Workspace,
    config: Mapping[str, Any],
    of: Matter,
    trials: Iterable[Trial],
    out: Path | None,
    emit: Emit,
    *,
    total: int,
    lenient: bool = False,
) -> Iterator[Result]:
    """The trials' results, one by one; what an earlier run finished is taken from its folder.

    Args:
        trials: each is asked for when the one before is finished.
        out: the study's folder; None keeps nothing.
        total: edits of all trials, for the time left.
        lenient: a trial that cannot be made has no marks and says why.
    """
    with opened(out, config) as journal:
        _, base = space.source()
        pace = Pace(emit, total)
        bench = Bench(
            space.load(), base, space.store(), emit, journal=journal, checks=of.checks, text=of.text, pace=pace
        )
        for trial in trials:
            try:
                marks = bench.run(trial)
                yield Result(trial, marks, bench.unedited(trial))
            except InvalidInput as error:
                if not lenient:
                    raise
                pace.skip(len(trial.edits))
                yield Result(trial, refused=error.message)
