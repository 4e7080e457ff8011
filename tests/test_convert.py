"""`scripts/convert_dqn_replay.py`: both layouts against slow readers, the traps of the published one, damaged data."""

import contextlib
import functools
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import ROOT, Exploit, files, fork_script, wait_for

import cql_softmoe

sys.path.append(str(ROOT / "scripts"))
import convert_dqn_replay as convert

SIZE = (3, 2)
SCRIPT = ROOT / "scripts" / "convert_dqn_replay.py"
STEP, TERMINATED, CUT, NO_STEP = range(4)  # of `episode_end`
COUNT_ACTIONS = functools.cache(convert.count_actions)  # which loads the game


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Make segments, chunks and shards so small that every boundary is met. A game is loaded once for all tests."""
    monkeypatch.setattr(convert, "count_actions", COUNT_ACTIONS)
    monkeypatch.setattr(convert, "SEGMENT_ROWS", 7)
    monkeypatch.setattr(convert, "CHUNK_ROWS", 5)
    monkeypatch.setattr(convert, "SHARD_ROWS", 60)


@pytest.fixture
def logs(tmp_path) -> Path:
    folder = tmp_path / "data" / "Pong" / "1" / "replay_logs"
    folder.mkdir(parents=True)
    return folder


def run(source: Path, target: Path) -> Path:
    convert.main(convert.Args(source, target))
    return target


# ---------------------------------------------------------------------------------------------- the published layout
class Published:
    """Writes a shard row by row. `steps` has what each must become: (frame, action, reward, terminated, truncated)."""

    def __init__(self, seed=0):
        self.rng, self.rows, self.steps = np.random.default_rng(seed), [], []

    def step(self, terminal=0, end=STEP, frame=None, action=None, truncated=False):
        frame = self.rng.integers(1, 255, SIZE, dtype=np.uint8) if frame is None else frame
        action = int(self.rng.integers(0, 4)) if action is None else action
        reward = float(self.rng.integers(-1, 2)) if action else 0.0
        self.rows.append((frame, action, reward, terminal, end))
        self.steps.append((frame.tobytes(), action, reward, bool(terminal) and end != CUT, truncated or end == CUT))
        return self

    def play(self, count, terminal=1):
        for _ in range(count - 1):
            self.step()
        return self.step(terminal, TERMINATED) if terminal else self

    def padding(self, count=3):
        self.rows += [(np.zeros(SIZE, np.uint8), 0, 0.0, 0, NO_STEP)] * count
        return self

    def cut(self):
        """Add the last step of a cut episode and a row with the frame after it, as in logs with `episode_end`."""
        self.step(1, CUT)
        self.rows.append((self.rng.integers(1, 255, SIZE, dtype=np.uint8), 0, 0.0, 1, NO_STEP))
        return self

    def truncate(self):
        """Mark the last step as truncated, because what follows it is missing."""
        self.steps[-1] = (*self.steps[-1][:4], True)
        return self

    def save(self, folder, suffix, seven=False, junk=1, **changes):
        poison = (np.full(SIZE, 255, np.uint8), 99, np.nan, 1, 9)
        columns = zip(*self.rows, *[poison] * junk, strict=True)
        names = {"observation": "u1", "action": "i4", "reward": "f4", "terminal": "u1", "episode_end": "u1"}
        arrays = {n: np.array(column, dtype) for (n, dtype), column in zip(names.items(), columns, strict=True)}
        n = len(self.rows)
        arrays |= {"add_count": np.array(n), "invalid_range": np.array([n - 1, n, 0, 1, 2])}
        if not seven:
            del arrays["episode_end"]
        for name, array in (arrays | changes).items():
            if array is not None:
                save(folder, name, suffix, array)
        return self


def save(folder, name, suffix, array, **kwargs) -> Path:
    path = folder / f"{'' if name in ('add_count', 'invalid_range') else '$store$_'}{name}_ckpt.{suffix}.gz"
    with gzip.open(path, "wb") as file:
        np.save(file, array, **kwargs)
    return path


def chains(folder: Path) -> dict[int, list[list[tuple]]]:
    """Map the first step after each hole to one list of steps per environment, with steps as in `Published.steps`."""
    found, end = {}, None
    for path in sorted(folder.glob("*.npz")):
        segment = dict(np.load(path))
        assert {n: x.dtype.name for n, x in segment.items()} == convert.SEGMENT
        N, rows = segment["action"].shape
        assert {x.shape[:2] for x in segment.values()} == {(N, rows)}
        if int(path.stem) != end:
            run = found[int(path.stem)] = [[] for _ in range(N)]
        for env, chain in enumerate(run):
            frames = [frame.tobytes() for frame in segment["frames"][env]]
            rest = (segment[name][env].tolist() for name in ("action", "reward", "terminated", "truncated"))
            chain += zip(frames, *rest, strict=True)
        end = int(path.stem) + N * rows
    return found


BLACK = np.zeros(SIZE, np.uint8)


def transitions_of_segments(folder: Path) -> Counter:
    """Count the one-step transitions (stack, action, reward, next stack or None) whose frames are all known.

    Nothing is known of what was before a hole, nor if the episode after it is another one.
    """
    found = Counter()
    for first, run in chains(folder).items():
        for chain in run:
            stack = [None if first else BLACK.tobytes()] * 4
            for i, (frame, action, reward, terminated, truncated) in enumerate(chain):
                stack = [*stack[1:], frame]
                after = None if terminated else (*stack[1:], *(row[0] for row in chain[i + 1 : i + 2]))
                if None not in stack and not truncated and (terminated or len(after) == 4):
                    found[*stack, action, reward, after] += 1
                if terminated or truncated:
                    stack = [BLACK.tobytes()] * 4
    return found


def test_traps_of_six_files(tmp_path, logs, capsys):
    """There is junk, and suffixes are missing. Episodes cross files, lack a terminal row, or have black frames."""
    a = Published(1).padding().play(9).padding().step(frame=BLACK, action=0).step(frame=BLACK, action=0).play(6)
    a.padding().play(5, terminal=0).truncate().padding().play(8).padding().step(frame=BLACK, action=2).play(4)
    a.padding().play(5, terminal=0).truncate().save(logs, 0)  # goes on in the next file
    b = Published(2).play(5).padding().step(frame=BLACK, action=0).play(6).padding(2).save(logs, 1, junk=3)
    c = Published(3).padding(1).play(4).padding().play(3, terminal=0).truncate().padding(2)
    c.save(logs, 2, add_count=np.array(7 * (len(c.rows) + 1) + len(c.rows)))
    Published(9).padding().play(5).save(logs, 3, terminal=None)
    d = Published(4).padding().step(frame=BLACK, action=0).play(20).padding().play(9, terminal=0).truncate()
    d.save(logs, 5, junk=0)
    out = run(tmp_path / "data", tmp_path / "out")
    ends = np.cumsum([len(a.steps), 1, len(b.steps) + len(c.steps), 2 * len(d.rows)]).tolist()
    assert chains(out) == {0: [a.steps], ends[1]: [b.steps + c.steps], ends[3]: [d.steps]}
    assert max(np.load(path)["action"].shape[1] for path in out.glob("*.npz")) == 7
    assert {path.name for path in out.iterdir() if path.suffix != ".npz"} == {"metadata.json"}
    error = capsys.readouterr().err
    assert "suffix 3 lacks terminal" in error and "no " in error and "PongNoFrameskip-v4" in error
    metadata = {"env_id": "PongNoFrameskip-v4", "num_actions": 6, "num_envs": 1, "ale_py": None, "rom_md5": None}
    assert json.loads((out / "metadata.json").read_text()) == metadata | {"args": {}, "source": str(logs)}


def test_six_files_have_the_transitions_that_dopamine_draws(tmp_path, logs):
    """Dopamine draws row i >= 3 if no row of i-3..i-1 is terminal and what comes after it is in the file."""
    rng, expected = np.random.default_rng(0), Counter()
    for suffix in range(6):
        log = Published(suffix)
        log.play(int(rng.integers(1, 9))) if suffix % 2 else log  # the first file that has a number begins an episode
        for length in rng.integers(1, 20, 5).tolist():
            log.padding().play(length)
        log.padding().play(7, terminal=0) if suffix % 3 else log
        frames = [frame.tobytes() for frame, *_ in log.save(logs, suffix).rows]
        for i, (_, action, reward, terminal, _) in enumerate(log.rows):
            if i >= 3 and not any(row[3] for row in log.rows[i - 3 : i]) and (terminal or i + 1 < len(frames)):
                expected[*frames[i - 3 : i + 1], action, reward, None if terminal else (*frames[i - 2 : i + 2],)] += 1
    assert transitions_of_segments(run(logs, tmp_path / "out")) == expected


@pytest.mark.parametrize("episode_end", [True, False])
def test_episodes_that_were_cut(tmp_path, logs, episode_end):
    """With `episode_end` they are truncated. The six files alone say that they terminated."""
    log = Published().padding().play(9).padding().play(4, terminal=0).cut().padding().play(3).padding().cut().padding()
    log.step(frame=BLACK, action=0).step(frame=BLACK, action=0).cut().padding().play(11).save(logs, 0, episode_end)
    later = Published(1).padding().play(3).save(logs, 1, episode_end)
    [steps] = chains(run(logs, tmp_path / "out"))[0]
    expected = log.steps + later.steps
    if not episode_end:
        expected = [(*step[:3], step[3] or step[4], False) for step in expected]
    assert steps == expected and sum(step[4] for step in steps) == 3 * episode_end


def test_a_cut_needs_no_row_after_it(tmp_path, logs):
    log = Published().padding().play(9, terminal=0).step(1, CUT).play(5).save(logs, 0, seven=True)
    assert chains(run(logs, tmp_path / "out")) == {0: [log.steps]}


@pytest.mark.parametrize("seven", [False, True])
def test_episodes_without_padding(tmp_path, logs, seven):
    """Readers of the six files never start at the first three rows of such an episode, so they become a hole."""
    log = Published().padding().play(9)
    steps = log.steps.copy()
    del log.steps[:]
    for _ in range(3):
        log.step(end=NO_STEP)
    log.play(20).padding().play(5).save(logs, 0, seven)
    assert chains(run(logs, tmp_path / "out")) == {0: [steps], 10: [log.steps]}


def test_metadata_is_kept(tmp_path, logs):
    Published().padding().play(9).save(logs, 0)
    metadata = {"env_id": "my_module:Mine-v0", "num_actions": 9, "ale_py": "0.1", "rom_md5": "ab", "args": {"seed": 3}}
    (logs.parent / "metadata.json").write_text(json.dumps(metadata | {"episodes": [1], "format": "x"}))
    out = run(logs.parent, tmp_path / "new" / "out")
    expected = metadata | {"num_envs": 1, "source": str(logs)}
    assert json.loads((out / "metadata.json").read_text()) == expected


@pytest.mark.parametrize("game, num_actions", [("MsPacman", 9), ("Seaquest", 18), ("NoSuchGame", None)])
def test_the_number_of_actions_is_the_game_s_and_not_the_highest_seen(tmp_path, game, num_actions):
    logs = tmp_path / game / "1" / "replay_logs"
    logs.mkdir(parents=True)
    Published().padding().play(9).save(logs, 0)  # actions 0 to 3
    run(logs, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["num_actions"] == num_actions


def test_training_takes_data_of_an_unknown_number_of_actions(tmp_path, logs):
    Published().padding().play(9).save(logs, 0)
    (logs.parent / "metadata.json").write_text(json.dumps({"env_id": "Pong-v4", "num_actions": None}))
    run(logs, tmp_path / "out")
    args = cql_softmoe.Args(env_id="PongNoFrameskip-v4", dataset_dir=str(tmp_path / "out"))
    highest = max(np.load(path)["action"].max() for path in (tmp_path / "out").glob("*.npz"))
    for num_actions in (highest + 1, highest):  # those seen are a lower bound
        envs = SimpleNamespace(frame_shape=SIZE, num_actions=num_actions)
        if num_actions > highest:
            assert cql_softmoe.open_dataset(args, envs)[1] == 1
            shutil.rmtree(tmp_path / "replay_cache")
        else:
            with pytest.raises(ValueError, match="action has values"):
                cql_softmoe.open_dataset(args, envs)


# --------------------------------------------------------------------------------------------- the segments' layout
METADATA = {
    "env_id": "PongNoFrameskip-v4",
    "num_actions": 4,
    "num_envs": 3,
    "ale_py": "0.1",
    "rom_md5": "ab",
    "args": {},
}


def segments(folder: Path, seed=0, num_envs=3, rows=(10, 10, 4, 9), holes=(), ends=0.15) -> list[dict]:
    """Write random segments and return them. Rows are missing after the segments whose numbers are in `holes`."""
    rng, first, written = np.random.default_rng(seed), 0, []
    folder.mkdir(parents=True)
    for k, count in enumerate(rows):
        shape = (num_envs, count)
        end = rng.random(shape)
        arrays = {"frames": rng.integers(1, 255, (*shape, *SIZE), dtype=np.uint8), "action": rng.integers(0, 4, shape)}
        arrays |= {"reward": rng.integers(-1, 2, shape).astype(np.float32), "terminated": end < ends}
        written.append(arrays | {"truncated": end > 1 - ends})
        np.savez_compressed(folder / f"{first:012d}.npz", **written[-1])
        first += num_envs * (count + 30 * (k in holes))
    (folder / "metadata.json").write_text(json.dumps(METADATA | {"num_envs": num_envs}))
    return written


def load_shards(folder: Path) -> list[dict[str, np.ndarray]]:
    """Check what the layout says, and return the shards without their invalid last row."""
    shards = []
    for suffix in range(len([*folder.glob("add_count*")])):
        shard = {}
        for name in ("observation", "action", "reward", "terminal", "episode_end", "add_count", "invalid_range"):
            prefix = "" if name in ("add_count", "invalid_range") else "$store$_"
            with gzip.open(folder / f"{prefix}{name}_ckpt.{suffix}.gz") as file:
                shard[name] = np.load(file, allow_pickle=False)
        n = int(shard.pop("add_count"))
        assert shard.pop("invalid_range").tolist() == [n - 1, n, 0, 1, 2]
        assert {x.shape[0] for x in shard.values()} == {n + 1} and not shard["observation"][n].any()
        assert {name: x.dtype.name for name, x in shard.items()} == convert.PUBLISHED
        shards.append({name: x[:n] for name, x in shard.items()})
    assert len([*folder.iterdir()]) == 7 * len(shards)
    return shards


def transitions_of_shards(shards) -> Counter:
    """Count the transitions that a reader finds in shards who knows `episode_end`."""
    found = Counter()
    for shard in shards:
        frames = [frame.tobytes() for frame in shard["observation"]]
        for i, end in enumerate(shard["episode_end"]):
            if end != NO_STEP:
                after = None if end == TERMINATED else tuple(frames[i - 2 : i + 2])
                found[*frames[i - 3 : i + 1], int(shard["action"][i]), float(shard["reward"][i]), after] += 1
    return found


@pytest.mark.parametrize(
    "num_envs, holes, ends", [(3, (), 0.15), (1, (), 0.15), (2, (0, 2), 0.1), (4, (1,), 0), (3, (), 0.5)]
)
def test_segments_to_published(tmp_path, num_envs, holes, ends):
    segments(tmp_path / "run" / "replay", 1, num_envs, rows=(20, 9, 31, 1, 22, 1), holes=holes, ends=ends)
    out = run(tmp_path / "run", tmp_path / "out")
    shards = load_shards(out / "replay_logs")
    assert transitions_of_shards(shards) == transitions_of_segments(tmp_path / "run" / "replay")
    assert len(shards) > 1
    unpadded = 0
    for shard in shards:
        n, terminal, end, frames = len(shard["action"]), shard["terminal"], shard["episode_end"], shard["observation"]
        # Dopamine's rule: row i of 3 and more is a start if no row of i-3..i-1 is terminal.
        starts = [i for i in range(3, n) if not terminal[i - 3 : i].any()]
        assert starts == np.flatnonzero(end != NO_STEP).tolist()
        assert terminal[np.isin(end, [TERMINATED, CUT])].all() and not terminal[end == STEP].any()
        opens = [i for i in starts if i == 3 or end[i - 1] == NO_STEP]
        unpadded += sum(frames[i - 3 : i].any() for i in opens)
        assert opens[0] == 3
        assert n + 1 <= 60 or len(opens) == 1
    assert bool(holes) <= unpadded <= num_envs * len(holes)
    expected = METADATA | {"num_envs": num_envs, "source": str(tmp_path / "run" / "replay")}
    assert json.loads((out / "metadata.json").read_text()) == expected


@pytest.mark.parametrize("holes", [(), (0, 2)])
def test_segments_to_published_and_back(tmp_path, holes):
    """All transitions come back, except those at a cut, because the frame after it is lost again."""
    segments(tmp_path / "a", rows=(20, 30, 4, 19), holes=holes, ends=0.1)
    before = transitions_of_segments(tmp_path / "a")
    logs = run(tmp_path / "a", tmp_path / "b") / "replay_logs"
    shards = load_shards(logs)
    cut = sum((shard["episode_end"] == CUT).sum() for shard in shards)
    after = transitions_of_segments(run(logs, tmp_path / "c"))
    assert cut > 3 and after <= before and after.total() == before.total() - cut
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["num_envs"] == 1  # segments have one lane
    again = load_shards(run(tmp_path / "c", tmp_path / "d") / "replay_logs")
    assert transitions_of_shards(again) == after


def test_published_to_segments_and_back(tmp_path, logs):
    """Episodes that terminated come back to the byte."""
    log = Published().padding().play(9).padding().play(4).padding().play(30).save(logs, 0, seven=True)
    (shard,) = load_shards(run(run(logs, tmp_path / "a"), tmp_path / "b") / "replay_logs")
    for name, column in zip(convert.PUBLISHED, zip(*log.rows, strict=True), strict=True):
        np.testing.assert_array_equal(shard[name], column)


def test_a_single_episode_may_be_longer_than_a_shard(tmp_path):
    segments(tmp_path / "a", rows=(50, 50), ends=0)
    shards = load_shards(run(tmp_path / "a", tmp_path / "b") / "replay_logs")
    assert [len(shard["action"]) for shard in shards] == [103] * 3
    assert transitions_of_shards(shards) == transitions_of_segments(tmp_path / "a")


# --------------------------------------------------------------------------------------------------- damaged data
@pytest.fixture
def refused(tmp_path):
    """Return a function that checks that a source is refused with these words and that nothing is left behind."""

    def call(source, *words):
        with pytest.raises(Exception) as caught:
            run(source, tmp_path / "refused" / "out")
        message = f"{type(caught.value).__name__}: {caught.value}"
        assert [word for word in words if word not in message] == [] and "unpickled" not in message, message
        assert not list((tmp_path / "refused").glob("*"))

    return call


WRONG = {
    "type": ({"reward": np.zeros(20)}, ["reward", "float64", "float32"]),
    "type of action": ({"action": np.zeros(20, np.int64)}, ["action", "int64", "int32"]),
    "length": ({"action": np.zeros(19, np.int32)}, ["action", "19", "20"]),
    "length of frames": ({"observation": np.zeros((19, *SIZE), np.uint8)}, ["action", "19", "20"]),
    "dimensions": ({"observation": np.zeros((20, *SIZE, 1), np.uint8)}, ["observation"]),
    "order": ({"observation": np.asfortranarray(np.ones((20, *SIZE), np.uint8))}, ["observation", "True"]),
    "action": ({"action": np.full(20, -1, np.int32)}, ["actions", "-1"]),
    "reward": ({"reward": np.full(20, 2, np.float32)}, ["reward"]),
    "no number": ({"reward": np.full(20, np.nan, np.float32)}, ["reward"]),
    "count": ({"add_count": np.array([1, 2])}, ["add_count", "(2,)"]),
    "negative count": ({"add_count": np.array(-1)}, ["add_count"]),
    "no rows": ({"add_count": np.array(0)}, ["no complete shard"]),
    "no steps": ({"add_count": np.array(3)}, ["no step"]),
    "missing file": ({"reward": None}, ["no complete shard"]),
    "end": ({"episode_end": np.full(20, 4, np.uint8)}, ["episode_end", "value 4"]),
}


@pytest.mark.parametrize("changes, words", WRONG.values(), ids=WRONG)
def test_wrong_arrays(refused, logs, changes, words):
    Published().padding().play(16).save(logs, 0, **changes)
    refused(logs, *words)


@pytest.mark.parametrize("name", ["action", "add_count", "observation"])
def test_pickles_are_refused(refused, logs, name):
    Published().padding().play(16).save(logs, 0)
    save(logs, name, 0, np.array([Exploit()] * 20, object), allow_pickle=True)
    refused(logs, f"{name}_ckpt.0.gz")


def test_shards_that_do_not_belong_together(refused, tmp_path, logs):
    Published().padding().play(16).save(logs, 0)
    Published().padding().play(16).save(logs, 1, observation=np.ones((20, 5, 5), np.uint8))
    refused(logs, "several sizes")
    Published().padding().play(16).save(logs, 1)
    (logs.parent / "metadata.json").write_text(json.dumps({"env_id": "Pong-v4", "num_actions": 2}))
    refused(logs, "actions 0 to 3")
    (logs.parent / "metadata.json").write_text("{")
    refused(logs, "metadata.json")
    shutil.copytree(logs, tmp_path / "data" / "Pong" / "2" / "replay_logs")
    refused(tmp_path / "data", "2 logs", "Pong/1/replay_logs", "Pong/2/replay_logs")
    refused(tmp_path / "nowhere", "0 logs")


@pytest.mark.parametrize("suffix, word", [("00", "twice"), (10**11, "too large"), (10**40, "too large")])
def test_wrong_suffixes(refused, logs, suffix, word):
    Published().padding().play(16).save(logs, 0)
    Published().padding().play(16).save(logs, suffix)
    refused(logs, word, str(int(suffix)))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def socket_file(path: Path) -> None:
    with contextlib.chdir(path.parent):  # a long path is no address
        socket.socket(socket.AF_UNIX).bind(path.name)


@pytest.mark.parametrize("make", [pipe, socket_file])
@pytest.mark.parametrize("name", ["$store$_reward_ckpt.0.gz", "add_count_ckpt.0.gz", "000000000030.npz"])
def test_what_is_no_file_is_refused_and_not_waited_for(refused, tmp_path, logs, name, make):
    if name.endswith("npz"):
        segments(tmp_path / "a")
        path = tmp_path / "a" / name
    else:
        Published().padding().play(16).save(logs, 0)
        path = logs / name
    path.unlink()
    make(path)
    with deadline(20):
        refused(path.parent, str(path), "not a file")


@contextlib.contextmanager
def deadline(seconds: int):
    """Raise TimeoutError in code that takes longer."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


