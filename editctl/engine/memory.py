"""Work in chunks that shrink by themselves when memory runs out.

Knows: what running out of memory looks like on each device. Refuses: to know the work.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from editctl.errors import ModelError
from editctl.events import Emit, Note

T = TypeVar("T")
R = TypeVar("R")
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on CUDA, MPS or the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def in_chunks(
    items: Sequence[T], size: int, work: Callable[[Sequence[T]], Sequence[R]], emit: Emit, what: str
) -> list[R]:
    """`work` on at most `size` items at once, on half as many when memory runs out; the results in order.

    The items must not influence each other, so the result does not depend on the size.

    Raises:
        ModelError: memory runs out for a single item.
    """
    results: list[R] = []
    while len(results) < len(items):
        part = items[len(results) : len(results) + size]
        try:
            results += work(part)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
        else:
            continue
        # Outside the handler, so that the failed pass's tensors are no longer held by its traceback.
        if len(part) == 1:
            raise ModelError(f"memory ran out for one of the {what} alone: {reason}", "use a smaller dtype or device")
        size = (len(part) + 1) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        emit(Note(f"memory ran out; going on with {size} {what} at once"))
    return results
