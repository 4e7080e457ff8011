"""Evaluate a saved network and print its mean raw return over whole games.

    python scripts/evaluate.py runs/BreakoutNoFrameskip-v4__dqn_softmoe8__seed1 --episodes 100
    python scripts/evaluate.py runs/.../weights/250000.pt

The games are played in parallel and without the noise of noisy layers, as at the end of an online run.
"""

import importlib
import json
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dqn_softmoe


@dataclass
class Options:
    path: Annotated[Path, tyro.conf.Positional]  # run directory, or a weights file in it
    episodes: int = 100  # number of games
    epsilon: float = 0.001  # probability of a random action
    seed: int = 1  # seed of the games and of the random actions
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # JSON file with the return of every game
    cuda: bool = True  # run on the GPU if there is one


def load(path: Path, cuda: bool = False) -> tuple[ModuleType, object, torch.nn.Module, Path]:
    """Load a network and return its script, its Args, itself and its file.

    Of a run directory the file is weights.pt, or else the last one in weights/.
    """
    run = path if path.is_dir() else path.parent.parent if path.parent.name == "weights" else path.parent
    saved = sorted((run / "weights").glob("[0-9]*.pt"), key=lambda file: int(file.stem), reverse=True)
    candidates = [run / "weights.pt", *saved] if path.is_dir() else [path]
    weights = next((file for file in candidates if file.is_file()), None)
    if weights is None or not (run / "config.json").exists():
        raise FileNotFoundError(f"{path}: there is no config.json, or there are no weights")
    config = json.loads((run / "config.json").read_text())
    script = importlib.import_module(Path(config["script"]).stem)
    fields = script.Args.__dataclass_fields__
    args = script.Args(**{name: value for name, value in config["args"].items() if name in fields})
    args.cuda, args.compile = cuda, False
    envs = dqn_softmoe.Environments(args, 1)
    q_network = script.QNetwork(args, (script.STACK_SIZE, *envs.frame_shape), envs.num_actions)
    q_network.load_state_dict(dqn_softmoe.read_file(weights))
    return script, args, q_network.to(script.open_device(args)).eval(), weights


def main(options: Options) -> None:
    if options.episodes < 1:
        raise ValueError("--episodes must be at least 1")
    _, args, q_network, weights = load(options.path, options.cuda)
    args.eval_episodes, args.eval_epsilon = options.episodes, options.epsilon
    returns = dqn_softmoe.evaluate(q_network, args, options.seed, threading.Event())
    mean, std = np.mean(returns).item(), np.std(returns).item()
    print(f"{weights}: mean return {mean:.2f}, standard deviation {std:.2f}, {len(returns)} episodes")
    if options.output:
        result = {"weights": str(weights), "episodes": len(returns), "mean_return": mean, "std_return": std}
        result |= {"epsilon": options.epsilon, "seed": options.seed, "returns": returns}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        dqn_softmoe.write_json(options.output, result)


if __name__ == "__main__":
    with dqn_softmoe.one_line_errors(Exception):
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
