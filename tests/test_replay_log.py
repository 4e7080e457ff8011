"""The replay log: its layout on disk, what a reader finds in it, runs that are killed while they write."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, quick

import cql_softmoe
from cql_softmoe import OfflineReplay
from dqn_softmoe import Args, ReplayBuffer, ReplayLog, game_name, main

SIZE = (3, 2)


def random_rows(rng, steps, lanes, lost_lives=False):
    """What a run stores, row by row: games of random length that terminate or are cut, the reset step after each."""
    over = np.zeros(lanes, bool)
    for _ in range(steps):
        frame = rng.integers(1, 255, (lanes, *SIZE), dtype=np.uint8)
        valid = ~over
        terminated, truncated = (rng.random((2, lanes)) < 0.08) & valid
        life = (rng.random(lanes) < 0.1) & valid & lost_lives
        over = terminated | truncated
        yield frame, rng.integers(0, 4, lanes), rng.normal(0, 2, lanes), terminated | life, truncated, valid
    no = np.zeros(lanes, bool)
    yield rng.integers(1, 255, (lanes, *SIZE), dtype=np.uint8), rng.integers(0, 4, lanes), np.zeros(lanes), no, no, no


def write(folder, rows, lanes, shard_size):
    log = ReplayLog(folder, lanes, SIZE, shard_size, {"env_id": "Nothing-v0", "num_actions": 4})
    for row in rows:
        log.add(*row)
    log.close()
    return log


def read(folder, shard, name):
    prefix = "" if name in ("add_count", "invalid_range") else "$store$_"
    with gzip.open(folder / "replay_logs" / f"{prefix}{name}_ckpt.{shard}.gz") as file:
        return np.load(file, allow_pickle=False)


def arrays_of(folder, num_shards):
    """All rows of all shards without the junk, and their numbers."""
    counts = [int(read(folder, shard, "add_count")) for shard in range(num_shards)]
    arrays = {
        name: np.concatenate([read(folder, shard, name)[:count] for shard, count in enumerate(counts)])
        for name in ReplayLog.ARRAYS
    }
    return arrays, counts


def transitions(batch):
    """The batch as a multiset; frames after a terminal step do not matter."""
    parts = [x.tolist() for x in (batch.action, batch.reward, batch.discount)]
    frames = zip(batch.obs, batch.next_obs, *parts, strict=True)
    return Counter((o.numpy().tobytes(), n.numpy().tobytes() if d else b"", a, r, d) for o, n, a, r, d in frames)


@pytest.mark.parametrize("n_step", [1, 3, 10])
@pytest.mark.parametrize(
    "lanes, shard_size, lost_lives", [(1, 10**6, False), (3, 60, False), (2, 100, True), (2, 1, True)]
)
def test_what_is_read_is_what_the_live_replay_holds(tmp_path, n_step, lanes, shard_size, lost_lives):
    """Every transition with its stacks, n-step return, discount and bootstrap frame, and no other."""
    rows = list(random_rows(np.random.default_rng(n_step), 400, lanes, lost_lives))
    live = ReplayBuffer(500 * lanes, lanes, SIZE, n_step=n_step)
    for frame, action, reward, *flags in rows:
        live.add(frame, action, np.clip(reward, -1, 1), *flags)
    log = write(tmp_path, rows, lanes, shard_size)
    drawable = [(row, lane) for lane in range(lanes) for row in live.queue[lane, : live.tail[lane]].tolist()]
    expected = live._gather(*torch.tensor(drawable).T)
    arrays, counts = arrays_of(tmp_path, log.shard)
    data = OfflineReplay(arrays, counts, n_step=n_step, gamma=0.99, device="cpu")
    assert len(data) == len(drawable) == sum(int(row[-1].sum()) for row in rows)
    assert transitions(data.gather(data.starts)) == transitions(expected)


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_share_of_the_rows_has_the_same_transitions_as_the_whole(tmp_path, n_step):
    """Wherever a shard is cut, between a cut episode's last step and the frame after it too."""
    write(tmp_path, random_rows(np.random.default_rng(4), 120, 1), 1, 10**6)
    arrays, (count,) = arrays_of(tmp_path, 1)
    whole = OfflineReplay(arrays, [count], n_step=n_step, gamma=0.99, device="cpu")
    assert (arrays["episode_end"] == 2).any()
    for rows in range(10, count):
        share = {name: array[:rows] for name, array in arrays.items()}
        data = OfflineReplay(share, [rows], n_step=n_step, gamma=0.99, device="cpu")
        assert transitions(data.gather(data.starts)) == transitions(whole.gather(data.starts)), rows
        assert set(whole.starts[whole.starts < rows - n_step].tolist()) <= set(data.starts.tolist())


def test_layout(tmp_path):
    rng = np.random.default_rng(0)
    log = write(tmp_path, random_rows(rng, 300, 2), 2, 100)
    assert log.shard >= 6
    names = {path.name for path in (tmp_path / "replay_logs").iterdir()}
    arrays = ("observation", "action", "reward", "terminal", "episode_end")
    kinds = [*(f"$store$_{name}_ckpt" for name in arrays), "add_count_ckpt", "invalid_range_ckpt"]
    assert names == {f"{kind}.{shard}.gz" for kind in kinds for shard in range(log.shard)}
    for shard in range(log.shard):
        count, *rows = (read(tmp_path, shard, name) for name in ("add_count", *arrays))
        observation, action, reward, terminal, end = rows
        assert count.shape == () and count < 100
        assert [x.dtype for x in rows] == [np.uint8, np.int32, np.float32, np.uint8, np.uint8]
        assert observation.shape == (count + 1, *SIZE) and {x.shape for x in rows[1:]} == {(count + 1,)}
        assert read(tmp_path, shard, "invalid_range").tolist() == [count - 1, count, 0, 1, 2]
        assert abs(reward).max() == 1 and set(np.unique(terminal)) == {0, 1}
        assert end[0] == 3 and not observation[count].any()  # whole episodes; junk
        padding = [i for i in range(3, count) if end[i - 3 : i].tolist() == [3, 3, 3] and end[i] == 0]
        assert padding and all(not observation[i - 3 : i].any() and not terminal[i - 3 : i].any() for i in padding)


