"""Benchmarks of knowledge editing as specs, and specs as CounterFact.

Knows: the way in. Refuses: models, the store and the terminal.
"""
