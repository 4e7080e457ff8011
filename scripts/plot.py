"""Plot collected scores: aggregates, learning curves, performance profiles and probability of improvement.

    python scripts/plot.py results.csv -o figures
    python scripts/plot.py results.csv --x replay_ratio       # or another column, such as num_experts or parameters
    python scripts/plot.py results.csv --published scripts/drq_eps_100k.csv

Reads the CSV file of collect.py and writes <agent>_methods, _<x>, _curves, _profiles, _improvement and _published, each
as PNG and PDF, with its numbers as CSV. A method is a layer, its number of experts, and all other flags that differ
between the runs of an agent.
Aggregates follow Agarwal et al. (2021) and equal those of rliable. They are interquartile means (IQM) of
human-normalised scores, with 95% intervals of a bootstrap stratified by game. They use all runs on the games that every
method of an agent has. Missing runs are reported. If no game of an agent has a human score, its scores are scaled per
game from the lowest to the highest of all runs. The score of DER and DrQ(eps) is the evaluation after training. The
score of the other agents is that of the iteration at the last step that all runs of the agent have reached.
Curves of 25 iterations or more are running means of five. They are shown with the published curves of the authors
(dense networks on Breakout and Pong; range of five seeds). --published compares evaluations with published scores.
Those of 100 seeds of DrQ(eps) are in drq_eps_100k.csv (rliable's Atari-100k data, from results/data/DrQ(eps).json of
the repository eloialonso/iris).
"""

import csv
import importlib
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import EngFormatter
except ImportError as error:
    print(f"error: {error}; pip install -r scripts/requirements.txt", file=sys.stderr)
    raise SystemExit(2) from None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
plt.rcParams |= {"font.size": 7, "lines.linewidth": 1.2, "figure.constrained_layout.use": True, "legend.frameon": False}
WIDTH = 3.3  # width of a column in inches
LAYERS = {  # name and colour of each layer (palette of Okabe and Ito)
    "dense": ("Dense", "#D55E00"),
    "gap": ("Average pooling", "#E69F00"),
    "tokenized": ("Dense on tokens", "#56B4E9"),
    "top1moe": ("Top-1 MoE", "#009E73"),
    "expert_choice": ("Expert choice", "#CC79A7"),
    "softmoe": ("Soft MoE", "#0072B2"),
}
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
SIZES = {"num_experts", "expert_hidden_dim", "encoder_width"}  # flags that may differ along a line over `parameters`
LOW_DATA = ("DER", "DrQ(eps)")  # agents whose score is the evaluation after training
MAX_CURVES = 6  # methods whose curves are drawn by default
LONG, SMOOTH = 25, 5  # curves of at least LONG iterations are running means of SMOOTH iterations
NUMBER = re.compile(r"\d[\d.]*(e[+-]?\d+)?")
ALL = "all games"  # title of the panel that aggregates all games
REFERENCE = Path(__file__).with_name("reference_curves.csv")


@dataclass
class Options:
    results: Annotated[Path, tyro.conf.Positional]  # CSV file of collect.py
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("figures")  # folder for the figures
    x: str = "num_experts"  # column on the horizontal axis of the figure <agent>_<x>
    methods: tuple[str, ...] = ()  # methods whose curves are drawn, named as in the legends (default: at most six)
    published: Path | None = None  # CSV file of published scores with columns game, runs, q05, median and q95
    repetitions: int = 2_000  # number of bootstrap samples
    seed: int = 1  # random seed of the bootstrap


class Run(NamedTuple):
    agent: str
    game: str
    seed: int
    method: tuple  # pairs of a flag and its value
    encoder: str
    parameters: float
    step: np.ndarray  # (iterations,): frames (four per agent step), or updates in offline training
    score: np.ndarray  # (iterations,): raw mean return
    normalized: np.ndarray  # (iterations,): score in % of the human score; nan if the game has none
    evaluation: tuple[float, ...]  # raw and normalised score of the evaluation after training; () without one


