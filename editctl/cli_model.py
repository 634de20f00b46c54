"""`editctl model …`: what a model is like from an editor's point of view, printed.

Knows: the verbs of the group, their tables and JSON. Refuses: to compute; torch, transformers, rich and sqlite-utils
are imported inside the verbs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from editctl import talk
from editctl.errors import InvalidInput
from editctl.flags import as_json, from_corpus, from_flags, from_trust
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from rich.console import Group

    from editctl.engine.methods import NullSpace
    from editctl.engine.statistics import Moment

BARS = "▁▂▃▄▅▆▇█"


@click.group()
def model() -> None:
    """Look at a model: which directions its knowledge uses."""


@model.command()
@from_flags
@from_corpus
@click.option("--tokens", type=click.IntRange(1), help="Most tokens to read.")
@as_json
@click.pass_obj
def statistics(space: Workspace, /, tokens: int | None, as_json: bool, **flags: Any) -> None:
    """Measure the second moments of keys ahead of a run, or show those already measured."""
    from editctl import report
    from editctl.engine import corpus, methods, source
    from editctl.events import StageStarted, header

    space = space.with_flags(**flags)
    config = space.config
    folder, base = space.source()
    own: dict[str, Any] = dict(config.settings)
    if tokens:
        own["corpus_tokens"] = tokens
    settings = methods.settings(source.configuration(folder), config.method, own)
    content = corpus.content(config.model, settings.corpus)
    from editctl.engine import statistics as room

    with report.showing_run(report.console(stderr=True)) as emit:
        emit(StageStarted("load", 0))
        loaded = space.load()
        moments = room.moments(
            loaded,
            settings.layers,
            corpus=settings.corpus,
            tokens=settings.corpus_tokens,
            base=base,
            folder=space.store().stats_dir,
            emit=emit,
            content=content,
        )
    rule = settings.null_space or methods.NULL_SPACE
    rows = [_measured(layer, loaded.blocks[layer].down_name, moment, rule) for layer, moment in moments.items()]
    if as_json:
        click.echo(header())
        for row in rows:
            talk.line({"type": "statistics", **row})
        return
    report.console().print(_view(rows, f"{rule.rule} {rule.value:g}"))


def _measured(layer: int, module: str, moment: Moment, rule: NullSpace) -> dict[str, Any]:
    """One block's moment as JSON values."""
    try:
        free = moment.null_rank(rule)
    except InvalidInput:
        free = None
    width = len(moment.eigenvalues)
    return {
        "layer": layer,
        "module": module,
        "width": width,
        "tokens": moment.seen,
        "tokens_per_dimension": moment.seen / width,
        "trace": moment.scale,
        "effective_rank": moment.effective_rank,
        "rule": rule.rule,
        "value": rule.value,
        "free": free,
        "spectrum": moment.spectrum(),
        "cached": moment.cached,
        "file": str(moment.file or ""),
        "bytes": moment.file.stat().st_size if moment.file else 0,
    }


def sparkline(shares: Sequence[float]) -> str:
    """Shares from 0 to 1 as one bar each."""
    return "".join(BARS[min(int(share * len(BARS)), len(BARS) - 1)] for share in shares)


