"""Arguments of `dqn_softmoe.py`: what each one changes, what is refused and in which words, damaged runs.

A refusal is exit code 2 and one line on stderr that starts with "error: ". It leaves no new run behind, and every file
of the run that it would have resumed as it was.
"""

import gc
import json
import math
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import checkpoint, files, notes, only_run, quick, read_csv

import dqn_softmoe
from dqn_softmoe import (
    Agent,
    Args,
    Environments,
    QNetwork,
    ReplayBuffer,
    check_args,
    main,
    open_run,
    parse_args,
    replay_device,
    reset_seed,
)

# 16 rounds of 4 agent steps, updates in the last 10.
TINY = {"total_timesteps": 64, "learning_starts": 24, "buffer_size": 400, "batch_size": 16, "eval_episodes": 0}
TINY |= {"epsilon_decay_steps": 20, "target_network_frequency": 16, "iteration_steps": 32, "checkpoint_every": 0}


def tiny(**overrides) -> Args:
    return Args(**quick(**TINY | overrides))


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


@pytest.fixture
def refusal(capfd):
    """Calls a function that must refuse its input, in silence but for one line; returns that line."""

    def call(function, *arguments) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*arguments)
        (line,) = [line for line in notes(capfd.readouterr().err) if not line.startswith("no CUDA device")]
        assert stop.value.code == 2 and line.startswith("error: ")
        del stop
        gc.collect()  # the traceback holds the run's lock
        return line

    return call


@pytest.fixture
def refused_run(refusal, tmp_path):
    """Calls `main`, which must refuse its arguments in these words and leave no run behind."""

    def call(words, **overrides):
        line = refusal(main, tiny(runs_dir=str(tmp_path / "runs"), **overrides))
        assert [word for word in words if word not in line] == [], line
        assert files(tmp_path) == {}

    return call


# -------------------------------------------------------------------------------------------------- bad arguments
BAD_NUMBERS = {
    "num_experts expert_hidden_dim encoder_width batch_size n_step num_envs total_timesteps iteration_steps": [0, -1],
    "target_network_frequency": [0, -1],
    "seed weights_every eval_episodes noop_max epsilon_decay_steps": [-1, 2**64],
    "sticky_actions end_epsilon eval_epsilon gamma": [-0.1, 1.1, math.nan],
    "capacity_factor learning_rate adam_eps": [0.0, -1.0, math.nan, math.inf],
    "importance_weight load_weight": [-1.0, math.nan, math.inf],
    "replay_ratio": [0.0, -1.0, math.nan, math.inf, 1e300],
    "checkpoint_every": [-1, 1, 7],  # below two rounds of 4
    "learning_starts": [-1, 0, 11],  # below n + 2 rounds
    "buffer_size": [-1, 0, 23],  # below a stack, n and one
}


@pytest.mark.parametrize("names, values", BAD_NUMBERS.items())
def test_number_out_of_range(refused_run, names, values):
    balanced = {"layer": "top1moe", "load_balancing": "importance+load"} if "load_weight" in names else {}
    for name in names.split():
        for value in values:
            refused_run([flag(name), str(value)], **{name: value}, **balanced)


def test_every_number_has_bad_values():
    numbers = {field.name for field in fields(Args) if field.type in (int, float, int | None)}
    assert numbers == set(" ".join(BAD_NUMBERS).split())


IDLE_FLAGS = [
    ("normalize_router", True, {"layer": "top1moe"}, "softmoe"),
    ("learned_phi", False, {"layer": "dense"}, "softmoe"),
    ("load_balancing", "load", {"layer": "softmoe"}, "top1moe"),
    ("load_balancing", "importance", {"layer": "dense"}, "top1moe"),
    ("tokenization", "PerFeat", {"layer": "dense"}, "softmoe"),
    ("capacity_factor", 0.5, {"layer": "dense"}, "softmoe"),
    ("importance_weight", 2.0, {}, "importance"),
    ("importance_weight", 2.0, {"layer": "top1moe", "load_balancing": "load"}, "importance"),
    ("load_weight", 2.0, {"layer": "top1moe", "load_balancing": "importance"}, "load"),
]