def method_flags(flags: list[str], runs: list[dict]) -> dict[str, list[str]]:
    """Return the flags that distinguish the methods of each layer, from each other and from those of other layers."""
    values = defaultdict(lambda: defaultdict(set))
    for run, flag in itertools.product(runs, flags):
        values[run["layer"]][flag].add(run[flag])

    def differs(own: dict, flag: str) -> bool:
        return len(own[flag]) > 1 or any(not own[flag] <= other[flag] for other in values.values())

    return {layer: flags[:2] + [f for f in flags[2:] if differs(own, f)] for layer, own in values.items()}


def read_results(path: Path) -> tuple[dict[str, list[Run]], list[str]]:
    """Return the runs of each agent, and the columns that --x accepts."""
    with open(path, newline="") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if "encoder_parameters" not in header:
            raise ValueError(f"{path} was not written by collect.py")
        width, agents = header.index("iteration"), defaultdict(list)
        for key, rows in itertools.groupby(lines, lambda line: line[:width]):
            run = dict(zip(header, key, strict=False))
            agents[run["agent"]].append((run, [line[width:] for line in rows]))
    flags, found = header[2 : header.index("seed")], defaultdict(list)
    for agent, runs in sorted(agents.items()):
        names = method_flags(flags, [run for run, _ in runs])
        for run, rows in runs:
            numbers = [[float(x or "nan") for x in (frames or step, *scores)] for _, step, frames, *scores in rows]
            evaluation = tuple(numbers.pop()[1:]) if rows[-1][0] == "eval" else ()
            method = tuple((name, run[name]) for name in names[run["layer"]])
            encoder = run.get("encoder", "nature" if agent in LOW_DATA else "impala")
            identity = agent, run["game"], int(run["seed"]), method, encoder, float(run["parameters"] or "nan")
            found[agent].append(Run(*identity, *np.array(numbers).reshape(-1, 3).T, evaluation))
    return found, [*flags[1:], "parameters"]


def label(method: tuple) -> str:
    """Return the name of a method for legends and messages."""
    flags = dict(method)
    layer, experts = flags.pop("layer"), flags.pop("num_experts", None)
    found = [LAYERS[layer][0]]
    if experts and layer in ("top1moe", "expert_choice", "softmoe"):
        found.append(f"{experts} expert{'s' * (experts != '1')}")
    elif experts not in (None, "1"):
        found.append(f"width x{experts}")
    for name, value in flags.items():
        name, value = name.replace("_", " "), f"{float(value):g}" if NUMBER.fullmatch(value) else value
        found.append({"True": name, "False": f"no {name}"}.get(value, f"{name} {value}"))
    return ", ".join(found)


def sort_key(method: tuple) -> list:
    """Return a key that sorts methods by layer, then by the values of their flags. Numbers are sorted by size."""
    (_, layer), *flags = method
    values = [(float(value), "") if NUMBER.fullmatch(value) else (0.0, value) for _, value in flags]
    return [list(LAYERS).index(layer), *values]


def line_styles(methods: Iterable[tuple]) -> dict[tuple, dict]:
    """Return the line style of each method. Methods of one layer share a hue, which is darkest for the last of them."""
    found, ranked = {}, sorted(methods, key=sort_key, reverse=True)
    for i, (layer, group) in enumerate(itertools.groupby(ranked, lambda method: method[0][1])):
        group = list(group)
        for j, method in enumerate(group):
            light = 0.55 * j / max(len(group) - 1, 1)
            color = tuple(light + (1 - light) * part for part in to_rgb(LAYERS[layer][1]))
            found[method] = {"color": color, "ls": DASHES[(i + j) % 4], "marker": "osD^v<>P"[(i + j) % 8]}
    return found


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows that may have different columns."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def save_figure(figure, rows: list[dict], folder: Path, agent: str, name: str) -> None:
    """Save a figure as PNG and PDF and its numbers as CSV, under a file name such as drq_eps_curves."""
    path = folder / (re.sub(r"\W+", "_", agent.lower()).strip("_") + f"_{name}")
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=200)
    plt.close(figure)
    write_csv(path.with_suffix(".csv"), rows)
    print(path.with_suffix(".png"))


