"""Tests of cql_softmoe.py: data against a slow oracle, damaged data, losses, evaluation and whole runs."""

import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pixel_game
import pytest
import torch
from replay_oracle import FRAME_SHAPE, GAMMA, Oracle, Row, check_batch, draw_with, random_rows
from runs import Exploit, Killed, assert_same_outcome, checkpoint, only_run, read_csv
from torch import nn

import cql_softmoe
import rainbow_softmoe
from cql_softmoe import STACK_SIZE, Args, Batch, Dataset, Environments, QNetwork, evaluate, main, open_dataset, td_loss

GAME, FRAME = "pixel_game:PixelCatch-v0", (pixel_game.SIZE, pixel_game.SIZE)


@pytest.fixture(autouse=True)
def log_often(monkeypatch):
    monkeypatch.setattr(cql_softmoe, "LOG_EVERY", 10)


def small_args(tmp_path, **overrides) -> Args:
    """Return the Args of a run that takes about a second."""
    settings = {"env_id": GAME, "encoder": "nature", "num_experts": 2, "expert_hidden_dim": 16, "cuda": False}
    settings |= {"total_updates": 40, "iteration_updates": 20, "eval_steps": 60, "num_envs": 3, "checkpoint_every": 0}
    settings |= {"target_network_frequency": 10, "runs_dir": str(tmp_path / "runs")}
    settings |= {"dataset_dir": str(tmp_path / "data")}
    return Args(**settings | overrides)


def write_segments(folder: Path, rows: list[Row], lengths: list[int], **metadata) -> list[Path]:
    """Write `rows` in segments of these lengths, and metadata.json. Returns the paths of the segments."""
    folder.mkdir(exist_ok=True, parents=True)
    num_envs, paths = len(rows[0].action), []
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        columns = (np.stack(column, axis=1) for column in zip(*rows[start:end], strict=True))  # (N, rows, ...)
        paths.append(folder / f"{start * num_envs:012d}.npz")
        arrays = dict(zip(Dataset.FIELDS, columns, strict=True))
        np.savez(paths[-1], **arrays | {"reward": arrays["reward"].astype(np.float32)})
    metadata = {"env_id": GAME, "num_actions": 3, "num_envs": num_envs} | metadata
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return paths


