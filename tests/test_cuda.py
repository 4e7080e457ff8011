"""Tests that need a GPU: CUDA graphs compute what eager code computes, and nothing waits for the device."""

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._inductor.config
from runs import AGENTS, checkpoint, only_run, quick

import der_softmoe
import dqn_softmoe
import rainbow_softmoe

pytestmark = pytest.mark.cuda
ENVS = SimpleNamespace(frame_shape=(84, 84), num_actions=4)


@pytest.fixture(autouse=True)
def compile_afresh():
    torch._dynamo.reset()  # a process compiles each function only a few times
    gc.collect()  # graphs are in reference cycles, and must not be freed during another capture
    with torch._inductor.config.patch(fallback_random=True):  # compiled code draws the same numbers as eager code
        yield


def make_agent(script, cuda_graphs, **settings):
    """Return an agent with 300 random rows in its replay."""
    torch.manual_seed(0)
    small = {"encoder": "nature", "num_experts": 4, "expert_hidden_dim": 64, "buffer_size": 4000, "num_envs": 4}
    agent = script.Agent(script.Args(**{"compile": False} | small | settings, cuda_graphs=cuda_graphs), ENVS)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True  # deterministic sums
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    rng = np.random.default_rng(0)
    for _ in range(300):
        frame, (terminated, truncated) = rng.integers(0, 256, (4, 84, 84), dtype=np.uint8), rng.random((2, 4)) < 0.02
        agent.replay.add(frame, rng.integers(0, 4, 4), rng.standard_normal(4), terminated, truncated & ~terminated)
    return agent


# A compiled loss may draw noise in another order than an eager one, so Rainbow is compiled without noise.
LEARNERS = [(dqn_softmoe, {}), (dqn_softmoe, {"compile": True}), (dqn_softmoe, {"replay_device": "cpu"})]
LEARNERS += [(rainbow_softmoe, {}), (rainbow_softmoe, {"compile": True, "noisy": False}), (der_softmoe, {})]
LEARNERS += [(der_softmoe, {"augment": True}), (rainbow_softmoe, {"double": False, "dueling": False})]


@pytest.mark.parametrize("layer", ["softmoe", "top1moe", "dense"])
@pytest.mark.parametrize("script, settings", LEARNERS)
def test_graphs_compute_what_eager_code_computes(script, layer, settings):
    """Weights are equal bit for bit, except that compiled code rounds differently, and the differences grow.

    Compiled code is therefore compared after only 8 updates. One update changes some weights by 4e-5.
    """
    updates, atol = (8, 2e-5) if "compile" in settings else (100, 0)
    eager = make_agent(script, False, layer=layer, num_experts=None, **settings | {"compile": False})
    graphed = make_agent(script, True, layer=layer, num_experts=None, **settings)
    cuda_graph = graphed.learn if isinstance(graphed.learn, script.CudaGraph) else graphed.update
    cuda_graph.warmup = 4
    for agent in (eager, graphed):
        torch.manual_seed(1)
        for _ in range(updates):
            metrics, _ = agent.learn()
    assert cuda_graph.graph is not None and torch.isfinite(metrics["loss"])
    for a, b in zip(eager.q_network.parameters(), graphed.q_network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("script", [dqn_softmoe, rainbow_softmoe, der_softmoe])
def test_nothing_in_learn_act_and_observe_waits_for_the_device(script):
    agent = make_agent(script, False)
    frame = torch.zeros(4, 84, 84, dtype=torch.uint8, device="cuda")
    zeros, flags = torch.zeros(4, device="cuda"), torch.zeros(4, dtype=torch.bool, device="cuda")
    agent.learn()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            agent.learn()
            agent.act(frame, flags, zeros[0])
            agent.observe(zeros, flags, flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("script", [dqn_softmoe, rainbow_softmoe, der_softmoe])
def test_acting_and_storing_in_graphs_equals_eager_code(script):
    results = []  # of eager code, then of graphs
    for cuda_graphs in (False, True):
        agent, rng = make_agent(script, cuda_graphs), np.random.default_rng(0)
        torch.manual_seed(1)
        for step in range(60):
            frame, flags = rng.integers(0, 256, (4, 84, 84), dtype=np.uint8), rng.random((3, 4)) < 0.1
            results.append(agent.act(frame, flags[0], np.float64(1 - step / 60)).cpu())
            agent.observe(rng.standard_normal(4), flags[1], flags[2] & ~flags[1])
        results += [agent.obs, *agent.replay.state_dict().values()]
    for eager, graphed in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        assert torch.equal(eager, graphed)


SWITCHES = [(script, {}) for script in AGENTS] + [("rainbow_softmoe", {"prioritized": False})]


@pytest.mark.parametrize("agent, settings", SWITCHES, indirect=["agent"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("replay_device", ["auto", "cpu"])
def test_every_combination_of_switches_trains_and_resumes(
    agent, settings, compile, cuda_graphs, replay_device, tmp_path
):
    switches = {"cuda": True, "compile": compile, "cuda_graphs": cuda_graphs, "replay_device": replay_device}
    args = agent.Args(**quick(runs_dir=str(tmp_path), total_timesteps=400, **switches, **settings))
    agent.main(args)
    run_dir = only_run(tmp_path)
    agent.main(replace(args, resume=str(run_dir), total_timesteps=600))
    agent.main(replace(args, resume=str(run_dir), total_timesteps=700, cuda=False))  # on another device
    assert checkpoint(run_dir)["progress"]["global_step"] == 700


def test_a_checkpoint_holds_the_random_state_of_the_device(tmp_path):
    saved, other = (make_agent(dqn_softmoe, graphs) for graphs in (True, False))
    for _ in range(20):
        saved.learn()
    saved.save(tmp_path / "checkpoint.pt", {"global_step": 0})
    expected = torch.rand(3, device="cuda")
    torch.manual_seed(5)
    other.load(tmp_path / "checkpoint.pt")
    assert torch.equal(torch.rand(3, device="cuda"), expected)


@pytest.mark.parametrize("layer", ["softmoe", "dense"])
def test_learns_the_pixel_game_on_the_gpu(layer, tmp_path):
    settings = {"total_timesteps": 10_000, "learning_starts": 500, "buffer_size": 10_000, "epsilon_decay_steps": 3_000}
    settings |= {"target_network_frequency": 400, "learning_rate": 1e-3, "expert_hidden_dim": 64, "cuda": True}
    dqn_softmoe.main(dqn_softmoe.Args(**quick(runs_dir=str(tmp_path), layer=layer, eval_episodes=20, **settings)))
    assert json.loads((only_run(tmp_path) / "eval.json").read_text())["mean_return"] >= 0.8 * 4
