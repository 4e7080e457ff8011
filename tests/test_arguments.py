"""Tests of the arguments of dqn_softmoe.py: what each one changes, what is refused, and damaged runs.

A refusal is exit code 2 and one line on stderr that starts with "error: ". It creates no run, and it changes no file of
the run to resume.
"""

import gc
import json
import math
import os
import pickle
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from runs import checkpoint, files, notes, only_run, quick, read_csv

import dqn_softmoe
from dqn_softmoe import Agent, Args, Environments, QNetwork, ReplayBuffer, main, open_run, reset_seed

# A run of 16 rounds of 4 agent steps, with an update in each of the last 10.
TINY = {"total_timesteps": 64, "learning_starts": 24, "buffer_size": 400, "batch_size": 16, "eval_episodes": 0}
TINY |= {"epsilon_decay_steps": 20, "target_network_frequency": 16, "iteration_steps": 32, "checkpoint_every": 0}


def tiny(**overrides) -> Args:
    return Args(**quick(**TINY | overrides))


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def spy(patch: pytest.MonkeyPatch, owner, name: str) -> list[tuple]:
    """Return a list that gets the positional arguments of every call of `owner.name` from now on."""
    calls, original = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapper)
    return calls


@pytest.fixture
def check_refusal(capfd):
    """Return a function that checks that a call fails with one error line with these words, and returns the line."""

    def call(words, function, *arguments) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*arguments)
        (line,) = [line for line in notes(capfd.readouterr().err) if not line.startswith("no CUDA device")]
        assert stop.value.code == 2 and line.startswith("error: ")
        assert [word for word in words if word not in line] == [], line
        return line

    return call


@pytest.fixture
def check_refused_run(check_refusal, tmp_path):
    """Return a function that checks that `main` refuses its arguments with these words and leaves no run behind."""

    def call(words, **overrides):
        check_refusal(words, main, tiny(runs_dir=str(tmp_path / "runs"), **overrides))
        assert files(tmp_path) == {}
        if (tmp_path / "runs").exists():
            gc.collect()  # release its lock, which the traceback holds

    return call


# -------------------------------------------------------------------------------------------------- bad arguments
BAD_NUMBERS = {
    "num_experts expert_hidden_dim encoder_width batch_size n_step num_envs total_timesteps iteration_steps": [0, -1],
    "target_network_frequency impala_filter": [0, -1],
    "seed weights_every eval_episodes noop_max epsilon_decay_steps": [-1, 2**64],
    "sticky_actions end_epsilon eval_epsilon gamma": [-0.1, 1.1, math.nan],
    "capacity_factor learning_rate adam_eps": [0.0, -1.0, math.nan, math.inf],
    "importance_weight load_weight": [-1.0, math.nan, math.inf],
    "replay_ratio": [0.0, -1.0, math.nan, math.inf, 1e300],
    "checkpoint_every": [-1, 1, 7],  # less than two rounds of 4
    "learning_starts": [-1, 0, 11],  # less than n + 2 rounds of 4
    "buffer_size": [-1, 0, 23],  # less than stack + n + 1 rows of 4
}


@pytest.mark.parametrize("names, values", BAD_NUMBERS.items())
def test_number_out_of_range(check_refused_run, names, values):
    balanced = {"layer": "top1moe", "load_balancing": "importance+load"} if "load_weight" in names else {}
    for name in names.split():
        for value in values:
            check_refused_run([flag(name), str(value)], **{name: value}, **balanced)


def test_every_number_has_bad_values():
    numbers = {field.name for field in fields(Args) if field.type in (int, float, int | None)}
    assert numbers == set(" ".join(BAD_NUMBERS).split())


class Blank(gym.Env):
    """A game that never ends. Its frames are zeros of any shape and dtype."""

    def __init__(self, shape=(10, 8), dtype=np.uint8, action_space=None, error: Exception | None = None):
        if error is not None:
            raise error
        self.observation_space = gym.spaces.Box(0, 255, shape, dtype)
        self.action_space = gym.spaces.Discrete(3) if action_space is None else action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), {}

    def step(self, action):
        return *self.reset()[:1], 0.0, False, False, {}


