"""The Accelerator of a run, as the launcher of its processes needs it."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from mlodeco.errors import RunError
from mlodeco.runtime.sharding import check_plugin

_AVAILABLE = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
)

_REMEDIES = {
    DistributedType.DEEPSPEED: "DeepSpeed takes one model with one optimizer, and a program has "
    "several. Launch plain processes: accelerate launch --multi_gpu, or torchrun. To share out an "
    "optimizer's state give optimizer=partial(ZeroRedundancyOptimizer, optimizer_class=Adam, "
    "lr=...); to share out parameters, FSDP2.",
    DistributedType.MEGATRON_LM: "Megatron-LM brings a training loop of its own. Launch plain "
    "processes: accelerate launch --multi_gpu, or torchrun.",
}


def make_accelerator(given: Accelerator | None, **options: Any) -> Accelerator:
    """The one given, else a new one for all processes that were launched.

    Args:
        given: the one given.
        options: of a new one.

    Raises:
        RunError: it is none, sees fewer processes, or asks for what is not available.
    """
    if given is not None and not isinstance(given, Accelerator):
        raise RunError(
            f"accelerator={given!r} is not an Accelerator.",
            remedy="pass an accelerate.Accelerator, or leave it out.",
        )
    accelerator = _new(options) if given is None else given
    _check(accelerator)
    return accelerator


def launched_count() -> int:
    """How many processes torchrun or accelerate has started."""
    found = os.environ.get("WORLD_SIZE", "1")
    return int(found) if found.isdecimal() else 1


def launched_rank() -> int:
    """Which of the processes that torchrun or accelerate has started this one is."""
    found = os.environ.get("RANK", "0")
    return int(found) if found.isdecimal() else 0


def _refuse_asked_for() -> None:
    """Refuses what accelerate launch was asked for, before it is looked for in vain."""
    asked = {
        "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
        "ACCELERATE_USE_MEGATRON_LM": DistributedType.MEGATRON_LM,
    }
    for name, kind in asked.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise _unavailable(kind)


def _unavailable(kind: DistributedType) -> RunError:
    return RunError(
        f"an Accelerator of the kind {kind.value} is not available in this version.",
        expected="data parallel processes, on CPUs or one GPU each, or FSDP2.",
        remedy=_REMEDIES.get(kind, "launch with accelerate launch --multi_gpu, or torchrun."),
    )


def _new(options: dict[str, Any]) -> Accelerator:
    _refuse_asked_for()
    # without a GPU and without being told, accelerate forms no group of processes
    needs_cpu = launched_count() > 1 and not torch.cuda.is_available()
    try:
        return Accelerator(cpu=needs_cpu, **options)
    except (ValueError, RuntimeError, ImportError) as error:
        raise RunError(
            f"no Accelerator for {launched_count()} processes can be made: {error}",
            remedy="look into the options of accelerate launch (FSDP needs GPUs and --fsdp_version "
            "2); make no Accelerator before the run, or one with cpu=True where there is no GPU.",
        ) from error


def _check(accelerator: Accelerator) -> None:
    seen, launched = accelerator.num_processes, launched_count()
    if seen != launched:
        raise RunError(
            f"the Accelerator sees {seen} of the {launched} processes that were launched "
            "(WORLD_SIZE).",
            remedy="start the script with torchrun or accelerate launch, and without a GPU pass "
            "Accelerator(cpu=True), or none.",
        )
    kind = accelerator.distributed_type
    if kind not in _AVAILABLE:
        raise _unavailable(kind)
    check_plugin(accelerator)
    _check_idle_options(accelerator)


def _check_idle_options(accelerator: Accelerator) -> None:
    """Refuses options of loops and loaders that a run does by itself, or not at all."""
    if accelerator.gradient_accumulation_steps != 1:
        raise RunError(
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps} of the "
            "Accelerator is for loops written by hand.",
            expected="1.",
            remedy="write @level(..., accumulate=...), for each level its own.",
        )
    if accelerator.num_processes > 1 and (
        accelerator.split_batches or accelerator.dispatch_batches
    ):
        raise RunError(
            "split_batches and dispatch_batches of the Accelerator are not available.",
            expected="batch sizes that are those of each process.",
            remedy="divide the batch sizes by the number of processes, and leave both options out.",
        )
