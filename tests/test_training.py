"""Whole runs: learning, determinism, being killed and resumed, what a run leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import AGENTS, ROOT, only_run, quick, read_csv

# What each agent needs to learn the pixel game, beside `quick`.
LEARNING = {"learning_rate": 1e-3, "expert_hidden_dim": 64, "num_experts": 4, "log_every": 1000, "eval_episodes": 20}
LEARNING |= {"total_timesteps": 10_000, "learning_starts": 500, "buffer_size": 10_000}
LEARNING |= {"target_network_frequency": 400}
DQN = LEARNING | {"epsilon_decay_steps": 3_000}
RAINBOW = LEARNING | {"learning_rate": 3e-3}
DER = LEARNING | {"learning_rate": 2e-3, "n_step": 3, "total_timesteps": 5_000, "target_network_frequency": 100}
PIXEL_GAME = [
    ("dqn_softmoe", DQN | {"layer": "softmoe"}),
    ("dqn_softmoe", DQN | {"layer": "top1moe"}),
    ("dqn_softmoe", DQN | {"layer": "dense"}),
    ("rainbow_softmoe", RAINBOW),
    ("der_softmoe", DER | {"tokenization": "PerSamp"}),
]


@pytest.mark.parametrize("agent, settings", PIXEL_GAME, indirect=["agent"])
def test_learns_the_pixel_game(agent, settings, quick_args):
    args = quick_args(**settings)
    agent.main(args)
    returns = [float(row["episode_return"]) for row in read_csv(only_run(args.runs_dir) / "episodes.csv")]
    result = json.loads((only_run(args.runs_dir) / "eval.json").read_text())["mean_return"]
    if agent.__name__ == "dqn_softmoe":
        assert min(np.mean(returns[-100:]), result) >= 0.8 * 4  # four balls
    else:  # trained under noise: over seeds 2.7 to 3.9; four of five balls are 2.4, standing still is -2.7
        assert result >= 2.4


def test_a_run_leaves_its_records(agent, quick_args):
    args = quick_args(layer="top1moe", load_balancing="importance+load", seed=7)
    agent.main(args)
    run_dir = only_run(args.runs_dir)
    assert run_dir.name == f"pixel_game-PixelCatch-v0__{agent.__name__.removesuffix('_softmoe')}_top1moe2__seed7"
    assert json.loads((run_dir / "config.json").read_text())["args"]["seed"] == 7
    episodes, metrics = read_csv(run_dir / "episodes.csv"), read_csv(run_dir / "metrics.csv")
    assert {int(row["episode_length"]) for row in episodes} == {20}
    assert [int(row["global_step"]) for row in metrics] == [200, 400, 600]
    for row in metrics:  # the paper's score: mean return of the episodes that ended in the iteration
        end = int(row["global_step"])
        ended = [float(e["episode_return"]) for e in episodes if end - 200 < int(e["global_step"]) <= end]
        assert int(row["episodes"]) == len(ended) and float(row["mean_return"]) == pytest.approx(
            np.mean(ended), abs=1e-4
        )
        assert float(row["sps"]) > 0
    result = json.loads((run_dir / "eval.json").read_text())
    assert len(result["returns"]) == 2 and result["mean_return"] == pytest.approx(np.mean(result["returns"]))
    weights = torch.load(run_dir / "weights.pt", weights_only=True)
    checkpoint = torch.load(run_dir / "checkpoint-000000000600" / "state.pt", weights_only=True)
    assert same(weights, checkpoint["q_network"])
    tags = scalar_tags(run_dir)
    assert {"charts/episodic_return", "charts/sps", "charts/epsilon", "losses/loss", "losses/td_loss"} <= tags
    assert {"losses/load_balancing_loss", "moe/router_entropy", "moe/expert_load/1", "moe/dormant_fraction"} <= tags
    assert "losses/losses" not in tags


def scalar_tags(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    return set(events.Tags()["scalars"])


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def contents(run_dir):
    """All that a run's future depends on, and its records."""
    (checkpoint,) = run_dir.glob("checkpoint-*")
    arrays = {path.name: torch.from_numpy(np.load(path)) for path in checkpoint.glob("*.npy")}
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    scores = [{k: v for k, v in row.items() if k != "sps"} for row in read_csv(run_dir / "metrics.csv")]
    return {"replay": arrays, "episodes": (run_dir / "episodes.csv").read_text(), "scores": scores} | {
        key: state[key] for key in ("q_network", "target_network", "optimizer", "random", "global_step")
    }


