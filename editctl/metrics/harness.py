"""General ability on the tasks others use: any task of lm-evaluation-harness, on the model that is loaded.

Protocol `lm-eval`: as the task's own configuration says, by the harness (Gao et al. 2024, the extra `eval`). Knows: how
a loaded model is handed to it and how its results become metrics. Refuses: to define tasks, and to run a task file
that nobody vouched for: its templates and functions are code.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from editctl.engine.model import Model
from editctl.errors import InvalidInput
from editctl.metrics.intervals import Z, wilson
from editctl.metrics.values import Metric
from editctl.spec import quoted, visible

HARNESS = "lm-eval"
"""The protocol."""
ROWS = 16
RESAMPLES = 1000
"""Of the bootstrap, for metrics without a formula for their standard error."""
_SHARES = ("acc", "acc_norm", "exact_match", "em")
"""Metrics that are shares of the documents."""


def harness(model: Model, task: str, *, limit: int | None = None, trusted: bool = False) -> tuple[Metric, ...]:
    """What the weights the model wears reach at a task or group of tasks.

    Args:
        task: a name the harness knows, or the path of a task file (.yaml).
        limit: documents of each task that are asked, from the first; None for all.
        trusted: a task file may be run.

    Returns:
        A metric named after the task for each of its own, whose axis is what the harness calls it; for a group those of
        the group. Shares have Wilson's interval, other values the normal one by the harness's standard error.

    Raises:
        InvalidInput: the extra is missing, there is no such task, its data cannot be reached, it may not be run, or it
            fails.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InvalidInput(
            f"task {quoted(task)} needs lm-evaluation-harness, which is not installed", "pip install 'editctl[eval]'"
        ) from None
    named = Path(task).suffix in (".yaml", ".yml")
    if named and not Path(task).is_file():
        raise InvalidInput(f"there is no task file {quoted(task)}", "give the path of a .yaml file, or a task's name")
    if named and not trusted:
        raise InvalidInput(
            f"the task file {quoted(task)} can run code, which is not done unless that is asked for",
            "read it, and if you trust it, pass --trust-remote-code",
        )
    with _apart(task):
        # Of its own tasks there are ten thousand files to look at.
        manager = TaskManager(include_defaults=not named)
        if not named and task not in manager.all_tasks:
            near = " or ".join(get_close_matches(task, manager.all_tasks, 3))
            hint = f"did you mean {near}?" if near else "`lm_eval ls tasks` lists them; a task file ends in .yaml"
            raise InvalidInput(f"lm-evaluation-harness knows no task {quoted(task)}", hint)
        # The harness gives its tokenizer a padding token.
        reader = HFLM(pretrained=model.net, tokenizer=copy.deepcopy(model.tokenizer), batch_size=ROWS)
        found = simple_evaluate(
            reader, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
        )
    return tuple(_metrics(found or {}))


@contextmanager
def _apart(task: str) -> Iterator[None]:
    """The harness's own prints go where talk goes; whatever it raises says which task it was about."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except InvalidInput:
        raise
    except Exception as error:  # tasks are code of others and raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvalidInput(
            f"task {quoted(task)} cannot be measured: {visible(reason)}",
            "check its configuration, and that its data are local or can be downloaded",
        ) from error


def _metrics(found: Mapping[str, Any]) -> Iterator[Metric]:
    """The harness's results as metrics: of groups where there are any, else of tasks."""
    counts: Mapping[str, Mapping[str, int]] = found.get("n-samples", {})
    for name, row in (found.get("groups") or found.get("results") or {}).items():
        n = int(row.get("sample_len") or counts.get(name, {}).get("effective", 0))
        higher = found.get("higher_is_better", {}).get(name, {})
        for key, value in row.items():
            kind, _, choice = key.partition(",")
            if not choice or kind.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            low, high = _interval(kind, value, n, row.get(f"{kind}_stderr,{choice}"))
            axis = kind if choice == "none" else f"{kind}, {choice}"
            # Perplexities and the like say themselves that lower is better.
            yield Metric(f"task {name}", HARNESS, float(value), n, higher.get(kind) is not False, axis, low, high)


def _interval(kind: str, value: float, n: int, error: object) -> tuple[float | None, float | None]:
    if kind in _SHARES and n and 0 <= value <= 1:
        return wilson(value * n, n)
    if isinstance(error, int | float):
        return value - Z * error, value + Z * error
    return None, None
