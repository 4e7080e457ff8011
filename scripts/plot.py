"""Scores to figures: IQM by method and by experts, learning curves, performance profiles, probability of improvement.

    python scripts/plot.py results.csv -o figures

Reads what collect.py writes. A method is a layer, its number of experts and a setting. Makes <agent>_methods,
_experts, _curves, _profiles and _improvement, each as PNG and PDF, readable in grey, with its numbers as CSV.
Aggregates are those of rliable (Agarwal et al., 2021) over human-normalised scores: interquartile mean, intervals that
hold 95% of a bootstrap stratified by game. A run's score is its evaluation after training in DER, its last iteration in
the others. Only games and seeds that all methods of an agent have count; which ones is said. The authors' published
curves (dense networks, Breakout and Pong, five seeds: minimum to maximum) are a band beside ours.
"""

import csv
import importlib
import itertools
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rliable import library, metrics
except ImportError as error:
    print(f"error: {error}; pip install -r scripts/requirements.txt", file=sys.stderr)
    raise SystemExit(2) from None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore", category=FutureWarning, module="arch")
plt.rcParams |= {"font.size": 7, "lines.linewidth": 1, "figure.constrained_layout.use": True, "legend.frameon": False}
WIDTH = 3.3  # inches of a column
STYLES = [(style, grey) for grey in ("0.0", "0.4", "0.6", "0.8") for style in ("-", "--", ":", "-.")]
MARKERS = "os^Dv<>P"
REFERENCE = Path(__file__).with_name("reference_curves.csv")


@dataclass
class Options:
    results: Annotated[Path, tyro.conf.Positional]  # the CSV file of collect.py
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("figures")  # folder
    repetitions: int = 2_000  # bootstrap samples
    seed: int = 1  # of the bootstrap


def method_of(row: dict) -> tuple[str, int, str]:
    return row["layer"], int(row["experts"]), row["setting"]


def label(method: tuple) -> str:
    layer, experts, setting = method
    return f"{layer} x{experts} {setting}".strip()


def columns_of(method: tuple) -> dict:
    return dict(zip(("layer", "experts", "setting"), method, strict=True))


def save(figure, rows: list[dict], path: Path) -> None:
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=300)
    plt.close(figure)
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(path.with_suffix(".png"))


def legend(figure, handles: list, labels: list[str]) -> None:
    """Below the axes, in as many columns as fit; the figure grows by it."""
    width, height = figure.get_size_inches()
    columns = max(1, int(width / (0.4 + 0.055 * max(map(len, labels)))))
    figure.set_size_inches(width, height + 0.14 * -(-len(labels) // columns) + 0.1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def final_scores(rows: list[dict]) -> dict[tuple, dict[tuple, float]]:
    """Method -> (game, seed) -> human-normalised score at the end."""
    found = defaultdict(dict)
    for row in rows:  # iterations are in their order
        if row["normalized"] and (row["iteration"] == "eval") == (row["agent"] == "der"):
            found[method_of(row)][row["game"], int(row["seed"])] = float(row["normalized"])
    return found


def common(scores: dict) -> tuple[list[str], list[int]]:
    """Games and seeds that all methods have."""
    runs = set.intersection(*(set(found) for found in scores.values())) if scores else set()
    games = sorted({game for game, _ in runs})
    return games, sorted({seed for _, seed in runs if all((game, seed) in runs for game in games)})


def intervals(scores: dict, function, options: Options) -> tuple[dict, dict]:
    """Name -> estimates, and name -> (2, estimates) bounds."""
    random, found = np.random.RandomState(options.seed), ({}, {})
    for name in tqdm(scores, desc="bootstrap", leave=False, dynamic_ncols=True):
        given = {"reps": options.repetitions, "random_state": random}
        estimates = library.get_interval_estimates({name: scores[name]}, function, **given)
        for whole, part in zip(found, estimates, strict=True):
            whole.update(part)
    return found


def plot_scores(agent: str, scores: dict, options: Options) -> None:
    """IQM of each method; and over experts, of layers and settings with several numbers of them."""
    points, bounds = intervals(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), options)
    rows = [
        columns_of(method) | {"iqm": points[method][0], "low": low, "high": high, "runs": scores[method].size}
        for method, ((low,), (high,)) in bounds.items()
    ]
    found = [[row[name] for row in rows] for name in ("iqm", "low", "high")]
    iqm, low, high = map(np.array, found)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.6 + 0.17 * len(rows)))
    axes.errorbar(iqm, list(map(label, scores)), xerr=np.stack([iqm - low, high - iqm]), fmt="ok", ms=3, capsize=2)
    axes.set(xlabel="IQM, % of human", ylim=(len(rows) - 0.5, -0.5))
    save(figure, rows, options.output / f"{agent}_methods")

    lines = defaultdict(list)
    for row in rows:
        lines[row["layer"], row["setting"]].append([row[name] for name in ("experts", "iqm", "low", "high")])
    lines = {name: np.array(sorted(line)).T for name, line in lines.items() if len(line) > 1}
    if not lines:
        print("no picture over experts: each layer has one number of them")
        return
    figure, axes = plt.subplots(figsize=(WIDTH, 2.2))
    looks = zip(lines.items(), itertools.cycle(STYLES), itertools.cycle(MARKERS))
    for (name, (experts, iqm, low, high)), (style, grey), marker in looks:
        error, name = np.stack([iqm - low, high - iqm]), " ".join(name).strip()
        axes.errorbar(experts, iqm, error, ls=style, color=grey, marker=marker, ms=3, capsize=2, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="experts (dense: width / 512)", ylabel="IQM, % of human")
    legend(figure, *axes.get_legend_handles_labels())
    rows = [row for row in rows if (row["layer"], row["setting"]) in lines]
    save(figure, rows, options.output / f"{agent}_experts")