SEGMENT_WRONG = {
    "missing": (lambda x: {n: x[n] for n in x if n != "reward"}, ["reward"]),
    "pickle": (lambda x: x | {"action": np.array([Exploit()], object)}, ["allow_pickle"]),
    "environments": (lambda x: {n: y[:2] for n, y in x.items()}, ["frames is", "(2, 10"]),
    "frames": (lambda x: x | {"frames": x["frames"][..., :1]}, ["frames is", "3, 2)"]),
}


@pytest.mark.parametrize("change, words", SEGMENT_WRONG.values(), ids=SEGMENT_WRONG)
def test_wrong_segments(refused, tmp_path, change, words):
    arrays = segments(tmp_path / "a")[1]
    np.savez_compressed(tmp_path / "a" / "000000000030.npz", **change(arrays))
    refused(tmp_path / "a", "000000000030.npz", *words)


def test_a_segment_with_more_than_its_header_says(refused, tmp_path):
    segments(tmp_path / "a", rows=(10,))
    path = tmp_path / "a" / "000000000000.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b"(3, 10, 3, 2)", b"(3, 10, 3, 1)"))
    refused(tmp_path / "a", "000000000000.npz", "frames is longer")


def test_segments_that_do_not_belong_together(refused, tmp_path):
    segments(tmp_path / "a")
    path = tmp_path / "a" / "000000000030.npz"
    path.rename(tmp_path / "a" / "000000000029.npz")
    refused(tmp_path / "a", "000000000029.npz", "30")
    (tmp_path / "a" / "000000000029.npz").rename(tmp_path / "a" / "mine.npz")
    refused(tmp_path / "a", "mine")
    (tmp_path / "a" / "metadata.json").unlink()
    refused(tmp_path / "a", "metadata.json")
    segments(tmp_path / "b", rows=(1,), ends=0)  # rows that nothing follows
    refused(tmp_path / "b", "no transition")


