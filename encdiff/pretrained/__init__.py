"""The models that come with the package, a folder each."""

from pathlib import Path

FOLDER = Path(__file__).parent
