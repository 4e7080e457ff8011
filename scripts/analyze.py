"""Measure the networks that a run saved in training: rank, norms, dormant neurons, similar experts (paper, figure 10).

    python scripts/analyze.py runs/Pong__rainbow__* -o figures

Runs must be trained with --weights-every. All networks of a run are measured on one batch of transitions that the last
network collects with --epsilon. analysis.csv has every measure of every network. A figure for each agent shows
--measures. It has a row per game, a column per measure, and a line per method: the mean over seeds with its 95%
bootstrap interval.
srank/<t>: number of singular values of the features (B, F) above t times the largest, as in the authors' code
(labs/moes/agents/full_rainbow_moe_agent.py). srank/0 is the numerical rank, which ignores rounding errors.
effective_rank: smallest number of singular values whose sum is 99% of the sum of all (Kumar et al., 2021).
feature_norm, param_norm: norm of the variances of the features over the batch, and of all parameters.
ntk_*: statistics of the empirical neural tangent kernel, the Gram matrix (B, B) of the gradients of the transitions'
losses. ntk_rank/<t> is its srank. The others are the means on and off its diagonal and the share of negative entries.
td_loss_mean, td_loss_var: mean and variance of the loss over the transitions.
q_mean, q_std: mean and standard deviation of the Q-values over states and actions.
dormant, dormant/<expert>: fraction of neurons, of the layer and of one expert, whose mean activation is at most tau
times the mean of the layer (Sokar et al., 2023).
expert_similarity: mean cosine similarity of the outputs of two experts for the same tokens.
"""

import itertools
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import collect
import numpy as np
import plot
import torch
import tyro
from evaluate import load
from torch import Tensor, nn
from tqdm import tqdm

import dqn_softmoe
import moe_layers as moe

THRESHOLDS = (0.0, 0.001, 0.01)
MEASURES = {  # what is drawn by default, and its label; all other measures are labelled with their names
    "srank/0.01": "srank of features\n(singular values > 1%)",
    "effective_rank": "effective rank\nof features (99%)",
    "feature_norm": "feature norm",
    "dormant": "fraction of\ndormant neurons",
    "ntk_rank/0.01": "srank of the NTK\n(singular values > 1%)",
    "expert_similarity": "cosine similarity\nof expert outputs",
}


@dataclass
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run directories
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("figures")  # folder for the figures and analysis.csv
    batch_size: int = 64  # number of transitions, whose gradients are in memory at the same time
    steps: int = 1_000  # agent steps played to collect the transitions
    epsilon: float = 0.05  # probability of a random action in these steps
    tau: float = 0.0  # neurons are dormant up to this multiple of the layer's mean activation
    measures: tuple[str, ...] = tuple(MEASURES)  # columns of the figure; analysis.csv has all measures
    repetitions: int = 2_000  # number of bootstrap samples
    seed: int = 1  # random seed of games, actions, transitions and the bootstrap


def srank(matrix: Tensor, threshold: float) -> int:
    """Return the number of singular values above `threshold` times the largest and above the rounding error."""
    values = torch.linalg.svdvals(matrix.double())
    rounding = max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return int((values > max(threshold, rounding) * values[0]).sum())


def effective_rank(matrix: Tensor, share: float = 0.99) -> int:
    """Return the smallest number of singular values whose sum is at least `share` of the sum of all."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values.cumsum(0) < share * values.sum()).sum()) + 1


def losses_and_gradients(script, q_network: nn.Module, args, batch) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) and the gradient (B, parameters) of each transition. The network is its own target."""
    losses, rows, parameters = [], [], list(q_network.parameters())
    weight = [torch.ones(1)] * (len(script.Batch._fields) - 6)  # importance weight, which not every agent has
    for i in range(len(batch.action)):
        one = script.Batch(*(x[i : i + 1] for x in batch[:6]), *weight)
        loss = script.td_loss(q_network, q_network, one, args)[0]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(rows)


