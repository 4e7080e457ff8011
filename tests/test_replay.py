"""`ReplayBuffer` against a slow oracle that keeps every row ever written in plain lists.

Every frame has content of its own, so that a mixed-up row, environment or channel shows.
"""

import io
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dqn_softmoe
from dqn_softmoe import STACK_SIZE, ReplayBuffer

FRAME_SHAPE = (2, 3)
GAMMA = 0.9


class Row(NamedTuple):
    """What `ReplayBuffer.add` takes, arrays over environments; or one environment's part of it."""

    frame: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class Oracle:
    """Every row ever written, a list per environment; everything is worked out again at each call."""

    def __init__(self, num_envs: int, n_step: int):
        self.lanes, self.n_step = [[] for _ in range(num_envs)], n_step

    def add(self, row: Row):
        for lane, *values in zip(self.lanes, *row, strict=True):
            lane.append(Row(*(np.array(value) for value in values)))

    def cut(self):
        for lane in self.lanes:
            if lane and not lane[-1].terminated:
                lane[-1] = lane[-1]._replace(truncated=np.array(True))

    def obs(self, lane: list[Row], t: int) -> np.ndarray:
        frames = [lane[t].frame]
        while len(frames) < STACK_SIZE and t > 0 and not lane[t - 1].terminated and not lane[t - 1].truncated:
            t -= 1
            frames.insert(0, lane[t].frame)
        return np.stack([np.zeros_like(frames[0])] * (STACK_SIZE - len(frames)) + frames)

    def transition(self, env: int, t: int) -> tuple:
        """obs, action, return, discount and next_obs (black where terminated) of the window that starts at row t."""
        lane, total, k = self.lanes[env], 0.0, 0
        obs, action = self.obs(lane, t), lane[t].action
        while k < self.n_step and not lane[t + k].truncated:
            total, k = total + GAMMA**k * lane[t + k].reward, k + 1
            if lane[t + k - 1].terminated:
                return obs, action, total, 0.0, np.zeros_like(obs)
        return obs, action, total, GAMMA**k, self.obs(lane, t + k)

    def drawable(self, rows: int) -> dict[int, tuple[int, int]]:
        """Place in a ring of so many rows -> (environment, row) of every transition that can be drawn."""
        newest, found = len(self.lanes[0]) - 1, {}
        for env, lane in enumerate(self.lanes):
            for t, row in enumerate(lane):
                window_is_there, stack_is_there = t + self.n_step <= newest, t - (STACK_SIZE - 1) > newest - rows
                if window_is_there and stack_is_there and not row.truncated:
                    found[t % rows * len(self.lanes) + env] = env, t
        return dict(sorted(found.items()))


def rows_of(rng: np.random.Generator, terminated: np.ndarray, truncated: np.ndarray, shape: tuple = FRAME_SHAPE):
    """Rows of random content with these ends (length, N)."""
    for ends in zip(terminated, truncated, strict=True):
        N = len(ends[0])
        frame, action = rng.integers(1, 256, (N, *shape), dtype=np.uint8), rng.integers(0, 3, N)
        yield Row(frame, action, rng.integers(-8, 9, N) / 8, *ends)


def random_rows(rng: np.random.Generator, length: int, num_envs: int, shape: tuple = FRAME_SHAPE):
    """Each environment has its own chances of a step that terminates or truncates, and changes them now and then."""
    styles = np.array([(0, 0), (0.05, 0.05), (0.4, 0.05), (0, 0.4), (0.3, 0.3), (0.6, 0.4), (1, 0), (0.1, 0)])
    style = styles[rng.integers(len(styles), size=(length, num_envs))]
    changes = np.maximum.accumulate(np.where(rng.random((length, 1)) < 0.04, np.arange(length)[:, None], 0), axis=0)
    style, draw = np.take_along_axis(style, changes[..., None], axis=0), rng.random((length, num_envs))
    terminated = draw < style[..., 0]
    return rows_of(rng, terminated, ~terminated & (draw < style.sum(-1)), shape)


def plain_rows(length: int, num_envs: int, seed: int = 0):
    return rows_of(np.random.default_rng(seed), *np.zeros((2, length, num_envs), bool))


