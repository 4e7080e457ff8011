"""Environments: ale-py's vector environment against Gymnasium's wrappers, episode ends, frame stacks."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from dqn_softmoe import Args, Environments, FrameStack, make_envs, reset_seed

gym.register_envs(__import__("ale_py"))


def wrapped(game_id):
    """One environment as Dopamine and Gymnasium preprocess it."""
    env = gym.make(game_id, frameskip=1, repeat_action_probability=0.0)
    return gym.wrappers.AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84, grayscale_obs=True)


@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "PongNoFrameskip-v0", "ALE/SpaceInvaders-v5"])
def test_frames_rewards_and_ends_are_those_of_gymnasium(env_id):
    pytest.importorskip("cv2")
    envs, reference = make_envs(Args(env_id=env_id, sticky_actions=0.0), 1), wrapped(env_id)
    frame, expected = envs.reset(seed=3), reference.reset(seed=3)[0]
    assert envs.frame_shape == (84, 84) and envs.num_actions == reference.action_space.n
    np.testing.assert_array_equal(frame[0], expected)
    rng = np.random.default_rng(0)
    for _ in range(400):
        action = rng.integers(envs.num_actions)
        envs.send(np.array([action]))
        step = envs.recv()
        expected, reward, terminated, truncated, _ = reference.step(action)
        np.testing.assert_array_equal(step.frame[0], expected)
        assert (step.reward[0], step.terminated[0], step.truncated[0]) == (reward, terminated, truncated)
        if terminated:  # the next step ignores its action and returns the first frame
            assert step.game_over[0]
            envs.send(np.array([action]))
            step = envs.recv()
            assert step.reward[0] == 0 and not step.terminated[0]
            np.testing.assert_array_equal(step.frame[0], reference.reset()[0])


def play(args, num_envs, steps, seed=0):
    """Random play; the steps and the frames before each."""
    envs, rng = make_envs(args, num_envs), np.random.default_rng(seed)
    frame, steps_taken = envs.reset(reset_seed(args.seed, 0)), []
    for _ in range(steps):
        envs.send(rng.integers(envs.num_actions, size=num_envs))
        step = envs.recv()
        steps_taken.append((frame.copy(), step))
        frame = step.frame
    return steps_taken


def test_a_lost_life_ends_the_episode_but_not_the_game():
    lives = play(Args(terminal_on_life_loss=True), 2, 700)
    terminated = np.array([step.terminated for _, step in lives])
    over = np.array([step.game_over for _, step in lives])
    assert (over <= terminated).all()
    for lane in range(2):
        ends = np.flatnonzero(over[:, lane])
        assert len(ends) >= 2
        assert terminated[: ends[0] + 1, lane].sum() == 5  # Breakout has five lives
        assert terminated[ends[0] + 1 : ends[1] + 1, lane].sum() == 5


def test_a_game_may_go_on_without_lives():
    """Bank Heist shows 0 lives during its last one: five losses in each game."""
    args = Args(env_id="BankHeistNoFrameskip-v4", terminal_on_life_loss=True, sticky_actions=0.0)
    envs, rng = make_envs(args, 1), np.random.default_rng(0)
    envs.reset(1)
    lost, games = 0, 0
    for _ in range(2000):
        envs.send(rng.integers(envs.num_actions, size=1))
        step = envs.recv()
        lost, games = lost + int(step.terminated[0]), games + int(step.game_over[0])
        if step.game_over[0]:
            assert lost == 5 * games
    assert games >= 2


class Scripted:
    """One game of which each step is given: what ale-py says of its end, and the lives left."""

    num_envs, single_action_space = 1, gym.spaces.Discrete(2)
    single_observation_space = gym.spaces.Box(0, 255, (1, 2, 2), np.uint8)

    def __init__(self, steps):
        self.steps = iter(steps)

    def reset(self, seed):
        return np.zeros((1, 1, 2, 2), np.uint8), {"lives": np.array([3])}

    def step(self, action):
        terminated, truncated, lives = next(self.steps)
        ends = np.array([terminated]), np.array([truncated])
        return np.zeros((1, 1, 2, 2), np.uint8), np.zeros(1), *ends, {"lives": np.array([lives])}


PLAYED, LIMIT = (False, False, 3), 27_000
ENDS = {  # steps as ale-py reports them -> terminated, truncated, game over after the last one
    "nothing": ([PLAYED], (False, False, False)),
    "a life lost": ([(True, False, 2)], (True, False, False)),
    "the last life lost": ([(True, False, 2), (True, False, 1), (True, False, 0)], (True, False, True)),
    "the last life lost, and it goes on": ([(False, False, 0)], (True, False, False)),
    "over without lives": ([(False, False, 0), (True, False, 0)], (True, False, True)),
    "over with the lives it always shows": ([(True, False, 3)], (True, False, True)),  # Adventure
    "cut": ([PLAYED] * (LIMIT - 1) + [(False, True, 3)], (False, True, True)),
    "cut as a life is lost": ([PLAYED] * (LIMIT - 1) + [(True, False, 2)], (True, False, True)),
    "a life lost before the cut": ([PLAYED] * (LIMIT - 2) + [(True, False, 2)], (True, False, False)),
    "the reset is no step of a game": (  # the next game's last but one
        [(True, False, 3)] + [PLAYED] * (LIMIT - 1) + [(True, False, 2)],
        (True, False, False),
    ),
    "cut in the second game": ([(True, False, 3)] + [PLAYED] * LIMIT + [(True, False, 2)], (True, False, True)),
}


@pytest.mark.parametrize("steps, expected", ENDS.values(), ids=ENDS)
def test_ends_of_games_with_life_loss(steps, expected):
    envs = Environments(Scripted(steps), "", life_loss=True)
    envs.reset(0)
    for _ in steps:
        envs.send(np.zeros(1, dtype=int))
        step = envs.recv()
    assert (step.terminated[0], step.truncated[0], step.game_over[0]) == expected


def test_no_ops_are_none_to_the_most():
    def drawn(noop_max):
        envs = make_envs(Args(noop_max=noop_max), 1).envs
        return [int(envs.reset(seed=seed)[1]["episode_frame_number"][0]) for seed in range(40)]

    (none,) = set(drawn(0))
    assert {count - none for count in drawn(2)} == {0, 1, 2}


def test_without_life_loss_only_game_over_terminates():
    steps = play(Args(), 2, 700)
    assert all((step.terminated == step.game_over).all() for _, step in steps)
    assert sum(step.game_over.sum() for _, step in steps) >= 4


def test_sticky_actions_and_no_ops_change_the_game_and_seeds_repeat_it():
    def last(**settings):
        return play(Args(**settings), 2, 100)[-1][0]

    np.testing.assert_array_equal(last(), last())
    assert (last() != last(seed=2)).any()
    assert (last(sticky_actions=0.0) != last(sticky_actions=0.9)).any()
    assert (last(noop_max=30) != last(noop_max=0)).any()


def test_the_frame_limit_truncates():
    envs = make_envs(Args(env_id="pixel_game:PixelCatch-v0"), 2)
    envs.envs.envs[0].unwrapped.balls = 10**6  # endless: Gymnasium's limit of 1000 steps cuts it
    envs.reset(0)
    cut = []
    for _ in range(1001):
        envs.send(np.ones(2, dtype=np.int64))
        step = envs.recv()
        cut.append((step.truncated[0], step.terminated[0], step.game_over[0]))
    assert cut[999] == (True, False, True) and not any(any(flags) for flags in cut[:999] + cut[1000:])


class ThinFrames(gym.Env):
    """Frames of shape (1, H, W)."""

    observation_space = gym.spaces.Box(0, 255, (1, 6, 5), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((1, 6, 5), np.uint8), {"lives": 3}

    def step(self, action):
        return np.full((1, 6, 5), action, np.uint8), 2.5, True, False, {"lives": 3}


def test_other_environments_may_have_a_channel_axis_and_lives():
    gym.register("ThinFrames-v0", entry_point=ThinFrames)
    envs = make_envs(Args(env_id="ThinFrames-v0", terminal_on_life_loss=True), 3)
    assert envs.reset(0).shape == (3, 6, 5) and envs.frame_shape == (6, 5)
    envs.send(np.array([0, 1, 1]))
    step = envs.recv()
    assert step.frame[:, 0, 0].tolist() == [0, 1, 1] and step.reward.tolist() == [2.5] * 3
    assert step.game_over.all()


def test_reset_seeds_differ_between_runs_steps_and_evaluation():
    seeds = {reset_seed(s, step, evaluation) for s in range(20) for step in (0, 4, 8) for evaluation in (False, True)}
    assert len(seeds) == 120 and max(seeds) < 2**30


def test_frame_stack_is_the_list_s():
    rng = np.random.default_rng(0)
    stack = FrameStack(3, (2, 2), torch.device("cpu"))
    past = [[] for _ in range(3)]
    for t in range(50):
        frame, start = rng.integers(1, 255, (3, 2, 2), dtype=np.uint8), rng.random(3) < 0.3
        obs = stack.push(frame, start if t else np.ones(3, bool))
        for lane in range(3):
            past[lane] = ([] if start[lane] or t == 0 else past[lane]) + [frame[lane]]
            newest = past[lane][-4:]
            expected = [np.zeros((2, 2), np.uint8)] * (4 - len(newest)) + newest
            np.testing.assert_array_equal(obs[lane].numpy(), np.stack(expected))
