"""Sharded levels: the numbers of whole ones, nothing left of what was gathered, and refusals."""

from __future__ import annotations

import pytest
import torch

from tests.sharded_worker import BESIDE_WHOLE, CASES, ONCE, UNEQUAL, train
from tests.test_parallel import distance, finish, free_port, left, place, start

pytestmark = pytest.mark.slow

IN_PLACE = {name for name in CASES if "difference" in name or "in place" in name} | {
    "rollback",
    "source",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes have found."""
    out = tmp_path_factory.mktemp("sharded")
    port, worker = free_port(), "tests.sharded_worker"
    started = [start(out, "", worker, **place(rank, 2, port)) for rank in range(2)]
    printed = finish(started)
    found = left(out)
    assert None not in found, "\n".join(printed)
    return found


BOUNDS = {"single precision": 1e-7, "bf16": 1e-5, "bf16, in place": 1e-3}


@pytest.mark.parametrize("case", BESIDE_WHOLE)
def test_sharded_levels_are_trained_as_whole_ones(case, both):
    first, second = (found[case] for found in both)
    assert distance(first["sharded"]["state"], second["sharded"]["state"]) == 0.0
    bound = BOUNDS.get(case, 1e-9)
    assert distance(first["whole"]["state"], first["sharded"]["state"]) < bound
    assert first["sharded"]["norms"] == pytest.approx(first["whole"]["norms"], abs=10 * bound)
    assert first["sharded"]["losses"] == second["sharded"]["losses"]
    for name, losses in first["whole"]["losses"].items():
        assert first["sharded"]["losses"][name] == pytest.approx(losses, abs=bound)


@pytest.mark.parametrize("case", [name for name in CASES if name not in UNEQUAL])
@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_two_processes_with_shards_are_one_with_the_whole_batch(case, both):
    assert distance(train(case, 1)["state"], both[0][case]["sharded"]["state"]) < 1e-8


@pytest.mark.parametrize("case", CASES)
def test_differences_gather_nothing(case, both):
    for found in both:
        assert (found[case]["sharded"]["gathers"] == 0) == (case in IN_PLACE)


def test_no_whole_copy_is_left_behind_a_hypergradient(both):
    for found in both:
        assert found["survivors"] == [[]] * 4


@pytest.mark.parametrize("case", ONCE)
def test_one_mean_of_results_suffices_where_asked_for(case, both):
    first, second = (found["once"] for found in both)
    whole, sharded = first[case, "whole"], first[case, "sharded"]
    assert distance(whole["state"], sharded["state"]) < 1e-9
    assert distance(sharded["state"], second[case, "sharded"]["state"]) == 0.0
    assert sharded["gathers"] > 0  # also for differences: each process solves by itself


def test_functional_hypergradients_are_those_of_each_process_by_itself(both):
    for found in (found["compared"] for found in both):
        whole, sharded = (found[kind]["hypergradients"] for kind in ("whole", "sharded"))
        assert distance(whole, sharded) < 1e-9
    first, second = (found["compared"]["sharded"]["hypergradients"] for found in both)
    assert distance(first, second) > 1e-2


def test_checks_differ_between_processes_and_gather_once(both):
    first, second = (found["compared"]["sharded"] for found in both)
    assert "no knob needs a turn" in first["report"]
    assert "in place of" in second["report"]  # found by more sweeps
    for found in (found["compared"] for found in both):
        assert found["sharded"]["report"] == found["whole"]["report"]
        assert found["sharded"]["gathers"] == 2  # a weight and a bias


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_the_command_checks_in_all_processes_and_prints_in_the_first(kind, both):
    first, second = (found["command"][kind] for found in both)
    assert "hypergradient of 'top' against the converged one" in first
    assert second == ""


@pytest.mark.parametrize("way", ["gathered", "in place"])
def test_a_hypergradient_changes_no_bit_also_if_it_raises(way, both):
    for found in (found["purity"][way] for found in both):
        assert found["message"] == "words of my own"
        for after in (found["after"], found["raised"]):
            assert after.keys() == found["before"].keys()
            assert all(torch.equal(after[key], found["before"][key]) for key in after)
        assert all(torch.equal(found["again"][k], found["gradient"][k]) for k in found["gradient"])
        assert all(float(t.abs().max()) > 0.0 for t in found["gradient"].values())


def test_validations_and_hooks_see_the_same(both):
    for found in (found["looks"] for found in both):
        whole, sharded = found["whole"], found["sharded"]
        assert sharded["seen"] == pytest.approx(whole["seen"], abs=1e-9)
        for one, other in zip(sharded["metrics"], whole["metrics"], strict=True):
            assert one == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("form", ["factory", "instance"])
def test_an_accelerator_with_a_plugin_shards_the_leaves(form, both):
    for found in both:
        prepared = found["prepared"][form]
        assert prepared["kinds"] == {"DTensor"}
        assert prepared["units"] == 2  # the first layer by its size, and the rest
        assert prepared["top"] == "Parameter"
        assert distance(prepared["state"], prepared["whole"]) < 1e-9


WORDS = {
    "unroll": "MethodError: level 'low' .* a tape would hold whole copies",
    "replicas": "ModuleError: level 'low' .* the level has replicas=",
    "upper": r"ModuleError: level 'top' .* the level has lower=\['low'\]",
    "start": "ModuleError: level 'low' .* the level has init_from=",
    "shared": "ModuleError: level 'a' .* 'b' optimizes a part of it",
    "rule": "ModuleError: level 'low' .* the level has an @update rule",
    "decay": "LossError: level 'low' .* the loss is computed from shards",
    "method": "mixed torch.Tensor and DTensor.*register_fsdp_forward_method",
    "half": "ModuleError: level 'low' .* runs in fp16, and its module is sharded",
    "offload": "ModuleError: level 'low' .* sharded with CPUOffloadPolicy",
    "divided": "OptimizerError: level 'low' .* sharded",
    "solve": "RunError: level 'low' .* the module of 'low' is sharded",
}


@pytest.mark.parametrize("case", WORDS)
def test_what_cannot_be_sharded_is_refused(case, both):
    for found in both:
        assert list(found["refused"]) == list(WORDS)
        with pytest.raises(RuntimeError, match=f"(?s){WORDS[case]}"):
            raise RuntimeError(found["refused"][case])


@pytest.mark.parametrize("option", ["fsdp_version", "activation_checkpointing", "cpu_offload"])
def test_plugins_of_other_kinds_are_refused(option, both):
    for found in both:
        assert f"an FSDP plugin with {option}" in found["prepared"][option]
        assert "params= holds parameters" in found["prepared"]["params"]


def test_a_process_that_waits_for_a_gather_learns_why_it_does_not_come(both):
    first, second = (found["failing"] for found in both)
    assert second.startswith("ValueError: words of my own")
    assert first.startswith("RunError: process 1 ended with ValueError: words of my own")
