"""Tests of --save-replay: segments on the disk equal what the ring got, also after kills and full disks."""

import gc
import hashlib
import importlib
import io
import json
import os
import signal
from pathlib import Path

import ale_py
import numpy as np
import pytest
import torch
from replay_oracle import Oracle, Row
from runs import Child, Killed, die, only_run, quick, wait_for

import cql_softmoe
import dqn_softmoe


def read_segments(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays (N, rows, ...) of all segments, which must follow each other without a gap."""
    step, parts = 0, []
    for path in sorted(folder.glob("*.npz")):
        assert path.name == f"{step:012d}.npz"
        with np.load(path, allow_pickle=False) as segment:
            parts.append(dict(segment))
        step += parts[-1]["action"].size
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def check_segments(folder: Path, oracle: Oracle):
    """Check that the segments hold the rows of the oracle, and that the folder has no other files."""
    arrays = read_segments(folder)
    lanes = [[np.array(column) for column in zip(*lane, strict=True)] for lane in oracle.lanes]
    for name, *expected in zip(dqn_softmoe.ReplayBuffer.FIELDS, *lanes, strict=True):
        np.testing.assert_array_equal(arrays[name], np.stack(expected))
    kinds = {"frames": "uint8", "action": "int64", "reward": "float32", "terminated": "bool", "truncated": "bool"}
    assert {name: array.dtype for name, array in arrays.items()} == kinds
    assert set(np.unique(arrays["reward"])) == {-1, 0, 1} and arrays["terminated"].any()
    assert {path.suffix for path in folder.iterdir()} == {".npz", ".json"}


@pytest.fixture
def record_rows(monkeypatch):
    """Return a function that returns an oracle of all rows that a script stores. Raw rewards are multiplied by 3."""

    def record(script, num_envs: int) -> Oracle:
        oracle, ring, recv = Oracle(num_envs, 1), script.ReplayBuffer, script.Environments.recv
        add, cut = ring.add, ring.cut
        monkeypatch.setattr(ring, "add", lambda self, *row: (oracle.add(Row(*row)), add(self, *row)))
        monkeypatch.setattr(ring, "cut", lambda self: (oracle.cut(), cut(self)))
        scaled = lambda self: [3 * x if i == 1 else x for i, x in enumerate(recv(self))]  # noqa: E731
        monkeypatch.setattr(script.Environments, "recv", scaled)
        return oracle

    return record


def quick_settings(tmp_path, **overrides) -> dict:
    return quick(runs_dir=str(tmp_path), save_replay=True, eval_episodes=0, learning_starts=500, **overrides)


@pytest.mark.parametrize(
    "script, num_envs, buffer_size, checkpoint_every, segment_steps, first",
    [
        ("dqn_softmoe", 1, 1_000, 0, 130, [0, 130, 260, 390, 520]),
        ("dqn_softmoe", 3, 100, 250, 50_000, [0, 99, 198, 252, 297, 396, 495, 501, 594]),  # the ring limits a segment
        ("rainbow_softmoe", 4, 102, 200, 1_000, [0, 100, 200, 300, 400, 500]),
        ("der_softmoe", 2, 1_000, 300, 50_000, [0, 300]),
    ],
)
def test_segments_equal_what_the_ring_got(
    tmp_path, monkeypatch, record_rows, script, num_envs, buffer_size, checkpoint_every, segment_steps, first
):
    script = importlib.import_module(script)
    monkeypatch.setattr(script, "SEGMENT_STEPS", segment_steps)
    oracle = record_rows(script, num_envs)
    sizes = {"num_envs": num_envs, "buffer_size": buffer_size, "checkpoint_every": checkpoint_every}
    script.main(script.Args(**quick_settings(tmp_path, **sizes)))
    folder = only_run(tmp_path) / "replay"
    check_segments(folder, oracle)
    assert [int(path.stem) for path in sorted(folder.glob("*.npz"))] == first
    assert len(oracle.lanes[0]) == 600 // num_envs and oracle.lanes[0][-1].truncated != oracle.lanes[0][-1].terminated


def test_a_resumed_run_makes_anew_what_came_after_its_checkpoint(tmp_path, monkeypatch, record_rows):
    """The first run also starts a segment at step 380, for a checkpoint that fails. The resumed run has none there."""
    monkeypatch.setattr(dqn_softmoe, "SEGMENT_STEPS", 120)
    oracle, save = record_rows(dqn_softmoe, 1), dqn_softmoe.Agent.save
    args = dqn_softmoe.Args(**quick_settings(tmp_path, checkpoint_every=190, num_envs=1, iteration_steps=500))

    def save_once(agent, path, progress):
        if progress["global_step"] > 190:
            raise OSError(28, "No space left on device")
        save(agent, path, progress)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dqn_softmoe.Agent, "save", save_once)
        patch.setattr(dqn_softmoe.RunLog, "iteration", die)
        dqn_softmoe.main(args)
    folder = only_run(tmp_path) / "replay"
    wait_for((folder / "000000000380.npz").exists, "the segment that the thread still writes")
    del oracle.lanes[0][190:]
    args.resume, args.checkpoint_every = str(folder.parent), 0
    dqn_softmoe.main(args)
    check_segments(folder, oracle)
    assert [int(path.stem) for path in sorted(folder.glob("*.npz"))] == [0, 120, 190, 240, 360, 480]


def test_a_run_killed_while_it_writes_leaves_whole_segments_and_goes_on(tmp_path):
    """The process is killed in the middle of the segment that follows its checkpoint."""
    sizes = {"buffer_size": 400, "checkpoint_every": 1000, "total_timesteps": 1600, "learning_starts": 1600}
    args = dqn_softmoe.Args(**quick_settings(tmp_path) | sizes, resume="auto")

    def run(save=np.savez_compressed):
        def save_half(file, **arrays):
            save(file, **arrays)
            if "000000001000.npz" in file.name:
                file.truncate(500)
                os.kill(os.getpid(), signal.SIGKILL)

        np.savez_compressed = save_half
        dqn_softmoe.main(args)

    assert Child(tmp_path.parent, run).wait()[0] == -signal.SIGKILL
    folder = only_run(tmp_path) / "replay"
    assert [path.stat().st_size for path in folder.glob("*.tmp")] == [500]
    assert (folder.parent / "checkpoint.pt").exists() and read_segments(folder)["action"].size >= 1000
    dqn_softmoe.main(args)
    arrays = read_segments(folder)
    assert arrays["action"].shape == (4, 400) and not list(folder.glob("*.tmp"))
    assert np.flatnonzero(arrays["truncated"].any(axis=0)).tolist() == [249, 399]  # cut by the checkpoints


def test_a_round_that_fails_after_a_segment_does_not_join_two_games(tmp_path, monkeypatch):
    """The checkpoint after the failure cuts the newest row, so no segment may already contain that row."""
    rounds, original = [], dqn_softmoe.RunLog.round
    monkeypatch.setattr(dqn_softmoe, "SEGMENT_STEPS", 100)

    def fails_once(*arguments):
        rounds.append(1)
        if len(rounds) == 51:  # the first round after step 200, with 4 environments
            raise OSError("full")
        original(*arguments)

    monkeypatch.setattr(dqn_softmoe.RunLog, "round", fails_once)
    args = dqn_softmoe.Args(**quick_settings(tmp_path, num_envs=4))
    with pytest.raises(SystemExit, match="2"):
        dqn_softmoe.main(args)
    gc.collect()  # release the lock, which the traceback holds
    run = only_run(tmp_path)
    args.resume = str(run)
    dqn_softmoe.main(args)
    steps = read_segments(run / "replay")
    assert (steps["terminated"] | steps["truncated"])[:, 204 // 4 - 1].all()


def fail_disk(file: io.IOBase, **_):
    file.write(b"PK")
    raise OSError(28, "No space left on device")


def test_a_full_disk_stops_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(np, "savez_compressed", fail_disk)
    with pytest.raises(SystemExit) as stop:
        dqn_softmoe.main(dqn_softmoe.Args(**quick_settings(tmp_path, buffer_size=100)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1 and "No space left on device" in lines[0]
    assert [path.name for path in (only_run(tmp_path) / "replay").iterdir()] == ["metadata.json"]
    assert not (only_run(tmp_path) / "checkpoint.pt").exists()


@pytest.mark.parametrize("lost", [3, 5])  # the second checkpoint writes the fifth segment
def test_nothing_is_missing_after_a_disk_was_full_for_a_while(tmp_path, monkeypatch, record_rows, lost):
    """The run resumes from a checkpoint that was written before the segment was lost."""
    monkeypatch.setattr(dqn_softmoe, "SEGMENT_STEPS", 120)
    oracle, calls, save = record_rows(dqn_softmoe, 4), [], np.savez_compressed
    args = dqn_softmoe.Args(**quick_settings(tmp_path, checkpoint_every=200))

    def full_once(file, **arrays):
        calls.append(1)
        (fail_disk if len(calls) == lost else save)(file, **arrays)

    monkeypatch.setattr(np, "savez_compressed", full_once)
    with pytest.raises(SystemExit):
        dqn_softmoe.main(args)
    gc.collect()  # release the lock of the run that failed
    args.resume = str(only_run(tmp_path))
    for lane in oracle.lanes:
        del lane[50:]
    dqn_softmoe.main(args)
    check_segments(only_run(tmp_path) / "replay", oracle)


@pytest.mark.parametrize("num_envs, n_step", [(1, 1), (3, 3)])
def test_cql_reads_what_the_ring_holds(tmp_path, num_envs, n_step):
    """Every transition has the same place, stacks, return, discount and bootstrap frame."""
    sizes = {"num_envs": num_envs, "n_step": n_step, "checkpoint_every": 200, "learning_starts": 200}
    args = dqn_softmoe.Args(**quick_settings(tmp_path) | sizes)
    dqn_softmoe.main(args)
    run_dir = only_run(tmp_path)
    ring = dqn_softmoe.ReplayBuffer(args.buffer_size, num_envs, (12, 12), n_step=n_step)
    ring.load_state_dict(torch.load(run_dir / "checkpoint.pt", weights_only=True)["replay"])
    offline = cql_softmoe.Args(env_id=args.env_id, dataset_dir=str(run_dir))
    data = cql_softmoe.Dataset(*cql_softmoe.open_dataset(offline, cql_softmoe.Environments(offline, 1)), n_step=n_step)
    places, all_places = ring.weight.nonzero()[:, 0], data.drawable
    assert len(places) > 400 and set(places.tolist()) <= set(all_places.tolist())
    incomplete = all_places[~torch.isin(all_places, places)]  # their n-step windows are incomplete in the ring
    assert incomplete.tolist() == [p for p in range(600 - n_step * num_envs, 600) if not data.truncated[p]]
    for name, one, other in zip(dqn_softmoe.Batch._fields, ring.gather(places), data.gather(places), strict=True):
        assert torch.equal(one, other) or name == "next_obs", name
    bootstraps = ring.gather(places).discount > 0
    assert torch.equal(ring.gather(places).next_obs[bootstraps], data.gather(places).next_obs[bootstraps])


def test_metadata_says_what_was_played(tmp_path):
    args = dqn_softmoe.Args(num_envs=1, buffer_size=1_000)
    dqn_softmoe.ReplayLog(tmp_path / "replay", args, dqn_softmoe.Environments(args, 1), 0)
    metadata = json.loads((tmp_path / "replay" / "metadata.json").read_text())
    rom = Path(ale_py.roms.get_rom_path("breakout")).read_bytes()
    expected = {"env_id": "BreakoutNoFrameskip-v4", "num_actions": 4, "num_envs": 1, "ale_py": ale_py.__version__}
    assert metadata == expected | {"rom_md5": hashlib.md5(rom).hexdigest(), "args": vars(args)}