def together(rows: list[dict], games: list[str], seeds: list[int], options: Options) -> dict[tuple, tuple]:
    """Method -> steps, IQM, low, high over games and seeds, at up to 20 iterations."""
    found, lines = defaultdict(lambda: defaultdict(dict)), {}  # method -> step -> (game, seed) -> score
    for row in rows:
        if row["iteration"] != "eval" and row["normalized"]:
            found[method_of(row)][int(row["step"])][row["game"], int(row["seed"])] = float(row["normalized"])
    runs = set(itertools.product(games, seeds))
    for method, scores in found.items():
        steps = sorted(step for step in scores if runs <= set(scores[step]))
        steps = steps[:: max(1, len(steps) // 20)]
        if steps:
            lines[method] = steps, np.array([[[scores[at][game, s] for at in steps] for game in games] for s in seeds])
    points, bounds = intervals(
        {method: scores for method, (_, scores) in lines.items()},
        lambda x: np.array([metrics.aggregate_iqm(x[..., i]) for i in range(x.shape[-1])]),
        options,
    )
    return {method: (steps, points[method], *bounds[method]) for method, (steps, _) in lines.items()}


def plot_curves(agent: str, rows: list[dict], games: list[str], seeds: list[int], options: Options) -> None:
    """Raw scores per game, mean and range over seeds; and the IQM of all games, with its interval."""
    panels = defaultdict(dict)  # game -> method -> steps, middle, low, high
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))  # game -> method -> step -> scores
    for row in rows:
        if row["iteration"] != "eval":
            found[row["game"]][method_of(row)][int(row["step"])].append(float(row["score"]))
    for game, methods in found.items():
        for method, steps in methods.items():
            values = [steps[at] for at in sorted(steps)]
            panels[game][method] = sorted(steps), *(np.array([f(x) for x in values]) for f in (np.mean, min, max))
    if seeds:
        panels["all games: IQM, % of human"] = together(rows, games, seeds, options)
    with open(REFERENCE, newline="") as file:
        reference = [row for row in csv.DictReader(file) if row["agent"].lower() == agent]
    columns, out = min(len(panels), 3), []
    figure, grid = plt.subplots(-(-len(panels) // columns), columns, squeeze=False)
    figure.set_size_inches(WIDTH * columns, 2.2 * grid.shape[0])
    looks = dict(zip(sorted({method for methods in panels.values() for method in methods}), itertools.cycle(STYLES)))
    for axes, (game, methods) in itertools.zip_longest(grid.flat, panels.items(), fillvalue=(None, {})):
        if game is None:
            axes.set_axis_off()
            continue
        for method, (steps, middle, low, high) in sorted(methods.items()):
            style, grey = looks[method]
            axes.plot(steps, middle, ls=style, color=grey, marker="." if len(steps) < 4 else "", label=label(method))
            axes.fill_between(steps, low, high, color=grey, alpha=0.15, lw=0)
            out += [
                {"game": game} | columns_of(method) | {"step": at, "middle": m, "low": a, "high": b}
                for at, m, a, b in zip(steps, middle, low, high, strict=True)
            ]
        last = max(step for steps, *_ in methods.values() for step in steps)
        for encoder in sorted({row["encoder"] for row in rows}):
            band = [row for row in reference if (row["game"], row["encoder"]) == (game.lower(), encoder)]
            steps = [250_000 * (int(row["iteration"]) + 1) for row in band]
            steps = [step for step in steps if step <= last]
            if steps:
                name = f"authors' dense {encoder}" + " (C51, 3-step, prioritised only)" * (agent == "rainbow")
                low, high = ([float(row[key]) for row in band][: len(steps)] for key in ("min", "max"))
                axes.fill_between(steps, low, high, fc="none", ec="0.6", hatch="////", lw=0, label=name)
        axes.set(title=game, xlabel="agent steps" if agent != "cql" else "updates")
    legends = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid.flat]
    handles = {text: handle for part in legends for handle, text in part}
    legend(figure, list(handles.values()), list(handles))
    save(figure, out, options.output / f"{agent}_curves")


def plot_profiles(agent: str, scores: dict, options: Options) -> None:
    """Share of runs with a score above tau (Agarwal et al., 2021, section 4.2)."""
    tau = np.linspace(min(x.min() for x in scores.values()), max(x.max() for x in scores.values()), 100)
    profiles, bounds = library.create_performance_profile(scores, tau, reps=options.repetitions)
    figure, axes = plt.subplots(figsize=(WIDTH, 2.2))
    rows = []
    for method, (style, grey) in zip(scores, itertools.cycle(STYLES)):
        axes.plot(tau, profiles[method], ls=style, color=grey, label=label(method))
        axes.fill_between(tau, *bounds[method], color=grey, alpha=0.1, lw=0)
        found = zip(tau, profiles[method], *bounds[method], strict=True)
        rows += [columns_of(method) | {"tau": t, "share": p, "low": a, "high": b} for t, p, a, b in found]
    axes.set(xlabel="score tau, % of human", ylabel="share of runs above tau")
    legend(figure, *axes.get_legend_handles_labels())
    save(figure, rows, options.output / f"{agent}_profiles")


def plot_improvement(agent: str, scores: dict, options: Options) -> None:
    """P(a run of X beats one of Y on a random game), Y dense of one width (Agarwal et al., 2021, section 4.3)."""
    dense = [method for method in scores if method[:2] == ("dense", 1)]
    pairs = [(x, y) for x, y in itertools.product(scores, dense) if x != y and x[2] == y[2]]
    if not pairs:
        print("no picture of improvement: there is no dense layer of one width with the same setting to compare with")
        return
    both = {f"{label(x)}\n> {label(y)}": (scores[x], scores[y]) for x, y in pairs}
    points, bounds = intervals(both, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), options)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.6 + 0.3 * len(pairs)))
    found = [(name, points[name][0], *bounds[name][:, 0]) for name in both]
    names, p, low, high = zip(*found, strict=True)
    axes.errorbar(p, names, xerr=np.stack([np.array(p) - low, np.array(high) - p]), fmt="ok", ms=3, capsize=2)
    axes.axvline(0.5, color="0.6", ls=":")
    axes.set(xlim=(-0.02, 1.02), ylim=(len(pairs) - 0.5, -0.5), xlabel="probability of improvement")
    found = [(name.replace("\n", " "), *numbers) for name, *numbers in found]
    rows = [dict(zip(("pair", "probability", "low", "high"), row, strict=True)) for row in found]
    save(figure, rows, options.output / f"{agent}_improvement")


