"""What only a GPU can show: CUDA graphs compute what eager code computes, and nothing in them waits."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import only_run, quick

import der_softmoe
import dqn_softmoe
import rainbow_softmoe
from dqn_softmoe import CudaGraph, ReplayBuffer
from rainbow_softmoe import PrioritizedReplayBuffer

pytestmark = pytest.mark.cuda


def filled_replay(replay_type, n_step=1):
    replay = replay_type(4000, 4, (84, 84), n_step=n_step, device="cuda")
    rng = np.random.default_rng(0)
    for _ in range(300):
        frame = rng.integers(0, 256, (4, 84, 84), dtype=np.uint8)
        flags = rng.random((2, 4)) < 0.02
        replay.add(frame, rng.integers(0, 4, 4), rng.standard_normal(4), *flags)
    return replay


class Learner:
    """The update of a script's main loop on a fixed replay."""

    def __init__(self, agent, layer, compiled=False, **settings):
        torch.manual_seed(0)
        self.args = agent.Args(layer=layer, encoder="nature", num_experts=4, expert_hidden_dim=64, **settings)
        self.q_network, self.target = (agent.QNetwork(self.args, (4, 84, 84), 4).cuda() for _ in range(2))
        self.target.load_state_dict(self.q_network.state_dict())
        adam = {"lr": 1e-4, "eps": 1.5e-4, "fused": True, "capturable": True}
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), **adam)
        self.prioritized = agent is not dqn_softmoe
        self.replay = filled_replay(agent.PrioritizedReplayBuffer if self.prioritized else agent.ReplayBuffer)
        self.loss = torch.compile(agent.td_loss, dynamic=False) if compiled else agent.td_loss

    def update(self):
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.replay.sample(32)
        loss, metrics = self.loss(self.q_network, self.target, batch, self.args)
        loss.backward()
        self.optimizer.step()
        if self.prioritized:
            self.replay.update_priorities(batch.index, metrics["losses"])
        return metrics


# A compiled loss draws its noise in another order than an eager one.
LEARNERS = [(dqn_softmoe, compiled, {}) for compiled in (False, True)]
LEARNERS += [(rainbow_softmoe, False, {}), (rainbow_softmoe, True, {"noisy": False}), (der_softmoe, False, {})]
LEARNERS += [(der_softmoe, False, {"augment": True}), (rainbow_softmoe, False, {"double": False, "dueling": False})]


@pytest.mark.parametrize("layer", ["softmoe", "top1moe", "dense"])
@pytest.mark.parametrize("agent, compiled, settings", LEARNERS)
def test_graph_and_eager_agree_after_100_updates(agent, layer, compiled, settings):
    eager, graphed = Learner(agent, layer, **settings), Learner(agent, layer, compiled, **settings)
    update = CudaGraph(graphed.update, warmup=5)
    torch.manual_seed(1)
    for _ in range(100):
        eager.update()
    torch.manual_seed(1)
    for _ in range(100):
        metrics = update()
    assert update.graph is not None and torch.isfinite(metrics["loss"])
    for a, b in zip(eager.q_network.parameters(), graphed.q_network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("agent", [dqn_softmoe, rainbow_softmoe, der_softmoe])
def test_nothing_in_update_act_and_store_waits_for_the_device(agent):
    learner = Learner(agent, "softmoe")
    frame = torch.zeros(4, 84, 84, dtype=torch.uint8, device="cuda")
    zeros, flags = torch.zeros(4, device="cuda"), torch.zeros(4, dtype=torch.bool, device="cuda")
    stack = agent.FrameStack(4, (84, 84), torch.device("cuda"))
    learner.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            learner.update()
            with torch.no_grad():
                q_values = learner.q_network.q_values(stack.push(frame, flags))
            action = agent.select_actions(q_values, 0.1)
            learner.replay.add(frame, action, zeros, flags, flags, flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_routing_statistics_leave_the_random_state_of_a_graph_alone():
    learner = Learner(rainbow_softmoe, "softmoe")
    update = CudaGraph(learner.update, warmup=3)
    for _ in range(6):
        update()
    before = torch.cuda.get_rng_state()
    rainbow_softmoe.measure_routing(learner.q_network, learner.replay, learner.args, torch.device("cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    update()
    assert not torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("replay_type", [ReplayBuffer, PrioritizedReplayBuffer])
def test_a_graphed_replay_is_the_host_s(replay_type):
    """Storing through a graph gives the same ring, and the same priorities, as storing on the host."""
    host, device = (replay_type(400, 2, (6, 6), n_step=3, device=d) for d in ("cpu", "cuda"))
    store, rng = CudaGraph(device.add, warmup=3), np.random.default_rng(0)
    for _ in range(500):
        frame = rng.integers(0, 256, (2, 6, 6), dtype=np.uint8)
        flags = rng.random((3, 2)) < np.array([[0.1], [0.1], [0.9]])
        row = (frame, rng.integers(0, 4, 2), rng.standard_normal(2), *flags)
        host.add(*row)
        store(*row)
    queue = host.queue[:, :-1]  # the last column takes writes that are none
    for name, value in device.state_dict().items():
        value, expected = (value[:, :-1], queue) if name == "queue" else (value, host.state_dict()[name])
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("agent", [dqn_softmoe, rainbow_softmoe])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("replay_device", ["auto", "cpu"])
def test_every_combination_of_switches_trains_and_resumes(agent, compile, cuda_graphs, replay_device, tmp_path):
    switches = {"cuda": True, "compile": compile, "cuda_graphs": cuda_graphs, "replay_device": replay_device}
    args = agent.Args(**quick(runs_dir=str(tmp_path), total_timesteps=400, **switches))
    agent.main(args)
    run_dir = only_run(tmp_path)
    agent.main(replace(args, resume=str(run_dir), total_timesteps=600))
    agent.main(replace(args, resume=str(run_dir), total_timesteps=700, cuda=False))  # and on another device
    assert (run_dir / "checkpoint-000000000700").is_dir()


@pytest.mark.parametrize("agent", [rainbow_softmoe, der_softmoe])
@pytest.mark.parametrize("replay_device", ["auto", "cpu"])
def test_uniform_replay_trains_with_either_place_of_the_replay(agent, replay_device, tmp_path):
    settings = {"prioritized": False, "cuda": True, "replay_device": replay_device}
    agent.main(agent.Args(**quick(runs_dir=str(tmp_path), total_timesteps=400, **settings)))
    assert (only_run(tmp_path) / "eval.json").exists()


@pytest.mark.parametrize("layer", ["softmoe", "dense"])
def test_learns_the_pixel_game_on_the_gpu(layer, tmp_path):
    settings = {"total_timesteps": 10_000, "learning_starts": 500, "buffer_size": 10_000, "epsilon_decay_steps": 3_000}
    settings |= {"target_network_frequency": 400, "learning_rate": 1e-3, "expert_hidden_dim": 64, "cuda": True}
    dqn_softmoe.main(dqn_softmoe.Args(**quick(runs_dir=str(tmp_path), layer=layer, eval_episodes=20, **settings)))
    assert json.loads((only_run(tmp_path) / "eval.json").read_text())["mean_return"] >= 0.8 * 4
