"""`scripts/benchmark.py` measures what the scripts do; `scripts/gpu_session.sh` goes on where a stage fails."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_emulation import Graph, emulated_cuda
from runs import HELPERS, ROOT

import rainbow_softmoe

GAME = "pixel_game:PixelCatch-v0"


def benchmark(folder, *flags):
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "--no-cuda", "--output", folder, *flags]
    path = {"PYTHONPATH": str(HELPERS)}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | path, cwd=folder)


def test_measures_every_part_and_draws(tmp_path):
    done = benchmark(tmp_path, "--quick", "--agents", "cql", "--updates", "4", "--env-id", GAME)
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    assert [(case["agent"], case["layer"], case["failure"]) for case in cases] == [
        ("dqn", "dense", ""),
        ("cql", "softmoe", ""),
    ]
    assert set(cases[0]["parts"]) == {"update", "draw", "act", "store", "emulation"}
    assert set(cases[1]["parts"]) == {"update", "draw"}
    for case in cases:
        assert len(case["rates"]) == 1 and case["parameters"] > 10_000 and case["gigabytes"] > 0.1
        # A round takes its parts' time, and the loop's own: neither less nor ten times as much.
        parts = sum(case["parts"][name][0] * case["calls"][name] for name in case["parts"])
        assert 0.5 * parts < 1 / case["rates"][0] < 10 * parts
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_says_what_it_could_not_measure(tmp_path):
    done = benchmark(tmp_path, "--agents", "dqn", "--layers", "dense", "--no-extras", "--env-id", "NoGame-v0")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("not measured: DQN ")]
    assert len(lines) == 2 and all("NoGame" in line for line in lines)


def test_parts_are_captured_where_the_script_captures():
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts" / "benchmark.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    args = rainbow_softmoe.Args(encoder="nature", expert_hidden_dim=16, buffer_size=400, compile=False)
    envs = SimpleNamespace(frame_shape=(20, 20), num_actions=3, reset=int, send=lambda action: None, recv=tuple)
    with emulated_cuda():
        agent, flags = rainbow_softmoe.Agent(args, envs), np.zeros(4, bool)
        for _ in range(20):
            agent.replay.add(np.zeros((4, 20, 20), np.uint8), np.zeros(4, int), np.zeros(4), flags, flags)
        parts, calls = module.parts_of(rainbow_softmoe, agent, envs)
        for function in [*parts.values()] * 12:
            function()
        assert Graph.replays == 2 * 5  # of all but emulation, after ten calls each
    assert calls == {"update": 0.25, "draw": 0.25, "priorities": 0.25, "act": 0.25, "store": 0.25, "emulation": 0.25}


@pytest.mark.parametrize("given, code", [([], 1), (["tests", "no-stage"], 2)])
def test_a_gpu_session_goes_on_after_a_failure(tmp_path, given, code):
    for name in ("python", "pytest"):
        (tmp_path / name).write_text('#!/bin/sh\n[ "$1" = -c ] && echo 2 || { echo no GPU >&2; exit 3; }\n')
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    done = subprocess.run([ROOT / "scripts/gpu_session.sh", "--quick", *given], env=os.environ | settings)
    assert done.returncode == code and (tmp_path / "out").exists() == (code == 1)
    if code == 1:
        status = (tmp_path / "out" / "status.txt").read_text().splitlines()
        assert [line.split(":")[0] for line in status] == ["tests", "graphs", "benchmark", "drq_eps"]
        assert not any("exit code 0" in line for line in status)
        assert "no GPU" in (tmp_path / "out" / "drq_eps.log").read_text()
