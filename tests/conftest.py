"""Fixtures, and what holds for all tests: the paths, one thread a process, marks."""

import importlib
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # in child processes too; a fork would wait for its parent's threads

import pytest
import torch
import torch._dynamo  # Adam imports it, which takes seconds: here once, not in every child

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "helpers")]
pytest.register_assert_rewrite("replay_oracle", "runs")

from runs import AGENTS, quick  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=AGENTS)
def agent(request):
    """Each script in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def quick_args(tmp_path, agent):
    """Args of the script for a quick run below tmp_path."""
    return lambda **overrides: agent.Args(**quick(**{"runs_dir": str(tmp_path / "runs")} | overrides))
