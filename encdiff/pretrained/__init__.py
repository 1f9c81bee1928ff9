"""The models that come with the package, a folder each."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def names(kind: str | None = None) -> list[str]:
    """Of those of a kind, as their `config.json` has it: "fields", or None, an EncDiff's, which names none."""
    configs = sorted(FOLDER.glob("*/config.json"))
    return [path.parent.name for path in configs if json.loads(path.read_text("utf-8")).get("kind") == kind]
