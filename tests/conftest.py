"""Settings and fixtures of all tests: import paths, one thread per process, and the `cuda` mark."""

import importlib
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for child processes too; a fork would wait for its parent's threads

import pytest
import torch
import torch._dynamo  # Adam imports it, which takes seconds. Forked children inherit the import.

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "helpers")]
pytest.register_assert_rewrite("replay_oracle", "runs")

from runs import AGENTS, quick  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "test_training.py" not in item.nodeid)  # the longest first: all workers end together
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=AGENTS)
def agent(request):
    """Return the module of each script in turn."""
    return importlib.import_module(request.param)


@pytest.fixture
def quick_args(tmp_path, agent):
    """Return a function that makes the Args of a quick run of the script, in a folder of tmp_path."""
    return lambda **overrides: agent.Args(**quick(**{"runs_dir": str(tmp_path / "runs")} | overrides))
