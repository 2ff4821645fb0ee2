"""What one micro-batch of a step is computed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlodeco.calculus.subbatch import first_samples


@dataclass(frozen=True)
class Drawn:
    """The level's own batch, and the items of the sources that it reads by their names."""

    batch: Any
    sources: Mapping[str, Any] = field(default_factory=dict)

    def part(self, fraction: float, keys: Sequence[str]) -> Drawn | None:
        """The first samples of the batch, with the sources whole; None if it has no samples.

        Args:
            fraction: of the samples.
            keys: the names of the level's loaders, whose items are cut each by its own size.
        """
        if not keys or not isinstance(self.batch, Mapping):
            cut = first_samples(self.batch, fraction)
            return None if cut is None else replace(self, batch=cut)
        parts = {key: first_samples(item, fraction) for key, item in self.batch.items()}
        if all(part is None for part in parts.values()):
            return None
        whole = {key: self.batch[key] for key, part in parts.items() if part is None}
        return replace(self, batch=parts | whole)
