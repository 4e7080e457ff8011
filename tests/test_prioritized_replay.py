"""`PrioritizedReplayBuffer` against slow oracles: priorities in a dict by (lane, step), sums by `math.fsum`.

The streams of events and what can be drawn of them come from test_replay.py. Where a test puts draws at chosen places,
`torch.rand` gives what it is told: draw i of B lands at the mass (i + rand_i) / B of the total, in order of index.
"""

import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from test_replay import FRAME_SHAPE, GAMMA, Oracle, check_types, number_of, picture, play, random_events, same
from torch.utils._python_dispatch import TorchDispatchMode

import rainbow_softmoe
from rainbow_softmoe import PrioritizedReplayBuffer, ReplayBuffer, first_above

FLOOR = math.sqrt(1e-10)  # priority of a loss of 0
LAST_BITS = {"rtol": 1e-15, "atol": 0}  # PyTorch's square roots may differ from Python's in the last bit
LARGEST = float(np.finfo(np.float32).max)
# Both ends of [0, 1), and what rounding may make of them
EDGES = [0.0, 1 - 2**-53, 1.0, 1 + 2**-52, -5e-324, -(2**-53)]


class PrioritizedOracle(Oracle):
    """Adds a priority to every row that can be drawn, by (lane, step)."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.transitions, self.priorities, self.max_priority = {}, {}, 1.0

    def add(self, step):
        super().add(step)
        keys = [(lane, t) for t in range(self.oldest(), len(self.lanes[0])) for lane in range(self.num_envs)]
        transitions = {key: self.transition(*key) for key in keys}
        self.transitions = {key: transition for key, transition in transitions.items() if transition is not None}
        self.priorities = {key: self.priorities.get(key, self.max_priority) for key in self.transitions}

    def keys(self) -> dict:
        """Index -> (lane, step) of every row that can be drawn, in order of index."""
        rows = {t % self.rows * self.num_envs + lane: (lane, t) for lane, t in self.priorities}
        return dict(sorted(rows.items()))

    def by_index(self) -> dict[int, float]:
        return {index: self.priorities[key] for index, key in self.keys().items()}

    def update_priorities(self, index: list[int], loss: list[float]):
        keys, new = self.keys(), {}
        for i, x in zip(index, loss, strict=True):
            if i in keys:
                priority = math.sqrt((x if math.isfinite(x) else 0.0) + 1e-10)
                new[keys[i]] = max(priority, new.get(keys[i], 0.0))
        self.priorities |= new
        self.max_priority = max(self.max_priority, *new.values(), 1.0)


def make(rows, num_envs, stack_size=4, n_step=1, spare=0, device="cpu") -> PrioritizedReplayBuffer:
    window = {"stack_size": stack_size, "n_step": n_step, "gamma": GAMMA}
    return PrioritizedReplayBuffer(rows * num_envs + spare, num_envs, FRAME_SHAPE, **window, device=device)


def make_pair(rows: int, num_envs: int, stack_size: int = 4, n_step: int = 1, **more):
    replay = make(rows, num_envs, stack_size, n_step, **more)
    return replay, PrioritizedOracle(rows, num_envs, stack_size, n_step)


def feed(replay: PrioritizedReplayBuffer, oracle: PrioritizedOracle, step):
    replay.add(*step)
    oracle.add(step)


def learn(replay: PrioritizedReplayBuffer, oracle: PrioritizedOracle, index, loss):
    """The same float32 losses to both."""
    loss = torch.as_tensor(loss, dtype=torch.float32)
    index = torch.as_tensor(index, dtype=torch.int64)
    replay.update_priorities(index.to(replay.device), loss.to(replay.device))
    oracle.update_priorities(index.tolist(), loss.tolist())


def plain_pair(rows: int, num_envs: int, length: int, **more):
    """Both after `length` rows of episodes that go on."""
    replay, oracle = make_pair(rows, num_envs, **more)
    for step in play([["plain"] * num_envs] * length, np.random.default_rng(0)):
        feed(replay, oracle, step)
    return replay, oracle


def stream_pair(seed: int, rows: int, num_envs: int, length: int, **more):
    """Both after `length` rows of random events and an update with random losses of every row that can be drawn."""
    rng = np.random.default_rng(seed)
    replay, oracle = make_pair(rows, num_envs, **more)
    for step in play(random_events(rng, length, num_envs), rng):
        feed(replay, oracle, step)
    index = list(oracle.by_index())
    learn(replay, oracle, index, rng.lognormal(0, 2, len(index)))
    return replay, oracle


def check_state(replay: PrioritizedReplayBuffer, oracle: PrioritizedOracle):
    """Every priority, exactly 0 where a row cannot be drawn, the largest so far, and the sums of blocks."""
    expected = np.zeros(replay.priorities.numel())
    expected[list(oracle.by_index())] = list(oracle.by_index().values())
    assert replay.priorities.dtype == replay.block_sums.dtype == torch.float64
    np.testing.assert_allclose(replay.priorities.view(-1).cpu().numpy(), expected, **LAST_BITS)
    np.testing.assert_allclose(replay.max_priority.cpu().numpy(), [oracle.max_priority], **LAST_BITS)
    assert len(replay) == len(oracle.priorities)
    check_sums(replay)


def check_sums(replay: PrioritizedReplayBuffer):
    """Blocks' sums are fresh ones to the bit, and right."""
    assert torch.equal(replay.block_sums, replay.priorities.sum(dim=1))
    exact = [math.fsum(block) for block in replay.priorities.tolist()]
    np.testing.assert_allclose(replay.block_sums.cpu().numpy(), exact, rtol=1e-14, atol=0)