@pytest.mark.parametrize("name, value, given, needs", IDLE_FLAGS)
def test_flag_without_effect(refused_run, name, value, given, needs):
    refused_run([flag(name), "has no effect", needs], **{name: value}, **given)


LEAST = [  # n, buffer: stack, n and one of 4 each; learning starts: n + 2 of 4; checkpoints after two rounds
    {"n_step": 1, "buffer_size": 24, "learning_starts": 12, "checkpoint_every": 8},
    {"n_step": 10, "buffer_size": 60, "learning_starts": 48, "checkpoint_every": 8},
]


@pytest.mark.parametrize("least", LEAST)
def test_the_least_that_works_and_the_most_that_does_not(refused_run, tmp_path, monkeypatch, least):
    for name in ("buffer_size", "learning_starts"):
        refused_run([flag(name), str(least[name])], **least | {name: least[name] - 1})
    weights, gather = [], ReplayBuffer.gather
    monkeypatch.setattr(
        ReplayBuffer, "gather", lambda replay, i: (weights.append(replay.weight.view(-1)[i]), gather(replay, i))[1]
    )
    main(tiny(runs_dir=str(tmp_path), replay_ratio=1.0, total_timesteps=200, **least))
    assert len(weights) == 200 - least["learning_starts"] and all((weight == 1).all() for weight in weights)


@pytest.mark.parametrize("name, size", [("expert_hidden_dim", 10**12), ("encoder_width", 10**18)])
def test_network_that_no_memory_holds(refused_run, name, size):
    refused_run([], **{name: size})


def test_compiling_without_a_compiler(refused_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    refused_run(["--compile", "gcc", "--no-compile"], cuda=True)


@pytest.mark.parametrize("tokenization", ["PerPatch", "PerPatchAvg"])
def test_tokenization_that_does_not_fit(refused_run, tokenization):
    refused_run(["2x2", "3x3"], tokenization=tokenization)  # 12x12 frames, features 2x2


@pytest.mark.parametrize("total, warns", [(64, False), (24, True), (8, True)])
def test_a_run_that_learns_nothing_says_so(tmp_path, capsys, total, warns):
    main(tiny(runs_dir=str(tmp_path), total_timesteps=total))
    assert [line for line in notes(capsys.readouterr().err) if "nothing will be learned" in line and warns] == (
        ["warning: nothing will be learned, --total-timesteps is not above --learning-starts"] * warns
    )


RATIOS = [(0.25, 4), (0.25, 1), (0.3, 4), (1 / 3, 3), (1.0, 5), (2.7, 2), (0.001, 4), (3.0, 1)]


@pytest.mark.parametrize("ratio, num_envs", RATIOS)
def test_updates_per_agent_step_with_any_number_of_environments(tmp_path, monkeypatch, ratio, num_envs):
    updates, resume = spy(monkeypatch, torch.optim.Adam, "step"), None
    for total in (150, 200):
        given = {"replay_ratio": ratio, "num_envs": num_envs, "batch_size": 2, "total_timesteps": total}
        main(tiny(runs_dir=str(tmp_path), resume=resume, **given))
        steps, resume = math.ceil(total / num_envs) * num_envs, str(only_run(tmp_path))
        assert len(updates) == int((steps - 24) * ratio)


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
    "no id at all": [],
    "": [],
    "no_such_module:Game-v0": ["No module named 'no_such_module'"],
    "json:NoSuchGame-v0": ["NoSuchGame"],
    ".relative:Game-v0": [],
    "broken_game:Game-v0": ["no licence"],
    "BlankContinuous-v0": ["Discrete", "Box"],
    "BlankButtons-v0": ["Discrete", "MultiBinary"],
    "BlankFromOne-v0": ["start at 0", "start=1"],
    "BlankFloat-v0": ["uint8", "(H, W)", "float32"],
    "BlankRGB-v0": ["uint8", "(H, W)", "(12, 12, 3)"],
    "BlankStacked-v0": ["uint8", "(H, W)", "(4, 12, 12)"],
    "BlankVector-v0": ["uint8", "(H, W)", "(128,)"],
    "RamBreakout-v0": ["uint8", "(H, W)", "(128,)"],
    "CartPole-v1": ["uint8", "(H, W)", "(4,)", "float32"],
    "BlankBroken-v0": ["RuntimeError: no display was found"],
    "BlankTypo-v0": ["TypeError: ", "unexpected"],
}