def damaged(content: bytes):
    """Yield the content cut at every tenth of its length, and with one byte flipped: the first 40 and some others."""
    for length in range(0, len(content), max(1, len(content) // 10)):
        yield content[:length]
    for i in [*range(40), *range(40, len(content), max(1, len(content) // 30))]:
        yield content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :]


@pytest.mark.parametrize("name", [*convert.PUBLISHED, "add_count", "segment"])
def test_what_is_damaged_is_refused_unless_it_is_not_needed(tmp_path, logs, name):
    if name == "segment":
        segments(tmp_path / "a", rows=(9, 30))
        path = tmp_path / "a" / "000000000027.npz"
    else:
        Published().padding().play(31).padding().cut().padding().play(9).save(logs, 0, seven=True)
        (path,) = logs.glob(f"*{name}_ckpt.0.gz")
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 0))  # any byte may change unnoticed
    content, good = path.read_bytes(), files(run(path.parent, tmp_path / "good"))
    refusals = passes = 0
    for k, wrong in enumerate(damaged(content)):
        path.write_bytes(wrong)
        out = tmp_path / "out" / str(k)
        try:
            run(path.parent, out)
        except ValueError as error:
            refusals += 1
            assert path.name in str(error) and not list((tmp_path / "out").glob(f"{k}*"))
        else:  # gzip's time stamp and the like
            passes += 1
            assert files(out) == good
    assert refusals > passes


# -------------------------------------------------------------------------------------- memory, disk, command line
@pytest.mark.parametrize("way", ["published", "segments"])
def test_memory(tmp_path, logs, monkeypatch, way):
    """The frames take 42 MB, and the pieces 3.5 MB."""
    monkeypatch.setattr(convert, "SEGMENT_ROWS", 500)
    monkeypatch.setattr(convert, "CHUNK_ROWS", 200)
    monkeypatch.setattr(convert, "SHARD_ROWS", 1_000_000)
    frames = np.repeat((np.arange(6_000) % 255 + 1).astype(np.uint8), 84 * 84).reshape(-1, 84, 84)
    n = len(frames)
    if way == "published":
        terminal, columns = np.zeros(n, np.uint8), {"action": np.ones(n, np.int32), "reward": np.zeros(n, np.float32)}
        for name, array in (columns | {"observation": frames, "terminal": terminal, "add_count": np.array(n)}).items():
            with gzip.open(logs / f"$store$_{name}_ckpt.0.gz", "wb", 1) as file:
                np.save(file, array)
    else:
        (logs / "metadata.json").write_text(json.dumps(METADATA))
        columns = {"action": np.ones((1, 500), int), "reward": np.zeros((1, 500), np.float32)}
        columns |= {name: np.zeros((1, 500), bool) for name in ("terminated", "truncated")}
        for first in range(0, n, 500):
            np.savez_compressed(logs / f"{first:012d}.npz", frames=frames[None, first : first + 500], **columns)
    del frames
    tracemalloc.start()
    run(logs, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_command_line(tmp_path, logs):
    """Links lead to the data, and to the empty folder that is filled. A folder that is full is left alone."""
    segments(tmp_path / "elsewhere" / "replay")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "empty")
    done = fork_script(SCRIPT, tmp_path / "link", tmp_path / "target")
    assert done.returncode == 0 and "GB free" in done.stdout and "error" not in done.stderr
    assert (tmp_path / "target").is_symlink() and (tmp_path / "empty" / "replay_logs").is_dir()
    before = files(tmp_path / "empty")
    (shard,) = load_shards(tmp_path / "empty" / "replay_logs")
    assert transitions_of_shards([shard]) == transitions_of_segments(tmp_path / "elsewhere" / "replay")
    for source, target, word in (
        ("link", "target", "exists"),
        ("empty/replay_logs", "link/replay/metadata.json", "ex"),
    ):
        done = fork_script(SCRIPT, tmp_path / source, tmp_path / target)
        assert done.returncode == 2 and word in done.stderr and done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
    path = tmp_path / "elsewhere" / "replay" / "000000000030.npz"
    path.write_bytes(path.read_bytes()[:-9])
    done = fork_script(SCRIPT, tmp_path / "link", tmp_path / "none")
    assert done.returncode == 2 and "is damaged" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and done.stderr.count("error") == 1
    assert files(tmp_path / "empty") == before
    assert {path.name for path in tmp_path.iterdir()} == {"data", "elsewhere", "link", "empty", "target"}
    done = fork_script(SCRIPT, "--help")
    assert done.returncode == 0 and "episode_end" in done.stdout
    assert fork_script(SCRIPT, "one").returncode == 2


def test_a_game_is_named_by_the_folder_that_a_link_is_in(tmp_path, logs):
    Published().padding().play(9).save(logs, 0)
    (tmp_path / "Breakout").mkdir()
    (tmp_path / "Breakout" / "1").symlink_to(logs.parent)
    (tmp_path / "mine").symlink_to(logs)
    for source, env_id in (("Breakout", "BreakoutNoFrameskip-v4"), ("mine", "PongNoFrameskip-v4")):
        metadata = json.loads((run(tmp_path / source, tmp_path / f"{source}_out") / "metadata.json").read_text())
        assert metadata["env_id"] == env_id


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_half_done(tmp_path, number):
    rng = np.random.default_rng(0)
    arrays = segments(tmp_path / "a" / "replay", rows=(1,), num_envs=1)[0]
    arrays = {name: np.repeat(x, 1_000, axis=1) for name, x in arrays.items()}
    arrays["frames"] = rng.integers(0, 255, (1, 1_000, 84, 84), dtype=np.uint8)
    for first in range(0, 5_000, 1_000):
        np.savez(tmp_path / "a" / "replay" / f"{first:012d}.npz", **arrays)
    command, pipe = [sys.executable, SCRIPT, tmp_path / "a", tmp_path / "b"], {"stderr": subprocess.PIPE, "text": True}
    old = signal.signal(number, signal.SIG_DFL)  # a job in the background inherits that SIGINT is ignored
    run = subprocess.Popen(command, **pipe)
    signal.signal(number, old)
    wait_for(lambda: list(tmp_path.glob("b.*.tmp/replay_logs")), "a folder that is being filled")
    run.send_signal(number)
    error = run.communicate()[1]
    assert run.returncode == 2 and error.splitlines()[-1] == "error: KeyboardInterrupt: stopped by a signal"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_is_full(refused, tmp_path, logs, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    Published().padding().play(9).save(logs, 0)
    monkeypatch.setattr(np, "savez_compressed", full)
    refused(logs, "OSError: [Errno 28] No space left on device")
    usage = shutil.disk_usage(logs)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    refused(logs, "0.00 GB are free")
