"""Random programs raise nothing but the package's own exceptions; see fuzz_declarations."""

from collections import Counter

import pytest

from tests.fuzz_declarations import DEEP, attempt, no_waiting_for_the_disk

SEEDS = (1, 21, 32, 122, 143, 158, 170, 172, 201, 277, 300, 1069, 1076, 1140, 1187)
"""A few whose runs together take every part, as fuzz_declarations finds them."""


@pytest.fixture(scope="module")
def fuzzed():
    """How the uses of the programs ended, and the parts of the runs that were accepted."""
    found, used = Counter(), set()
    with no_waiting_for_the_disk():
        for seed in SEEDS:
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
    assert not DEEP - used
    for use in ("resumed run", "load", "hypergradient", "solve", "draw"):
        assert found[f"{use}: accepted"], use
    assert {"tune", "on", "validate"} <= {part.split()[0] for part in used}
