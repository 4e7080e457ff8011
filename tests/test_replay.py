"""`ReplayBuffer` against a slow oracle that keeps every row ever written in plain lists.

A stream is a table of events (rows, lanes), one word per row and lane:
    "plain"   the episode goes on
    "life"    terminated, and the game goes on in the next row with no reset row in between
    "over"    terminated, then a reset row
    "cut"     truncated, then a reset row
    "both"    terminated and truncated at once, then a reset row
    "quiet"   no flag, and a reset row all the same, as where a run restarts its environments
    "slice"   truncated, and the next row goes on: the window stops, the stack does not
    "reset"   no transition: the ended episode's last frame, with junk for action, reward and flags
Every frame has content of its own, so that a mixed-up row, lane or channel shows.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dqn_softmoe import ReplayBuffer

FRAME_SHAPE = (2, 3)
GAMMA = 0.9
JUNK = 1e9
BEFORE_RESET = ("over", "cut", "both", "quiet")
MASK = 2**48 - 1  # six pixels of eight bits

# Chances in a row of
EVENTS = ("life", "over", "cut", "both", "quiet", "slice", "plain")
STYLES = [
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),  # longer than any ring here
    (0.02, 0.02, 0.02, 0.02, 0.02, 0.0, 0.9),
    (0.3, 0.02, 0.02, 0.0, 0.01, 0.0, 0.65),  # many lost lives
    (0.0, 0.0, 0.3, 0.0, 0.0, 0.1, 0.6),  # truncations only
    (0.15, 0.15, 0.15, 0.1, 0.05, 0.05, 0.35),
    (0.4, 0.15, 0.2, 0.1, 0.1, 0.05, 0.0),  # every row is an end
    (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),  # every row a lost life
]


def number_of(row: int, lane: int, num_envs: int) -> int:
    """A number for a frame, never 0, different for every (row, lane), with all 48 bits in use."""
    return (row * num_envs + lane + 1) * 0x9E3779B1A5 & MASK


def picture(number) -> np.ndarray:
    """(...,) frame numbers -> (..., 2, 3) pixels; 0 is the black frame before an episode's start."""
    number = np.asarray(number, np.int64)
    return (number[..., None] >> np.arange(0, 48, 8) & 255).astype(np.uint8).reshape(*number.shape, *FRAME_SHAPE)


def number_in(pictures: np.ndarray) -> np.ndarray:
    """(..., 2, 3) pixels -> (...,) frame numbers."""
    pixels = pictures.reshape(*pictures.shape[:-2], 6).astype(np.int64)
    return (pixels << np.arange(0, 48, 8)).sum(-1)


class Step(NamedTuple):
    """One row of all lanes, as `ReplayBuffer.add` takes it."""

    frame: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray


class Transition(NamedTuple):
    obs: list[int]  # frame numbers, newest last
    action: int
    reward: float
    discount: float
    next_obs: list[int]


@dataclass
class Row:
    number: int
    action: int
    reward: float
    terminated: bool
    truncated: bool
    valid: bool


