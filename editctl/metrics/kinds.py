"""What causal tracing restores, and how often.

Knows: names and a number, so that the command line starts fast. Refuses: everything else; `effects` has it.
"""

STATE, MLP, ATTENTION = KINDS = ("state", "mlp", "attention")
"""What can be restored: a block's output at one token, or what the MLPs or attention of a window of blocks write."""
SAMPLES = 10
"""Draws of noise that p(corrupted) and p(restored) are means over."""
