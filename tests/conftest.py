"""What has to be settled before any test imports torch, Triton or transformers."""

import os
from pathlib import Path

import pytest

HAS_GPU = os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(
    Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
)

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of one
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")  # torch's threads; tiny models gain nothing from more


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not HAS_GPU:
        pytest.skip("needs a GPU")
