"""Fixtures: the scripts on the path, small arguments for quick runs, what a run left behind."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def quick(**overrides) -> dict:
    """Arguments of a run on the pixel game that takes about a second."""
    small = {"env_id": "pixel_game:PixelCatch-v0", "encoder": "nature", "num_experts": 2, "expert_hidden_dim": 16}
    small |= {"total_timesteps": 600, "learning_starts": 200, "buffer_size": 1000, "target_network_frequency": 100}
    small |= {"log_every": 100, "iteration_steps": 200, "eval_episodes": 2, "cuda": False}
    return small | overrides


AGENTS = ["dqn_softmoe", "rainbow_softmoe", "der_softmoe"]


@pytest.fixture(params=AGENTS)
def agent(request):
    """Each script in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def quick_args(tmp_path, agent):
    """Args of the script for a quick run below tmp_path."""
    return lambda **overrides: agent.Args(**quick(**{"runs_dir": str(tmp_path / "runs")} | overrides))


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def only_run(runs_dir: Path) -> Path:
    (run_dir,) = Path(runs_dir).iterdir()
    return run_dir
