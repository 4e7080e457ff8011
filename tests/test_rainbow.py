"""Tests of Rainbow and DER: C51's projection and loss, noise, dueling heads, exploration, augmentation, arguments.

The references are the authors' numbers and float64 loops that are written from the papers. Code that DER shares with
Rainbow is tested in Rainbow.
"""

import functools
import math
import re
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from operations import Operations
from runs import quick
from test_networks import load_golden
from torch import nn

import cql_softmoe
import der_softmoe
import dqn_softmoe
import rainbow_softmoe
from moe_layers import NoisyLinear, load_balancing_loss
from rainbow_softmoe import Args, QNetwork, project_distribution

SMALL = {"encoder": "nature", "num_experts": 2, "expert_hidden_dim": 8, "num_atoms": 5, "v_min": -1.0, "v_max": 2.0}
A = 3  # number of actions of the small networks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[rainbow_softmoe, der_softmoe], ids=["rainbow", "der"])
def script(request):
    return request.param


def make_network(script=rainbow_softmoe, **overrides):
    """Return a small network for 12x12 frames, and its arguments."""
    names = {field.name for field in fields(script.Args)}
    args = script.Args(**{name: value for name, value in SMALL.items() if name in names} | overrides)
    return script.QNetwork(args, (4, 12, 12), A), args


def random_obs(n, size=(12, 12)):
    return torch.randint(0, 256, (n, 4, *size), dtype=torch.uint8)


def sigmas(q_network):
    return {name: parameter for name, parameter in q_network.named_parameters() if "sigma" in name}


def fill_sigmas(q_network, value):
    for parameter in sigmas(q_network).values():
        nn.init.constant_(parameter, value)


def without_noise(q_network, args):
    """Return a network without noisy layers, whose weights are the means of the noisy ones."""
    plain = type(q_network)(replace(args, noisy=False), (4, 12, 12), A)
    plain.load_state_dict({name: value for name, value in q_network.state_dict().items() if "sigma" not in name})
    return plain


