"""Scores to figures: IQM over experts, learning curves, performance profiles, probability of improvement.

    python scripts/plot.py results.csv -o figures

Reads what collect.py writes. A method is an agent, layer, number of experts and setting. Makes experts, curves,
profiles and improvement, each as PNG and PDF of a column's width, readable in grey, with its numbers as CSV. Aggregates
are those of rliable (Agarwal et al., 2021) over human-normalised scores: interquartile mean, intervals that hold 95% of
a bootstrap stratified by game. A run's score is its evaluation after training in DER, its last iteration in the others.
Only games and seeds that all methods of an agent have count; which ones is said. The authors' published curves (dense
networks, Breakout and Pong, five seeds: minimum to maximum) are a band beside ours.
"""

import csv
import itertools
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rliable import library, metrics

plt.rcParams |= {"font.size": 7, "lines.linewidth": 1, "figure.constrained_layout.use": True, "legend.frameon": False}
WIDTH = 3.3  # inches of a column
STYLES = [(style, grey) for grey in ("0.0", "0.5", "0.75") for style in ("-", "--", ":", "-.")]
MARKERS = "os^Dv<>P"
REFERENCE = Path(__file__).with_name("reference_curves.csv")


@dataclass
class Options:
    results: Annotated[Path, tyro.conf.Positional]  # the CSV file of collect.py
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("figures")  # folder
    repetitions: int = 2_000  # bootstrap samples
    seed: int = 1  # of the bootstrap


def method_of(row: dict) -> tuple:
    return row["agent"], row["layer"], int(row["experts"]), row["setting"]


def label(method: tuple) -> str:
    agent, layer, experts, setting = method
    return f"{agent} {layer} x{experts}{' ' * bool(setting)}{setting}"


def save(figure, rows: list[dict], path: Path) -> None:
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=300)
    plt.close(figure)
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(path.with_suffix(".png"))


def final_scores(rows: list[dict]) -> dict[tuple, dict[tuple, float]]:
    """Method -> (game, seed) -> human-normalised score at the end."""
    found = defaultdict(dict)
    for row in rows:  # iterations are in their order, the evaluation after the last
        if row["normalized"] and (row["iteration"] != "eval" or row["agent"] == "der"):
            found[method_of(row)][row["game"], int(row["seed"])] = float(row["normalized"])
    return found


def matrices(scores: dict) -> dict[tuple, np.ndarray]:
    """Method -> (seeds, games), of the games and seeds that all methods of its agent have."""
    found = {}
    for agent in sorted({method[0] for method in scores}):
        those = {method: runs for method, runs in scores.items() if method[0] == agent}
        common = set.intersection(*(set(runs) for runs in those.values()))
        games = sorted({game for game, _ in common})
        seeds = sorted({seed for _, seed in common if all((game, seed) in common for game in games)})
        used, every = len(games) * len(seeds), len(set().union(*those.values()))
        print(f"{agent}: {len(those)} methods, {len(games)} games, seeds {seeds}; {every - used} games' seeds left out")
        for method, runs in those.items() if used else ():
            found[method] = np.array([[runs[game, seed] for game in games] for seed in seeds])
    return found


def intervals(scores: dict, function, options: Options) -> tuple[dict, dict]:
    random = np.random.RandomState(options.seed)
    return library.get_interval_estimates(scores, function, reps=options.repetitions, random_state=random)


def plot_experts(scores: dict, options: Options) -> None:
    points, bounds = intervals(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), options)
    figure, axes = plt.subplots(figsize=(WIDTH, 2.4))
    rows, lines = [], defaultdict(list)
    for method in scores:
        (low,), (high,) = bounds[method]
        lines[method[0], method[1], method[3]].append((method[2], points[method][0], low, high))
        names = dict(zip(("agent", "layer", "experts", "setting"), method, strict=True))
        rows.append(names | {"iqm": points[method][0], "low": low, "high": high, "runs": scores[method].size})
    for (name, line), (style, grey), marker in zip(
        sorted(lines.items()), itertools.cycle(STYLES), itertools.cycle(MARKERS)
    ):
        experts, iqm, low, high = np.array(sorted(line)).T
        error = np.stack([iqm - low, high - iqm])
        axes.errorbar(experts, iqm, error, ls=style, color=grey, marker=marker, ms=3, capsize=2, label=" ".join(name))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="experts (dense: width / 512)", ylabel="IQM, % of human")
    figure.legend(loc="outside upper center", ncols=2)
    save(figure, rows, options.output / "experts")


