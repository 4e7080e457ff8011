"""Run directories to one tidy CSV of scores.

    python scripts/collect.py runs/* -o results.csv
    python scripts/collect.py --list fig4.list -o results.csv

A row is an iteration of a run. Its columns: game, agent (der_softmoe.py is "DrQ(eps)" with the flags of that agent),
layer, num_experts, every other flag that a run has set to another value than its agent's default, seed, parameters of
the network and of its encoder, layer and head, iteration ("eval": the evaluation after training), agent step (offline:
update), frames, raw score, human-normalised score in % (0 is random play; empty where nobody published a human score).
With --list the runs are those of a list of commands, by their --runs-dir and --run-name.
What is left out is listed: runs that are missing, damaged, or not finished (--unfinished takes them) and second runs of
a seed; and so are the seeds that an agent's game and method lack.
"""

import argparse
import csv
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
VARIANTS = {  # of an agent: name and flags
    "DER": (
        "DrQ(eps)",
        {"distributional": False, "noisy": False, "prioritized": False, "augment": True}
        | {"target_network_frequency": 1, "epsilon_decay_steps": 5_000},
    ),
    "CQL+C51": ("CQL", {"distributional": False}),
}
NO_SETTING = """env_id seed layer num_experts runs_dir run_name resume cuda compile cuda_graphs replay_device
dataset_dir cache_dir checkpoint_every checkpoint_at_end weights_every save_replay eval_episodes""".split()
NETWORK = {"encoder": "encoder", "tokenizer": "layer", "moe": "layer"}  # a module's part; the others are the head
PARAMETERS = ["parameters", "encoder_parameters", "layer_parameters", "head_parameters"]
SCORES = ["iteration", "step", "frames", "score", "normalized"]


@dataclass
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # run directories
    list: Path | None = None  # a list of commands whose runs are taken
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("results.csv")  # the CSV file
    unfinished: bool = False  # runs that are not finished, too


