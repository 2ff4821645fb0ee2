"""The measurements of one workload."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks import products
from tests.benchmarks.agree import compare, difference, observe
from tests.benchmarks.case import Side
from tests.benchmarks.memory import measure_memory
from tests.benchmarks.peers import PEERS, UnsupportedError
from tests.benchmarks.results import Memory, Peer, Product, Result, Step
from tests.benchmarks.sides import LIBRARY, LOOP, make_side
from tests.benchmarks.timing import interleave
from tests.benchmarks.workloads import make


def measure_steps(workload: str, method: str, rounds: int, *, peers: bool) -> Iterator[Result]:
    """A tick of mlodeco, and of each peer if asked for, beside one of the hand-written loop."""
    agreement = compare(workload, method)
    sides: dict[str, Side] = {
        name: make_side(name, workload, method, make(workload)) for name in (LIBRARY, LOOP)
    }
    others = list(_peers(workload, method)) if peers else []
    for peer in others:
        if not peer.note:
            sides[peer.peer] = make_side(peer.peer, workload, method, make(workload))
    times = interleave({name: side.tick for name, side in sides.items()}, rounds)
    memory = Memory(*(measure_memory(name, workload, method) for name in (LIBRARY, LOOP)))
    ratio = times.ratio(LIBRARY, LOOP)
    yield Step(workload, method, times.milliseconds(LOOP), ratio, memory, agreement)
    for peer in others:
        time = None if peer.note else times.ratio(peer.peer, LOOP)
        yield Peer(workload, method, peer.peer, time, peer.error, peer.note)


def _peers(workload: str, method: str) -> Iterator[Peer]:
    """Which peers run at all, and how far they are from the loop."""
    reference, _ = observe(LOOP, workload, method)
    for name in PEERS:
        try:
            found, _ = observe(name, workload, method)
        except UnsupportedError:
            continue
        except Exception as error:  # whatever another library raises, the others go on
            note = f"{type(error).__name__}: {error}".splitlines()[0][:60]
            yield Peer(workload, method, name, note=note)
        else:
            yield Peer(workload, method, name, error=difference(found, reference))


def measure_products(workload: str, rounds: int) -> Iterator[Product]:
    """The pairs of modes that ``products.COMPARED`` names."""
    pairs = products.COMPARED[workload]
    calls = products.prepare(workload)
    times = interleave(calls, rounds)
    names = dict.fromkeys(name for mode, base, *_ in pairs for name in (mode, base))
    peak = {name: measure_memory("product", workload, name) for name in names}
    for mode, base, target, memory_target in pairs:
        yield Product(
            workload,
            mode,
            base,
            times.milliseconds(base),
            times.ratio(mode, base),
            Memory(peak[mode], peak[base]),
            target,
            memory_target,
        )