def shorten(rows: list[dict]) -> list[dict]:
    """Rows of an agent without the settings that all its methods share, which are said; and their encoder."""
    shared = set.intersection(*(set(row["setting"].split()) for row in rows))
    print(f"{rows[0]['agent']}: all methods have {' '.join(sorted(shared)) or 'default settings'}")
    found = []
    for row in rows:
        setting = " ".join(word for word in row["setting"].split() if word not in shared)
        nature = "encoder=nature" in row["setting"]
        found.append(row | {"setting": setting, "encoder": "CNN" if nature else "Impala"})
    return found


def main(options: Options) -> None:
    if options.repetitions < 1:
        raise ValueError("--repetitions must be at least 1")
    with open(options.results, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "normalized" not in rows[0]:
        raise ValueError(f"{options.results} has no rows of collect.py's")
    options.output.mkdir(parents=True, exist_ok=True)
    for agent in sorted({row["agent"] for row in rows}):
        those = shorten([row for row in rows if row["agent"] == agent])
        finals = dict(sorted(final_scores(those).items()))
        games, seeds = common(finals)
        left_out = len(set().union(*finals.values())) - len(games) * len(seeds)
        print(f"{agent}: {len(finals)} methods, {len(games)} games, seeds {seeds}; {left_out} games' seeds left out")
        plot_curves(agent, those, games, seeds, options)
        if not seeds:
            print(f"{agent}: no aggregates: no seed that all methods have, on all of their games with a human score")
            continue
        scores = {name: np.array([[runs[game, s] for game in games] for s in seeds]) for name, runs in finals.items()}
        plot_scores(agent, scores, options)
        plot_profiles(agent, scores, options)
        plot_improvement(agent, scores, options)


if __name__ == "__main__":
    with importlib.import_module("dqn_softmoe").one_line_errors(Exception):
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
