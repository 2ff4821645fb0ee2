import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors gain nothing from threads, and two workers would fight for the cores."""
    torch.set_num_threads(1)
