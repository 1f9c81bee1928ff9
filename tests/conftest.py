"""Every test runs offline, from a seed of its own, and on one thread where workers share the machine."""

import os
import random
from zlib import crc32

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub and matplotlib read them
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("ENCDIFF_IMPL", None)  # a user's settings must not decide what is tested
os.environ.pop("ENCDIFF_DATA", None)

import numpy as np
import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

settings.register_profile("encdiff", deadline=None)  # a busy machine is not a failure
settings.load_profile("encdiff")


@pytest.fixture(autouse=True)
def seeds(request) -> None:
    """Seed the global generators from the test's name: the same draws in any order, alone or together."""
    seed = crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
