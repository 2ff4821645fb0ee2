"""The checkpoints of one run: their names, the newest of them, and which are kept."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from mlodeco.runtime.checkpoint import folder

_NAME = re.compile(r"(best-)?(\d{9,})")


class Shelf:
    """The folder in which a run keeps its checkpoints.

    Args:
        path: that folder.
        keep: how many of the newest are kept, beside the best one.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self._path = path
        self._keep = keep

    def newest(self, tick: int) -> Path:
        """Where the checkpoint of a tick is."""
        return self._path / f"{tick:09d}"

    def best(self, tick: int) -> Path:
        """Where that of the best validation is."""
        return self._path / f"best-{tick:09d}"

    def found(self) -> list[Path]:
        """All that there are, the newest first."""
        if not self._path.is_dir():
            return []
        named = [(path, _NAME.fullmatch(path.name)) for path in self._path.iterdir()]
        known = [(int(match[2]), not match[1], path) for path, match in named if match]
        return [path for *_, path in sorted(known, reverse=True)]

    def tidy(self) -> None:
        """Deletes what runs that were killed have left half written or half deleted.

        A checkpoint that was about to be replaced gets its name back.

        Raises:
            OSError: the folder cannot be changed.
        """
        folder.recover(self._path)
        for path in self._path.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, paths: Collection[Path]) -> None:
        """Renames checkpoints that are of no use, which would be taken for the newest.

        Raises:
            OSError: they cannot be renamed.
        """
        for path in paths:
            aside = path.with_name(f"{path.name}.unusable")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def prune(self, best: Collection[Path | None]) -> None:
        """Deletes all but the newest, and of those of best validations all but these."""
        found = self.found()
        is_best = {path: path.name.startswith("best-") for path in found}
        newest = [path for path in found if not is_best[path]]
        for path in (*newest[self._keep :], *(p for p in found if is_best[p] and p not in best)):
            folder.remove(path)
