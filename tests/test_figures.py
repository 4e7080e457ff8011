"""From run directories to numbers and pictures: collect, plot, analyze, evaluate, watch, doctor."""

import csv
import importlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, quick, read_csv

import dqn_softmoe
import moe_layers as moe
import rainbow_softmoe

sys.path.append(str(ROOT / "scripts"))
analyze, evaluate = importlib.import_module("analyze"), importlib.import_module("evaluate")


def run(script, *given, cwd=None, path=ROOT / "tests"):
    command = [sys.executable, ROOT / "scripts" / f"{script}.py", *map(str, given)]
    path = {"PYTHONPATH": str(path)}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | path, cwd=cwd)


# -------------------------------------------------------------------------------------------------- collect and plot


def fake_run(folder: Path, script, scores, finished=True, evaluation=None, **settings) -> Path:
    """What a run leaves, with these scores of its iterations."""
    folder.mkdir(parents=True)
    args = asdict(script.Args(**settings))
    steps = args["iteration_steps"]
    config = {"script": f"{script.__name__}.py", "args": args, "finished": args["total_timesteps"] if finished else 0}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [f"{i},{(i + 1) * steps},3,{'' if score is None else score},50.0\n" for i, score in enumerate(scores)]
    (folder / "metrics.csv").write_text("iteration,global_step,episodes,mean_return,sps\n" + "".join(rows))
    if evaluation is not None:
        (folder / "eval.json").write_text(json.dumps({"mean_return": evaluation, "global_step": len(scores) * steps}))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two games, two seeds, four methods."""
    rng, found = np.random.default_rng(0), []
    for layer, experts in (("dense", 1), ("softmoe", 1), ("softmoe", 4), ("softmoe", 8)):
        for game in ("Breakout", "Pong"):
            for seed in (1, 2):
                settings = {"env_id": f"{game}NoFrameskip-v4", "seed": seed, "layer": layer, "num_experts": experts}
                scores = [None, *(rng.random(3) * 20).round(2)]
                name = tmp_path / "runs" / f"{game}{layer}{experts}{seed}"
                found.append(fake_run(name, dqn_softmoe, scores, encoder="nature", **settings))
    return found


def test_collect_makes_a_tidy_table_and_says_what_it_left_out(runs, tmp_path):
    more = tmp_path / "more"
    settings = {"env_id": "ALE/Breakout-v5", "seed": 1, "layer": "dense", "encoder": "nature"}
    twice = fake_run(more / "twice", dqn_softmoe, [1.0], **settings)
    going_on = fake_run(more / "going_on", dqn_softmoe, [1.0], finished=False, env_id="QbertNoFrameskip-v4")
    der = fake_run(more / "der", importlib.import_module("der_softmoe"), [5.0], evaluation=30.5, seed=3, augment=True)
    raw = fake_run(more / "raw", dqn_softmoe, [7.0], env_id="PooyanNoFrameskip-v4")
    done = run("collect", *runs, twice, going_on, der, raw, more, "-o", tmp_path / "results.csv")
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "results.csv")
    assert len(rows) == 16 * 3 + 2 + 1
    first = {"game": "Breakout", "agent": "dqn", "layer": "dense", "experts": "1", "setting": "encoder=nature"}
    first |= {"seed": "1", "iteration": "1", "step": "500000", "frames": "2000000"}
    assert first.items() <= rows[0].items()
    assert float(rows[0]["normalized"]) == pytest.approx(100 * (float(rows[0]["score"]) - 1.7) / (30.5 - 1.7), abs=1e-3)
    assert [(row["iteration"], row["setting"], row["normalized"]) for row in rows if row["agent"] == "der"] == [
        ("0", "augment=True", "11.4583"),
        ("eval", "augment=True", "100.0000"),
    ]
    assert [row["normalized"] for row in rows if row["game"] == "Pooyan"] == [""]
    said = " ".join(done.stdout.split())
    for words in (f"{twice}: the same as {runs[0]}", f"{going_on}: not finished", f"{more}: no run directory"):
        assert words in said
    assert "Breakout dqn softmoe 8 : no seed 1, 2" in said and "der softmoe" not in said  # an agent has its own seeds
    said = " ".join(run("collect", *runs[3:], "-o", tmp_path / "new" / "results.csv").stdout.split())
    assert "Breakout dqn dense 1 encoder=nature: no seed 1, 2 Pong dqn dense 1 encoder=nature: no seed 1" in said
    assert run("collect", going_on, "-o", tmp_path / "none.csv").returncode == 2
    (going_on / "config.json").write_text("{")
    assert f"{going_on}: damaged" in " ".join(run("collect", der, going_on, "-o", tmp_path / "r.csv").stdout.split())
    assert not (tmp_path / "none.csv").exists()


def test_plot_draws_the_numbers_of_the_table(runs, tmp_path):
    assert run("collect", *runs, "-o", tmp_path / "results.csv").returncode == 0
    done = run("plot", tmp_path / "results.csv", "-o", tmp_path / "figures", "--repetitions", "200")
    assert done.returncode == 0, done.stderr
    assert "dqn: 4 methods, 2 games, seeds [1, 2]; 0 games' seeds left out" in done.stdout
    for name in ("methods", "experts", "curves", "profiles", "improvement"):
        assert (tmp_path / "figures" / f"dqn_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "figures" / f"dqn_{name}.pdf").read_bytes().startswith(b"%PDF")
    last, first = {}, defaultdict(list)
    for row in read_csv(tmp_path / "results.csv"):
        last[row["layer"], row["experts"], row["game"], row["seed"]] = float(row["normalized"])
        if row["iteration"] == "1":
            first[row["layer"], row["experts"]].append(float(row["normalized"]))
    curves = {
        (row["layer"], row["experts"], row["game"], row["step"]): row
        for row in read_csv(tmp_path / "figures" / "dqn_curves.csv")
    }
    for method, scores in first.items():
        row = curves[*method, "all games: IQM, % of human", "500000"]
        assert float(row["middle"]) == pytest.approx(np.mean(sorted(scores)[1:3]))
        assert float(row["low"]) <= float(row["middle"]) <= float(row["high"])
    assert {row["layer"] for row in read_csv(tmp_path / "figures" / "dqn_experts.csv")} == {"softmoe"}
    methods = read_csv(tmp_path / "figures" / "dqn_methods.csv")
    assert len(methods) == 4
    for row in methods:
        scores = sorted(score for key, score in last.items() if key[:2] == (row["layer"], row["experts"]))
        assert float(row["iqm"]) == pytest.approx(np.mean(scores[1:3])) and row["runs"] == "4"  # a quarter off each end
        assert float(row["low"]) <= float(row["iqm"]) <= float(row["high"])
    for row in read_csv(tmp_path / "figures" / "dqn_profiles.csv"):
        scores = [score for key, score in last.items() if key[:2] == (row["layer"], row["experts"])]
        assert float(row["share"]) == pytest.approx(np.mean([score > float(row["tau"]) for score in scores]))
    assert run("plot", tmp_path / "nothing.csv").returncode == 2


def test_collect_tells_both_losses_of_the_offline_agent_and_shorter_runs_apart(tmp_path):
    cql, found = importlib.import_module("cql_softmoe"), []
    for i, given in enumerate(({}, {"distributional": False}, {"total_updates": 90})):
        found.append(tmp_path / str(i))
        found[-1].mkdir()
        args = asdict(cql.Args(**given))
        config = {"script": "cql_softmoe.py", "args": args, "finished": args["total_updates"]}
        (found[-1] / "config.json").write_text(json.dumps(config))
        (found[-1] / "metrics.csv").write_text("iteration,updates,mean_return\n0,62500,3.5\n")
    assert run("collect", *found, "-o", tmp_path / "results.csv").stdout.startswith("3 runs, 3 rows")
    rows = read_csv(tmp_path / "results.csv")
    assert [row["setting"] for row in rows] == ["", "distributional=False", "total_updates=90"]
    assert {(row["step"], row["frames"]) for row in rows} == {("62500", "")}


def test_plot_does_without_human_scores_and_with_unequal_seeds(tmp_path):
    header = "game,agent,layer,experts,setting,seed,iteration,step,frames,score,normalized\n"
    (tmp_path / "raw.csv").write_text(f"{header}Pooyan,dqn,dense,1,,1,0,250000,1000000,5.0,\n")
    done = run("plot", tmp_path / "raw.csv", "-o", tmp_path / "raw")
    assert done.returncode == 0 and "no aggregates" in done.stdout and (tmp_path / "raw" / "dqn_curves.png").exists()
    rows = [f"{game},dqn,dense,1,,{seed},0,250000,1000000,5.0,40.0\n" for game in ("A", "B") for seed in (1, 2)]
    (tmp_path / "some.csv").write_text(header + "".join(rows) + "A,dqn,dense,1,,3,0,250000,1000000,5.0,40.0\n")
    done = run("plot", tmp_path / "some.csv", "-o", tmp_path / "some", "--repetitions", "20")
    assert "2 games, seeds [1, 2]; 1 games' seeds left out" in done.stdout, done.stderr
    (tmp_path / "empty.csv").write_text(header)
    (tmp_path / "bytes.csv").write_bytes(b"\x89PNG\xff\xfe")
    for given in (
        [tmp_path / "empty.csv"],
        [tmp_path / "bytes.csv"],
        [tmp_path],
        [tmp_path / "raw.csv", "-o", __file__],
    ):
        done = run("plot", *given)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_the_authors_curves_are_those_that_are_shipped():
    shared = ROOT.parent / "shared"
    if not shared.exists():
        pytest.skip("needs the folder that holds them beside the repository")
    assert (ROOT / "scripts" / "reference_curves.csv").read_text() == (shared / "reference_curves.csv").read_text()


# ---------------------------------------------------------------------------------------------------------- analysis


def test_srank_counts_singular_values_and_the_norm_is_that_of_the_variance():
    matrix = torch.diag(torch.tensor([4.0, 2.0, 0.01, 0.0])) @ torch.linalg.qr(torch.randn(4, 4))[0]
    assert [analyze.srank(matrix, t) for t in (0.0025 - 1e-5, 0.0025 + 1e-5, 0.4, 0.6)] == [3, 2, 2, 1]


NETWORKS = [(dqn_softmoe, "softmoe"), (rainbow_softmoe, "top1moe"), (dqn_softmoe, "dense")]


@pytest.mark.parametrize("script, layer", NETWORKS)
def test_metrics_are_those_of_plain_loops(script, layer):
    torch.manual_seed(0)
    args = script.Args(encoder="nature", layer=layer, num_experts=3, expert_hidden_dim=16, cuda=False)
    q_network = script.QNetwork(args, (4, 20, 20), 3).eval()
    obs, next_obs = torch.randint(0, 256, (2, 10, 4, 20, 20), dtype=torch.uint8)
    batch = script.Batch(obs, torch.randint(3, (10,)), torch.randn(10), torch.rand(10), next_obs, torch.arange(10))
    found = analyze.measure(script, q_network, args, batch, 0.3)
    rows = analyze.gradients(script, q_network, args, batch)
    script.td_loss(q_network, q_network, batch, args)[0].backward()  # the mean of the transitions' losses
    whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in q_network.parameters()]
    torch.testing.assert_close(rows.mean(dim=0), torch.cat([grad.flatten() for grad in whole]), rtol=1e-3, atol=1e-5)
    gram = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
    assert found["ntk_rank/0.01"] == analyze.srank(gram, 0.01)
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
    done = run("analyze", trained, "-o", tmp_path, "--steps", "200", "--batch-size", "16")
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "analysis.csv")
    assert [row["step"] for row in rows] == ["200", "400", "600"]
    assert (tmp_path / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert run("analyze", tmp_path, "-o", tmp_path).returncode == 2


# ------------------------------------------------------------------------------------------ evaluate, watch, doctor


def test_evaluate_plays_as_the_run_s_own_evaluation(trained, tmp_path):
    expected = json.loads((trained / "eval.json").read_text())
    seed = dqn_softmoe.reset_seed(1, 600, evaluation=True)
    for path in (trained, trained / "weights.pt", trained / "weights" / "600.pt"):
        done = run("evaluate", path, "--episodes", "3", "--seed", seed, "--no-cuda", "-o", tmp_path / "eval.json")
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "eval.json").read_text())["returns"] == expected["returns"]
    for given in ([tmp_path], [trained, "--episodes", "0"]):
        bad = run("evaluate", *given)
        assert bad.returncode == 2 and bad.stderr.startswith("error: ") and len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize("layer, tokenization", [("softmoe", "PerConv"), ("top1moe", "PerPatch"), ("dense", "PerConv")])
def test_watch_films_the_very_game(layer, tokenization, tmp_path):
    import imageio_ffmpeg

    settings = {
        "layer": layer,
        "tokenization": tokenization,
        "encoder": "nature",
        "expert_hidden_dim": 8,
        "cuda": False,
    }
    args = dqn_softmoe.Args(env_id="SpaceInvadersNoFrameskip-v4", **settings)
    q_network = dqn_softmoe.QNetwork(args, (4, 84, 84), 6)
    torch.save(q_network.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps({"script": "dqn_softmoe.py", "args": asdict(args)}))
    done = run("watch", tmp_path, "-o", tmp_path / "new" / "game.mp4", "--steps", "40", "--epsilon", "0.5")
    assert done.returncode == 0, done.stderr
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "new" / "game.mp4"))
    assert frames == 40


def test_doctor_says_whether_a_command_will_run(tmp_path):
    small = "--env-id pixel_game:PixelCatch-v0 --encoder nature --expert-hidden-dim 16 --total-timesteps 3600000"
    command = ["python", "dqn_softmoe.py", *small.split(), "--buffer-size", "1000", "--no-cuda"]
    done = run("doctor", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agent steps/s while learning" in done.stdout and list(tmp_path.iterdir()) == []
    too_large = run("doctor", *command[:-2], str(10**12), cwd=tmp_path)
    assert too_large.returncode == 1 and "NO  memory" in too_large.stdout
    for given in (["ls"], ["python", "nothing_softmoe.py"], [*command, "--seed", "x"]):
        assert run("doctor", *given).returncode == 2


@pytest.mark.parametrize("script, package", [("plot", "rliable"), ("watch", "PIL"), ("analyze", "matplotlib")])
def test_a_missing_package_is_one_line(script, package, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('No module named {package}')")
    done = run(script, "--help", path=tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        f"error: No module named {package}; pip install -r scripts/requirements.txt"
    ]


def test_scores_of_games_have_their_sources():
    with open(ROOT / "scripts" / "atari_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 62 and all(row["source"] for row in rows)
    games = subprocess.run(
        ["bash", "-c", ". scripts/lines.sh; echo $games60 $games26 $games17"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    without = {"AirRaid", "Carnival", "ElevatorAction", "JourneyEscape", "Pooyan"}
    assert set(games) - {row["game"] for row in rows if row["human"]} == without
    assert set(evaluate.__dict__) >= {"load"}