def test_readers_that_know_six_files_accept_exactly_the_transitions(tmp_path):
    """Dopamine's rule: row i is a start if no row of i-3..i-1 is terminal, and i is 3 or more."""
    log = write(tmp_path, random_rows(np.random.default_rng(1), 400, 3, lost_lives=True), 3, 150)
    for shard in range(log.shard):
        count = int(read(tmp_path, shard, "add_count"))
        terminal, end = (read(tmp_path, shard, name)[:count] for name in ("terminal", "episode_end"))
        accepted = [i for i in range(3, count) if not terminal[i - 3 : i].any()]
        assert accepted == np.flatnonzero(end != 3).tolist()


def test_metadata_lists_the_episodes_with_their_raw_returns(tmp_path):
    rows = list(random_rows(np.random.default_rng(2), 200, 1))
    log = write(tmp_path, rows, 1, 80)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["columns"] == ["shard", "row", "length", "raw_return", "terminated"]
    steps = [(reward[0], terminated[0]) for _, _, reward, terminated, _, valid in rows if valid[0]]
    assert sum(length for _, _, length, _, _ in metadata["episodes"]) == len(steps)
    for shard, row, length, raw_return, terminated in metadata["episodes"]:
        (rewards, ends), steps = zip(*steps[:length], strict=True), steps[length:]
        assert raw_return == pytest.approx(sum(rewards)) and terminated == ends[-1]
        end = read(tmp_path, shard, "episode_end")[row : row + length]
        assert end.tolist() == [0] * (length - 1) + [1 if terminated else 2]
    assert log.error is None


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shard_size", [40, 90, 10**6])
def test_a_log_goes_on_where_its_checkpoint_was(tmp_path, shard_size):
    """Whatever was written after it, shards that were finished included; a stray file is nobody's."""
    rows = list(random_rows(np.random.default_rng(3), 300, 2))
    cut = (*rows[-1][:3], *(np.zeros(2, bool),) * 3)
    unbroken = ReplayLog(tmp_path / "a", 2, SIZE, shard_size, {})
    broken = ReplayLog(tmp_path / "b", 2, SIZE, shard_size, {})
    for log in (unbroken, broken):
        for row in [*rows[:120], cut]:
            log.add(*row)
        state = log.state()
    for row in rows[120:]:
        unbroken.add(*row)
    for row in rows[200:280]:  # lost
        broken.add(*row)
    broken.close()
    for name in "ab":
        (tmp_path / name / "replay_logs" / ".DS_Store").touch()
    resumed = ReplayLog(tmp_path / "b", 2, SIZE, shard_size, {})
    resumed.load_state(state)
    for row in rows[120:]:
        resumed.add(*row)
    for log in (unbroken, resumed):
        log.close()
    assert files(tmp_path / "a") == files(tmp_path / "b")


def command(tmp_path, *more):
    line = [sys.executable, str(ROOT / "dqn_softmoe.py"), "--env-id", "pixel_game:PixelCatch-v0", "--no-cuda"]
    line += ["--encoder", "nature", "--expert-hidden-dim", "8", "--eval-episodes", "0", "--runs-dir", str(tmp_path)]
    line += ["--save-replay", "--replay-shard-size", "200", "--buffer-size", "2000", "--checkpoint-every", "1000"]
    return [*line, "--learning-starts", "3000", "--total-timesteps", "3000", *more]


def test_a_run_killed_while_it_writes_leaves_whole_shards_and_goes_on(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "unbroken"), check=True, **quiet)
    run = subprocess.Popen(command(tmp_path / "killed"), **quiet)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "killed").glob("*/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    run.send_signal(signal.SIGKILL)
    assert run.wait() != 0
    (folder,) = (tmp_path / "killed").glob("*/replay/PixelCatch/1/replay_logs")
    whole = [int(path.name.split(".")[1]) for path in folder.glob("add_count_ckpt.*.gz")]
    assert len(whole) >= 3
    for shard in whole:
        assert len({len(read(folder.parent, shard, name)) for name in ReplayLog.ARRAYS}) == 1
    subprocess.run([sys.executable, str(ROOT / "dqn_softmoe.py"), "--resume", folder.parents[3]], check=True, **quiet)
    a, b = (files(only_run(tmp_path / name) / "replay") for name in ("unbroken", "killed"))
    assert {k: v for k, v in a.items() if k != "metadata.json"} == {k: v for k, v in b.items() if k != "metadata.json"}
    a, b = (json.loads(part["metadata.json"]) for part in (a, b))
    assert a["episodes"] == b["episodes"] and len(a["episodes"]) > 100


def test_a_disk_that_is_full_stops_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gzip, "compress", full)
    with pytest.raises(SystemExit) as stop:
        main(Args(**quick(runs_dir=str(tmp_path), save_replay=True)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and "No space left on device" in lines[-1] and "replay_logs" in lines[-1]
    assert not list(tmp_path.glob("*/replay/PixelCatch/1/replay_logs/*.gz"))


def test_names_of_games():
    for env_id in ("BreakoutNoFrameskip-v4", "ALE/Breakout-v5", "BreakoutDeterministic-v0", "my_module:Breakout-v0"):
        assert game_name(env_id) == cql_softmoe.game_name(env_id) == "Breakout"
