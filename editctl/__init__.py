"""editctl: change what a language model knows, reviewably."""

__version__ = "0.1.0"
