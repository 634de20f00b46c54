"""What the events of a run add up to: how far it is, what it is doing, what came of it.

Knows: the stages and their usual shares of the time. Refuses: clocks, processes, screens; it is given events and times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from editctl import events
from editctl.events import Event

SHARES = {"load": 6.0, "statistics": 12.0, "before": 3.0, "rebuild": 0.0, "edit": 12.0, "after": 4.0, "commit": 0.2}
"""Seconds of each stage where no run is known; only how they compare matters. From a run of 49 edits of atlas."""
NOTED = 500
"""Lines of talk that are kept."""


@dataclass
class Course:
    """A run, as far as its events tell."""

    steps: int = 25
    """Most steps of a batch of targets."""
    layers: int = 1
    """Layers that are written for a batch."""
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)
    """Seconds a stage is expected to take."""
    title: str = ""
    model: str = ""
    device: str = ""
    method: str = ""
    edits: int = 0
    batches: int = 0
    stage: str = "load"
    checking: bool = False
    """Whether what is beside the answers is being measured."""
    batch: int = 0
    done: int = 0
    total: int = 0
    step: int = 0
    active: int = 0
    """Targets of the batch that are not found yet."""
    losses: list[float] = field(default_factory=list)
    """Of the steps of all batches."""
    solved: int = 0
    """Layers written in the batch."""
    layer: int | None = None
    residual: float = 0.0
    memory: float = 0.0
    """MB"""
    talk: list[str] = field(default_factory=list)
    failed: list[events.GateFailed] = field(default_factory=list)
    made: events.VersionMade | None = None

    def feed(self, event: Event) -> None:
        """Take one more event in."""
        from editctl.report import event_line

        if isinstance(event, events.RunStarted):
            self.model, self.device, self.method = event.model, event.device, f"{event.method}, {event.dtype}"
            self.edits, self.batches = event.edits, event.batches
        elif isinstance(event, events.StageStarted):
            self.checking = event.stage == "checks"
            if not self.checking:
                # Checks are part of asking, before and after.
                self.stage, self.total, self.done = event.stage, event.total, 0
            if event.stage == "target":
                self.batch, self.step, self.solved = event.batch, 0, 0
        elif isinstance(event, events.Progress):
            self.done, self.total = event.done, event.total
        elif isinstance(event, events.TargetStep):
            self.step, self.active = event.step + 1, event.active
            self.losses.append(event.loss)
        elif isinstance(event, events.LayerSolved):
            self.layer, self.residual = event.layer, event.residual
            self.solved += 1
        elif isinstance(event, events.MemoryUsed):
            self.memory = event.mb
        elif isinstance(event, events.GateFailed):
            self.failed.append(event)
        elif isinstance(event, events.VersionMade):
            self.made, self.stage, self.memory = event, "commit", event.peak_mb
        if line := event_line(event):
            self.talk.append(line)
            del self.talk[:-NOTED]

    @property
    def doing(self) -> str:
        """The stage in words."""
        from editctl.report import TITLES

        stage = "checks" if self.checking else self.stage
        return TITLES.get(stage, stage)

    @property
    def edits_done(self) -> int:
        """Edits whose batch is written."""
        if self.made is not None or self.stage in ("after", "commit"):
            return self.edits
        if not self.batches or not self.batch:
            return 0
        whole = self.batch - 1 + (self.solved >= self.layers)
        return min(self.edits, self.edits * whole // self.batches)

    @property
    def fraction(self) -> float:
        """How much of the run is over, 0 to 1, judged by what the stages took before."""
        if self.made is not None:
            return 1.0
        order = list(SHARES)
        stage = "edit" if self.stage in ("target", "solve") else self.stage
        if stage not in order:
            return 0.0
        share = {name: max(self.shares.get(name, SHARES[name]), 0.0) for name in order}
        before = sum(share[name] for name in order[: order.index(stage)])
        within = self.done / self.total if self.total else 0.0
        if stage == "edit":
            of_batch = 0.8 * min(self.step / self.steps, 1.0) if not self.solved else 0.8
            of_batch += 0.2 * min(self.solved / self.layers, 1.0)
            within = (max(self.batch - 1, 0) + of_batch) / max(self.batches, 1)
        return min((before + share[stage] * within) / (sum(share.values()) or 1.0), 1.0)

    def left(self, elapsed: float) -> float | None:
        """Seconds that are still to come; None while that cannot be said."""
        part = self.fraction
        return elapsed * (1 - part) / part if part > 0.03 else None
