"""Efficiency: what a version cost, from what its run recorded.

Protocol `recorded`: wall-clock seconds of the run by phase and its peak memory, as they stand with the version; bytes
of its own delta files. Knows: the division by edits. Refuses: to measure anything; times of other machines, or of a
machine that does other things, are no comparison.
"""

from __future__ import annotations

from collections.abc import Mapping

from editctl.metrics.values import Metric

RECORDED = "recorded"
"""The protocol."""
WRITING = ("target", "keys", "solve", "write")
"""The phases that write edits. The others measure, or are done once for many runs."""
SECONDS, MEMORY, DISK = "seconds an edit", "peak memory", "disk an edit"


def efficiency(seconds: Mapping[str, float], peak_mb: float, edits: int, size: int) -> tuple[Metric, ...]:
    """Seconds to write an edit, seconds of the whole run and by phase, peak memory in MB (2²⁰ bytes), bytes on disk.

    All but the memory are an edit's share.

    Args:
        seconds: by phase, of the whole run.
        edits: how many the run wrote; without any nothing is an edit's share, and only the memory is told.
        size: bytes of the delta files that the run wrote.

    Returns:
        Metrics without intervals: one run is one draw.
    """
    found = []
    if edits > 0 and seconds:
        writing = sum(seconds.get(phase, 0.0) for phase in WRITING)
        found.append(Metric(SECONDS, RECORDED, writing / edits, edits, False))
        found.append(Metric(SECONDS, RECORDED, sum(seconds.values()) / edits, edits, False, "whole run"))
        found += [Metric(SECONDS, RECORDED, spent / edits, edits, False, phase) for phase, spent in seconds.items()]
    if peak_mb > 0:
        found.append(Metric(MEMORY, RECORDED, peak_mb, 1, False))
    if edits > 0:
        found.append(Metric(DISK, RECORDED, size / edits, edits, False))
    return tuple(found)