class Oracle:
    """Every row ever written, one list per lane; everything is worked out again at each call."""

    def __init__(self, rows: int, num_envs: int, stack_size: int, n_step: int):
        self.rows, self.num_envs, self.stack_size, self.n_step = rows, num_envs, stack_size, n_step
        self.lanes: list[list[Row]] = [[] for _ in range(num_envs)]

    def add(self, step: Step):
        numbers = number_in(step.frame)
        for lane, rows in enumerate(self.lanes):
            rows.append(Row(int(numbers[lane]), *(column[lane].item() for column in step[1:])))

    def oldest(self) -> int:
        """The oldest row that is still in the ring."""
        return max(0, len(self.lanes[0]) - self.rows)

    def stack(self, lane: int, t: int) -> tuple[list[int], int]:
        """The frames seen at row t, and the row of the oldest of them."""
        rows = self.lanes[lane]
        first, frames = t, [rows[t].number]
        while len(frames) < self.stack_size and first > 0 and rows[first - 1].valid and not rows[first - 1].terminated:
            first -= 1
            frames.insert(0, rows[first].number)
        return [0] * (self.stack_size - len(frames)) + frames, first

    def transition(self, lane: int, t: int) -> Transition | None:
        """The transition that starts at row t, or None where there is none to draw."""
        rows = self.lanes[lane]
        obs, first = self.stack(lane, t)
        if not rows[t].valid or first < self.oldest():
            return None
        reward = 0.0
        for k in range(self.n_step):
            after = t + k + 1
            if after == len(rows):
                return None
            reward += GAMMA**k * rows[t + k].reward
            if rows[t + k].terminated or rows[t + k].truncated or not rows[after].valid:
                break
        discount = 0.0 if rows[after - 1].terminated else GAMMA ** (k + 1)
        return Transition(obs, rows[t].action, reward, discount, self.stack(lane, after)[0])

    def drawable(self) -> dict[int, Transition]:
        """Index -> transition."""
        found = {}
        for t in range(self.oldest(), len(self.lanes[0])):
            for lane in range(self.num_envs):
                transition = self.transition(lane, t)
                if transition is not None:
                    found[t % self.rows * self.num_envs + lane] = transition
        return found

    def numbers_in_ring(self) -> list[int]:
        return [row.number for rows in self.lanes for row in rows[self.oldest() :]]


def random_events(
    rng: np.random.Generator, length: int, num_envs: int, cut: int | None = None, cut_as: str = "cut"
) -> list[list[str]]:
    """Each lane follows a style of its own and changes it now and then; after row `cut` all lanes are reset."""
    table = [[""] * num_envs for _ in range(length)]
    for lane in range(num_envs):
        style, last = STYLES[rng.integers(len(STYLES))], "plain"
        for t in range(length):
            if rng.random() < 0.03:
                style = STYLES[rng.integers(len(STYLES))]
            event = str(rng.choice(EVENTS, p=style))
            if t == cut and event in ("plain", "slice"):
                event = cut_as
            if t == cut and event == "life" and cut_as == "cut":
                event = "both"
            if last in BEFORE_RESET or t - 1 == cut:
                event = "reset"
            table[t][lane] = last = event
    return table


def play(events: list[list[str]], rng: np.random.Generator, junk: np.random.Generator | None = None):
    """The steps of a table of events; `junk` fills the rows that are no transitions."""
    junk = rng if junk is None else junk
    for t, event in enumerate(events):
        num_envs = len(event)
        valid = np.array([e != "reset" for e in event])
        coin = junk.random((2, num_envs)) < 0.5
        yield Step(
            frame=picture([number_of(t, lane, num_envs) for lane in range(num_envs)]),
            action=np.where(valid, rng.integers(0, 18, num_envs), junk.integers(0, 18, num_envs)),
            reward=np.where(valid, rng.integers(-16, 17, num_envs) / 8, junk.choice([-JUNK, JUNK], num_envs)),
            terminated=np.where(valid, [e in ("life", "over", "both") for e in event], coin[0]),
            truncated=np.where(valid, [e in ("cut", "both", "slice") for e in event], coin[1]),
            valid=valid,
        )


def make(rows: int, num_envs: int, stack_size: int, n_step: int, spare: int = 0, device: str = "cpu") -> ReplayBuffer:
    capacity = rows * num_envs + spare
    return ReplayBuffer(
        capacity, num_envs, FRAME_SHAPE, stack_size=stack_size, n_step=n_step, gamma=GAMMA, device=device
    )


