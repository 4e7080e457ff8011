"""From run directories to numbers and pictures: collect, plot, analyze, evaluate, watch, doctor."""

import csv
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import HELPERS, ROOT, fork_script, only_run, quick, read_csv

import dqn_softmoe
import moe_layers as moe
import rainbow_softmoe

sys.path.append(str(ROOT / "scripts"))
analyze, collect, evaluate, plot = map(importlib.import_module, ("analyze", "collect", "evaluate", "plot"))


def run(script, *given, cwd=ROOT):
    return fork_script(ROOT / "scripts" / f"{script}.py", *given, cwd=cwd)


# -------------------------------------------------------------------------------------------------- collect and plot


def fake_run(folder: Path, script, scores, finished=True, evaluation=None, **settings) -> Path:
    """Write what a run leaves, with these scores of its iterations, and return its folder."""
    folder.mkdir(parents=True)
    args = asdict(script.Args(**settings))
    offline = "total_updates" in args
    steps, length = args["iteration_updates" if offline else "iteration_steps"], "total_updates" * offline
    config = {"script": f"{script.__name__}.py", "args": args}
    config["finished"] = args[length or "total_timesteps"] if finished else 0
    (folder / "config.json").write_text(json.dumps(config))
    rows = [f"{i},{(i + 1) * steps},{'' if score is None else score}\n" for i, score in enumerate(scores)]
    header = f"iteration,{'updates' if offline else 'global_step'},mean_return\n"
    (folder / "metrics.csv").write_text(header + "".join(rows))
    if evaluation is not None:
        (folder / "eval.json").write_text(json.dumps({"mean_return": evaluation, "global_step": len(scores) * steps}))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Return runs of four methods on two games, with two seeds each."""
    rng, found = np.random.default_rng(0), []
    for layer, experts in (("dense", 1), ("softmoe", 1), ("softmoe", 4), ("softmoe", 8)):
        for game in ("Breakout", "Pong"):
            for seed in (1, 2):
                settings = {"env_id": f"{game}NoFrameskip-v4", "seed": seed, "layer": layer, "num_experts": experts}
                scores = [None, *(rng.random(3) * 20).round(2)]
                name = tmp_path / "runs" / f"{game}{layer}{experts}{seed}"
                found.append(fake_run(name, dqn_softmoe, scores, encoder="nature", **settings))
    return found


def test_collect_makes_a_tidy_table_and_says_what_it_left_out(runs, tmp_path, capsys):
    def said(*given, output="results.csv"):
        collect.main(collect.Options(given, output=tmp_path / output))
        return " ".join(capsys.readouterr().out.split())

    more = tmp_path / "more"
    settings = {"env_id": "ALE/Breakout-v5", "seed": 1, "layer": "dense", "encoder": "nature"}
    twice = fake_run(more / "twice", dqn_softmoe, [1.0], **settings)
    going_on = fake_run(more / "going_on", dqn_softmoe, [1.0], finished=False, env_id="QbertNoFrameskip-v4")
    der = fake_run(more / "der", importlib.import_module("der_softmoe"), [5.0], evaluation=30.5, seed=3, augment=True)
    raw = fake_run(more / "raw", dqn_softmoe, [7.0], env_id="PooyanNoFrameskip-v4")
    text = said(*runs, twice, going_on, der, raw, more)
    rows = read_csv(tmp_path / "results.csv")
    assert len(rows) == 16 * 3 + 2 + 1
    first = {"game": "Breakout", "agent": "DQN", "layer": "dense", "num_experts": "1", "encoder": "nature"}
    first |= {"augment": "", "seed": "1", "iteration": "1", "step": "500000", "frames": "2000000"}
    network = dqn_softmoe.QNetwork(dqn_softmoe.Args(layer="dense", encoder="nature"), (4, 84, 84), 4)
    sizes = {"parameters": network, "encoder_parameters": network.encoder, "layer_parameters": network.moe}
    sizes |= {"head_parameters": network.head}
    first |= {name: str(sum(p.numel() for p in part.parameters())) for name, part in sizes.items()}
    assert first.items() <= rows[0].items()
    assert float(rows[0]["normalized"]) == pytest.approx(100 * (float(rows[0]["score"]) - 1.7) / (30.5 - 1.7), abs=1e-3)
    assert [(row["iteration"], row["augment"], row["normalized"]) for row in rows if row["agent"] == "DER"] == [
        ("0", "True", "11.4583"),
        ("eval", "True", "100.0000"),
    ]
    assert [row["normalized"] for row in rows if row["game"] == "Pooyan"] == [""]
    for words in (f"{twice}: duplicate of {runs[0]}", f"{going_on}: not finished", f"{more}: not a run directory"):
        assert words in text
    assert "Breakout DQN softmoe 8: no seed 1, 2" in text and "DER softmoe" not in text  # an agent has its own seeds
    text = said(*runs[3:], output="new/results.csv")
    assert "Breakout DQN dense 1 encoder=nature: no seed 1, 2 Pong DQN dense 1 encoder=nature: no seed 1" in text
    with pytest.raises(ValueError, match="no finished run"):
        said(going_on, output="none.csv")
    capsys.readouterr()
    with pytest.raises(ValueError, match="among the 12 that"):
        said(*(tmp_path / f"missing{i}" for i in range(12)), output="none.csv")
    assert [line.count("missing") for line in capsys.readouterr().out.splitlines()] == [2] * 10 + [0]
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("config", text)
        for text in ("{", "[]", "5", '{"args": []}', '{"script": "dqn_softmoe.py", "args": {"layer": 5}}')
    ]
    + [("eval", text) for text in ("", "[]", "{}", '{"mean_return": "x", "global_step": 1}', '{"mean_return": NaN}')],
)
def test_any_json_that_is_no_run_s_is_listed_as_damaged(name, content, tmp_path, capsys):
    good, bad = (fake_run(tmp_path / word, dqn_softmoe, [1.0], evaluation=2.0, seed=i) for i, word in enumerate("ab"))
    (bad / f"{name}.json").write_text(content)
    collect.main(collect.Options(runs=(good, bad), output=tmp_path / "results.csv"))
    assert f"{bad}: damaged" in capsys.readouterr().out
    assert {row["seed"] for row in read_csv(tmp_path / "results.csv")} == {"0"}


def test_collect_takes_the_runs_of_a_list_and_names_those_that_lack(tmp_path, capsys):
    line = "python dqn_softmoe.py --seed 1 --runs-dir {} --run-name run{} --resume auto\n"
    (tmp_path / "a.list").write_text("# four runs\n\n" + "".join(line.format(tmp_path, i) for i in range(4)))
    fake_run(tmp_path / "run0", dqn_softmoe, [1.0])
    fake_run(tmp_path / "run1", dqn_softmoe, [1.0], seed=2, finished=False)
    (fake_run(tmp_path / "run2", dqn_softmoe, [1.0], seed=3) / "config.json").write_text("[]")
    fake_run(tmp_path / "another", dqn_softmoe, [1.0], seed=4)
    collect.main(collect.Options(list=tmp_path / "a.list", output=tmp_path / "results.csv"))
    said = capsys.readouterr().out
    assert said.startswith("1 runs, 1 rows") and "another" not in said
    for words in ("run1: not finished", "run2: damaged", "run3: missing"):
        assert words in said
    (tmp_path / "bad.list").write_text("python dqn_softmoe.py --seed 1\n")
    done = run("collect", "--list", tmp_path / "bad.list", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}/bad.list: line 1 has no --run-name\n")


def pictures(folder: Path, runs, **options) -> Path:
    """Collect these runs, plot them, and return the folder of the pictures."""
    given = {"output": folder / "figures", "repetitions": 200} | options
    collect.main(collect.Options(tuple(runs), output=folder / "results.csv", unfinished=True))
    plot.main(plot.Options(folder / "results.csv", **given))
    return given["output"]


@pytest.fixture
def numbers_only(monkeypatch):
    """Draw no pictures, which takes most of the time. Their numbers are in CSV files beside them."""
    monkeypatch.setattr(plot.matplotlib.figure.Figure, "savefig", lambda *_, **__: None)


def test_plot_draws_the_numbers_of_the_table(runs, tmp_path, capsys):
    figures = pictures(tmp_path, runs)
    assert "DQN: 4 methods, 2 games, 16 runs in the aggregates, scores at 4M frames" in capsys.readouterr().out
    for name in ("methods", "num_experts", "curves", "profiles", "improvement"):
        assert (figures / f"dqn_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (figures / f"dqn_{name}.pdf").read_bytes().startswith(b"%PDF")
    last, first = {}, defaultdict(list)
    for row in read_csv(tmp_path / "results.csv"):
        last[row["layer"], row["num_experts"], row["game"], row["seed"]] = float(row["normalized"])
        if row["iteration"] == "1":
            first[row["layer"], row["num_experts"]].append(float(row["normalized"]))
    curves = {
        (row["layer"], row["num_experts"], row["panel"], float(row["frames"])): row
        for row in read_csv(figures / "dqn_curves.csv")
    }
    for method, scores in first.items():
        row = curves[*method, "all games", 2e6]
        assert float(row["middle"]) == pytest.approx(np.mean(sorted(scores)[1:3]))
        assert float(row["low"]) <= float(row["middle"]) <= float(row["high"])
    assert {row["layer"] for row in read_csv(figures / "dqn_num_experts.csv")} == {"softmoe"}
    methods = read_csv(figures / "dqn_methods.csv")
    assert len(methods) == 4
    for row in methods:
        scores = sorted(score for key, score in last.items() if key[:2] == (row["layer"], row["num_experts"]))
        assert float(row["iqm"]) == pytest.approx(np.mean(scores[1:3])) and row["runs"] == "4"  # a quarter off each end
        assert float(row["low"]) <= float(row["iqm"]) <= float(row["high"])
    for row in read_csv(figures / "dqn_profiles.csv"):
        scores = [score for key, score in last.items() if key[:2] == (row["layer"], row["num_experts"])]
        assert float(row["share"]) == pytest.approx(np.mean([score > float(row["tau"]) for score in scores]))


def test_intervals_are_rliable_s():
    from rliable import library, metrics

    rng, options = np.random.default_rng(0), plot.Options(Path(), repetitions=1_000)
    x, y = (rng.normal(mean, 1 + np.arange(4), (5, 4)).round(1) for mean in (1.0, 0.0))  # (runs, games)
    given = {"reps": 1_000, "random_state": np.random.RandomState(0)}
    for scores in (x, y):
        expected = library.get_interval_estimates({"": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), **given)
        values, drawn = scores.T.flatten(), plot.bootstrap_indices(scores.T, options)
        assert plot.iqm(values) == pytest.approx(expected[0][""][0])
        assert plot.interval(plot.iqm(values[drawn])) == pytest.approx(expected[1][""][:, 0], abs=0.15)
    better, given = {"": (x, y)}, given | {"reps": 400}  # they are slow
    expected = library.get_interval_estimates(
        better, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), **given
    )
    p, bounds = plot.probability_of_improvement([*x.T], [*y.T], options)
    assert p == pytest.approx(expected[0][""][0]) and bounds == pytest.approx(expected[1][""][:, 0], abs=0.03)


@pytest.mark.usefixtures("numbers_only")
def test_aggregates_use_the_runs_that_are_there_and_name_those_that_lack(runs, tmp_path, capsys):
    figures = pictures(tmp_path, [path for path in runs if path.name != "Pongsoftmoe82"])
    said = capsys.readouterr().out
    assert "missing scores of Soft MoE, 8 experts: Pong seed 2\n" in said and "15 runs in the aggregates" in said
    assert [row["runs"] for row in read_csv(figures / "dqn_methods.csv")] == ["4", "4", "4", "3"]
    last = [float(read_csv(runs[i] / "metrics.csv")[-1]["mean_return"]) for i in (12, 13, 14)]
    scores = sorted([100 * (x - 1.7) / 28.8 for x in last[:2]] + [100 * (last[2] + 20.7) / 35.3])
    assert float(read_csv(figures / "dqn_methods.csv")[-1]["iqm"]) == pytest.approx(np.mean(scores), abs=1e-3)
    figures = pictures(tmp_path, [path for path in runs if not path.name.startswith("Pongsoftmoe8")])
    assert "left out of the aggregates, for lack of a score of every method: Pong\n" in capsys.readouterr().out
    methods = read_csv(figures / "dqn_methods.csv")
    assert {row["runs"] for row in methods} == {"2"}
    ends = [
        row
        for row in read_csv(figures / "dqn_curves.csv")
        if (row["panel"], row["frames"]) == ("all games", "4000000.0")
    ]
    assert [row["middle"] for row in ends] == [row["iqm"] for row in methods]  # of the same games


@pytest.mark.usefixtures("numbers_only")
def test_runs_of_unequal_length_are_compared_at_the_last_step_that_all_have(tmp_path, capsys):
    pong = {"env_id": "PongNoFrameskip-v4"}
    short = fake_run(tmp_path / "short", dqn_softmoe, [3.0, 5.0], finished=False, layer="dense", **pong)
    whole = fake_run(tmp_path / "whole", dqn_softmoe, [1.0, 2.0, 9.0, 20.0], **pong)
    figures = pictures(tmp_path, [short, whole])
    assert "scores at 2M frames" in capsys.readouterr().out
    found = [float(row["iqm"]) for row in read_csv(figures / "dqn_methods.csv")]
    assert found == pytest.approx([100 * 25.7 / 35.3, 100 * 22.7 / 35.3], abs=1e-3)


@pytest.mark.usefixtures("numbers_only")
def test_curves_of_long_runs_are_smoothed_and_end_at_the_last_iteration(tmp_path):
    scores = np.random.default_rng(0).random((2, 200)).round(3)
    found = [fake_run(tmp_path / str(i), dqn_softmoe, scores[i], seed=i, total_timesteps=50_000_000) for i in (0, 1)]
    rows = read_csv(pictures(tmp_path, found) / "dqn_curves.csv")
    games, every = ([row for row in rows if row["panel"].startswith(name)] for name in ("Breakout", "all games"))
    assert [float(part[-1]["frames"]) for part in (games, every)] == [2e8, 2e8] and 20 <= len(every) < 25
    means = scores[:, -5:].mean(axis=1)
    assert [float(games[-1][name]) for name in ("middle", "low", "high")] == pytest.approx(
        [means.mean(), min(means), max(means)]
    )
    assert float(games[1]["middle"]) == pytest.approx(scores[:, :2].mean())
    normal = np.sort(100 * (means - 1.7) / 28.8)
    assert float(every[-1]["middle"]) == pytest.approx(normal.mean(), abs=1e-3)


@pytest.mark.usefixtures("numbers_only")
def test_a_line_over_a_flag_has_the_paper_s_value_as_a_number(tmp_path, capsys):
    found = []
    for layer, ratio in (("dense", 0.25), ("softmoe", 0.25), ("softmoe", 0.5), ("softmoe", 2.0)):
        name = tmp_path / f"{layer}{ratio}"
        found.append(fake_run(name, dqn_softmoe, [ratio], layer=layer, replay_ratio=ratio))
    rows = read_csv(pictures(tmp_path, found, x="replay_ratio") / "dqn_replay_ratio.csv")
    assert [(row["layer"], row["replay_ratio"]) for row in rows] == [("softmoe", x) for x in ("0.25", "0.5", "2.0")]
    agents, columns = plot.read_results(tmp_path / "results.csv")
    labels = [plot.label(method) for method in sorted({run.method for run in agents["DQN"]}, key=plot.sort_key)]
    assert labels == ["Dense"] + [f"Soft MoE, 8 experts, replay ratio {x}" for x in ("0.25", "0.5", "2")]
    assert columns == ["num_experts", "replay_ratio", "parameters"]
    rows = read_csv(pictures(tmp_path, found[1:], x="parameters") / "dqn_methods.csv")
    assert {row["parameters"] for row in rows} == {"383829"}
    for wrong in ({"x": "replay_raito"}, {"methods": ("Soft MoE",)}):
        with pytest.raises(ValueError, match="choose from"):
            plot.main(plot.Options(tmp_path / "results.csv", output=tmp_path / "no", **wrong))
    assert not (tmp_path / "no").exists()


def test_at_most_six_methods_are_drawn_unless_others_are_named():
    layers = itertools.product(("dense", "top1moe", "softmoe"), "1248")
    methods = [(("layer", layer), ("num_experts", experts)) for layer, experts in layers]
    shown = [plot.label(method) for method in plot.methods_to_draw(methods, plot.Options(Path()))]
    assert shown == ["Dense", "Dense, width x8"] + [
        f"{layer}, {n}" for layer in ("Top-1 MoE", "Soft MoE") for n in ("1 expert", "8 experts")
    ]
    assert plot.methods_to_draw(methods[:6], plot.Options(Path())) == methods[:6]
    assert plot.methods_to_draw(methods, plot.Options(Path(), methods=("Soft MoE, 2 experts",))) == [methods[9]]
    of_another_agent = plot.Options(Path(), methods=("Soft MoE, 2 experts",))
    assert plot.methods_to_draw(methods[:6], of_another_agent) == methods[:6]
    looks = [tuple(map(str, look.values())) for look in plot.line_styles(methods).values()]
    assert len(set(looks)) == 12


@pytest.mark.usefixtures("numbers_only")
def test_low_data_agents_have_names_of_their_own_and_their_score_is_the_evaluation(tmp_path, capsys):
    der, found = importlib.import_module("der_softmoe"), []
    drq = {"distributional": False, "noisy": False, "prioritized": False, "augment": True}
    drq |= {"target_network_frequency": 1, "epsilon_decay_steps": 5_000}
    for name, flags in (("der", {}), ("drq", drq), ("half", {"distributional": False})):
        found.append(fake_run(tmp_path / name, der, [1.0], evaluation=30.5, **flags))
    found.append(fake_run(tmp_path / "none", der, [1.0], env_id="PongNoFrameskip-v4"))
    figures = pictures(tmp_path, found)
    said = capsys.readouterr().out
    assert "missing scores of Soft MoE, 4 experts, distributional: Pong seed 1\n" in said
    assert [float(row["iqm"]) for row in read_csv(figures / "drq_eps_methods.csv")] == [100]
    rows = read_csv(figures / "der_methods.csv")
    assert [(row["distributional"], float(row["iqm"])) for row in rows] == [("False", 100), ("True", 100)]


@pytest.mark.usefixtures("numbers_only")
@pytest.mark.parametrize("script, lacks", [("dqn_softmoe", "iteration"), ("der_softmoe", "evaluation")])
def test_runs_without_a_score_are_named(script, lacks, tmp_path, capsys):
    script, given = importlib.import_module(script), {"evaluation": 2.0} if lacks == "iteration" else {}
    short = fake_run(tmp_path / "short", script, [None] if given else [1.0], **given)
    pictures(tmp_path, [short])
    said = capsys.readouterr().out
    assert ": Breakout seed 1\n" in said and "no aggregates" in said
    assert ("no curves" in said) == (lacks == "iteration")


@pytest.mark.usefixtures("numbers_only")
def test_games_without_a_human_score_are_scaled_over_all_runs(tmp_path, capsys):
    settings = {"env_id": "PooyanNoFrameskip-v4"}
    found = [fake_run(tmp_path / str(i), dqn_softmoe, [10.0, x], seed=i, **settings) for i, x in enumerate((20, 50))]
    found.append(fake_run(tmp_path / "dense", dqn_softmoe, [0.0, 30], layer="dense", **settings))
    rows = read_csv(pictures(tmp_path, found) / "dqn_methods.csv")
    assert [float(row["iqm"]) for row in rows] == [60, 70]
    assert {row["panel"] for row in read_csv(tmp_path / "figures" / "dqn_curves.csv")} == {
        "Pooyan",
        "all games",
    }
    agents, _ = plot.read_results(tmp_path / "results.csv")
    assert plot.normalize_scores("DQN", agents["DQN"])[1] == "% of the range of all runs"
    capsys.readouterr()
    rows = read_csv(pictures(tmp_path, [*found, fake_run(tmp_path / "one", dqn_softmoe, [1.7])]) / "dqn_methods.csv")
    assert "DQN: left out of the aggregates, for lack of a human score: Pooyan" in capsys.readouterr().out
    assert [(row["layer"], row["iqm"]) for row in rows] == [("softmoe", "0.0")]
    der = importlib.import_module("der_softmoe")  # runs whose evaluation is their only score
    evaluated = {"p": 10.0, "q": 30.0}
    found = [
        fake_run(tmp_path / name, der, [None], evaluation=x, seed=int(x), **settings) for name, x in evaluated.items()
    ]
    assert [float(row["iqm"]) for row in read_csv(pictures(tmp_path, found) / "der_methods.csv")] == [50]


@pytest.mark.usefixtures("numbers_only")
@pytest.mark.parametrize("name", "1 4 5 6 7 8 9 11 12 13 16 18 drq_eps tokenize".split())
def test_one_command_makes_a_figure_from_its_list(name, tmp_path, monkeypatch):
    """What figure.sh calls is done here, in one process, with runs of its list."""
    (tmp_path / "python").write_text('#!/bin/bash\n[[ $1 != *collect.py ]] || cat > runs.list\necho "$@" >> called\n')
    (tmp_path / "python").chmod(0o755)
    settings = {"GAMES": "Pong", "SEEDS": "1 2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    given = {"cwd": tmp_path, "env": os.environ | settings, "check": True}
    subprocess.run([ROOT / "scripts" / "figure.sh", name, "--plot", "figures"], **given)
    monkeypatch.chdir(tmp_path)
    agents = {}
    for line in Path("runs.list").read_text().splitlines():
        _, script, *flags = line.split()
        script = importlib.import_module(script.removesuffix(".py"))
        changed = tuple(flag for flag in flags if not re.search("NoFrameskip|__seed", flag))
        if (script, changed) not in agents:  # parsing takes a while
            monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
            agents[script, changed] = asdict(script.parse_args())
        args = agents[script, changed] | {"env_id": flags[1], "seed": int(flags[3]), "resume": None}
        folder = Path("runs", flags[flags.index("--run-name") + 1])
        evaluation = args["seed"] if script.__name__ == "der_softmoe" else None
        fake_run(folder, script, [1.0, 2.0 + args["seed"]], evaluation=evaluation, **args)
    collecting, plotting = Path("called").read_text().splitlines()
    monkeypatch.setattr(sys, "argv", collecting.replace("/dev/stdin", "runs.list").split())
    collect.main(plot.tyro.cli(collect.Options))
    monkeypatch.setattr(sys, "argv", plotting.split())
    options = plot.tyro.cli(plot.Options)
    plot.main(replace(options, repetitions=20))
    methods = [path for path in Path("figures").glob("*_methods.csv") if len(read_csv(path)) > 1]
    assert len(methods) == (1 if name in ("5", "6", "8", "18", "drq_eps", "tokenize") else 2)
    over = sorted(Path("figures").glob(f"*_{options.x}.csv"))
    assert len(over) == (0 if name in ("7", "8", "12", "13", "16", "drq_eps") else len(methods))
    assert Path("figures/drq_eps_published.csv").exists() == (name == "drq_eps")


def test_our_runs_stand_beside_published_ones(tmp_path, capsys):
    der, found = importlib.import_module("der_softmoe"), []
    for layer, game, score in (("dense", "Breakout", 16), ("softmoe", "Breakout", 40), ("softmoe", "Boxing", 8)):
        name = tmp_path / f"{layer}{game}"
        found.append(fake_run(name, der, [1.0], evaluation=score, env_id=f"{game}NoFrameskip-v4", layer=layer))
    found.append(fake_run(tmp_path / "Venture", der, [1.0], evaluation=1, env_id="VentureNoFrameskip-v4"))
    figures = pictures(tmp_path, found, published=ROOT / "scripts" / "drq_eps_100k.csv")
    said = "DER: 2 of 3 runs are between the published 5% and 95% quantiles\n    outside: Breakout softmoe seed 1: 40\n"
    assert said in capsys.readouterr().out
    rows = {(row["game"], row["layer"]): row for row in read_csv(figures / "der_published.csv")}
    assert list(rows) == [("Boxing", "softmoe"), ("Breakout", "dense"), ("Breakout", "softmoe")]
    row = rows["Breakout", "softmoe"]
    assert (row["score"], row["q05"], row["median"], row["q95"]) == ("40.0", "12.59", "16.16", "29.24")
    assert (figures / "der_published.png").read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_what_is_no_table_in_one_line(runs, tmp_path):
    pictures(tmp_path, runs[:1])
    (tmp_path / "empty.csv").write_text("game,agent\n")
    with pytest.raises(FileExistsError):
        pictures(tmp_path, runs[:1], output=Path(__file__))
    done = run("plot", tmp_path / "empty.csv")
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path}/empty.csv was not written by collect.py\n"


@pytest.mark.usefixtures("numbers_only")
def test_collect_tells_both_losses_of_the_offline_agent_and_shorter_runs_apart(tmp_path, capsys):
    cql, flags = importlib.import_module("cql_softmoe"), ({}, {"distributional": False}, {"total_updates": 90})
    figures = pictures(tmp_path, [fake_run(tmp_path / str(i), cql, [3.5], **given) for i, given in enumerate(flags)])
    assert capsys.readouterr().out.startswith("3 runs, 3 rows")
    rows = read_csv(tmp_path / "results.csv")
    agents = [("CQL+C51", "12500000"), ("CQL", "12500000"), ("CQL+C51", "90")]
    assert [(row["agent"], row["total_updates"]) for row in rows] == agents
    assert {(row["step"], row["frames"]) for row in rows} == {("62500", "")}
    assert (figures / "cql_curves.csv").exists() and "updates" in read_csv(figures / "cql_c51_curves.csv")[0]


@pytest.mark.parametrize("name", ["reference_curves.csv", "experiments/drq_eps_100k.csv"])
def test_published_scores_are_those_that_are_shipped(name):
    shared = ROOT.parent / "shared" / name
    if not shared.exists():
        pytest.skip("needs the folder that holds them beside the repository")
    assert (ROOT / "scripts" / shared.name).read_text() == shared.read_text()


# ---------------------------------------------------------------------------------------------------------- analysis


def test_srank_counts_the_singular_values_above_its_threshold():
    matrix = torch.diag(torch.tensor([4.0, 2.0, 0.01, 0.0])) @ torch.linalg.qr(torch.randn(4, 4))[0]
    assert [analyze.srank(matrix, t) for t in (0.0025 - 1e-5, 0.0025 + 1e-5, 0.4, 0.6)] == [3, 2, 2, 1]


def test_rounding_errors_are_no_rank():
    torch.manual_seed(0)
    features = torch.randn(64, 5) @ torch.randn(5, 300)  # in float32, which leaves 59 tiny singular values
    assert [analyze.srank(matrix, 0.0) for matrix in (features, features @ features.T)] == [5, 5]


def test_the_effective_rank_has_99_percent_of_the_sum_of_singular_values():
    for values, expected in (([90, 9, 0.9, 0.1], 2), ([90, 8.9, 1.0, 0.1], 3), ([1, 1, 1, 1], 4), ([1, 0, 0, 0], 1)):
        assert analyze.effective_rank(torch.diag(torch.tensor(values, dtype=torch.float64))) == expected


NETWORKS = [(dqn_softmoe, "softmoe"), (rainbow_softmoe, "top1moe"), (dqn_softmoe, "dense")]


@pytest.mark.parametrize("script, layer", NETWORKS)
def test_metrics_are_those_of_plain_loops(script, layer):
    torch.manual_seed(0)
    args = script.Args(encoder="nature", layer=layer, num_experts=3, expert_hidden_dim=16, cuda=False)
    q_network = script.QNetwork(args, (4, 20, 20), 3).eval()
    obs, next_obs = torch.randint(0, 256, (2, 10, 4, 20, 20), dtype=torch.uint8)
    weights = [torch.ones(10)] * (len(script.Batch._fields) - 6)  # DQN has none
    numbers = torch.randint(3, (10,)), torch.randn(10), torch.rand(10)
    batch = script.Batch(obs, *numbers, next_obs, torch.arange(10), *weights)
    found = analyze.measure(script, q_network, args, batch, 0.3)
    losses, rows = analyze.losses_and_gradients(script, q_network, args, batch)
    script.td_loss(q_network, q_network, batch, args)[0].backward()  # the mean of the transitions' losses
    whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in q_network.parameters()]
    torch.testing.assert_close(rows.mean(dim=0), torch.cat([grad.flatten() for grad in whole]), rtol=1e-3, atol=1e-5)
    gram = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
    assert found["ntk_rank/0.01"] == analyze.srank(gram, 0.01)
    assert found["ntk_diagonal_mean"] == pytest.approx(np.mean([gram[i, i].item() for i in range(10)]), rel=1e-4)
    others = [gram[i, j].item() for i in range(10) for j in range(10) if i != j]
    assert found["ntk_off_diagonal_mean"] == pytest.approx(np.mean(others), rel=1e-3, abs=1e-6)
    assert found["ntk_negative"] == pytest.approx(np.mean([x < 0 for x in others]) * 0.9, abs=0.011)
    one = [script.td_loss(q_network, q_network, script.Batch(*(x[i : i + 1] for x in batch)), args) for i in range(10)]
    one = [loss.item() for loss, *_ in one]
    assert [found["td_loss_mean"], found["td_loss_var"]] == pytest.approx([np.mean(one), np.var(one)], rel=1e-4)
    q_values = q_network.q_values(obs).detach().numpy()
    assert [found["q_mean"], found["q_std"]] == pytest.approx([q_values.mean(), q_values.std()], rel=1e-4)
    squares = sum(p.detach().square().sum().item() for p in q_network.parameters())
    assert found["param_norm"] == pytest.approx(squares**0.5, rel=1e-5)
    features, output = q_network.features(obs)
    assert found["srank/0.01"] == np.sum((s := np.linalg.svd(features.detach().double())[1]) > 0.01 * s.max())
    assert found["feature_norm"] == pytest.approx(np.linalg.norm(features.detach().numpy().var(axis=0)), rel=1e-4)
    if layer == "dense":
        mean = features.abs().mean(dim=0)
        assert found["dormant"] == pytest.approx((mean <= 0.3 * mean.mean()).float().mean().item())
        assert "expert_similarity" not in found
        return
    score = output.hidden.abs().mean(dim=(0, 2))  # (E, H)
    shares = [(score[e] <= 0.3 * score.mean()).float().mean().item() for e in range(3)]
    assert [found[f"dormant/{e}"] for e in range(3)] == pytest.approx(shares)
    tokens = q_network.tokenizer(q_network.encoder(obs.float() / 255)).flatten(0, 1)
    outputs = []
    for e in range(3):
        w1, b1, w2, b2 = (getattr(q_network.moe.experts, name)[e] for name in ("w1", "b1", "w2", "b2"))
        outputs.append(torch.cat([(token @ w1 + b1).relu() @ w2 + b2 for token in tokens]))
    cosines = [torch.cosine_similarity(outputs[a], outputs[b], dim=0).item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found["expert_similarity"] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert isinstance(q_network.moe, moe.SoftMoE | moe.Top1MoE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    dqn_softmoe.main(dqn_softmoe.Args(**quick(runs_dir=str(folder), weights_every=200, eval_episodes=3)))
    return only_run(folder)


def test_analyze_measures_every_file_of_weights(trained, tmp_path):
    given = {"steps": 200, "batch_size": 16, "repetitions": 20}
    analyze.main(analyze.Options((trained,), tmp_path, **given))
    rows = read_csv(tmp_path / "analysis.csv")
    assert [row["step"] for row in rows] == ["200", "400", "600"]
    assert (tmp_path / "dqn_analysis.png").read_bytes().startswith(b"\x89PNG")
    done = run("analyze", tmp_path, "-o", tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: no run with weights/"
    with pytest.raises(ValueError, match="choose from"):
        analyze.main(analyze.Options((trained,), tmp_path, measures=("rank",), **given))
    with pytest.raises(ValueError, match="--steps 4 is too small"):
        analyze.main(analyze.Options((trained,), tmp_path, **given | {"steps": 4}))


@pytest.mark.usefixtures("numbers_only")
def test_a_picture_of_many_runs_has_a_line_per_method_and_a_panel_per_game_and_measure(tmp_path):
    points, rng = [], np.random.default_rng(0)
    for layer, game, seed, step in itertools.product(("dense", "softmoe"), ("Pong", "Asterix"), range(5), (1, 2)):
        flags, found = {"layer": layer, "num_experts": "8"}, {"srank/0.01": rng.random(), "dormant": 0.0}
        points.append(analyze.Point("Rainbow", game, seed, step, flags, found))
    methods = [tuple(point.flags.items()) for point in points]
    analyze.plot_measures("DQN", points, methods, analyze.Options((), tmp_path, measures=("expert_similarity",)))
    assert not list(tmp_path.iterdir())  # no network has this measure
    analyze.plot_measures("Rainbow", points, methods, analyze.Options((), tmp_path))
    rows = read_csv(tmp_path / "rainbow_analysis.csv")
    assert len(rows) == 2 * 2 * 2 * 2  # methods, games, measures, steps
    for row in rows:
        those = [
            p
            for p in points
            if (p.game, p.flags["layer"], 4 * p.step) == (row["game"], row["layer"], int(row["frames"]))
        ]
        assert float(row["mean"]) == pytest.approx(np.mean([point.measures[row["measure"]] for point in those]))
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])


# ------------------------------------------------------------------------------------------ evaluate, watch, doctor


def test_evaluate_plays_as_the_run_s_own_evaluation(trained, tmp_path):
    expected = json.loads((trained / "eval.json").read_text())
    seed = dqn_softmoe.reset_seed(1, 600, evaluation=True)
    for path in (trained, trained / "weights.pt", trained / "weights" / "600.pt"):
        done = run("evaluate", path, "--episodes", "3", "--seed", seed, "--no-cuda", "-o", tmp_path / "eval.json")
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "eval.json").read_text())["returns"] == expected["returns"]
    for given in ([tmp_path], [trained / "weights" / "7.pt"], [trained, "--episodes", "0"]):
        bad = run("evaluate", *given)
        assert bad.returncode == 2 and bad.stderr.startswith("error: ") and len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "layer, tokenization, name",
    [("softmoe", "PerConv", "new/game.mp4"), ("top1moe", "PerPatch", "game.mp4"), ("dense", "PerConv", "game.gif")],
)
def test_watch_films_the_very_game(layer, tokenization, name, tmp_path):
    import imageio_ffmpeg

    settings = {"layer": layer, "tokenization": tokenization, "encoder": "nature", "expert_hidden_dim": 8}
    args = dqn_softmoe.Args(env_id="SpaceInvadersNoFrameskip-v4", cuda=False, **settings)
    q_network = dqn_softmoe.QNetwork(args, (4, 84, 84), 6)
    torch.save(q_network.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps({"script": "dqn_softmoe.py", "args": asdict(args)}))
    done = run("watch", tmp_path, "-o", tmp_path / name, "--steps", "40", "--epsilon", "0.5")
    assert done.returncode == 0, done.stderr
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / name))
    assert frames == 40


def test_maps_are_multiples_of_equal_weights():
    watch = importlib.import_module("watch")
    dispatch = torch.zeros(1, 4, 2, 3)  # four places, two experts of three slots; the second expert gets no token
    dispatch[0, :, 0] = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]) / 2
    maps = watch.expert_maps(SimpleNamespace(routing=SimpleNamespace(dispatch_weights=dispatch)), "PerConv")
    np.testing.assert_allclose(maps, [[[2 / 3, 2 / 3], [2 / 3, 2]], [[0, 0], [0, 0]]], rtol=1e-6)
    black = np.zeros((210, 160, 3), np.uint8), np.zeros((84, 84), np.uint8)
    picture = np.asarray(watch.draw(*black, maps, np.zeros(1), ["NOOP"], ""))[2:118, watch.WIDTH + 2 :]
    assert picture[0, 0, 0] == 0 and picture[-1, 115, 0] > 140  # red of the darkest and of the brightest place


def test_doctor_says_whether_a_command_will_run(tmp_path, monkeypatch, capsys):
    doctor = importlib.import_module("doctor")
    probe = doctor.probe
    monkeypatch.setattr(doctor, "probe", lambda script, args, seconds: probe(script, args, seconds / 10))
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    monkeypatch.chdir(tmp_path)

    def said(*command) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["doctor.py", *command])
        try:
            return doctor.main(), capsys.readouterr().out
        except SystemExit as stop:
            return stop.code, ""

    small = "--env-id pixel_game:PixelCatch-v0 --encoder nature --expert-hidden-dim 16 --total-timesteps 3600000"
    command = ["python", "dqn_softmoe.py", *small.split(), "--no-cuda", "--buffer-size", "1000"]
    code, out = said(*command)
    assert code == 0 and "agent steps/s while learning" in out and list(tmp_path.iterdir()) == [], out
    code, out = said(*command[:-1], str(10**12), "--total-timesteps", str(10**12))
    assert code == 1 and "NO  memory" in out
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / "000000000000.npz", action=np.zeros(4))
    code, out = said("python", "cql_softmoe.py", *small.split()[:-2], "--no-cuda")
    assert code == 1 and "NO  data" in out  # the data of another folder is not that of --dataset-dir
    for given in (
        ["ls"],
        ["python", "nothing_softmoe.py"],
        [*command, "--seed", "x"],
        [*command, "--buffer-size", "10"],
    ):
        assert said(*given)[0] == 2


CHILD = """
import csv, time
from pathlib import Path
Args = dict
def main(args):
    time.sleep(args["wait"])
    folder = Path(args["runs_dir"], args["run_name"])
    folder.mkdir()
    (folder / "metrics.csv").write_text("sps\\n" + "50.0\\n" * 20)
    time.sleep(60)
