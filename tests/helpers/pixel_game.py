"""A small game of pixels for the tests: a ball falls, a paddle catches it.

`gym.make("pixel_game:PixelCatch-v0")` or `--env-id pixel_game:PixelCatch-v0` with this folder on the path.
"""

import gymnasium as gym
import numpy as np

SIZE = 12  # pixels; the board has SIZE // 2 cells a side


class PixelCatch(gym.Env):
    """Single uint8 frames (12, 12); actions left, stay, right; +1 for a ball caught, -1 for one missed.

    An episode is `balls` balls of 5 steps each, so the best return is `balls`; standing still gets about -2/3 of it.
    """

    observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, balls: int = 4):
        self.balls = balls

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.dropped, self.paddle = 0, SIZE // 4
        self._drop()
        return self._frame(), {}

    def _drop(self):
        self.row, self.column = 0, int(self.np_random.integers(SIZE // 2))

    def _frame(self):
        frame = np.zeros((SIZE // 2, SIZE // 2), dtype=np.uint8)
        frame[-1, self.paddle] = 128
        frame[self.row, self.column] = 255
        return frame.repeat(2, axis=0).repeat(2, axis=1)

    def step(self, action):
        self.paddle = int(np.clip(self.paddle + action - 1, 0, SIZE // 2 - 1))
        self.row += 1
        reward = 0.0
        if self.row == SIZE // 2 - 1:
            reward = 1.0 if self.column == self.paddle else -1.0
            self.dropped += 1
            if self.dropped < self.balls:
                self._drop()
        return self._frame(), reward, self.dropped == self.balls, False, {}


gym.register("PixelCatch-v0", entry_point=PixelCatch, max_episode_steps=1000)
