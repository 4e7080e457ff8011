"""Offline: readers of logs and of the published layout, damaged data, CQL's loss, whole runs of `cql_softmoe.py`."""

import gzip
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import only_run, quick, read_csv

import cql_softmoe
import dqn_softmoe
import rainbow_softmoe
from cql_softmoe import Args, Batch, OfflineReplay, QNetwork, RunLog, main, make_envs, open_dataset, td_loss

GAME = "pixel_game:PixelCatch-v0"
FRAME = (12, 12)


def small(tmp_path, **overrides) -> Args:
    """Arguments of a run of about a second."""
    settings = {"env_id": GAME, "encoder": "nature", "num_experts": 2, "expert_hidden_dim": 16, "cuda": False}
    settings |= {"total_updates": 40, "iteration_updates": 20, "log_every": 10, "eval_steps": 60, "num_envs": 3}
    settings |= {"checkpoint_every": 0, "target_network_frequency": 10, "runs_dir": str(tmp_path / "runs")}
    return Args(**settings | {"dataset_dir": str(tmp_path)} | overrides)


# ------------------------------------------------------------------------------------------------------------- data


def published(folder: Path, suffix: int, rng, rows=60, **changes) -> dict[str, np.ndarray]:
    """A shard as the published ones are: six files, padding after a terminal row, the last row junk."""
    terminal = np.zeros(rows, np.uint8)
    frames = rng.integers(1, 255, (rows, *FRAME), dtype=np.uint8)
    action, reward = rng.integers(0, 3, rows, dtype=np.int32), rng.choice([-1, 0, 1], rows).astype(np.float32)
    terminal[[14, 33]] = 1
    for start in (0, 15, 34):  # three black rows open an episode
        frames[start : start + 3], action[start : start + 3], reward[start : start + 3] = 0, 0, 0
    frames[-1], action[-1], reward[-1], terminal[-1] = 255, 99, np.nan, 1  # poison
    arrays = {"observation": frames, "action": action, "reward": reward, "terminal": terminal}
    arrays |= {"add_count": np.array(rows - 1), "invalid_range": np.array([rows - 2, rows - 1, 0, 1, 2])}
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (arrays | changes).items():
        if array is not None:
            save(folder, name, suffix, array)
    return arrays


def save(folder: Path, name: str, suffix: int, array: np.ndarray) -> Path:
    path = folder / f"{'' if name in ('add_count', 'invalid_range') else '$store$_'}{name}_ckpt.{suffix}.gz"
    with gzip.open(path, "wb") as file:
        np.save(file, array)
    return path


def opened(args: Args) -> OfflineReplay:
    return open_dataset(args, make_envs(args, 1), torch.device("cpu"))


@pytest.fixture
def logs(tmp_path) -> Path:
    return tmp_path / "PixelCatch" / "1" / "replay_logs"


@pytest.mark.parametrize("n_step", [1, 3])
def test_published_layout(tmp_path, logs, n_step, capsys):
    """Starts are the rows without a terminal one among the three before; the junk row is in nothing that is drawn."""
    shards = [published(logs, suffix, np.random.default_rng(suffix)) for suffix in (0, 1, 3)]  # 2 is missing
    data = opened(small(tmp_path, n_step=n_step))
    assert "no metadata.json" in capsys.readouterr().err
    expected = []
    for k, shard in enumerate(shards):
        for i in range(3, 59):
            window = shard["terminal"][i : min(i + n_step, 59)]
            if not shard["terminal"][i - 3 : i].any() and (window.any() or i + n_step < 59):
                expected.append((k, i))
    assert data.starts.tolist() == [59 * k + i for k, i in expected]
    batch = data.gather(data.starts)
    for j, (k, i) in enumerate(expected):
        shard = shards[k]
        ends = np.flatnonzero(shard["terminal"][i : i + n_step])
        steps = ends[0] + 1 if len(ends) else n_step
        np.testing.assert_array_equal(batch.obs[j].numpy(), shard["observation"][i - 3 : i + 1])
        assert batch.action[j] == shard["action"][i]
        assert batch.reward[j] == pytest.approx(sum(0.99**m * shard["reward"][i + m] for m in range(steps)))
        assert batch.discount[j] == pytest.approx(0.0 if len(ends) else 0.99**steps)
        if not len(ends):
            later = slice(i + steps - 3, i + steps + 1)
            np.testing.assert_array_equal(batch.next_obs[j].numpy(), shard["observation"][later])


