"""A slow oracle of the replay: it keeps every row ever written in plain lists. And rows, draws and checks around it.

Every frame has content of its own, so that a mixed-up row, environment or channel shows.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

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


def both(replay: ReplayBuffer, rows) -> Oracle:
    """An oracle that has seen the same rows as the ring."""
    oracle = Oracle(replay.num_envs, len(replay.window_offsets))
    for row in rows:
        replay.add(*row)
        oracle.add(row)
    return oracle


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


def in_place(replay: ReplayBuffer) -> dict:
    """All that a CUDA graph bakes in: where the tensors lie, and plain numbers."""
    numbers = {name: value for name, value in vars(replay).items() if isinstance(value, int | float)}
    return numbers | {name: buffer.data_ptr() for name, buffer in replay.named_buffers()}


def meta_row(num_envs: int) -> list[torch.Tensor]:
    return [torch.tensor(part).to("meta") for part in next(plain_rows(1, num_envs))]