def check(replay: ReplayBuffer, oracle: Oracle):
    """Length, set of drawn indices, and every drawn element."""
    expected = oracle.drawable()
    assert len(replay) == len(expected)
    if not expected:
        return
    batch = replay.sample(40 * len(expected))
    index = batch.index.cpu().numpy()
    assert set(index.tolist()) == set(expected)
    check_types(batch, 40 * len(expected), oracle.stack_size)
    keys = sorted(expected)
    which = np.searchsorted(keys, index)
    obs, action, reward, discount, next_obs = (
        np.array(column)[which] for column in zip(*(expected[key] for key in keys), strict=True)
    )
    np.testing.assert_array_equal(batch.obs.cpu().numpy(), picture(obs))
    np.testing.assert_array_equal(batch.action.cpu().numpy(), action)
    np.testing.assert_allclose(batch.reward.cpu().numpy(), reward, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(batch.discount.cpu().numpy(), discount, rtol=1e-6, atol=0)  # 0 is exact
    got = batch.next_obs.cpu().numpy()
    ended = discount == 0
    np.testing.assert_array_equal(got[~ended], picture(next_obs[~ended]))
    assert np.isin(number_in(got[ended]), [0, *oracle.numbers_in_ring()]).all()


def check_types(batch, size: int, stack_size: int):
    frames = (size, stack_size, *FRAME_SHAPE)
    shapes = {
        "obs": (frames, torch.uint8),
        "action": ((size,), torch.int64),
        "reward": ((size,), torch.float32),
        "discount": ((size,), torch.float32),
        "next_obs": (frames, torch.uint8),
        "index": ((size,), torch.int64),
    }
    for name, (shape, dtype) in shapes.items():
        value = getattr(batch, name)
        assert (tuple(value.shape), value.dtype) == (shape, dtype), name


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def seeded_sample(replay: ReplayBuffer, seed: int, size: int = 256):
    torch.manual_seed(seed)
    return replay.sample(size)


def run_stream(seed: int, rows: int, num_envs: int, stack_size: int, n_step: int, device: str = "cpu"):
    """Five turns of the ring: the length after every row, everything else at random moments."""
    rng = np.random.default_rng(seed)
    replay = make(rows, num_envs, stack_size, n_step, spare=int(rng.integers(num_envs)), device=device)
    oracle = Oracle(rows, num_envs, stack_size, n_step)
    for step in play(random_events(rng, 5 * rows + 3, num_envs), rng):
        replay.add(*step)
        oracle.add(step)
        if rng.random() < 0.15:
            check(replay, oracle)
        else:
            assert len(replay) == len(oracle.drawable())
    check(replay, oracle)


@pytest.mark.parametrize("stack_size", [1, 2, 4])
@pytest.mark.parametrize("n_step", [1, 3, 10])
@pytest.mark.parametrize("num_envs", [1, 2, 3, 4])
def test_random_streams(num_envs: int, n_step: int, stack_size: int):
    smallest = stack_size + n_step + 1
    for rows, seeds in ((smallest, 3), (smallest + 1, 2), (smallest + 2, 1), (2 * smallest + 3, 1)):
        for seed in range(seeds):
            run_stream(1000 * rows + seed, rows, num_envs, stack_size, n_step)


@pytest.mark.parametrize("n_step, stack_size", [(1, 1), (1, 4), (10, 4)])
def test_too_small_a_ring_is_refused(n_step: int, stack_size: int):
    for rows in range(n_step + stack_size):
        with pytest.raises(ValueError):
            make(rows, 2, stack_size, n_step)


@pytest.mark.cuda
@pytest.mark.parametrize("n_step", [1, 3])
def test_random_streams_on_the_gpu(n_step: int):
    run_stream(n_step, 4 + n_step + 2, 3, 4, n_step, device="cuda")


@pytest.mark.cuda
def test_sample_in_a_cuda_graph_sees_later_rows():
    """Capturing fails where something waits for the device; replaying would repeat whatever was baked in."""
    rng = np.random.default_rng(0)
    replay, oracle = make(9, 3, 4, 3, device="cuda"), Oracle(9, 3, 4, 3)
    graph, index = torch.cuda.CUDAGraph(), None
    for t, step in enumerate(play(random_events(rng, 60, 3), rng)):
        replay.add(*step)
        oracle.add(step)
        if t == 5:
            replay.sample(4000)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                index = replay.sample(4000).index
        if t >= 5:
            graph.replay()
            assert set(index.tolist()) == set(oracle.drawable())


@pytest.mark.parametrize("rows, stack_size, n_step", [(7, 4, 1), (7, 3, 3), (8, 2, 5)])
def test_every_pattern_of_ends(rows: int, stack_size: int, n_step: int):
    """One lane for each of the 4^5 patterns of five events, repeated until the ring has turned over."""
    patterns = list(itertools.product(("plain", "life", "cut", "slice"), repeat=5))
    lanes = []
    for pattern in patterns:
        lane = list(itertools.chain.from_iterable((e, "reset") if e in BEFORE_RESET else (e,) for e in pattern))
        lanes.append((lane * 4)[: 2 * rows + 1])
    events = [list(row) for row in zip(*lanes, strict=True)]
    replay, oracle = make(rows, len(lanes), stack_size, n_step), Oracle(rows, len(lanes), stack_size, n_step)
    for t, step in enumerate(play(events, np.random.default_rng(0))):
        replay.add(*step)
        oracle.add(step)
        if t in (0, 3, rows - 1, rows, rows + 1, 2 * rows):
            check(replay, oracle)


def test_a_short_story():
    """What the contract means, in numbers: three rows, a game over, its reset row, and the next episode's first row."""
    replay = ReplayBuffer(100, 1, (1, 1), stack_size=2, n_step=2, gamma=0.5)
    for t, (reward, over) in enumerate([(1.0, False), (2.0, False), (4.0, True), (JUNK, True), (8.0, False)]):
        frame = np.full((1, 1, 1), 10 + t, np.uint8)
        replay.add(frame, np.array([t]), np.array([reward]), np.array([over]), np.array([False]), np.array([t != 3]))
    assert len(replay) == 3  # rows 0, 1, 2; row 3 is the reset row, and what came of row 4 is not known yet
    batch = replay.sample(200)
    story = {
        index: (obs, action, reward, discount)
        for index, obs, action, reward, discount in zip(
            batch.index.tolist(),
            batch.obs.flatten(1).tolist(),
            batch.action.tolist(),
            batch.reward.tolist(),
            batch.discount.tolist(),
            strict=True,
        )
    }
    assert story == {0: ([0, 10], 0, 2.0, 0.25), 1: ([10, 11], 1, 4.0, 0.0), 2: ([11, 12], 2, 4.0, 0.0)}
    assert set(batch.next_obs[batch.index == 0].flatten(1).flatten().tolist()) == {11, 12}


def test_stack_that_starts_at_the_oldest_row_of_the_ring():
    """The row that ended the episode before is gone from the ring, the whole new episode is there."""
    rows = 8
    replay, oracle = make(rows, 1, 4, 1), Oracle(rows, 1, 4, 1)
    events = [["life"], *[["plain"]] * 12]
    for t, step in enumerate(play(events, np.random.default_rng(0))):
        replay.add(*step)
        oracle.add(step)
        if t == rows:  # rows 1..8 are in the ring, and row 1 starts a stack
            assert set(replay.sample(400).index.tolist()) == {1, 2, 3, 4, 5, 6, 7}
        if t == rows + 1:  # row 1 has gone, and the stacks of rows 2, 3 and 4 with it
            assert set(replay.sample(400).index.tolist()) == {5, 6, 7, 0}
        check(replay, oracle)


@pytest.mark.parametrize("cut_as", ["cut", "quiet"])
@pytest.mark.parametrize("cut", [0, 1, 5, 12, 13, 14, 29])
def test_forced_cut(cut: int, cut_as: str):
    """A run that restarts its environments writes one row that is no transition in all lanes, whatever they are at."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        replay, oracle = make(13, 4, 4, 3), Oracle(13, 4, 4, 3)
        events = random_events(rng, 45, 4, cut, cut_as)
        assert events[cut + 1] == ["reset"] * 4
        for t, step in enumerate(play(events, rng)):
            if t == cut and cut_as == "cut":
                step = step._replace(truncated=np.ones(4, bool))
            replay.add(*step)
            oracle.add(step)
            if cut - 1 <= t <= cut + 16:
                check(replay, oracle)


def chi_square_z(counts: np.ndarray) -> float:
    """Chi-square of equal expected counts as a standard normal score (Wilson and Hilferty)."""
    expected, freedom = counts.mean(), len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.mark.parametrize("seed", range(6))
def test_uniform(seed: int):
    """Every drawable transition is equally likely, however unevenly they lie over rows and lanes."""
    rng = np.random.default_rng(seed)
    rows, length = 24, 24 + 9 * seed
    events = random_events(rng, length, 3)
    for t in range(length):
        events[t][0] = ("both", "reset")[t % 2]
    replay, oracle = make(rows, 3, 4, 3), Oracle(rows, 3, 4, 3)
    for step in play(events, rng):
        replay.add(*step)
        oracle.add(step)
    drawable = sorted(oracle.drawable())
    torch.manual_seed(seed)
    index = torch.cat([replay.sample(500).index for _ in range(len(drawable))]).numpy()
    counts = np.bincount(index, minlength=rows * 3)
    assert counts.sum() == counts[drawable].sum()
    assert chi_square_z(counts[drawable]) < 3.72  # p > 1e-4


def test_every_transition_of_a_large_ring_can_be_drawn():
    """A million transitions, two million draws: all but a share e^-2 of them turn up."""
    lanes, rows = 1000, 1002
    replay = ReplayBuffer(lanes * rows, lanes, (1, 1), stack_size=1, n_step=1)
    no, zero = np.zeros(lanes, bool), np.zeros(lanes)
    for t in range(rows):
        replay.add(np.full((lanes, 1, 1), t % 256, np.uint8), np.full(lanes, t % 18), zero + t, no, no)
    count = len(replay)
    assert count == lanes * (rows - 1)
    torch.manual_seed(0)
    index, rewards = [], []
    for _ in range(8):
        batch = replay.sample(count // 4)
        index.append(batch.index)
        rewards.append(batch.reward)
    index = torch.cat(index)
    assert torch.equal(torch.cat(rewards), (index // lanes).float())
    assert abs(len(index.unique()) / count - (1 - np.exp(-2))) < 0.003
    assert chi_square_z(torch.bincount(index // lanes).numpy()[: rows - 1]) < 3.72
    assert chi_square_z(torch.bincount(index % lanes).numpy()) < 3.72
    # Float32 has 2^24 numbers between 0 and 1 to draw from: 16 for some places, 17 for others.
    likelier = (torch.arange(2**24) / 2**24 * count).long().bincount()[:count] > 2**24 // count
    share, draws = likelier.double().mean(), len(index)
    for place in (index, index % lanes * (rows - 1) + index // lanes):  # in order of rows, of lanes
        assert abs(likelier[place].double().mean() - share) < 5 * (share * (1 - share) / draws) ** 0.5


def test_junk_in_rows_that_are_no_transitions_never_leaks():
    events = random_events(np.random.default_rng(3), 60, 4, cut=31)
    replays = [make(13, 4, 4, 3) for _ in range(2)]
    steps = [play(events, np.random.default_rng(0), np.random.default_rng(1 + i)) for i in range(2)]
    for t, pair in enumerate(zip(*steps, strict=True)):
        for replay, step in zip(replays, pair, strict=True):
            replay.add(*step)
        assert len(replays[0]) == len(replays[1])
        if len(replays[0]):
            assert same(seeded_sample(replays[0], t), seeded_sample(replays[1], t))


def as_uint8(step: Step) -> Step:
    return step._replace(
        **{name: getattr(step, name).astype(np.uint8) for name in ("terminated", "truncated", "valid")}
    )


def as_torch(step: Step) -> Step:
    return Step(*(torch.from_numpy(np.ascontiguousarray(column)) for column in step))


def as_emulator(step: Step) -> Step:
    return step._replace(action=step.action.astype(np.int32), reward=step.reward.astype(np.float32))


def test_kinds_of_arrays_make_no_difference():
    rng = np.random.default_rng(5)
    kinds = [
        lambda step: step,
        as_uint8,
        as_torch,
        as_emulator,
        lambda step: as_torch(as_uint8(step)),
        lambda step: as_torch(as_emulator(step)),
    ]
    replays = [make(13, 3, 4, 3) for _ in kinds]
    for t, step in enumerate(play(random_events(rng, 40, 3), rng)):
        for replay, kind in zip(replays, kinds, strict=True):
            replay.add(*kind(step))
        if t % 3 == 2 and len(replays[0]):
            batches = [seeded_sample(replay, t) for replay in replays]
            assert all(same(batches[0], batch) for batch in batches[1:])


def test_valid_is_true_unless_said_otherwise():
    replays = [make(11, 2, 4, 3) for _ in range(2)]
    rng = np.random.default_rng(6)
    for step in play([[str(event) for event in rng.choice(["plain", "life"], 2)] for _ in range(30)], rng):
        replays[0].add(*step)
        replays[1].add(*step[:-1])
    assert len(replays[0]) == len(replays[1]) > 0
    assert same(seeded_sample(replays[0], 0), seeded_sample(replays[1], 0))


@pytest.mark.parametrize("kind", [lambda step: step, as_torch], ids=["numpy", "torch"])
def test_arrays_may_be_used_again(kind):
    """Environments write each step into the same memory, and a batch outlives later rows."""
    rng = np.random.default_rng(7)
    replay, oracle = make(11, 2, 4, 3), Oracle(11, 2, 4, 3)
    memory, kept = None, None
    for t, step in enumerate(play(random_events(rng, 50, 2), rng)):
        memory = Step(*(column.copy() for column in step)) if memory is None else memory
        for place, column in zip(memory, step, strict=True):
            place[...] = column
        replay.add(*kind(memory))
        oracle.add(step)
        for place in memory:
            place[...] = 1
        check(replay, oracle)
        if t == 20:
            kept = replay.sample(64)
            before = [value.clone() for value in kept]
    assert same(kept, before)


def fixtures(replay: ReplayBuffer) -> dict:
    """All that a CUDA graph bakes in: where the tensors lie, and the values of everything else."""
    return {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in vars(replay).items()}


def test_state_changes_only_inside_tensors_that_stay_in_place():
    rng = np.random.default_rng(8)
    replay = make(11, 2, 4, 3)
    before = fixtures(replay)
    for step in play(random_events(rng, 40, 2), rng):
        replay.add(*step)
    replay.sample(8)
    replay.load_state_dict({name: value.clone() for name, value in replay.state_dict().items()})
    assert fixtures(replay) == before


@pytest.mark.parametrize("moment", [0, 1, 3, 12, 13, 14, 20, 26, 40])
def test_state_dict_round_trip(moment: int):
    """Two copies of one checkpoint go on as the original does, and neither touches the other."""
    rng = np.random.default_rng(moment)
    replay, oracle = make(13, 3, 4, 3), Oracle(13, 3, 4, 3)
    steps = list(play(random_events(rng, moment + 30, 3), rng))
    for step in steps[:moment]:
        replay.add(*step)
        oracle.add(step)
    state = {name: value.clone() for name, value in replay.state_dict().items()}
    copies = [make(13, 3, 4, 3) for _ in range(2)]
    for copy in copies:
        copy.load_state_dict(state)
        check(copy, oracle)
    for t, step in enumerate(steps[moment:]):
        replay.add(*step)
        copies[0].add(*step)
        assert len(copies[0]) == len(replay)
        if len(replay):
            assert same(seeded_sample(copies[0], t), seeded_sample(replay, t))
    check(copies[1], oracle)
    for step in steps[moment:]:
        copies[1].add(*step)
        oracle.add(step)
    for each in (replay, *copies):
        check(each, oracle)


def test_state_dict_holds_only_what_was_written():
    """100 frames of 400 bytes, where the whole ring has 40 MB."""
    replay = ReplayBuffer(100_000, 2, (20, 20), stack_size=4, n_step=3)
    no = np.zeros(2, bool)
    for _ in range(50):
        replay.add(np.zeros((2, 20, 20), np.uint8), np.zeros(2, np.int64), np.zeros(2), no, no)
    assert 40_000 <= sum(value.nbytes for value in replay.state_dict().values()) < 2_000_000
