"""Controlled experiments as commands: each prints one table and says its protocol."""
