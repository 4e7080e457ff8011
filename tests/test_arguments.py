"""Arguments of `dqn_softmoe.py`: what each one changes, what is refused and in which words, damaged runs, full disks.

A refusal is exit code 2 and one line on stderr that starts with "error: ". It leaves no new run directory behind, and
every file of the run that it would have resumed as it was.
"""

import contextlib
import errno
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, quick, read_csv

import dqn_softmoe
from dqn_softmoe import (
    Args,
    Batch,
    Environments,
    QNetwork,
    ReplayBuffer,
    RunLog,
    check_resume,
    evaluate,
    last_checkpoint,
    load_args,
    main,
    make_envs,
    parse_args,
    replay_device,
    reset_seed,
    td_loss,
)
from moe_layers import MoEOutput, Routing

# 16 rounds of 4 agent steps, updates in the last 10.
TINY = {"total_timesteps": 64, "learning_starts": 24, "buffer_size": 400, "batch_size": 16, "eval_episodes": 0}
TINY |= {"epsilon_decay_steps": 20, "target_network_frequency": 16, "log_every": 16, "iteration_steps": 32}
TINY |= {"checkpoint_every": 0}


def tiny(**overrides) -> Args:
    return Args(**quick(**TINY | overrides))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def spy(patch: pytest.MonkeyPatch, owner, name: str) -> list[tuple]:
    """The arguments of every later call of `owner.name`, which goes on as before."""
    calls, original = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapper)
    return calls


def printed_lines(text: str) -> list[str]:
    """Lines as a terminal shows them: a progress bar starts each of its own with a carriage return."""
    return [line for line in re.split(r"[\r\n]", text) if line.strip()]


def notes(text: str) -> list[str]:
    """The lines that are no progress bars."""
    return [line for line in printed_lines(text) if "%|" not in line]


OTHER_LINES = ("no CUDA device", "A.L.E: ", "[Powered by Stella]")  # the emulator's own, once in a process


@pytest.fixture
def refusal(capfd):
    """Calls a function that must refuse its input, in silence but for one line; returns that line."""

    def call(function, *arguments) -> str:
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit) as stop:
            warnings.simplefilter("default")
            function(*arguments)
        lines = [line for line in printed_lines(capfd.readouterr().err) if not line.startswith(OTHER_LINES)]
        assert stop.value.code == 2
        assert not [warning for warning in caught if issubclass(warning.category, UserWarning)]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return call


@pytest.fixture
def refused_run(refusal, tmp_path):
    """Calls `main`, which must refuse its arguments in these words and leave nothing behind."""

    def call(words, **overrides):
        line = refusal(main, tiny(runs_dir=str(tmp_path / "runs"), **overrides))
        assert [word for word in words if word not in line] == [], line
        assert not (tmp_path / "runs").exists()

    return call


# -------------------------------------------------------------------------------------------------- bad arguments

AT_LEAST_ONE = "num_experts expert_hidden_dim encoder_width batch_size buffer_size n_step num_envs total_timesteps"
AT_LEAST_ONE += " iteration_steps log_every target_network_frequency replay_shard_size"
NOT_NEGATIVE = "seed checkpoint_every eval_episodes noop_max epsilon_decay_steps learning_starts"


def bad_numbers():
    for name in AT_LEAST_ONE.split():
        yield from [(name, 0), (name, -1)]
    for name in NOT_NEGATIVE.split():
        yield name, -1
    for name in ["sticky_actions", "end_epsilon", "eval_epsilon", "gamma"]:
        yield from [(name, -0.1), (name, 1.1), (name, math.nan)]
    for name in ["capacity_factor", "learning_rate", "adam_eps"]:
        yield from [(name, 0.0), (name, -1.0), (name, math.nan), (name, math.inf)]


@pytest.mark.parametrize("name, value", list(bad_numbers()))
def test_number_out_of_range(refused_run, name, value):
    refused_run([flag(name), str(value)], **{name: value})


def test_seed_that_no_generator_takes(refused_run):
    refused_run(["--seed", str(2**64)], seed=2**64)


@pytest.mark.parametrize("name", ["expert_hidden_dim", "encoder_width"])
@pytest.mark.parametrize("size", [10**12, 10**20])
def test_network_that_no_memory_holds(refused_run, name, size):
    refused_run(["network"], **{name: size})


def test_compiling_without_a_compiler(refused_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    refused_run(["--compile", "gcc", "--no-compile"], cuda=True)


def test_more_no_ops_than_a_game_can_bear(refused_run):
    refused_run(["--noop-max", "1000"], noop_max=1001)


IDLE_FLAGS = [
    ("normalize_router", True, {"layer": "top1moe"}, "softmoe"),
    ("normalize_router", True, {"layer": "dense"}, "softmoe"),
    ("learned_phi", False, {"layer": "top1moe"}, "softmoe"),
    ("learned_phi", False, {"layer": "dense"}, "softmoe"),
    ("load_balancing", "load", {"layer": "softmoe"}, "top1moe"),
    ("load_balancing", "importance", {"layer": "dense"}, "top1moe"),
    ("tokenization", "PerFeat", {"layer": "dense"}, "softmoe"),
    ("capacity_factor", 0.5, {"layer": "dense"}, "softmoe"),
    ("importance_weight", 2.0, {}, "importance"),
    ("importance_weight", 2.0, {"layer": "top1moe", "load_balancing": "load"}, "importance"),
    ("load_weight", 2.0, {"layer": "top1moe", "load_balancing": "importance"}, "load"),
    ("replay_shard_size", 1000, {}, "--save-replay"),
]


@pytest.mark.parametrize("name, value, given, needs", IDLE_FLAGS)
def test_flag_without_effect(refused_run, name, value, given, needs):
    refused_run([flag(name), "has no effect", needs], **{name: value}, **given)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["importance", "load"])