def open_data(args: Args, frame_shape: tuple = FRAME_SHAPE) -> Dataset:
    """Return the dataset of a run with these arguments."""
    envs = SimpleNamespace(frame_shape=frame_shape, num_actions=3)
    return Dataset(*open_dataset(args, envs), n_step=args.n_step, gamma=args.gamma)


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with three segments of 20 rows of two environments."""
    write_segments(tmp_path / "data", list(random_rows(np.random.default_rng(0), 60, 2, FRAME)), [20, 20, 20])
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_all_drawable_transitions_equal_the_oracle(tmp_path, num_envs):
    """This also holds with missing files, --data-fraction and --max-shards. No other transition can be drawn."""
    for seed in range(12):
        rng, folder = np.random.default_rng(seed), tmp_path / str(seed)
        lengths, n_step = rng.integers(1, 15, 12).tolist(), int(rng.integers(1, 5))
        rows = list(random_rows(rng, sum(lengths), num_envs))
        paths = write_segments(folder, rows, lengths)
        kept = [k for k in range(12) if rng.random() < (1.0 if seed % 3 else 0.7) or k == 11]
        for k in set(range(12)) - set(kept):
            paths[k].unlink()
        fraction, shards = [(1.0, None), (0.5, None), (0.3, 7)][seed % 3 if seed < 6 else 0]

        oracle, expected, starts, incomplete = Oracle(num_envs, n_step), 0, np.cumsum([0, *lengths]), set()
        for k in kept[:shards]:
            if starts[k] != expected:  # a gap, after which the first stacks lack frames
                oracle.cut()
                incomplete |= {len(oracle.lanes[0]) + i for i in range(STACK_SIZE - 1)}
            expected = starts[k] + math.ceil(lengths[k] * fraction)
            for row in rows[starts[k] : expected]:
                oracle.add(row)
        oracle.cut()
        at = {}
        for t, env in itertools.product(range(len(oracle.lanes[0])), range(num_envs)):
            if t not in incomplete and not oracle.lanes[env][t].truncated:
                at[t * num_envs + env] = env, t

        args = small_args(tmp_path, dataset_dir=str(folder), n_step=n_step, gamma=GAMMA)
        dataset = open_data(replace(args, data_fraction=fraction, max_shards=shards))
        assert dataset.drawable.tolist() == list(at) and len(at) > 0
        check_batch(dataset.gather(torch.tensor(list(at))), oracle, at)
        k = np.arange(len(at))
        for offset in (1e-9, 1 - 1e-9):  # all numbers from k/K to (k+1)/K draw the k-th of K
            assert draw_with(dataset, (k + offset) / len(at)).index.tolist() == list(at)


def test_sampling_reads_no_values_on_the_host(tmp_path, data):
    batch = open_data(small_args(tmp_path), FRAME).to("meta").sample(8)
    assert batch.obs.shape == (8, STACK_SIZE, *FRAME)


def test_the_cache_is_made_once_for_each_state_of_its_source(tmp_path, data, capsys):
    """If the source changes, the old cache is kept, because another run may have mapped it into memory."""
    args, before = small_args(tmp_path), {path: path.read_bytes() for path in data.iterdir()}
    first = open_data(args, FRAME)
    assert "unpacking 120 steps" in capsys.readouterr().out
    frames = open_data(args, FRAME).frames
    assert torch.equal(frames, first.frames) and capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in data.iterdir()} == before
    assert len(open_data(replace(args, data_fraction=0.5), FRAME).frames) == 61
    write_segments(data, list(random_rows(np.random.default_rng(5), 60, 2, FRAME)), [20, 20, 20])
    assert not torch.equal(open_data(args, FRAME).frames, frames)
    assert torch.equal(first.frames, frames)
    assert len(list((tmp_path / "replay_cache").iterdir())) == 3  # and no temporary folder
    other = tmp_path / "other"
    write_segments(other, list(random_rows(np.random.default_rng(6), 60, 2, FRAME)), [20, 20, 20])
    for folder in (data, other, data):  # both caches are in one folder
        dataset = open_data(replace(args, dataset_dir=str(folder), cache_dir=str(tmp_path / "cache")), FRAME)
        assert torch.equal(dataset.frames, open_data(replace(args, dataset_dir=str(folder)), FRAME).frames)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_links_to_folders(tmp_path, data):
    """--dataset-dir may be a run, its replay folder, or a link to either."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "replay").symlink_to(data)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    frames = open_data(small_args(tmp_path), FRAME).frames
    for name in ("run", "run/replay", "link", "link/replay"):
        assert torch.equal(open_data(small_args(tmp_path, dataset_dir=str(tmp_path / name)), FRAME).frames, frames)


def test_another_run_unpacks_the_same_data_faster(tmp_path, data, monkeypatch):
    args, unpack = small_args(tmp_path), cql_softmoe.unpack

    def unpack_after_another(*more):  # another process does all of it first
        with monkeypatch.context() as patch:
            patch.setattr(cql_softmoe, "unpack", unpack)
            patch.setattr(os, "getpid", lambda: 0)
            open_data(args, FRAME)
        unpack(*more)

    monkeypatch.setattr(cql_softmoe, "unpack", unpack_after_another)
    assert torch.equal(open_data(args, FRAME).frames, open_data(args, FRAME).frames)
    assert len(list((tmp_path / "replay_cache").iterdir())) == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_data_is_mapped_read_only(tmp_path, data):
    """Linux refuses a writable private mapping that is larger than memory, and the data may be that large."""
    dataset = open_data(small_args(tmp_path), FRAME)
    maps = Path("/proc/self/maps").read_text().splitlines()
    lines = [line for line in maps if str(tmp_path / "replay_cache") in line]
    assert {Path(line.split()[-1]).stem for line in lines} >= set(Dataset.FIELDS)
    assert all(" r--" in line for line in lines) and dataset.frames[-1].sum() == 0


# -------------------------------------------------------------------------------------------------------- damaged data


@pytest.fixture
def refused(tmp_path, capsys):
    """Return a function that checks that a run fails with one error line with these words and changes no data."""

    def call(*words, **overrides):
        folder = tmp_path / "data"
        before = {path: path.read_bytes() for path in folder.glob("*")}
        gc.collect()  # release the lock of the run before
        with pytest.raises(SystemExit) as stop:
            main(small_args(tmp_path, **overrides))
        lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("error")]
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert [word for word in words if word not in lines[0]] == [], lines[0]
        assert {path: path.read_bytes() for path in folder.glob("*")} == before
        assert not list((tmp_path / "replay_cache").glob("*")) and not list(tmp_path.glob("runs/*/config.json"))

    return call


