"""Random declarations raise nothing but the package's own exceptions; see fuzz_declarations."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_declarations import attempt


@settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.randoms(use_true_random=False))
def test_random_declarations_raise_nothing_foreign(random):
    foreign = [key for key in attempt(random) if key.startswith("foreign")]
    assert not foreign, "\n".join(foreign)
