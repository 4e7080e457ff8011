"""Collect the scores of run directories in one CSV file.

    python scripts/collect.py runs/* -o results.csv
    python scripts/collect.py --list fig4.list -o results.csv

Each row is one score of a run: the mean return of an iteration, or of the evaluation after training. Its columns are:
game, agent, layer, num_experts, seed: the agent of der_softmoe.py with the flags of DrQ(eps) is "DrQ(eps)", and that of
  cql_softmoe.py without distributional is "CQL".
<flag>: every flag that at least one run changes from the default of its agent.
parameters, <part>_parameters: number of parameters of the network, and of its encoder, layer and head.
iteration, step, frames: an iteration "eval" is the evaluation. Steps are agent steps, or updates in offline training.
score, normalized: raw score, and human-normalised score in % (random play is 0; empty if no human score is known).
With --list, the runs are those that a list of commands names with --runs-dir and --run-name.
Missing, damaged, unfinished and duplicate runs are left out and reported. The report also names missing seeds.
"""

import csv
import functools
import importlib
import itertools
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
AGENTS = {"dqn_softmoe": "DQN", "rainbow_softmoe": "Rainbow", "der_softmoe": "DER", "cql_softmoe": "CQL+C51"}
DRQ_EPS = {"distributional": False, "noisy": False, "prioritized": False, "augment": True}
DRQ_EPS |= {"target_network_frequency": 1, "epsilon_decay_steps": 5_000}
# Agents that are another agent with some flags changed: their names and these flags.
VARIANTS = {"DER": ("DrQ(eps)", DRQ_EPS), "CQL+C51": ("CQL", {"distributional": False})}
# Flags that do not tell methods apart, or that have a column of their own.
NOT_SETTINGS = """env_id seed layer num_experts runs_dir run_name resume cuda compile cuda_graphs replay_device
dataset_dir cache_dir checkpoint_every checkpoint_at_end weights_every save_replay eval_episodes""".split()
PARTS = {"encoder": "encoder", "tokenizer": "layer", "moe": "layer"}  # all other modules belong to the head
PARAMETERS = ["parameters", "encoder_parameters", "layer_parameters", "head_parameters"]
SCORES = ["iteration", "step", "frames", "score", "normalized"]


@dataclass
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # run directories
    list: Path | None = None  # file with a command per line, whose runs are collected
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("results.csv")  # CSV file to write
    unfinished: bool = False  # also collect unfinished runs


