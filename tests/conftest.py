import os
import warnings

import pytest
import torch
from hypothesis import settings

settings.register_profile("flexsparse", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("flexsparse")


@pytest.fixture(autouse=True, scope="session")
def cores_shared_by_workers():
    """Threads that wait for each other on too few cores are many times slower."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """New memory holds NaN (or the largest integer), so that unwritten output cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
