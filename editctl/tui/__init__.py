"""The terminal UI: places over the same core as the command line; one file a place, its .tcss beside it.

Knows: what is shown and which key does what. Refuses: torch, SQL, computing; the engine works in child processes that
are commands of the command line, and tells its events through their output.
"""
