"""A small pixel game for the tests, in which a paddle catches falling balls.

Its id is "pixel_game:PixelCatch-v0", for `gym.make` or `--env-id`. This folder must be on the Python path.
"""

import gymnasium as gym
import numpy as np

SIZE = 12  # pixels; the board has SIZE // 2 cells a side


class PixelCatch(gym.Env):
    """Observations are uint8 frames (12, 12). Actions are left, stay, right. A caught ball gives +1, a missed one -1.

    An episode has `balls` balls of 5 steps each, so the best return is `balls`. Standing still gets about -2/3 of it.
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
