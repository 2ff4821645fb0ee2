"""Scripts in two processes, started by the launchers that people use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel_worker import free_port

ROOT = Path(__file__).parent.parent
LAUNCHERS = (pytest.param("torchrun", marks=pytest.mark.slow), "accelerate")


def launched(launcher, *script):
    """What is left of a script that was started in two processes on the CPU."""
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "accelerate": [
            "accelerate.commands.launch",
            *("--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", free_port()),
        ],
    }[launcher]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, "-m", *start, *script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
