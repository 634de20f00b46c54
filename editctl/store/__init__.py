"""The record of what was done: versions, operations, metrics, answers, events, and the lock.

Knows: the only SQL of the project, one SQLite file in WAL mode, so readers never wait for a writer; and who may write.
Refuses: to change or forget a version once committed, to let two processes write, tensors, models, terminals.
"""

from editctl.store.connection import user_at_host, utc_now
from editctl.store.records import BASE, CANDIDATE, Draft, Evidence, Fault, LiveEdit, Operation, Stored, Version, View
from editctl.store.store import Store

__all__ = [
    "BASE",
    "CANDIDATE",
    "Draft",
    "Evidence",
    "Fault",
    "LiveEdit",
    "Operation",
    "Store",
    "Stored",
    "Version",
    "View",
    "user_at_host",
    "utc_now",
]
