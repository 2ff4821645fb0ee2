"""What one micro-batch of a step is computed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Drawn:
    """The level's own batch, and the items of the sources that it reads by their names."""

    batch: Any
    sources: Mapping[str, Any] = field(default_factory=dict)