@pytest.mark.parametrize("noise", ["none", "evaluation", "sigma 0"])
def test_logits_and_q_values_match_the_authors(noise):
    """Noisy layers must have no effect in evaluation mode, nor in training mode if every sigma is 0."""
    args = Args(encoder="impala", num_experts=4, expert_hidden_dim=64, noisy=noise != "none")
    q_network = QNetwork(args, (4, 84, 84), num_actions=4)
    data, missing = load_golden(q_network, "rainbow_impala_softmoe_perconv_n4")
    assert set(missing) == set(sigmas(q_network)) and len(missing) == (0 if noise == "none" else 6)
    fill_sigmas(q_network, 1.0 if noise == "evaluation" else 0.0)
    q_network.train(noise != "evaluation")
    with torch.no_grad():
        logits, q_values = q_network(data["obs"])[0], q_network.q_values(data["obs"])
    torch.testing.assert_close(logits, data["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(q_values, data["q_values"], rtol=0, atol=1e-5)
    torch.testing.assert_close(q_network.support, data["support"], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- projection


def projection_oracle(atoms, probs, v_min, v_max, num_atoms):
    """Project one distribution by algorithm 1 of Bellemare et al. (2017). An atom on a grid point keeps its mass."""
    spacing, projected = (v_max - v_min) / (num_atoms - 1), [0.0] * num_atoms
    for atom, prob in zip(atoms, probs, strict=True):
        b = (min(max(atom, v_min), v_max) - v_min) / spacing
        b = round(b) if abs(b - round(b)) < 1e-9 else b
        lower, upper = math.floor(b), math.ceil(b)
        if lower == upper:
            projected[lower] += prob
        else:
            projected[lower] += prob * (upper - b)
            projected[upper] += prob * (b - lower)
    return projected


def test_projection_matches_the_authors():
    with np.load(Path(__file__).parent / "golden" / "c51_projection.npz") as file:
        data = {key: torch.from_numpy(file[key]) for key in file.files}
    atoms = data["reward"][:, None] + data["discount"][:, None] * data["support"]
    projected = project_distribution(atoms, data["next_probs"], data["support"])
    torch.testing.assert_close(projected, data["target_probs"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("v_min, v_max, n", [(-10, 10, 51), (-1, 3, 7), (4, 8, 5), (0, 1, 2), (-300, -20, 11)])
def test_projection_matches_bellemare_s_algorithm(v_min, v_max, n):
    """No mass is lost. An atom on a grid point keeps its mass. The mass of an atom beyond an end goes to that end."""
    width, support = v_max - v_min, torch.linspace(v_min, v_max, n, dtype=torch.float64)
    atoms = v_min - width / 2 + 2 * width * torch.rand(20, n, dtype=torch.float64)  # many beyond both ends
    grid = torch.stack([support, support.flip(0), support[torch.randperm(n)]])
    beyond = torch.tensor([[v_min - 1e-3], [v_min - 1e30], [v_max + 1e-3], [v_max + 1e30]]).double().expand(-1, n)
    atoms = torch.cat([atoms, grid, beyond])
    probs = torch.randn(27, n, dtype=torch.float64).mul(2).softmax(dim=1)
    rows = zip(atoms.tolist(), probs.tolist(), strict=True)
    expected = torch.tensor([projection_oracle(*row, v_min, v_max, n) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(project_distribution(atoms, probs, support), expected, rtol=0, atol=1e-12)
    single = project_distribution(atoms.float(), probs.float(), support.float())
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(single.sum(dim=1), torch.ones(27), rtol=0, atol=1e-5)
    torch.testing.assert_close(single[20], probs[20].float(), rtol=0, atol=1e-5)
    assert (single >= 0).all() and (single[23:25, 0] > 1 - 1e-5).all() and (single[25:, -1] > 1 - 1e-5).all()


def test_projection_of_a_known_case():
    """Atoms 0, 2 and 4 are at or below the first grid point, 6.25 is between two, and 8 is on the last one."""
    atoms, probs = torch.tensor([[0.0, 2, 4, 6.25, 8]]), torch.tensor([[0.1, 0.6, 0.1, 0.1, 0.1]])
    projected = project_distribution(atoms, probs, torch.tensor([4.0, 5, 6, 7, 8]))
    torch.testing.assert_close(projected, torch.tensor([[0.8, 0, 0.075, 0.025, 0.1]]), rtol=0, atol=1e-6)


def test_projection_uses_no_scatter():
    """On a GPU, a scatter that adds to one place twice is not deterministic."""
    support, atoms = torch.linspace(-10, 10, 51), torch.randn(32, 51) * 8
    with Operations() as operations:
        project_distribution(atoms, torch.randn(32, 51).softmax(dim=1), support)
    assert operations.names and not any(re.search("scatter|index|put|bincount|hist", x) for x in operations.names)


# ----------------------------------------------------------------------------------------------------------- loss


class Table(nn.Module):
    """A network that looks its logits up in a table, by the first pixel of the newest frame. It records its inputs."""

    expected = QNetwork.expected

    def __init__(self, logits, support):
        super().__init__()
        self.logits, self.support, self.seen = nn.Parameter(logits), support, []  # logits: (pixels, A, N)
        self.distributional = len(support) > 1

    def forward(self, obs):
        self.seen.append(obs)
        return self.logits[obs[:, -1, 0, 0].long() % len(self.logits)], None

    def q_values(self, obs):
        return self.expected(self(obs)[0])


def random_table(args):
    num_atoms = args.num_atoms if args.distributional else 1
    return Table(3 * torch.randn(48, A, num_atoms), torch.linspace(args.v_min, args.v_max, num_atoms))


def softmax(logits):
    exps = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exps) for x in exps]


def mean_of(probs, support):
    return sum(p * z for p, z in zip(probs, support, strict=True))


def loss_oracle(logits, online_next, target_next, batch, args):
    """Return losses, values of the taken actions, and next actions of a batch, from lists of logits (B, A, N)."""
    spacing = (args.v_max - args.v_min) / (args.num_atoms - 1)
    support = [args.v_min + i * spacing for i in range(args.num_atoms)]
    losses, values, actions = [], [], []
    for i, action in enumerate(batch.action.tolist()):
        chooser = online_next[i] if args.double else target_next[i]
        if not args.distributional:
            actions.append(np.argmax(chooser))
            bootstrap = batch.discount[i].item() * target_next[i][actions[-1]][0]
            values.append(logits[i][action][0])
            error = abs(values[-1] - batch.reward[i].item() - bootstrap)
            losses.append(0.5 * error**2 if error < 1 else error - 0.5)  # Huber loss, delta 1
            continue
        q_next = [mean_of(softmax(row), support) for row in chooser]
        actions.append(max(range(len(q_next)), key=q_next.__getitem__))
        atoms = [batch.reward[i].item() + batch.discount[i].item() * z for z in support]
        next_probs = softmax(target_next[i][actions[-1]])
        target = projection_oracle(atoms, next_probs, args.v_min, args.v_max, args.num_atoms)
        probs = softmax(logits[i][action])
        losses.append(-sum(t * math.log(p) for t, p in zip(target, probs, strict=True)))
        values.append(mean_of(probs, support))
    return losses, values, actions


def make_batch(script, obs, next_obs):
    """Return random transitions. Some rewards are beyond the support, and every third transition is terminal."""
    n = len(obs)
    discount = 0.99 ** torch.randint(1, 4, (n,)).float() * (torch.arange(n) % 3 > 0)
    parts = obs, torch.randint(A, (n,)), 2 * torch.randn(n), discount, next_obs, torch.arange(n)
    return script.Batch(*parts) if script is dqn_softmoe else script.Batch(*parts, torch.rand(n) + 0.1)


def constant_obs(values):
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 2, 2).clone()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("distributional", [True, False], ids=["c51", "values"])
@pytest.mark.parametrize("kind", ["table", "dueling", "advantage alone"])
def test_td_loss_matches_a_loop(script, double, distributional, kind):
    """The networks disagree about the best next action. The loss has importance weights, the losses have none."""
    settings = {"double": double, "distributional": distributional, "dueling": kind == "dueling", "noisy": False}
    (online, args), (target, _) = (make_network(script, **settings) for _ in range(2))
    obs, next_obs = random_obs(24), random_obs(24)
    if kind == "table":
        online, target = random_table(args), random_table(args)
        obs, next_obs = constant_obs(range(24)), constant_obs(range(24, 48))
    else:  # the target's preferences are the online network's, shifted by one action
        nn.init.normal_(online.advantage.weight, std=30.0)
        target.load_state_dict(online.state_dict())
        target.advantage.weight.data = online.advantage.weight.data.roll(args.num_atoms if distributional else 1, 0)
        nn.init.normal_(target.advantage.bias, std=0.1)
    batch = make_batch(script, obs, next_obs)
    with torch.no_grad():
        pairs = (online, batch.obs), (online, batch.next_obs), (target, batch.next_obs)
        logits = [q_network(x)[0].tolist() for q_network, x in pairs]
    losses, values, actions = loss_oracle(*logits, batch, args)
    other_losses, _, other_actions = loss_oracle(*logits, batch, replace(args, double=not double))
    differ = [a != b and discount > 0 for a, b, discount in zip(actions, other_actions, batch.discount, strict=True)]
    assert sum(differ) >= 8 and np.abs(np.subtract(losses, other_losses)).max() > 0.05  # double has an effect
    loss, metrics, _, unweighted = script.td_loss(online, target, batch, args)
    torch.testing.assert_close(unweighted, torch.tensor(losses), rtol=1e-4, atol=1e-4)
    weighted = np.mean(np.array(losses) * batch.importance_weights.numpy())
    assert metrics["td_loss"].item() == metrics["loss"].item() == loss.item() == pytest.approx(weighted, rel=1e-4)
    assert metrics["q_values"].item() == pytest.approx(np.mean(values), abs=1e-4)


@pytest.mark.parametrize("double", [True, False])
def test_no_gradient_reaches_the_target(script, double):
    """The gradient is that of the taken actions' logits alone, even if the target network is the online network."""
    args = script.Args(**SMALL | {"layer": "dense", "double": double})
    for shared in (False, True):
        online, target = random_table(args), random_table(args)
        batch = make_batch(script, constant_obs(range(8)), constant_obs(range(8, 16)))
        loss, metrics, _, losses = script.td_loss(online, online if shared else target, batch, args)
        loss.backward()
        taken = online.logits.grad[torch.arange(8), batch.action]
        assert (taken.abs().sum(dim=1) > 0).all() and (online.logits.grad[8:] == 0).all()
        assert online.logits.grad.abs().sum().item() == pytest.approx(taken.abs().sum().item())
        assert target.logits.grad is None and not any(value.requires_grad for value in (losses, *metrics.values()))


@pytest.mark.parametrize("script", [dqn_softmoe, rainbow_softmoe, der_softmoe])
@pytest.mark.parametrize("balancing", ["importance", "load", "importance+load"])
def test_load_balancing_is_added_to_the_loss_and_not_to_the_losses(script, balancing):
    """The balancing loss has no importance weights. It changes the loss and its gradient, but not the priorities."""
    q_network, args = make_network(script, layer="top1moe", **{} if script is dqn_softmoe else {"noisy": False})
    batch = make_batch(script, random_obs(6), random_obs(6))
    plain, without, _, *expected = script.td_loss(q_network, q_network, batch, args)
    args = replace(args, load_balancing=balancing, importance_weight=20.0, load_weight=30.0)
    torch.manual_seed(5)
    loss, metrics, output, *losses = script.td_loss(q_network, q_network, batch, args)
    torch.manual_seed(5)
    added = load_balancing_loss(q_network(batch.obs)[1], balancing, 20.0, 30.0)
    assert added > 1e-4
    torch.testing.assert_close(loss, plain + added)
    torch.testing.assert_close(metrics["td_loss"], plain)
    torch.testing.assert_close(metrics["load_balancing_loss"], added)
    gradients = [torch.autograd.grad(x, q_network.moe.router.weight)[0] for x in (plain, loss)]
    assert (gradients[1] - gradients[0]).abs().sum() > 1e-4
    torch.testing.assert_close(losses, expected)
    assert [x.shape for x in losses] == ([] if script is dqn_softmoe else [(6,)])
    assert set(metrics) - set(without) == {"load_balancing_loss"}
    assert set(without) == {"loss", "td_loss", "q_values"} and metrics["loss"].item() == loss.item()
    assert loss.requires_grad and all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert not any(x.requires_grad for x in (output.tokens, output.hidden, *output.routing))


# ---------------------------------------------------------------------------------------------------------- noise

LAYERS = ["softmoe", "top1moe", "dense"]


@pytest.mark.parametrize("layer", LAYERS)
def test_evaluation_mode_uses_the_means_and_draws_no_noise(layer):
    """The results are those of a network without noisy layers, which draws no noise in training mode either."""
    noisy, args = make_network(layer=layer)
    plain, obs = without_noise(noisy, args), random_obs(5)
    fill_sigmas(noisy, 3.0)
    assert not sigmas(plain) and not any(isinstance(module, NoisyLinear) for module in plain.modules())
    with torch.no_grad():
        assert (noisy(obs)[0] - plain(obs)[0]).abs().max() > 1e-2
        noisy.eval()
        state = torch.get_rng_state()
        torch.testing.assert_close(noisy(obs)[0], plain.train()(obs)[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(noisy.q_values(obs), plain.q_values(obs), rtol=0, atol=1e-6)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_the_loss_reach_every_sigma_and_every_mean(script, layer):
    (q_network, args), (target, _) = (make_network(script, layer=layer) for _ in range(2))
    script.td_loss(q_network, target, make_batch(script, random_obs(8), random_obs(8)), args)[0].backward()
    first = ["moe.linear.weight", "moe.linear.bias"] if layer == "dense" else ["moe.experts.w1", "moe.experts.b1"]
    heads = [f"{head}.{part}" for head in ("advantage", "value") for part in ("weight", "bias")]
    assert set(sigmas(q_network)) == {f"{name}_sigma" for name in first + heads}
    for name, parameter in q_network.named_parameters():
        if name != "moe.scale":  # only the normalised router uses it
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in target.parameters())


# -------------------------------------------------------------------------------------------------------- dueling


@pytest.mark.parametrize("dueling", [True, False])
def test_logits_are_value_plus_advantage_minus_its_mean_over_actions(dueling, monkeypatch):
    """The advantage head's outputs are action-major, and are the logits without dueling. Q-values are the means."""
    q_network, args = make_network(dueling=dueling)
    N = args.num_atoms
    assert any("value" in name for name in q_network.state_dict()) == dueling
    advantage, value = torch.randn(A * N), torch.randn(N)
    monkeypatch.setattr(q_network.advantage, "forward", lambda x: advantage.expand(len(x), -1))
    if dueling:
        monkeypatch.setattr(q_network.value, "forward", lambda x: value.expand(len(x), -1))
    logits = q_network(random_obs(2))[0]
    assert logits.shape == (2, A, N)
    for a in range(A):
        for n in range(N):
            mean = sum(advantage[b * N + n] for b in range(A)) / A
            expected = advantage[a * N + n] + (value[n] - mean if dueling else 0)
            assert logits[:, a, n].tolist() == pytest.approx([expected.item()] * 2, abs=1e-5)
        expected = mean_of(softmax(logits[0, a].tolist()), [args.v_min + n * 3 / (N - 1) for n in range(N)])
        assert q_network.q_values(random_obs(2))[:, a].tolist() == pytest.approx([expected] * 2, abs=1e-5)


# ------------------------------------------------------------------------------------ priorities, lives, exploration


def tiny_args(script, tmp_path, **overrides):
    """Return the arguments of a run that takes less than a second and updates from step 40 on."""
    settings = {"total_timesteps": 120, "learning_starts": 40, "buffer_size": 400, "batch_size": 8, "num_envs": 2}
    settings |= {"iteration_steps": 60, "checkpoint_every": 0, "replay_ratio": 0.5, "runs_dir": str(tmp_path / "runs")}
    return script.Args(**quick(**settings | overrides))


def copy_of(x):
    return x.clone() if isinstance(x, torch.Tensor) else x.copy() if isinstance(x, np.ndarray) else x


def record_calls(monkeypatch, owner, name, replacement=None):
    """Return a list that collects the arguments and the result of every later call of `owner.name`."""
    calls, function = [], replacement or getattr(owner, name)

    def wrapper(*args):
        before = [copy_of(x) for x in args]
        result = function(*args)
        calls.append((before, tuple(map(copy_of, result)) if type(result) is tuple else copy_of(result)))
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_every_update_gives_its_batch_new_priorities(script, tmp_path, monkeypatch):
    replay_class, learned = script.PrioritizedReplayBuffer, record_calls(monkeypatch, script, "td_loss")
    draws, updates = (record_calls(monkeypatch, replay_class, name) for name in ("sample", "update_priorities"))
    script.main(tiny_args(script, tmp_path, layer="dense", eval_episodes=0))
    assert len(draws) == len(learned) == len(updates) == 40
    for (_, batch), (_, (loss, *_)), ((_, index, losses), _) in zip(draws, learned, updates, strict=True):
        assert torch.equal(batch.index, index)
        torch.testing.assert_close((losses * batch.importance_weights).mean(), loss.detach())
    assert len(updates[0][0][0].weight.unique()) > 40
    script.main(tiny_args(script, tmp_path, layer="dense", eval_episodes=0, prioritized=False))
    assert len(learned) == 80 and len(draws) == len(updates) == 40


def record_stacks(monkeypatch, play):
    """Run `play` with random Q-values. Returns the stacks that `q_values` got, the expected ones, terminated, over."""
    seen = record_calls(monkeypatch, der_softmoe.QNetwork, "q_values", lambda self, obs: torch.rand(len(obs), 4))
    first = record_calls(monkeypatch, der_softmoe.Environments, "reset")
    steps = record_calls(monkeypatch, der_softmoe.Environments, "recv")
    play()
    frames = [first[0][1], *(frame for _, (frame, *_) in steps)]
    terminated, truncated, over = (np.stack([step[k] for _, step in steps]) for k in (2, 3, 4))
    seen = torch.stack([obs for (_, obs), _ in seen])
    expected = np.zeros_like(seen)
    for i in range(seen.shape[1]):
        stack = []
        for t in range(len(seen)):
            stack = [*stack, frames[t][i]][-4:]
            expected[t, i, 4 - len(stack) :] = stack
            stack = [] if terminated[t, i] or truncated[t, i] else stack
    return seen, torch.from_numpy(expected), terminated, over


def test_lost_lives_end_stacks_and_episodes_while_the_game_goes_on(tmp_path, monkeypatch):
    """In a run without updates, the network sees the stacks of the replay, in which a lost life is terminal."""
    breakout = {"env_id": "BreakoutNoFrameskip-v4", "num_envs": 1, "layer": "dense", "eval_episodes": 0}
    breakout |= {"buffer_size": 1000, "total_timesteps": 900, "learning_starts": 900}
    args = tiny_args(der_softmoe, tmp_path, **breakout)
    agents = record_calls(monkeypatch, der_softmoe.Agent, "__init__")
    seen, expected, terminated, over = record_stacks(monkeypatch, lambda: der_softmoe.main(args))
    replay = agents[0][0][0].replay
    assert torch.equal(seen, expected)
    assert torch.equal(replay.observation(torch.arange(900)), seen[:, 0])
    np.testing.assert_array_equal(replay.terminated[:900], terminated[:, 0])
    assert 4 <= 2 * over.sum() < terminated.sum() <= 5 * over.sum() + 4 and terminated[over].all()  # five lives each


def test_lost_lives_end_stacks_in_evaluation(tmp_path, monkeypatch):
    args = tiny_args(der_softmoe, tmp_path, env_id="BreakoutNoFrameskip-v4", layer="dense", eval_episodes=3)
    q_network, returns = der_softmoe.QNetwork(args, (4, 84, 84), 4), []
    evaluate = functools.partial(der_softmoe.evaluate, q_network, args, 1, threading.Event())
    seen, expected, terminated, over = record_stacks(monkeypatch, lambda: returns.extend(evaluate()))
    assert torch.equal(seen, expected) and len(returns) == 3
    assert 0 < 2 * over.sum() < terminated.sum() <= 5 * over.sum() + 12


def test_evaluation_is_noiseless_deterministic_and_leaves_the_random_state_alone(tmp_path, monkeypatch):
    """Actions follow the Q-values of the network without noise. A seed always plays the same games."""
    args = tiny_args(rainbow_softmoe, tmp_path, eval_epsilon=0.3, eval_episodes=3)
    q_network = QNetwork(args, (4, 12, 12), A)
    fill_sigmas(q_network, 2.0)
    plain = without_noise(q_network, args)
    acted = record_calls(monkeypatch, q_network, "q_values")
    chosen = record_calls(monkeypatch, rainbow_softmoe, "select_actions")

    def play(seed):
        acted.clear(), chosen.clear()
        state = torch.get_rng_state()
        returns = rainbow_softmoe.evaluate(q_network, args, seed, threading.Event())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in q_network.modules())
        with torch.no_grad():
            for (obs,), q_values in acted:
                torch.testing.assert_close(q_values, plain.q_values(obs), rtol=0, atol=1e-5)
        assert len(acted) == len(chosen) > 0 and {inputs[1] for inputs, _ in chosen} == {0.3}
        return returns, acted[0][0][0], torch.stack([actions for _, actions in chosen])

    returns, start, actions = play(5)
    torch.rand(7)
    again, same_start, same_actions = play(5)
    _, other_start, other_actions = play(6)
    assert len(returns) == 3 and returns == again
    assert torch.equal(start, same_start) and torch.equal(actions, same_actions)
    assert not torch.equal(start, other_start) and not torch.equal(actions, other_actions)


def test_acting_is_noisy_in_training_and_not_in_evaluation(tmp_path, monkeypatch):
    """Two calls of `q_values` with the same observations differ in training and agree in evaluation."""
    args, original, noisy = tiny_args(rainbow_softmoe, tmp_path), QNetwork.q_values, []

    def q_values(self, obs):
        first = original(self, obs)
        if len(obs) == args.num_envs:  # acting, not learning
            noisy.append((self.training, not torch.equal(first, original(self, obs))))
        return first

    monkeypatch.setattr(QNetwork, "q_values", q_values)
    rainbow_softmoe.main(args)
    assert noisy[:60] == [(True, True)] * 60 and set(noisy[60:]) == {(False, False)}


EXPLORING = [(dqn_softmoe, None), (rainbow_softmoe, True), (rainbow_softmoe, False), (der_softmoe, False)]


@pytest.mark.parametrize("script, noisy", EXPLORING)
def test_epsilon_decays_and_is_zero_with_noise(script, noisy, tmp_path, monkeypatch):
    """A run acts with the epsilon that it logs. Without noise it is 1 until learning starts, then decays linearly."""
    settings = {} if noisy else {"end_epsilon": 0.2, "epsilon_decay_steps": 50}
    settings |= {} if noisy is None else {"noisy": noisy}
    acted = record_calls(monkeypatch, script, "select_actions")
    logged = record_calls(monkeypatch, script.RunLog, "update")
    monkeypatch.setattr(script, "LOG_EVERY", 20)
    script.main(tiny_args(script, tmp_path, eval_episodes=0, **settings))
    steps = range(0, 120, 2)
    expected = [0.0 if noisy else 1 - 0.8 * min(max((step - 40) / 50, 0), 1) for step in steps]
    assert [inputs[1] for inputs, _ in acted] == pytest.approx(expected)
    assert [(step, epsilon) for (_, step, epsilon, _), _ in logged] == [
        (step, pytest.approx(expected[step // 2 - 1])) for step in (20, 40, 60, 80, 100, 120)
    ]
    assert [len(values) > 0 for (*_, values), _ in logged] == [False] * 2 + [True] * 4


# --------------------------------------------------------------------------------------------------- augmentation


def match_crops(obs, augmented, padding=4):
    """Compare every augmented sample with all (2 * padding + 1)^2 crops of its frames, whose edges are repeated.

    Returns whether the sample is a multiple of the crop, and the factor, both (B, crops).
    """
    H, W = obs.shape[2:]
    padded, matches, factors = F.pad(obs.float(), (padding,) * 4, mode="replicate"), [], []
    for y in range(2 * padding + 1):
        for x in range(2 * padding + 1):
            ratio = (augmented / padded[:, :, y : y + H, x : x + W]).flatten(1)
            factors.append(ratio.mean(dim=1))
            matches.append((ratio - ratio[:, :1]).abs().amax(dim=1) < 1e-5)
    return torch.stack(matches, dim=1), torch.stack(factors, dim=1)


def test_augmentation_is_one_shift_and_one_intensity_per_sample():
    """The frames of a stack get the same shift and the same intensity.

    All 81 shifts are equally likely. Intensities are 1 + 0.05 N(0, 1), clipped at two sigma: 2.28% are at each end.
    """
    obs = torch.randint(1, 256, (3000, 4, 5, 7), dtype=torch.uint8)
    before = obs.clone()
    augmented = der_softmoe.augment(obs)
    assert augmented.shape == obs.shape and augmented.dtype == torch.float32 and torch.equal(obs, before)
    assert not torch.equal(augmented, der_softmoe.augment(obs))
    matches, factors = match_crops(obs, augmented)
    assert (matches.sum(dim=1) == 1).all()
    counts, expected = matches.sum(dim=0).double(), 3000 / 81
    assert counts.min() > 0 and abs(((counts - expected).square() / expected).sum() - 80) < 5 * (2 * 80) ** 0.5
    factors = factors[matches]
    assert factors.min() > 0.9 - 1e-5 and factors.max() < 1.1 + 1e-5
    for at_end in (factors < 0.9 + 1e-5, factors > 1.1 - 1e-5):
        assert at_end.float().mean().item() == pytest.approx(0.0228, abs=0.012)
    assert ((factors - 1).abs() < 0.05).float().mean().item() == pytest.approx(0.683, abs=0.04)
    assert factors.mean().item() == pytest.approx(1, abs=0.004)


@pytest.mark.parametrize("size", [(3, 2), (1, 9), (84, 84)])
def test_augmentation_of_frames_of_other_sizes(size):
    """Several crops may match if the frames are smaller than the shift."""
    obs = random_obs(8, size).clamp_min(1)
    assert match_crops(obs, der_softmoe.augment(obs))[0].any(dim=1).all()


def test_obs_and_next_obs_are_augmented_independently():
    """The online network sees obs, and next_obs to choose the actions. The target network sees the same next_obs."""
    args = der_softmoe.Args(**SMALL | {"augment": True, "layer": "dense"})
    online, target = random_table(args), random_table(args)
    obs, next_obs = random_obs(32).clamp_min(1).split(16)
    der_softmoe.td_loss(online, target, make_batch(der_softmoe, obs, next_obs), args)
    (first, second), (third,) = online.seen, target.seen
    assert torch.equal(second, third)
    draws = []
    for raw, seen in ((obs, first), (next_obs, second)):
        matches, factors = match_crops(raw, seen)
        assert (matches.sum(dim=1) == 1).all() and ((factors[matches] - 1).abs() > 1e-6).sum() >= 12
        draws.append((matches.long().argmax(dim=1), factors[matches]))
    assert (draws[0][0] != draws[1][0]).sum() >= 12  # of 16 pairs of shifts, of which 1 in 81 agrees by chance
    assert ((draws[0][1] - draws[1][1]).abs() > 1e-6).sum() >= 12


# ------------------------------------------------------------------------------------------------------ arguments

BAD_SUPPORTS = [{"num_atoms": 1}, {"num_atoms": 1001}, {"v_min": 10.0}, {"v_max": -10.0}, {"v_min": 3.0, "v_max": 2.0}]
BAD_SUPPORTS += [{name: value} for name in ("v_min", "v_max") for value in (math.inf, -math.inf, math.nan)]
BAD_SUPPORTS += [{"v_min": 0.0, "v_max": 1e-46}, {"v_min": 1e8, "v_max": 1e8 + 1}, {"v_max": 1e39}]  # beyond float32
BAD_SUPPORTS += [{"v_min": 1e6, "v_max": 1e6 + 10}, {"v_min": -1e6 - 10, "v_max": -1e6}]  # atoms are 3 ulps apart
GOOD_SUPPORTS = [(-10.0, 10.0, 1000), (-1e6, 1e6, 51), (0.0, 1e-3, 51), (990.0, 1000.0, 51), (-300.0, -20.0, 2)]


@pytest.mark.parametrize("script", [rainbow_softmoe, der_softmoe, cql_softmoe])
@pytest.mark.parametrize("overrides", BAD_SUPPORTS, ids=str)
def test_invalid_supports_are_refused(script, overrides):
    with pytest.raises(ValueError, match="--num-atoms" if "num_atoms" in overrides else "--v-m"):
        script.check_args(script.Args(**overrides))


@pytest.mark.parametrize("script", [rainbow_softmoe, der_softmoe, cql_softmoe])
@pytest.mark.parametrize("v_min, v_max, num_atoms", GOOD_SUPPORTS)
def test_supports_that_float32_resolves_keep_the_mass(script, v_min, v_max, num_atoms):
    script.check_args(script.Args(v_min=v_min, v_max=v_max, num_atoms=num_atoms))
    support = torch.linspace(v_min, v_max, num_atoms)
    probs = torch.full((1, num_atoms), 1 / num_atoms)
    projected = script.project_distribution(0.99 * support[None] + 0.01 * support.mean(), probs, support)
    assert projected.sum().item() == pytest.approx(1, abs=1e-3)


def test_flags_of_atoms_are_refused_without_c51(script):
    for given in ({"num_atoms": 21}, {"v_min": -5.0}, {"v_max": 5.0}):
        with pytest.raises(ValueError, match=f"--{[*given][0].replace('_', '-')} .*--distributional"):
            script.check_args(script.Args(distributional=False, **given))


def test_flags_of_epsilon_are_refused_with_noise():
    for given in ({"end_epsilon": 0.05}, {"epsilon_decay_steps": 1000}):
        with pytest.raises(ValueError, match=f"--{[*given][0].replace('_', '-')} .*--no-noisy"):
            rainbow_softmoe.check_args(Args(**given))
        rainbow_softmoe.check_args(Args(noisy=False, **given))
    for given in ({}, {"num_atoms": 2, "v_min": 0.0, "v_max": 1.0}, {"v_min": -1}):
        rainbow_softmoe.check_args(Args(**given))


SHARED = {"layer": "softmoe", "num_experts": 4, "expert_hidden_dim": 512, "tokenization": "PerConv"}
SHARED |= {"capacity_factor": 1.0, "normalize_router": False, "learned_phi": True, "load_balancing": "none"}
SHARED |= {"importance_weight": 1.0, "load_weight": 1.0, "encoder_width": 1, "buffer_size": 1_000_000}
SHARED |= {"batch_size": 32, "gamma": 0.99, "adam_eps": 1.5e-4, "num_atoms": 51, "v_min": -10.0, "v_max": 10.0}
SHARED |= {"distributional": True, "double": True, "dueling": True, "noisy": True, "prioritized": True}
SHARED |= {"end_epsilon": 0.01, "eval_epsilon": 0.001}
RAINBOW = {"num_envs": 4, "total_timesteps": 50_000_000, "iteration_steps": 250_000, "sticky_actions": 0.25}
RAINBOW |= {"noop_max": 0, "terminal_on_life_loss": False, "encoder": "impala", "n_step": 3, "replay_ratio": 0.25}
RAINBOW |= {"epsilon_decay_steps": 250_000, "learning_rate": 6.25e-5, "learning_starts": 20_000}
RAINBOW |= {"target_network_frequency": 8_000}
DER = {"num_envs": 1, "total_timesteps": 100_000, "iteration_steps": 10_000, "sticky_actions": 0.0, "noop_max": 30}
DER |= {"terminal_on_life_loss": True, "encoder": "nature", "n_step": 10, "replay_ratio": 1.0, "eval_episodes": 100}
DER |= {"epsilon_decay_steps": 2_000, "learning_rate": 1e-4, "learning_starts": 1_600, "augment": False}
DER |= {"target_network_frequency": 2_000}


def test_defaults_match_the_paper():
    assert vars(Args()).items() >= (SHARED | RAINBOW).items()
    assert vars(der_softmoe.Args()).items() >= (SHARED | DER).items()
