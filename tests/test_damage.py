"""Tests of damaged files, lost files, bad data and simultaneous starts, and of unusual episodes and rewards.

A damaged checkpoint or data file is refused in one line and left as it was. Damaged records are written anew.
"""

import gc
import importlib
import itertools
import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from pixel_game import PixelCatch
from runs import (
    FIRST,
    ROOT,
    SECOND,
    SHAPE,
    Killed,
    checkpoint,
    die,
    files,
    notes,
    quick,
    read_csv,
    same,
    scalars,
    write_segments,
)

import cql_softmoe
import dqn_softmoe

sys.path.append(str(ROOT / "scripts"))
import analyze
import convert_dqn_replay as convert
import evaluate

ONLINE = {"total_timesteps": 128, "learning_starts": 40, "iteration_steps": 64, "checkpoint_every": 64, "num_envs": 2}
ONLINE |= {"replay_ratio": 0.125}
OFFLINE = {"total_updates": 4, "iteration_updates": 2, "checkpoint_every": 2, "eval_steps": 20, "num_envs": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The replay folder of a run that made no updates."""
    folder = tmp_path_factory.mktemp("data")
    settings = {"total_timesteps": 200, "checkpoint_every": 80, "learning_starts": 200, "save_replay": True}
    dqn_softmoe.main(dqn_softmoe.Args(**quick(runs_dir=str(folder), run_name="run", eval_episodes=0, **settings)))
    return folder / "run" / "replay"


@pytest.fixture(params=["dqn_softmoe", "rainbow_softmoe", "cql_softmoe"])
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture
def args(script, tmp_path, data):
    """Args of a run in tmp_path / "run" with two iterations and two checkpoints. It takes less than a second."""
    names = {"runs_dir": str(tmp_path), "run_name": "run", "resume": "auto", "batch_size": 4, "expert_hidden_dim": 4}
    if script is cql_softmoe:
        game = {name: quick()[name] for name in ("env_id", "encoder", "num_experts", "cuda")}
        return script.Args(**game, **names, **OFFLINE, dataset_dir=str(data), cache_dir=str(data.parent / "cache"))
    return script.Args(**quick(**names, **ONLINE))


def with_iterations(args, iterations: int):
    """Return `args` with the length of the run set to so many iterations."""
    if isinstance(args, cql_softmoe.Args):
        return replace(args, total_updates=2 * iterations)
    return replace(args, total_timesteps=64 * iterations)


@pytest.fixture
def refused(capsys):
    """Return a function that makes a call, which must exit with code 2 and one error line, and returns that line."""

    def call(function, *arguments) -> str:
        gc.collect()  # release the lock of an earlier run that failed
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop, dqn_softmoe.one_line_errors(Exception):
            function(*arguments)
        (line,) = notes(capsys.readouterr().err)
        assert stop.value.code == 2 and line.startswith("error: "), line
        return line

    return call


def flip_bit(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def bit_inside(content: bytes, array: np.ndarray) -> int:
    """Return the number of a bit in the middle of the bytes of `array` in `content`."""
    return 8 * (content.index(array.tobytes()) + array.nbytes // 2) + 5


# ---------------------------------------------------------------------------------------------------- changed bytes
def test_a_changed_bit_of_a_checkpoint(script, args, tmp_path, refused):
    """A changed weight is refused, although it would load. Any other changed bit is noticed, or it has no effect."""
    script.main(args)
    path, good = tmp_path / "run" / "checkpoint.pt", checkpoint(tmp_path / "run")
    content, weight = path.read_bytes(), good["q_network"]["moe.experts.w1"].numpy()
    path.write_bytes(flip_bit(content, bit_inside(content, weight)))
    before = files(tmp_path)
    line = refused(script.main, with_iterations(args, 3))
    assert f"{path} is damaged" in line and files(tmp_path) == before
    unnoticed = 0
    for bit in range(3, 8 * len(content), 8 * len(content) // 20):
        path.write_bytes(flip_bit(content, bit))
        try:
            state = script.read_file(path)
        except Exception:
            continue
        unnoticed += 1  # the bit is between two arrays
        assert same(state, good)
    assert unnoticed < 10


def test_an_empty_foreign_or_truncated_checkpoint(script, args, tmp_path, refused):
    script.main(args)
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert f"{path} is damaged" in refused(script.main, with_iterations(args, 3)) and path.read_bytes() == content


def test_a_changed_bit_of_weights(script, args, tmp_path, refused):
    """evaluate.py and watch.py read weights with `evaluate.load`. analyze.py reads all weights of a run."""
    script.main(replace(args, weights_every=args.checkpoint_every))
    run, options = tmp_path / "run", evaluate.Options(tmp_path / "run", episodes=1, cuda=False)
    saved = sorted((run / "weights").iterdir(), key=lambda path: int(path.stem))
    evaluate.main(options)
    for path in (run / "weights.pt", *saved):
        content = path.read_bytes()
        weight = torch.load(path, weights_only=True)["moe.experts.w1"].numpy()
        path.write_bytes(flip_bit(content, bit_inside(content, weight)))
        if path.parent == run:
            assert f"{path} is damaged" in refused(evaluate.main, options)
        else:
            assert f"{path} is damaged" in refused(evaluate.load, path)
            assert f"{path} is damaged" in refused(analyze.measure_run, run, analyze.Options([run], steps=100))
        path.write_bytes(content)


def test_a_changed_bit_of_unpacked_data(data, tmp_path):
    """A damaged cache is refused. When it is removed, the data is unpacked anew."""
    args = cql_softmoe.Args(env_id=quick()["env_id"], dataset_dir=str(data), cache_dir=str(tmp_path))
    envs = cql_softmoe.Environments(args, 1)
    cache, _ = cql_softmoe.open_dataset(args, envs)
    before = files(cache)
    assert len(before) == 7
    for name, content in before.items():
        for wrong in (flip_bit(content, 4 * len(content)), b"", None):
            (cache / name).unlink() if wrong is None else (cache / name).write_bytes(wrong)
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                cql_softmoe.open_dataset(args, envs)
            assert name == "checksums.json" or f"{cache} is damaged" in str(caught.value)
        (cache / name).write_bytes(content)
    shutil.rmtree(cache)
    assert files(cql_softmoe.open_dataset(args, envs)[0]) == before


# ------------------------------------------------------------------------------------------------------ bad segments
def array_with(value: object, rest: object, dtype: str) -> np.ndarray:
    """Return an array of `rest`, except for one `value` in its middle."""
    array = np.full(SHAPE, rest, dtype)
    array[1, 4] = value
    return array


BAD = {  # arrays of the last segment, and the array that the message names
    "an infinite reward": ({"reward": array_with(np.inf, 1, "f4")}, "reward"),
    "a reward of minus infinity": ({"reward": array_with(-np.inf, 1, "f4")}, "reward"),
    "a reward that is NaN": ({"reward": array_with(np.nan, 0, "f4")}, "reward"),
    "a reward that is not clipped": ({"reward": array_with(1.001, 0, "f4")}, "reward"),
    "both ends at once": ({name: array_with(True, False, "?") for name in ("terminated", "truncated")}, "truncated"),
    "a boolean of 2": ({"terminated": array_with(2, 1, "u1").view(bool)}, "terminated"),
    "another boolean of 2": ({"truncated": array_with(2, 0, "u1").view(bool)}, "truncated"),
    "an action that the game does not have": ({"action": array_with(3, 0, "i8")}, "action"),
    "a negative action": ({"action": array_with(-1, 0, "i8")}, "action"),
    "another dtype": ({"reward": array_with(0, 0, "f8")}, "reward"),
    "another length": ({"truncated": np.zeros((2, 9), bool)}, "truncated"),
}


def refused_by_both(tmp_path: Path) -> str:
    """Return the message with which training and conversion refuse the data. Neither leaves files behind."""
    envs = SimpleNamespace(frame_shape=(12, 12), num_actions=3)
    args = cql_softmoe.Args(env_id=quick()["env_id"], dataset_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError) as caught:
        cql_softmoe.open_dataset(args, envs)
    with pytest.raises(ValueError) as other:
        convert.main(convert.Args(tmp_path / "data", tmp_path / "converted"))
    assert str(caught.value) == str(other.value)
    assert not list(tmp_path.glob("replay_cache/*")) and not (tmp_path / "converted").exists()
    return str(caught.value)


@pytest.mark.parametrize("changes, name", BAD.values(), ids=BAD)
def test_training_and_conversion_refuse_the_same_segments(tmp_path, changes, name):
    write_segments(tmp_path / "data", **changes)
    assert refused_by_both(tmp_path).startswith(f"{tmp_path / 'data' / SECOND}: {name} ")


OTHER_NAMES = {"overlap": "000000000018.npz", "contained": "000000000002.npz", "off the grid": "000000000021.npz"}


@pytest.mark.parametrize("second", OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_segments_that_overlap_or_begin_off_the_grid_are_refused(tmp_path, second):
    write_segments(tmp_path / "data", (FIRST, second))
    assert refused_by_both(tmp_path) == f"{tmp_path / 'data' / second} must begin at a multiple of 2 from 20 on"


# --------------------------------------------------------------------------------------- lost files and directories
def test_a_checkpoint_without_a_configuration_is_left_alone(script, args, tmp_path, refused, monkeypatch):
    script.main(args)
    (tmp_path / "run" / "config.json").unlink()
    before = files(tmp_path)
    for resume in ("auto", str(tmp_path / "run")):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--resume", resume])
        line = refused(script.main, replace(args, resume=resume, expert_hidden_dim=8))
        assert str(tmp_path / "run" / "config.json") in line and files(tmp_path) == before
    script.main(replace(args, resume=None, expert_hidden_dim=8))
    assert {name: content for name, content in files(tmp_path).items() if name.startswith("run/")} == before
    assert json.loads((tmp_path / "run-2" / "config.json").read_text())["args"]["expert_hidden_dim"] == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread has no file
def test_a_directory_that_is_removed_during_a_run_is_not_made_anew(script, args, tmp_path, monkeypatch, capsys):
    learn, updates = script.Agent.learn, itertools.count(1)

    def removed(agent):
        if next(updates) == 3:
            shutil.rmtree(tmp_path / "run")
        return learn(agent)

    monkeypatch.setattr(script.Agent, "learn", removed)
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    *warnings, line = (line for line in notes(capsys.readouterr().err) if line.startswith(("warning: ", "error: ")))
    assert stop.value.code == 2 and line.startswith("error: ") and str(tmp_path / "run") in line
    assert all(line.startswith("warning: ") for line in warnings) and list(tmp_path.iterdir()) == []


DAMAGES = [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\0" * 20),  # after a power cut
    lambda path: path.write_text(path.read_text().replace("1", "2")),
]


def test_damaged_records_are_written_anew(script, args, tmp_path):
    """A checkpoint keeps the rows of the records, and a resumed run writes the files from them."""
    run, names = tmp_path / "run", ["metrics.csv", "episodes.csv"][: 1 if script is cql_softmoe else 2]
    script.main(args)
    first = [rows_without_speeds(run / name) for name in names]
    shutil.copytree(run, tmp_path / "copy")
    script.main(with_iterations(args, 3))
    resumed = [rows_without_speeds(run / name) for name in names]
    assert all(rows[: len(before)] == before != rows for rows, before in zip(resumed, first, strict=True))
    for damage in DAMAGES:
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "copy", run)
        for name in names:
            damage(run / name)
        script.main(with_iterations(args, 3))
        assert [rows_without_speeds(run / name) for name in names] == resumed


def rows_without_speeds(path: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in ("sps", "ups")} for row in read_csv(path)]


def test_tensorboard_has_an_evaluation_once(script, args, tmp_path, monkeypatch):
    """The run is killed after its evaluation, and repeats the evaluation when it is resumed."""
    args = replace(args, checkpoint_every=0)

    evaluate_run = getattr(script, "evaluate_run", None)

    def evaluate_and_die(*arguments):
        evaluate_run(*arguments)
        die()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if script is cql_softmoe:
            patch.setattr(script, "checkpoint", die)
        else:
            patch.setattr(script, "evaluate_run", evaluate_and_die)
        script.main(args)
    gc.collect()  # release the lock
    script.main(args)
    assert scalars(tmp_path / "run")["charts/eval_return"] == ([2, 4] if script is cql_softmoe else [129])


# ------------------------------------------------------------------------------------------------ two starts at once
def finish_another_first(script, args, patch: pytest.MonkeyPatch) -> list[dict[str, bytes]]:
    """Make another run finish just before `script` locks its directory. Returns a list that gets its files."""
    left, lock_run = [], script.lock_run

    def late(run_dir):
        patch.setattr(script, "lock_run", lock_run)
        script.main(args)
        left.append(files(run_dir))
        return lock_run(run_dir)

    patch.setattr(script, "lock_run", late)
    return left


@pytest.mark.parametrize("resume", ["auto", None])
def test_a_run_that_finished_meanwhile_is_left_alone(script, args, tmp_path, resume, monkeypatch, capsys):
    """With --resume auto there is nothing left to do. Otherwise the second run gets another name."""
    args = replace(args, resume=resume)
    left = finish_another_first(script, args, monkeypatch)
    script.main(args)
    assert left == [files(tmp_path / "run")]
    if resume:
        assert f"{tmp_path / 'run'} is finished" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == ({"run"} if resume else {"run", "run-2"})
    assert all((path / "weights.pt").exists() for path in tmp_path.iterdir())


def test_a_run_gets_another_name_while_a_run_of_its_name_begins(script, args, tmp_path, monkeypatch, refused):
    """The other run has locked its directory, which is still empty."""
    args, make, left = replace(args, resume=None), script.Agent.__init__, []

    def second(agent, *arguments):
        monkeypatch.setattr(script.Agent, "__init__", make)
        assert "in use by another process" in refused(script.main, replace(args, resume="auto"))
        script.main(args)
        left.append(files(tmp_path / "run-2"))
        assert files(tmp_path / "run") == {}
        make(agent, *arguments)

    monkeypatch.setattr(script.Agent, "__init__", second)
    script.main(args)
    assert left == [files(tmp_path / "run-2")] and (tmp_path / "run" / "weights.pt").exists()


# -------------------------------------------------------------------------------------------------- nothing to draw
class Short(PixelCatch):
    """The first `short` episodes are truncated at their first step, so that none of their transitions can be drawn."""

    def __init__(self, short: int = 30):
        super().__init__()
        self.short, self.count = short, 0

    def reset(self, *, seed=None, options=None):
        self.count += 1
        return super().reset(seed=seed, options=options)

    def step(self, action):
        frame, reward, terminated, _, info = super().step(action)
        return frame, reward, terminated, self.count <= self.short, info


gym.register("Short-v0", entry_point=Short)
gym.register("AlwaysShort-v0", entry_point=Short, kwargs={"short": 10**9})


def test_updates_wait_until_there_is_something_to_draw(agent, tmp_path, monkeypatch):
    """From step 40 on, 11 updates would be due, but nothing can be drawn yet. A resumed run waits, too."""
    updates, update = [], agent.Agent.update
    monkeypatch.setattr(agent.Agent, "update", lambda self, *batch: updates.append(batch) or update(self, *batch))
    settings = {"runs_dir": str(tmp_path), "batch_size": 4, "n_step": 2, "checkpoint_every": 0}
    for game, learns in (("Short-v0", True), ("AlwaysShort-v0", False)):
        args = agent.Args(**quick(**ONLINE | settings, env_id=game, run_name=game))
        agent.main(args)
        assert (0 < len(updates) < 11) if learns else updates == []
        agent.main(replace(args, resume="auto", total_timesteps=160))
        assert bool(updates) == learns
        updates.clear()


# ---------------------------------------------------------------------------------- games of unequal lengths, rewards
def next_length(length: int) -> int:
    return max(2, length // 2)


class Unequal(PixelCatch):
    """Rewards are 3, 3, -3, and so on. The first game has 4 to 8 steps, by its seed, each later one half as many."""

    def reset(self, *, seed=None, options=None):
        self.length, self.steps = next_length(self.length) if seed is None else 4 + seed % 5, 0
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        return self._frame(), -3.0 if self.steps % 3 == 0 else 3.0, self.steps == self.length, False, {}


def unequal_return(length: int) -> float:
    return 3.0 * (length - 2 * (length // 3))


gym.register("Unequal-v0", entry_point=Unequal)


def evaluation_oracle(args, seed: int) -> list[float]:
    """Return the raw returns of all games. Offline they are in the order in which the games end."""
    if not isinstance(args, cql_softmoe.Args):
        return [unequal_return(4 + (seed + i) % 5) for i in range(args.eval_episodes)]
    ended = []
    for i in range(args.num_envs):
        time, length = 0, 4 + (seed + i) % 5
        while time * args.num_envs < args.eval_steps:
            time += length
            ended.append((time, i, unequal_return(length)))
            length = next_length(length)
    return [value for *_, value in sorted(ended)]


def test_an_evaluation_of_games_of_unequal_lengths(script, args):
    """A reward after the end of a game belongs to the next game."""
    args = replace(args, env_id="Unequal-v0", **{"num_envs": 5} if script is cql_softmoe else {})
    args = args if script is cql_softmoe else replace(args, eval_episodes=7)
    q_network, stop = script.QNetwork(args, (4, 12, 12), 3), threading.Event()
    envs = [script.Environments(args, args.num_envs)] if script is cql_softmoe else []
    for seed in range(5):
        if script is cql_softmoe:  # one game in each environment, or several
            args.eval_steps = (20, 70)[seed % 2]
        expected = evaluation_oracle(args, seed)
        assert script.evaluate(q_network, args, *envs, seed, stop) == expected and len(set(expected)) > 2


def test_rewards_are_clipped_for_learning_and_raw_in_the_records(script, args, tmp_path, monkeypatch):
    args, run, batches, update = replace(args, env_id="Unequal-v0"), tmp_path / "run", [], script.Agent.update
    if script is cql_softmoe:  # CQL learns from rewards that the other scripts have clipped
        write_segments(tmp_path / "data", env_id="Unequal-v0")
        args = replace(args, dataset_dir=str(tmp_path / "data"), cache_dir=None)
    monkeypatch.setattr(script.Agent, "update", lambda self, *batch: batches.append(batch) or update(self, *batch))
    args = replace(args, n_step=1)
    script.main(args)
    rewards = torch.cat([batch[2] for batch in batches])
    assert set(rewards.tolist()) == ({1} if script is cql_softmoe else {-1, 1})
    if script is cql_softmoe:
        for row in read_csv(run / "metrics.csv"):
            seed = script.reset_seed(args.seed, int(row["updates"]), evaluation=True)
            assert float(row["mean_return"]) == pytest.approx(np.mean(evaluation_oracle(args, seed)), abs=1e-4)
        return
    episodes = read_csv(run / "episodes.csv")
    assert all(float(row["episode_return"]) == unequal_return(int(row["episode_length"])) for row in episodes)
    assert len({row["episode_length"] for row in episodes}) > 2
    result = json.loads((run / "eval.json").read_text())
    assert result["returns"] == evaluation_oracle(args, script.reset_seed(args.seed, 128, evaluation=True))
