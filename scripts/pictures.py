"""Draw layer.png and breakout.png of the READMEs in scripts/results: `python scripts/pictures.py`."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
from ale_py.vector_env import AtariVectorEnv
from matplotlib.patches import Rectangle

SCRIPTS, RESULTS = Path(__file__).parent, Path(__file__).parent / "results"
BLUE, GREY, HUES = "#0072B2", "#888888", ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's palette
RUNS = {"DQN": "breakout_dqn_dense_nature_seed1", "Rainbow": "breakout_rainbow_c51_dense_nature_seed1"}
plt.rcParams |= {"font.size": 9, "figure.constrained_layout.use": True, "legend.frameon": False}

# layer.png: every slot is a mixture of all tokens, and every output token is a mixture of all slots.
figure = plt.figure(figsize=(9, 3.7), dpi=110)
ax = figure.add_subplot(xlim=(0, 96), ylim=(-2, 39), aspect="equal", frame_on=False, xticks=[], yticks=[])
frame = AtariVectorEnv("breakout", 1, stack_num=1, use_fire_reset=True).reset(seed=1)[0][0, 0]
for k in range(4):
    ax.imshow(frame, cmap="gray", extent=(k, 10 + k, 14 - k, 24 - k), zorder=k)
    ax.add_patch(Rectangle((21 + k, 14 - k), 9, 9, fc="white", ec=GREY, zorder=k))
ax.scatter([25 + 0.7 * (i % 11) for i in range(121)], [12 + 0.7 * (i // 11) for i in range(121)], s=3, c=GREY, zorder=9)
tokens, slots = [1.5 + 3.2 * i for i in range(10)], [2 + 2.1 * i + 2.1 * (i // 3) for i in range(12)]
for i, slot in enumerate(slots):
    for token in tokens:
        ax.plot([42.6, 52.5], [token, slot], [68.5, 79], [slot, token], c=HUES[i // 3], lw=0.4, alpha=0.4)
    ax.add_patch(Rectangle((52.5, slot - 0.8), 3, 1.6, fc=HUES[i // 3], alpha=0.45))
    ax.add_patch(Rectangle((65.5, slot - 0.8), 3, 1.6, fc=HUES[i // 3]))
for e, hue in enumerate(HUES):
    ax.add_patch(Rectangle((56.5, slots[3 * e] - 0.8), 8, 5.8, fc=hue))
    ax.text(60.5, slots[3 * e + 1], f"expert {e + 1}", c="white", ha="center", va="center", fontsize=8)
for token in tokens:
    ax.add_patch(Rectangle((39, token - 0.8), 3.6, 1.6, fc="#cccccc", ec=GREY, lw=0.6))
    ax.add_patch(Rectangle((79, token - 0.8), 3.6, 1.6, fc="#cccccc", ec=GREY, lw=0.6))
for start, end in ((13.5, 20.5), (33.5, 38.5), (83, 88)):
    ax.annotate("", (end, 16), (start, 16), arrowprops={"arrowstyle": "-|>", "color": "black"})
ax.text(92, 16, "Q(s, a)", ha="center", va="center")
labels = {6.5: "4 frames,\n84 × 84", 27: "encoder:\nC × 11 × 11", 40.8: "121 tokens\nof C numbers"}
labels |= {60.5: "slots and\nexperts", 80.8: "121 tokens\nof C numbers", 92: "flattened,\nhead"}
for x, text in labels.items():
    ax.text(x, 39, text, ha="center", va="top")
ax.text(47.5, -2, "dispatch: softmax over tokens", ha="center", c=GREY)
ax.text(74, -2, "combine: softmax over slots", ha="center", c=GREY)
figure.savefig(RESULTS / "layer.png")

# breakout.png: mean return of our first iterations, and the lowest, mean and highest of the published seeds.
figure, axes = plt.subplots(1, 2, figsize=(7, 2.3), dpi=130, sharey=True)
published = list(csv.DictReader((SCRIPTS / "reference_curves.csv").open()))
for ax, (agent, run) in zip(axes, RUNS.items(), strict=True):
    rows = [row for row in published if (row["game"], row["agent"], row["encoder"]) == ("breakout", agent, "CNN")][:4]
    low, mean, high = ([float(row[name]) for row in rows] for name in ("min", "mean", "max"))
    ours = [float(row["mean_return"]) for row in csv.DictReader((RESULTS / run / "metrics.csv").open())]
    ax.fill_between(range(1, 5), low, high, color=GREY, alpha=0.5, lw=0, label="published, range of 5 seeds")
    ax.plot(range(1, 5), mean, color="black", lw=1, ls="--", label="published, mean")
    ax.plot(range(1, len(ours) + 1), ours, "o", color=BLUE, label="this code, 1 seed")
    title = "DQN" if agent == "DQN" else "C51, 3-step, prioritised"  # the published "Rainbow"
    ax.set(title=f"{title}, dense layer", xlabel="million frames", xticks=range(1, 5))
axes[0].set_ylabel("Breakout, mean return")
axes[0].legend(fontsize=8, loc="upper left")
figure.savefig(RESULTS / "breakout.png")