BLANKS = {"Good": {}, "Broken": {"error": RuntimeError("no display\nwas found")}, "Float": {"dtype": np.float32}}
BLANKS |= {"RGB": {"shape": (12, 12, 3)}, "Stacked": {"shape": (4, 12, 12)}}
BLANKS |= {"Continuous": {"action_space": gym.spaces.Box(-1, 1, (2,))}}
BLANKS |= {"FromOne": {"action_space": gym.spaces.Discrete(3, start=1)}}
for blank, options in BLANKS.items():
    gym.register(f"Blank{blank}-v0", entry_point=Blank, kwargs=options)
gym.register("RamBreakout-v0", entry_point="ale_py.env:AtariEnv", kwargs={"game": "breakout", "obs_type": "ram"})

REFUSED = [  # arguments, words of the error; the pixel game has frames of 12x12 and feature maps of 2x2
    ({"env_id": "BrekoutNoFrameskip-v4"}, ["Did you mean", "`BreakoutNoFrameskip`"]),
    ({"env_id": "ALE/Breakout-v9"}, ["v9", "`v5`"]),
    ({"env_id": "no id at all"}, []),
    ({"env_id": ""}, []),
    ({"env_id": "no_such_module:Game-v0"}, ["No module named 'no_such_module'"]),
    ({"env_id": "json:NoSuchGame-v0"}, ["NoSuchGame"]),
    ({"env_id": "broken_game:Game-v0"}, ["no licence"]),
    ({"env_id": "BlankContinuous-v0"}, ["Discrete", "Box"]),
    ({"env_id": "BlankFromOne-v0"}, ["start at 0", "start=1"]),
    ({"env_id": "BlankFloat-v0"}, ["uint8", "(H, W)", "float32"]),
    ({"env_id": "BlankRGB-v0"}, ["uint8", "(H, W)", "(12, 12, 3)"]),
    ({"env_id": "BlankStacked-v0"}, ["uint8", "(H, W)", "(4, 12, 12)"]),
    ({"env_id": "RamBreakout-v0"}, ["uint8", "(H, W)", "(128,)"]),
    ({"env_id": "CartPole-v1"}, ["uint8", "(H, W)", "(4,)", "float32"]),
    ({"env_id": "BlankBroken-v0"}, ["RuntimeError: no display was found"]),
    ({"tokenization": "PerPatch"}, ["2x2", "3x3"]),
    ({"expert_hidden_dim": 10**12}, []),  # more than any memory
    ({"encoder_width": 10**18}, []),
    ({"normalize_router": True, "layer": "top1moe"}, ["--normalize-router has no effect", "softmoe"]),
    ({"learned_phi": False, "layer": "dense"}, ["--learned-phi has no effect", "softmoe"]),
    ({"load_balancing": "load"}, ["--load-balancing has no effect", "top1moe"]),
    ({"tokenization": "PerFeat", "layer": "dense"}, ["--tokenization has no effect", "tokens"]),
    ({"tokenization": "Shuffled", "layer": "gap"}, ["--tokenization has no effect", "tokens"]),
    ({"capacity_factor": 0.5, "layer": "tokenized"}, ["--capacity-factor has no effect", "softmoe"]),
    ({"expert_variant": "big", "layer": "top1moe"}, ["--expert-variant has no effect", "softmoe"]),
    ({"impala_filter": 4, "encoder": "nature"}, ["--impala-filter has no effect", "impala"]),
    ({"sticky_actions": 0.1}, ["--sticky-actions has no effect", "Atari"]),
    ({"terminal_on_life_loss": True}, ["--terminal-on-life-loss has no effect", "Atari"]),
    ({"importance_weight": 2.0}, ["--importance-weight has no effect", "importance"]),
    ({"importance_weight": 2.0, "layer": "top1moe", "load_balancing": "load"}, ["--importance-weight has no effect"]),
    ({"load_weight": 2.0, "layer": "top1moe", "load_balancing": "importance"}, ["--load-weight has no effect"]),
]