@pytest.mark.parametrize("env_id", BAD_ENVIRONMENTS)
def test_bad_environment(refused_run, tmp_path_factory, monkeypatch, env_id):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "broken_game.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(folder)
    refused_run(BAD_ENVIRONMENTS[env_id], env_id=env_id)


# ------------------------------------------------------------------------------------------------ run directories
@pytest.mark.parametrize("below", [".", "runs/deeper"])
def test_run_directory_that_cannot_be_written(refusal, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("precious")
    assert str(file) in refusal(main, tiny(runs_dir=str(file / below)))
    assert file.read_text() == "precious"


def test_existing_run_directory_is_never_touched(tmp_path):
    args = tiny(runs_dir=str(tmp_path), total_timesteps=28)
    main(args)
    first = only_run(tmp_path)
    before = files(first)
    main(args)
    main(args)
    assert files(first) == before
    assert {path.name for path in tmp_path.iterdir()} == {first.name, f"{first.name}-2", f"{first.name}-3"}
    assert files(tmp_path / f"{first.name}-3").keys() > {"config.json", "episodes.csv", "metrics.csv", "weights.pt"}


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


@pytest.fixture
def script(monkeypatch):
    """The script as it is called from a command line."""

    def call(*line: object):
        monkeypatch.setattr(sys, "argv", ["dqn_softmoe.py", *map(str, line)])
        with dqn_softmoe.one_line_errors(Exception):
            args = parse_args()
        main(args)

    return call


class Exploit:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def state(change: Callable[[dict, Path], object]) -> Callable[[Path], None]:
    """Change what the checkpoint holds."""
    return lambda path: torch.save(change(torch.load(path, weights_only=True), path), path)


def narrower_head(state: dict, _: Path) -> dict:
    return state | {"q_network": state["q_network"] | {"head.weight": state["q_network"]["head.weight"][:2]}}


def config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path):
        path = path.with_name("config.json")
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


DAMAGES = {  # damage to a run of which the checkpoint's path is given -> words of the refusal
    "no checkpoint": (Path.unlink, ["no checkpoint"]),
    "empty checkpoint": (lambda path: path.write_bytes(b""), []),
    "truncated checkpoint": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), []),
    "pickled checkpoint": (state(lambda _, path: {"q_network": Exploit(path.with_name("exploited"))}), []),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps(Exploit(path.with_name("exploited")))), []),
    "another program's": (state(lambda state, _: {"model": state["q_network"]}), ["q_network"]),
    "no dict": (state(lambda *_: [1, 2]), []),
    "another network": (state(narrower_head), ["head.weight"]),
    "no replay": (state(lambda state, _: {name: state[name] for name in state if name != "replay"}), ["replay"]),
    "no configuration": (lambda path: path.with_name("config.json").unlink(), ["config.json"]),
    "truncated configuration": (lambda path: path.with_name("config.json").write_text('{"script": "dqn'), []),
    "configuration that is not text": (lambda path: path.with_name("config.json").write_bytes(b"\xff\xfe\x00"), []),
    "a list": (config(lambda config: [config]), []),
    "another script's": (config(lambda config: config | {"script": "der_softmoe.py"}), ["der_softmoe.py"]),
    "without arguments": (config(lambda config: {"script": config["script"]}), ["args"]),
    "unknown argument": (config(lambda config: config | {"args": config["args"] | {"sigma": 1}}), ["sigma"]),
    "another layer": (config(lambda c: c | {"args": c["args"] | {"layer": "top1moe"}}), []),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_damaged_run(refusal, script, run, damage, words):
    damage(run / "checkpoint.pt")
    before = files(run)
    line = refusal(script, "--resume", run, "--total-timesteps", 96)
    assert [word for word in words if word not in line] == [], line
    assert files(run) == before and not (run / "exploited").exists()


