"""What becomes of a network in training (paper, figure 10): rank, norm, dormant neurons, similarity of experts.

    python scripts/analyze.py runs/Pong__rainbow__* -o figures

Takes runs with --weights-every: every file in weights/ is a point. All of a run are measured on the same transitions,
played with its last weights at --epsilon. Writes analysis.csv, analysis.png and analysis.pdf:
srank/<t>: singular values of the features (B, F) above t times the largest; feature_norm: norm of their variance over
the batch; ntk_rank/<t>: the same of the Gram matrix (B, B) of the gradients of each transition's loss; dormant and
dormant/<expert>: share of neurons whose mean activation is at most tau of the layer's (Sokar et al., 2023);
expert_similarity: mean cosine between the outputs of two experts for the same tokens.
"""

import csv
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from evaluate import load  # which puts the agents on the path
from torch import Tensor, nn
from tqdm import tqdm

import dqn_softmoe
import moe_layers as moe

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError as error:
    print(f"error: {error}; pip install -r scripts/requirements.txt", file=sys.stderr)
    raise SystemExit(2) from None

THRESHOLDS = (0.0, 0.001, 0.01)


@dataclass
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run directories
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("figures")  # folder
    batch_size: int = 64  # transitions; their gradients are in memory together
    steps: int = 1_000  # agent steps that are played for them
    epsilon: float = 0.05  # share of random actions in these
    tau: float = 0.0  # a neuron is dormant up to this share of the mean activation
    seed: int = 1  # of games, actions and draws


def srank(matrix: Tensor, threshold: float) -> int:
    """Singular values that are above `threshold` times the largest."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > threshold * values[0]).sum())


def gradients(script, q_network: nn.Module, args, batch) -> Tensor:
    """Gradient of every transition's loss, (B, parameters); the network is its own target."""
    rows, parameters = [], list(q_network.parameters())
    for i in range(len(batch.action)):
        one = script.Batch(*(x[i : i + 1] for x in batch[:6]))
        loss = script.td_loss(q_network, q_network, one, args)[0]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def expert_similarity(experts: moe.Experts, tokens: Tensor) -> float:
    """Mean cosine between the outputs (T, D), as vectors, of two experts that read the same tokens (T, D)."""
    E = len(experts.w1)
    outputs, _ = experts(tokens.expand(1, E, *tokens.shape))  # (1, E, T, D)
    outputs = nn.functional.normalize(outputs[0].flatten(1), dim=1)  # (E, T * D)
    return ((outputs @ outputs.T).sum() - E).item() / (E * (E - 1))


def measure(script, q_network: nn.Module, args, batch, tau: float) -> dict[str, float]:
    """All of the metrics, of one network on one batch."""
    with torch.no_grad():
        features, output = q_network.features(batch.obs)
        hidden = features if output is None else output.hidden
        found = {f"srank/{t:g}": srank(features, t) for t in THRESHOLDS}
        found["feature_norm"] = features.var(dim=0, unbiased=False).norm().item()
        found["dormant"] = moe.dormant_fraction(hidden, tau).item()
        if output is not None:
            shares = moe.dormant_neurons(hidden, tau).float().mean(dim=1)
            found |= {f"dormant/{i}": share.item() for i, share in enumerate(shares)}
            if isinstance(q_network.moe.experts, moe.Experts) and len(shares) > 1:
                tokens = q_network.tokenizer(q_network.encoder(batch.obs.float() / 255)).flatten(0, 1)  # (B * T, D)
                found["expert_similarity"] = expert_similarity(q_network.moe.experts, tokens)
    grads = gradients(script, q_network, args, batch)
    gram = grads @ grads.T  # (B, B)
    return found | {f"ntk_rank/{t:g}": srank(gram, t) for t in THRESHOLDS}


def play(script, args, q_network: nn.Module, options: Options):
    """A batch of transitions of the game, with the run's own replay."""
    envs = dqn_softmoe.Environments(args, 4)
    replay = dqn_softmoe.ReplayBuffer(options.steps + 40, 4, envs.frame_shape, n_step=args.n_step, gamma=args.gamma)
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
    return replay.sample(options.batch_size)


def points(run: Path, options: Options) -> list[dict]:
    """A row per file of weights."""
    saved = sorted((run / "weights").glob("[0-9]*.pt"), key=lambda file: int(file.stem))
    script, args, q_network, _ = load(saved[-1])
    batch, rows = play(script, args, q_network, options), []
    for path in tqdm(saved, desc=run.name, unit="point", dynamic_ncols=True):
        q_network.load_state_dict(torch.load(path, weights_only=True))
        rows.append({"run": run.name, "step": int(path.stem)} | measure(script, q_network, args, batch, options.tau))
    return rows


def picture(rows: list[dict], path: Path) -> None:
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in ("run", "step")]
    names = [name for name in names if not name.startswith("dormant/")]
    figure, grid = plt.subplots(-(-len(names) // 3), 3, figsize=(9, 2.2 * -(-len(names) // 3)), layout="constrained")
    styles = itertools.product(("-", "--", ":"), ("0.0", "0.45", "0.7"))
    for run, (style, grey) in zip(dict.fromkeys(row["run"] for row in rows), itertools.cycle(styles), strict=False):
        for name, axes in zip(names, grid.flat, strict=False):
            those = [(row["step"], row[name]) for row in rows if row["run"] == run and name in row]
            axes.plot(*zip(*those, strict=True), ls=style, color=grey, marker=".", label=run)
    for name, axes in itertools.zip_longest(names, grid.flat):
        axes.set_axis_off() if name is None else axes.set_title(name, fontsize=8)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=200)


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    runs = [run for run in options.runs if any((run / "weights").glob("[0-9]*.pt"))]
    for run in set(options.runs) - set(runs):
        print(f"left out: {run} has no weights/: train with --weights-every", file=sys.stderr)
    if not runs:
        raise ValueError("no run with weights/")
    rows = [row for run in runs for row in points(run, options)]
    with open(options.output / "analysis.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    picture(rows, options.output / "analysis")
    print(f"{len(rows)} points in {options.output / 'analysis.csv'}, picture in {options.output / 'analysis.png'}")


if __name__ == "__main__":
    with dqn_softmoe.one_line_errors(Exception):
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
