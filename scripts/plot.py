"""Scores to figures: IQM by method and over a flag, learning curves, performance profiles, probability of improvement.

    python scripts/plot.py results.csv -o figures
    python scripts/plot.py results.csv --x replay_ratio       # or any other column: num_experts, parameters, ...
    python scripts/plot.py results.csv --published scripts/drq_eps_100k.csv

Reads what collect.py writes. A method is a layer, its number of experts, and the other flags in which an agent's runs
differ. Makes <agent>_methods, _<x>, _curves, _profiles, _improvement and _published, each as PNG and PDF, with its
numbers as CSV. Aggregates are those of Agarwal et al. (2021) over human-normalised scores, equal to rliable's:
interquartile mean, intervals that hold 95% of a bootstrap stratified by game. They use the runs that are there, on the
games that all methods of an agent have; runs that lack are listed. Where no game of an agent has a human score, its
scores are scaled per game from the lowest to the highest of all runs.
A run's score is its evaluation after training in DER and DrQ(eps), in the others the iteration at the last step that
all runs of the agent have. Curves of 25 iterations or more are means of five. Beside ours, they show the authors'
published ones (dense networks, Breakout and Pong, five seeds: minimum to maximum). --published compares evaluations
with other people's seeds, such as the 100 of DrQ(eps) in drq_eps_100k.csv (rliable's Atari-100k data, as kept in the
repository eloialonso/iris, results/data/DrQ(eps).json).
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
WIDTH = 3.3  # inches of a column
LAYERS = {  # name and colour (Okabe and Ito's palette)
    "dense": ("Dense", "#D55E00"),
    "gap": ("Average pooling", "#E69F00"),
    "tokenized": ("Dense on tokens", "#56B4E9"),
    "top1moe": ("Top-1 MoE", "#009E73"),
    "expert_choice": ("Expert choice", "#CC79A7"),
    "softmoe": ("Soft MoE", "#0072B2"),
}
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
SIZES = {"num_experts", "expert_hidden_dim", "encoder_width"}  # flags that a line over `parameters` runs through
LOW_DATA = ("DER", "DrQ(eps)")  # agents whose score is the evaluation after training
CURVES = 6  # methods in a panel of curves, unless --methods names others
LONG, SMOOTH = 25, 5  # curves of at least so many iterations are means of so many
NUMBER = re.compile(r"\d[\d.]*(e[+-]?\d+)?")
ALL = "all games"  # a panel of curves
REFERENCE = Path(__file__).with_name("reference_curves.csv")


@dataclass
class Options:
    results: Annotated[Path, tyro.conf.Positional]  # the CSV file of collect.py
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("figures")  # folder
    x: str = "num_experts"  # column over which the IQM of each method is a line
    methods: tuple[str, ...] = ()  # methods whose curves are drawn, as legends name them (default: at most six)
    published: Path | None = None  # CSV file of published scores: game, runs, q05, median, q95
    repetitions: int = 2_000  # bootstrap samples
    seed: int = 1  # of the bootstrap


class Run(NamedTuple):
    agent: str
    game: str
    seed: int
    method: tuple  # pairs of a flag and its value
    encoder: str
    parameters: float
    step: np.ndarray  # of every iteration: frames, which are agent steps x 4; offline updates
    score: np.ndarray  # raw
    normalized: np.ndarray  # in %, nan where the game has no human score
    evaluation: tuple[float, float] | None  # raw and normalised score after training


def number(text: str) -> float:
    return float(text) if text else np.nan


def named_flags(flags: list[str], runs: list[dict]) -> dict[str, list[str]]:
    """Layer -> flags that tell its methods apart, from each other and from those of another layer."""
    values = defaultdict(lambda: defaultdict(set))
    for run, flag in itertools.product(runs, flags):
        values[run["layer"]][flag].add(run[flag])

    def tells(own: dict, flag: str) -> bool:
        return len(own[flag]) > 1 or any(not own[flag] <= other[flag] for other in values.values())

    return {layer: [flag for flag in flags if flag in flags[:2] or tells(own, flag)] for layer, own in values.items()}


def read(path: Path) -> tuple[dict[str, list[Run]], list[str]]:
    """Agent -> its runs, and the columns that --x may name."""
    with open(path, newline="") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if "encoder_parameters" not in header:
            raise ValueError(f"{path} is no table of collect.py's")
        width, agents = header.index("iteration"), defaultdict(list)
        for key, rows in itertools.groupby(lines, lambda line: line[:width]):
            run = dict(zip(header, key, strict=False))
            agents[run["agent"]].append((run, [line[width:] for line in rows]))
    flags, found = header[2 : header.index("seed")], defaultdict(list)
    for agent, runs in sorted(agents.items()):
        names = named_flags(flags, [run for run, _ in runs])
        for run, rows in runs:
            numbers = [(frames or step, score, normal) for i, step, frames, score, normal in rows if i != "eval"]
            evaluation = [(number(score), number(normal)) for i, *_, score, normal in rows if i == "eval"]
            method = tuple((name, run[name]) for name in names[run["layer"]])
            encoder = run.get("encoder", "nature" if agent in LOW_DATA else "impala")
            which = agent, run["game"], int(run["seed"]), method, encoder, number(run["parameters"])
            columns = np.array([[*map(number, row)] for row in numbers]).reshape(-1, 3).T
            found[agent].append(Run(*which, *columns, *(evaluation or [None])))
    return found, [*flags[1:], "parameters"]


def label(method: tuple) -> str:
    words = dict(method)
    layer, experts = words.pop("layer"), words.pop("num_experts", None)
    found = [LAYERS[layer][0]]
    if experts and "moe" not in layer and layer != "expert_choice":
        found += [f"width x{experts}"] * (experts != "1")
    elif experts:
        found.append(f"{experts} expert{'s' * (experts != '1')}")
    for name, value in words.items():
        name, value = name.replace("_", " "), f"{float(value):g}" if NUMBER.fullmatch(value) else value
        found.append({"True": name, "False": f"no {name}"}.get(value, f"{name} {value}"))
    return ", ".join(found)


def order(method: tuple) -> list:
    """Key that sorts methods by layer, then by their flags as numbers where these are."""
    (_, layer), *flags = method
    values = [(float(value), "") if NUMBER.fullmatch(value) else (0.0, value) for _, value in flags]
    return [list(LAYERS).index(layer), *values]


def looks(methods: list[tuple]) -> dict[tuple, dict]:
    """Method -> how its line looks: a hue per layer, its last method the darkest, and dashes for readers in grey."""
    found, ranked = {}, sorted(methods, key=order, reverse=True)
    for i, (layer, those) in enumerate(itertools.groupby(ranked, lambda method: method[0][1])):
        those = list(those)
        for j, method in enumerate(those):
            light = 0.55 * j / max(len(those) - 1, 1)
            color = tuple(light + (1 - light) * part for part in to_rgb(LAYERS[layer][1]))
            found[method] = {"color": color, "ls": DASHES[(i + j) % 4], "marker": "osD^v<>P"[(i + j) % 8]}
    return found


def save(figure, rows: list[dict], path: Path) -> None:
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=200)
    plt.close(figure)
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
    print(path.with_suffix(".png"))


def file_name(agent: str, picture: str) -> str:
    return re.sub(r"\W+", "_", agent.lower()).strip("_") + f"_{picture}"  # drq_eps_curves


def width_of(methods) -> float:
    """Inches of a picture with a row per method."""
    return WIDTH + max(0.0, 0.055 * max(len(label(method)) for method in methods) - 1)


def legend(figure) -> None:
    """Of all axes, below them, in as many columns as fit; the figure grows by it."""
    width, height = figure.get_size_inches()
    parts = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {text: handle for part in parts for handle, text in part}
    columns = max(1, int(width / (0.45 + 0.055 * max(map(len, handles)))))
    figure.set_size_inches(width, height + 0.14 * -(-len(handles) // columns) + 0.1)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


# ------------------------------------------------------------------------------------------------------- statistics
def draws(games: Iterable, options: Options, random: np.random.Generator | None = None) -> np.ndarray:
    """Places of bootstrap samples (repetitions, runs): of each game's runs, as many as there are, among its own."""
    random, start, found = random or np.random.default_rng(options.seed), 0, []
    for runs in games:
        found.append(start + random.integers(len(runs), size=(options.repetitions, len(runs))))
        start += len(runs)
    return np.concatenate(found, axis=1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Mean of the last axis without the lowest and the highest quarter."""
    n = scores.shape[-1]
    return np.sort(scores, axis=-1)[..., n // 4 : n - n // 4].mean(axis=-1)


def bounds(samples: np.ndarray) -> np.ndarray:
    """95% of the samples (repetitions, ...) are between these (2, ...)."""
    return np.percentile(samples, (2.5, 97.5), axis=0)


def improvement(x: list[np.ndarray], y: list[np.ndarray], options: Options) -> tuple[float, np.ndarray]:
    """P(a run of x beats one of y on a random game), and its interval; x and y have an array of scores per game."""
    total, samples, random = 0.0, np.zeros(options.repetitions), np.random.default_rng(options.seed)
    for one, two in zip(x, y, strict=True):
        wins = (one[:, None] > two) + 0.5 * (one[:, None] == two)
        i, j = draws([one], options, random), draws([two], options, random)
        total += wins.mean() / len(x)
        samples += wins[i[:, :, None], j[:, None, :]].mean(axis=(1, 2)) / len(x)
    return total, bounds(samples)


def by_game_and_method(runs: list[Run]) -> dict[tuple, list[Run]]:
    """Those with at least one iteration."""
    found = defaultdict(list)
    for run in runs:
        if len(run.step):
            found[run.game, run.method].append(run)
    return found


def scores_at(runs: list[Run], steps: np.ndarray, column: str) -> np.ndarray:
    """Scores (runs, steps): of the last iteration until each step; long curves are means of SMOOTH iterations."""
    found = []
    for run in runs:
        values = getattr(run, column)
        if len(values) >= LONG:
            sums = np.cumsum([0.0, *values])
            first = np.maximum(np.arange(1, len(values) + 1) - SMOOTH, 0)
            values = (sums[1:] - sums[first]) / (np.arange(1, len(values) + 1) - first)
        found.append(values[np.searchsorted(run.step, steps, side="right") - 1])
    return np.array(found)


def common_steps(runs: list[Run]) -> np.ndarray:
    """The steps of iterations from where all runs have begun to where the first of them ends."""
    steps = np.unique(np.concatenate([run.step for run in runs]))
    return steps[(steps >= max(run.step[0] for run in runs)) & (steps <= min(run.step[-1] for run in runs))]


def scaled(agent: str, runs: list[Run]) -> tuple[list[Run], str]:
    """The runs with scores to aggregate, and their unit; games without a human score only count if no game has one."""
    without = sorted({run.game for run in runs if not np.isfinite(run.normalized[-1:]).all()})
    if len(without) < len({run.game for run in runs}):
        if without:
            print(f"{agent}: {', '.join(without)} have no human score and are in no aggregate")
        return [run for run in runs if run.game not in without], "% of human"
    ends, found = {}, []
    for run in runs:
        low, high = ends.get(run.game, (np.inf, -np.inf))
        values = [*run.score, *(run.evaluation or ())[:1]]
        ends[run.game] = min(low, *values), max(high, *values)
    for run in runs:
        low, high = ends[run.game]
        evaluation = run.evaluation and (run.evaluation[0], 100 * (run.evaluation[0] - low) / (high - low or 1))
        found.append(run._replace(normalized=100 * (run.score - low) / (high - low or 1), evaluation=evaluation))
    return found, "% of the range of all runs"


def final_scores(agent: str, runs: list[Run]) -> tuple[dict[tuple, dict[str, np.ndarray]], str]:
    """Method -> game -> scores, of the games that all methods have; and when these scores were made, in words."""
    found, missing = defaultdict(lambda: defaultdict(dict)), defaultdict(list)  # method -> game -> seed -> score
    last = min((run.step[-1] for run in runs if len(run.step)), default=0)
    when = "after training" if agent in LOW_DATA else f"at {EngFormatter(sep='')(last)} {unit_of_steps(agent)}"
    for run in runs:
        at = np.searchsorted(run.step, last, side="right") - 1
        if agent in LOW_DATA and run.evaluation:
            found[run.method][run.game][run.seed] = run.evaluation[1]
        elif agent not in LOW_DATA and at >= 0:
            found[run.method][run.game][run.seed] = run.normalized[at]
        else:
            missing[run.method].append(f"{run.game} seed {run.seed} (no score {when})")
    methods = sorted({run.method for run in runs}, key=order)
    games, seeds = (sorted({getattr(run, name) for run in runs}) for name in ("game", "seed"))
    used = [game for game in games if all(found[method][game] for method in methods)]
    n = sum(len(found[method][game]) for method in methods for game in used)
    print(f"{agent}: {len(methods)} methods, {len(used)} games, {n} runs in the aggregates, scores {when}")
    there = {(run.method, run.game, run.seed) for run in runs}
    for method, game in itertools.product(methods, games):
        if gone := [str(seed) for seed in seeds if (method, game, seed) not in there]:
            missing[method].append(f"{game} seed{'s' * (len(gone) > 1)} {', '.join(gone)}")
    for method in filter(missing.get, methods):
        print(f"    missing of {label(method)}: {'; '.join(missing[method])}")
    if len(used) < len(games):
        print(f"    in no aggregate, as a method lacks them: {', '.join(game for game in games if game not in used)}")
    scores = {method: {game: np.array([*found[method][game].values()]) for game in used} for method in methods}
    return scores if used else {}, when


# --------------------------------------------------------------------------------------------------------- pictures
def unit_of_steps(agent: str) -> str:
    return "updates" if agent.startswith("CQL") else "frames"


def table(method: tuple, names: tuple, *columns) -> list[dict]:
    """Rows of a picture's CSV file."""
    return [dict(method) | dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def plot_methods(agent: str, runs: list[Run], scores: dict, unit: str, when: str, options: Options) -> list[dict]:
    """IQM of each method, with its interval; returns the rows."""
    rows, look = [], looks(list(scores))
    figure, axes = plt.subplots(figsize=(width_of(scores), 0.6 + 0.17 * len(scores)))
    for method, games in scores.items():
        values = np.concatenate([*games.values()])
        middle, (low, high) = iqm(values), bounds(iqm(values[draws(games.values(), options)]))
        error = [[middle - low], [high - middle]]
        axes.errorbar(middle, label(method), xerr=error, fmt="o", color=look[method]["color"], ms=3.5, capsize=2)
        parameters = np.mean([run.parameters for run in runs if run.method == method])
        row = dict(method) | {"parameters": f"{parameters:.0f}" if np.isfinite(parameters) else ""}
        rows.append(row | {"iqm": middle, "low": low, "high": high, "runs": len(values)})
    axes.set(xlabel=f"IQM, {unit}, {when}", ylim=(len(rows) - 0.5, -0.5))
    save(figure, rows, options.output / file_name(agent, "methods"))
    return rows


def plot_over(agent: str, methods: list[tuple], rows: list[dict], ylabel: str, options: Options) -> None:
    """IQM over --x, a line through the methods that differ in it alone; rows as in the picture of methods."""
    lines, x = defaultdict(list), options.x
    for method, row in zip(methods, rows, strict=True):
        if row.get(x):
            without = SIZES if x == "parameters" else {x}
            lines[tuple(pair for pair in method if pair[0] not in without)].append(row)
    lines = {line: those for line, those in lines.items() if len(those) > 1}
    if not lines:
        print(f"{agent}: no picture over {x}, of which no method has more than one value")
        return
    look, texts = looks(list(lines)), list(dict.fromkeys(row[x] for those in lines.values() for row in those))
    numeric = all(map(NUMBER.fullmatch, texts))
    ticks = {text: float(text) if numeric else i for i, text in enumerate(texts)}
    figure, axes = plt.subplots(figsize=(WIDTH, 2.2))
    for line, those in lines.items():
        those.sort(key=lambda row: ticks[row[x]])
        middle, low, high = (np.array([row[name] for row in those]) for name in ("iqm", "low", "high"))
        style = look[line] | {"label": label(line), "ms": 3.5, "capsize": 2}
        style |= {} if numeric else {"ls": ""}  # nothing lies between names
        axes.errorbar([ticks[row[x]] for row in those], middle, np.stack([middle - low, high - middle]), **style)
    if numeric and min(ticks.values()) > 0 and max(ticks.values()) >= 4 * min(ticks.values()):
        axes.set_xscale("log", base=10 if x == "parameters" else 2)
    if x == "parameters":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.set_xticks([*ticks.values()], [f"{tick:g}" for tick in ticks.values()] if numeric else texts)
        axes.minorticks_off()
    names = {"num_experts": "experts (dense: width / 512)", "parameters": "parameters of the network"}
    axes.set(xlabel=names.get(x, x.replace("_", " ")), ylabel=ylabel)
    legend(figure)
    save(figure, [row for those in lines.values() for row in those], options.output / file_name(agent, x))


def shown(methods: list[tuple], options: Options) -> list[tuple]:
    """Methods whose curves are drawn: those of --methods, or all; of many the last and first of each layer."""
    if options.methods:
        return [method for method in methods if label(method) in options.methods]
    layers = [list(those) for _, those in itertools.groupby(methods, lambda method: method[0][1])]
    ends = dict.fromkeys(those[i] for i in (-1, 0) for those in layers)
    return methods if len(methods) <= CURVES else sorted([*ends][:CURVES], key=order)


def draw_bands(axes, lines: dict, look: dict) -> None:
    """A line with its band for each method -> x, middle, low, high."""
    for method, (x, middle, low, high) in lines.items():
        style = {name: look[method][name] for name in ("color", "ls")}
        axes.plot(x, middle, **style, marker="." if len(x) < 10 else "", label=label(method))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


def curves_of(runs: list[Run], scores: dict, aggregated: list[Run], options: Options) -> dict[str, dict]:
    """Game -> method -> steps, mean, minimum and maximum of raw scores; ALL -> method -> steps, IQM and interval."""
    groups, found = by_game_and_method(runs), defaultdict(dict)
    for game, method in sorted(groups, key=lambda key: (key[0], order(key[1]))):
        those = groups[game, method]
        if len(steps := common_steps(those)):
            values = scores_at(those, steps, "score")
            found[game][method] = steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    groups = by_game_and_method(aggregated)
    for method, games in scores.items():
        those = [groups[game, method] for game in games if groups[game, method]]
        if those and len(steps := common_steps(sum(those, []))):
            steps = steps[:: -max(1, len(steps) // 20)][::-1]  # which keeps the last
            values = scores_at(sum(those, []), steps, "normalized").T  # (steps, runs)
            samples = iqm(values[:, draws(those, options)])  # (steps, repetitions)
            found[ALL][method] = steps, iqm(values), *bounds(samples.T)
    return found


def draw_authors(axes, agent: str, game: str, encoders: set[str], last: float) -> None:
    """The range of the authors' seeds on a game, up to the last step of ours."""
    with open(REFERENCE, newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["agent"], row["game"]) == (agent, game.lower())]
    for encoder in sorted(encoders):
        band = [row for row in rows if row["encoder"] == encoder and 1e6 * (int(row["iteration"]) + 1) <= last]
        if band:
            frames, low, high = zip(*((int(row["iteration"]) + 1, row["min"], row["max"]) for row in band), strict=True)
            name = f"authors' dense {encoder}" + " (C51, 3-step, prioritised only)" * (agent == "Rainbow")
            style = {"fc": "none", "ec": "0.6", "hatch": "////", "lw": 0, "label": name}
            axes.fill_between(1e6 * np.array(frames), [*map(float, low)], [*map(float, high)], **style)


def plot_curves(agent: str, runs: list[Run], panels: dict, unit: str, options: Options) -> None:
    """A panel per game, and one of all games."""
    if not panels:
        print(f"{agent}: no curves, as no run has an iteration in which an episode ended")
        return
    methods = sorted({run.method for run in runs}, key=order)
    drawn, look, rows = shown(methods, options), looks(methods), []
    if rest := [label(method) for method in methods if method not in drawn]:
        print(f"{agent}: curves of {len(drawn)} methods; --methods draws others: {'; '.join(rest)}")
    encoders = {"CNN" if run.encoder == "nature" else "Impala" for run in runs}
    smooth = f"\n(mean of {SMOOTH} iterations)" * any(len(run.step) >= LONG for run in runs)
    steps = unit_of_steps(agent)
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    figure, grid = plt.subplots(-(-len(panels) // columns), columns, squeeze=False)
    figure.set_size_inches(WIDTH * columns, 2.2 * grid.shape[0])
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (game, lines) in zip(grid.flat, panels.items(), strict=False):
        for method, line in lines.items():
            rows += [{"panel": game} | row for row in table(method, (steps, "middle", "low", "high"), *line)]
        lines = {method: line for method, line in lines.items() if method in drawn}
        draw_bands(axes, lines, look)
        draw_authors(axes, agent, game, encoders, max((x[-1] for x, *_ in lines.values()), default=0))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(title=game, xlabel="frames (agent steps x 4)" if steps == "frames" else steps)
        axes.set_ylabel((f"IQM, {unit}" if game == ALL else "return") + smooth)
    legend(figure)
    save(figure, rows, options.output / file_name(agent, "curves"))


def plot_profiles(agent: str, scores: dict, unit: str, when: str, options: Options) -> None:
    """Share of runs with a score above tau (Agarwal et al., 2021, section 4.2)."""
    values = {method: np.concatenate([*games.values()]) for method, games in scores.items()}
    tau = np.linspace(min(x.min() for x in values.values()), max(x.max() for x in values.values()), 100)
    lines, rows = {}, []
    for method, games in scores.items():
        samples = np.sort(values[method][draws(games.values(), options)])  # (repetitions, runs)
        shares = [1 - np.searchsorted(sample, tau, side="right") / samples.shape[1] for sample in samples]
        lines[method] = tau, (values[method] > tau[:, None]).mean(axis=1), *bounds(np.array(shares))
        rows += table(method, ("tau", "share", "low", "high"), *lines[method])
    figure, axes = plt.subplots(figsize=(WIDTH, 2.2))
    draw_bands(axes, {method: lines[method] for method in shown(list(scores), options)}, looks(list(scores)))
    axes.set(xlabel=f"score tau, {unit}, {when}", ylabel="share of runs above tau")
    legend(figure)
    save(figure, rows, options.output / file_name(agent, "profiles"))


def plot_improvement(agent: str, scores: dict, when: str, options: Options) -> None:
    """P(a run of X beats one of Y on a random game), Y dense of one width (Agarwal et al., 2021, section 4.3)."""
    dense = [method for method in scores if method[:2] == (("layer", "dense"), ("num_experts", "1"))]
    pairs = [(x, y) for x, y in itertools.product(scores, dense) if x != y and {*y[2:]} <= {*x[2:]}]
    if not pairs:
        print(f"{agent}: no picture of improvement, there is no dense layer of one width with the same flags")
        return
    figure, axes = plt.subplots(figsize=(width_of(scores), 0.6 + 0.3 * len(pairs)))
    rows, look = [], looks(list(scores))
    for x, y in pairs:
        p, (low, high) = improvement([*scores[x].values()], [*scores[y].values()], options)
        style = {"fmt": "o", "color": look[x]["color"], "ms": 3.5, "capsize": 2}
        axes.errorbar(p, f"{label(x)}\n> {label(y)}", xerr=[[p - low], [high - p]], **style)
        rows.append({"pair": f"{label(x)} > {label(y)}", "probability": p, "low": low, "high": high})
    axes.axvline(0.5, color="0.6", ls=":")
    axes.set(xlim=(-0.02, 1.02), ylim=(len(pairs) - 0.5, -0.5), xlabel=f"probability of improvement, {when}")
    save(figure, rows, options.output / file_name(agent, "improvement"))


def plot_published(agent: str, runs: list[Run], options: Options) -> None:
    """Evaluations of our runs beside the middle 90% and the median of published seeds, per game."""
    with open(options.published, newline="") as file:
        published = {row["game"]: row for row in csv.DictReader(file)}
    runs = [run for run in runs if run.evaluation and run.game in published]
    games, methods = sorted({run.game for run in runs}), sorted({run.method for run in runs}, key=order)
    if not games:
        print(f"{agent}: no evaluation on a game of {options.published}")
        return
    columns, look, rows = min(len(games), 6), looks(methods), []
    figure, grid = plt.subplots(-(-len(games) // columns), columns, squeeze=False)
    figure.set_size_inches(max(1.1 * columns, WIDTH), 1.7 * grid.shape[0])
    for axes in grid.flat[len(games) :]:
        axes.set_axis_off()
    for axes, game in zip(grid.flat, games, strict=False):
        low, middle, high = (float(published[game][name]) for name in ("q05", "median", "q95"))
        seeds = f"{published[game]['runs']} published seeds"
        axes.axhspan(low, high, color="0.85", lw=0, label=f"5 to 95% of {seeds}")
        axes.axhline(middle, color="0.35", lw=1, label=f"median of {seeds}")
        for i, method in enumerate(methods):
            those = {run.seed: run.evaluation[0] for run in runs if (run.game, run.method) == (game, method)}
            style = {name: look[method][name] for name in ("color", "marker")}
            style |= {"ls": "", "ms": 4, "mec": "black", "mew": 0.4, "label": label(method)}
            axes.plot(i + 0.1 * (np.arange(len(those)) - (len(those) - 1) / 2), [*those.values()], **style)
            known = {"game": game, "q05": low, "median": middle, "q95": high}
            rows += [known | row for row in table(method, ("seed", "score"), those, those.values())]
        axes.set(title=game, xlim=(-0.6, len(methods) - 0.4), xticks=[])
        axes.margins(y=0.1)
    figure.supylabel("mean return of the evaluation", fontsize=7)
    legend(figure)
    save(figure, rows, options.output / file_name(agent, "published"))
    outside = [row for row in rows if not row["q05"] <= row["score"] <= row["q95"]]
    names = [f"{row['game']} {row['layer']} seed {row['seed']}: {row['score']:g}" for row in outside]
    said = f"{agent}: {len(rows) - len(outside)} of {len(rows)} runs are in the published 5 to 95%"
    print(", not ".join([said, *["; ".join(names)] * bool(names)]))


def main(options: Options) -> None:
    if options.repetitions < 1:
        raise ValueError("--repetitions must be at least 1")
    agents, columns = read(options.results)
    if not agents:
        raise ValueError(f"{options.results} has no rows of collect.py's")
    if options.x not in columns:
        raise ValueError(f"--x {options.x} is no column of {options.results}; there are {', '.join(columns)}")
    known = {label(run.method) for runs in agents.values() for run in runs}
    if unknown := [name for name in options.methods if name not in known]:
        raise ValueError(f"--methods {unknown[0]}: no run has it; there are {'; '.join(sorted(known))}")
    options.output.mkdir(parents=True, exist_ok=True)
    for agent, runs in agents.items():
        aggregated, unit = scaled(agent, runs)
        scores, when = final_scores(agent, aggregated)
        plot_curves(agent, runs, curves_of(runs, scores, aggregated, options), unit, options)
        if options.published:
            plot_published(agent, runs, options)
        if not scores:
            print(f"{agent}: no aggregates, no game has a score of every method")
            continue
        rows = plot_methods(agent, aggregated, scores, unit, when, options)
        plot_over(agent, list(scores), rows, f"IQM, {unit},\n{when}", options)
        plot_profiles(agent, scores, unit, when, options)
        plot_improvement(agent, scores, when, options)


if __name__ == "__main__":
    with importlib.import_module("dqn_softmoe").one_line_errors(Exception):
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