@pytest.mark.parametrize(
    "fraction, max_shards, rows", [(1.0, None, 118), (0.5, None, 60), (0.1, None, 12), (1.0, 1, 59)]
)
def test_first_share_of_every_shard(tmp_path, logs, fraction, max_shards, rows):
    shards = [published(logs, suffix, np.random.default_rng(suffix)) for suffix in (0, 1)]
    data = opened(small(tmp_path, data_fraction=fraction, max_shards=max_shards, n_step=1))
    used = [shard["observation"][: rows // (max_shards or 2)] for shard in shards[:max_shards]]
    np.testing.assert_array_equal(data.frames.numpy(), np.concatenate(used).reshape(rows, -1))


def test_draws_are_uniform(tmp_path, logs):
    published(logs, 0, np.random.default_rng(0))
    data = opened(small(tmp_path))
    torch.manual_seed(0)
    counts = np.bincount(data.sample(100_000).index.numpy(), minlength=59)
    assert set(np.flatnonzero(counts)) == set(data.starts.tolist())
    expected = 100_000 / len(data)
    assert ((counts[counts > 0] - expected) ** 2 / expected).sum() < 2 * len(data)


def test_the_cache_is_made_once_and_another_one_when_its_source_changes(tmp_path, logs, capsys):
    """A changed source leaves the old cache alone: another run may have it mapped into memory."""
    published(logs, 0, np.random.default_rng(0))
    before = {path: path.read_bytes() for path in logs.iterdir()}
    args = small(tmp_path, cache_dir=str(tmp_path / "cache"))
    data = opened(args)
    first = data.frames.clone()
    assert "unpacking 59 rows" in capsys.readouterr().out
    assert torch.equal(opened(args).frames, first) and capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in logs.iterdir()} == before
    published(logs, 0, np.random.default_rng(5))
    assert not torch.equal(opened(args).frames, first)
    assert torch.equal(data.frames, first)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # and nothing half done


def test_data_is_mapped_read_only(tmp_path, logs):
    """Linux refuses a writable private map of more than its memory, and the data may be that large."""
    published(logs, 0, np.random.default_rng(0))
    args = small(tmp_path)
    arrays = cql_softmoe.unpack_dataset(logs, cql_softmoe.find_shards(logs, args, FRAME), args, FRAME)
    assert [name for name, array in arrays.items() if array.flags.writeable or not isinstance(array, np.memmap)] == []


def test_logs_of_one_name_share_a_cache_folder(tmp_path):
    folders = [tmp_path / name / "PixelCatch" / "1" / "replay_logs" for name in "ab"]
    shards = [published(folder, 0, np.random.default_rng(seed)) for seed, folder in enumerate(folders)]
    for folder, shard in [*zip(folders, shards, strict=True)] * 2:
        data = opened(small(tmp_path, dataset_dir=str(folder), cache_dir=str(tmp_path / "cache")))
        np.testing.assert_array_equal(data.frames.numpy(), shard["observation"][:59].reshape(59, -1))


def test_another_run_was_faster_to_unpack(tmp_path, logs, monkeypatch):
    published(logs, 0, np.random.default_rng(0))
    args, names = small(tmp_path), []
    unpack = cql_softmoe.unpack

    def slow(shards, name, *rest):
        if not names:  # meanwhile the other one does all of it
            names.append(name)
            opened(args)
        unpack(shards, name, *rest)

    monkeypatch.setattr(cql_softmoe, "unpack", slow)
    assert torch.equal(opened(args).frames, opened(args).frames)
    assert len(list((logs.parent / "replay_cache").iterdir())) == 1


# ---------------------------------------------------------------------------------------------------- damaged data


@pytest.fixture
def refused(tmp_path, logs, capsys):
    """Opens the dataset, which must be refused in one line with these words, the data left as it was."""

    def call(words, **overrides):
        before = {path: path.read_bytes() for path in logs.iterdir()} if logs.is_dir() else {}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(small(tmp_path, **overrides))
        lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("error")]
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert [word for word in words if word not in lines[0]] == [], lines[0]
        assert not (tmp_path / "runs").exists()
        if logs.is_dir():
            assert {path: path.read_bytes() for path in logs.iterdir()} == before

    return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_unpacks_leaves_nothing_half_done(refused, logs, monkeypatch, number):
    published(logs, 0, np.random.default_rng(0))
    unpack = cql_softmoe.unpack
    monkeypatch.setattr(cql_softmoe, "unpack", lambda *args: (os.kill(os.getpid(), number), unpack(*args)))
    refused(["unpack", "stopped by a signal"])
    assert list((logs.parent / "replay_cache").iterdir()) == []
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_no_data(refused, tmp_path):
    refused(["replay_logs", "--save-replay"])
    refused(["replay_logs", "--save-replay"], dataset_dir=str(tmp_path / "nowhere"))
    refused(["--dataset-dir", "--save-replay"], dataset_dir="")


