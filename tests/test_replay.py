"""Compares `ReplayBuffer` with the slow oracle of helpers/replay_oracle.py, which keeps every row in plain lists."""

import io
import itertools

import numpy as np
import pytest
import torch
from operations import record_operations
from replay_oracle import (
    FRAME_SHAPE,
    GAMMA,
    Oracle,
    Row,
    add_rows,
    are_likely,
    check_batch,
    draw_with,
    graph_constants,
    meta_row,
    random_rows,
    rows_with_ends,
    rows_without_ends,
)

from dqn_softmoe import STACK_SIZE, ReplayBuffer


def check(replay: ReplayBuffer, oracle: Oracle):
    """Check which places can be drawn, and every transition there."""
    at = oracle.drawable(replay.rows)
    assert replay.weight.nonzero().flatten().tolist() == list(at)
    if at:
        check_batch(replay.gather(torch.tensor(list(at), device=replay.weight.device)), oracle, at)
        check_batch(replay.sample(8), oracle, at)


def make_replay(rows: int, num_envs: int, n_step: int, spare: int = 0) -> ReplayBuffer:
    return ReplayBuffer(rows * num_envs + spare, num_envs, FRAME_SHAPE, n_step=n_step, gamma=GAMMA)


def run_stream(seed: int, rows: int, num_envs: int, n_step: int, device: str = "cpu"):
    """Check four turns of the ring with random cuts. Arrays are overwritten after `add`, as environments may do."""
    rng = np.random.default_rng(seed)
    replay = make_replay(rows, num_envs, n_step, spare=int(rng.integers(num_envs))).to(device)
    oracle, batch, copy = Oracle(num_envs, n_step), None, None
    for t, row in enumerate(random_rows(rng, 4 * rows + 3, num_envs)):
        oracle.add(row)
        replay.add(*row)
        for array in row:
            array[...] = 1
        if rng.random() < 0.06:
            oracle.cut()
            replay.cut()
        assert replay.weight.nonzero().flatten().tolist() == list(oracle.drawable(replay.rows))
        assert replay.weight.max() <= 1
        if t % 7 == 0 or t in (rows - 1, rows, rows + 1):
            check(replay, oracle)
        if t == 2 * rows and replay.weight.any():
            batch = replay.sample(16)
            copy = [x.clone() for x in batch]
    check(replay, oracle)
    assert batch is None or all(map(torch.equal, batch, copy))  # later rows do not change a batch


@pytest.mark.parametrize("n_step", [1, 3, 10])
@pytest.mark.parametrize("num_envs", [1, 2, 3, 4])
def test_random_streams(num_envs: int, n_step: int):
    smallest = STACK_SIZE + n_step + 1
    for rows in (smallest, smallest + 1, 2 * smallest + 3):
        for seed in range(3):
            run_stream(100 * rows + seed, rows, num_envs, n_step)


@pytest.mark.cuda
@pytest.mark.parametrize("n_step", [1, 3])
def test_random_streams_on_the_gpu(n_step: int):
    run_stream(n_step, 4 + n_step + 2, 3, n_step, device="cuda")


@pytest.mark.parametrize("n_step", [1, 3, 5])
def test_every_pattern_of_ends(n_step: int):
    """Each of 3^6 environments repeats one pattern of six steps, until the ring has been overwritten."""
    patterns = np.array(list(itertools.product(("on", "terminated", "truncated"), repeat=6))).T  # (6, 729)
    events = np.tile(patterns, (4, 1))
    replay, oracle = make_replay(10, 729, n_step), Oracle(729, n_step)
    for t, row in enumerate(rows_with_ends(np.random.default_rng(0), events == "terminated", events == "truncated")):
        replay.add(*row)
        oracle.add(row)
        if t in (n_step, 9, 12, 23):
            check(replay, oracle)


def test_handmade_transitions():
    """An episode of three steps, two steps of the next one, a cut, and two more steps."""
    replay = ReplayBuffer(100, 1, (1, 1), n_step=2, gamma=0.5)
    for t, (reward, over) in enumerate([(1, 0), (2, 0), (4, 1), (8, 0), (16, 0), (32, 0), (64, 0)]):
        replay.add(np.full((1, 1, 1), 10 + t), [t], [reward], [over], [False])
        if t == 4:
            replay.cut()
    assert replay.weight.nonzero().flatten().tolist() == [0, 1, 2, 3]  # 4 was cut, windows 5 and 6 are incomplete
    batch = replay.gather(torch.arange(4))
    assert batch.obs.flatten(1).tolist() == [[0, 0, 0, 10], [0, 0, 10, 11], [0, 10, 11, 12], [0, 0, 0, 13]]
    assert batch.action.tolist() == [0, 1, 2, 3]
    assert batch.reward.tolist() == [2, 4, 4, 8]  # 1 + 2/2, 2 + 4/2, 4, and 8 up to the cut
    assert batch.discount.tolist() == [0.25, 0, 0, 0.5]
    assert batch.next_obs[[0, 3]].flatten(1).tolist() == [[0, 10, 11, 12], [0, 0, 13, 14]]


