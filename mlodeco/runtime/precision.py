"""In which precision each level's passes are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import torch
from accelerate import Accelerator

from mlodeco.errors import ModuleError, RunError, did_you_mean, quoted

if TYPE_CHECKING:
    from mlodeco.runtime.build import BuiltLevel

MIXED: Final = ("no", "bf16", "fp16")
"""What ``mixed_precision=`` may be."""

_DTYPES: Final[dict[str, torch.dtype | None]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "no": None,
}


def choose_precision(given: Any, accelerator: Accelerator, *, is_own: bool) -> str:
    """The precision of a run: the one given, else the Accelerator's.

    Args:
        given: what ``mixed_precision=`` was.
        accelerator: the run's.
        is_own: whether it was given too, so that the two must agree.

    Raises:
        RunError: there is no such precision here, or they contradict each other.
    """
    theirs = str(accelerator.mixed_precision)
    if given is not None and given not in MIXED:
        raise _refusal(given, "run(mixed_precision='bf16'), for instance.")
    if is_own and given is not None and given != theirs:
        raise RunError(
            f"mixed_precision={given!r}, and the Accelerator's is {theirs!r}.",
            expected="one of them, or both alike.",
            remedy=f"leave mixed_precision out, or pass Accelerator(mixed_precision={given!r}).",
        )
    if given is None and theirs not in MIXED:
        raise _refusal(theirs, "make the Accelerator, or launch, with one of them.")
    return theirs if given is None else str(given)


def _refusal(found: Any, remedy: str) -> RunError:
    hint = did_you_mean(found, MIXED) if isinstance(found, str) else ""
    return RunError(
        f"mixed_precision={found!r}.",
        expected=f"one of {quoted(MIXED)}; fp8 is not available."
        if found == "fp8"
        else f"one of {quoted(MIXED)}.",
        remedy=f"{remedy}{hint}",
    )


def dtype_of(precision: str) -> torch.dtype | None:
    """That of autocast; float32 for none at all, None for things as they are."""
    return _DTYPES[precision]


def set_precision(levels: Iterable[BuiltLevel], precision: str) -> None:
    """Sets the precision of each level's passes: its own, else the one given.

    Raises:
        ModuleError: float16 by autocast on parameters that are in float16 themselves, or sharded.
    """
    for level in levels:
        level.loss.dtype = dtype_of(level.declaration.precision or precision)
        if not level.loss.is_half:
            continue
        if level.is_sharded:
            raise ModuleError(
                "the level runs in fp16, and its module is sharded.",
                expected="bf16 or fp32 for sharded levels, whose losses are not scaled.",
                remedy="set precision='bf16' for the level.",
                level=level.name,
                site=level.site,
            )
        narrow = [key for key, p in level.parameters.items() if p.dtype is torch.float16]
        if narrow:
            raise ModuleError(
                f"the level runs in fp16, and its parameters {quoted(narrow[:3])} are in float16.",
                expected="parameters in float32, which autocast casts in each pass: steps in "
                "float16 would lose small changes, and gradients cannot be unscaled in it.",
                remedy="leave .half() out, or set precision='fp32' for the level.",
                level=level.name,
                site=level.site,
            )