def test_contradiction_loses_nothing(refusal, script, run):
    before = files(run)
    line = refusal(script, "--resume", run, "--num-experts", 8, "--seed", 5, "--gamma", 0.5, "--total-timesteps", 96)
    words = ["--resume", str(run), "num_experts 8 (was 2)", "seed 5 (was 1)", "gamma 0.5 (was 0.99)"]
    assert [word for word in words if word not in line] == [], line
    assert "total" not in line and files(run) == before


def test_fewer_steps_than_the_run_has_done(refusal, script, run):
    before = files(run)
    line = refusal(script, "--resume", run, "--total-timesteps", 60)
    assert "--total-timesteps 60" in line and "64" in line and files(run) == before
    script("--resume", run, "--total-timesteps", 61)  # as many rounds


def test_resume_takes_what_is_not_given_from_the_run(script, run, capsys):
    script("--resume", run, "--total-timesteps", 96)
    assert "96 agent steps done" in capsys.readouterr().out
    assert checkpoint(run)["progress"]["global_step"] == 96
    assert [int(row["global_step"]) for row in read_csv(run / "metrics.csv")] == [32, 64, 96]
    expected = vars(tiny(total_timesteps=96)) | {"runs_dir": str(run.parent)}
    saved = json.loads((run / "config.json").read_text())["args"]
    assert saved | {"runs_dir": str(run.parent)} == expected


@pytest.mark.parametrize("name", ["metrics.csv", "episodes.csv"])
def test_records_that_are_shorter_than_at_the_checkpoint(script, run, name):
    """As after a power cut: checkpoints wait for the disk, records do not."""
    path = run / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\0" * 20)
    script("--resume", run, "--total-timesteps", 160)
    assert b"\0" not in path.read_bytes() and int(read_csv(path)[-1]["global_step"]) > 64


# ------------------------------------------------------------------------------------------ what each argument does
class Change(NamedTuple):
    """`observe(args)` is `before` for TINY with `given`, and `after` where the argument has `value`."""

    value: object
    observe: Callable[[Args], object]
    before: object
    after: object
    given: dict = {}


def record(args: Args) -> SimpleNamespace:
    """Run, and note what reached replay, optimizer, environments, records and disk."""
    with pytest.MonkeyPatch.context() as patch:
        samples, steps = spy(patch, ReplayBuffer, "sample"), spy(patch, torch.optim.Adam, "step")
        actions, copies = spy(patch, dqn_softmoe, "select_actions"), spy(patch, QNetwork, "load_state_dict")
        resets, saves = spy(patch, Environments, "reset"), spy(patch, Agent, "save")
        balancing = spy(patch, dqn_softmoe.moe, "load_balancing_loss")
        main(args)
    run_dir = only_run(Path(args.runs_dir))
    return SimpleNamespace(
        replay=samples[0][0],
        batch_sizes={batch_size for _, batch_size in samples},
        adam=steps[0][0].param_groups[0],
        updates=len(steps),
        copies=len(copies),
        epsilons=[float(epsilon) for _, epsilon in actions],
        seeds=(torch.initial_seed(), resets[0][1]),
        saves=[progress["global_step"] for _, _, progress in saves],
        balancing={call[1:] for call in balancing},
        iterations=[int(row["global_step"]) for row in read_csv(run_dir / "metrics.csv")],
        files={name.partition("/")[0] for name in files(run_dir)},
    )


def network(args: Args) -> QNetwork:
    torch.manual_seed(0)
    return QNetwork(args, (4, 12, 12), 3)  # 2x2x64 features


def encoder_parameters(args: Args) -> int:
    return sum(p.numel() for p in network(args).encoder.parameters())


def probs(args: Args, factor: float) -> torch.Tensor:
    moe = network(args).moe
    return moe(factor * torch.linspace(0, 1, 256).view(1, 4, 64)).routing.router_probs


def atari_setting(name: str) -> Callable[[Args], object]:
    """The keyword argument that Atari environments are made with."""

    def observe(args: Args) -> object:
        def make(game: str, num_envs: int, **settings) -> SimpleNamespace:
            frames, actions = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8), gym.spaces.Discrete(4)
            return SimpleNamespace(single_observation_space=frames, single_action_space=actions, settings=settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dqn_softmoe, "AtariVectorEnv", make)
            return Environments(replace(args, env_id="ALE/Breakout-v5"), 2).envs.settings[name]

    return observe


