"""Rows of things side by side, joined to the rows above and below: their order and their place.

The layered layout of Sugiyama, Tagawa and Toda (1981): what is side by side is first ordered so
that few lines cross, then placed so that lines are straight.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

GAP: Final = 14.0
"""The least room between two slots of a row."""

_ORDERINGS: Final = 12
_PLACINGS: Final = 150
_SLACK: Final = (40.0, 0.97)
"""Where the slack begins, and what becomes of it at each turn."""
_IDLE: Final = 1e-3
"""The weight of a slot that no line pulls at."""


@dataclass(eq=False)
class Link:
    """A piece of a line from a slot to one of the row above.

    Attributes:
        low: the lower slot.
        high: the upper one.
        weight: how much it matters that the piece is straight.
        low_port: where it leaves the lower slot, from the middle of this.
        high_port: the same at the upper one.
    """

    low: Slot
    high: Slot
    weight: float
    low_port: float = 0.0
    high_port: float = 0.0

    def __post_init__(self) -> None:
        self.low.above.append(self)
        self.high.below.append(self)

    @property
    def start(self) -> float:
        """Where it leaves."""
        return self.low.x + self.low_port

    @property
    def end(self) -> float:
        """Where it arrives."""
        return self.high.x + self.high_port

    def pull(self, slack: float) -> float:
        """Its weight in least squares that amount to least absolute shifts, beyond the slack."""
        return self.weight / (abs(self.end - self.start) + slack)


@dataclass(eq=False)
class Slot:
    """Room in a row, for a box, a text or a line that passes.

    Attributes:
        width: what it takes up.
        x: its middle, once it is placed.
        rank: its number in the row.
        below: links to the row below.
        above: links to the row above.
    """

    width: float = 0.0
    x: float = 0.0
    rank: int = 0
    below: list[Link] = field(default_factory=list)
    above: list[Link] = field(default_factory=list)

    def ranks_below(self) -> list[int]:
        """The ranks of its neighbours in the row below."""
        return [link.low.rank for link in self.below]

    def ranks_above(self) -> list[int]:
        """The ranks of its neighbours in the row above."""
        return [link.high.rank for link in self.above]


Rows = list[list[Slot]]


def order_rows(rows: Rows) -> None:
    """Orders each row so that few lines cross; the best of some sweeps up and down.

    A sweep sorts each row by the mean rank of the neighbours in the row before, then swaps
    neighbours as long as it helps.
    """
    for row in rows:
        _number(row)
    best, fewest = [list(row) for row in rows], count_crossings(rows)
    for sweep in range(_ORDERINGS):
        if not fewest:
            break
        is_upwards = sweep % 2 == 0
        for row in rows[1:] if is_upwards else rows[-2::-1]:
            row.sort(key=_mean_below if is_upwards else _mean_above)
            _number(row)
        for row in rows:
            _swap_neighbours(row)
        crossings = count_crossings(rows)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    for row, found in zip(rows, best, strict=True):
        row[:] = found
        _number(row)


def count_crossings(rows: Rows) -> int:
    """How many pairs of links cross."""
    return sum(
        _inversions([rank for slot in row for rank in sorted(slot.ranks_above())]) for row in rows
    )


def place_rows(rows: Rows) -> None:
    """Gives each slot its ``x``, with at least :data:`GAP` between two of a row.

    Makes the sum of ``weight |end - start|`` over all links small, by least squares whose
    weights are made anew, row by row in turn: lines bend where it matters least.
    """
    for row in rows:
        for left, right in pairwise(row):
            right.x = left.x + _distance(left, right)
        middle = row[-1].x / 2
        for slot in row:
            slot.x -= middle
    slack, factor = _SLACK
    for sweep in range(_PLACINGS):
        for row in rows if sweep % 2 else reversed(rows):
            _place(row, slack * factor**sweep)


def _number(row: Sequence[Slot]) -> None:
    for rank, slot in enumerate(row):
        slot.rank = rank


def _mean_below(slot: Slot) -> float:
    return _mean(slot.ranks_below(), slot.rank)


def _mean_above(slot: Slot) -> float:
    return _mean(slot.ranks_above(), slot.rank)


def _mean(ranks: Sequence[int], default: float) -> float:
    return sum(ranks) / len(ranks) if ranks else default


def _swap_neighbours(row: list[Slot]) -> None:
    for n in range(len(row) - 1):
        left, right = row[n], row[n + 1]
        if _crossings(right, left) < _crossings(left, right):
            row[n : n + 2] = right, left
    _number(row)


def _crossings(left: Slot, right: Slot) -> int:
    """How many links of two slots cross if they stand so."""
    sides = (left.ranks_below(), right.ranks_below()), (left.ranks_above(), right.ranks_above())
    return sum(a > b for ranks, others in sides for a in ranks for b in others)


def _inversions(numbers: Sequence[int]) -> int:
    seen: list[int] = []
    found = 0
    for number in numbers:
        found += len(seen) - bisect_right(seen, number)
        insort(seen, number)
    return found


def _distance(left: Slot, right: Slot) -> float:
    return (left.width + right.width) / 2 + GAP


def _place(row: Sequence[Slot], slack: float) -> None:
    """The weighted least squares of a row, the others as they are.

    Less the room that those on the left take up, the places only have to rise: isotonic
    regression, by pooling adjacent violators.
    """
    pools: list[tuple[float, float, int]] = []
    room = [0.0]
    for left, right in pairwise(row):
        room.append(room[-1] + _distance(left, right))
    for slot, taken in zip(row, room, strict=True):
        wanted, weight = _wanted(slot, slack)
        pool = (wanted - taken, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            before = pools.pop()
            total = before[1] + pool[1]
            mean = (before[0] * before[1] + pool[0] * pool[1]) / total
            pool = (mean, total, before[2] + pool[2])
        pools.append(pool)
    places = [mean for mean, _, count in pools for _ in range(count)]
    for slot, place, taken in zip(row, places, room, strict=True):
        slot.x = place + taken


def _wanted(slot: Slot, slack: float) -> tuple[float, float]:
    """Where the links of a slot are straight on average, and their pull."""
    pulls = [(link.start - link.high_port, link.pull(slack)) for link in slot.below]
    pulls += [(link.end - link.low_port, link.pull(slack)) for link in slot.above]
    total = sum(weight for _, weight in pulls)
    if not total:
        return slot.x, _IDLE
    return sum(x * weight for x, weight in pulls) / total, total