def _view(rows: Sequence[dict[str, Any]], rule: str) -> Group:
    """One line a block, and what the columns mean."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from editctl import report

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("block", justify="right")
    table.add_column("module", overflow="fold")
    for head in ("width", "tokens", "a width", "trace", "rank", "free"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("spectrum", "cached"):
        table.add_column(head, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["layer"]),
            Text(report.safe(row["module"])),
            str(row["width"]),
            str(row["tokens"]),
            f"{row['tokens_per_dimension']:.1f}",
            f"{row['trace']:.4g}",
            f"{row['effective_rank']:.1f}",
            Text("refused", "red") if row["free"] is None else str(row["free"]),
            sparkline(row["spectrum"]),
            "yes" if row["cached"] else "no",
            f"{row['bytes'] / 2**20:.1f} MB",
        )
    meaning = (
        f"free: directions that may be edited by the rule {rule}. rank: effective rank. spectrum: shares of the trace "
        "that the smallest 10 %, 20 % … 100 % of the directions hold."
    )
    return Group(table, Text(meaning, "dim"))


@model.command()
@click.argument("name", required=False, metavar="[MODEL]")
@click.option("--dtype", help="auto, float32, bfloat16 or float16.")
@from_trust
@click.option("--method", help="A method of `editctl methods`.")
@click.option("--edits", type=click.IntRange(1), default=2000, help="Edits that memory and disk are told for.")
@from_corpus
@as_json
@click.pass_obj
def inspect(space: Workspace, /, name: str | None, edits: int, as_json: bool, **flags: Any) -> None:
    """Which modules of a model would be edited, and what that needs. Reads no weights."""
    from editctl import report
    from editctl.engine import cost, methods, source
    from editctl.events import header

    space = space.with_flags(model=name, **flags)
    config = space.config
    folder, base = space.source()
    described = source.configuration(folder)
    settings = methods.settings(described, config.method, config.settings)
    sketch = space.outline()
    blocks = [sketch.blocks[layer] for layer in settings.layers]
    hidden, key = blocks[0].weight.shape
    parameters = sum(p.numel() for p in sketch.net.parameters())
    measured = space.store().measured(base)
    shape = cost.Shape(len(sketch.blocks), hidden, key, sketch.net.config.get_text_config().vocab_size, 2 * parameters)
    needs = cost.state(shape, len(blocks), edits, settings)
    why = "set by --layers or settings" if "layers" in config.settings else methods.profile_of(described).why
    facts: dict[str, Any] = {
        "model": config.model,
        "architecture": type(sketch.net).__name__,
        "parameters": parameters,
        "blocks": len(sketch.blocks),
        "hidden": hidden,
        "layers": list(settings.layers),
        "why": why,
        "modules": [block.down_name for block in blocks],
        "key": key,
        "tied_head": bool(sketch.net.config.get_text_config().tie_word_embeddings),
        "method": settings.method,
        "edits": edits,
        "weights_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "projector_bytes": needs.projector,
        "history_bytes": needs.history,
        "factors_bytes": needs.factors,
        "masters_bytes": needs.masters,
        "moments_bytes": needs.moments,
        "held_bytes": needs.held,
        "reference_bytes": needs.reference,
        "cached": [{"layer": m["layer"], "seen": m["seen"], "corpus": m["corpus"]} for m in measured],
    }
    if as_json:
        click.echo(header())
        talk.line({"type": "model", **facts})
        return
    report.console().print(_facts_view(facts))


def _facts_view(facts: dict[str, Any]) -> Group:
    """A model and what editing it needs."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from editctl import report

    def size(name: str) -> str:
        value = facts[f"{name}_bytes"]
        return f"{value / 2**30:.2f} GB" if value >= 2**30 else f"{value / 2**20:.1f} MB"

    share = 100 * facts["held_bytes"] / facts["reference_bytes"]
    cached = ", ".join(f"block {m['layer']} ({m['seen']} tokens)" for m in facts["cached"]) or "none"
    rows = {
        "model": f"{facts['model']} ({facts['architecture']}), {facts['parameters'] / 1e6:,.1f} M parameters",
        "blocks": f"{facts['blocks']}, hidden width {facts['hidden']}",
        "edited": f"blocks {', '.join(map(str, facts['layers']))}: {facts['why']}",
        "modules": "\n".join(facts["modules"]),
        "matrices": f"{facts['hidden']} × {facts['key']} each, keys of width {facts['key']}",
        "head": "tied to the embedding" if facts["tied_head"] else "of its own",
        "second moments": f"{size('moments')} on disk; measured: {cached}",
        "weights": f"{size('weights')} on disk",
        "fp32 masters": size("masters"),
        f"for {facts['edits']} edits": (
            f"projector at most {size('projector')}, history {size('history')}; on disk keys, residuals and factors "
            f"{size('factors')}"
        ),
        "held in memory": f"{size('held')}, {share:.0f} % of the {size('reference')} that dense P and K_p K_pᵀ take",
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text("\n".join(map(report.safe, value.split("\n")))))
    return Group(table)