def test_several_logs(refused, tmp_path, logs):
    published(logs, 0, np.random.default_rng(0))
    published(tmp_path / "PixelCatch" / "2" / "replay_logs", 0, np.random.default_rng(0))
    refused(["2 logs", "PixelCatch/1", "PixelCatch/2"])


def test_folder_without_a_whole_shard(refused, logs):
    published(logs, 0, np.random.default_rng(0), reward=None)
    refused(["no shard"])


WRONG = {
    "dtype": ({"reward": np.zeros(60, np.float64)}, ["float64", "float32"]),
    "shape": ({"observation": np.zeros((60, 5, 5), np.uint8)}, ["(60, 5, 5)", "12"]),
    "lengths": ({"action": np.zeros(59, np.int32)}, ["different lengths"]),
    "actions": ({"action": np.full(60, 3, np.int32)}, ["actions", "3"]),
    "negative action": ({"action": np.full(60, -1, np.int32)}, ["actions", "-1"]),
    "count": ({"add_count": np.array([1, 2])}, ["add_count"]),
    "negative count": ({"add_count": np.array(-5)}, ["add_count"]),
    "nothing to draw": ({"add_count": np.array(2)}, ["no transition"]),
}


@pytest.mark.parametrize("changes, words", WRONG.values(), ids=WRONG)
def test_wrong_arrays(refused, logs, changes, words):
    published(logs, 0, np.random.default_rng(0), **changes)
    refused(words)


class Exploit:
    def __reduce__(self):
        return exec, ("raise SystemError('unpickled')",)


@pytest.mark.parametrize("name", ["action", "add_count"])
def test_pickled_content(refused, logs, name):
    published(logs, 0, np.random.default_rng(0))
    with gzip.open(save(logs, name, 0, np.zeros(1)), "wb") as file:
        np.save(file, np.array([Exploit()] * 60, object), allow_pickle=True)
    refused(["shard 0", "damaged"])


def test_another_game(refused, logs):
    published(logs, 0, np.random.default_rng(0))
    metadata = {"env_id": "PongNoFrameskip-v4", "num_actions": 3}
    (logs.parent / "metadata.json").write_text(json.dumps(metadata))
    refused(["--env-id", "PongNoFrameskip-v4"])
    (logs.parent / "metadata.json").write_text(json.dumps({"env_id": GAME, "num_actions": 4}))
    refused(["--env-id"])
    (logs.parent / "metadata.json").write_text("{")
    refused(["metadata.json", "damaged"])


def test_published_folder_of_another_game(refused, tmp_path, logs):
    gym.register_envs(__import__("ale_py"))
    published(logs, 0, np.random.default_rng(0))
    logs.parents[1].rename(tmp_path / "Pong")
    refused(["--env-id", "Pong"])


def test_no_disk_space_for_the_cache(refused, logs, monkeypatch):
    published(logs, 0, np.random.default_rng(0))
    usage = shutil.disk_usage(logs)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(["0.00 GB", "free"])