def check_batch(batch, oracle: PrioritizedOracle):
    """Every drawn element, and the importance weights."""
    keys = oracle.keys()
    index = batch.index.tolist()
    assert set(index) <= set(keys)
    check_types(batch, len(index), oracle.stack_size)
    drawn = [oracle.transitions[keys[i]] for i in index]
    obs, action, reward, discount, next_obs = (np.array(column) for column in zip(*drawn, strict=True))
    np.testing.assert_array_equal(batch.obs.cpu().numpy(), picture(obs))
    np.testing.assert_array_equal(batch.action.cpu().numpy(), action)
    np.testing.assert_allclose(batch.reward.cpu().numpy(), reward, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(batch.discount.cpu().numpy(), discount, rtol=1e-6, atol=0)  # 0 is exact
    going_on = discount > 0
    np.testing.assert_array_equal(batch.next_obs.cpu().numpy()[going_on], picture(next_obs[going_on]))
    check_weights(batch, [oracle.priorities[keys[i]] for i in index])


def check_weights(batch, priorities: list[float]):
    """1/sqrt(p) over the largest in the batch."""
    weights = batch.importance_weights
    assert (tuple(weights.shape), weights.dtype) == ((len(priorities),), torch.float32)
    expected = [1 / math.sqrt(p) for p in priorities]
    np.testing.assert_allclose(weights.cpu().numpy(), np.array(expected) / max(expected), rtol=1e-6, atol=0)
    assert ((weights > 0) & (weights <= 1)).all() and weights.max() == 1


def sample_with(replay: PrioritizedReplayBuffer, values):
    """A batch for which `torch.rand` gives these values, in any range."""
    values = np.asarray(values, np.float64)

    def rand(*size, dtype=torch.float32, device="cpu"):
        return torch.tensor(values, device=device).to(dtype).reshape(*size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        return replay.sample(len(values))


def sample_at(replay: PrioritizedReplayBuffer, shares):
    """A batch with draws at these shares of the total mass, to the last bits."""
    shares = np.asarray(shares, np.float64)
    return sample_with(replay, shares * len(shares) - np.arange(len(shares)))


def check_edges(replay: PrioritizedReplayBuffer, oracle: PrioritizedOracle):
    """Draws at, and a little beyond, the ends of the strata, of the total, and of the rows."""
    drawable = set(oracle.by_index())
    for value in EDGES:
        for size in (1, 3, 8):
            batch = sample_with(replay, [value] * size)
            assert set(batch.index.tolist()) <= drawable, value
            assert torch.isfinite(batch.importance_weights).all()
    ends = np.array(list(accumulate(oracle.by_index().values(), initial=0.0)))
    for shares in (ends / ends[-1], np.nextafter(ends / ends[-1], -1), np.nextafter(ends / ends[-1], 2)):
        assert set(sample_at(replay, shares).index.tolist()) <= drawable


# ---------------------------------------------------------------------------------------------- random streams


def random_losses(rng: np.random.Generator, size: int) -> np.ndarray:
    """Losses of many magnitudes; now and then none at all, a huge one, or no number."""
    losses = rng.lognormal(-1, 2, size)
    strange = rng.choice([0.0, 1e-12, 1e4, math.inf, -math.inf, math.nan], size)
    return np.where(rng.random(size) < 0.1, strange, losses)


def run_stream(seed: int, rows: int, num_envs: int, stack_size: int, n_step: int, device: str = "cpu"):
    """Five turns of the ring with draws and updates in between; all of the state after every change."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    replay, oracle = make_pair(rows, num_envs, stack_size, n_step, spare=int(rng.integers(num_envs)), device=device)
    for t, step in enumerate(play(random_events(rng, 5 * rows + 3, num_envs), rng)):
        feed(replay, oracle, step)
        check_state(replay, oracle)
        if not oracle.priorities or rng.random() < 0.3:
            continue
        batch = replay.sample(int(rng.choice([1, 4, 32])))
        check_batch(batch, oracle)
        learn(replay, oracle, batch.index, random_losses(rng, len(batch.index)))
        if rng.random() < 0.3:  # any rows, with losses below the largest so far
            index = rng.integers(0, rows * num_envs, 20)
            learn(replay, oracle, index, rng.random(20) * 0.9)
        check_state(replay, oracle)
        if t % 7 == 0:
            check_edges(replay, oracle)


@pytest.mark.parametrize("stack_size", [1, 4])
@pytest.mark.parametrize("n_step", [1, 3, 10])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_random_streams(num_envs: int, n_step: int, stack_size: int, monkeypatch):
    """Blocks of 4 rows: many of them in a small ring, ending inside a row of lanes, some of them empty."""
    smallest = stack_size + n_step
    for rows, block_size in ((smallest, 4), (smallest + 1, 512), (2 * smallest + 1, 4)):
        monkeypatch.setattr(rainbow_softmoe, "BLOCK_SIZE", block_size)
        run_stream(1000 * rows + num_envs, rows, num_envs, stack_size, n_step)


@pytest.mark.cuda
@pytest.mark.parametrize("block_size", [4, 512])
@pytest.mark.parametrize("n_step", [3, 10])
def test_random_streams_on_the_gpu(n_step: int, block_size: int, monkeypatch):
    monkeypatch.setattr(rainbow_softmoe, "BLOCK_SIZE", block_size)
    run_stream(n_step, 4 + n_step + 2, 3, 4, n_step, device="cuda")


# -------------------------------------------------------------------------------------------------- n-step 10


def ends_of_episodes() -> list[list[str]]:
    """Lanes of equal episodes: lengths 1 to 12 and 21, each with every kind of end."""
    lanes = []
    for length in (*range(1, 13), 21):
        for end in ("life", "over", "cut", "both", "quiet", "slice"):
            episode = ["plain"] * (length - 1) + [end] + ["reset"] * (end not in ("life", "slice"))
            lanes.append((episode * 70)[:70])
    return [list(row) for row in zip(*lanes, strict=True)]


def test_ten_step_windows_at_every_end():
    """Equal priorities and a draw per row: every transition of every lane, before and after the wrap-around."""
    events = ends_of_episodes()
    replay, oracle = make_pair(29, len(events[0]), 4, 10)
    for t, step in enumerate(play(events, np.random.default_rng(0))):
        feed(replay, oracle, step)
        if t in (1, 9, 10, 11, 12, 22, 28, 29, 30, 31, 42, 57, 58, 69):
            batch = replay.sample(len(oracle.priorities))
            assert sorted(batch.index.tolist()) == list(oracle.by_index())
            check_batch(batch, oracle)


@pytest.mark.parametrize("length", [3, 9, 10, 11, 12])
@pytest.mark.parametrize("end", ["life", "over", "cut", "both"])
def test_ten_step_returns_in_numbers(end: str, length: int):
    """An episode of rewards 1, 2, 4, ... with its reset row, then another: what each of its steps is worth."""
    replay = make(60, 1, 2, 10)
    after = [] if end == "life" else ["reset"]
    events = ["plain"] * (length - 1) + [end] + after + ["plain"] * 30
    for t, step in enumerate(play([[event] for event in events], np.random.default_rng(0))):
        replay.add(*step._replace(reward=np.array([2.0**t])))
    ends = length + len(after)  # the second episode's first row
    batch = replay.sample(len(replay))
    assert sorted(batch.index.tolist()) == [*range(length), *range(ends, len(events) - 10)]
    rewards, discounts, frames = (
        dict(zip(batch.index.tolist(), column.tolist(), strict=True))
        for column in (batch.reward, batch.discount, batch.next_obs[:, -1].flatten(1))
    )
    for t in range(length):
        steps = min(10, length - t)
        assert rewards[t] == pytest.approx(2.0**t * ((2 * GAMMA) ** steps - 1) / (2 * GAMMA - 1), rel=1e-6)
        terminated = end != "cut" and t + steps == length
        assert discounts[t] == (0 if terminated else pytest.approx(GAMMA**steps, rel=1e-6))
        if not terminated:  # where truncated, the reset row's frame is the episode's last
            assert frames[t] == picture(number_of(t + steps, 0, 1)).flatten().tolist()


# ------------------------------------------------------------------------------------------- which rows are drawn


def chi_square_z(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square as a standard normal score (Wilson and Hilferty)."""
    freedom = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.mark.parametrize("num_envs, n_step, batch_size", [(3, 3, 1), (4, 3, 8), (1, 10, 32)])
def test_frequencies_are_proportional_to_priorities(num_envs: int, n_step: int, batch_size: int):
    replay, oracle = stream_pair(5, 20, num_envs, 90, n_step=n_step)
    priorities = oracle.by_index()
    index, p = np.array(list(priorities)), np.array(list(priorities.values()))
    torch.manual_seed(0)
    batches = [replay.sample(batch_size).index for _ in range(12_000 // (batch_size + 3))]
    counts = np.bincount(torch.cat(batches).numpy(), minlength=20 * num_envs)
    assert counts.sum() == counts[index].sum()
    assert chi_square_z(counts[index], p / p.sum() * counts.sum()) < 3.72  # p > 1e-4


@pytest.mark.parametrize("block_size", [4, 512])
def test_equal_priorities_are_drawn_equally_often(block_size: int, monkeypatch):
    """As many draws as rows: each exactly once. Thrice as many: each three times. Half: one of each two."""
    monkeypatch.setattr(rainbow_softmoe, "BLOCK_SIZE", block_size)
    rng = np.random.default_rng(1)
    replay, oracle = make_pair(30, 3, 4, 3)
    steps = list(play(random_events(rng, 100, 3), rng))
    for t, step in enumerate(steps):
        feed(replay, oracle, step)
        if t % 9 != 8 and t < 99:
            continue
        index = list(oracle.by_index())
        assert replay.sample(len(index)).index.sort().values.tolist() == index
        assert replay.sample(3 * len(index)).index.sort().values.tolist() == [i for i in index for _ in range(3)]
        if len(index) % 2 == 0:
            half = replay.sample(len(index) // 2).index.sort().values.tolist()
            assert all(i in index[2 * k : 2 * k + 2] for k, i in enumerate(half))


def test_one_draw_from_each_stratum():
    """Draw k, in order of index, is a row that reaches into the k-th of B parts of equal mass."""
    replay, oracle = stream_pair(2, 40, 3, 100)
    priorities = oracle.by_index()
    index, p = list(priorities), np.array(list(priorities.values()))
    ends = np.cumsum(p) / p.sum()
    for size in (2, 7, 32, 400):
        for seed in range(20):
            torch.manual_seed(seed)
            places = np.searchsorted(index, replay.sample(size).index.sort().values.numpy())
            k = np.arange(size)
            assert (ends[places] > k / size - 1e-12).all()
            assert (ends[places] - p[places] / p.sum() < (k + 1) / size + 1e-12).all()


def test_strata_are_drawn_from_independently():
    """Two equal rows in each of 32 strata: either, in every pair of strata all four combinations."""
    replay, oracle = plain_pair(70, 1, 65)
    assert list(oracle.by_index()) == list(range(64))
    torch.manual_seed(0)
    upper = torch.stack([replay.sample(32).index.sort().values % 2 for _ in range(400)]).double()  # (draws, strata)
    correlation = torch.corrcoef(upper.T) - torch.eye(32)
    assert (upper.mean(dim=0) - 0.5).abs().max() < 4.5 * 0.5 / 20
    assert correlation.abs().max() < 5 / 20


@pytest.mark.parametrize("block_size", [2, 4, 512])
def test_rows_that_are_no_transition_are_never_drawn(block_size: int, monkeypatch):
    """Draws at all edges after every row, the wrap-around among them; half of the lanes' rows are reset rows."""
    monkeypatch.setattr(rainbow_softmoe, "BLOCK_SIZE", block_size)
    rng = np.random.default_rng(7)
    replay, oracle = make_pair(9, 3, 4, 3)
    events = random_events(rng, 40, 3)
    for t in range(40):
        events[t][0], events[t][2] = ("both", "reset")[t % 2], ("cut", "reset")[t % 2]
    for t, step in enumerate(play(events, rng)):
        feed(replay, oracle, step)
        if oracle.priorities:
            index = list(oracle.by_index())
            learn(replay, oracle, index, rng.lognormal(0, 3, len(index)))
            check_edges(replay, oracle)
            torch.manual_seed(t)
            check_batch(replay.sample(200), oracle)
        check_state(replay, oracle)


def test_rounding_between_blocks_draws_no_empty_row(monkeypatch):
    """Ten thousand blocks that begin and end with rows of no mass, draws at the ends of every block."""
    monkeypatch.setattr(rainbow_softmoe, "BLOCK_SIZE", 5)
    replay = make(50_000, 1)
    rng = np.random.default_rng(0)
    priorities = rng.lognormal(0, 3, (10_000, 5))
    priorities[:, [0, 4]] = 0
    priorities[rng.random(10_000) < 0.3] = 0
    fill(replay, priorities.reshape(-1))
    ends = np.concatenate([[0], replay.block_sums.cumsum(dim=0).numpy()])
    for direction in (-1, 2):
        shares = ends / ends[-1]
        for _ in range(3):
            batch = sample_at(replay, shares)
            assert (replay.priorities.view(-1)[batch.index] > 0).all()
            shares = np.nextafter(shares, direction)


def test_first_above():
    """The first of the ends above the mass; beyond either end, the first or last that adds to them."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 100):
        for share in (0.0, 0.5, 0.9):
            p = rng.lognormal(0, 3, (20, n)) * (rng.random((20, n)) >= share)
            p[np.arange(20), rng.integers(0, n, 20)] = rng.lognormal(0, 3, 20)
            ends = p.cumsum(axis=1)
            total = ends[:, -1:]
            inside = np.concatenate([ends[:, :-1], rng.random((20, 30)) * total], axis=1)
            inside = inside[:, (inside < total * (1 - 1e-12)).all(axis=0)]
            low, high = -total * [0, 1e-16, 1e-9, 1], total * [1, 1 + 2**-52, 1 + 1e-9, 2]
            mass = np.concatenate([inside, low, np.nextafter(low[:, :1], -1), high], axis=1)
            got = first_above(*map(torch.tensor, (p, ends, mass))).numpy()
            for row in range(20):
                adds = [i for i in range(n) if p[row, i] > 0]
                expected = [next(i for i in range(n) if ends[row, i] > m) for m in inside[row]]
                expected += [adds[0]] * 5 + [adds[-1]] * 4
                assert got[row].tolist() == expected


def parallel_sums(p):
    """Cumulative sums as a GPU associates them: where a row adds nothing, they may rise or fall by a rounding error."""
    ends, step = p.copy(), 1
    while step < p.shape[-1]:
        ends[..., step:] = ends[..., step:] + ends[..., :-step]
        step *= 2
    return ends


def test_first_above_of_sums_that_do_not_quite_rise():
    rng = np.random.default_rng(0)
    p = rng.lognormal(0, 1, (200, 512)) * (rng.random((200, 512)) < 0.5)
    ends = parallel_sums(p)
    empty = p[:, 1:] == 0
    assert (ends[:, 1:] > ends[:, :-1])[empty].any() and (ends[:, 1:] < ends[:, :-1])[empty].any()
    for shift in (-1e9, -1, 0, 1, 1e9):  # just below and above each of the sums
        for column in range(512):
            mass = np.nextafter(ends[:, column], ends[:, column] + shift)
            got = first_above(*map(torch.tensor, (p, ends, mass[:, None]))).numpy()[:, 0]
            assert (p[range(200), got] > 0).all()
            end, share = np.cumsum(p, axis=1)[range(200), got], p[range(200), got]
            assert ((end >= mass - 1e-9) & (end - share <= mass + 1e-9)).all()


# ------------------------------------------------------------------------------------------------ a million rows


def fill(replay: PrioritizedReplayBuffer, priorities: np.ndarray):
    """Priorities of all rows at once; each row's action is its index."""
    replay.priorities.view(-1)[: len(priorities)] = torch.tensor(priorities)
    replay.block_sums.copy_(replay.priorities.sum(dim=1))
    replay.action.view(-1).copy_(torch.arange(replay.action.numel()))


def million(priorities: np.ndarray) -> PrioritizedReplayBuffer:
    replay = PrioritizedReplayBuffer(len(priorities), 4, (1, 1))
    fill(replay, priorities)
    return replay


def test_a_million_rows_the_smallest_shares_are_reached():
    """Rows of priority 1e-5 among a million of 1: a draw in the middle of each share hits it, and none beside it."""
    rare = np.array([0, 1, 511, 512, 513, 16_383, 16_384, 500_000, 777_777, 999_424, 999_998, 999_999])
    priorities = np.ones(1_000_000)
    priorities[rare] = FLOOR
    replay = million(priorities)
    ones_before = rare - np.arange(len(rare))
    middle = ones_before + (np.arange(len(rare)) + 0.5) * FLOOR
    total = 1_000_000 - len(rare) + len(rare) * FLOOR
    for size in (1, len(rare)):
        for i in range(0, len(rare), size):
            batch = sample_at(replay, middle[i : i + size] / total)
            assert batch.index.tolist() == batch.action.tolist() == rare[i : i + size].tolist()
    alone = middle[7:10]
    beside = np.concatenate([alone - FLOOR, alone + FLOOR]) / total
    assert (replay.priorities.view(-1)[sample_at(replay, beside).index] == 1).all()
    assert sample_with(replay, [0.0] * 32).index[0] == 0
    assert sample_with(replay, [1 - 2**-53] * 32).index[-1] == 999_999


def test_a_million_rows_whole_numbers_are_exact():
    """Priorities whose sums have no rounding at all: every draw is at the row that exact arithmetic gives."""
    rng = np.random.default_rng(0)
    p = rng.integers(0, 2**28, 1_000_000) * (rng.random(1_000_000) < 0.8)
    p[-1] += 2**48 - p.sum()
    assert p.min() >= 0
    replay = million(p.astype(np.float64))
    ends = p.cumsum()
    size = 2**12
    drawn = rng.integers(0, 1_000_000, size)
    for mass in (ends[drawn] - 1, ends[drawn], ends[drawn] - (p[drawn] + 1) // 2, rng.integers(0, 2**48, size)):
        mass = mass[mass < 2**48]
        mass = np.concatenate([mass, rng.integers(0, 2**48, size - len(mass))])  # a power of two: shares are exact
        batch = sample_with(replay, mass / 2**36 - np.arange(size))
        np.testing.assert_array_equal(batch.index.numpy(), np.searchsorted(ends, mass, side="right"))


def test_a_million_rows_against_exact_sums():
    """Random priorities: what lies before a drawn row, summed without error, is the draw's mass."""
    rng = np.random.default_rng(1)
    priorities = np.sqrt(rng.exponential(size=1_000_000) + 1e-10) * (rng.random(1_000_000) < 0.9)
    replay = million(priorities)
    check_sums(replay)
    p = priorities.tolist()
    total = math.fsum(p)
    shares = rng.random(24)
    for share, i in zip(shares, sample_at(replay, shares).index.tolist(), strict=True):
        before = math.fsum(p[:i])
        assert before - 1e-12 * total <= share * total <= before + p[i] + 1e-12 * total
    shares = rng.random(20_000)
    ends = np.cumsum(priorities)
    found = np.searchsorted(ends, shares * ends[-1], side="right")
    near = np.abs(np.stack([ends[found] - shares * ends[-1], ends[found - 1] - shares * ends[-1]])).min(axis=0)
    clear = near > 1e-10 * total
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(sample_at(replay, shares).index.numpy()[clear], found[clear])


def test_a_million_rows_stay_exact_through_updates():
    rng = np.random.default_rng(2)
    replay = million(np.ones(1_000_000))
    expected = np.ones(1_000_000)
    for scale in (1e12, 1.0, 0.0):  # a sum that changed by differences would keep what 1e12 rounded away
        for _ in range(5):
            index = rng.choice(1_000_000, 1000, replace=False)
            index[:3] = 0, 512, 999_999
            loss = rng.exponential(size=1000).astype(np.float32) * np.float32(scale)
            loss[1:3] = loss[0]  # where one of the three was drawn already, the same loss: its larger one counts
            index, first = np.unique(index, return_index=True)
            loss = loss[first]
            replay.update_priorities(torch.tensor(index), torch.tensor(loss))
            expected[index] = np.sqrt(loss.astype(np.float64) + 1e-10)
            np.testing.assert_allclose(replay.priorities.view(-1)[:1_000_000].numpy(), expected, **LAST_BITS)
            check_sums(replay)


# ------------------------------------------------------------------------------------- weights and priorities


def test_importance_weights_in_numbers():
    replay, oracle = plain_pair(20, 2, 15)
    batch = replay.sample(28)
    assert batch.importance_weights.dtype == torch.float32
    assert batch.importance_weights.tolist() == [1.0] * 28  # equal priorities
    learn(replay, oracle, list(oracle.by_index()), [1.0, 16.0] * 14)  # priorities 1 and 4
    batch = replay.sample(70)
    assert batch.importance_weights.tolist() == [1.0 if i % 2 == 0 else 0.5 for i in batch.index.tolist()]
    learn(replay, oracle, list(oracle.by_index()), [81.0] * 28)
    assert replay.sample(28).importance_weights.tolist() == [1.0] * 28


@pytest.mark.parametrize("size", [1, 2, 32, 500])
def test_importance_weights_of_random_batches(size: int):
    """The largest is taken over the batch, not over all rows."""
    replay, oracle = stream_pair(size, 20, 3, 50)
    for seed in range(10):
        torch.manual_seed(seed)
        batch = replay.sample(size)
        check_batch(batch, oracle)
        if size == 1:
            assert batch.importance_weights.item() == 1.0


def test_importance_weights_of_the_smallest_and_the_largest_loss():
    replay, oracle = plain_pair(20, 2, 15)
    learn(replay, oracle, list(oracle.by_index()), [0.0] + [LARGEST] * 27)
    ends = np.array(list(accumulate(oracle.by_index().values())))
    batch = sample_at(replay, [0.0, ends[3] / ends[-1], ends[9] / ends[-1]])
    assert batch.index[0] == 0
    check_batch(batch, oracle)


def test_new_rows_get_the_largest_priority_so_far():
    """1 at first; after larger losses theirs, also once those rows have smaller ones or are gone."""
    rng = np.random.default_rng(0)
    replay, oracle = make_pair(8, 2, 4, 3)
    losses = {5: 0.25, 8: 9.0, 11: 0.0, 30: 1.0, 40: 100.0, 42: 4.0}
    newest = {4: 1.0, 7: 1.0, 9: 3.0, 12: 3.0, 29: 3.0, 31: 3.0, 41: 10.0, 60: 10.0}
    for t, step in enumerate(play([["plain"] * 2] * 61, rng)):
        feed(replay, oracle, step)
        if t in newest:
            row = (t - 3) % 8  # complete since now
            assert replay.priorities.view(-1)[2 * row : 2 * row + 2].tolist() == pytest.approx([newest[t]] * 2)
        if t in losses:
            index = list(oracle.by_index())
            learn(replay, oracle, index, [losses[t]] * len(index))
        check_state(replay, oracle)


def test_largest_priority_never_falls():
    rng = np.random.default_rng(0)
    replay, oracle = plain_pair(20, 2, 15)
    index, largest = list(oracle.by_index()), 1.0
    for _ in range(50):
        losses = random_losses(rng, len(index)) * 10.0 ** rng.integers(-6, 3)
        learn(replay, oracle, index, losses)
        assert replay.max_priority.item() >= largest
        check_state(replay, oracle)
        largest = replay.max_priority.item()
    assert largest > 1


@pytest.mark.parametrize("order", [(4.0, 9.0, 1.0), (9.0, 4.0, 1.0), (1.0, 4.0, 9.0)])
def test_an_index_drawn_twice_gets_its_larger_loss(order: tuple):
    replay, oracle = plain_pair(20, 2, 15)
    learn(replay, oracle, [7, 2, 7, 3, 7, 2], [order[0], 0.25, order[1], 0.0, order[2], 2.25])
    got = replay.priorities.view(-1)[[7, 2, 3, 0]].tolist()
    assert got == pytest.approx([3.0, 1.5, FLOOR, 1.0], rel=1e-9)
    check_state(replay, oracle)
    learn(replay, oracle, [7, 7, 7, 2, 2], [math.nan, 4.0, math.inf, -math.inf, math.nan])  # the larger finite one
    assert replay.priorities.view(-1)[[7, 2]].tolist() == pytest.approx([2.0, FLOOR], rel=1e-9)
    check_state(replay, oracle)


def test_many_duplicates():
    """Batches far larger than the number of rows."""
    rng = np.random.default_rng(0)
    replay, oracle = stream_pair(3, 12, 3, 40)
    for _ in range(10):
        index = rng.choice(list(oracle.by_index()), 300)
        learn(replay, oracle, index, random_losses(rng, 300))
        check_state(replay, oracle)


def test_a_smaller_loss_replaces_a_larger_one():
    replay, oracle = plain_pair(20, 2, 15)
    for loss in (9.0, 4.0, 16.0, 0.0, 1.0):
        learn(replay, oracle, [5], [loss])
        assert replay.priorities.view(-1)[5].item() == pytest.approx(math.sqrt(loss + 1e-10), rel=1e-12)
        check_state(replay, oracle)


def test_rows_that_cannot_be_drawn_take_no_priority():
    """Reset rows, rows not yet written, rows with open windows, and rows whose stack is overwritten in part."""
    replay, oracle = make_pair(12, 2, 4, 3)
    events = [["plain", "plain"] for _ in range(30)]
    events[5][0], events[6][0], events[20][1], events[21][1] = "over", "reset", "cut", "reset"
    untouched = 0
    for step in play(events, np.random.default_rng(0)):
        feed(replay, oracle, step)
        before = replay.priorities.clone(), replay.block_sums.clone()
        stale = sorted(set(range(24)) - set(oracle.by_index()))
        untouched += len(stale)
        learn(replay, oracle, stale * 2, [0.5] * len(stale) * 2)
        replay.update_priorities(torch.tensor(stale), torch.full((len(stale),), 100.0))
        assert torch.equal(replay.priorities, before[0])
        assert torch.equal(replay.block_sums, before[1])
        assert replay.max_priority == 1
        check_state(replay, oracle)
        live = list(oracle.by_index())[:3]
        learn(
            replay, oracle, stale + live + stale, [0.5] * len(stale) + [0.7, 0.8, 0.9][: len(live)] + [0.0] * len(stale)
        )
        check_state(replay, oracle)
    assert untouched > 100


def test_a_batch_drawn_before_rows_were_overwritten():
    """What has gone since stays at 0; what is still there takes its loss."""
    rng = np.random.default_rng(4)
    replay, oracle = make_pair(12, 3, 4, 3)
    index = None
    for t, step in enumerate(play(random_events(rng, 80, 3), rng)):
        if index is not None and t % 3 == 2:
            learn(replay, oracle, index, rng.random(64) * 0.9)
            check_state(replay, oracle)
        feed(replay, oracle, step)
        check_state(replay, oracle)
        if oracle.priorities and t % 3 == 0:
            index = replay.sample(64).index


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_count_as_none(value: float):
    replay, oracle = plain_pair(20, 2, 15)
    learn(replay, oracle, [3, 4, 5], [value, 4.0, value])
    assert replay.priorities.view(-1)[[3, 4, 5]].tolist() == pytest.approx([FLOOR, 2.0, FLOOR], rel=1e-9)
    check_state(replay, oracle)
    learn(replay, oracle, list(oracle.by_index()), [value] * 28)
    assert set(replay.sample(28).index.tolist()) == set(oracle.by_index())  # equal ones again
    assert replay.max_priority.item() == pytest.approx(2.0, rel=1e-9)
    check_state(replay, oracle)


def test_a_loss_of_none_and_a_huge_one():
    """Rows without loss can still be drawn; a huge loss takes nearly all draws, and leaves nothing behind."""
    replay, oracle = plain_pair(20, 2, 15)
    index = list(oracle.by_index())
    learn(replay, oracle, index, [0.0] * 28)
    assert replay.priorities.view(-1)[index].tolist() == [FLOOR] * 28
    assert replay.sample(28).index.sort().values.tolist() == index
    learn(replay, oracle, [9], [LARGEST])
    assert replay.priorities.view(-1)[9].item() == math.sqrt(LARGEST + 1e-10)
    batch = replay.sample(100)
    assert batch.index.tolist() == [9] * 100 and batch.importance_weights.tolist() == [1.0] * 100
    check_state(replay, oracle)
    learn(replay, oracle, [9], [0.0])
    assert replay.sample(28).index.sort().values.tolist() == index
    check_state(replay, oracle)


def test_losses_of_the_network_are_detached():
    """Losses with a gradient, of lower precision too, and the caller's tensors stay as they are."""
    replay, _ = plain_pair(20, 2, 15)
    index, loss = torch.tensor([13, 4, 13]), torch.tensor([0.25, 4.0, 2.25], requires_grad=True)
    replay.update_priorities(index, loss)
    assert not replay.priorities.requires_grad and not replay.max_priority.requires_grad
    assert index.tolist() == [13, 4, 13] and loss.tolist() == [0.25, 4.0, 2.25] and loss.requires_grad
    assert replay.priorities.view(-1)[[13, 4]].tolist() == pytest.approx([1.5, 2.0], rel=1e-9)
    replay.update_priorities(index, torch.tensor([1.0, 60_000, 0], dtype=torch.float16))
    assert replay.priorities.view(-1)[[13, 4]].tolist() == pytest.approx([1, 60_000**0.5], rel=1e-9)


# --------------------------------------------------------------------------------------------------- checkpoints


def copy_of(state: dict) -> dict:
    return {name: value.clone() for name, value in state.items()}


def go_on(replay: PrioritizedReplayBuffer, steps: list, seed: int):
    """Add rows, draw and update; every batch, and the whole state at the end."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    batches = []
    for step in steps:
        replay.add(*step)
        if replay.block_sums.sum() > 0:
            batches.append(replay.sample(16))
            replay.update_priorities(batches[-1].index, torch.tensor(random_losses(rng, 16)))
    return batches, copy_of(replay.state_dict())


@pytest.mark.parametrize("n_step", [3, 10])
@pytest.mark.parametrize("moment", [0, 1, 12, 14, 29])
def test_state_dict_round_trip(moment: int, n_step: int):
    """A restored buffer goes on as the original does, to the bit, and neither touches the other."""
    rng = np.random.default_rng(moment)
    replay = make(14, 3, 4, n_step)
    steps = list(play(random_events(rng, moment + 40, 3), rng))
    go_on(replay, steps[:moment], seed=moment)
    state = copy_of(replay.state_dict())
    if moment >= 20:
        assert state["max_priority"] > 1
    copies = [make(14, 3, 4, n_step) for _ in range(2)]
    for copy in copies:
        copy.load_state_dict(copy_of(state))
        check_sums(copy)
    results = [go_on(each, steps[moment:], seed=5) for each in (replay, *copies)]
    for batches, end in results[1:]:
        assert len(batches) == len(results[0][0]) > 0
        assert all(same(*pair) for pair in zip(batches, results[0][0], strict=True))
        assert end.keys() == results[0][1].keys()
        assert all(torch.equal(end[name], value) for name, value in results[0][1].items())


@pytest.mark.parametrize("moment", [0, 1, 5, 14, 15, 40])
def test_loading_into_a_used_buffer(moment: int):
    """What it held before is gone, also the rows that the state does not reach."""
    rng = np.random.default_rng(moment)
    replay, oracle = make_pair(14, 3, 4, 3)
    steps = list(play(random_events(rng, moment + 40, 3), rng))
    for step in steps[:moment]:
        feed(replay, oracle, step)
    copy = make(14, 3, 4, 3)
    go_on(copy, list(play([["plain"] * 3] * 37, rng)), seed=0)
    copy.load_state_dict(copy_of(replay.state_dict()))
    for step in steps[moment:]:
        check_state(copy, oracle)
        feed(copy, oracle, step)
        if oracle.priorities:
            check_batch(copy.sample(32), oracle)


def test_state_dict_of_a_restored_buffer_is_the_same():
    replay, _ = stream_pair(0, 14, 3, 50)
    state = copy_of(replay.state_dict())
    assert {"priorities", "block_sums", "max_priority"} <= state.keys()
    copy = make(14, 3)
    copy.load_state_dict(state)
    again = copy.state_dict()
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert again[name].dtype == value.dtype and torch.equal(again[name], value), name


@pytest.mark.parametrize("length", [0, 5, 50])
def test_other_sizes_are_refused(length: int):
    """Also where fewer rows were written than either holds; what was there stays."""
    rng = np.random.default_rng(0)
    replay, oracle = make_pair(14, 3)
    for step in play(random_events(rng, length, 3), rng):
        feed(replay, oracle, step)
    state = copy_of(replay.state_dict())
    others = [make(13, 3), make(15, 3), make(14, 2), make(14, 4), make(21, 2), make(400, 3)]
    others.append(PrioritizedReplayBuffer(42, 3, (3, 2)))
    others.append(PrioritizedReplayBuffer(42, 3, (2, 4)))
    for other in others:
        for step in play([["plain"] * other.num_envs] * 6, rng):
            other.add(*step._replace(frame=np.ones((other.num_envs, *other.frame_shape), np.uint8)))
        before = copy_of(other.state_dict())
        with pytest.raises(ValueError):
            other.load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_damaged_parts_are_refused():
    """A missing part, another dtype or another shape; what was there stays."""
    replay, oracle = stream_pair(0, 14, 3, 50)
    state, uniform = copy_of(replay.state_dict()), ReplayBuffer(42, 3, FRAME_SHAPE).state_dict()
    other, _ = stream_pair(1, 14, 3, 60)
    before = copy_of(other.state_dict())
    for name in state:
        with pytest.raises(KeyError):
            other.load_state_dict({key: value for key, value in state.items() if key != name})
        if name != "cursor":
            for wrong in (state[name][:-1], state[name][None], state[name].to(torch.float16)):
                with pytest.raises(ValueError):
                    other.load_state_dict(state | {name: wrong})
    with pytest.raises(KeyError):
        other.load_state_dict(uniform)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


# ---------------------------------------------------------------------------------------------------- fast path

WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "argwhere")


class Operations(TorchDispatchMode):
    """Names of all operations, in order; fails at one whose result's shape depends on values, or that waits for one."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").strip("_")
        assert not any(name.startswith(wait.strip("_")) for wait in WAITS), name
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            assert all(x is None or x.dtype == torch.int64 for x in args[1]), "indexed by a mask"
        self.names.append(name)
        return func(*args, **(kwargs or {}))


def operations(function, *args) -> list[str]:
    with Operations() as mode:
        function(*args)
    return mode.names


def test_no_loop_over_rows_and_no_wait():
    """The same operations, one by one, for any size of ring, of batch, and at any moment."""
    seen = {"add": [], "sample": [], "update_priorities": []}
    for rows, num_envs, batch_size in ((16, 1, 2), (16, 4, 64), (3000, 2, 1)):
        replay = make(rows, num_envs, 4, 10)
        for step in play([["plain", "life"] * num_envs] * 35, np.random.default_rng(0)):
            step = [torch.from_numpy(np.ascontiguousarray(column[:num_envs])) for column in step]
            seen["add"].append(operations(replay.add, *step))
        for _ in range(3):
            index = replay.sample(batch_size).index
            seen["sample"].append(operations(replay.sample, batch_size))
            loss = torch.rand(batch_size)
            seen["update_priorities"].append(operations(replay.update_priorities, index, loss))
    for name, lists in seen.items():
        assert 5 < len(lists[0]) < 150, name
        assert all(each == lists[0] for each in lists), name


def test_runs_where_there_are_no_values():
    """On the meta device anything that looks at a value, or whose shape depends on one, raises."""
    replay = make(30, 3, 4, 10, device="meta")
    flags = torch.zeros(3, dtype=torch.bool, device="meta")
    frame = torch.zeros(3, *FRAME_SHAPE, dtype=torch.uint8, device="meta")
    for _ in range(2):
        replay.add(frame, torch.zeros(3, device="meta").long(), torch.zeros(3, device="meta"), flags, flags, flags)
        batch = replay.sample(32)
        check_types(batch, 32, 4)
        replay.update_priorities(batch.index, torch.zeros(32, device="meta"))


def fixtures(replay: PrioritizedReplayBuffer) -> dict:
    return {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in vars(replay).items()}


def test_state_changes_only_inside_tensors_that_stay_in_place():
    """A CUDA graph bakes in where the tensors lie, and the values of everything else."""
    rng = np.random.default_rng(8)
    replay = make(14, 2, 4, 3)
    before = fixtures(replay)
    steps = list(play(random_events(rng, 40, 2), rng))
    _, state = go_on(replay, steps, seed=0)
    replay.load_state_dict(state)
    assert fixtures(replay) == before


@pytest.mark.cuda
def test_draws_and_updates_in_a_cuda_graph():
    """Capturing fails where something waits for the device; replaying would repeat whatever was baked in."""
    rng = np.random.default_rng(0)
    replay, oracle = make_pair(12, 3, 4, 3, device="cuda")
    losses = torch.zeros(64, device="cuda")
    graph, index = torch.cuda.CUDAGraph(), None

    def update():
        index = replay.sample(64).index
        replay.update_priorities(index, losses)
        return index

    for t, step in enumerate(play(random_events(rng, 60, 3), rng)):
        feed(replay, oracle, step)
        if t < 6:
            continue
        values = rng.lognormal(0, 1, 64).astype(np.float32)
        losses.copy_(torch.from_numpy(values))
        if t == 6:
            oracle.update_priorities(update().tolist(), values.tolist())
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                index = update()
        graph.replay()
        assert set(index.tolist()) <= set(oracle.by_index())
        oracle.update_priorities(index.tolist(), values.tolist())
        assert replay.max_priority.item() == pytest.approx(oracle.max_priority)
        got = replay.priorities.view(-1)[list(oracle.by_index())].tolist()
        assert got == pytest.approx(list(oracle.by_index().values()))
        assert torch.equal(replay.block_sums, replay.priorities.sum(dim=1))