def plot_curves(rows: list[dict], options: Options) -> None:
    """Raw scores per game, mean and range over seeds; then the mean over games of normalised ones."""
    curves = defaultdict(lambda: defaultdict(list))  # game -> method -> [(step, score)]
    together, encoders = defaultdict(list), {(row["agent"], row["encoder"]) for row in rows}
    for row in rows:
        if row["iteration"] != "eval":
            curves[row["game"]][method_of(row)].append((int(row["step"]), float(row["score"])))
            if row["normalized"]:
                together[method_of(row)].append((int(row["step"]), float(row["normalized"])))
    if together:
        curves["all games, % of human"] = together
    with open(REFERENCE, newline="") as file:
        reference = list(csv.DictReader(file))
    columns, out = min(len(curves), 3), []
    figure, grid = plt.subplots(-(-len(curves) // columns), columns, squeeze=False, sharex=False)
    figure.set_size_inches(WIDTH * columns, 2.2 * grid.shape[0] + 0.3)
    methods = sorted({method for game in curves.values() for method in game})
    styles = dict(zip(methods, itertools.cycle(STYLES)))
    for axes, (game, lines) in zip(grid.flat, curves.items(), strict=False):
        for method, points in sorted(lines.items()):
            steps = sorted({step for step, _ in points})
            values = [[score for step, score in points if step == at] for at in steps]
            mean, low, high = (np.array([f(x) for x in values]) for f in (np.mean, min, max))
            style, grey = styles[method]
            axes.plot(steps, mean, ls=style, color=grey, marker="." if len(steps) < 4 else "", label=label(method))
            axes.fill_between(steps, low, high, color=grey, alpha=0.15, lw=0)
            names = dict(zip(("agent", "layer", "experts", "setting"), method, strict=True))
            out += [
                {"game": game} | names | {"step": at, "mean": m, "min": a, "max": b, "runs": len(x)}
                for at, m, a, b, x in zip(steps, mean, low, high, values, strict=True)
            ]
        for agent, encoder in encoders:
            last = max(step for points in lines.values() for step, _ in points)
            band = [row for row in reference if (row["game"], row["agent"].lower()) == (game.lower(), agent)]
            band = [row for row in band if row["encoder"] == encoder and 250_000 * (int(row["iteration"]) + 1) <= last]
            if band:
                x = [250_000 * (int(row["iteration"]) + 1) for row in band]
                low, high = ([float(row[name]) for row in band] for name in ("min", "max"))
                axes.fill_between(
                    x, low, high, fc="none", ec="0.6", hatch="////", lw=0, label=f"{agent}, authors' dense"
                )
        axes.set_title(game)
        axes.set_xlabel("agent steps (offline: updates)")
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    legends = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid.flat]
    handles = {text: handle for legend in legends for handle, text in legend}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    save(figure, out, options.output / "curves")


def plot_profiles(scores: dict, options: Options) -> None:
    """Share of runs with a score above tau (Agarwal et al., 2021, section 4.2)."""
    tau = np.linspace(min(x.min() for x in scores.values()), max(x.max() for x in scores.values()), 100)
    profiles, bounds = library.create_performance_profile(scores, tau, reps=options.repetitions)
    figure, axes = plt.subplots(figsize=(WIDTH, 2.4))
    rows = []
    for method, (style, grey) in zip(scores, itertools.cycle(STYLES)):
        axes.plot(tau, profiles[method], ls=style, color=grey, label=label(method))
        axes.fill_between(tau, *bounds[method], color=grey, alpha=0.1, lw=0)
        found = zip(tau, profiles[method], *bounds[method], strict=True)
        rows += [{"method": label(method), "tau": t, "share": p, "low": a, "high": b} for t, p, a, b in found]
    axes.set(xlabel="score tau, % of human", ylabel="share of runs above tau")
    figure.legend(loc="outside upper center", ncols=2)
    save(figure, rows, options.output / "profiles")


def plot_improvement(scores: dict, options: Options) -> None:
    """P(a run of X beats one of Y on a random game), Y dense of one width (Agarwal et al., 2021, section 4.3)."""
    dense = [method for method in scores if method[1:3] == ("dense", 1)]
    pairs = [(x, y) for x, y in itertools.product(scores, dense) if x != y and (x[0], x[3]) == (y[0], y[3])]
    if not pairs:
        print("no picture of improvement: there is no dense layer of one width to compare with")
        return
    together = {f"{label(x)}\n> {label(y)}": (scores[x], scores[y]) for x, y in pairs}
    points, bounds = intervals(together, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), options)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.6 + 0.3 * len(pairs)))
    found = [(name, points[name][0], *bounds[name][:, 0]) for name in together]
    names, p, low, high = zip(*found, strict=True)
    axes.errorbar(p, names, xerr=np.stack([np.array(p) - low, np.array(high) - p]), fmt="ok", ms=3, capsize=2)
    axes.axvline(0.5, color="0.6", ls=":")
    axes.set(xlim=(-0.02, 1.02), xlabel="probability of improvement")
    axes.invert_yaxis()
    found = [(name.replace("\n", " "), *numbers) for name, *numbers in found]
    rows = [dict(zip(("pair", "probability", "low", "high"), row, strict=True)) for row in found]
    save(figure, rows, options.output / "improvement")


def main(options: Options) -> int:
    if not options.results.exists():
        print(f"error: there is no {options.results}; python scripts/collect.py makes it", file=sys.stderr)
        return 2
    with open(options.results, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "normalized" not in rows[0]:
        print(f"error: {options.results} has no rows of collect.py's", file=sys.stderr)
        return 2
    for row in rows:
        row["encoder"] = "CNN" if "encoder=nature" in row["setting"] else "Impala"
    if len(settings := {row["setting"] for row in rows}) == 1:  # names need not repeat what all share
        print(f"all methods: {settings.pop() or 'defaults'}")
        rows = [row | {"setting": ""} for row in rows]
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: no folder for the figures: {error}", file=sys.stderr)
        return 2
    plot_curves(rows, options)
    if scores := matrices(final_scores(rows)):
        plot_experts(scores, options)
        plot_profiles(scores, options)
        plot_improvement(scores, options)
    else:
        print("no aggregates: no seed that all methods of an agent have, on all of their games with a human score")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__.split("\n\n")[0])))
