import os
import uuid

import pytest
from fsspec.implementations.memory import MemoryFileSystem

# One thread: the suite shares two cores with the workers that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def memory():
    """URL of an empty folder that only this process sees."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