def human_scores() -> dict[str, tuple[float, float]]:
    """Game -> random and human score."""
    with open(ROOT / "scripts" / "atari_scores.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["human"]]
    return {row["game"]: (float(row["random"]), float(row["human"])) for row in rows}


def game_of(env_id: str) -> str:
    """BreakoutNoFrameskip-v4, Breakout-v4 and ALE/Breakout-v5 are Breakout."""
    name = env_id.rpartition("/")[2].rpartition(":")[2].rpartition("-v")[0]
    return name.removesuffix("NoFrameskip")


def runs_of_list(path: Path) -> list[Path]:
    """The run directories of a list's commands."""
    parser, found = argparse.ArgumentParser(allow_abbrev=False), []
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--run-name")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if words := shlex.split(line, comments=True):
            given, _ = parser.parse_known_args(words)
            if given.run_name is None:
                raise ValueError(f"{path}: line {number} has no --run-name")
            found.append(Path(given.runs_dir, given.run_name))
    return found


def agent_and_defaults(script, args: dict) -> tuple[str, dict]:
    """The name of a run's agent, and that agent's arguments where none is given."""
    name, given = AGENTS[script.__name__], {}
    variant, flags = VARIANTS.get(name, (name, {}))
    if flags.items() <= args.items():
        name, given = variant, flags
    return name, vars(script.Args(layer=args["layer"], **given))


def count_parameters(script, args: dict, made: dict) -> list[int]:
    """PARAMETERS of a run, or nothing where its environment cannot be made here; `made` keeps what was found."""
    args = script.Args(**args)
    if args.env_id not in made:
        try:
            envs = script.Environments(args, 1)
            made[args.env_id] = (script.STACK_SIZE, *envs.frame_shape), envs.num_actions
        except Exception:
            made[args.env_id] = None
    if made[args.env_id] is None:
        return []
    shaping = {*vars(args)} - {*NO_SETTING} | {"layer", "num_experts"}
    key = script, made[args.env_id], *(getattr(args, name) for name in sorted(shaping))
    if key not in made:
        sizes = dict.fromkeys(("encoder", "layer", "head"), 0)
        with torch.device("meta"):  # shapes without memory
            q_network = script.QNetwork(args, *made[args.env_id])
        for name, module in q_network.named_children():
            sizes[NETWORK.get(name, "head")] += sum(p.numel() for p in module.parameters())
        made[key] = [sum(sizes.values()), *sizes.values()]
    return made[key]


def read(run: Path, human: dict, made: dict) -> tuple[dict, list[str], list[list], bool]:
    """A run's columns but SCORES, its flags that are not its agent's defaults, its SCORES, and if it is finished."""
    config = json.loads((run / "config.json").read_text())
    script = importlib.import_module(Path(config["script"]).stem)
    agent, default = agent_and_defaults(script, config["args"])
    args = default | {name: value for name, value in config["args"].items() if name in default}
    settings = {name: value for name, value in args.items() if name not in NO_SETTING}
    columns = {"game": game_of(args["env_id"]), "agent": agent, "layer": args["layer"]}
    columns |= {"num_experts": args["num_experts"]} | settings | {"seed": args["seed"]}
    columns |= dict(zip(PARAMETERS, count_parameters(script, args, made), strict=False))
    offline, (low, high) = "total_updates" in args, human.get(columns["game"], (None, None))
    rows = []

    def add(iteration, step: int, score: float) -> None:
        if not math.isfinite(score):
            raise ValueError(f"score {score} at step {step}")
        normalized = "" if low is None else f"{100 * (score - low) / (high - low):.4f}"
        rows.append([iteration, step, "" if offline else 4 * step, f"{score:.4f}", normalized])

    with open(run / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["mean_return"]:
                add(int(row["iteration"]), int(row["updates" if offline else "global_step"]), float(row["mean_return"]))
    if (run / "eval.json").exists():
        result = json.loads((run / "eval.json").read_text())
        add("eval", result["global_step"], result["mean_return"])
    changed = [name for name in settings if settings[name] != default[name]]
    length = args["total_updates" if offline else "total_timesteps"]
    return columns, changed, rows, config.get("finished", 0) >= length


def main(options: Options) -> int:
    if not options.runs and options.list is None:
        raise ValueError("no run directories and no --list were given")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    human, made, table, changed, left_out, seen = human_scores(), {}, [], set(), [], {}
    for run in [*options.runs, *(runs_of_list(options.list) if options.list else ())]:
        if not run.exists():
            left_out.append(f"{run}: missing")
            continue
        if not (run / "config.json").exists() or not (run / "metrics.csv").exists():
            left_out.append(f"{run}: no run directory")
            continue
        try:
            columns, its_own, rows, finished = read(run, human, made)
        except Exception as error:  # any content that is not a run's
            left_out.append(f"{run}: damaged: {type(error).__name__}: {error}")
            continue
        if not finished and not options.unfinished:
            left_out.append(f"{run}: not finished")
            continue
        if not rows:
            left_out.append(f"{run}: no episode ended")
            continue
        setting = " ".join(f"{name}={columns[name]}" for name in its_own)
        key = (columns["game"], columns["agent"], columns["layer"], columns["num_experts"], setting, columns["seed"])
        if key in seen:
            left_out.append(f"{run}: the same as {seen[key]}")
            continue
        seen[key] = run
        changed |= set(its_own)
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
            its_own = [columns.get(name, "") for name in (*names, "seed", *PARAMETERS)]
            writer.writerows([*its_own, *row] for row in rows)
    for agent in sorted({key[1] for key in seen}):
        runs = {(game, tuple(method), seed) for game, name, *method, seed in seen if name == agent}
        games, methods, seeds = (sorted({run[i] for run in runs}) for i in range(3))
        for game, method in itertools.product(games, methods):
            if missing := [str(seed) for seed in seeds if (game, method, seed) not in runs]:
                left_out.append(f"{game} {agent} {' '.join(map(str, method))}: no seed {', '.join(missing)}")
    print(f"{len(seen)} runs, {sum(len(rows) for _, rows in table)} rows in {options.output}", *left_out, sep="\n    ")
    return 0


if __name__ == "__main__":
    with importlib.import_module("dqn_softmoe").one_line_errors(ValueError, OSError):
        raise SystemExit(main(tyro.cli(Options, description=__doc__.split("\n\n")[0])))