@pytest.mark.parametrize("n_step", [1, 10])
def test_too_small_a_ring_is_refused(n_step: int):
    smallest = (STACK_SIZE + n_step + 1) * 2
    ReplayBuffer(smallest, 2, FRAME_SHAPE, n_step=n_step)
    with pytest.raises(ValueError, match=f"{smallest}, not {smallest - 1}"):
        ReplayBuffer(smallest - 1, 2, FRAME_SHAPE, n_step=n_step)


def test_arrays_and_tensors_of_other_dtypes_make_no_difference():
    def convert(row: Row) -> Row:  # to dtypes that an emulator may use
        flags = (flag.astype(np.uint8) for flag in row[3:])
        return Row(row.frame, row.action.astype(np.int32), row.reward.astype(np.float32), *flags)

    replays = [make_replay(13, 3, 3) for _ in range(4)]
    for row in random_rows(np.random.default_rng(5), 40, 3):
        replays[0].add(*row)
        replays[1].add(*convert(row))
        replays[2].add(*map(torch.tensor, row))
        replays[3].add(*map(torch.tensor, convert(row)))
    for replay in replays[1:]:
        assert all(map(torch.equal, replay.buffers(), replays[0].buffers()))


# ----------------------------------------------------------------------------------------------------- uniform draws


def test_every_drawable_place_has_exactly_the_same_share():
    """Of K drawable places the k-th is drawn for random numbers from k/K to (k+1)/K, wherever it is in the ring."""
    for seed in range(8):
        replay = make_replay(24, 3, 3)
        oracle = add_rows(replay, random_rows(np.random.default_rng(seed), 20 + 9 * seed, 3))
        places, k = list(oracle.drawable(24)), np.arange(len(oracle.drawable(24)))
        for offset in (1e-9, 0.5, 1 - 1e-9):
            assert draw_with(replay, (k + offset) / len(places)).index.tolist() == places
        assert draw_with(replay, [0.0, 1 - 2**-53]).index.tolist() == [places[0], places[-1]]


def test_draws_are_uniform_and_independent():
    replay = make_replay(24, 3, 3)
    places = list(add_rows(replay, random_rows(np.random.default_rng(6), 60, 3)).drawable(24))
    torch.manual_seed(0)
    index = np.searchsorted(places, replay.sample(100_000).index.numpy())
    counts = np.bincount(index)
    pairs = np.bincount(index[::2] * len(places) + index[1::2], minlength=len(places) ** 2)
    assert are_likely(counts, counts.mean()) and are_likely(pairs, pairs.mean())


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("moment", [0, 1, 5, 12, 13, 14, 40])
def test_state_dict_round_trip(moment: int):
    """A new and a used replay continue as the original after loading its state. The state itself never changes."""
    rng = np.random.default_rng(moment)
    replay, fresh, used = (make_replay(13, 3, 3) for _ in range(3))
    oracle = add_rows(replay, random_rows(rng, moment, 3))
    add_rows(used, rows_without_ends(33, 3, seed=9))
    state = replay.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    for other in (fresh, used):
        other.load_state_dict(state)
        check(other, oracle)
    for row in random_rows(rng, 30, 3):
        oracle.add(row)
        fresh.add(*row)
        used.add(*row)
        check(used, oracle)
    check(fresh, oracle)
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)


def test_a_saved_state_holds_only_the_frames_that_were_written():
    """100 frames of 400 bytes were written. The whole ring takes 40 MB."""
    replay, file = ReplayBuffer(100_000, 2, (20, 20)), io.BytesIO()
    add_rows(replay, rows_with_ends(np.random.default_rng(0), *np.zeros((2, 50, 2), bool), (20, 20)))
    torch.save(replay.state_dict(), file)
    assert 40_000 <= file.tell() < 3_000_000


# ----------------------------------------------------------------------------------------------------------- fast path


def test_state_changes_only_inside_tensors_that_stay_in_place():
    replay = make_replay(11, 2, 3)
    before = graph_constants(replay)
    add_rows(replay, random_rows(np.random.default_rng(8), 40, 2))
    replay.cut()
    replay.sample(8)
    replay.load_state_dict(replay.state_dict())
    assert graph_constants(replay) == before


def test_operations_do_not_depend_on_values_or_sizes():
    """Meta tensors raise where a value is read. A loop over rows, environments or the batch would add operations."""
    operations = []
    for rows, num_envs, batch_size in ((20, 1, 2), (3000, 4, 64)):
        replay = make_replay(rows, num_envs, 10).to("meta")
        calls = (replay.add, *meta_row(num_envs)), (replay.cut,), (replay.sample, batch_size)
        operations.append([record_operations(*call).names for call in calls])
    assert operations[0] == operations[1]