def expert_similarity(experts: moe.Experts, tokens: Tensor) -> float:
    """Return the mean cosine similarity of the outputs of two experts for the same tokens (T, D)."""
    E = len(experts.w1)
    outputs, _ = experts(tokens.expand(1, E, *tokens.shape))  # (1, E, T, D)
    outputs = nn.functional.normalize(outputs[0].flatten(1), dim=1)  # (E, T * D)
    return ((outputs @ outputs.T).sum() - E).item() / (E * (E - 1))


def measure(script, q_network: nn.Module, args, batch, tau: float) -> dict[str, float]:
    """Return all measures of one network on one batch."""
    with torch.no_grad():
        features, output = q_network.features(batch.obs)
        hidden = features if output is None else output.hidden
        found = {f"srank/{t:g}": srank(features, t) for t in THRESHOLDS}
        found["effective_rank"] = effective_rank(features)
        found["feature_norm"] = features.var(dim=0, unbiased=False).norm().item()
        found["dormant"] = moe.dormant_fraction(hidden, tau).item()
        if output is not None:
            shares = moe.dormant_neurons(hidden, tau).float().mean(dim=1)
            found |= {f"dormant/{i}": share.item() for i, share in enumerate(shares)}
            if isinstance(q_network.moe.experts, moe.Experts) and len(shares) > 1:
                tokens = q_network.tokenizer(q_network.encoder(batch.obs.float() / 255)).flatten(0, 1)  # (B * T, D)
                found["expert_similarity"] = expert_similarity(q_network.moe.experts, tokens)
        q_values = q_network.q_values(batch.obs)
        found |= {"q_mean": q_values.mean().item(), "q_std": q_values.std(unbiased=False).item()}
        found["param_norm"] = nn.utils.get_total_norm(q_network.parameters()).item()
    losses, grads = losses_and_gradients(script, q_network, args, batch)
    found |= {"td_loss_mean": losses.mean().item(), "td_loss_var": losses.var(unbiased=False).item()}
    gram = grads @ grads.T  # (B, B)
    B, diagonal = len(gram), gram.diagonal()
    found |= {f"ntk_rank/{t:g}": srank(gram, t) for t in THRESHOLDS}
    found["ntk_diagonal_mean"] = diagonal.mean().item()
    found["ntk_off_diagonal_mean"] = ((gram.sum() - diagonal.sum()) / (B * (B - 1))).item()
    return found | {"ntk_negative": (gram < 0).float().mean().item()}


