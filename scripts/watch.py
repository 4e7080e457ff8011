"""Record a video of a game as the network plays it: the screen, where each expert looks, Q-values and the return.

    python scripts/watch.py runs/BreakoutNoFrameskip-v4__dqn_softmoe8__seed1 -o breakout.mp4
    python scripts/watch.py runs/BreakoutNoFrameskip-v4__dqn_softmoe8__seed1 -o breakout.gif --steps 150

Two emulators play the same game with the same seed and the same actions. One shows the network its grey frames, the
other draws the screen in colour. Their rewards are compared at every step. The picture of an expert is the newest
frame, lit where the tokens are that its slots read most: the dispatch weights, averaged over slots, as multiples of
equal weights. The numbers below it are those of the darkest and the brightest place. Only PerConv and PerPatch tokens
have places in the frame, and dense layers have no experts.
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

FPS = 15  # agent steps per second, as on the console
HEIGHT, WIDTH = 420, 320  # of the screen, twice as large as the console's
TILE = 120  # side of an expert's picture
GIF = {"codec": "gif", "pix_fmt_out": "pal8", "macro_block_size": 1}
GIF["output_params"] = ["-vf", "split[a][b];[a]palettegen=max_colors=32[p];[b][p]paletteuse=dither=none"]


@dataclass
class Options:
    path: Annotated[Path, tyro.conf.Positional]  # run directory, or a file of weights in one
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("game.mp4")  # the video: .mp4, or .gif
    steps: int = 2_000  # largest number of agent steps; 15 are a second
    epsilon: float = 0.001  # probability of a random action
    seed: int = 1  # seed of the game and of random actions


def expert_maps(output, tokenization: str) -> np.ndarray:
    """Return the weight of each place in each expert, (E, h, w), divided by the mean. E is 0 where there is no map."""
    if output is None or tokenization not in ("PerConv", "PerPatch", "PerPatchAvg"):
        return np.zeros((0, 1, 1))
    dispatch = output.routing.dispatch_weights[0].mean(dim=2).T  # (E, T)
    side = math.isqrt(dispatch.shape[1])
    maps = (dispatch / dispatch.mean(dim=1, keepdim=True).clamp_min(1e-9)).view(-1, side, side)
    if tokenization != "PerConv":
        maps = maps.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
        rest = 2 if side == 3 else 0  # the last two of 11 rows and columns are in no patch
        maps = torch.nn.functional.pad(maps, (0, rest, 0, rest))
    return maps.numpy()


def draw(screen: np.ndarray, frame: np.ndarray, maps: np.ndarray, q_values: np.ndarray, names, text: str) -> Image:
    """Draw one picture of the video: the screen, the experts' maps over the frame, and the Q-values."""
    columns = -(-len(maps) // 3)
    canvas = Image.new("RGB", (WIDTH + TILE * columns + 160, HEIGHT))
    canvas.paste(Image.fromarray(screen).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))
    pen, grey = ImageDraw.Draw(canvas), Image.fromarray(frame).resize((TILE - 4, TILE - 4))
    dark = Image.merge("RGB", [grey.point(lambda v: v // 3)] * 3)
    lit = Image.merge("RGB", [grey.point(lambda v: min(255, v + 150)), grey, grey.point(lambda v: v // 2)])
    for i, values in enumerate(maps):
        low, high = values.min(), values.max()
        light = Image.fromarray((255 * (values - low) / max(high - low, 1e-9)).astype(np.uint8))
        place = (WIDTH + 2 + TILE * (i // 3), 2 + 140 * (i % 3))
        canvas.paste(Image.composite(lit, dark, light.resize(grey.size, Image.Resampling.NEAREST)), place)
        pen.text((place[0], place[1] + TILE - 4), f"expert {i}: {low:.2f} to {high:.2f}", fill="white")
    left, low, high = WIDTH + TILE * columns + 8, q_values.min(), q_values.max()
    for i, (name, value) in enumerate(zip(names, q_values, strict=True)):
        share, top = (value - low) / max(high - low, 1e-9), 24 + i * min(20, 380 // len(names))
        pen.rectangle((left + 70, top, left + 72 + 40 * share, top + 8), fill="white" if value == high else "grey")
        pen.text((left, top - 2), name, fill="white")
        pen.text((left + 116, top - 2), f"{value:.2f}", fill="white")
    pen.text((left, 4), text, fill="white")
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
        maps, text = expert_maps(output, args.tokenization), f"step {step}, return {total:g}"
        picture = draw(screen.reshape(210, 160, 3), obs[0, -1].numpy(), maps, q_values[0].numpy(), names, text)
        if writer is None:
            form = GIF if options.output.suffix == ".gif" else {"macro_block_size": 4}
            writer = imageio_ffmpeg.write_frames(str(options.output), picture.size, fps=FPS, **form)
            writer.send(None)
        writer.send(np.asarray(picture))
        envs.send(action)
        frame, reward, terminated, truncated, over = envs.recv()
        screen, twin, *_ = colour.step(action)
        if reward[0] != twin[0]:
            raise RuntimeError(f"the two emulators differ at step {step}")
        total, start = total + reward[0], terminated | truncated
        if over[0]:
            break
    writer.close()
    print(f"{options.output}: return {total:g} in {step + 1} steps, {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with dqn_softmoe.one_line_errors(Exception):
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
