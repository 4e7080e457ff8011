"""Tests of whole training runs: learning, output files, signals, and resuming after a kill bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    AGENTS,
    ROOT,
    Child,
    assert_same_outcome,
    at_call,
    checkpoint,
    files,
    notes,
    only_run,
    quick,
    read_csv,
    same,
    scalars,
    wait_for,
)

import der_softmoe
import dqn_softmoe
import rainbow_softmoe

# Arguments with which each agent learns the pixel game. The best return is 4, and standing still gets about -2.7.
DQN = {"learning_rate": 2e-3, "expert_hidden_dim": 64, "num_experts": 4, "eval_episodes": 20, "buffer_size": 10_000}
DQN |= {"total_timesteps": 3_600, "learning_starts": 500, "epsilon_decay_steps": 600, "num_envs": 8, "batch_size": 128}
DQN |= {"target_network_frequency": 50, "gamma": 0.9}
RAINBOW = DQN | {"total_timesteps": 4_000, "learning_rate": 3e-3, "expert_hidden_dim": 32}
RAINBOW |= {"num_atoms": 11, "v_min": -4.0, "v_max": 4.0}
PIXEL_GAME = [("dqn_softmoe", DQN | {"layer": layer}) for layer in ("softmoe", "top1moe", "dense")]
PIXEL_GAME += [("rainbow_softmoe", {name: RAINBOW[name] for name in RAINBOW if name != "epsilon_decay_steps"})]


@pytest.mark.parametrize("agent, settings", PIXEL_GAME, indirect=["agent"])
def test_learns_the_pixel_game(agent, settings, quick_args):
    args = quick_args(**settings)
    agent.main(args)
    returns = [float(row["episode_return"]) for row in read_csv(only_run(args.runs_dir) / "episodes.csv")]
    result = json.loads((only_run(args.runs_dir) / "eval.json").read_text())["mean_return"]
    assert result >= 2.8  # seeds 2 to 5 reach 3.6 to 4.0
    assert np.mean(returns[-20:]) >= 2  # seeds 2 to 5 reach 3.0 to 4.0


def test_a_run_leaves_its_records(agent, quick_args, monkeypatch):
    monkeypatch.setattr(agent, "LOG_EVERY", 100)
    args = quick_args(layer="top1moe", load_balancing="importance+load", seed=7, weights_every=200, replay_ratio=0.25)
    agent.main(args)
    run_dir = only_run(args.runs_dir)
    assert run_dir.name == f"pixel_game-PixelCatch-v0__{agent.__name__.removesuffix('_softmoe')}_top1moe2__seed7"
    config = json.loads((run_dir / "config.json").read_text())
    assert config["args"]["seed"] == 7 and config["script"] == f"{agent.__name__}.py" and config["finished"] == 600
    episodes, metrics = read_csv(run_dir / "episodes.csv"), read_csv(run_dir / "metrics.csv")
    assert {int(row["episode_length"]) for row in episodes} == {20}
    assert [(int(row["iteration"]), int(row["global_step"])) for row in metrics] == [(0, 200), (1, 400), (2, 600)]
    for row in metrics:  # the paper's score is the mean return of the episodes that ended in the iteration
        end = int(row["global_step"])
        ended = [float(e["episode_return"]) for e in episodes if end - 200 < int(e["global_step"]) <= end]
        assert int(row["episodes"]) == len(ended) and float(row["sps"]) > 0
        assert float(row["mean_return"]) == pytest.approx(np.mean(ended), abs=1e-4)
    result = json.loads((run_dir / "eval.json").read_text())
    assert len(result["returns"]) == 2 and result["mean_return"] == pytest.approx(np.mean(result["returns"]))
    weights = [torch.load(run_dir / f"weights/{step}.pt", weights_only=True) for step in (200, 400, 600)]
    assert sorted(path.name for path in (run_dir / "weights").iterdir()) == ["200.pt", "400.pt", "600.pt"]
    assert same(torch.load(run_dir / "weights.pt", weights_only=True), weights[2]) and not same(weights[1], weights[2])
    assert same(checkpoint(run_dir)["q_network"], weights[2])
    tags = scalars(run_dir)
    assert tags["losses/loss"] == [300, 400, 500, 600] and tags["charts/epsilon"] == list(range(100, 700, 100))
    assert {"charts/episodic_return", "charts/sps", "losses/td_loss", "losses/load_balancing_loss"} <= tags.keys()
    assert {"moe/router_entropy", "moe/expert_load/1", "moe/dormant_fraction"} <= tags.keys()
    assert "losses/losses" not in tags


# Flags that DQN does not have, with values that must change what a run learns.
FLAGS = {"num_atoms": 21, "v_min": -5.0, "v_max": 5.0, "n_step": 1}
FLAGS |= {"double": False, "dueling": False, "noisy": False, "prioritized": False}
OWN_FLAGS = [("rainbow_softmoe", FLAGS), ("der_softmoe", {"augment": True})]


@pytest.mark.parametrize("agent, flags", OWN_FLAGS, indirect=["agent"])
def test_each_flag_of_rainbow_changes_the_run(agent, flags, quick_args):
    weights = {}
    for name, value in ({"eval_episodes": 0} | flags).items():  # the first run is the default
        args = quick_args(total_timesteps=64, learning_starts=48, eval_episodes=0, run_name=name)
        agent.main(replace(args, **{name: value}))
        weights[name] = torch.load(Path(args.runs_dir) / name / "weights.pt", weights_only=True)
    default = weights.pop("eval_episodes")
    assert [name for name in weights if same(weights[name], default)] == []


# ---------------------------------------------------------------------------------------------- killed and resumed
def signal_at(agent, call: int, name: str = "SIGKILL") -> None:
    """Send a signal to this process just before the environments step for the `call`-th time."""
    at_call(agent.Environments, "send", [call], lambda: os.kill(os.getpid(), getattr(signal, name)))


@pytest.mark.parametrize("agent", AGENTS[:2], indirect=True)
def test_a_run_that_is_killed_again_and_again_equals_an_unbroken_one(agent, quick_args, tmp_path):
    args = quick_args(total_timesteps=1200, checkpoint_every=100, num_envs=4, replay_ratio=0.125, batch_size=8)
    rng = np.random.default_rng()

    def killed(rounds: int, delay: float):
        """Run until SIGALRM kills the process, `delay` seconds after the start of round `rounds` (of 300 in a run)."""
        at_call(agent.Environments, "send", [rounds], lambda: signal.setitimer(signal.ITIMER_REAL, delay))
        agent.main(replace(args, run_name="killed", resume="auto"))

    agent.main(replace(args, run_name="unbroken"))
    for rounds, delay in zip(rng.integers(1, 60, 5).tolist(), rng.uniform(1e-6, 0.02, 5), strict=True):
        code, _, err = Child(tmp_path, killed, rounds, delay).wait()
        assert code == -signal.SIGALRM, err
    agent.main(replace(args, run_name="killed", resume="auto"))
    assert_same_outcome(*(Path(args.runs_dir) / name for name in ("unbroken", "killed")))


def test_a_run_killed_at_any_of_its_writes_equals_an_unbroken_one(tmp_path):
    """The kill comes before each rename: config.json, 2 checkpoints, weights.pt, eval.json, config.json."""
    args = dqn_softmoe.Args(**quick(runs_dir=str(tmp_path), checkpoint_every=200, total_timesteps=400))

    def run(name: str, write: int):
        at_call(os, "replace", [write], lambda: os.kill(os.getpid(), signal.SIGKILL))
        dqn_softmoe.main(replace(args, run_name=name, resume="auto"))

    assert Child(tmp_path, run, "unbroken", 0).wait()[0] == 0
    for write in range(1, 7):
        name = f"killed{write}"
        for at, expected in ((write, -signal.SIGKILL), (0, 0)):
            code, _, err = Child(tmp_path, run, name, at).wait()
            assert code == expected, err
        assert_same_outcome(tmp_path / "unbroken", tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["finished"] == 400
        assert list((tmp_path / name).rglob("*.tmp")) == []


def test_a_killed_run_of_atari_equals_an_unbroken_one(tmp_path):
    """The run has sticky actions, lost lives, games that end or are cut around a checkpoint, and a ring that wraps."""
    settings = {"env_id": "BreakoutNoFrameskip-v4", "total_timesteps": 1200, "checkpoint_every": 500, "num_envs": 2}
    settings |= {"learning_starts": 400, "replay_ratio": 0.1, "buffer_size": 800, "batch_size": 4, "num_atoms": 5}
    settings |= {"sticky_actions": 0.25, "noisy": False, "eval_episodes": 1, "runs_dir": str(tmp_path)}
    args = der_softmoe.Args(**quick(**settings))

    def run(name: str, rounds: int):
        signal_at(der_softmoe, rounds)
        der_softmoe.main(replace(args, run_name=name, resume="auto"))

    der_softmoe.MAX_EPISODE_STEPS = 150
    try:
        codes = [Child(tmp_path, run, "killed", rounds).wait()[0] for rounds in (400, 300, 0)]
        assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
        der_softmoe.main(replace(args, run_name="unbroken"))
    finally:
        der_softmoe.MAX_EPISODE_STEPS = 27_000
    assert_same_outcome(tmp_path / "unbroken", tmp_path / "killed")
    replay = checkpoint(tmp_path / "unbroken")["replay"]
    assert len(read_csv(tmp_path / "unbroken" / "episodes.csv")) >= 4 and replay["cursor"] == 600
    assert replay["terminated"].sum() > 8 and replay["truncated"].sum() > 2 * 3


def test_a_finished_run_that_goes_on_equals_a_longer_run(tmp_path):
    args = rainbow_softmoe.Args(**quick(runs_dir=str(tmp_path), checkpoint_every=300))
    rainbow_softmoe.main(replace(args, run_name="whole"))
    rainbow_softmoe.main(replace(args, run_name="half", total_timesteps=300))
    rainbow_softmoe.main(replace(args, resume=str(tmp_path / "half")))
    assert_same_outcome(tmp_path / "whole", tmp_path / "half")


# ------------------------------------------------------------------------------------------------- resume auto
def flags_of_quick_run(**settings) -> list[str]:
    """Return the flags of a quick run, as words of a command line."""
    given = quick(**settings)
    given = {f"--{'no-' * (value is False)}{name.replace('_', '-')}": value for name, value in given.items()}
    return [word for name, value in given.items() for word in (name, *([] if value is False else [str(value)]))]


def test_resume_auto_starts_continues_and_leaves_a_finished_run_alone(tmp_path, monkeypatch):
    def run(*more: str) -> tuple:
        monkeypatch.setattr(sys, "argv", ["dqn_softmoe.py", *line, *more])
        return Child(tmp_path.parent, lambda: dqn_softmoe.main(dqn_softmoe.parse_args())).wait()

    line = flags_of_quick_run(runs_dir=tmp_path, checkpoint_every=200, resume="auto")
    started = run()
    (run_dir,) = tmp_path.iterdir()
    assert started[0] == 0 and run_dir.name == "pixel_game-PixelCatch-v0__dqn_softmoe2__seed1"
    before = files(run_dir)
    assert run() == (0, f"{run_dir} is finished\n", "") and run("--total-timesteps", "400")[0] == 0
    assert files(run_dir) == before
    assert run("--total-timesteps", "700")[0] == 0 and checkpoint(run_dir)["progress"]["global_step"] == 700
    assert run("--seed", "2")[0] == 0 and len(list(tmp_path.iterdir())) == 2  # the seed is part of the run's name


def test_a_resumed_log_has_the_same_returns(tmp_path):
    args = dqn_softmoe.Args(**quick())
    first = dqn_softmoe.RunLog(tmp_path, args, {"global_step": 0})
    first.round(args.num_envs, np.full(args.num_envs, 1 / 3), np.ones(args.num_envs, bool))
    second = dqn_softmoe.RunLog(tmp_path, args, {"global_step": args.num_envs, "rows": first.rows})
    assert second.returns == first.returns == [1 / 3] * args.num_envs


def test_a_run_without_a_checkpoint_at_the_end(tmp_path, capsys):
    args = dqn_softmoe.Args(**quick(runs_dir=str(tmp_path), run_name="run", resume="auto", checkpoint_every=200))
    args = replace(args, checkpoint_at_end=False)
    dqn_softmoe.main(args)
    before = files(tmp_path)
    assert {Path(name).name for name in before} >= {"weights.pt", "eval.json", "episodes.csv", "metrics.csv"}
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    dqn_softmoe.main(args)  # the finished run is left alone
    for resume in ("auto", str(tmp_path / "run")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            dqn_softmoe.main(replace(args, resume=resume, total_timesteps=800))
        (line,) = notes(capsys.readouterr().err)
        assert stop.value.code == 2 and line.startswith("error: ") and "no checkpoint" in line
    assert files(tmp_path) == before


# --------------------------------------------------------------------------------------------------- signals
SIGNALS = [("dqn_softmoe", name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")]
SIGNALS += [("rainbow_softmoe", "SIGTERM")]


@pytest.mark.parametrize("agent, name", SIGNALS, indirect=["agent"])
def test_a_signal_saves_and_stops_and_the_run_goes_on(agent, name, quick_args, tmp_path):
    args, number = quick_args(replay_ratio=0.25), getattr(signal, name)

    def signalled():
        before = signal.getsignal(number)
        signal_at(agent, 101, name)
        try:
            agent.main(args)
        finally:
            assert signal.getsignal(number) is before

    code, out, err = Child(tmp_path, signalled).wait()
    run_dir = only_run(args.runs_dir)
    assert code == 75 and f"--resume {run_dir}" in out, err
    assert checkpoint(run_dir)["progress"]["global_step"] == 101 * args.num_envs
    assert not (run_dir / "eval.json").exists() and not (run_dir / "weights.pt").exists()
    agent.main(replace(args, resume=str(run_dir)))
    assert checkpoint(run_dir)["progress"]["global_step"] == 600 and (run_dir / "eval.json").exists()


def test_a_signal_in_the_evaluation(tmp_path):
    args = dqn_softmoe.Args(**quick(runs_dir=str(tmp_path), run_name="run", resume="auto"))

    def interrupted():
        signal_at(dqn_softmoe, 155, "SIGTERM")  # training has 150 rounds
        dqn_softmoe.main(args)

    code, out, _ = Child(tmp_path.parent, interrupted).wait()
    assert code == 75 and "continue with" in out and not (tmp_path / "run" / "eval.json").exists()
    dqn_softmoe.main(args)
    dqn_softmoe.main(replace(args, resume=None, run_name="unbroken"))
    assert_same_outcome(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("name, ignored, code", [("SIGINT", False, -signal.SIGINT), ("SIGHUP", True, 0)])
def test_a_signal_that_comes_twice_ends_the_process_and_one_that_nohup_ignores_does_nothing(
    tmp_path, name, ignored, code
):
    def run():
        if ignored:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal_at(dqn_softmoe, 101, name)
        signal_at(dqn_softmoe, 101, name)
        dqn_softmoe.main(dqn_softmoe.Args(**quick(runs_dir=str(tmp_path))))

    assert Child(tmp_path.parent, run).wait()[0] == code


# ---------------------------------------------------------------------------------------------------- command line
def test_script_and_layers_run_alone_in_an_empty_folder(tmp_path):
    """Docstrings are removed, and the console takes only ASCII. The next test runs a copy of dqn_softmoe.py."""
    for file in ("rainbow_softmoe.py", "moe_layers.py", "tests/helpers/pixel_game.py"):
        shutil.copy(ROOT / file, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-OO", "rainbow_softmoe.py", *flags_of_quick_run(total_timesteps=300)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0 and notes(done.stderr) == [], done.stderr
    assert done.stdout.startswith("rainbow_softmoe.py: pixel_game:PixelCatch-v0")
    expected = {"config.json", "episodes.csv", "metrics.csv", "weights.pt", "eval.json", "checkpoint.pt"}
    assert expected <= {path.name for path in only_run(tmp_path / "runs").iterdir()}


def test_the_printed_command_continues_a_run_that_a_signal_stopped(tmp_path):
    """A shell runs the command. Every path has a space, and the script is started from another folder."""
    folder, elsewhere = tmp_path / "my scripts", tmp_path / "else where"
    elsewhere.mkdir()
    folder.mkdir()
    for file in ("dqn_softmoe.py", "moe_layers.py", "tests/helpers/pixel_game.py"):
        shutil.copy(ROOT / file, folder)
    flags = flags_of_quick_run(runs_dir="its runs", total_timesteps=100_000)
    command = [sys.executable, "../my scripts/dqn_softmoe.py", *flags]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": elsewhere, "env": environment}
    run = subprocess.Popen(command, **pipes)
    for line in run.stdout:
        if line.startswith("  run "):
            break
    wait_for(lambda: any(map(read_csv, elsewhere.glob("*/*/episodes.csv"))), "the end of an episode")
    run.terminate()
    out, err = run.communicate(timeout=600)
    assert run.returncode == 75, err
    step = checkpoint(only_run(elsewhere / "its runs"))["progress"]["global_step"]
    command = re.search(r"continue with: (.*)", out)[1]
    done = subprocess.run(f"{command} --total-timesteps {step + 100}", shell=True, **pipes, timeout=600)
    assert done.returncode == 0, done.stderr
    assert checkpoint(only_run(elsewhere / "its runs"))["progress"]["global_step"] == step + 100