def says_no_cuda(args: Args) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        lines = spy(patch, dqn_softmoe, "print")
        main(args)
    assert checkpoint(only_run(Path(args.runs_dir)))["progress"]["global_step"] == 64
    return lines.count(("no CUDA device: running on the CPU",))


def where_the_replay_goes(args: Args) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 10**9))
        return replay_device(args, (12, 12), torch.device("cuda")).type


def runs(args: Args) -> list[str]:
    main(args)
    return [str(path) for path in Path().glob("*/*")]


def two_runs(args: Args) -> list[str]:
    main(replace(args, resume=None))
    main(replace(args, total_timesteps=80))
    return sorted(str(path) for path in Path().glob("*/*"))


def evaluated(args: Args) -> tuple[int, set[float]]:
    """How many episodes, with which epsilon."""
    with pytest.MonkeyPatch.context() as patch:
        actions = spy(patch, dqn_softmoe, "select_actions")
        main(args)
    result = only_run(Path(args.runs_dir)) / "eval.json"
    return json.loads(result.read_text())["episodes"] if result.exists() else 0, actions[-1][1]


NAME = "pixel_game-PixelCatch-v0__dqn_softmoe2__seed1"
BALANCED = {"layer": "top1moe", "load_balancing": "importance+load"}
CHANGES = {
    # Run
    "env_id": Change("BlankGood-v0", lambda args: record(args).replay.frames.shape[1:], (12, 12), (10, 8)),
    "seed": Change(7, lambda args: record(args).seeds, (1, reset_seed(1, 0)), (7, reset_seed(7, 0))),
    "total_timesteps": Change(80, lambda args: len(record(args).epsilons), 16, 20),
    "runs_dir": Change("elsewhere", runs, [f"runs/{NAME}"], [f"elsewhere/{NAME}"]),
    "run_name": Change("mine", runs, [f"runs/{NAME}"], ["runs/mine"]),
    "resume": Change(f"runs/{NAME}", two_runs, [f"runs/{NAME}", f"runs/{NAME}-2"], [f"runs/{NAME}"]),
    "checkpoint_every": Change(32, lambda args: record(args).saves, [64], [32, 64]),
    "checkpoint_at_end": Change(False, lambda args: "checkpoint.pt" in record(args).files, True, False),
    "weights_every": Change(32, lambda args: "weights" in record(args).files, False, True),
    "iteration_steps": Change(16, lambda args: record(args).iterations, [32, 64], [16, 32, 48, 64]),
    "eval_episodes": Change(3, lambda args: evaluated(args)[0], 0, 3),
    "cuda": Change(True, says_no_cuda, 0, 1),
    # Environment
    "num_envs": Change(2, lambda args: len(record(args).epsilons), 16, 32),
    "sticky_actions": Change(0.1, atari_setting("repeat_action_probability"), 0.25, 0.1),
    "noop_max": Change(30, atari_setting("noop_max"), 1, 31),  # ale-py draws fewer than that
    "terminal_on_life_loss": Change(
        True, lambda args: Environments(replace(args, env_id="ALE/Breakout-v5"), 1).life_loss, False, True
    ),
    # Network: 4 tokens of 64, two experts of 2 slots each
    "layer": Change("dense", lambda args: type(network(args).moe).__name__, "SoftMoE", "DenseLayer"),
    "num_experts": Change(3, lambda args: network(args).moe.experts.w1.shape, (2, 64, 16), (3, 64, 16)),
    "expert_hidden_dim": Change(24, lambda args: network(args).moe.experts.w1.shape, (2, 64, 16), (2, 64, 24)),
    "tokenization": Change("PerFeat", lambda args: network(args).moe.phi.shape[0], 64, 4),
    "capacity_factor": Change(1.5, lambda args: network(args).moe.num_slots, 2, 3),
    "normalize_router": Change(True, lambda args: torch.allclose(probs(args, 1), probs(args, 9)), False, True),
    "learned_phi": Change(False, lambda args: "moe.phi" in network(args).state_dict(), True, False),
    "load_balancing": Change("load", lambda a: record(a).balancing, set(), {("load", 1, 1)}, {"layer": "top1moe"}),
    "importance_weight": Change(
        3.0, lambda args: record(args).balancing, {("importance+load", 1, 1)}, {("importance+load", 3, 1)}, BALANCED
    ),
    "load_weight": Change(
        3.0, lambda args: record(args).balancing, {("importance+load", 1, 1)}, {("importance+load", 1, 3)}, BALANCED
    ),
    # Nature: 8x8x4x32, 4x4x32x64, 3x3x64x64. Impala: a first convolution and four more, 16, 32, 32 channels.
    "encoder": Change("impala", encoder_parameters, 8_224 + 32_832 + 36_928, 592 + 9_280 + 4_640 + 36_992 + 46_240),
    "encoder_width": Change(2, encoder_parameters, 8_224 + 32_832 + 36_928, 16_448 + 131_200 + 147_584),
    # Replay
    "buffer_size": Change(200, lambda args: record(args).replay.rows, 100, 50),
    "batch_size": Change(8, lambda args: record(args).batch_sizes, {16}, {8}),
    "n_step": Change(3, lambda args: len(record(args).replay.steps), 1, 3),
    "replay_ratio": Change(0.5, lambda args: record(args).updates, 10, 20),
    "replay_device": Change("cpu", where_the_replay_goes, "cuda", "cpu"),
    "save_replay": Change(True, lambda args: "replay" in record(args).files, False, True),
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
    "eval_epsilon": Change(0.5, evaluated, (2, 0.001), (2, 0.5), {"eval_episodes": 2}),
}
GPU_ONLY = {"compile", "cuda_graphs"}  # how the same update is launched; a CPU runs it as it is