def test_weight_of_a_loss_out_of_range(refused_run, name, value):
    weight = {f"{name}_weight": value}
    refused_run([f"--{name}-weight", str(value)], layer="top1moe", load_balancing="importance+load", **weight)


RATIOS = [(0.3, 4), (0.25, 3), (0.0, 4), (-1.0, 4), (math.nan, 4), (math.inf, 4)]


@pytest.mark.parametrize("ratio, num_envs", RATIOS)
def test_replay_ratio_that_is_no_whole_number_of_updates_per_round(refused_run, ratio, num_envs):
    words = ["--replay-ratio", str(ratio), f"--num-envs {num_envs}", "whole number"]
    refused_run(words, replay_ratio=ratio, num_envs=num_envs)


SMALLEST_BUFFERS = [  # a lane holds a stack of 4, n steps and two reset rows
    ({"num_envs": 4, "n_step": 1, "batch_size": 8}, 4 * 7),
    ({"num_envs": 4, "n_step": 10, "batch_size": 8, "learning_starts": 48}, 4 * 16),
    ({"num_envs": 4, "n_step": 1, "batch_size": 40}, 40),
]


@pytest.mark.parametrize("given, least", SMALLEST_BUFFERS)
def test_buffer_too_small_for_batch_stack_and_n_step(refused_run, tmp_path, given, least):
    refused_run(["--buffer-size", str(least - 1), str(least)], buffer_size=least - 1, **given)
    main(tiny(runs_dir=str(tmp_path), buffer_size=least, **given))


@pytest.mark.parametrize("n_step, least", [(1, 12), (10, 48)])
def test_learning_that_starts_too_early(refused_run, tmp_path, n_step, least):
    refused_run(["--learning-starts", str(least)], learning_starts=least - 1, n_step=n_step)
    main(tiny(runs_dir=str(tmp_path), learning_starts=least, n_step=n_step))


@pytest.mark.parametrize("tokenization", ["PerPatch", "PerPatchAvg"])
def test_tokenization_that_does_not_fit(refused_run, tokenization):
    refused_run(["2x2", "3x3", "patch", "(12, 12)"], tokenization=tokenization)  # 12x12 frames, features 2x2


def test_buffer_larger_than_memory(refused_run, monkeypatch):
    """One of 12x12 takes 144 bytes, and 24 for action, reward, flags, depth and queue."""
    monkeypatch.setattr(dqn_softmoe, "available_memory", lambda device: 500_000_000)
    allocated = spy(monkeypatch, ReplayBuffer, "__init__")
    refused_run(["--buffer-size", "1.68 GB", "0.50 GB"], buffer_size=10_000_000)
    assert allocated == []


def test_buffer_larger_than_the_memory_of_any_computer(refused_run, monkeypatch):
    allocated = spy(monkeypatch, ReplayBuffer, "__init__")
    refused_run(["--buffer-size", "7080.00 GB"], env_id="ALE/Breakout-v5", buffer_size=10**9)
    assert allocated == []


# --------------------------------------------------------------------------------------------------- environments


class Blank(gym.Env):
    """Zeros of any shape and type, for ever."""

    def __init__(self, shape=(10, 8), dtype=np.uint8, action_space=None, error: Exception | None = None):
        if error is not None:
            raise error
        self.observation_space = gym.spaces.Box(0, 255, shape, dtype)
        self.action_space = gym.spaces.Discrete(3) if action_space is None else action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), {}

    def step(self, action):
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), 0.0, False, False, {}


BLANKS = {
    "Good": {},
    "Continuous": {"action_space": gym.spaces.Box(-1, 1, (2,))},
    "Buttons": {"action_space": gym.spaces.MultiBinary(3)},
    "FromOne": {"action_space": gym.spaces.Discrete(3, start=1)},
    "Float": {"dtype": np.float32},
    "RGB": {"shape": (12, 12, 3)},
    "Stacked": {"shape": (4, 12, 12)},
    "Vector": {"shape": (128,)},
    "Broken": {"error": RuntimeError("no display\nwas found")},
    "Typo": {"error": TypeError("unexpected")},
}
for blank, options in BLANKS.items():
    gym.register(f"Blank{blank}-v0", entry_point=Blank, kwargs=options)
gym.register("RamBreakout-v0", entry_point="ale_py.env:AtariEnv", kwargs={"game": "breakout", "obs_type": "ram"})

