"""How much memory a run has taken."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: on CUDA the most that tensors have taken, else the peak of the whole process.

    Waits for no device. None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_of_process()


def peak_of_process() -> int | None:
    """The largest resident memory so far, in bytes; None where the system does not tell."""
    if _STATUS.exists():
        # not getrusage: what a process is started by counts there
        lines = _STATUS.read_text().splitlines()
        return next((1024 * int(s.split()[1]) for s in lines if s.startswith("VmHWM:")), None)
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