def play_transitions(args, q_network: nn.Module, options: Options) -> dqn_softmoe.Batch:
    """Play the game with `q_network`, and return a batch of the transitions."""
    envs, size = dqn_softmoe.Environments(args, 4), options.steps + 4 * (args.n_step + 10)
    replay = dqn_softmoe.ReplayBuffer(size, 4, envs.frame_shape, n_step=args.n_step, gamma=args.gamma)
    obs = torch.zeros(4, dqn_softmoe.STACK_SIZE, *envs.frame_shape, dtype=torch.uint8)
    frame, start = envs.reset(options.seed), np.ones(4, bool)
    torch.manual_seed(options.seed)
    for _ in range(options.steps // 4):
        with torch.no_grad():
            q_values = q_network.q_values(dqn_softmoe.push(obs, frame, start))
        action = dqn_softmoe.select_actions(q_values, options.epsilon).numpy()
        envs.send(action)
        following, reward, terminated, truncated, _ = envs.recv()
        replay.add(frame, action, reward.clip(-1, 1), terminated, truncated)
        frame, start = following, terminated | truncated
    if not replay.weight.any():
        raise ValueError(f"--steps {options.steps} is too small: no transition of {args.n_step} steps is complete")
    return replay.sample(options.batch_size)


class Point(NamedTuple):
    agent: str
    game: str
    seed: int
    step: int
    flags: dict[str, str]  # layer, num_experts and the other flags of the run
    measures: dict[str, float]


def measure_run(run: Path, options: Options) -> list[Point]:
    """Return a point for each file in weights/."""
    saved = sorted((run / "weights").glob("[0-9]*.pt"), key=lambda file: int(file.stem))
    script, args, q_network, _ = load(saved[-1])
    agent, _ = collect.agent_and_defaults(script, vars(args))
    flags = {"layer": args.layer, "num_experts": str(args.num_experts)}
    flags |= {name: str(value) for name, value in vars(args).items() if name not in collect.NOT_SETTINGS}
    batch, found = play_transitions(args, q_network, options), []
    for path in tqdm(saved, desc=run.name, unit="point", dynamic_ncols=True):
        q_network.load_state_dict(dqn_softmoe.read_file(path))
        measures = measure(script, q_network, args, batch, options.tau)
        found.append(Point(agent, collect.game_of(args.env_id), args.seed, int(path.stem), flags, measures))
    return found


def plot_measures(agent: str, points: list[Point], methods: list[tuple], options: Options) -> None:
    """Plot --measures of an agent's points: a row per game, a column per measure, a line per method."""
    values = defaultdict(lambda: defaultdict(list))  # (game, measure, method) -> step -> values of all seeds
    for point, method in sorted(zip(points, methods, strict=True), key=lambda pair: pair[0].step):
        for name in options.measures:
            if name in point.measures:
                values[point.game, name, method][point.step].append(point.measures[name])
    games = sorted({game for game, *_ in values})
    names = [name for name in options.measures if any(name == key[1] for key in values)]
    if not names:
        print(f"{agent}: no figure, because no network has {' or '.join(options.measures)}")
        return
    styles, rows, unit = plot.line_styles({*methods}), [], plot.unit_of_steps(agent)
    size = {"figsize": (1.9 * len(names), 1.5 * len(games) + 0.3), "sharex": True, "squeeze": False}
    figure, grid = plot.plt.subplots(len(games), len(names), **size)
    for (game, name), axes in zip(itertools.product(games, names), grid.flat, strict=True):
        for method in sorted({*methods}, key=plot.sort_key):
            if by_step := values[game, name, method]:
                seeds = [np.array(x) for x in by_step.values()]
                intervals = [plot.interval(x[plot.bootstrap_indices([x], options)].mean(axis=1)) for x in seeds]
                x = (4 if unit == "frames" else 1) * np.array([*by_step])
                line = x, [x.mean() for x in seeds], *zip(*intervals, strict=True)
                plot.draw_bands(axes, {method: line}, styles)
                found = plot.csv_rows(method, (unit, "mean", "low", "high"), *line)
                rows += [{"game": game, "measure": name} | row for row in found]
        axes.set(title=game, ylabel=MEASURES.get(name, name))
        axes.xaxis.set_major_formatter(plot.EngFormatter(sep=""))
    for axes in grid[-1]:
        axes.set_xlabel("frames (agent steps x 4)" if unit == "frames" else unit)
    plot.add_legend(figure)
    plot.save_figure(figure, rows, options.output, agent, "analysis")


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    runs = [run for run in options.runs if any((run / "weights").glob("[0-9]*.pt"))]
    for run in options.runs:
        if run not in runs:
            print(f"left out: {run} has no weights/; train it with --weights-every", file=sys.stderr)
    if not runs:
        raise ValueError("no run with weights/")
    points = [point for run in runs for point in measure_run(run, options)]
    known = {*MEASURES}.union(*(point.measures for point in points))
    if unknown := {*options.measures} - known:
        raise ValueError(f"--measures {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    rows = []
    for agent in sorted({point.agent for point in points}):
        group = [point for point in points if point.agent == agent]
        names = plot.method_flags([*group[0].flags], [point.flags for point in group])
        methods = [tuple((name, point.flags[name]) for name in names[point.flags["layer"]]) for point in group]
        for point, method in zip(group, methods, strict=True):
            identity = {"agent": agent, "game": point.game, "seed": point.seed, "step": point.step}
            rows.append(identity | dict(method) | point.measures)
        plot_measures(agent, group, methods, options)
    plot.write_csv(options.output / "analysis.csv", rows)
    print(f"{len(rows)} points in {options.output / 'analysis.csv'}")


if __name__ == "__main__":
    with dqn_softmoe.one_line_errors(Exception):
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
