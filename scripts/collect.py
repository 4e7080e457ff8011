"""Run directories to one tidy CSV of scores.

    python scripts/collect.py runs/* -o results.csv

A row is an iteration of a run: game, agent, layer, experts, the other flags that are not the script's defaults, seed,
iteration ("eval": the evaluation after training), agent step (offline: update), frames, raw score, human-normalised
score in % (0 is random play; empty where nobody published a human score). What is left out is listed: runs that are not
finished (--unfinished takes them) and second runs of a seed; and so are the seeds that an agent's game and method lack.
"""

import csv
import importlib
import itertools
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
COLUMNS = "game agent layer experts setting seed iteration step frames score normalized".split()
NO_SETTING = """env_id seed layer num_experts runs_dir run_name resume cuda compile cuda_graphs replay_device
dataset_dir cache_dir checkpoint_every checkpoint_at_end weights_every save_replay eval_episodes""".split()


@dataclass
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run directories
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


def rows_of(run: Path, human: dict) -> tuple[list[dict], bool]:
    """A run's rows, and whether it is finished."""
    config = json.loads((run / "config.json").read_text())
    args, script = config["args"], importlib.import_module(Path(config["script"]).stem)
    default = script.Args(**{name: args[name] for name in ("layer", "distributional") if name in args})
    names = [f.name for f in fields(default) if f.name not in NO_SETTING]
    changed = {name: args[name] for name in names if name in args and args[name] != getattr(default, name)}
    offline, length = "total_updates" in args, "total_updates" if "total_updates" in args else "total_timesteps"
    if args.get("distributional") is False:
        changed["distributional"] = False
    game = game_of(args["env_id"])
    common = {"game": game, "agent": script.__name__.removesuffix("_softmoe"), "layer": args["layer"]}
    common |= {"experts": args["num_experts"], "seed": args["seed"]}
    common["setting"] = " ".join(f"{name}={value}" for name, value in changed.items())
    found = []

    def add(iteration, step: int, score: float) -> None:
        low, high = human.get(game, (None, None))
        normalized = "" if low is None else f"{100 * (score - low) / (high - low):.4f}"
        frames = "" if offline else 4 * step
        found.append(common | {"iteration": iteration, "step": step, "frames": frames, "score": f"{score:.4f}"})
        found[-1]["normalized"] = normalized

    with open(run / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["mean_return"]:
                add(int(row["iteration"]), int(row["updates" if offline else "global_step"]), float(row["mean_return"]))
    if (run / "eval.json").exists():
        result = json.loads((run / "eval.json").read_text())
        add("eval", result["global_step"], result["mean_return"])
    return found, config.get("finished", 0) >= args[length]


def main(options: Options) -> int:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    human, rows, left_out, seen = human_scores(), [], [], {}
    for run in options.runs:
        if not (run / "config.json").exists() or not (run / "metrics.csv").exists():
            left_out.append(f"{run}: no run directory")
            continue
        try:
            found, finished = rows_of(run, human)
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
            left_out.append(f"{run}: damaged: {type(error).__name__}: {error}")
            continue
        if not finished and not options.unfinished:
            left_out.append(f"{run}: not finished")
            continue
        if not found:
            left_out.append(f"{run}: no episode ended")
            continue
        key = tuple(found[0][name] for name in ("game", "agent", "layer", "experts", "setting", "seed"))
        if key in seen:
            left_out.append(f"{run}: the same as {seen[key]}")
            continue
        seen[key] = run
        rows += found
    if not rows:
        print("error: no finished run among these", *left_out, sep="\n    ", file=sys.stderr)
        return 2
    with open(options.output, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for agent in sorted({key[1] for key in seen}):
        runs = {(game, tuple(method), seed) for game, name, *method, seed in seen if name == agent}
        games, methods, seeds = (sorted({run[i] for run in runs}) for i in range(3))
        for game, method in itertools.product(games, methods):
            if missing := [str(seed) for seed in seeds if (game, method, seed) not in runs]:
                left_out.append(f"{game} {agent} {' '.join(map(str, method))}: no seed {', '.join(missing)}")
    print(f"{len(seen)} runs, {len(rows)} rows in {options.output}", *left_out, sep="\n    ")
    return 0


if __name__ == "__main__":
    with importlib.import_module("dqn_softmoe").one_line_errors(OSError):
        raise SystemExit(main(tyro.cli(Options, description=__doc__.split("\n\n")[0])))