def make_grid(panels: int, columns: int, width: float, row_height: float):
    """Return a figure of `width` inches, and the axes of its panels in row-major order."""
    rows = -(-panels // columns)
    figure = plt.figure(figsize=(width, row_height * rows))
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def figure_width(methods: Iterable[tuple]) -> float:
    """Return the width in inches of a figure whose vertical axis has the labels of `methods`."""
    return WIDTH + max(0.0, 0.055 * max(len(label(method)) for method in methods) - 1)


def add_legend(figure) -> None:
    """Add a common legend of all axes below them, and increase the height of the figure to make room for it."""
    width, height = figure.get_size_inches()
    parts = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {text: handle for part in parts for handle, text in part}
    columns = max(1, int(width / (0.45 + 0.055 * max(map(len, handles)))))
    figure.set_size_inches(width, height + 0.14 * -(-len(handles) // columns) + 0.1)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


# ------------------------------------------------------------------------------------------------------- statistics
def bootstrap_indices(games: Iterable, options: Options) -> np.ndarray:
    """Draw indices (repetitions, runs) into the runs of all games, with replacement within each game's runs."""
    random, start, found = np.random.default_rng(options.seed), 0, []
    for runs in games:
        found.append(start + random.integers(len(runs), size=(options.repetitions, len(runs))))
        start += len(runs)
    return np.concatenate(found, axis=1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Return the interquartile mean over the last axis."""
    n = scores.shape[-1]
    return np.sort(scores, axis=-1)[..., n // 4 : n - n // 4].mean(axis=-1)


def interval(samples: np.ndarray) -> np.ndarray:
    """Return the bounds (2, ...) of the 95% interval of bootstrap samples (repetitions, ...)."""
    return np.percentile(samples, (2.5, 97.5), axis=0)


def probability_of_improvement(x: list[np.ndarray], y: list[np.ndarray], options: Options) -> tuple[float, np.ndarray]:
    """Return P(a run of x beats a run of y on a random game) and its interval. x and y have the scores of each game."""
    total, samples, random = 0.0, np.zeros(options.repetitions), np.random.default_rng(options.seed)
    for a, b in zip(x, y, strict=True):
        wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)  # (runs of x, runs of y)
        i, j = (random.integers(len(runs), size=(options.repetitions, len(runs))) for runs in (a, b))
        total += wins.mean() / len(x)
        samples += wins[i[:, :, None], j[:, None, :]].mean(axis=(1, 2)) / len(x)
    return total, interval(samples)


def group_runs(runs: list[Run]) -> dict[tuple, list[Run]]:
    """Group the runs that have at least one iteration by (game, method)."""
    found = defaultdict(list)
    for run in runs:
        if len(run.step):
            found[run.game, run.method].append(run)
    return found


def scores_at(runs: list[Run], steps: np.ndarray, column: str) -> np.ndarray:
    """Return the scores (runs, steps) of each run's last iteration up to each step. Long curves are smoothed."""
    found = []
    for run in runs:
        values = getattr(run, column)
        if len(values) >= LONG:
            values = np.array([values[max(i - SMOOTH, 0) : i].mean() for i in range(1, len(values) + 1)])
        found.append(values[np.searchsorted(run.step, steps, side="right") - 1])
    return np.array(found)


def common_steps(runs: list[Run]) -> np.ndarray:
    """Return the steps of all iterations that lie between the first and the last iteration of every run."""
    steps = np.unique(np.concatenate([run.step for run in runs]))
    return steps[(steps >= max(run.step[0] for run in runs)) & (steps <= min(run.step[-1] for run in runs))]


def normalize_scores(agent: str, runs: list[Run]) -> tuple[list[Run], str]:
    """Return the runs whose normalised scores can be aggregated, and the unit of these scores."""
    last = [(run.game, [*run.normalized[-1:], *run.evaluation[1:]]) for run in runs]
    without = sorted({game for game, scores in last if not np.isfinite(scores).all()})
    if len(without) < len({run.game for run in runs}):
        if without:
            print(f"{agent}: left out of the aggregates, for lack of a human score: {', '.join(without)}")
        return [run for run in runs if run.game not in without], "% of human"
    found = []
    for game in without:
        group = [run for run in runs if run.game == game]
        scores = [score for run in group for score in (*run.score, *run.evaluation[:1])]
        low, span = min(scores), max(scores) - min(scores) or 1
        for run in group:
            evaluation = run.evaluation and (run.evaluation[0], 100 * (run.evaluation[0] - low) / span)
            found.append(run._replace(normalized=100 * (run.score - low) / span, evaluation=evaluation))
    return found, "% of the range of all runs"


def final_scores(agent: str, runs: list[Run]) -> tuple[dict[tuple, dict[str, np.ndarray]], str]:
    """Return the scores of each method on each game that all methods have, and when they were reached, in words."""
    found = defaultdict(lambda: defaultdict(dict))  # method -> game -> seed -> score
    last = min((run.step[-1] for run in runs if len(run.step)), default=0)
    when = "after training" if agent in LOW_DATA else f"at {EngFormatter(sep='')(last)} {unit_of_steps(agent)}"
    for run in runs:
        values = run.evaluation if agent in LOW_DATA else run.normalized[run.step <= last]
        if len(values):
            found[run.method][run.game][run.seed] = values[-1]
    methods = sorted({run.method for run in runs}, key=sort_key)
    games, seeds = sorted({run.game for run in runs}), sorted({run.seed for run in runs})
    used = [game for game in games if all(found[method][game] for method in methods)]
    n = sum(len(found[method][game]) for method in methods for game in used)
    print(f"{agent}: {len(methods)} methods, {len(used)} games, {n} runs in the aggregates, scores {when}")
    for method in methods:
        missing = {game: [str(seed) for seed in seeds if seed not in found[method][game]] for game in games}
        if texts := [f"{game} seed {', '.join(absent)}" for game, absent in missing.items() if absent]:
            print(f"    missing scores of {label(method)}: {'; '.join(texts)}")
    if unused := [game for game in games if game not in used]:
        print(f"    left out of the aggregates, for lack of a score of every method: {', '.join(unused)}")
    scores = {method: {game: np.array([*found[method][game].values()]) for game in used} for method in methods}
    return scores if used else {}, when


# ---------------------------------------------------------------------------------------------------------- figures
def unit_of_steps(agent: str) -> str:
    return "updates" if agent.startswith("CQL") else "frames"


def csv_rows(method: tuple, names: tuple, *columns) -> list[dict]:
    """Return the rows of a CSV file that has the flags of a method and the named columns."""
    return [dict(method) | dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def plot_methods(agent: str, runs: list[Run], scores: dict, unit: str, when: str, options: Options) -> list[dict]:
    """Plot the IQM of each method with its interval, and return the rows of the CSV file."""
    rows, styles = [], line_styles(scores)
    figure, axes = plt.subplots(figsize=(figure_width(scores), 0.6 + 0.17 * len(scores)))
    for method, games in scores.items():
        values = np.concatenate([*games.values()])
        middle, (low, high) = iqm(values), interval(iqm(values[bootstrap_indices(games.values(), options)]))
        error = [[middle - low], [high - middle]]
        axes.errorbar(middle, label(method), xerr=error, fmt="o", color=styles[method]["color"], ms=3.5, capsize=2)
        parameters = np.mean([run.parameters for run in runs if run.method == method])
        row = dict(method) | {"parameters": f"{parameters:.0f}" if np.isfinite(parameters) else ""}
        rows.append(row | {"iqm": middle, "low": low, "high": high, "runs": len(values)})
    axes.set(xlabel=f"IQM, {unit}, {when}", ylim=(len(rows) - 0.5, -0.5))
    save_figure(figure, rows, options.output, agent, "methods")
    return rows


def plot_over_x(agent: str, methods: list[tuple], rows: list[dict], ylabel: str, options: Options) -> None:
    """Plot the IQMs that `plot_methods` returned over --x. A line joins methods that differ in nothing else."""
    lines, x = defaultdict(list), options.x
    for method, row in zip(methods, rows, strict=True):
        if row.get(x):
            free = SIZES if x == "parameters" else {x}
            lines[tuple(pair for pair in method if pair[0] not in free)].append(row)
    lines = {line: group for line, group in lines.items() if len(group) > 1}
    if not lines:
        print(f"{agent}: no figure over {x}, because no two methods differ in it alone")
        return
    styles, texts = line_styles(lines), list(dict.fromkeys(row[x] for group in lines.values() for row in group))
    numeric = all(map(NUMBER.fullmatch, texts))
    ticks = {text: float(text) if numeric else i for i, text in enumerate(texts)}
    figure, axes = plt.subplots(figsize=(WIDTH, 2.2))
    for line, group in lines.items():
        group.sort(key=lambda row: ticks[row[x]])
        middle, low, high = (np.array([row[name] for row in group]) for name in ("iqm", "low", "high"))
        style = styles[line] | {"label": label(line), "ms": 3.5, "capsize": 2}
        style |= {} if numeric else {"ls": ""}  # points are not joined if their x is not a number
        axes.errorbar([ticks[row[x]] for row in group], middle, np.stack([middle - low, high - middle]), **style)
    if numeric and min(ticks.values()) > 0 and max(ticks.values()) >= 4 * min(ticks.values()):
        axes.set_xscale("log", base=10 if x == "parameters" else 2)
    if x == "parameters":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.set_xticks([*ticks.values()], [f"{tick:g}" for tick in ticks.values()] if numeric else texts)
        axes.minorticks_off()
    names = {"num_experts": "experts (dense: width / 512)", "parameters": "parameters of the network"}
    axes.set(xlabel=names.get(x, x.replace("_", " ")), ylabel=ylabel)
    add_legend(figure)
    save_figure(figure, [row for group in lines.values() for row in group], options.output, agent, x)


def methods_to_draw(methods: list[tuple], options: Options) -> list[tuple]:
    """Return the methods that --methods names. Without any, return all, or the last and first of each layer if many."""
    if chosen := [method for method in methods if label(method) in options.methods]:
        return chosen
    layers = [list(group) for _, group in itertools.groupby(methods, lambda method: method[0][1])]
    ends = dict.fromkeys(group[i] for i in (-1, 0) for group in layers)
    return methods if len(methods) <= MAX_CURVES else sorted([*ends][:MAX_CURVES], key=sort_key)


def draw_bands(axes, lines: dict, styles: dict) -> None:
    """Draw a line and its band for each method. `lines` maps a method to x, middle, low and high."""
    for method, (x, middle, low, high) in lines.items():
        style = {name: styles[method][name] for name in ("color", "ls")}
        axes.plot(x, middle, **style, marker="." if len(x) < 10 else "", label=label(method))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


def compute_curves(runs: list[Run], scores: dict, aggregated: list[Run], options: Options) -> dict[str, dict]:
    """Return the curves of each panel, as a dict from methods to steps, middle, low and high.

    The panel of a game has the mean, minimum and maximum of raw scores. The panel ALL has the IQM and its interval.
    """
    groups, found = group_runs(runs), defaultdict(dict)
    for game, method in sorted(groups, key=lambda key: (key[0], sort_key(key[1]))):
        group = groups[game, method]
        if len(steps := common_steps(group)):
            values = scores_at(group, steps, "score")
            found[game][method] = steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    groups = group_runs(aggregated)
    for method, games in scores.items():
        by_game = [groups[game, method] for game in games if groups[game, method]]
        group = sum(by_game, [])
        if group and len(steps := common_steps(group)):
            steps = steps[:: -max(1, len(steps) // 20)][::-1]  # every n-th step up to the last one
            values = scores_at(group, steps, "normalized").T  # (steps, runs)
            samples = iqm(values[:, bootstrap_indices(by_game, options)])  # (steps, repetitions)
            found[ALL][method] = steps, iqm(values), *interval(samples.T)
    return found


def draw_authors_range(axes, agent: str, game: str, encoders: set[str], last: float) -> None:
    """Draw the range of the authors' seeds on a game up to the frame `last`."""
    with open(REFERENCE, newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["agent"], row["game"]) == (agent, game.lower())]
    for encoder in sorted(encoders):
        points = [(1e6 * (int(row["iteration"]) + 1), row) for row in rows if row["encoder"] == encoder]
        points = [(frames, float(row["min"]), float(row["max"])) for frames, row in points if frames <= last]
        if points:
            name = f"authors' dense {encoder}" + " (C51, 3-step, prioritised only)" * (agent == "Rainbow")
            style = {"fc": "none", "ec": "0.6", "hatch": "////", "lw": 0, "label": name}
            axes.fill_between(*zip(*points, strict=True), **style)


def plot_curves(agent: str, runs: list[Run], panels: dict, unit: str, options: Options) -> None:
    """Plot learning curves, with a panel for each game and one for the aggregate of all games."""
    if not panels:
        print(f"{agent}: no curves, because no episode ended in any iteration")
        return
    methods = sorted({run.method for run in runs}, key=sort_key)
    drawn, styles, rows = methods_to_draw(methods, options), line_styles(methods), []
    if rest := [label(method) for method in methods if method not in drawn]:
        print(f"{agent}: {len(drawn)} methods have curves; --methods can select others: {'; '.join(rest)}")
    encoders = {"CNN" if run.encoder == "nature" else "Impala" for run in runs}
    smooth = f"\n(mean of {SMOOTH} iterations)" * any(len(run.step) >= LONG for run in runs)
    steps = unit_of_steps(agent)
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    figure, grid = make_grid(len(panels), columns, WIDTH * columns, 2.2)
    for axes, (game, lines) in zip(grid, panels.items(), strict=True):
        for method, line in lines.items():
            rows += [{"panel": game} | row for row in csv_rows(method, (steps, "middle", "low", "high"), *line)]
        lines = {method: line for method, line in lines.items() if method in drawn}
        draw_bands(axes, lines, styles)
        draw_authors_range(axes, agent, game, encoders, max((x[-1] for x, *_ in lines.values()), default=0))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(title=game, xlabel="frames (agent steps x 4)" if steps == "frames" else steps)
        axes.set_ylabel((f"IQM, {unit}" if game == ALL else "return") + smooth)
    add_legend(figure)
    save_figure(figure, rows, options.output, agent, "curves")


def plot_profiles(agent: str, scores: dict, unit: str, when: str, options: Options) -> None:
    """Plot the fraction of runs with a score above tau, over tau (Agarwal et al., 2021, section 4.2)."""
    values = {method: np.concatenate([*games.values()]) for method, games in scores.items()}
    tau = np.linspace(min(x.min() for x in values.values()), max(x.max() for x in values.values()), 100)
    lines, rows = {}, []
    for method, games in scores.items():
        samples = np.sort(values[method][bootstrap_indices(games.values(), options)])  # (repetitions, runs)
        fractions = [1 - np.searchsorted(sample, tau, side="right") / samples.shape[1] for sample in samples]
        lines[method] = tau, (values[method] > tau[:, None]).mean(axis=1), *interval(np.array(fractions))
        rows += csv_rows(method, ("tau", "share", "low", "high"), *lines[method])
    figure, axes = plt.subplots(figsize=(WIDTH, 2.2))
    draw_bands(axes, {method: lines[method] for method in methods_to_draw([*scores], options)}, line_styles(scores))
    axes.set(xlabel=f"score tau, {unit}, {when}", ylabel="fraction of runs above tau")
    add_legend(figure)
    save_figure(figure, rows, options.output, agent, "profiles")


def plot_improvement(agent: str, scores: dict, when: str, options: Options) -> None:
    """Plot the probability of improvement over dense layers of single width (Agarwal et al., 2021, section 4.3)."""
    dense = [method for method in scores if method[:2] == (("layer", "dense"), ("num_experts", "1"))]
    pairs = [(x, y) for x, y in itertools.product(scores, dense) if x != y and {*y[2:]} <= {*x[2:]}]
    if not pairs:
        print(f"{agent}: no figure of improvement, because no method has all flags of a dense layer of single width")
        return
    figure, axes = plt.subplots(figsize=(figure_width(scores), 0.6 + 0.3 * len(pairs)))
    rows, styles = [], line_styles(scores)
    for x, y in pairs:
        p, (low, high) = probability_of_improvement([*scores[x].values()], [*scores[y].values()], options)
        style = {"fmt": "o", "color": styles[x]["color"], "ms": 3.5, "capsize": 2}
        axes.errorbar(p, f"{label(x)}\n> {label(y)}", xerr=[[p - low], [high - p]], **style)
        rows.append({"pair": f"{label(x)} > {label(y)}", "probability": p, "low": low, "high": high})
    axes.axvline(0.5, color="0.6", ls=":")
    axes.set(xlim=(-0.02, 1.02), ylim=(len(pairs) - 0.5, -0.5), xlabel=f"probability of improvement, {when}")
    save_figure(figure, rows, options.output, agent, "improvement")


def plot_published(agent: str, runs: list[Run], options: Options) -> None:
    """Plot the evaluations of our runs beside the median and the middle 90% of published seeds on each game."""
    with open(options.published, newline="") as file:
        published = {row["game"]: row for row in csv.DictReader(file)}
    runs = [run for run in runs if run.evaluation and run.game in published]
    games, methods = sorted({run.game for run in runs}), sorted({run.method for run in runs}, key=sort_key)
    if not games:
        print(f"{agent}: no run has an evaluation on a game of {options.published}")
        return
    columns, styles, rows = min(len(games), 6), line_styles(methods), []
    figure, grid = make_grid(len(games), columns, max(1.1 * columns, WIDTH), 1.7)
    for axes, game in zip(grid, games, strict=True):
        low, middle, high = (float(published[game][name]) for name in ("q05", "median", "q95"))
        seeds = f"{published[game]['runs']} published seeds"
        axes.axhspan(low, high, color="0.85", lw=0, label=f"5 to 95% of {seeds}")
        axes.axhline(middle, color="0.35", lw=1, label=f"median of {seeds}")
        for i, method in enumerate(methods):
            scores = {run.seed: run.evaluation[0] for run in runs if (run.game, run.method) == (game, method)}
            style = {name: styles[method][name] for name in ("color", "marker")}
            style |= {"ls": "", "ms": 4, "mec": "black", "mew": 0.4, "label": label(method)}
            axes.plot(i + 0.1 * (np.arange(len(scores)) - (len(scores) - 1) / 2), [*scores.values()], **style)
            quantiles = {"game": game, "q05": low, "median": middle, "q95": high}
            rows += [quantiles | row for row in csv_rows(method, ("seed", "score"), scores, scores.values())]
        axes.set(title=game, xlim=(-0.6, len(methods) - 0.4), xticks=[])
        axes.margins(y=0.1)
    figure.supylabel("mean return of the evaluation", fontsize=7)
    add_legend(figure)
    save_figure(figure, rows, options.output, agent, "published")
    outside = [row for row in rows if not row["q05"] <= row["score"] <= row["q95"]]
    print(f"{agent}: {len(rows) - len(outside)} of {len(rows)} runs are between the published 5% and 95% quantiles")
    for row in outside:
        print(f"    outside: {row['game']} {row['layer']} seed {row['seed']}: {row['score']:g}")


def main(options: Options) -> None:
    if options.repetitions < 1:
        raise ValueError("--repetitions must be at least 1")
    agents, columns = read_results(options.results)
    if not agents:
        raise ValueError(f"{options.results} contains no runs")
    if options.x not in columns:
        raise ValueError(f"--x {options.x} is not a column of {options.results}; choose from {', '.join(columns)}")
    known = {label(run.method) for runs in agents.values() for run in runs}
    if unknown := [name for name in options.methods if name not in known]:
        raise ValueError(f"--methods {unknown[0]} is not a method of any run; choose from {'; '.join(sorted(known))}")
    options.output.mkdir(parents=True, exist_ok=True)
    for agent, runs in agents.items():
        aggregated, unit = normalize_scores(agent, runs)
        scores, when = final_scores(agent, aggregated)
        plot_curves(agent, runs, compute_curves(runs, scores, aggregated, options), unit, options)
        if options.published:
            plot_published(agent, runs, options)
        if not scores:
            print(f"{agent}: no aggregates, because no game has a score of every method")
            continue
        rows = plot_methods(agent, aggregated, scores, unit, when, options)
        plot_over_x(agent, list(scores), rows, f"IQM, {unit},\n{when}", options)
        plot_profiles(agent, scores, unit, when, options)
        plot_improvement(agent, scores, when, options)


if __name__ == "__main__":
    with importlib.import_module("dqn_softmoe").one_line_errors(Exception):
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