def test_every_argument_is_in_the_table():
    assert set(CHANGES) | GPU_ONLY == {field.name for field in fields(Args)}


@pytest.mark.parametrize("name", CHANGES, ids=flag)
def test_argument_changes_what_it_should(tmp_path, monkeypatch, name):
    change = CHANGES[name]
    args = tiny(**change.given)
    assert getattr(args, name) != change.value
    monkeypatch.setattr(dqn_softmoe, "print", print, raising=False)  # for `spy`
    for folder, given, expected in [
        ("before", args, change.before),
        ("after", replace(args, **{name: change.value}), change.after),
    ]:
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        assert change.observe(given) == expected, folder


MAY_CHANGE = "runs_dir run_name total_timesteps checkpoint_every checkpoint_at_end weights_every eval_episodes cuda"
MAY_CHANGE = {*MAY_CHANGE.split(), "replay_device", "compile", "cuda_graphs"}


@pytest.mark.parametrize("name", [field.name for field in fields(Args) if field.name != "resume"], ids=flag)
def test_argument_that_contradicts_a_resumed_run(run, name):
    path, change = run / "config.json", CHANGES.get(name, Change(False, None, None, None))
    saved = replace(tiny(**change.given), resume=str(run))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"args": vars(saved)}))
    args = replace(saved, **{name: change.value})
    assert getattr(args, name) != getattr(saved, name)
    if name in MAY_CHANGE:
        assert open_run(args)[0] == run
    else:
        with pytest.raises(ValueError, match=re.escape(f"{name} {change.value} (was {getattr(saved, name)})")):
            open_run(args)


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


def test_defaults_are_the_papers_values(tmp_path):
    args = Args()
    assert {name: getattr(args, name) for name in PAPER} == PAPER
    check_args(args)
    adam = record(tiny(runs_dir=str(tmp_path))).adam
    assert adam["betas"] == (0.9, 0.999) and adam["weight_decay"] == 0 and not adam["amsgrad"]


# Millions of parameters with all 18 actions, by layer and experts, or factor of the dense layer's width.
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


def test_command_line_that_nothing_understands(script, capsys):
    for line in (["--no-such-flag", 3], ["--num-envs", "four"], ["--layer", "hard"]):
        with pytest.raises(SystemExit) as stop:
            script(*line)
        assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err