def check_batch(batch, oracle: Oracle, at: dict[int, tuple[int, int]]):
    """Every part of every drawn transition; `at` says which (environment, row) lies at a place."""
    size = len(batch.index)
    obs, action, reward, discount, next_obs = (
        np.array(column)
        for column in zip(*(oracle.transition(*at[place]) for place in batch.index.tolist()), strict=True)
    )
    kinds = torch.uint8, torch.int64, torch.float32, torch.float32, torch.uint8, torch.int64
    assert tuple(x.dtype for x in batch[:6]) == kinds
    assert batch.obs.shape == batch.next_obs.shape == (size, *obs.shape[1:])
    np.testing.assert_array_equal(batch.obs.cpu(), obs)
    np.testing.assert_array_equal(batch.action.cpu(), action)
    np.testing.assert_allclose(batch.reward.cpu(), reward, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(batch.discount.cpu(), discount, rtol=1e-6, atol=0)  # 0 is exact
    np.testing.assert_array_equal(batch.next_obs.cpu()[discount > 0], next_obs[discount > 0])


def check(replay: ReplayBuffer, oracle: Oracle):
    """Which places can be drawn, and all that is drawn there."""
    at = oracle.drawable(replay.rows)
    assert replay.weight.flatten().nonzero().flatten().tolist() == list(at)
    if at:
        check_batch(replay.gather(torch.tensor(list(at), device=replay.weight.device)), oracle, at)
        check_batch(replay.sample(8), oracle, at)


def make(rows: int, num_envs: int, n_step: int, spare: int = 0) -> ReplayBuffer:
    return ReplayBuffer(rows * num_envs + spare, num_envs, FRAME_SHAPE, n_step=n_step, gamma=GAMMA)


def both(replay: ReplayBuffer, rows) -> Oracle:
    """An oracle that has seen the same rows as the ring."""
    oracle = Oracle(replay.num_envs, len(replay.steps))
    for row in rows:
        replay.add(*row)
        oracle.add(row)
    return oracle


def run_stream(seed: int, rows: int, num_envs: int, n_step: int, device: str = "cpu"):
    """Several turns of the ring with cuts in between, from arrays that are written over as environments may do."""
    rng = np.random.default_rng(seed)
    replay = make(rows, num_envs, n_step, spare=int(rng.integers(num_envs))).to(device)
    oracle, kept, before = Oracle(num_envs, n_step), None, None
    for t, row in enumerate(random_rows(rng, 4 * rows + 3, num_envs)):
        oracle.add(row)
        replay.add(*row)
        for array in row:
            array[...] = 1
        if rng.random() < 0.06:
            oracle.cut()
            replay.cut()
        assert replay.weight.flatten().nonzero().flatten().tolist() == list(oracle.drawable(replay.rows))
        assert torch.equal(replay.block_sums, replay.weight.sum(dim=1)) and replay.weight.max() <= 1
        if t % 7 == 0 or t in (rows - 1, rows, rows + 1):
            check(replay, oracle)
        if t == 2 * rows and replay.weight.any():
            kept = replay.sample(16)
            before = [x.clone() for x in kept]
    check(replay, oracle)
    assert kept is None or all(map(torch.equal, kept, before))  # a batch outlives later rows


@pytest.mark.parametrize("n_step", [1, 3, 10])
@pytest.mark.parametrize("num_envs", [1, 2, 3, 4])
def test_random_streams(num_envs: int, n_step: int, monkeypatch):
    smallest = STACK_SIZE + n_step + 1
    for rows, block_size in ((smallest, 4), (smallest + 1, 1024), (2 * smallest + 3, 5)):
        monkeypatch.setattr(dqn_softmoe, "BLOCK_SIZE", block_size)
        for seed in range(3):
            run_stream(100 * rows + seed, rows, num_envs, n_step)


@pytest.mark.cuda
@pytest.mark.parametrize("n_step", [1, 3])
def test_random_streams_on_the_gpu(n_step: int):
    run_stream(n_step, 4 + n_step + 2, 3, n_step, device="cuda")


@pytest.mark.parametrize("n_step", [1, 3, 5])
def test_every_pattern_of_ends(n_step: int):
    """One environment for each of the 3^6 patterns of six steps, repeated until the ring has turned over."""
    patterns = np.array(list(itertools.product(("on", "terminated", "truncated"), repeat=6))).T  # (6, 729)
    events = np.tile(patterns, (4, 1))
    replay, oracle = make(10, 729, n_step), Oracle(729, n_step)
    for t, row in enumerate(rows_of(np.random.default_rng(0), events == "terminated", events == "truncated")):
        replay.add(*row)
        oracle.add(row)
        if t in (n_step, 9, 12, 23):
            check(replay, oracle)


def test_a_short_story():
    """What the contract means, in numbers: three steps to the end of an episode, two of the next, a cut, two more."""
    replay = ReplayBuffer(100, 1, (1, 1), n_step=2, gamma=0.5)
    for t, (reward, over) in enumerate([(1, 0), (2, 0), (4, 1), (8, 0), (16, 0), (32, 0), (64, 0)]):
        replay.add(np.full((1, 1, 1), 10 + t), [t], [reward], [over], [False])
        if t == 4:
            replay.cut()
    assert replay.weight.nonzero()[:, 1].tolist() == [0, 1, 2, 3]  # 4 was cut, the windows of 5 and 6 are not over
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


def test_kinds_of_arrays_make_no_difference():
    def other(row: Row) -> Row:  # as an emulator may give them
        flags = (flag.astype(np.uint8) for flag in row[3:])
        return Row(row.frame, row.action.astype(np.int32), row.reward.astype(np.float32), *flags)

    replays = [make(13, 3, 3) for _ in range(4)]
    for row in random_rows(np.random.default_rng(5), 40, 3):
        replays[0].add(*row)
        replays[1].add(*other(row))
        replays[2].add(*map(torch.tensor, row))
        replays[3].add(*map(torch.tensor, other(row)))
    for replay in replays[1:]:
        assert all(map(torch.equal, replay.buffers(), replays[0].buffers()))


# ----------------------------------------------------------------------------------------------------- uniform draws


def draw_with(replay: ReplayBuffer, values):
    """A batch for which `torch.rand` gives these values, and must be asked for float64: float32 has too few of them."""

    def rand(size, *, dtype, device):
        assert (size, dtype) == (len(values), torch.float64)
        return torch.as_tensor(values, dtype=dtype, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        return replay.sample(len(values))


def is_likely(counts: np.ndarray, expected) -> bool:
    """Whether chance makes such counts, in all but one of 10^4 cases: chi-square, after Wilson and Hilferty."""
    chi_square, spread = ((counts - expected) ** 2 / expected).sum(), 2 / (9 * (len(counts) - 1))
    return (chi_square / (len(counts) - 1)) ** (1 / 3) < 1 - spread + 3.72 * spread**0.5


@pytest.mark.parametrize("block_size", [1, 5, 1024])
def test_every_drawable_place_has_exactly_the_same_share(block_size: int, monkeypatch):
    """Of K places the k-th is drawn for all numbers from k/K to (k+1)/K, however unevenly they lie in the ring."""
    monkeypatch.setattr(dqn_softmoe, "BLOCK_SIZE", block_size)
    for seed in range(8):
        replay = make(24, 3, 3)
        oracle = both(replay, random_rows(np.random.default_rng(seed), 20 + 9 * seed, 3))
        places, k = list(oracle.drawable(24)), np.arange(len(oracle.drawable(24)))
        for offset in (1e-9, 0.5, 1 - 1e-9):
            assert draw_with(replay, (k + offset) / len(places)).index.tolist() == places
        assert draw_with(replay, [0.0, 1 - 2**-53]).index.tolist() == [places[0], places[-1]]


def test_draws_are_uniform_and_independent(monkeypatch):
    monkeypatch.setattr(dqn_softmoe, "BLOCK_SIZE", 5)
    replay = make(24, 3, 3)
    places = list(both(replay, random_rows(np.random.default_rng(6), 60, 3)).drawable(24))
    torch.manual_seed(0)
    index = np.searchsorted(places, replay.sample(100_000).index.numpy())
    counts = np.bincount(index)
    pairs = np.bincount(index[::2] * len(places) + index[1::2], minlength=len(places) ** 2)
    assert is_likely(counts, counts.mean()) and is_likely(pairs, pairs.mean())


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("moment", [0, 1, 5, 12, 13, 14, 40])
def test_state_dict_round_trip(moment: int):
    """A restored ring goes on as the original, also one that was used before, and neither touches the other."""
    rng = np.random.default_rng(moment)
    replay, fresh, used = (make(13, 3, 3) for _ in range(3))
    oracle = both(replay, random_rows(rng, moment, 3))
    both(used, plain_rows(33, 3, seed=9))
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
    """100 frames of 400 bytes, where the whole ring has 40 MB."""
    replay, file = ReplayBuffer(100_000, 2, (20, 20)), io.BytesIO()
    both(replay, rows_of(np.random.default_rng(0), *np.zeros((2, 50, 2), bool), (20, 20)))
    torch.save(replay.state_dict(), file)
    assert 40_000 <= file.tell() < 3_000_000


# ----------------------------------------------------------------------------------------------------------- fast path


def in_place(replay: ReplayBuffer) -> dict:
    """All that a CUDA graph bakes in: where the tensors lie, and plain numbers."""
    numbers = {name: value for name, value in vars(replay).items() if isinstance(value, int | float)}
    return numbers | {name: buffer.data_ptr() for name, buffer in replay.named_buffers()}


def test_state_changes_only_inside_tensors_that_stay_in_place():
    replay = make(11, 2, 3)
    before = in_place(replay)
    both(replay, random_rows(np.random.default_rng(8), 40, 2))
    replay.cut()
    replay.sample(8)
    replay.load_state_dict(replay.state_dict())
    assert in_place(replay) == before


class Operations(TorchDispatchMode):
    """Names of all operations, in order."""

    def __init__(self, function, *args):
        super().__init__()
        self.names = []
        with self:
            function(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def meta_row(num_envs: int) -> list[torch.Tensor]:
    return [torch.tensor(part).to("meta") for part in next(plain_rows(1, num_envs))]


def test_runs_where_there_are_no_values():
    """On the meta device all raises that looks at a value, or has a shape that depends on one; and there is no loop."""
    operations = []
    for rows, num_envs, batch_size in ((20, 1, 2), (3000, 4, 64)):
        replay = make(rows, num_envs, 10).to("meta")
        calls = (replay.add, *meta_row(num_envs)), (replay.cut,), (replay.sample, batch_size)
        operations.append([Operations(*call).names for call in calls])
    assert operations[0] == operations[1]
