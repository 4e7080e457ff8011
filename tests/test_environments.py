"""Tests of environments: Atari against Gymnasium's wrappers, ends of episodes, no-ops, seeds, and frame stacks."""

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch

import der_softmoe
import dqn_softmoe
from dqn_softmoe import Args, Environments, push, reset_seed

gym.register_envs(ale_py)


def make_reference(game_id):
    """Return one environment with the preprocessing of Dopamine and Gymnasium."""
    env = gym.make(game_id, frameskip=1, repeat_action_probability=0.0)
    return gym.wrappers.AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84, grayscale_obs=True)


@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "AsterixNoFrameskip-v0", "ALE/SpaceInvaders-v5"])
def test_frames_rewards_and_ends_match_gymnasium(env_id):
    """The step that ends a game returns the first frame of the next."""
    pytest.importorskip("cv2")
    envs, reference = Environments(Args(env_id=env_id, sticky_actions=0.0), 1), make_reference(env_id)
    frame, expected, games = envs.reset(3), reference.reset(seed=3)[0], 0
    assert envs.frame_shape == (84, 84) and envs.num_actions == reference.action_space.n
    np.testing.assert_array_equal(frame[0], expected)
    rng = np.random.default_rng(0)
    for _ in range(700):
        action = rng.integers(envs.num_actions)
        envs.send(np.array([action]))
        frame, reward, *ends = envs.recv()
        expected, expected_reward, terminated, truncated, _ = reference.step(action)
        assert (reward[0], *(end[0] for end in ends)) == (expected_reward, terminated, truncated, terminated)
        if terminated:
            expected, games = reference.reset()[0], games + 1
        np.testing.assert_array_equal(frame[0], expected)
    assert games >= 1


def play(args, num_envs, num_steps):
    """Play at random from a run's first seed and return what `recv` returned. Later steps must not change frames."""
    envs, rng, steps, copies = Environments(args, num_envs), np.random.default_rng(0), [], []
    envs.reset(reset_seed(args.seed, 0))
    for _ in range(num_steps):
        envs.send(rng.integers(envs.num_actions, size=num_envs))
        steps.append(envs.recv())
        copies.append(steps[-1][0].copy())
    np.testing.assert_array_equal(np.stack([step[0] for step in steps]), np.stack(copies))
    return steps


@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "BankHeistNoFrameskip-v4"])
def test_a_lost_life_ends_the_episode_but_not_the_game(env_id):
    """Both games have five lives. Bank Heist reports 0 lives during the last one."""
    steps = play(Args(env_id=env_id, terminal_on_life_loss=True), 2, 1500)
    terminated, truncated, over = (np.array([step[i] for step in steps]) for i in (2, 3, 4))
    assert (over <= terminated).all() and not truncated.any()
    for lane in range(2):
        ends = [0, *np.flatnonzero(over[:, lane]) + 1]
        assert len(ends) >= 3
        assert all(terminated[a:b, lane].sum() == 5 for a, b in zip(ends, ends[1:], strict=False))


class ScriptedGames:
    """Two games with given steps (terminated, truncated, lives). After an end, ale-py reports the next game's lives."""

    single_action_space, single_observation_space = gym.spaces.Discrete(2), gym.spaces.Box(0, 255, (1, 2, 2), np.uint8)

    def __init__(self, steps):
        self.steps, self.frame = iter(steps), np.zeros((2, 1, 2, 2), np.uint8)

    def reset(self, seed):
        return self.frame, {"lives": np.full(2, 3)}

    def send(self, action):
        pass

    def recv(self):
        terminated, truncated, lives = (np.full(2, value) for value in next(self.steps))
        return self.frame, np.zeros(2), terminated, truncated, {"lives": lives}


LOST, OVER, CUT = (False, False, 2), (True, False, 3), (False, True, 3)
ENDS = {  # steps as ale-py reports them, and terminated, truncated, game over that `recv` returns for the last one
    "no end": ([(False, False, 3)], (False, False, False)),
    "a life lost": ([LOST], (True, False, False)),
    "no end after a life lost": ([LOST, LOST], (False, False, False)),
    "no life left, but the game goes on": ([(False, False, 0)], (True, False, False)),
    "over": ([LOST, OVER], (True, False, True)),
    "over, lives never change": ([OVER], (True, False, True)),  # Adventure
    "over, next game has fewer lives": ([(True, False, 2)], (True, False, True)),
    "a life lost in the next game": ([LOST, OVER, LOST], (True, False, False)),
    "a life gained": ([LOST, (False, False, 4)], (False, False, False)),
    "cut": ([CUT], (False, True, True)),
    "cut after a life lost": ([LOST, CUT], (False, True, True)),
    "over and cut at once": ([(True, True, 3)], (True, False, True)),
}