def test_the_same_seed_gives_the_same_run_and_another_seed_another(agent, quick_args, tmp_path):
    seeds = {"a": 3, "b": 3, "c": 4}
    runs = [quick_args(runs_dir=str(tmp_path / name), seed=seeds[name], total_timesteps=320) for name in seeds]
    for args in runs:
        agent.main(args)
    a, b, c = (contents(only_run(args.runs_dir)) for args in runs)
    assert same(a, b) and a["episodes"] != c["episodes"]


def test_a_replay_that_is_not_where_the_learner_is_gives_the_same_run(agent, quick_args, tmp_path, monkeypatch):
    """On a GPU the replay may be in host memory: a device that only looks like another takes that path here."""
    near, far = (quick_args(runs_dir=str(tmp_path / name), total_timesteps=320) for name in ("near", "far"))
    agent.main(near)
    monkeypatch.setattr(agent, "replay_device", lambda *_: torch.device("cpu", 0))
    agent.main(far)
    assert same(*(contents(only_run(args.runs_dir)) for args in (near, far)))


# Flags beyond DQN's, with a value that must change what a run learns.
FLAGS = {"num_atoms": 21, "v_min": -5.0, "v_max": 5.0, "n_step": 1}
FLAGS |= {"double": False, "dueling": False, "noisy": False, "prioritized": False}
OWN_FLAGS = [("rainbow_softmoe", name) for name in FLAGS] + [("der_softmoe", "augment")]


@pytest.mark.parametrize("agent, name", OWN_FLAGS, indirect=["agent"])
def test_each_flag_of_rainbow_changes_the_run(agent, name, quick_args, tmp_path):
    small = {"total_timesteps": 64, "learning_starts": 48, "eval_episodes": 0}
    value = (FLAGS | {"augment": True})[name]
    weights = []
    for folder, given in (("default", {}), ("changed", {name: value})):
        args = quick_args(runs_dir=str(tmp_path / folder), **small | given)
        agent.main(args)
        weights.append(torch.load(only_run(args.runs_dir) / "weights.pt", weights_only=True))
    assert not same(*weights)


class Killed(BaseException):
    """Stands for kill -9: nothing gets to clean up."""


def at_step(patch, agent, args, global_step, act):
    """Call `act` when the agent steps for the last time before `global_step`."""
    rounds, send = [], agent.Environments.send

    def counted(*arguments):
        rounds.append(1)
        if len(rounds) == global_step // args.num_envs:
            act()
        send(*arguments)

    patch.setattr(agent.Environments, "send", counted)


def die():
    raise Killed


def breakout(agent, tmp_path, **overrides):
    """Sticky Breakout with a small network, long enough for episodes to end on both sides of the checkpoint."""
    settings = {"env_id": "BreakoutNoFrameskip-v4", "total_timesteps": 3000, "checkpoint_every": 1500}
    settings |= {"learning_starts": 1200, "buffer_size": 2000, "batch_size": 4, "iteration_steps": 1000}
    settings |= {"log_every": 500, "eval_episodes": 0, "runs_dir": str(tmp_path)}
    settings |= {"num_envs": 4, "replay_ratio": 0.25, "sticky_actions": 0.25}
    if agent.__name__ != "dqn_softmoe":  # fewer atoms: a quicker head; random actions: games that end
        settings |= {"num_atoms": 5, "noisy": False}
    return agent.Args(**quick(**settings | overrides))


def test_a_killed_run_resumes_to_the_bit(agent, tmp_path, monkeypatch):
    unbroken, killed = breakout(agent, tmp_path / "unbroken"), breakout(agent, tmp_path / "killed")
    agent.main(unbroken)
    with monkeypatch.context() as patch:
        at_step(patch, agent, killed, 2200, die)
        with pytest.raises(Killed):
            agent.main(killed)
    run_dir = only_run(killed.runs_dir)
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-000000001500"]
    agent.main(replace(killed, resume=str(run_dir)))
    a, b = contents(only_run(unbroken.runs_dir)), contents(run_dir)
    assert len(a["episodes"].splitlines()) > 10 and a["replay"]["replay_cursor.npy"] == 752  # wrapped, two cut rows
    assert ("replay_priorities.npy" in a["replay"]) == (agent.__name__ != "dqn_softmoe")
    for part in a:
        assert same(a[part], b[part]), part


