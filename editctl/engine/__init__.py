"""The engine: a plan in, factors and answers out. The only part of editctl that loads torch."""