def test_damaged_cache(refused, tmp_path, logs):
    published(logs, 0, np.random.default_rng(0))
    opened(small(tmp_path))
    (path,) = (logs.parent / "replay_cache").glob("*/observation.npy")
    path.write_bytes(path.read_bytes()[:500])
    refused([str(path.parent), "delete it"])


BAD_ARGUMENTS = {
    "max shards": ({"max_shards": 0}, ["--max-shards"]),
    "no data": ({"data_fraction": 0.0}, ["--data-fraction", "0.0"]),
    "more than all data": ({"data_fraction": 1.1}, ["--data-fraction", "1.1"]),
    "not a number": ({"data_fraction": float("nan")}, ["--data-fraction"]),
    "negative alpha": ({"cql_alpha": -0.1}, ["--cql-alpha"]),
    "infinite alpha": ({"cql_alpha": float("inf")}, ["--cql-alpha"]),
    "no updates": ({"total_updates": 0}, ["--total-updates"]),
    "no steps": ({"n_step": 0}, ["--n-step"]),
    "one atom": ({"num_atoms": 1}, ["--num-atoms"]),
    "atoms without a use": ({"distributional": False, "num_atoms": 11}, ["--num-atoms", "--distributional"]),
    "double without a use": ({"distributional": False, "double": False}, ["--double", "--distributional"]),
    "tokens of a dense layer": ({"layer": "dense", "num_experts": 1, "tokenization": "PerFeat"}, ["--tokenization"]),
}