def test_a_finished_run_goes_on_to_the_bit(agent, quick_args, tmp_path):
    whole = quick_args(runs_dir=str(tmp_path / "whole"), checkpoint_every=300)
    half = quick_args(runs_dir=str(tmp_path / "half"), checkpoint_every=300)
    agent.main(whole)
    agent.main(replace(half, total_timesteps=300))
    agent.main(replace(half, resume=str(only_run(half.runs_dir))))
    a, b = contents(only_run(whole.runs_dir)), contents(only_run(half.runs_dir))
    for part in a:
        assert same(a[part], b[part]), part


def test_a_crash_while_writing_leaves_the_last_checkpoint(agent, quick_args, monkeypatch):
    args = quick_args(checkpoint_every=200, eval_episodes=0)
    save, calls = np.save, []

    def die_in_the_second_checkpoint(file, array):
        calls.append(file.name)
        if calls.count(file.name) > 1 and len(set(calls)) < len(calls) - 3:
            file.write(b"half")
            raise Killed
        save(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", die_in_the_second_checkpoint)
        with pytest.raises(Killed):
            agent.main(args)
    run_dir = only_run(args.runs_dir)
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-000000000200"]
    agent.main(replace(args, resume=str(run_dir)))
    assert not (run_dir / "checkpoint.tmp").exists()
    assert contents(run_dir)["global_step"] == 600


SIGNALS = [("dqn_softmoe", name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
SIGNALS += [(name, signal.SIGTERM) for name in AGENTS[1:]]


@pytest.mark.parametrize("agent, number", SIGNALS, indirect=["agent"])
def test_a_signal_saves_and_stops_and_the_run_goes_on(agent, number, quick_args, monkeypatch, capsys):
    args = quick_args()
    with monkeypatch.context() as patch:
        at_step(patch, agent, args, 404, lambda: os.kill(os.getpid(), number))
        agent.main(args)  # returns: exit code 0
    run_dir = only_run(args.runs_dir)
    assert f"--resume {run_dir}" in capsys.readouterr().out
    assert contents(run_dir)["global_step"] == 404 and not (run_dir / "eval.json").exists()
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    agent.main(replace(args, resume=str(run_dir)))
    assert contents(run_dir)["global_step"] == 600 and (run_dir / "eval.json").exists()


def test_evaluation_plays_fair_shares_and_leaves_no_trace(agent, quick_args):
    args = quick_args()
    q_network = agent.QNetwork(args, (4, 12, 12), 3)
    before = torch.get_rng_state()
    with agent.StopSignal() as stop:
        returns = agent.evaluate(q_network, args, 23, 5, stop)
        assert returns == agent.evaluate(q_network, args, 23, 5, stop)
    assert len(returns) == 23 and set(returns) <= {-4.0, -2.0, 0.0, 2.0, 4.0}
    assert torch.equal(before, torch.get_rng_state()) and q_network.training


@pytest.mark.parametrize("name", AGENTS)
def test_script_and_layers_run_alone_in_an_empty_folder(tmp_path, name):
    for file in (f"{name}.py", "moe_layers.py", "tests/pixel_game.py"):
        shutil.copy(ROOT / file, tmp_path)
    command = [sys.executable, f"{name}.py", "--env-id", "pixel_game:PixelCatch-v0", "--total-timesteps", "400"]
    command += ["--learning-starts", "100", "--buffer-size", "1000", "--encoder", "nature", "--eval-episodes", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{name}.py: pixel_game:PixelCatch-v0") and max(map(len, lines)) <= 100
    assert {"config.json", "episodes.csv", "metrics.csv", "weights.pt", "eval.json"} <= {
        path.name for path in only_run(tmp_path / "runs").iterdir()
    }


def test_sigterm_ends_the_command_with_code_0(tmp_path):
    command = [sys.executable, str(ROOT / "dqn_softmoe.py"), "--env-id", "pixel_game:PixelCatch-v0"]
    command += ["--encoder", "nature", "--runs-dir", str(tmp_path), "--buffer-size", "1000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in run.stdout:
        if line.startswith("  run "):
            break
    time.sleep(2)
    run.terminate()
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "continue with" in out
    assert len(list(only_run(tmp_path).glob("checkpoint-*"))) == 1