@functools.cache
def human_scores() -> dict[str, tuple[float, float]]:
    """Return the random and the human score of every game for which a human score was published."""
    with open(ROOT / "scripts" / "atari_scores.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["human"]]
    return {row["game"]: (float(row["random"]), float(row["human"])) for row in rows}


def game_of(env_id: str) -> str:
    """Return the game's name. It is Breakout for BreakoutNoFrameskip-v4, Breakout-v4 and ALE/Breakout-v5."""
    name = env_id.rpartition("/")[2].rpartition(":")[2].rpartition("-v")[0]
    return name.removesuffix("NoFrameskip")


def runs_of_list(path: Path) -> list[Path]:
    """Return the run directories of the commands in the file `path`."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if words := shlex.split(line, comments=True):
            flags = dict(itertools.pairwise(words))
            if "--run-name" not in flags:
                raise ValueError(f"{path}: line {number} has no --run-name")
            found.append(Path(flags.get("--runs-dir", "runs"), flags["--run-name"]))
    return found


def agent_and_defaults(script, args: dict) -> tuple[str, dict]:
    """Return the name of the agent that was run with `args`, and the default of every flag of this agent."""
    name, changed = AGENTS[script.__name__], {}
    variant, flags = VARIANTS.get(name, (name, {}))
    if flags.items() <= args.items():
        name, changed = variant, flags
    return name, vars(script.Args(layer=args["layer"], **changed))


@functools.cache
def environment_sizes(script, env_id: str) -> tuple[tuple[int, int, int], int] | None:
    """Return the shape of observations and the number of actions, or None if the environment cannot be made here."""
    try:
        envs = script.Environments(script.Args(env_id=env_id), 1)
    except Exception:
        return None
    return (script.STACK_SIZE, *envs.frame_shape), envs.num_actions


@functools.cache
def count_parameters(script, obs_shape: tuple[int, int, int], num_actions: int, **flags) -> list[int]:
    """Return the number of parameters of the network and of its encoder, layer and head."""
    with torch.device("meta"):  # tensors on this device take no memory
        q_network = script.QNetwork(script.Args(**flags), obs_shape, num_actions)
    sizes = dict.fromkeys(("encoder", "layer", "head"), 0)
    for name, module in q_network.named_children():
        sizes[PARTS.get(name, "head")] += sum(p.numel() for p in module.parameters())
    return [sum(sizes.values()), *sizes.values()]


def read_run(run: Path) -> tuple[dict, list[str], list[list], bool]:
    """Return a run's columns without SCORES, the flags it changes, its rows of SCORES, and whether it is finished."""
    config = json.loads((run / "config.json").read_text())
    script = importlib.import_module(Path(config["script"]).stem)
    agent, default = agent_and_defaults(script, config["args"])
    args = default | {name: value for name, value in config["args"].items() if name in default}
    settings = {name: value for name, value in args.items() if name not in NOT_SETTINGS}
    method = {"layer": args["layer"], "num_experts": args["num_experts"]} | settings
    columns = {"game": game_of(args["env_id"]), "agent": agent} | method | {"seed": args["seed"]}
    if sizes := environment_sizes(script, args["env_id"]):
        columns |= dict(zip(PARAMETERS, count_parameters(script, *sizes, **method), strict=True))
    offline = "total_updates" in args
    step_name, length = ("updates", "total_updates") if offline else ("global_step", "total_timesteps")
    with open(run / "metrics.csv", newline="") as file:
        iterations = [row for row in csv.DictReader(file) if row["mean_return"]]
    scores = [(int(row["iteration"]), int(row[step_name]), float(row["mean_return"])) for row in iterations]
    if (run / "eval.json").exists():
        result = json.loads((run / "eval.json").read_text())
        scores.append(("eval", result["global_step"], result["mean_return"]))
    low, high = human_scores().get(columns["game"], (None, None))
    rows = []
    for iteration, step, score in scores:
        if not math.isfinite(score):
            raise ValueError(f"score {score} at step {step}")
        normalized = "" if low is None else f"{100 * (score - low) / (high - low):.4f}"
        rows.append([iteration, step, "" if offline else 4 * step, f"{score:.4f}", normalized])
    changed = [name for name in settings if settings[name] != default[name]]
    return columns, changed, rows, config.get("finished", 0) >= args[length]


def main(options: Options) -> None:
    if not options.runs and options.list is None:
        raise ValueError("no run directories and no --list were given")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    table, changed, left_out, seen = [], set(), [], {}
    for run in [*options.runs, *(runs_of_list(options.list) if options.list else ())]:
        if not (run / "config.json").exists() or not (run / "metrics.csv").exists():
            left_out.append(f"{run}: {'not a run directory' if run.exists() else 'missing'}")
            continue
        try:
            columns, changes, rows, finished = read_run(run)
        except Exception as error:  # damaged files raise errors of many kinds
            left_out.append(f"{run}: damaged: {type(error).__name__}: {error}")
            continue
        flags = [f"{name}={columns[name]}" for name in changes]
        method = " ".join([f"{columns['layer']} {columns['num_experts']}", *flags])
        key = columns["game"], columns["agent"], method, columns["seed"]
        if not finished and not options.unfinished:
            left_out.append(f"{run}: not finished")
        elif not rows:
            left_out.append(f"{run}: no episode ended")
        elif key in seen:
            left_out.append(f"{run}: duplicate of {seen[key]}")
        else:
            seen[key] = run
            changed |= set(changes)
            table.append((columns, rows))
    if not table:
        print("\n".join(left_out[:10] + ["..."] * (len(left_out) > 10)))
        raise ValueError(f"no finished run among the {len(left_out)} that were given")
    names = ["game", "agent", "layer", "num_experts"]
    names += dict.fromkeys(name for columns, _ in table for name in columns if name in changed)
    with open(options.output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "seed", *PARAMETERS, *SCORES])
        for columns, rows in table:
            shared = [columns.get(name, "") for name in (*names, "seed", *PARAMETERS)]
            writer.writerows([*shared, *row] for row in rows)
    for agent in sorted({agent for _, agent, _, _ in seen}):
        runs = {(game, method, seed) for game, name, method, seed in seen if name == agent}
        games, methods, seeds = (sorted(set(values)) for values in zip(*runs, strict=True))
        for game, method in itertools.product(games, methods):
            if missing := [str(seed) for seed in seeds if (game, method, seed) not in runs]:
                left_out.append(f"{game} {agent} {method}: no seed {', '.join(missing)}")
    print(f"{len(seen)} runs, {sum(len(rows) for _, rows in table)} rows in {options.output}", *left_out, sep="\n    ")


if __name__ == "__main__":
    with importlib.import_module("dqn_softmoe").one_line_errors(ValueError, OSError):
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