@pytest.mark.parametrize("steps, expected", ENDS.values(), ids=ENDS)
def test_ends_of_games_with_life_loss(steps, expected, monkeypatch):
    monkeypatch.setattr(dqn_softmoe, "AtariVectorEnv", lambda *_, **__: ScriptedGames(steps))
    envs = Environments(Args(terminal_on_life_loss=True), 2)
    envs.reset(0)
    for _ in steps:
        envs.send(np.zeros(2, dtype=int))
        _, _, *ends = envs.recv()
    assert [end.tolist() for end in ends] == [[flag, flag] for flag in expected]


def test_number_of_no_op_frames_matches_the_authors():
    """The authors' `randint(0, 30)` agent steps are 0 to 116 frames, 58 on average."""

    def frame_numbers(noop_max, resets):
        envs = Environments(Args(noop_max=noop_max), 8).envs
        return np.array([envs.reset(seed=8 * i)[1]["episode_frame_number"] for i in range(resets)])

    (start,) = set(frame_numbers(0, 1).flat)
    assert set((frame_numbers(1, 1) - start).flat) == {0}
    assert set((frame_numbers(2, 5) - start).flat) == {0, 1, 2, 3, 4}
    frames = frame_numbers(30, 12) - start
    assert 0 <= frames.min() <= 3 and 113 <= frames.max() <= 116
    assert frames.mean() == pytest.approx(58, abs=3 * 33.8 / frames.size**0.5)


def test_sticky_actions_and_no_ops_change_the_game_and_seeds_repeat_it():
    def last_frames(**settings):
        return play(Args(**settings), 2, 80)[-1][0]

    first = last_frames()
    np.testing.assert_array_equal(first, last_frames())
    for change in ({"seed": 2}, {"sticky_actions": 0.9}, {"noop_max": 30}):
        assert (last_frames(**change) != first).any(), change


def test_the_frame_limit_of_atari_truncates(monkeypatch):
    monkeypatch.setattr(dqn_softmoe, "MAX_EPISODE_STEPS", 50)
    steps = play(Args(terminal_on_life_loss=True), 1, 100)
    cut = [i for i, (_, _, terminated, truncated, over) in enumerate(steps) if truncated[0] and over[0]]
    assert len(cut) == 2 and cut[1] - cut[0] == 50 and cut[0] in (48, 49)


def test_the_step_limit_of_another_environment_truncates():
    envs = Environments(Args(env_id="pixel_game:PixelCatch-v0"), 2)
    envs.envs.envs[0].unwrapped.balls = 10**6  # endless, so Gymnasium's limit of 1000 steps cuts it
    envs.reset(0)
    cut = []
    for _ in range(1001):
        envs.send(np.ones(2, dtype=np.int64))
        cut.append(tuple(end[0] for end in envs.recv()[2:]))
    assert cut[999] == (False, True, True) and not any(any(ends) for ends in cut[:999] + cut[1000:])


class OneChannelFrames(gym.Env):
    """An environment with frames of shape (1, H, W). Every step ends an episode."""

    observation_space = gym.spaces.Box(0, 255, (1, 6, 5), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full((1, 6, 5), 7, np.uint8), {"lives": 3}

    def step(self, action):
        return np.full((1, 6, 5), action, np.uint8), 2.5 + action, True, False, {"lives": 2}


def test_other_environments_may_have_a_channel_axis_and_lives():
    gym.register("OneChannelFrames-v0", entry_point=OneChannelFrames)
    envs = der_softmoe.Environments(der_softmoe.Args(env_id="OneChannelFrames-v0"), 3)
    assert envs.reset(0).shape == (3, 6, 5) and envs.frame_shape == (6, 5)
    envs.send(np.array([0, 1, 1]))
    frame, reward, terminated, truncated, over = envs.recv()
    assert frame[:, 0, 0].tolist() == [7] * 3 and reward.tolist() == [2.5, 3.5, 3.5]
    assert terminated.all() and over.all() and not truncated.any()


def test_reset_seeds_differ_between_runs_steps_and_evaluation():
    seeds = {reset_seed(s, step, evaluation) for s in range(20) for step in (0, 4, 8) for evaluation in (False, True)}
    assert len(seeds) == 120 and max(seeds) < 2**30


def test_a_stack_holds_the_last_frames_of_the_episode():
    rng, obs = np.random.default_rng(0), torch.zeros(3, 4, 2, 2, dtype=torch.uint8)
    past = [[] for _ in range(3)]
    for t in range(50):
        frame, start = rng.integers(1, 255, (3, 2, 2), dtype=np.uint8), rng.random(3) < 0.3
        assert push(obs, frame, start if t else np.ones(3, bool)) is obs
        for lane in range(3):
            past[lane] = ([] if start[lane] or t == 0 else past[lane]) + [frame[lane]]
            newest = past[lane][-4:]
            expected = [np.zeros((2, 2), np.uint8)] * (4 - len(newest)) + newest
            np.testing.assert_array_equal(obs[lane].numpy(), np.stack(expected))