BAD_ENVIRONMENTS = {
    "BrekoutNoFrameskip-v4": ["Did you mean", "`BreakoutNoFrameskip`"],
    "ALE/Breakout-v9": ["v9", "`v5`"],
    "ALE/Breakout-ram-v5": ["Did you mean", "`Breakout`"],
    "no id at all": [],
    "": [],
    "no_such_module:Game-v0": ["No module named 'no_such_module'"],
    "json:NoSuchGame-v0": ["NoSuchGame"],
    ".relative:Game-v0": [],
    "BlankContinuous-v0": ["Discrete", "Box"],
    "BlankButtons-v0": ["Discrete", "MultiBinary"],
    "BlankFromOne-v0": ["start at 0", "start=1"],
    "BlankFloat-v0": ["uint8", "(H, W)", "float32"],
    "BlankRGB-v0": ["uint8", "(H, W)", "(12, 12, 3)"],
    "BlankStacked-v0": ["uint8", "(H, W)", "(4, 12, 12)"],
    "BlankVector-v0": ["uint8", "(H, W)", "(128,)"],
    "RamBreakout-v0": ["uint8", "(H, W)", "(128,)"],
    "CartPole-v1": ["uint8", "(H, W)", "float32 (4,)"],
    "BlankBroken-v0": ["cannot be made", "RuntimeError: no display was found"],
    "BlankTypo-v0": ["cannot be made", "TypeError: unexpected"],
}


@pytest.mark.parametrize("env_id", BAD_ENVIRONMENTS)
def test_bad_environment(refused_run, env_id):
    refused_run([f"--env-id {env_id}", *BAD_ENVIRONMENTS[env_id]], env_id=env_id)


