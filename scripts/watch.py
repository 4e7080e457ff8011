"""A video of a game as the network plays it: the screen, where each expert looks, Q-values, return.

    python scripts/watch.py runs/BreakoutNoFrameskip-v4__dqn_softmoe8__seed1 -o breakout.mp4

Two emulators with one seed and the same actions play the very same game, one for the network, one in colour; they are
compared at every step. An expert's picture is the frame, lit where the tokens are that its slots read (dispatch
weights, averaged over slots), for the tokenizations that have places: PerConv and PerPatch. Dense layers have none.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ale_py
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from evaluate import load  # which puts the agents on the path
from tqdm import tqdm

import dqn_softmoe

try:
    import imageio_ffmpeg
    from PIL import Image, ImageDraw
except ImportError as error:
    print(f"error: {error}; pip install -r scripts/requirements.txt", file=sys.stderr)
    raise SystemExit(2) from None

HEIGHT, WIDTH, TILE = 420, 320, 120  # of the screen, twice as large as the console's, and of an expert's picture


@dataclass
class Options:
    path: Annotated[Path, tyro.conf.Positional]  # run directory, or a file of weights in one
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("game.mp4")  # the video
    steps: int = 2_000  # agent steps at most; 15 are a second
    epsilon: float = 0.001  # share of random actions
    seed: int = 1  # of game and random actions


def looks(output, tokenization: str) -> np.ndarray:
    """Where experts look, (E, h, w), 1 where the most; empty where tokens have no places."""
    if output is None or tokenization not in ("PerConv", "PerPatch", "PerPatchAvg"):
        return np.zeros((0, 1, 1))
    dispatch = output.routing.dispatch_weights[0].mean(dim=2).T  # (E, T)
    side = math.isqrt(dispatch.shape[1])
    maps = (dispatch / dispatch.amax(dim=1, keepdim=True).clamp_min(1e-9)).view(-1, side, side)
    if tokenization != "PerConv":
        maps = maps.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
        rest = 2 if side == 3 else 0  # of 11 rows and columns, the last two are in no patch
        maps = torch.nn.functional.pad(maps, (0, rest, 0, rest))
    return maps.numpy()


def picture(screen: np.ndarray, frame: np.ndarray, maps: np.ndarray, q_values: np.ndarray, names, text: str) -> Image:
    """One frame of the video."""
    columns = -(-len(maps) // 3)
    canvas = Image.new("RGB", (WIDTH + TILE * columns + 160, HEIGHT))
    canvas.paste(Image.fromarray(screen).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))
    draw, grey = ImageDraw.Draw(canvas), Image.fromarray(frame).resize((TILE - 4, TILE - 4))
    for i, heat in enumerate(maps):
        light = Image.fromarray((255 * heat).astype(np.uint8)).resize(grey.size, Image.Resampling.BILINEAR)
        dark = Image.merge("RGB", [grey.point(lambda v: v // 3)] * 3)
        lit = Image.merge("RGB", [grey.point(lambda v: min(255, v + 90)), grey, grey.point(lambda v: v // 2)])
        place = (WIDTH + 2 + TILE * (i // 3), 2 + 140 * (i % 3))
        canvas.paste(Image.composite(lit, dark, light), place)
        draw.text((place[0], place[1] + TILE - 4), f"expert {i}", fill="white")
    left, low, high = WIDTH + TILE * columns + 8, q_values.min(), q_values.max()
    for i, (name, value) in enumerate(zip(names, q_values, strict=True)):
        share, top = (value - low) / max(high - low, 1e-9), 24 + i * min(20, 380 // len(names))
        draw.rectangle((left + 70, top, left + 72 + 40 * share, top + 8), fill="white" if value == high else "grey")
        draw.text((left, top - 2), name, fill="white")
        draw.text((left + 116, top - 2), f"{value:.2f}", fill="white")
    draw.text((left, 4), text, fill="white")
    return canvas


@torch.no_grad()
def main(options: Options) -> None:
    if options.steps < 1:
        raise ValueError("--steps must be at least 1")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    script, args, q_network, _ = load(options.path)
    envs = dqn_softmoe.Environments(args, 1)
    if not envs.game:
        raise ValueError(f"--env-id {args.env_id}: only Atari games have colours to show")
    same = {"repeat_action_probability": args.sticky_actions, "use_fire_reset": False}
    same |= {"noop_max": max(4 * args.noop_max - 3, 1)}  # as in `Environments`
    look = {"img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1, "reward_clipping": False}
    colour = AtariVectorEnv(envs.game, 1, **same, **look, num_threads=1)
    frame, screen = envs.reset(options.seed), colour.reset(seed=options.seed)[0]
    obs, start, total = torch.zeros(1, script.STACK_SIZE, *envs.frame_shape, dtype=torch.uint8), np.ones(1, bool), 0.0
    ale = ale_py.ALEInterface()
    ale.loadROM(ale_py.roms.get_rom_path(envs.game))
    names, writer = [action.name for action in ale.getMinimalActionSet()], None
    torch.manual_seed(options.seed)
    for step in tqdm(range(options.steps), unit="step", dynamic_ncols=True):
        script.push(obs, frame, start)
        _, output = q_network(obs)
        q_values = q_network.q_values(obs)
        action = script.select_actions(q_values, options.epsilon).numpy()
        image = picture(
            screen.reshape(210, 160, 3),
            obs[0, -1].numpy(),
            looks(output, args.tokenization),
            q_values[0].numpy(),
            names,
            f"step {step}, return {total:g}",
        )
        if writer is None:
            writer = imageio_ffmpeg.write_frames(str(options.output), image.size, fps=15, macro_block_size=4)
            writer.send(None)
        writer.send(np.asarray(image))
        envs.send(action)
        frame, reward, terminated, truncated, over = envs.recv()
        screen, twin, *_ = colour.step(action)
        if reward[0] != twin[0]:
            raise RuntimeError(f"the two emulators part at step {step}")
        total, start = total + reward[0], terminated | truncated
        if over[0]:
            break
    writer.close()
    print(f"{options.output}: return {total:g} in {step + 1} steps, {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with dqn_softmoe.one_line_errors(Exception):
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
