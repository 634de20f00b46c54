"""The built-in model: what it knows, how it was made, and its weights."""

from pathlib import Path

NAME = "atlas"
"""What a user writes to mean the built-in model."""

FOLDER = Path(__file__).parent / "weights"
"""An ordinary Hugging Face model folder."""