@pytest.mark.parametrize("overrides, words", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(refused, logs, overrides, words):
    published(logs, 0, np.random.default_rng(0))
    refused(words, **overrides)


def fuzzed(content: bytes):
    """Cut at every tenth byte; each of the first bytes flipped, gzip's and the array's header among them."""
    for length in range(0, len(content), max(1, len(content) // 10)):
        yield content[:length]
    for i in [*range(0, 40), *range(40, len(content), max(1, len(content) // 12))]:
        yield content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :]


@pytest.mark.parametrize("name", ["observation", "action", "reward", "terminal", "add_count"])
def test_damaged_files_are_never_read_as_if_nothing_was(tmp_path, logs, name, capsys):
    published(logs, 0, np.random.default_rng(0), rows=60)
    args = small(tmp_path, n_step=1)
    good, (path,) = opened(args), logs.glob(f"*{name}_ckpt.0.gz")
    content, envs = path.read_bytes(), make_envs(args, 1)
    for damaged in fuzzed(content):
        path.write_bytes(damaged)
        capsys.readouterr()
        try:
            data = open_dataset(args, envs, torch.device("cpu"))
        except SystemExit as stop:
            lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("error")]
            assert stop.code == 2 and len(lines) == 1
        else:  # gzip's time stamp and the like
            for part in ("frames", "action", "reward", "terminated", "starts"):
                assert torch.equal(getattr(data, part), getattr(good, part)), part


# ------------------------------------------------------------------------------------------------------------- loss


def networks(args, seed=0):
    torch.manual_seed(seed)
    return [QNetwork(args, (4, *FRAME), 3) for _ in range(2)]


def random_batch(B=8):
    obs, next_obs = torch.randint(0, 256, (2, B, 4, *FRAME), dtype=torch.uint8)
    return Batch(obs, torch.randint(3, (B,)), torch.randn(B), 0.99 * torch.randint(2, (B,)), next_obs, torch.arange(B))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 4.0])
def test_cql_loss_is_numpy_s(tmp_path, alpha):
    args = small(tmp_path, distributional=False, cql_alpha=alpha)
    (q_network, target_network), batch = networks(args), random_batch()
    loss, metrics = td_loss(q_network, target_network, batch, args)
    q = q_network.q_values(batch.obs).detach().double().numpy()
    next_q = target_network.q_values(batch.next_obs).detach().double().numpy()
    error = q[np.arange(8), batch.action] - (batch.reward.numpy() + batch.discount.numpy() * next_q.max(axis=1))
    huber = np.where(abs(error) < 1, 0.5 * error**2, abs(error) - 0.5).mean()
    cql = (np.log(np.exp(q).sum(axis=1)) - q[np.arange(8), batch.action]).mean()
    assert metrics["td_loss"].item() == pytest.approx(huber, rel=1e-4)
    assert metrics["cql_loss"].item() == pytest.approx(cql, rel=1e-4)
    assert loss.item() == pytest.approx(huber + alpha * cql, rel=1e-4)


@pytest.mark.parametrize("double", [True, False])
def test_distributional_loss_is_rainbow_s_plus_cql(tmp_path, double):
    args = small(tmp_path, double=double, cql_alpha=0.5)
    (q_network, target_network), batch = networks(args), random_batch()
    loss, metrics = td_loss(q_network, target_network, batch, args)
    rainbow = rainbow_softmoe.Args(double=double, noisy=False)
    expected, _ = rainbow_softmoe.td_loss(q_network, target_network, rainbow_softmoe.Batch(*batch), rainbow)
    q = (q_network(batch.obs)[0].softmax(dim=2) * torch.linspace(-10, 10, 51)).sum(dim=2)
    cql = (q.logsumexp(dim=1) - q.gather(1, batch.action[:, None])[:, 0]).mean()
    torch.testing.assert_close(metrics["td_loss"], expected.detach())
    torch.testing.assert_close(loss, expected + 0.5 * cql)


@pytest.mark.parametrize("distributional", [True, False])
def test_the_regulariser_pushes_unseen_actions_below_the_data_s(tmp_path, distributional):
    """Data in which only action 1 occurs and nothing is ever won."""
    args = small(tmp_path, distributional=distributional, cql_alpha=1.0, double=distributional)
    (q_network, target_network), batch = networks(args), random_batch(32)
    batch = batch._replace(action=torch.ones(32, dtype=torch.long), reward=torch.zeros(32))
    optimizer = torch.optim.Adam(q_network.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        td_loss(q_network, target_network, batch, args)[0].backward()
        optimizer.step()
    q = q_network.q_values(batch.obs)
    assert (q[:, 1] > q[:, 0]).all() and (q[:, 1] > q[:, 2]).all()


# ------------------------------------------------------------------------------------------------------- whole runs


def log_run(folder: Path, **overrides) -> Path:
    """A logged run of DQN on the pixel game."""
    settings = {"learning_rate": 1e-3, "expert_hidden_dim": 64, "num_experts": 4, "log_every": 1000, "eval_episodes": 0}
    settings |= {"learning_starts": 500, "buffer_size": 10_000, "target_network_frequency": 400, "save_replay": True}
    dqn_softmoe.main(dqn_softmoe.Args(**quick(runs_dir=str(folder), **settings | overrides)))
    return only_run(folder)


@pytest.fixture(scope="module")
def random_play(tmp_path_factory) -> Path:
    """1,000 random steps."""
    return log_run(tmp_path_factory.mktemp("random"), total_timesteps=1_000, learning_starts=1_000)


class Killed(BaseException):
    """Stands for kill -9: nothing gets to clean up."""


@pytest.mark.parametrize("distributional", [True, False])
def test_a_run_leaves_its_records_and_resumes_to_the_bit(tmp_path, random_play, distributional, monkeypatch):
    settings = {"dataset_dir": str(random_play), "distributional": distributional, "checkpoint_every": 15}
    unbroken, killed = (small(tmp_path / name, **settings | {"runs_dir": str(tmp_path / name)}) for name in "ab")
    main(unbroken)
    training = RunLog.training

    def die_at_20(log, values, update):
        if update == 20:
            raise Killed
        training(log, values, update)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunLog, "training", die_at_20)
        main(killed)
    run_dirs = [only_run(tmp_path / name) for name in "ab"]
    assert [path.name for path in run_dirs[1].glob("checkpoint-*")] == ["checkpoint-000000000015"]
    main(replace(killed, resume=str(run_dirs[1])))
    a, b = (torch.load(path / "checkpoint-000000000040" / "state.pt", weights_only=True) for path in run_dirs)
    for name in ("q_network", "target_network"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
    assert torch.equal(a["random"]["cpu"], b["random"]["cpu"]) and a["values"] == b["values"]
    rows, others = ([row | {"ups": ""} for row in read_csv(path / "metrics.csv")] for path in run_dirs)
    assert rows == others and [row["updates"] for row in rows] == ["20", "40"] and int(rows[0]["episodes"]) >= 3
    columns = "iteration updates episodes mean_return td_loss cql_loss q_data q_greedy ups"
    assert list(rows[0]) == columns.split() and (run_dirs[1] / "weights.pt").exists()


def test_a_run_is_not_resumed_on_other_data(tmp_path, logs, capsys):
    published(logs, 0, np.random.default_rng(0))
    args = small(tmp_path, total_updates=20)
    main(args)
    published(logs, 1, np.random.default_rng(1))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(replace(args, resume=str(only_run(tmp_path / "runs")), total_updates=40))
    assert stop.value.code == 2 and "transitions were in the data" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("distributional", [True, False])
@pytest.mark.parametrize("compile, cuda_graphs", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("replay_device", ["auto", "cpu"])
def test_trains_and_resumes_on_a_gpu(tmp_path, random_play, distributional, compile, cuda_graphs, replay_device):
    switches = {"cuda": True, "compile": compile, "cuda_graphs": cuda_graphs, "replay_device": replay_device}
    args = small(tmp_path, dataset_dir=str(random_play), distributional=distributional, **switches)
    main(args)
    run_dir = only_run(tmp_path / "runs")
    main(replace(args, resume=str(run_dir), total_updates=60, cuda=False))  # and on another device
    rows = read_csv(run_dir / "metrics.csv")
    assert [row["updates"] for row in rows] == ["20", "40", "60"]
    assert all(np.isfinite(float(row["td_loss"])) for row in rows)


NARROW = {"n_step": 1, "gamma": 0.9, "learning_rate": 1e-3, "expert_hidden_dim": 64, "num_experts": 4}
NARROW |= {"layer": "dense", "target_network_frequency": 100, "total_updates": 3_000, "iteration_updates": 3_000}
NARROW |= {"eval_steps": 400, "distributional": False}


@pytest.fixture(scope="module")
def mediocre_play(tmp_path_factory) -> Path:
    """8,000 steps of a policy that moves towards the ball two times out of five, and else not at all."""
    folder = tmp_path_factory.mktemp("mediocre")
    env, rng = gym.make(GAME).unwrapped, np.random.default_rng(0)
    metadata = {"env_id": GAME, "num_actions": 3}
    log = dqn_softmoe.ReplayLog(folder / "PixelCatch" / "1", 1, FRAME, 10**6, metadata)
    no, yes = np.zeros(1, bool), np.ones(1, bool)
    returns, total = [], 0.0
    frame, _ = env.reset(seed=1)
    for _ in range(8_000):
        aim = int(np.sign(env.column - env.paddle)) + 1
        action = aim if rng.random() < 0.4 else 1
        next_frame, reward, terminated, _, _ = env.step(action)
        log.add(frame[None], np.array([action]), np.array([reward]), yes & terminated, no, yes)
        frame, total = next_frame, total + reward
        if terminated:
            returns, total = [*returns, total], 0.0
            frame, _ = env.reset()
    log.close()
    assert np.mean(returns) < 0.6 * 4
    return folder


def score(tmp_path, folder, alpha):
    args = small(tmp_path, dataset_dir=str(folder), cql_alpha=alpha, runs_dir=str(tmp_path / f"alpha{alpha}"))
    main(replace(args, **NARROW, cache_dir=str(tmp_path / "cache")))
    return float(read_csv(only_run(tmp_path / f"alpha{alpha}") / "metrics.csv")[-1]["mean_return"])


def test_cql_is_better_than_its_data_and_than_plain_dqn(tmp_path, mediocre_play):
    """On data that shows few of the actions of each state."""
    cql, dqn = (score(tmp_path, mediocre_play, alpha) for alpha in (0.3, 0.0))
    assert cql >= 0.8 * 4 and cql > dqn
