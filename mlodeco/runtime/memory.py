"""How much memory a run has taken."""

from __future__ import annotations

import sys

import torch

if sys.platform != "win32":
    import resource


def peak_memory(device: torch.device) -> int | None:
    """Bytes: on CUDA the most that tensors have taken, else the peak of the whole process.

    Waits for no device. None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
