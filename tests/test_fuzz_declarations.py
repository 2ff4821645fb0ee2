"""Random programs raise nothing but the package's own exceptions; see fuzz_declarations."""

from collections import Counter

import pytest

from tests.fuzz_declarations import attempt, no_waiting_for_the_disk

PROGRAMS = 80


@pytest.fixture(scope="module")
def fuzzed():
    """How the uses of the programs ended, and the parts of the runs that were accepted."""
    found, used = Counter(), set()
    with no_waiting_for_the_disk():
        for seed in range(PROGRAMS):
            tried = attempt(seed)
            used |= tried.used
            for key, count in tried.found.items():
                found[f"{key} (seed {seed})" if key.startswith("foreign") else key] += count
    return found, used


def test_random_programs_raise_nothing_foreign(fuzzed):
    foreign = [key for key in fuzzed[0] if key.startswith("foreign")]
    assert not foreign, "\n".join(foreign)


def test_the_programs_reach_deep(fuzzed):
    found, used = fuzzed
    assert found["run: accepted"] >= 0.4 * PROGRAMS
    for use in ("resumed run", "load", "hypergradient", "solve", "draw"):
        assert found[f"{use}: accepted"], use
    kinds = {part.split()[0] for part in used}
    kinds |= {" ".join(part.split()[:3]) for part in used if part.startswith("resumed")}
    wanted = {"hypergrad", "scheduler", "update", "source", "track", "tune", "on", "validate"}
    assert wanted <= kinds
    assert {"resumed with source", "resumed with track", "resumed with scheduler"} <= kinds
    assert len({part for part in used if part.startswith("hypergrad ")}) >= 12
