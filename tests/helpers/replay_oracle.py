"""A slow oracle of the replay, which keeps every row in plain lists, and generators of rows, draws and checks.

Frames are random, so that a mixed-up row, environment or channel is detected.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from dqn_softmoe import STACK_SIZE, ReplayBuffer

FRAME_SHAPE = (2, 3)
GAMMA = 0.9


class Row(NamedTuple):
    """The arguments of `ReplayBuffer.add`: arrays over environments, or the entries of one environment."""

    frame: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class Oracle:
    """Keeps every row, in one list per environment (`lanes`), and computes each result from these lists."""

    def __init__(self, num_envs: int, n_step: int):
        self.lanes, self.n_step = [[] for _ in range(num_envs)], n_step

    def add(self, row: Row):
        for lane, *values in zip(self.lanes, *row, strict=True):
            lane.append(Row(*(np.asarray(value).copy() for value in values)))

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
        """Return obs, action, return, discount and next_obs (black if terminated) of the n-step window from row t."""
        lane, total, k = self.lanes[env], 0.0, 0
        obs, action = self.obs(lane, t), lane[t].action
        while k < self.n_step and not lane[t + k].truncated:
            total, k = total + GAMMA**k * lane[t + k].reward, k + 1
            if lane[t + k - 1].terminated:
                return obs, action, total, 0.0, np.zeros_like(obs)
        return obs, action, total, GAMMA**k, self.obs(lane, t + k)

    def drawable(self, rows: int) -> dict[int, tuple[int, int]]:
        """Map the place of every drawable transition in a ring of `rows` rows to its (environment, row)."""
        newest, found = len(self.lanes[0]) - 1, {}
        for env, lane in enumerate(self.lanes):
            for t, row in enumerate(lane):
                complete, stored = t + self.n_step <= newest, t - (STACK_SIZE - 1) > newest - rows  # window, stack
                if complete and stored and not row.truncated:
                    found[t % rows * len(self.lanes) + env] = env, t
        return dict(sorted(found.items()))


def rows_with_ends(rng: np.random.Generator, terminated: np.ndarray, truncated: np.ndarray, shape: tuple = FRAME_SHAPE):
    """Yield rows of random content with the given ends, (length, N)."""
    for ends in zip(terminated, truncated, strict=True):
        N = len(ends[0])
        frame, action = rng.integers(1, 256, (N, *shape), dtype=np.uint8), rng.integers(0, 3, N)
        yield Row(frame, action, rng.integers(-8, 9, N) / 8, *ends)


def random_rows(rng: np.random.Generator, length: int, num_envs: int, shape: tuple = FRAME_SHAPE):
    """Yield rows with random ends. Each environment has its own probabilities of ends, redrawn now and then."""
    choices = np.array([(0, 0), (0.05, 0.05), (0.4, 0.05), (0, 0.4), (0.3, 0.3), (0.6, 0.4), (1, 0), (0.1, 0)])
    probs = choices[rng.integers(len(choices), size=(length, num_envs))]
    redrawn = np.maximum.accumulate(np.where(rng.random((length, 1)) < 0.04, np.arange(length)[:, None], 0), axis=0)
    probs, draw = np.take_along_axis(probs, redrawn[..., None], axis=0), rng.random((length, num_envs))
    terminated = draw < probs[..., 0]
    return rows_with_ends(rng, terminated, ~terminated & (draw < probs.sum(-1)), shape)


def rows_without_ends(length: int, num_envs: int, seed: int = 0):
    return rows_with_ends(np.random.default_rng(seed), *np.zeros((2, length, num_envs), bool))


def check_batch(batch, oracle: Oracle, at: dict[int, tuple[int, int]]):
    """Check every field of a batch against the oracle. `at` maps a place to its (environment, row)."""
    size = len(batch.index)
    obs, action, reward, discount, next_obs = (
        np.array(column)
        for column in zip(*(oracle.transition(*at[place]) for place in batch.index.tolist()), strict=True)
    )
    dtypes = torch.uint8, torch.int64, torch.float32, torch.float32, torch.uint8, torch.int64
    assert tuple(x.dtype for x in batch[:6]) == dtypes
    assert batch.obs.shape == batch.next_obs.shape == (size, *obs.shape[1:])
    np.testing.assert_array_equal(batch.obs.cpu(), obs)
    np.testing.assert_array_equal(batch.action.cpu(), action)
    np.testing.assert_allclose(batch.reward.cpu(), reward, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(batch.discount.cpu(), discount, rtol=1e-6, atol=0)  # 0 must be exact
    np.testing.assert_array_equal(batch.next_obs.cpu()[discount > 0], next_obs[discount > 0])


def add_rows(replay: ReplayBuffer, rows) -> Oracle:
    """Add rows to the replay and to a new oracle, and return the oracle."""
    oracle = Oracle(replay.num_envs, len(replay.window_offsets))
    for row in rows:
        replay.add(*row)
        oracle.add(row)
    return oracle


def draw_with(replay: ReplayBuffer, values):
    """Sample a batch while `torch.rand` returns `values`. Float64 is required because float32 is too coarse."""

    def rand(size, *, dtype, device):
        assert (size, dtype) == (len(values), torch.float64)
        return torch.as_tensor(values, dtype=dtype, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        return replay.sample(len(values))


def are_likely(counts: np.ndarray, expected) -> bool:
    """Return whether a chi-square test at level 1e-4 accepts the counts (approximation of Wilson and Hilferty)."""
    chi_square, variance = ((counts - expected) ** 2 / expected).sum(), 2 / (9 * (len(counts) - 1))
    return (chi_square / (len(counts) - 1)) ** (1 / 3) < 1 - variance + 3.72 * variance**0.5


def graph_constants(replay: ReplayBuffer) -> dict:
    """Return what a CUDA graph would bake in: the addresses of the buffers and the Python numbers."""
    numbers = {name: value for name, value in vars(replay).items() if isinstance(value, int | float)}
    return numbers | {name: buffer.data_ptr() for name, buffer in replay.named_buffers()}


def meta_row(num_envs: int) -> list[torch.Tensor]:
    return [torch.tensor(part).to("meta") for part in next(rows_without_ends(1, num_envs))]