@pytest.mark.parametrize("given, words", REFUSED, ids=lambda x: str(x)[:60])
def test_arguments_that_cannot_work_are_refused(check_refused_run, tmp_path_factory, monkeypatch, given, words):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "broken_game.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(folder)
    check_refused_run(words, **given)


@pytest.mark.parametrize("owner, name", [(shutil, "which"), (sysconfig, "get_path")])
def test_compiling_without_a_compiler_or_headers(check_refused_run, monkeypatch, owner, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(owner, name, lambda _: "")
    check_refused_run(["--compile", "gcc", "Python.h", "--no-compile"], cuda=True)


# The smallest values that work: stack + n + 1 rows of 4, n + 2 rounds of 4, and two rounds of 4.
SMALLEST = [
    {"n_step": 1, "buffer_size": 24, "learning_starts": 12, "checkpoint_every": 8},
    {"n_step": 10, "buffer_size": 60, "learning_starts": 48, "checkpoint_every": 8},
]


@pytest.mark.parametrize("smallest", SMALLEST)
def test_the_smallest_sizes_work_and_one_less_is_refused(check_refused_run, tmp_path, monkeypatch, smallest):
    for name in ("buffer_size", "learning_starts"):
        check_refused_run([flag(name), str(smallest[name])], **smallest | {name: smallest[name] - 1})
    weights, gather = [], ReplayBuffer.gather
    monkeypatch.setattr(ReplayBuffer, "gather", lambda replay, i: weights.append(replay.weight[i]) or gather(replay, i))
    main(tiny(runs_dir=str(tmp_path), replay_ratio=1.0, total_timesteps=200, **smallest))
    assert len(weights) == 200 - smallest["learning_starts"] and all((weight == 1).all() for weight in weights)


@pytest.mark.parametrize("total, warns", [(64, False), (24, True), (8, True)])
def test_a_run_that_learns_nothing_warns(tmp_path, capsys, total, warns):
    main(tiny(runs_dir=str(tmp_path), total_timesteps=total))
    warning = "warning: nothing will be learned, --total-timesteps is not above --learning-starts"
    assert notes(capsys.readouterr().err) == [warning] * warns


@pytest.mark.parametrize("ratio, num_envs", [(0.25, 1), (0.3, 4), (1 / 3, 3), (1.0, 5), (2.7, 2), (0.001, 4)])
def test_updates_per_agent_step_with_any_number_of_environments(tmp_path, monkeypatch, ratio, num_envs):
    updates, resume = spy(monkeypatch, torch.optim.Adam, "step"), None
    for total in (90, 120):
        given = {"replay_ratio": ratio, "num_envs": num_envs, "batch_size": 2, "total_timesteps": total}
        main(tiny(runs_dir=str(tmp_path), resume=resume, **given))
        steps, resume = math.ceil(total / num_envs) * num_envs, str(only_run(tmp_path))
        assert len(updates) == int((steps - 24) * ratio)


# ---------------------------------------------------------------------------------------- run directories and resume
@pytest.mark.parametrize("below", [".", "runs/deeper"])
def test_run_directory_that_cannot_be_written(check_refusal, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("precious")
    check_refusal([str(file)], main, tiny(runs_dir=str(file / below)))
    assert file.read_text() == "precious"


def test_existing_run_directory_is_never_touched(tmp_path):
    args = tiny(runs_dir=str(tmp_path / "runs"), run_name="mine", total_timesteps=28)
    main(args)
    before = files(tmp_path / "runs" / "mine")
    main(args)
    main(args)
    assert files(tmp_path / "runs" / "mine") == before
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"mine", "mine-2", "mine-3"}
    assert files(tmp_path / "runs/mine-3").keys() > {"config.json", "episodes.csv", "metrics.csv", "weights.pt"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of 64 agent steps."""
    runs = tmp_path_factory.mktemp("finished")
    main(tiny(runs_dir=str(runs)))
    return only_run(runs)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def script(monkeypatch):
    """Return a function that runs dqn_softmoe.py with the given command line."""

    def call(*line: object):
        monkeypatch.setattr(sys, "argv", ["dqn_softmoe.py", *map(str, line)])
        with dqn_softmoe.one_line_errors(Exception):
            args = dqn_softmoe.parse_args()
        main(args)

    return call


class Exploit:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path.with_name("exploited")

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def edit_checkpoint(change: Callable[[dict, Path], object]) -> Callable[[Path], None]:
    """Return a function that applies `change` to the contents of a checkpoint."""
    return lambda path: torch.save(change(torch.load(path, weights_only=True), path), path)


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path):
        path = path.with_name("config.json")
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


DAMAGES = {  # function that damages a run, given the path of its checkpoint; words of the error
    "no checkpoint": (Path.unlink, ["no checkpoint"]),
    "pickled checkpoint": (edit_checkpoint(lambda _, path: {"q_network": Exploit(path)}), []),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps(Exploit(path))), []),
    "another program's": (edit_checkpoint(lambda old, _: {"model": old["q_network"]}), ["q_network"]),
    "no dict": (edit_checkpoint(lambda *_: [1, 2]), []),
    "another network": (edit_checkpoint(lambda old, _: old | {"q_network": old["replay"]}), ["head.weight"]),
    "no replay": (edit_checkpoint(lambda old, _: {name: old[name] for name in old if name != "replay"}), ["replay"]),
    "truncated configuration": (lambda path: path.with_name("config.json").write_text('{"script": "dqn'), []),
    "configuration that is not text": (lambda path: path.with_name("config.json").write_bytes(b"\xff\xfe\x00"), []),
    "a list": (edit_config(lambda old: [old]), []),
    "another script's": (edit_config(lambda old: old | {"script": "der_softmoe.py"}), ["der_softmoe.py"]),
    "without arguments": (edit_config(lambda old: {"script": old["script"]}), ["args"]),
    "no such encoder": (edit_config(lambda old: old | {"args": old["args"] | {"encoder": "impalb"}}), ["encoder"]),
    "unknown argument": (edit_config(lambda old: old | {"args": old["args"] | {"sigma": 1}}), ["sigma"]),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_damaged_run(check_refusal, script, run, damage, words):
    damage(run / "checkpoint.pt")
    before = files(run)
    check_refusal(words, script, "--resume", run, "--total-timesteps", 96)
    assert files(run) == before and not (run / "exploited").exists()


def test_resuming_a_run_that_is_missing(check_refusal, script, tmp_path):
    check_refusal(["no such run"], script, "--resume", tmp_path / "no such run")
    assert list(tmp_path.iterdir()) == []


def test_an_error_lists_all_contradictions(check_refusal, script, run):
    before = files(run)
    words = ["--resume", str(run), "num_experts 8 (was 2)", "seed 5 (was 1)", "gamma 0.5 (was 0.99)"]
    line = "--num-experts", 8, "--seed", 5, "--gamma", 0.5, "--total-timesteps", 96
    assert "total" not in check_refusal(words, script, "--resume", run, *line) and files(run) == before


def test_fewer_steps_than_the_run_has_done(check_refusal, script, run):
    before = files(run)
    check_refusal(["--total-timesteps 60", "64"], script, "--resume", run, "--total-timesteps", 60)
    assert files(run) == before
    gc.collect()  # release the lock, which the traceback holds
    script("--resume", run, "--total-timesteps", 61)  # 61 steps take as many rounds as 64


def test_resume_keeps_arguments_that_are_not_given(script, run, capsys):
    script("--resume", run, "--total-timesteps", 96)
    assert "96 agent steps done" in capsys.readouterr().out
    assert checkpoint(run)["progress"]["global_step"] == 96
    assert [int(row["global_step"]) for row in read_csv(run / "metrics.csv")] == [32, 64, 96]
    saved = json.loads((run / "config.json").read_text())["args"]
    assert saved == vars(tiny(total_timesteps=96, runs_dir=saved["runs_dir"]))


# ------------------------------------------------------------------------------------------ what each argument does
def record(folder: Path, **overrides) -> SimpleNamespace:
    """Return what a run passed to replay, optimizer, environments, records and disk."""
    with pytest.MonkeyPatch.context() as patch:
        samples, steps = spy(patch, ReplayBuffer, "sample"), spy(patch, torch.optim.Adam, "step")
        actions, copies = spy(patch, dqn_softmoe, "select_actions"), spy(patch, Agent, "update_target")
        resets, saves = spy(patch, Environments, "reset"), spy(patch, Agent, "save")
        balancing = spy(patch, dqn_softmoe.moe, "load_balancing_loss")
        main(tiny(runs_dir=str(folder), **overrides))
    run = only_run(folder)
    return SimpleNamespace(
        **{"replay": samples[0][0], "batch_sizes": {call[1] for call in samples}, "adam": steps[0][0].param_groups[0]},
        **{"updates": len(steps), "copies": len(copies), "epsilons": [float(epsilon) for _, epsilon in actions]},
        **{"seeds": (torch.initial_seed(), resets[0][1]), "saves": [call[2]["global_step"] for call in saves]},
        **{"balancing": {call[1:] for call in balancing}, "moe": saves[0][0].q_network.moe},
        encoder=sum(p.numel() for p in saves[0][0].q_network.encoder.parameters()),
        iterations=[int(row["global_step"]) for row in read_csv(run / "metrics.csv")],
        files={name.partition("/")[0] for name in files(run)},
        evaluated=json.loads((run / "eval.json").read_text())["episodes"] if (run / "eval.json").exists() else 0,
    )


def router_ignores_token_norms(run: SimpleNamespace) -> bool:
    tokens = torch.linspace(0, 1, 256).view(1, 4, 64)
    return torch.allclose(*(run.moe(scale * tokens).routing.router_probs for scale in (1, 9)))


class Change(NamedTuple):
    """`look(run)` is `before` with TINY and `given`, and `after` if the argument has `value`, too."""

    value: object
    look: Callable[[SimpleNamespace], object]
    before: object
    after: object
    given: dict = {}


BOTH = "importance+load"
BALANCED = {"layer": "top1moe", "load_balancing": BOTH}
CHANGES = {
    # Run
    "env_id": Change("BlankGood-v0", lambda run: run.replay.frames.shape[1:], (12, 12), (10, 8)),
    "seed": Change(7, lambda run: run.seeds, (1, reset_seed(1, 0)), (7, reset_seed(7, 0))),
    "total_timesteps": Change(80, lambda run: len(run.epsilons), 16, 20),
    "checkpoint_every": Change(32, lambda run: run.saves, [64], [32, 64]),
    "checkpoint_at_end": Change(False, lambda run: "checkpoint.pt" in run.files, True, False),
    "weights_every": Change(32, lambda run: "weights" in run.files, False, True),
    "iteration_steps": Change(16, lambda run: run.iterations, [32, 64], [16, 32, 48, 64]),
    "eval_episodes": Change(3, lambda run: run.evaluated, 0, 3),
    "num_envs": Change(2, lambda run: len(run.epsilons), 16, 32),
    # Network: 4 tokens of 64, two experts of 2 slots each
    "layer": Change("dense", lambda run: type(run.moe).__name__, "SoftMoE", "DenseLayer"),
    "num_experts": Change(3, lambda run: run.moe.experts.w1.shape, (2, 64, 16), (3, 64, 16)),
    "expert_hidden_dim": Change(24, lambda run: run.moe.experts.w1.shape, (2, 64, 16), (2, 64, 24)),
    "tokenization": Change("PerFeat", lambda run: run.moe.phi.shape[0], 64, 4),
    "capacity_factor": Change(1.5, lambda run: run.moe.num_slots, 2, 3),
    "normalize_router": Change(True, router_ignores_token_norms, False, True),
    "learned_phi": Change(False, lambda run: "phi" in run.moe.state_dict(), True, False),
    "expert_variant": Change("big", lambda run: type(run.moe.experts).__name__, "Experts", "BigExperts"),
    "load_balancing": Change("load", lambda run: run.balancing, set(), {("load", 1, 1)}, {"layer": "top1moe"}),
    "importance_weight": Change(3.0, lambda run: run.balancing, {(BOTH, 1, 1)}, {(BOTH, 3, 1)}, BALANCED),
    "load_weight": Change(3.0, lambda run: run.balancing, {(BOTH, 1, 1)}, {(BOTH, 1, 3)}, BALANCED),
    # Nature: 8x8x4x32, 4x4x32x64, 3x3x64x64. Impala: three stacks of five convolutions, with 16, 32 and 32 channels.
    "encoder": Change("impala", lambda run: run.encoder, 77_984, 592 + 9_280 + 4_640 + 36_992 + 46_240),
    "encoder_width": Change(2, lambda run: run.encoder, 8_224 + 32_832 + 36_928, 16_448 + 131_200 + 147_584),
    "impala_filter": Change(
        4, lambda run: run.encoder, 97_744, 1_040 + 16_448 + 8_224 + 65_664 + 82_080, {"encoder": "impala"}
    ),
    # Replay
    "buffer_size": Change(200, lambda run: run.replay.rows, 100, 50),
    "batch_size": Change(8, lambda run: run.batch_sizes, {16}, {8}),
    "n_step": Change(3, lambda run: len(run.replay.window_offsets), 1, 3),
    "replay_ratio": Change(0.5, lambda run: run.updates, 10, 20),
    "save_replay": Change(True, lambda run: "replay" in run.files, False, True),
    # Optimisation
    "learning_rate": Change(1e-3, lambda run: run.adam["lr"], 6.25e-5, 1e-3),
    "adam_eps": Change(1e-8, lambda run: run.adam["eps"], 1.5e-4, 1e-8),
    "gamma": Change(0.5, lambda run: run.replay.gammas[1].item(), pytest.approx(0.99), 0.5),
    "learning_starts": Change(44, lambda run: run.updates, 10, 5),
    "target_network_frequency": Change(32, lambda run: run.copies, 4, 2),
    # DQN: the last action is chosen at step 60, 36 steps after learning starts
    "end_epsilon": Change(0.5, lambda run: run.epsilons[-1], pytest.approx(0.01), 0.5),
    "epsilon_decay_steps": Change(72, lambda run: run.epsilons[-1], pytest.approx(0.01), pytest.approx(1 - 0.99 / 2)),
    "eval_epsilon": Change(0.5, lambda run: run.epsilons[-1], 0.001, 0.5, {"eval_episodes": 2}),
}


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> SimpleNamespace:
    return record(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", CHANGES, ids=flag)
def test_argument_changes_what_it_should(tmp_path, default_run, name):
    value, look, before, after, given = CHANGES[name]
    assert look(record(tmp_path / "before", **given) if given else default_run) == before
    assert look(record(tmp_path / "after", **given | {name: value})) == after


def test_arguments_reach_the_atari_environment(monkeypatch):
    def make(game: str, num_envs: int, **settings) -> SimpleNamespace:
        frames, actions = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8), gym.spaces.Discrete(4)
        return SimpleNamespace(single_observation_space=frames, single_action_space=actions, settings=settings)

    monkeypatch.setattr(dqn_softmoe, "AtariVectorEnv", make)
    for given, expected in [({}, (0.25, 1, False)), (ATARI, (0.1, 117, True))]:  # ale-py draws fewer no-ops than 117
        envs = Environments(Args(**given), 2)
        settings = envs.envs.settings
        assert (settings["repeat_action_probability"], settings["noop_max"], envs.life_loss) == expected


def test_the_replay_is_on_the_gpu_if_it_fits(monkeypatch):
    """A transition takes 144 bytes for its frame of 12x12, and 22 for action, reward, flags and weight."""
    for given, free, expected in [({}, 10**9, "cuda"), ({"replay_device": "cpu"}, 10**9, "cpu"), ({}, 80_000, "cpu")]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**9))
        assert dqn_softmoe.replay_device(tiny(**given), (12, 12), torch.device("cuda")).type == expected


ATARI = {"sticky_actions": 0.1, "noop_max": 30, "terminal_on_life_loss": True}  # the Atari test above covers these
OTHERS = {"runs_dir": "elsewhere", "run_name": "mine", "cuda": True, "replay_device": "cpu"}
OTHERS |= {"compile": False, "cuda_graphs": False}  # these have no effect on a CPU
MAY_CHANGE = {"total_timesteps", "checkpoint_every", "checkpoint_at_end", "weights_every", "eval_episodes", *OTHERS}
VALUES = {name: change.value for name, change in CHANGES.items()} | ATARI | OTHERS


def test_every_argument_is_in_a_table():
    assert VALUES.keys() | {"resume"} == {field.name for field in fields(Args)}


@pytest.mark.parametrize("name", VALUES, ids=flag)
def test_argument_that_contradicts_a_resumed_run(run, name):
    path, saved = run / "config.json", replace(tiny(), resume=str(run))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"args": vars(saved)}))
    args = replace(saved, **{name: VALUES[name]})
    assert getattr(args, name) != getattr(saved, name)
    if name in MAY_CHANGE:
        assert open_run(args)[0] == run
    else:
        with pytest.raises(ValueError, match=re.escape(f"{name} {VALUES[name]} (was {getattr(saved, name)})")):
            open_run(args)


# --------------------------------------------------------------------------------------------------- paper's values
PAPER = {"total_timesteps": 50_000_000, "iteration_steps": 250_000, "sticky_actions": 0.25, "noop_max": 0}
PAPER |= {"terminal_on_life_loss": False, "layer": "softmoe", "num_experts": 8, "expert_hidden_dim": 512}
PAPER |= {"tokenization": "PerConv", "capacity_factor": 1.0, "normalize_router": False, "learned_phi": True}
PAPER |= {"load_balancing": "none", "importance_weight": 1.0, "load_weight": 1.0, "encoder": "impala"}
PAPER |= {"encoder_width": 1, "buffer_size": 1_000_000, "batch_size": 32, "n_step": 1, "replay_ratio": 1 / 4}
PAPER |= {"learning_rate": 6.25e-5, "adam_eps": 1.5e-4, "gamma": 0.99, "learning_starts": 20_000}
PAPER |= {"target_network_frequency": 8_000, "end_epsilon": 0.01, "epsilon_decay_steps": 250_000}
PAPER |= {"eval_epsilon": 0.001}


def test_defaults_are_the_papers_values(default_run):
    assert vars(Args()).items() >= PAPER.items()
    dqn_softmoe.check_args(Args())
    adam = default_run.adam
    assert adam["betas"] == (0.9, 0.999) and adam["weight_decay"] == 0 and not adam["amsgrad"]


# Millions of parameters with 18 actions, by layer and --num-experts, which multiplies the width of the dense layer.
SIZES = {("dense", None): "2.09", ("dense", 2): "4.08", ("dense", 4): "8.07", ("dense", 8): "16.0"}
SIZES |= {("softmoe", 1): "0.20", ("softmoe", 2): "0.24", ("softmoe", 4): "0.30", ("softmoe", None): "0.44"}


def test_number_of_parameters():
    for (layer, num_experts), millions in SIZES.items():
        with torch.device("meta"):
            q_network = QNetwork(Args(layer=layer, num_experts=num_experts), (4, 84, 84), 18)
        count = sum(p.numel() for p in q_network.parameters())
        assert f"{count / 1e6:.{len(millions.partition('.')[2])}f}" == millions


# ---------------------------------------------------------------------------------------------------- command line
def test_help_mentions_every_flag_with_its_comment(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        script("--help")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert [field.name for field in fields(Args) if not re.search(rf"{flag(field.name)}\b", out)] == []
    assert "updates per agent step (paper: 0.25; figure 4: 0.5, 1, 2; DER: 1)" in " ".join(out.split())


def test_invalid_command_lines(script, capsys):
    for line in (["--no-such-flag", 3], ["--num-envs", "four"], ["--layer", "hard"]):
        with pytest.raises(SystemExit) as stop:
            script(*line)
        assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err