"""


@pytest.mark.parametrize("wait, said", [(1.5, "ok  speed        50 agent steps/s"), (60, "--  speed        no number")])
def test_doctor_waits_for_a_slow_machine_and_does_not_blame_it(wait, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "slow_softmoe.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    args = SimpleNamespace(wait=wait, total_timesteps=1_000, num_envs=1, n_step=1)
    doctor = importlib.import_module("doctor")
    good = doctor.probe(importlib.import_module("slow_softmoe"), args, seconds=0.5, at_most=4)
    assert good and capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("script, package", [("plot", "matplotlib"), ("watch", "PIL"), ("analyze", "matplotlib")])
def test_a_missing_package_is_one_line(script, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "plot")  # which analyze imports
    done = run(script, "--help")
    why = f"error: import of {package} halted; None in sys.modules"
    assert done.returncode == 2 and done.stderr.splitlines() == [f"{why}; pip install -r scripts/requirements.txt"]


@pytest.mark.parametrize("script", ["scripts/convert_dqn_replay", "dqn_softmoe", "cql_softmoe"])
def test_help_that_nobody_reads_ends_without_a_word(script):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, ROOT / f"{script}.py", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode in (0, -signal.SIGPIPE) and done.stderr == ""


def test_scores_of_games_have_their_sources():
    with open(ROOT / "scripts" / "atari_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 62 and all(row["source"] for row in rows)
    given = {"capture_output": True, "text": True, "env": os.environ | {"SEEDS": "1"}}
    lists = "".join(
        subprocess.run([ROOT / "scripts" / "figure.sh", name], **given).stdout for name in ("8", "11", "12")
    )
    games = set(re.findall(r"--env-id (\w+)NoFrameskip", lists))
    assert len(games) == 60
    without = {"AirRaid", "Carnival", "ElevatorAction", "JourneyEscape", "Pooyan"}
    assert games - {row["game"] for row in rows if row["human"]} == without
