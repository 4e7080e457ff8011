"""Compares `PrioritizedReplayBuffer` with a slow oracle that keeps weights in a dict by (environment, row).

test_replay.py tests which transitions can be drawn, and their content. `draw_with` chooses the random numbers of a
batch: with number r_i, draw i of B falls on the share (i + r_i) / B of the cumulative weight.
"""

import math

import numpy as np
import pytest
import torch
from operations import record_operations
from replay_oracle import (
    FRAME_SHAPE,
    GAMMA,
    Oracle,
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

from rainbow_softmoe import PrioritizedReplayBuffer

UNIT = 2.0**-20  # weights are multiples of this
FLOOR = 11 * UNIT  # the weight of a loss of 0: sqrt(1e-10), rounded up
EDGES = [0.0, 1 - 2**-53]  # the smallest and the largest float64 that `torch.rand` returns


def weight_of(loss: float) -> float:
    """Return the square root of a loss, rounded up to a multiple of 2^-20. A loss that is not finite counts as 0."""
    loss = min(max(loss, 0.0), 2.0**20) if math.isfinite(loss) else 0.0
    return math.ceil(math.sqrt(loss + 1e-10) / UNIT) * UNIT


class PrioritizedOracle(Oracle):
    """Keeps the weight of every drawable row too, by (environment, row)."""

    def __init__(self, rows: int, num_envs: int, n_step: int):
        super().__init__(num_envs, n_step)
        self.rows, self.row_weights, self.largest = rows, {}, 1.0

    def add(self, row):
        super().add(row)
        self.at = self.drawable(self.rows)
        self.row_weights = {key: self.row_weights.get(key, self.largest) for key in self.at.values()}

    def weights(self) -> dict[int, float]:
        return {place: self.row_weights[key] for place, key in self.at.items()}

    def update(self, index: list[int], losses: list[float]):
        new = {}
        for place, loss in zip(index, losses, strict=True):
            if place in self.at:
                new[self.at[place]] = max(weight_of(loss), new.get(self.at[place], 0.0))
        self.row_weights |= new
        self.largest = max(self.largest, *new.values(), 0.0)


class Pair:
    """A replay and its oracle, which get the same rows and losses."""

    def __init__(self, rows: int, num_envs: int, n_step: int = 1, *, device="cpu"):
        self.replay = PrioritizedReplayBuffer(rows * num_envs, num_envs, FRAME_SHAPE, n_step=n_step, gamma=GAMMA)
        self.replay.to(device)
        self.oracle = PrioritizedOracle(rows, num_envs, n_step)

    def add(self, rows):
        for row in rows:
            self.replay.add(*row)
            self.oracle.add(row)
        return self

    def update(self, index, losses):
        """Update both with the same float32 losses, and compare them."""
        index, losses = torch.as_tensor(index), torch.as_tensor(losses, dtype=torch.float32)
        self.replay.update_priorities(index.to(self.replay.weight.device), losses)
        self.oracle.update(index.tolist(), losses.tolist())
        self.check()

    def check(self):
        """Compare every weight and the largest weight so far. A place that cannot be drawn has weight 0 exactly."""
        expected = np.zeros(self.replay.weight.numel())
        expected[list(self.oracle.at)] = list(self.oracle.weights().values())
        weight = self.replay.weight.cpu().numpy()
        # A square root may differ from Python's in the last bit, and then be rounded up to the next multiple.
        np.testing.assert_allclose(weight, expected, rtol=0, atol=UNIT)
        np.testing.assert_array_equal(weight > 0, expected > 0)
        np.testing.assert_array_equal(weight, np.round(weight / UNIT) * UNIT)
        assert self.replay.new_weight.item() == pytest.approx(self.oracle.largest, rel=0, abs=UNIT)

    def check_draws(self, batch):
        """Check every transition and its importance weight, 1/sqrt(p) over the largest one in the batch."""
        check_batch(batch, self.oracle, self.oracle.at)
        expected = [1 / math.sqrt(self.oracle.weights()[place]) for place in batch.index.tolist()]
        weights = batch.importance_weights
        assert weights.dtype == torch.float32 and weights.max() == 1
        np.testing.assert_allclose(weights.cpu(), np.array(expected) / max(expected), rtol=1e-6)


def random_losses(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return losses of many magnitudes. One in ten is 0, tiny, huge, infinite or NaN."""
    strange = rng.choice([0.0, 1e-12, 1e4, 1e30, math.inf, -math.inf, math.nan], size)
    return np.where(rng.random(size) < 0.1, strange, rng.lognormal(-1, 2, size))


def random_pair(seed: int, rows: int, num_envs: int, length: int, n_step: int = 1) -> Pair:
    """Return a pair after `length` random rows and one update of every drawable place."""
    rng = np.random.default_rng(seed)
    pair = Pair(rows, num_envs, n_step).add(random_rows(rng, length, num_envs))
    pair.update(list(pair.oracle.at), rng.lognormal(0, 2, len(pair.oracle.at)))
    return pair


def run_stream(seed: int, rows: int, num_envs: int, n_step: int, **more):
    """Check the whole state during four turns of the ring with random draws, updates and cuts."""
    rng, pair = np.random.default_rng(seed), Pair(rows, num_envs, n_step, **more)
    torch.manual_seed(seed)
    for t, row in enumerate(random_rows(rng, 4 * rows + 3, num_envs)):
        pair.add([row])
        if rng.random() < 0.05:
            pair.oracle.cut()
            pair.replay.cut()
        pair.check()
        if pair.oracle.at and rng.random() < 0.7:
            size = int(rng.choice([1, 4, 32]))
            batch = pair.replay.sample(size)
            pair.check_draws(batch)
            pair.update(batch.index, random_losses(rng, size))
            pair.update(rng.integers(0, rows * num_envs, 20), rng.random(20))  # also places that cannot be drawn
        if pair.oracle.at and t % 5 == 0:
            for edge in EDGES:
                assert set(draw_with(pair.replay, [edge] * 7).index.tolist()) <= set(pair.oracle.at)


@pytest.mark.parametrize("n_step", [1, 3, 10])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_random_streams(num_envs: int, n_step: int):
    smallest = 5 + n_step
    for rows in (smallest, 2 * smallest + 1):
        run_stream(100 * rows + num_envs, rows, num_envs, n_step)


@pytest.mark.cuda
def test_random_streams_on_the_gpu():
    run_stream(3, 9, 3, 3, device="cuda")


# --------------------------------------------------------------------------------------------------------------- draws


def test_frequencies_are_proportional_to_weights():
    pair = random_pair(5, 20, 4, 90, n_step=3)
    weights = np.array(list(pair.oracle.weights().values()))
    torch.manual_seed(0)
    for size, batches in ((1, 2000), (32, 200)):
        index = torch.cat([pair.replay.sample(size).index for _ in range(batches)])
        counts = np.bincount(np.searchsorted(list(pair.oracle.at), index.numpy()), minlength=len(weights))
        assert are_likely(counts, weights / weights.sum() * counts.sum())


def test_one_draw_from_each_stratum():
    """Draw k is a place that overlaps the k-th of B strata of equal mass. Equal weights are drawn equally often."""
    pair = random_pair(2, 40, 3, 100)
    places, p = list(pair.oracle.at), np.array(list(pair.oracle.weights().values()))
    ends = np.cumsum(p) / p.sum()
    torch.manual_seed(0)
    for size in (2, 7, 32, 400):
        for _ in range(10):
            drawn, k = np.searchsorted(places, pair.replay.sample(size).index.numpy()), np.arange(size)
            assert (ends[drawn] > k / size - 1e-12).all()
            assert ((ends - p / p.sum())[drawn] < (k + 1) / size + 1e-12).all()
    pair.update(places, [4.0] * len(places))
    assert pair.replay.sample(3 * len(places)).index.tolist() == [place for place in places for _ in range(3)]


def replay_of(units: np.ndarray) -> PrioritizedReplayBuffer:
    """Return a replay with these weights, given as multiples of 2^-20."""
    replay = PrioritizedReplayBuffer(len(units), 4, (1, 1))
    state = replay.state_dict()
    state["weight"] = torch.tensor(units * UNIT)
    replay.load_state_dict(state)
    return replay


def test_draws_among_a_million_places_are_exact():
    """A draw half a unit inside either end of a place's mass hits it, also with tiny weights beside huge ones."""
    rng = np.random.default_rng(0)
    units = np.where(rng.random(1_000_000) < 0.5, 11, rng.integers(0, 2**30, 1_000_000)) * (rng.random(1_000_000) < 0.8)
    replay, ends = replay_of(units), units.cumsum()
    assert replay.weight.cumsum(dim=0)[-1].item() == ends[-1] * UNIT
    drawable = np.flatnonzero(units)
    places = np.concatenate([drawable[[0, 1, -2, -1]], rng.choice(drawable, 100)])
    for mass in (ends[places] - 0.5, ends[places] - units[places] + 0.5):
        assert [draw_with(replay, [draw]).index.item() for draw in mass / ends[-1]] == places.tolist()
    for edge, size in ((edge, size) for edge in EDGES for size in (1, 2, 3, 32, 1000)):
        index = draw_with(replay, [edge] * size).index
        assert (replay.weight[index] > 0).all()


def test_a_draw_and_an_update_read_few_of_a_million_places():
    """Only the cumulative sum and the search in it read all weights. Views and indexing read what they select."""
    replay = replay_of(np.full(1_000_000, 2**20))
    sizes = record_operations(lambda: replay.update_priorities(replay.sample(32).index, torch.rand(32))).largest_input
    large = {name for name in sizes if sizes[name] > 32_768}
    assert large <= {"index", "index_select", "index_copy_", "view", "cumsum", "searchsorted", "select"}


# ------------------------------------------------------------------------------------------------- weights and updates


def test_handmade_weights():
    """Draws, updates and the weight of a new row, in numbers."""
    replay = Pair(30, 2).add(rows_without_ends(15, 2)).replay
    weight, places = replay.weight, torch.arange(28)  # the windows of the newest row are incomplete
    assert torch.equal(replay.sample(28).index, places)  # equal weights are drawn once each
    assert replay.sample(28).importance_weights.tolist() == [1] * 28
    replay.update_priorities(torch.tensor([7, 2, 7, 3, 28]), torch.tensor([4, 0.25, 9, 0, 1e6]))
    # A place drawn twice gets its larger loss. A loss of 0 gives the floor. A place that cannot be drawn stays at 0.
    assert weight[[7, 2, 3, 28, 0]].tolist() == pytest.approx([3, 0.5, FLOOR, 0, 1], rel=1e-5)
    replay.update_priorities(torch.tensor([7]), torch.tensor([0.01]))
    assert weight[7].item() == pytest.approx(0.1, rel=1e-4) and replay.new_weight.item() == pytest.approx(3, rel=1e-5)
    replay.add(*next(rows_without_ends(1, 2)))
    assert weight[[28, 29]].tolist() == pytest.approx([3, 3], rel=1e-5)  # new rows get the largest weight so far
    replay.update_priorities(torch.arange(30), torch.tensor([1.0, 16.0] * 15))
    batch = replay.sample(75)
    expected = [1 if place % 2 == 0 else 0.5 for place in batch.index.tolist()]
    np.testing.assert_allclose(batch.importance_weights, expected, rtol=1e-5)


def test_zero_invalid_and_huge_losses():
    pair = Pair(30, 2).add(rows_without_ends(15, 2))
    places = list(pair.oracle.at)
    for loss in (0.0, -1.0, math.nan, math.inf, -math.inf):  # all are still drawn, equally often
        pair.update(places, [loss] * 28)
        assert pair.replay.weight[places].tolist() == [FLOOR] * 28
        assert pair.replay.sample(28).index.tolist() == places
    pair.update([9], [3e38])
    assert pair.replay.sample(100).index.tolist() == [9] * 100
    pair.update([9], [0.0])
    assert pair.replay.sample(28).index.tolist() == places


def test_losses_are_detached_and_arguments_stay_unchanged():
    """The losses may require a gradient and may be of lower precision."""
    replay = Pair(30, 2).add(rows_without_ends(15, 2)).replay
    index, losses = torch.tensor([13, 4, 13]), torch.tensor([0.25, 4.0, 2.25], requires_grad=True)
    for given in (losses, losses.half()):
        replay.update_priorities(index, given)
        assert not replay.weight.requires_grad and not replay.new_weight.requires_grad
        assert replay.weight[[13, 4]].tolist() == pytest.approx([1.5, 2.0], rel=1e-5)
    assert index.tolist() == [13, 4, 13] and losses.tolist() == [0.25, 4.0, 2.25]


# ------------------------------------------------------------------------------------------- checkpoints and fast path


@pytest.mark.parametrize("moment", [0, 1, 12, 29])
def test_state_dict_round_trip(moment: int):
    """A restored replay continues as the original does, to the bit."""

    def continue_with(replay: PrioritizedReplayBuffer, rows: list):
        torch.manual_seed(5)
        for row in rows:
            replay.add(*row)
            if replay.weight.any():
                batch = replay.sample(16)
                replay.update_priorities(batch.index, batch.reward.abs() * 2)
        return [*replay.buffers(), *replay.sample(64)]

    rows = list(random_rows(np.random.default_rng(moment), moment + 40, 3))
    replay, fresh = (Pair(14, 3, 3).replay for _ in range(2))
    add_rows(replay, rows[:moment])
    if moment == 29:
        replay.update_priorities(replay.sample(4).index, torch.full((4,), 4.0))
    fresh.load_state_dict(replay.state_dict())
    assert fresh.new_weight.item() == (weight_of(4.0) if moment == 29 else 1)
    assert all(map(torch.equal, continue_with(replay, rows[moment:]), continue_with(fresh, rows[moment:])))


def test_state_changes_only_inside_tensors_that_stay_in_place():
    pair = Pair(14, 2, 3)
    before = graph_constants(pair.replay)
    pair.add(random_rows(np.random.default_rng(0), 40, 2))
    pair.update(pair.replay.sample(8).index, [4.0] * 8)
    pair.replay.load_state_dict(pair.replay.state_dict())
    assert graph_constants(pair.replay) == before


def test_operations_do_not_depend_on_values_or_sizes():
    """Meta tensors raise where a value is read. A loop over rows, environments or the batch would add operations."""
    operations = []
    for rows, num_envs, batch_size in ((20, 1, 2), (3000, 4, 64)):
        replay = Pair(rows, num_envs, 10).replay.to("meta")
        index, losses = (torch.zeros(batch_size, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float32))
        calls = (
            (replay.add, *meta_row(num_envs)),
            (replay.sample, batch_size),
            (replay.update_priorities, index, losses),
        )
        operations.append([record_operations(*call).names for call in calls])
    assert operations[0] == operations[1]


@pytest.mark.cuda
def test_adds_draws_and_updates_in_a_cuda_graph():
    """A capture fails if something waits for the device. A replay would repeat a value that was baked in."""
    pair, rng, graph = Pair(12, 3, 3, device="cuda"), np.random.default_rng(0), torch.cuda.CUDAGraph()
    pair.add(rows_without_ends(8, 3))
    losses, static = torch.ones(64, device="cuda"), [torch.tensor(x).cuda() for x in next(rows_without_ends(1, 3))]

    def step():
        pair.replay.add(*static)
        index = pair.replay.sample(64).index
        pair.replay.update_priorities(index, losses)
        return index

    pair.oracle.add(next(rows_without_ends(1, 3)))
    pair.oracle.update(step().tolist(), [1.0] * 64)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        index = step()
    for row in rows_with_ends(rng, rng.random((60, 3)) < 0.2, np.zeros((60, 3), bool)):  # never truncated
        for tensor, x in zip((*static, losses), (*row, random_losses(rng, 64)), strict=True):
            tensor.copy_(torch.tensor(x))
        graph.replay()
        pair.oracle.add(row)
        assert set(index.tolist()) <= set(pair.oracle.at)
        pair.oracle.update(index.tolist(), losses.tolist())
        pair.check()
