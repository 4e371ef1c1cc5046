"""Figures on disk, a file a data set, so that what was measured of a model is not measured again."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from scaleclip.evaluation.results import Figure
from scaleclip.files import write_atomic


class SavedFigures:
    """The figures of one model in a folder.

    Args:
        folder: made when something is saved.
        identity: what the model's weights are; figures of others are none.
        step: optimizer steps of a checkpoint, for readers; None for models from elsewhere.
    """

    def __init__(self, folder: Path, identity: str, step: int | None) -> None:
        self.folder, self._identity, self._step = folder, identity, step

    def find(self, name: str, definition: str) -> list[Figure] | None:
        """What was saved of an evaluation; None where nothing was, or of other weights or by another definition."""
        path = self.path(name)
        if not path.exists():
            return None
        tree = json.loads(path.read_text())
        return _figures(tree) if tree["of"] == self._digest(definition) else None

    def save(self, name: str, definition: str, figures: Sequence[Figure]) -> None:
        """Keep the figures of an evaluation."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [figure._asdict() for figure in figures]
        tree = {"evaluation": name, "step": self._step, "weights": self._identity, "of": self._digest(definition)}
        write_atomic(self.path(name), json.dumps(tree | {"figures": rows}, indent=2))

    def path(self, name: str) -> Path:
        """Of an evaluation's file."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-')}.json"

    def features(self, name: str) -> Path:
        """Folder for what an evaluation has encoded, until its figures are saved."""
        return self.path(name).with_suffix(".features")

    def _digest(self, definition: str) -> str:
        return hashlib.sha256(f"{self._identity}\n{definition}".encode()).hexdigest()[:16]


def read_saved(folder: Path, identity: str) -> list[Figure]:
    """Every figure of these weights in such a folder, by file name."""
    trees = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [figure for tree in trees if tree["weights"] == identity for figure in _figures(tree)]


def _figures(tree: dict[str, list[dict[str, object]]]) -> list[Figure]:
    return [Figure(**row) for row in tree["figures"]]  # type: ignore[arg-type]