@pytest.mark.parametrize(
    "source, word",
    [
        ("import no_such_module", "no_such_module"),
        ("raise RuntimeError('no licence')", "no licence"),
        ("1 +", "syntax"),
    ],
)
def test_module_of_an_environment_that_cannot_be_imported(refused_run, tmp_path, monkeypatch, source, word):
    (tmp_path / "broken_game.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    refused_run(["--env-id broken_game:Game-v0", word], env_id="broken_game:Game-v0")


# -------------------------------------------------------------------------------------------------- run directories


@pytest.mark.parametrize("below", [".", "runs", "runs/deeper"])
def test_run_directory_that_cannot_be_written(refusal, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("precious")
    assert str(file / below) in refusal(main, tiny(runs_dir=str(file / below)))
    assert file.read_text() == "precious"


def test_existing_run_directory_is_never_touched(tmp_path):
    args = tiny(runs_dir=str(tmp_path), total_timesteps=8)
    main(args)
    first = only_run(tmp_path)
    before = contents(first)
    main(args)
    assert contents(first) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, f"{first.name}-2"]
    assert contents(tmp_path / f"{first.name}-2").keys() > {"config.json", "episodes.csv", "metrics.csv", "weights.pt"}


# ----------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 64 agent steps, for copying."""
    runs = tmp_path_factory.mktemp("finished")
    main(tiny(runs_dir=str(runs)))
    return only_run(runs)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def checkpoint_file(run: Path, name: str) -> Path:
    return last_checkpoint(run) / name


def truncate(name: str) -> Callable[[Path], None]:
    def damage(run: Path):
        path = checkpoint_file(run, name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def change_array(name: str, change: Callable) -> Callable[[Path], None]:
    def damage(run: Path):
        path = checkpoint_file(run, name)
        np.save(path, change(np.load(path)))

    return damage


def change_state(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(run: Path):
        path = checkpoint_file(run, "state.pt")
        torch.save(change(torch.load(path, weights_only=True)), path)

    return damage


class Exploit:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled_state(run: Path) -> None:
    torch.save({"q_network": Exploit(run / "exploited")}, checkpoint_file(run, "state.pt"))


def state_of_bare_pickle(run: Path) -> None:
    checkpoint_file(run, "state.pt").write_bytes(pickle.dumps(Exploit(run / "exploited")))


def pickled_array(run: Path) -> None:
    np.save(checkpoint_file(run, "replay_reward.npy"), np.array([Exploit(run / "exploited")], object))


def archive_for_an_array(run: Path) -> None:
    path = checkpoint_file(run, "replay_reward.npy")
    with open(path, "wb") as file:
        np.savez(file, reward=np.zeros((16, 4), np.float32))


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


def narrower_head(state: dict) -> dict:
    weight = state["q_network"]["head.weight"]
    return state | {"q_network": state["q_network"] | {"head.weight": weight[:2]}}


DAMAGES = {
    "no directory": (shutil.rmtree, ["no run of dqn_softmoe.py"]),
    "no checkpoint": (lambda run: shutil.rmtree(last_checkpoint(run)), ["no checkpoint"]),
    "empty checkpoint": (lambda run: [path.unlink() for path in last_checkpoint(run).iterdir()], ["state.pt"]),
    "empty state": (lambda run: checkpoint_file(run, "state.pt").write_bytes(b""), ["damaged"]),
    "truncated state": (truncate("state.pt"), ["damaged"]),
    "pickled state": (pickled_state, ["damaged"]),
    "state of bare pickle": (state_of_bare_pickle, ["damaged"]),
    "another program's state": (change_state(lambda state: {"model": state["q_network"]}), ["damaged", "q_network"]),
    "state that is no dict": (change_state(lambda state: [1, 2]), ["damaged"]),
    "state of another network": (change_state(narrower_head), ["damaged", "head.weight"]),
    "state without a log": (change_state(lambda state: without(state, "log")), ["damaged", "log"]),
    "missing array": (lambda run: checkpoint_file(run, "replay_reward.npy").unlink(), ["replay_reward.npy"]),
    "empty array": (lambda run: checkpoint_file(run, "replay_reward.npy").write_bytes(b""), ["damaged"]),
    "truncated array": (truncate("replay_frames.npy"), ["damaged"]),
    "wrong dtype": (change_array("replay_reward.npy", lambda x: x.astype(np.float64)), ["replay reward", "float64"]),
    "wrong shape": (change_array("replay_reward.npy", lambda x: x[1:]), ["replay reward", "(16, 4)", "(17, 4)"]),
    "wrong row count": (change_array("replay_cursor.npy", lambda x: x - 10**6), ["damaged"]),
    "pickled array": (pickled_array, ["damaged"]),
    "archive for an array": (archive_for_an_array, ["damaged"]),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_damaged_run(refusal, run, damage, words):
    args = load_args(str(run))
    damage(run)
    before = contents(run)
    line = refusal(main, replace(args, total_timesteps=96))
    assert [word for word in ["--resume", str(run), *words] if word not in line] == [], line
    assert contents(run) == before
    assert not (run / "exploited").exists()


def write_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(run: Path):
        path = run / "config.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


DAMAGED_CONFIGS = {
    "missing": (lambda run: (run / "config.json").unlink(), ["FileNotFoundError"]),
    "truncated": (lambda run: (run / "config.json").write_text('{"script": "dqn'), ["JSONDecodeError"]),
    "not text": (lambda run: (run / "config.json").write_bytes(b"\xff\xfe\x00"), []),
    "a list": (write_config(lambda config: [config]), []),
    "another script's": (
        write_config(lambda config: config | {"script": "rainbow_softmoe.py"}),
        ["rainbow_softmoe.py"],
    ),
    "without arguments": (write_config(lambda config: {"script": config["script"]}), ["args"]),
    "list of arguments": (write_config(lambda config: config | {"args": list(config["args"])}), []),
    "unknown argument": (write_config(lambda config: config | {"args": {"sigma": 1}}), ["sigma"]),
    "text for a number": (write_config(lambda c: c | {"args": c["args"] | {"num_envs": "four"}}), ["num-envs", "four"]),
    "no such layer": (write_config(lambda c: c | {"args": c["args"] | {"layer": "hard"}}), ["layer", "hard"]),
}


@pytest.mark.parametrize("damage, words", DAMAGED_CONFIGS.values(), ids=DAMAGED_CONFIGS)
def test_damaged_config(refusal, run, monkeypatch, damage, words):
    damage(run)
    before = contents(run)
    monkeypatch.setattr(sys, "argv", ["dqn_softmoe.py", "--resume", str(run)])
    line = refusal(lambda: main(parse_args()))
    assert [word for word in ["--resume", str(run), *words] if word not in line] == [], line
    assert contents(run) == before


def test_contradiction_loses_nothing(refusal, run):
    before = contents(run)
    line = refusal(main, replace(load_args(str(run)), num_experts=8, seed=5, gamma=0.5, total_timesteps=96))
    words = ["--resume", "--num-experts 8 (was 2)", "--seed 5 (was 1)", "--gamma 0.5 (was 0.99)"]
    assert [word for word in words if word not in line] == [], line
    assert "total-timesteps" not in line and contents(run) == before


@pytest.mark.parametrize("name", ["metrics.csv", "episodes.csv"])
def test_log_that_is_shorter_than_at_the_checkpoint(run, name):
    """As after a power cut: checkpoints wait for the disk, logs do not."""
    (run / name).write_text("")
    main(replace(load_args(str(run)), total_timesteps=96))
    assert b"\0" not in (run / name).read_bytes()


def test_resume_takes_what_is_not_given_from_the_run(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dqn_softmoe.py", "--resume", str(run), "--total-timesteps", "96"])
    saved = json.loads((run / "config.json").read_text())["args"]
    assert parse_args() == Args(**saved | {"resume": str(run), "total_timesteps": 96})


# ------------------------------------------------------------------------------------- losses that are not finite


def poisoned(patch: pytest.MonkeyPatch, good: int) -> None:
    """`td_loss` is NaN after this many good updates."""
    calls = spy(patch, dqn_softmoe, "td_loss")
    original = dqn_softmoe.td_loss

    def loss(*arguments):
        loss, metrics = original(*arguments)
        factor = 1.0 if len(calls) <= good else math.nan
        return loss * factor, {name: value * factor for name, value in metrics.items()}

    patch.setattr(dqn_softmoe, "td_loss", loss)


@pytest.mark.parametrize("how", ["learning rate", "loss"])
def test_loss_that_is_not_finite_stops_the_run(capsys, tmp_path, how):
    """Checkpoint after 32 steps, updates from there, a look at the loss every 16."""
    args = tiny(runs_dir=str(tmp_path), checkpoint_every=32, learning_starts=32, total_timesteps=96)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        if how == "loss":
            poisoned(patch, good=2)
        main(replace(args, learning_rate=1e30) if how == "learning rate" else args)
    run, lines = only_run(tmp_path), printed_lines(capsys.readouterr().err)
    (line,) = [line for line in lines if "error" in line]
    assert stop.value.code == 2
    assert "agent step 48" in line and str(run / "checkpoint-000000000032") in line
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint-000000000032"]
    assert line.startswith("error: "), "the line starts behind a progress bar"
    main(replace(load_args(str(run)), total_timesteps=32))
    assert (run / "weights.pt").exists()


def test_loss_that_is_not_finite_at_the_end_reaches_no_checkpoint(tmp_path, monkeypatch):
    poisoned(monkeypatch, good=2)
    with pytest.raises(SystemExit) as stop:
        main(tiny(runs_dir=str(tmp_path), log_every=1000))
    assert stop.value.code == 2
    assert last_checkpoint(only_run(tmp_path)) is None


# -------------------------------------------------------------------------------------------------------- full disk

NO_SPACE = {
    "np.save": (np, "save", OSError(errno.ENOSPC, "No space left on device")),
    "torch.save": (torch, "save", RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")),
}


@pytest.mark.parametrize("owner, name, error", NO_SPACE.values(), ids=NO_SPACE)
def test_full_disk_keeps_the_last_good_checkpoint(capsys, tmp_path, owner, name, error):
    good, original = [], getattr(owner, name)
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        saves = spy(patch, dqn_softmoe, "save_checkpoint")

        def save(*arguments):
            if saves[-1][1] > 16 and any("checkpoint.tmp" in str(getattr(x, "name", "")) for x in arguments):
                good.append(contents(run / "checkpoint-000000000016"))
                raise error
            return original(*arguments)

        patch.setattr(owner, name, save)
        main(tiny(runs_dir=str(tmp_path), run_name="run", checkpoint_every=16))
    text = capsys.readouterr()
    assert "64 agent steps done" in text.out and stop.value.code == 1
    expected = [
        f"warning: no checkpoint at agent step {step}, the last good one stays: {error}" for step in (32, 48, 64)
    ]
    assert notes(text.err) == expected
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint-000000000016"]
    assert len(good) == 3 and all(good) and contents(run / "checkpoint-000000000016") == good[0] == good[-1]
    main(replace(load_args(str(run)), total_timesteps=80))
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint-000000000080"]


@pytest.mark.parametrize("limit", [4096, 100_000], ids=["replay", "networks"])
def test_limit_on_the_size_of_files(capsys, tmp_path, limit):
    """The operating system's own error, in the middle of a file: first of the replay, else of the networks."""
    resource = pytest.importorskip("resource")
    before, original, run = resource.getrlimit(resource.RLIMIT_FSIZE), dqn_softmoe.write_synced, tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        saves = spy(patch, dqn_softmoe, "save_checkpoint")

        def write(*arguments):
            if saves[-1][1] == 32:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                original(*arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        patch.setattr(dqn_softmoe, "write_synced", write)
        main(tiny(runs_dir=str(tmp_path), run_name="run", checkpoint_every=16, total_timesteps=48))
    text = capsys.readouterr()
    (line,) = notes(text.err)
    assert line.startswith("warning: no checkpoint at agent step 32, the last good one stays: ")
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint-000000000048"]


# ------------------------------------------------------------------------------------------ what each argument does


class Change(NamedTuple):
    """`observe(args)` is `before` for TINY with `given`, and `after` where the argument has `value`."""

    value: object
    observe: Callable[[Args], object]
    before: object
    after: object
    given: dict = {}


def record(args: Args) -> SimpleNamespace:
    """Run, and note what reached replay, optimizer, environments, log and disk."""
    with pytest.MonkeyPatch.context() as patch:
        samples, steps = spy(patch, ReplayBuffer, "sample"), spy(patch, torch.optim.Adam, "step")
        actions, copies = spy(patch, dqn_softmoe, "select_actions"), spy(patch, QNetwork, "load_state_dict")
        resets, saves = spy(patch, Environments, "reset"), spy(patch, dqn_softmoe, "save_checkpoint")
        points = spy(patch, RunLog, "training")
        main(args)
    return SimpleNamespace(
        replay=samples[0][0],
        batch_sizes={batch_size for _, batch_size in samples},
        adam=steps[0][0].param_groups[0],
        updates=len(steps),
        copies=len(copies),
        epsilons=[epsilon for _, epsilon in actions],
        seeds=(torch.initial_seed(), resets[0][1]),
        saves=[call[1] for call in saves],
        points=[call[-1] for call in points],
    )


def network(args: Args) -> QNetwork:
    torch.manual_seed(0)
    return QNetwork(args, (4, 12, 12), 3)  # 2x2x64 features


def encoder_parameters(args: Args) -> int:
    return sum(p.numel() for p in network(args).encoder.parameters())


def token_shape(args: Args) -> tuple[int, int]:
    moe = network(args).moe
    return moe.num_tokens, moe.token_dim


def length_matters_to_the_router(args: Args) -> bool:
    moe, tokens = network(args).moe, torch.rand(1, 4, 64)
    return not torch.allclose(moe(tokens).routing.router_probs, moe(3 * tokens).routing.router_probs, atol=1e-3)


def routing_repeats(args: Args) -> bool:
    moe, tokens = network(args).moe, torch.rand(1, 4, 64)
    return torch.equal(moe(tokens).routing.router_probs, moe(tokens).routing.router_probs)


class RoutedByHand:
    """A Q-network with values 0 whose four tokens all prefer the first of two experts."""

    def __call__(self, obs):
        logits, probs = torch.tensor([2.0, 0.0]).expand(2, 4, 2), torch.tensor([0.75, 0.25]).expand(2, 4, 2)
        return self.q_values(obs), MoEOutput(None, Routing(None, None, logits, probs), None)

    def q_values(self, obs):
        return torch.zeros(2, 3, requires_grad=True)


# (std / mean)^2 of [0.75, 0.25], and of the chances that an expert with logit 2 or 0 passes 2 by noise of std 1/2.
IMPORTANCE = 0.25
PASSES = 0.5 * math.erfc(4 / math.sqrt(2))
LOAD = (0.5 - PASSES) ** 2 / (0.5 + PASSES) ** 2


def auxiliary_loss(args: Args) -> float:
    """What the loss holds beside the temporal difference, which is 0; the router's noise is off."""
    zeros = torch.zeros(2)
    batch = Batch(None, zeros.long(), zeros, zeros, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        loss, metrics = td_loss(RoutedByHand(), RoutedByHand(), batch, args)
    assert metrics["td_loss"] == 0 and metrics.get("load_balancing_loss", 0) == loss
    return loss.item()


def atari_setting(name: str) -> Callable[[Args], object]:
    """The keyword argument that Atari environments are made with."""

    def observe(args: Args) -> object:
        def make(game: str, num_envs: int, **settings) -> SimpleNamespace:
            frames, actions = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8), gym.spaces.Discrete(4)
            spaces = {"single_observation_space": frames, "single_action_space": actions}
            return SimpleNamespace(num_envs=num_envs, settings=settings, **spaces)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dqn_softmoe, "AtariVectorEnv", make)
            envs = make_envs(replace(args, env_id="ALE/Breakout-v5"), 2)
        assert envs.life_loss == args.terminal_on_life_loss
        return envs.envs.settings[name]

    return observe


def says_no_cuda(args: Args) -> int:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as stderr:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        main(args)
    assert last_checkpoint(only_run(Path(args.runs_dir))) is not None
    return len([line for line in printed_lines(stderr.getvalue()) if "no CUDA device" in line])


def where_the_replay_goes(args: Args) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dqn_softmoe, "available_memory", lambda device: 10**9)
        return replay_device(args, (12, 12), torch.device("cuda")).type


def run_directories(args: Args) -> list[str]:
    main(args)
    return [str(path) for path in Path().glob("*/*")]


def directories_of_two_runs(args: Args) -> list[str]:
    main(replace(args, resume=None))
    main(replace(args, total_timesteps=80))
    return sorted(str(path) for path in Path().glob("*/*"))


def iterations(args: Args) -> list[int]:
    main(args)
    return [int(row["global_step"]) for row in read_csv(only_run(Path(args.runs_dir)) / "metrics.csv")]


def logged_shards(args: Args) -> int:
    main(args)
    return len(list(Path().glob("runs/*/replay/PixelCatch/1/replay_logs/add_count_ckpt.*.gz")))


def evaluated_episodes(args: Args) -> int:
    main(args)
    result = only_run(Path(args.runs_dir)) / "eval.json"
    return json.loads(result.read_text())["episodes"] if result.exists() else 0


def epsilons_in_evaluation(args: Args) -> set[float]:
    with pytest.MonkeyPatch.context() as patch:
        actions = spy(patch, dqn_softmoe, "select_actions")
        evaluate(network(args), args, 1, seed=0, stop=SimpleNamespace(received=False))
    return {epsilon for _, epsilon in actions}


NAME = "pixel_game-PixelCatch-v0__dqn_softmoe2__seed1"
BALANCED = {"layer": "top1moe", "load_balancing": "importance+load"}
CHANGES = {
    # Run
    "env_id": Change("BlankGood-v0", lambda args: record(args).replay.frame_shape, (12, 12), (10, 8)),
    "seed": Change(7, lambda args: record(args).seeds, (1, reset_seed(1, 0)), (7, reset_seed(7, 0))),
    "total_timesteps": Change(80, lambda args: len(record(args).epsilons), 16, 20),
    "runs_dir": Change("elsewhere", run_directories, [f"runs/{NAME}"], [f"elsewhere/{NAME}"]),
    "run_name": Change("mine", run_directories, [f"runs/{NAME}"], ["runs/mine"]),
    "resume": Change(f"runs/{NAME}", directories_of_two_runs, [f"runs/{NAME}", f"runs/{NAME}-2"], [f"runs/{NAME}"]),
    "checkpoint_every": Change(32, lambda args: record(args).saves, [64], [32, 64]),
    "iteration_steps": Change(16, iterations, [32, 64], [16, 32, 48, 64]),
    "log_every": Change(32, lambda args: record(args).points, [16, 32, 48, 64], [32, 64]),
    "eval_episodes": Change(3, evaluated_episodes, 0, 3),
    "cuda": Change(True, says_no_cuda, 0, 1),
    # Environment
    "num_envs": Change(2, lambda args: len(record(args).epsilons), 16, 32, {"replay_ratio": 0.5}),
    "sticky_actions": Change(0.1, atari_setting("repeat_action_probability"), 0.25, 0.1),
    "noop_max": Change(30, atari_setting("noop_max"), 1, 31),  # ale-py draws fewer than that
    "terminal_on_life_loss": Change(True, atari_setting("life_loss_info"), False, True),
    # Network: 4 tokens of 64, two experts of 2 slots each
    "layer": Change("dense", lambda args: type(network(args).moe).__name__, "SoftMoE", "DenseLayer"),
    "num_experts": Change(3, lambda args: network(args).moe.experts.w1.shape, (2, 64, 16), (3, 64, 16)),
    "expert_hidden_dim": Change(24, lambda args: network(args).moe.experts.w1.shape, (2, 64, 16), (2, 64, 24)),
    "tokenization": Change("PerFeat", token_shape, (4, 64), (64, 4)),
    "capacity_factor": Change(1.5, lambda args: network(args).moe.num_slots, 2, 3),
    "normalize_router": Change(True, length_matters_to_the_router, True, False),
    "learned_phi": Change(False, routing_repeats, True, False),
    "load_balancing": Change("load", auxiliary_loss, 0, pytest.approx(LOAD), {"layer": "top1moe"}),
    "importance_weight": Change(
        3.0, auxiliary_loss, pytest.approx(IMPORTANCE + LOAD), pytest.approx(3 * IMPORTANCE + LOAD), BALANCED
    ),
    "load_weight": Change(
        3.0, auxiliary_loss, pytest.approx(IMPORTANCE + LOAD), pytest.approx(IMPORTANCE + 3 * LOAD), BALANCED
    ),
    # Nature: 8x8x4x32, 4x4x32x64, 3x3x64x64. Impala: a first convolution and four more, 16, 32, 32 channels.
    "encoder": Change("impala", encoder_parameters, 8_224 + 32_832 + 36_928, 592 + 9_280 + 4_640 + 36_992 + 46_240),
    "encoder_width": Change(2, encoder_parameters, 8_224 + 32_832 + 36_928, 16_448 + 131_200 + 147_584),
    # Replay
    "buffer_size": Change(200, lambda args: record(args).replay.rows, 100, 50),
    "batch_size": Change(8, lambda args: record(args).batch_sizes, {16}, {8}),
    "n_step": Change(3, lambda args: record(args).replay.n_step, 1, 3),
    "replay_ratio": Change(0.5, lambda args: record(args).updates, 10, 20),
    "replay_device": Change("cpu", where_the_replay_goes, "cuda", "cpu"),
    "save_replay": Change(True, logged_shards, 0, 1),
    "replay_shard_size": Change(30, logged_shards, 1, 4, {"save_replay": True}),  # 4 lanes of 3 + 16 + 1 rows
    # Optimisation
    "learning_rate": Change(1e-3, lambda args: record(args).adam["lr"], 6.25e-5, 1e-3),
    "adam_eps": Change(1e-8, lambda args: record(args).adam["eps"], 1.5e-4, 1e-8),
    "gamma": Change(0.5, lambda args: record(args).replay.gammas[1].item(), pytest.approx(0.99), 0.5),
    "learning_starts": Change(44, lambda args: record(args).updates, 10, 5),
    "target_network_frequency": Change(32, lambda args: record(args).copies, 1 + 4, 1 + 2),
    # DQN: the last action is chosen at step 60, 36 steps after learning starts
    "end_epsilon": Change(0.5, lambda args: record(args).epsilons[-1], pytest.approx(0.01), 0.5),
    "epsilon_decay_steps": Change(
        72, lambda args: record(args).epsilons[-1], pytest.approx(0.01), pytest.approx(1 - 0.99 / 2)
    ),
    "eval_epsilon": Change(0.5, epsilons_in_evaluation, {0.001}, {0.5}),
}
GPU_ONLY = {"compile", "cuda_graphs"}  # how the same update is launched; a CPU runs it as it is


def test_every_argument_is_in_the_table():
    assert set(CHANGES) | GPU_ONLY == {field.name for field in fields(Args)}
    assert not set(CHANGES) & GPU_ONLY


@pytest.mark.parametrize("name", CHANGES, ids=flag)
def test_argument_changes_what_it_should(tmp_path, monkeypatch, name):
    change = CHANGES[name]
    args = tiny(**change.given)
    assert getattr(args, name) != change.value
    for folder, given, expected in [
        ("before", args, change.before),
        ("after", replace(args, **{name: change.value}), change.after),
    ]:
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        assert change.observe(given) == expected, folder


MAY_CHANGE = {"resume", "total_timesteps", "checkpoint_every", "eval_episodes", "cuda", "replay_device"}


@pytest.mark.parametrize("name", CHANGES, ids=flag)
def test_argument_that_contradicts_a_resumed_run(refusal, name):
    saved = tiny(resume="run", **CHANGES[name].given)
    args = replace(saved, **{name: CHANGES[name].value})
    if name in MAY_CHANGE:
        check_resume(args, saved)
    else:
        line = refusal(check_resume, args, saved)
        assert line.endswith(f"the run: {flag(name)} {getattr(args, name)} (was {getattr(saved, name)})")


def test_gpu_only_arguments_may_change_with_resume():
    check_resume(tiny(resume="run", compile=False, cuda_graphs=False), tiny(resume="run"))


@pytest.mark.parametrize(
    "load_balancing, expected",
    [("none", 0), ("importance", IMPORTANCE), ("load", LOAD), ("importance+load", IMPORTANCE + LOAD)],
)
def test_load_balancing(load_balancing, expected):
    assert auxiliary_loss(tiny(layer="top1moe", load_balancing=load_balancing)) == pytest.approx(expected)


@pytest.mark.parametrize("layer, name", [("softmoe", "SoftMoE"), ("top1moe", "Top1MoE"), ("dense", "DenseLayer")])
def test_layer(layer, name):
    assert type(network(tiny(layer=layer)).moe).__name__ == name


@pytest.mark.parametrize(
    "tokenization, shape",
    [
        ("PerConv", (36, 64)),
        ("PerFeat", (64, 36)),
        ("PerSamp", (1, 2304)),
        ("PerPatch", (4, 64)),
        ("PerPatchAvg", (4, 64)),
    ],
)
def test_tokenization(tokenization, shape):
    q_network = QNetwork(tiny(tokenization=tokenization), (4, 48, 48), 3)  # 6x6x64 features
    assert (q_network.moe.num_tokens, q_network.moe.token_dim) == shape
    assert ("tokenizer.embedding.weight" in q_network.state_dict()) == (tokenization == "PerPatch")


def test_cuda_without_a_device_says_so_and_goes_on(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(tiny(runs_dir=str(tmp_path), cuda=True))
    text = capsys.readouterr()
    assert notes(text.err) == ["no CUDA device: running on the CPU"]
    assert "64 agent steps done" in text.out and "CPU" in text.out


# --------------------------------------------------------------------------------------------------- paper's values

PAPER = {
    "total_timesteps": 50_000_000,  # 200M frames
    "iteration_steps": 250_000,
    "sticky_actions": 0.25,
    "noop_max": 0,
    "terminal_on_life_loss": False,
    "layer": "softmoe",
    "num_experts": 8,
    "expert_hidden_dim": 512,
    "tokenization": "PerConv",
    "capacity_factor": 1.0,
    "normalize_router": False,
    "learned_phi": True,
    "load_balancing": "none",
    "importance_weight": 1.0,
    "load_weight": 1.0,
    "encoder": "impala",
    "encoder_width": 1,
    "buffer_size": 1_000_000,
    "batch_size": 32,
    "n_step": 1,
    "replay_ratio": 1 / 4,
    "learning_rate": 6.25e-5,
    "adam_eps": 1.5e-4,
    "gamma": 0.99,
    "learning_starts": 20_000,
    "target_network_frequency": 8_000,
    "end_epsilon": 0.01,
    "epsilon_decay_steps": 250_000,
    "eval_epsilon": 0.001,
}


def test_defaults_are_the_papers_values():
    args = Args()
    assert {name: getattr(args, name) for name in PAPER} == PAPER


def test_adam_is_otherwise_as_in_the_paper(tmp_path):
    adam = record(tiny(runs_dir=str(tmp_path))).adam
    assert adam["betas"] == (0.9, 0.999) and adam["weight_decay"] == 0 and not adam["amsgrad"]


def atari_network(**overrides) -> QNetwork:
    """For a game with all 18 actions; shapes only."""
    with torch.device("meta"):
        return QNetwork(Args(**overrides), (4, 84, 84), 18)


@pytest.mark.parametrize("given, width", [({}, 512), ({"num_experts": 4}, 2048), ({"expert_hidden_dim": 64}, 64)])
def test_width_of_the_dense_layer(given, width):
    assert atari_network(layer="dense", **given).moe.linear.weight.shape == (width, 11 * 11 * 32)


@pytest.mark.parametrize(
    "layer, num_experts, millions",
    [("dense", 1, "2.09"), ("dense", 2, "4.08"), ("dense", 4, "8.07"), ("dense", 8, "16.0")]
    + [("softmoe", 1, "0.20"), ("softmoe", 2, "0.24"), ("softmoe", 4, "0.30"), ("softmoe", 8, "0.44")],
)
def test_number_of_parameters(layer, num_experts, millions):
    count = sum(p.numel() for p in atari_network(layer=layer, num_experts=num_experts).parameters())
    assert f"{count / 1e6:.{len(millions.partition('.')[2])}f}" == millions


# ---------------------------------------------------------------------------------------------------- command line


def command(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    line = [sys.executable, str(ROOT / "dqn_softmoe.py"), *map(str, arguments)]
    return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)


def test_help_mentions_every_flag(tmp_path):
    result = command(tmp_path, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert [field.name for field in fields(Args) if not re.search(rf"{flag(field.name)}\b", result.stdout)] == []


def test_command_line_with_an_unknown_environment(tmp_path):
    result = command(tmp_path, "--env-id", "BrekoutNoFrameskip-v4", "--no-cuda")
    assert result.returncode == 2 and result.stdout == "" and list(tmp_path.iterdir()) == []
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "`BreakoutNoFrameskip`" in line


def test_command_line_that_contradicts_a_resumed_run(run, tmp_path):
    """Eight experts are the default, but were not the run's."""
    before = contents(run)
    result = command(tmp_path, "--resume", run, "--num-experts", 8)
    assert result.returncode == 2 and contents(run) == before
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "--num-experts 8 (was 2)" in line


def test_command_line_that_goes_on(run, tmp_path):
    result = command(tmp_path, "--resume", run, "--total-timesteps", 96)
    assert result.returncode == 0 and "96 agent steps done" in result.stdout, result.stderr
    assert last_checkpoint(run).name == "checkpoint-000000000096"
    assert [int(row["global_step"]) for row in read_csv(run / "metrics.csv")] == [32, 64, 96]
    assert list(tmp_path.iterdir()) == [run]