@pytest.mark.parametrize("name, left", [("read_segment", 0), ("checksums", 1)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_unpacks_leaves_nothing_half_done(tmp_path, data, monkeypatch, number, name, left):
    """Data that is unpacked already stays, and the next start needs only to read it."""
    original = getattr(cql_softmoe, name)

    def interrupted(*args):
        monkeypatch.setattr(cql_softmoe, name, original)
        os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(cql_softmoe, name, interrupted)
    before = signal.signal(number, signal.default_int_handler)  # it may be ignored, as in a background job of a shell
    try:
        with pytest.raises(SystemExit) as stop:
            main(small_args(tmp_path))
        assert stop.value.code == 75 and len(list((tmp_path / "replay_cache").glob("*"))) == left
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    main(small_args(tmp_path))


def test_missing_data(refused, tmp_path):
    refused("no data", "--save-replay")
    refused("no data", dataset_dir=str(tmp_path / "nowhere"))
    refused("no data", dataset_dir="")


def test_too_little_disk_space(refused, data, monkeypatch):
    usage = shutil.disk_usage(data)._replace(free=120 * (144 + 15) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("0.00 GB", "free", "replay_cache")


def test_data_of_another_game(refused, data):
    metadata = json.loads((data / "metadata.json").read_text())
    for change in ({"env_id": "PongNoFrameskip-v4"}, {"num_actions": 4}):
        (data / "metadata.json").write_text(json.dumps(metadata | change))
        refused("--env-id", (metadata | change)["env_id"])
    (data / "metadata.json").write_text("{")
    refused()
    (data / "metadata.json").unlink()
    refused("metadata.json")


WRONG = {  # arrays of the last segment (None: left out), words of the error
    "dtype": ({"reward": np.zeros((2, 20))}, ["reward", "float64", "float32"]),
    "frames": ({"frames": np.zeros((2, 20, 5, 5), np.uint8)}, ["(2, 20, 5, 5)", "12"]),
    "lengths": ({"truncated": np.zeros((2, 19), bool)}, ["(2, 19)", "(2, 20)"]),
    "environments": ({"action": np.zeros((3, 20), np.int64)}, ["(3, 20)"]),
    "dimensions": ({"action": np.zeros(20, np.int64)}, []),
    "no rows": ({"action": np.zeros((2, 0), np.int64)}, []),
    "action": ({"action": np.full((2, 20), 3)}, ["action has", "0 to 2"]),
    "negative action": ({"action": np.full((2, 20), -1)}, ["action has"]),
    "pickles": ({"terminated": np.array([[Exploit()] * 20] * 2, object)}, ["damaged", "allow_pickle=False"]),
    "a pickled action": ({"action": np.array([[Exploit()] * 20] * 2, object)}, ["allow_pickle=False"]),
    "missing": ({"reward": None}, ["damaged", "reward"]),
}


@pytest.mark.parametrize("changes, words", WRONG.values(), ids=WRONG)
def test_wrong_arrays(refused, data, changes, words):
    path = data / "000000000040.npz"
    with np.load(path) as segment:
        arrays = {name: array for name, array in (dict(segment) | changes).items() if array is not None}
    np.savez(path, **arrays)
    refused(*words)


def test_a_file_that_is_no_segment_is_named(refused, data):
    (data / "000000000120.npz").write_bytes(b"text")
    refused("000000000120.npz is damaged")


def test_files_with_other_names_are_ignored(tmp_path, data):
    before = open_data(small_args(tmp_path), FRAME)
    (data / "my-backup.npz").write_bytes(b"text")
    assert torch.equal(open_data(small_args(tmp_path), FRAME).frames, before.frames)


def test_data_without_a_drawable_step(refused, tmp_path):
    row = Row(np.zeros((2, 12, 12), np.uint8), np.zeros(2, int), np.zeros(2), np.zeros(2, bool), np.zeros(2, bool))
    write_segments(tmp_path / "data", [row], [1])
    refused("no step to learn from")


def test_the_temporary_folder_of_a_killed_process_is_removed(tmp_path, data):
    open_data(small_args(tmp_path), FRAME)
    (cache,) = (tmp_path / "replay_cache").iterdir()
    cache.rename(cache.with_name(f"{cache.name}.{os.getpid()}.tmp"))
    open_data(small_args(tmp_path), FRAME)
    assert list((tmp_path / "replay_cache").iterdir()) == [cache]


def test_damaged_segments_are_refused_or_read_as_before(tmp_path):
    """The file is truncated at many lengths, or one byte is flipped, also in names and headers of the archive."""
    args = small_args(tmp_path)
    (path,) = write_segments(tmp_path / "data", list(random_rows(np.random.default_rng(0), 8, 1)), [8])
    good, content, refusals = open_data(args), path.read_bytes(), 0
    damaged = [content[:length] for length in range(0, len(content), len(content) // 20)]
    for i in range(0, len(content), 7):
        damaged.append(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
    for k, bad in enumerate(damaged):
        path.write_bytes(bad)
        os.utime(path, ns=(k, k))
        try:
            read = open_data(args)
        except Exception:
            refusals += 1
        else:  # the byte does not matter, as in a time stamp
            assert all(map(torch.equal, read.buffers(), good.buffers())), k
    assert refusals > len(damaged) / 2


BAD = [{"max_shards": 0}, {"data_fraction": 0.0}, {"data_fraction": 1.1}, {"data_fraction": math.nan}]
BAD += [{"cql_alpha": -0.1}, {"cql_alpha": math.inf}, {"total_updates": 0}, {"n_step": 0}, {"num_atoms": 1}]
BAD += [{"num_atoms": 11, "distributional": False}, {"double": False, "distributional": False}]


@pytest.mark.parametrize("overrides", BAD, ids=str)
def test_bad_arguments(refused, data, overrides):
    refused(f"--{[*overrides][0].replace('_', '-')}", **overrides)


# ---------------------------------------------------------------------------------------------------------------- loss


def networks(args: Args) -> list[QNetwork]:
    """Return two different networks whose Q-values differ clearly between actions."""
    torch.manual_seed(0)
    both = [QNetwork(args, (4, *FRAME), 3) for _ in range(2)]
    for network in both:
        network.advantage.weight.data.mul_(100)
    return both


def random_batch(B: int = 8) -> Batch:
    obs, next_obs = torch.randint(0, 256, (2, B, 4, *FRAME), dtype=torch.uint8)
    return Batch(obs, torch.randint(3, (B,)), torch.randn(B), 0.99 * torch.randint(2, (B,)), next_obs, torch.arange(B))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 4.0])
def test_cql_loss_equals_numpy(tmp_path, alpha):
    args = small_args(tmp_path, distributional=False, cql_alpha=alpha)
    (q_network, target_network), batch = networks(args), random_batch()
    loss, metrics, _ = td_loss(q_network, target_network, batch, args)
    q = q_network.q_values(batch.obs).detach().double().numpy()
    next_q = target_network.q_values(batch.next_obs).detach().double().numpy()
    q_data = q[np.arange(8), batch.action]
    error = q_data - (batch.reward.numpy() + batch.discount.numpy() * next_q.max(axis=1))
    huber = np.where(abs(error) < 1, 0.5 * error**2, abs(error) - 0.5).mean()
    cql = (np.log(np.exp(q).sum(axis=1)) - q_data).mean()
    expected = {"td_loss": huber, "cql_loss": cql, "q_data": q_data.mean(), "q_greedy": q.max(axis=1).mean()}
    expected["loss"] = huber + alpha * cql
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == metrics["loss"].item() and 0 < (abs(error) < 1).sum() < 8  # both branches of the Huber loss


@pytest.mark.parametrize("double", [True, False])
def test_distributional_loss_equals_rainbow_plus_cql(tmp_path, double):
    args = small_args(tmp_path, double=double, cql_alpha=0.5)
    (q_network, target_network), batch = networks(args), random_batch()
    loss, metrics, _ = td_loss(q_network, target_network, batch, args)
    rainbow = rainbow_softmoe.Args(double=double, noisy=False)
    weighted = rainbow_softmoe.Batch(*batch, torch.ones_like(batch.reward))
    expected, *_ = rainbow_softmoe.td_loss(q_network, target_network, weighted, rainbow)
    q = (q_network(batch.obs)[0].softmax(dim=2) * torch.linspace(-10, 10, 51)).sum(dim=2)
    cql = (q.logsumexp(dim=1) - q.gather(1, batch.action[:, None])[:, 0]).mean()
    torch.testing.assert_close(metrics["td_loss"], expected.detach())
    torch.testing.assert_close(loss, expected + 0.5 * cql)


# ---------------------------------------------------------------------------------------------------------- evaluation


class Catcher(nn.Module):
    """A Q-network that moves the paddle to the ball in the newest frame."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def q_values(self, obs):
        assert not self.training
        board = obs[:, -1, ::2, ::2].long()  # (N, 6, 6)
        ball = (board == 255).any(dim=1).long().argmax(dim=1)
        direction = ball - (board[:, -1] == 128).long().argmax(dim=1)
        paddle_is_covered = ~(board[:, -1] == 128).any(dim=1)
        return nn.functional.one_hot(torch.where(paddle_is_covered, 0, direction.sign()) + 1, 3).float()


@pytest.mark.parametrize("eval_steps, games", [(1, 3), (60, 3), (61, 6), (120, 6), (121, 9)])
def test_evaluation_plays_its_steps_and_every_last_game_to_its_end(tmp_path, eval_steps, games):
    """Three games of 20 steps run at once. The policy catches the balls, unless its actions are random."""
    args = small_args(tmp_path, eval_steps=eval_steps, eval_epsilon=0.0)
    envs, network, random_state = Environments(args, 3), Catcher(), torch.get_rng_state()
    returns = evaluate(network, args, envs, 0, threading.Event())
    assert len(returns) == games and np.mean(returns) > 2.5 and network.training
    assert returns == evaluate(network, args, envs, 0, threading.Event())  # the seed determines them
    assert torch.equal(torch.get_rng_state(), random_state)
    random_returns = evaluate(network, replace(args, eval_epsilon=1.0), envs, 0, threading.Event())
    assert np.mean(random_returns) < 1
    stop = threading.Event()
    stop.set()
    assert evaluate(network, args, envs, 0, stop) == []


def test_evaluation_cuts_games_that_do_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(cql_softmoe, "MAX_EPISODE_STEPS", 7)
    args = small_args(tmp_path, eval_steps=60)
    returns = evaluate(Catcher(), args, Environments(args, 3), 0, threading.Event())
    assert len(returns) == 9  # three environments play three games of seven steps


# ---------------------------------------------------------------------------------------------------------- whole runs


def write_policy_data(folder: Path, steps: int, skill: float) -> float:
    """Write steps of a policy that moves towards the ball with probability `skill`, else stays. Returns its score."""
    env, rng, rows, returns = gym.make(GAME).unwrapped, np.random.default_rng(0), [], [0.0]
    frame, _ = env.reset(seed=1)
    for _ in range(steps):
        action = int(np.sign(env.column - env.paddle)) + 1 if rng.random() < skill else 1
        next_frame, reward, terminated, _, _ = env.step(action)
        rows.append(Row(*(np.array([x]) for x in (frame, action, reward, terminated, False))))
        returns[-1] += reward
        frame = next_frame
        if terminated:
            returns.append(0.0)
            frame, _ = env.reset()
    write_segments(folder, rows, [500] * (steps // 500))
    return np.mean(returns[:-1])


@pytest.fixture(scope="module")
def weak_data(tmp_path_factory) -> Path:
    """A folder with data of a policy that gets less than 60% of the best return."""
    folder = tmp_path_factory.mktemp("mediocre") / "data"
    assert write_policy_data(folder, 8_000, 0.4) < 0.6 * 4
    return folder


@pytest.mark.parametrize(
    "how, distributional", [("killed", True), ("killed", False), ("signal", True), ("in evaluation", True)]
)
def test_a_run_leaves_its_records_and_resumes_to_the_bit(tmp_path, weak_data, how, distributional, monkeypatch):
    """A killed run resumes from update 15, a stopped one from update 20. An interrupted evaluation is repeated."""
    settings = {"dataset_dir": str(weak_data), "distributional": distributional, "checkpoint_every": 15}
    unbroken, broken = (small_args(tmp_path, **settings, runs_dir=str(tmp_path / name)) for name in "ab")
    main(unbroken)

    def broken_log(log, update, values, original=cql_softmoe.RunLog.update):
        if update == 30 and how == "killed":
            raise Killed
        if update == 20 and how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        original(log, update, values)

    def interrupted(*args, play=evaluate):
        os.kill(os.getpid(), signal.SIGUSR1)
        return play(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed if how == "killed" else SystemExit) as stop:
        if how == "in evaluation":
            patch.setattr(cql_softmoe, "evaluate", interrupted)
        patch.setattr(cql_softmoe.RunLog, "update", broken_log)
        main(broken)
    run_dir = only_run(tmp_path / "b")
    assert how == "killed" or stop.value.code == 75
    assert checkpoint(run_dir)["progress"]["update"] == (15 if how == "killed" else 20)
    assert len(read_csv(run_dir / "metrics.csv")) == (how == "killed")  # the row of update 20
    del stop
    gc.collect()  # release the lock of the killed run
    main(replace(broken, resume="auto"))
    assert_same_outcome(only_run(tmp_path / "a"), run_dir)
    rows = read_csv(run_dir / "metrics.csv")
    assert [row["updates"] for row in rows] == ["20", "40"] and int(rows[0]["episodes"]) >= 3
    columns = "iteration updates episodes mean_return td_loss cql_loss q_data q_greedy ups"
    assert list(rows[0]) == columns.split() and (run_dir / "weights.pt").exists()


def test_a_run_may_end_where_a_signal_stopped_it(tmp_path, data, monkeypatch):
    """The update at which it stopped is then evaluated, and the iterations are numbered without a gap."""
    learn, calls = cql_softmoe.Agent.learn, itertools.count(1)
    monkeypatch.setattr(
        cql_softmoe.Agent,
        "learn",
        lambda agent: (next(calls) != 27 or os.kill(os.getpid(), signal.SIGTERM), learn(agent))[1],
    )
    with pytest.raises(SystemExit):
        main(small_args(tmp_path))
    run_dir = only_run(tmp_path / "runs")
    for total_updates in (27, 60):
        main(small_args(tmp_path, resume=str(run_dir), total_updates=total_updates))
    rows = read_csv(run_dir / "metrics.csv")
    assert [(row["iteration"], row["updates"]) for row in rows] == [("0", "20"), ("1", "27"), ("2", "40"), ("3", "60")]
    assert len({row["td_loss"] for row in rows}) == 4  # each row has the loss of its own update


def test_a_run_is_not_resumed_on_other_data(tmp_path, data, capsys):
    args = small_args(tmp_path, total_updates=20)
    main(args)
    resume = replace(args, resume=str(only_run(tmp_path / "runs")), total_updates=40)
    data.rename(tmp_path / "moved")  # the same data may be moved
    main(replace(resume, dataset_dir=str(tmp_path / "moved")))
    (tmp_path / "moved" / "000000000080.npz").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(replace(resume, dataset_dir=str(tmp_path / "moved"), total_updates=60))
    assert stop.value.code == 2 and "transitions were in the data" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("distributional", [True, False])
@pytest.mark.parametrize("compile, cuda_graphs", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("replay_device", ["auto", "cpu"])
def test_trains_and_resumes_on_a_gpu(tmp_path, data, distributional, compile, cuda_graphs, replay_device):
    switches = {"cuda": True, "compile": compile, "cuda_graphs": cuda_graphs, "replay_device": replay_device}
    args = small_args(tmp_path, distributional=distributional, **switches)
    main(args)
    run_dir = only_run(tmp_path / "runs")
    main(replace(args, resume=str(run_dir), total_updates=60, cuda=False))  # on another device
    rows = read_csv(run_dir / "metrics.csv")
    assert [row["updates"] for row in rows] == ["20", "40", "60"]
    assert all(np.isfinite(float(row["td_loss"])) for row in rows)


def test_cql_is_better_than_its_data_and_than_plain_dqn(tmp_path, weak_data):
    """The data has few of the actions in each state."""
    scores = []
    for alpha in (0.3, 0.0):
        run = {"dataset_dir": str(weak_data), "distributional": False, "cql_alpha": alpha, "run_name": f"alpha{alpha}"}
        run |= {"n_step": 1, "gamma": 0.9, "learning_rate": 1e-3, "layer": "dense", "num_experts": 1}
        run |= {"expert_hidden_dim": 64, "target_network_frequency": 100, "eval_steps": 400}
        main(small_args(tmp_path, **run, total_updates=1_250, iteration_updates=1_250))
        scores.append(float(read_csv(tmp_path / "runs" / f"alpha{alpha}" / "metrics.csv")[-1]["mean_return"]))
    assert scores[0] >= 0.75 * 4 and scores[0] > scores[1]
