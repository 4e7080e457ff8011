"""Rainbow and DER: C51 projection and loss, noisy and dueling heads, exploration, augmentation, arguments.

The references are the authors' numbers (`tests/golden`, and those beside the checkout) and loops in float64 that are
written from the papers. What both scripts have is tested in both.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, quick
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import der_softmoe
import rainbow_softmoe
from moe_layers import NoisyLinear, SoftMoE, Top1MoE

LOCAL_GOLDEN = Path(__file__).parent / "golden"
MEAN_ABS_NORMAL = math.sqrt(2 / math.pi)  # E|N(0, 1)|: the variance of factorised noise f(N(0, 1))
SMALL = {"encoder": "nature", "num_experts": 2, "expert_hidden_dim": 8, "num_atoms": 5, "v_min": -1.0, "v_max": 2.0}
A = 3  # actions of the small networks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[rainbow_softmoe, der_softmoe], ids=["rainbow", "der"])
def script(request):
    return request.param


def network(script, **overrides):
    """A small network for 12x12 frames, and its arguments."""
    args = script.Args(**SMALL | overrides)
    return script.QNetwork(args, (4, 12, 12), A), args


def random_obs(n, size=(12, 12)):
    return torch.randint(0, 256, (n, 4, *size), dtype=torch.uint8)


def sigmas(q_network):
    return {name: parameter for name, parameter in q_network.named_parameters() if "sigma" in name}


def fill_sigmas(q_network, value, only=""):
    """Set the sigmas whose name starts with `only`, and the others to 0."""
    for name, parameter in sigmas(q_network).items():
        nn.init.constant_(parameter, value if name.startswith(only) else 0.0)


def means(q_network):
    return {name: value for name, value in q_network.state_dict().items() if "sigma" not in name}


# ------------------------------------------------------------------------------------------------ the authors' numbers


@pytest.mark.parametrize("noise", ["none", "evaluation", "sigma 0"])
def test_logits_and_q_values_are_the_authors(script, noise):
    """Without noisy layers; with noisy layers in evaluation mode; and in training mode with every sigma 0."""
    if not GOLDEN.is_dir():
        pytest.skip("the authors' whole-network numbers are not beside this checkout")
    data = np.load(GOLDEN / "rainbow_impala_softmoe_perconv_n4.npz")
    args = script.Args(encoder="impala", num_experts=4, expert_hidden_dim=64, noisy=noise != "none")
    q_network = script.QNetwork(args, (4, 84, 84), num_actions=4)
    weights = {key.removeprefix("param/"): torch.from_numpy(data[key]) for key in data.files if "param/" in key}
    loaded = q_network.load_state_dict(weights, strict=noise == "none")
    assert not loaded.unexpected_keys and all(name.endswith("_sigma") for name in loaded.missing_keys)
    assert len(loaded.missing_keys) == len(sigmas(q_network)) == (0 if noise == "none" else 6)
    if noise == "evaluation":
        fill_sigmas(q_network, 1.0)
        q_network.eval()
    else:
        fill_sigmas(q_network, 0.0)
    obs = torch.from_numpy(data["obs"])
    with torch.no_grad():
        logits, q_values = q_network(obs)[0], q_network.q_values(obs)
    torch.testing.assert_close(logits, torch.from_numpy(data["logits"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(q_values, torch.from_numpy(data["q_values"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(q_network.support, torch.from_numpy(data["support"]), rtol=0, atol=1e-6)


def test_the_projection_is_the_authors(script):
    data = {key: torch.from_numpy(value) for key, value in np.load(LOCAL_GOLDEN / "c51_projection.npz").items()}
    atoms = data["reward"][:, None] + data["discount"][:, None] * data["support"]
    projected = script.project_distribution(atoms, data["next_probs"], data["support"])
    torch.testing.assert_close(projected, data["target_probs"], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- projection


def project(atoms, probs, v_min, v_max, num_atoms):
    """Bellemare et al. (2017), algorithm 1, for one distribution; an atom on a grid point keeps its mass there."""
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


SUPPORTS = [(-10.0, 10.0, 51), (-1.0, 3.0, 7), (4.0, 8.0, 5), (0.0, 1.0, 2), (-300.0, -20.0, 11)]


@pytest.mark.parametrize("v_min, v_max, num_atoms", SUPPORTS)
def test_projection_is_bellemare_s_algorithm(script, v_min, v_max, num_atoms):
    """Random atoms, many beyond both ends: exact in float64, to rounding in float32; no mass is lost."""
    width = v_max - v_min
    atoms = v_min - width / 2 + 2 * width * torch.rand(20, num_atoms, dtype=torch.float64)
    probs = torch.randn(20, num_atoms, dtype=torch.float64).mul(2).softmax(dim=1)
    rows = zip(atoms.tolist(), probs.tolist(), strict=True)
    expected = torch.tensor([project(*row, v_min, v_max, num_atoms) for row in rows], dtype=torch.float64)
    support = torch.linspace(v_min, v_max, num_atoms, dtype=torch.float64)
    projected = script.project_distribution(atoms, probs, support)
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-12)
    single = script.project_distribution(atoms.float(), probs.float(), support.float())
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(single.sum(dim=1), torch.ones(20), rtol=0, atol=1e-5)
    assert (single >= 0).all()


def test_projection_of_a_known_case(script):
    """Atoms at 0, 2, 4 fall on or below the first grid point, 6 is one, 8 is the last."""
    atoms, probs = torch.tensor([[0.0, 2, 4, 6, 8]]), torch.tensor([[0.1, 0.6, 0.1, 0.1, 0.1]])
    projected = script.project_distribution(atoms, probs, torch.tensor([4.0, 5, 6, 7, 8]))
    torch.testing.assert_close(projected, torch.tensor([[0.8, 0, 0.1, 0, 0.1]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("v_min, v_max, num_atoms", SUPPORTS)
def test_projection_of_grid_points_is_the_identity(script, v_min, v_max, num_atoms):
    """Also of shuffled ones: where the mass comes from in the row does not matter."""
    support = torch.linspace(v_min, v_max, num_atoms)
    probs = torch.randn(3, num_atoms).softmax(dim=1)
    projected = script.project_distribution(support.expand(3, -1), probs, support)
    torch.testing.assert_close(projected, probs, rtol=0, atol=1e-5)
    order = torch.randperm(num_atoms)
    projected = script.project_distribution(support[order].expand(3, -1), probs[:, order], support)
    torch.testing.assert_close(projected, probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("v_min, v_max, num_atoms", SUPPORTS)
def test_projection_of_atoms_beyond_an_end_is_that_end(script, v_min, v_max, num_atoms):
    support, probs = torch.linspace(v_min, v_max, num_atoms), torch.randn(2, num_atoms).softmax(dim=1)
    atoms = torch.tensor([[v_min - 1e-3], [v_max + 1e-3]]) + torch.tensor([[-1.0], [1.0]]) * torch.arange(num_atoms)
    projected = script.project_distribution(atoms, probs, support)
    ends = F.one_hot(torch.tensor([0, num_atoms - 1]), num_atoms).float()
    torch.testing.assert_close(projected, ends, rtol=0, atol=1e-6)
    far = script.project_distribution(atoms * 0 + torch.tensor([[-1e30], [1e30]]), probs, support)
    torch.testing.assert_close(far, ends, rtol=0, atol=1e-6)


class Operations(TorchDispatchMode):
    """Names of the operations that run, and the size of the largest tensor that one makes."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


def test_projection_scatters_nothing(script):
    """On a GPU, adding to places that repeat is not deterministic."""
    support, atoms = torch.linspace(-10, 10, 51), torch.randn(32, 51) * 8
    with Operations() as operations:
        script.project_distribution(atoms, torch.randn(32, 51).softmax(dim=1), support)
    assert operations.names and not any(re.search("scatter|index|put|bincount|hist", x) for x in operations.names)


# ----------------------------------------------------------------------------------------------------------- loss


class Table(nn.Module):
    """Logits read from a table by the first pixel of the newest frame."""

    def __init__(self, logits, support):
        super().__init__()
        self.logits = nn.Parameter(logits)  # (pixels, A, N)
        self.support = support

    def forward(self, obs):
        return self.logits[obs[:, -1, 0, 0].long()], None

    def q_values(self, obs):
        return self(obs)[0].softmax(dim=2) @ self.support


def softmax(logits):
    exps = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exps) for x in exps]


def mean_of(probs, support):
    return sum(p * z for p, z in zip(probs, support, strict=True))


def loss_oracle(logits, online_next, target_next, batch, args):
    """Losses, chosen values and next actions of a batch, transition by transition, from lists of logits (B, A, N)."""
    spacing = (args.v_max - args.v_min) / (args.num_atoms - 1)
    support = [args.v_min + i * spacing for i in range(args.num_atoms)]
    losses, values, actions = [], [], []
    for i, action in enumerate(batch.action.tolist()):
        chooser = online_next[i] if args.double else target_next[i]
        q_next = [mean_of(softmax(row), support) for row in chooser]
        actions.append(max(range(len(q_next)), key=q_next.__getitem__))
        atoms = [batch.reward[i].item() + batch.discount[i].item() * z for z in support]
        target = project(atoms, softmax(target_next[i][actions[-1]]), args.v_min, args.v_max, args.num_atoms)
        probs = softmax(logits[i][action])
        losses.append(-sum(t * math.log(p) for t, p in zip(target, probs, strict=True)))
        values.append(mean_of(probs, support))
    return losses, values, actions


def make_batch(script, obs, next_obs, **changes):
    """Random transitions: n-step discounts, rewards beyond the support, every third terminal."""
    n = len(obs)
    discount = 0.99 ** torch.randint(1, 4, (n,)).float() * (torch.arange(n) % 3 > 0)
    parts = {"action": torch.randint(A, (n,)), "reward": 2 * torch.randn(n), "discount": discount}
    parts |= {"index": torch.arange(n), "importance_weights": torch.rand(n) + 0.1}
    return script.Batch(**{"obs": obs, "next_obs": next_obs} | parts | changes)


def pixels(values):
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 2, 2).clone()


def random_table(args):
    return Table(3 * torch.randn(48, A, args.num_atoms), torch.linspace(args.v_min, args.v_max, args.num_atoms))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["table", "dueling", "advantage alone"])
def test_td_loss_is_the_loop_s(script, double, kind):
    """Networks that disagree about the best next action; losses are unweighted, the loss is weighted."""
    settings = {"double": double, "dueling": kind == "dueling", "noisy": False}
    (online, args), (target, _) = (network(script, **settings) for _ in range(2))
    obs, next_obs = random_obs(24), random_obs(24)
    if kind == "table":
        online, target = random_table(args), random_table(args)
        obs, next_obs = pixels(range(24)), pixels(range(24, 48))
    else:  # the target shifts online's preferences by one action
        nn.init.normal_(online.advantage.weight, std=30.0)
        target.load_state_dict(online.state_dict())
        target.advantage.weight.data = online.advantage.weight.data.roll(args.num_atoms, 0)
        nn.init.normal_(target.advantage.bias, std=0.1)
    batch = make_batch(script, obs, next_obs)
    with torch.no_grad():
        pairs = (online, batch.obs), (online, batch.next_obs), (target, batch.next_obs)
        logits = [q_network(x)[0].tolist() for q_network, x in pairs]
    losses, values, actions = loss_oracle(*logits, batch, args)
    other_losses, _, other_actions = loss_oracle(*logits, batch, replace(args, double=not double))
    differ = [a != b and discount > 0 for a, b, discount in zip(actions, other_actions, batch.discount, strict=True)]
    assert sum(differ) >= 8 and np.abs(np.subtract(losses, other_losses)).max() > 0.05  # can tell them apart
    loss, metrics = script.td_loss(online, target, batch, args)
    torch.testing.assert_close(metrics["losses"], torch.tensor(losses), rtol=1e-4, atol=1e-4)
    weighted = np.mean(np.array(losses) * batch.importance_weights.numpy())
    assert loss.item() == pytest.approx(weighted, rel=1e-4)
    assert metrics["td_loss"].item() == metrics["loss"].item() == loss.item()
    assert metrics["q_values"].item() == pytest.approx(np.mean(values), abs=1e-4)


def test_td_loss_of_terminal_transitions_ignores_the_next_state(script):
    """With discount 0 the target is the reward alone: half-way between two atoms, and beyond the last."""
    q_network, args = network(script, noisy=False, num_atoms=4)  # atoms -1, 0, 1, 2
    batch = make_batch(script, random_obs(2), random_obs(2), importance_weights=1.0)
    batch = batch._replace(reward=torch.tensor([0.5, 7.0]), discount=torch.zeros(2))
    log_probs = q_network(batch.obs)[0][torch.arange(2), batch.action].log_softmax(dim=1)
    expected = -torch.stack([(log_probs[0, 1] + log_probs[0, 2]) / 2, log_probs[1, 3]])
    _, metrics = script.td_loss(q_network, network(script, noisy=False, num_atoms=4)[0], batch, args)
    torch.testing.assert_close(metrics["losses"], expected)


def test_double_selection_takes_the_online_network_s_action_and_the_target_s_distribution(script):
    """Online prefers action 1, target action 0; the target's distributions are single atoms."""
    support = torch.tensor([0.0, 1.0, 2.0])
    peaked = 50 * F.one_hot(torch.tensor([[1, 1], [2, 0]]), 3).float()  # [pixel, action]: the atom
    target, online = Table(peaked, support), Table(peaked.flip(1), support)
    with torch.no_grad():
        online.logits[0] = torch.randn(2, 3)
    batch = make_batch(script, pixels([0]), pixels([1]), action=torch.tensor([1]), importance_weights=1.0)
    batch = batch._replace(reward=torch.tensor([0.0]), discount=torch.tensor([1.0]))
    log_probs = online.logits[0, 1].log_softmax(dim=0)
    args = script.Args(layer="dense", num_atoms=3, v_min=0.0, v_max=2.0)
    for double, atom in ((True, 0), (False, 2)):
        args.double = double
        loss, _ = script.td_loss(online, target, batch, args)
        torch.testing.assert_close(loss, -log_probs[atom])


@pytest.mark.parametrize("double", [True, False])
def test_no_gradient_reaches_the_target(script, double):
    """None in the target network, none at the next states, even where both networks are one."""
    args = script.Args(**SMALL | {"layer": "dense", "double": double})
    support = torch.linspace(args.v_min, args.v_max, args.num_atoms)
    for shared in (False, True):
        online = Table(torch.randn(16, A, args.num_atoms), support)
        target = online if shared else Table(torch.randn(16, A, args.num_atoms), support)
        batch = make_batch(script, pixels(range(8)), pixels(range(8, 16)))
        loss, metrics = script.td_loss(online, target, batch, args)
        loss.backward()
        assert (online.logits.grad[8:] == 0).all()
        taken = online.logits.grad[torch.arange(8), batch.action]
        assert (taken.abs().sum(dim=1) > 0).all()
        assert online.logits.grad.abs().sum().item() == pytest.approx(taken.abs().sum().item())
        assert shared or target.logits.grad is None
        assert not any(value.requires_grad for value in metrics.values())


def test_gradients_are_those_of_a_cross_entropy_times_its_weight(script):
    """softmax - target, for every transition times its importance weight over the batch size."""
    args = script.Args(**SMALL | {"layer": "dense"})
    support = torch.linspace(args.v_min, args.v_max, args.num_atoms)
    online = Table(torch.randn(16, A, args.num_atoms), support)
    batch = make_batch(script, pixels(range(8)), pixels(range(8, 16)), discount=torch.zeros(8))
    script.td_loss(online, online, batch, args)[0].backward()
    for i, action in enumerate(batch.action.tolist()):
        atoms = [batch.reward[i].item()] * args.num_atoms
        target = project(atoms, [1 / args.num_atoms] * args.num_atoms, args.v_min, args.v_max, args.num_atoms)
        gradient = online.logits[i, action].softmax(dim=0) - torch.tensor(target)
        expected = gradient * batch.importance_weights[i] / 8
        torch.testing.assert_close(online.logits.grad[i, action], expected, rtol=1e-4, atol=1e-6)


def test_batches_without_importance_weights_are_weighted_alike(script):
    """The default weight 1.0 gives the plain mean, as a column of ones does."""
    q_network, args = network(script, noisy=False)
    batch = make_batch(script, random_obs(6), random_obs(6))
    assert script.Batch(*batch[:6]).importance_weights == 1.0
    plain, metrics = script.td_loss(q_network, q_network, script.Batch(*batch[:6]), args)
    ones, _ = script.td_loss(q_network, q_network, batch._replace(importance_weights=torch.ones(6)), args)
    assert plain.item() == ones.item() == pytest.approx(metrics["losses"].mean().item())
    assert plain.shape == ()


def test_losses_are_per_transition_and_metrics_are_scalars(script):
    q_network, args = network(script, layer="top1moe", load_balancing="importance", noisy=False)
    loss, metrics = script.td_loss(q_network, q_network, make_batch(script, random_obs(6), random_obs(6)), args)
    assert loss.shape == () and loss.requires_grad
    assert metrics.pop("losses").shape == (6,)
    assert set(metrics) == {"loss", "td_loss", "q_values", "load_balancing_loss"}
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("balancing", ["importance", "load", "importance+load"])
def test_load_balancing_is_added_to_the_loss_and_not_to_the_losses(script, balancing):
    """The auxiliary losses are unweighted, part of the loss and its gradient, and no part of a priority."""
    q_network, args = network(script, layer="top1moe", noisy=False)
    batch = make_batch(script, random_obs(6), random_obs(6))
    plain, without = script.td_loss(q_network, q_network, batch, args)
    assert "load_balancing_loss" not in without
    args.load_balancing, args.importance_weight, args.load_weight = balancing, 20.0, 30.0
    torch.manual_seed(5)
    loss, metrics = script.td_loss(q_network, q_network, batch, args)
    torch.manual_seed(5)
    added = script.load_balancing_loss(q_network(batch.obs)[1], args)
    assert added > 1e-4
    torch.testing.assert_close(loss, plain + added)
    torch.testing.assert_close(metrics["losses"], without["losses"])
    torch.testing.assert_close(metrics["td_loss"], plain)
    torch.testing.assert_close(metrics["load_balancing_loss"], added)
    assert metrics["loss"].item() == loss.item()
    router = q_network.moe.router.weight
    plain_gradient, gradient = (torch.autograd.grad(x, router)[0] for x in (plain, loss))
    assert (gradient - plain_gradient).abs().sum() > 1e-4


# ---------------------------------------------------------------------------------------------------------- noise

LAYERS = ["softmoe", "top1moe", "dense"]
SOURCES = {"advantage": LAYERS, "value": LAYERS, "moe.experts": LAYERS[:2], "moe.linear": LAYERS[2:]}


@pytest.mark.parametrize("source, layer", [(source, layer) for source in SOURCES for layer in SOURCES[source]])
def test_every_noisy_layer_draws_for_every_sample_and_every_forward(script, source, layer):
    """With the other sigmas 0: equal samples of one batch differ, two forwards differ; nothing else is random."""
    q_network, _ = network(script, layer=layer)
    obs = random_obs(1).expand(4, -1, -1, -1)
    fill_sigmas(q_network, 0.5, only=source)
    with torch.no_grad():
        first, second = q_network(obs)[0], q_network(obs)[0]
        for i in range(4):
            assert all((first[i] - first[j]).abs().max() > 1e-4 for j in range(i))
            assert (first[i] - second[i]).abs().max() > 1e-4
        fill_sigmas(q_network, 0.0)
        first, second = q_network(obs)[0], q_network(obs)[0]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, first[:1].expand_as(first), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "layer, x",
    [
        (NoisyLinear(100, 80), torch.randn(9, 100)),
        (SoftMoE(6, 40, 2, 50, noisy=True), torch.randn(9, 6, 40)),
        (Top1MoE(6, 40, 2, 50, noisy=True), torch.randn(9, 6, 40)),
    ],
)
def test_no_weights_are_made_per_sample(layer, x):
    weights = max(parameter.numel() for parameter in layer.parameters())
    with Operations() as operations, torch.no_grad():
        layer(x)
    assert operations.largest < 9 * weights


@pytest.mark.parametrize("layer", LAYERS)
def test_evaluation_mode_is_silent_and_equals_the_means(script, layer):
    """Equal to a network without noisy layers that has the means as weights; no random number is drawn."""
    noisy, _ = network(script, layer=layer)
    plain, _ = network(script, layer=layer, noisy=False)
    plain.load_state_dict(means(noisy))
    fill_sigmas(noisy, 3.0)
    obs = random_obs(5)
    with torch.no_grad():
        assert (noisy(obs)[0] - plain(obs)[0]).abs().max() > 1e-2
        noisy.eval()
        state = torch.get_rng_state()
        torch.testing.assert_close(noisy(obs)[0], plain(obs)[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(noisy.q_values(obs), plain.q_values(obs), rtol=0, atol=1e-6)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dueling", [True, False])
def test_logits_of_a_noisy_network_have_the_predicted_mean_and_variance(dueling):
    """Heads only: outputs of a noisy layer are uncorrelated, so variances add up through the dueling sum."""
    q_network, _ = network(rainbow_softmoe, dueling=dueling)
    fill_sigmas(q_network, 0.0)
    for name, parameter in sigmas(q_network).items():
        if not name.startswith("moe"):
            nn.init.uniform_(parameter, 0, 2.0 if "bias" in name else 0.2)
    obs, count = random_obs(1), 10_000
    with torch.no_grad():
        features = q_network.features(obs)[0][0]
        logits = torch.cat([q_network(obs.expand(count // 4, -1, -1, -1))[0] for _ in range(4)])

        def variance(head):
            weight = head.weight_sigma.square() @ features.square() * MEAN_ABS_NORMAL
            return (weight + head.bias_sigma.square()) * MEAN_ABS_NORMAL

        expected = variance(q_network.advantage).view(A, -1)
        if dueling:
            centred = (1 - 2 / A) * expected + expected.sum(dim=0) / A**2
            expected = centred + variance(q_network.value)
        silent = q_network.eval()(obs)[0][0]
    standard_error = (expected / count).sqrt()
    assert ((logits.mean(dim=0) - silent).abs() < 5 * standard_error).all()
    torch.testing.assert_close(logits.var(dim=0), expected, rtol=0.08, atol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_the_loss_reach_every_sigma_and_every_mean(script, layer):
    q_network, args = network(script, layer=layer)
    target, _ = network(script, layer=layer)
    script.td_loss(q_network, target, make_batch(script, random_obs(8), random_obs(8)), args)[0].backward()
    first = "moe.linear.weight" if layer == "dense" else "moe.experts.w1"
    expected = {f"{head}.{part}_sigma" for head in ("advantage", "value") for part in ("weight", "bias")}
    expected |= {f"{first}_sigma", f"{first.replace('weight', 'bias').replace('w1', 'b1')}_sigma"}
    assert set(sigmas(q_network)) == expected
    for name, parameter in q_network.named_parameters():
        if name != "moe.scale":  # of the normalised router
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in target.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_without_noise_there_are_no_sigmas_and_nothing_is_random(script, layer):
    q_network, _ = network(script, layer=layer, noisy=False)
    assert not sigmas(q_network) and not any(isinstance(module, NoisyLinear) for module in q_network.modules())
    obs = random_obs(3)
    assert q_network.training and torch.equal(q_network(obs)[0], q_network(obs)[0])


def test_heads_start_as_the_authors_do(script):
    """Noisy: U(-1/sqrt(in), 1/sqrt(in)) for weights and biases, sigmas 0.1/sqrt(in). Else Xavier-uniform, biases 0."""
    noisy, _ = network(script, num_atoms=51)
    plain, _ = network(script, num_atoms=51, noisy=False)
    features = 4 * 64  # tokens of the 2x2 feature map
    for name, outputs in (("advantage", A * 51), ("value", 51)):
        head, bound = getattr(noisy, name), features**-0.5
        assert head.weight.shape == head.weight_sigma.shape == (outputs, features)
        assert head.bias.shape == head.bias_sigma.shape == (outputs,)
        for mean in (head.weight, head.bias):
            assert 0.9 * bound < mean.abs().max() <= bound
        for sigma in (head.weight_sigma, head.bias_sigma):
            torch.testing.assert_close(sigma.detach(), torch.full_like(sigma, 0.1 * bound))
        head, bound = getattr(plain, name), (6 / (features + outputs)) ** 0.5
        assert type(head) is nn.Linear and (head.bias == 0).all()
        assert 0.98 * bound < head.weight.abs().max() <= bound


# -------------------------------------------------------------------------------------------------------- dueling


class Constant(nn.Module):
    """Gives a fixed row for every sample."""

    def __init__(self, row):
        super().__init__()
        self.row = row

    def forward(self, x):
        return self.row.expand(len(x), -1)


def test_dueling_logits_are_value_plus_advantage_minus_its_mean_over_actions(script):
    """By loops; the advantage head's outputs are action-major: action 0's atoms come first."""
    q_network, args = network(script)
    N = args.num_atoms
    q_network.advantage, q_network.value = Constant(torch.randn(A * N)), Constant(torch.randn(N))
    logits = q_network(random_obs(2))[0]
    assert logits.shape == (2, A, N)
    advantage, value = q_network.advantage.row.tolist(), q_network.value.row.tolist()
    for a in range(A):
        for n in range(N):
            mean = sum(advantage[b * N + n] for b in range(A)) / A
            expected = value[n] + advantage[a * N + n] - mean
            assert logits[:, a, n].tolist() == pytest.approx([expected] * 2, abs=1e-5)


@pytest.mark.parametrize("dueling", [True, False])
def test_shifting_one_atom_s_advantages_alike_changes_nothing(script, dueling):
    """In a dueling network: the mean over actions takes it away. Without dueling it shifts that atom's logits."""
    q_network, args = network(script, dueling=dueling, noisy=False)
    obs, N, atom = random_obs(3), args.num_atoms, 2
    with torch.no_grad():
        before = q_network(obs)[0]
        q_network.advantage.bias[atom::N] += 7.0
        after = q_network(obs)[0]
    expected = before.clone()
    if not dueling:
        expected[:, :, atom] += 7.0
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("noisy", [True, False])
def test_without_dueling_there_is_no_value_head_and_advantages_are_the_logits(script, noisy):
    q_network, args = network(script, dueling=False, noisy=noisy)
    assert not any("value" in name for name in q_network.state_dict())
    assert getattr(q_network, "value", None) is None
    row = torch.randn(A * args.num_atoms)
    q_network.advantage = Constant(row)
    expected = row.view(A, args.num_atoms).expand(2, -1, -1)
    torch.testing.assert_close(q_network(random_obs(2))[0], expected, rtol=0, atol=0)


def test_q_values_are_the_means_of_the_distributions(script):
    q_network, args = network(script, noisy=False)
    nn.init.normal_(q_network.advantage.weight, std=10.0)
    obs = random_obs(3)
    with torch.no_grad():
        logits, q_values = q_network(obs)[0].tolist(), q_network.q_values(obs)
    support = [args.v_min + i * (args.v_max - args.v_min) / (args.num_atoms - 1) for i in range(args.num_atoms)]
    expected = [[mean_of(softmax(row), support) for row in sample] for sample in logits]
    torch.testing.assert_close(q_values, torch.tensor(expected), rtol=0, atol=1e-5)
    assert q_network.support.tolist() == pytest.approx(support, abs=1e-6)


# ------------------------------------------------------------------------------------ priorities, lives, exploration


def tiny(script, tmp_path, **overrides):
    """Arguments of a run of less than a second: updates from step 40."""
    settings = {"total_timesteps": 120, "learning_starts": 40, "buffer_size": 400, "batch_size": 8, "num_envs": 2}
    settings |= {"log_every": 20, "iteration_steps": 60, "checkpoint_every": 0, "replay_ratio": 0.5}
    settings |= {"eval_episodes": 2, "runs_dir": str(tmp_path / "runs")}
    return script.Args(**quick(**settings | overrides))


def spy(monkeypatch, owner, name):
    """Arguments and result of every later call of `owner.name`."""
    calls, original = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        clones = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        calls.append((clones, result))
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_every_update_gives_its_batch_new_priorities(script, tmp_path, monkeypatch):
    args = tiny(script, tmp_path, layer="dense", eval_episodes=0)
    draws, learned = spy(monkeypatch, script.PrioritizedReplayBuffer, "sample"), spy(monkeypatch, script, "td_loss")
    updates = spy(monkeypatch, script.PrioritizedReplayBuffer, "update_priorities")
    script.main(args)
    assert len(draws) == len(learned) == len(updates) == 40
    for (_, batch), (_, (loss, _)), ((_, index, losses), _) in zip(draws, learned, updates, strict=True):
        assert torch.equal(batch.index, index)
        torch.testing.assert_close((losses * batch.importance_weights).mean(), loss.detach())
    assert len(updates[0][0][0].priorities.unique()) > 40


def stacks_seen(monkeypatch, script, play):
    """Run `play` with random values; what each call of `q_values` got, and what it should have got."""
    seen, steps = [], []
    reset, recv = script.Environments.reset, script.Environments.recv

    def watched_reset(self, seed):
        steps.append(reset(self, seed).copy())
        return steps[0]

    def watched_recv(self):
        steps.append(recv(self))
        return steps[-1]

    def q_values(self, obs):
        seen.append(obs.clone())
        return torch.rand(len(obs), 4)

    monkeypatch.setattr(script.Environments, "reset", watched_reset)
    monkeypatch.setattr(script.Environments, "recv", watched_recv)
    monkeypatch.setattr(script.QNetwork, "q_values", q_values)
    play()
    frames, steps = [steps[0], *(step.frame for step in steps[1:])], steps[1:]
    expected = [np.zeros_like(obs) for obs in seen]
    for lane in range(len(frames[0])):
        stack, valid = [], True
        for t, step in enumerate(steps):
            stack = [*stack, frames[t][lane]][-4:]
            expected[t][lane, 4 - len(stack) :] = stack
            if step.terminated[lane] or not valid:
                stack = []
            valid = not step.game_over[lane]
    return torch.stack(seen), torch.from_numpy(np.stack(expected)), steps


def test_lost_lives_end_stacks_and_episodes_while_the_game_goes_on(tmp_path, monkeypatch):
    """A run on Breakout that only acts: the network sees what the replay rebuilds, a lost life is terminal in it."""
    breakout = {"env_id": "BreakoutNoFrameskip-v4", "num_envs": 1, "layer": "dense", "eval_episodes": 0}
    args = tiny(der_softmoe, tmp_path, **breakout, replay_ratio=1.0, total_timesteps=900, learning_starts=900)
    args = replace(args, buffer_size=1000)
    added = spy(monkeypatch, der_softmoe.PrioritizedReplayBuffer, "add")
    seen, expected, steps = stacks_seen(monkeypatch, der_softmoe, lambda: der_softmoe.main(args))
    assert torch.equal(seen, expected)
    replay, rows, lane = added[0][0][0], torch.arange(900), torch.zeros(900, dtype=torch.long)
    assert torch.equal(replay._stack(rows, lane), seen[:, 0])
    over, terminated = (np.array([getattr(step, name)[0] for step in steps]) for name in ("game_over", "terminated"))
    assert terminated.sum() > 2 * over.sum() >= 4
    np.testing.assert_array_equal(replay.terminated[:900, 0], terminated)
    np.testing.assert_array_equal(replay.valid[:900, 0], [True, *~over[:-1]])


def test_lost_lives_end_stacks_in_evaluation(tmp_path, monkeypatch):
    args = tiny(der_softmoe, tmp_path, env_id="BreakoutNoFrameskip-v4", layer="dense")
    q_network = der_softmoe.QNetwork(args, (4, 84, 84), 4)
    returns = []
    seen, expected, steps = stacks_seen(
        monkeypatch,
        der_softmoe,
        lambda: returns.extend(der_softmoe.evaluate(q_network, args, 3, 1, SimpleNamespace(received=False))),
    )
    assert torch.equal(seen, expected) and len(returns) == 3
    assert sum(step.terminated.sum() for step in steps) > 2 * sum(step.game_over.sum() for step in steps) > 0


def test_evaluation_is_silent_deterministic_and_leaves_the_random_state_alone(script, tmp_path, monkeypatch):
    """Every value that acted is the silent network's; the same seed plays the same games, whatever came before."""
    args = tiny(script, tmp_path, eval_epsilon=0.3)
    q_network = script.QNetwork(args, (4, 12, 12), A)
    fill_sigmas(q_network, 2.0)
    plain = script.QNetwork(script.Args(**vars(args) | {"noisy": False}), (4, 12, 12), A)
    plain.load_state_dict(means(q_network))
    acted, chosen = spy(monkeypatch, q_network, "q_values"), spy(monkeypatch, script, "select_actions")

    def play(seed):
        acted.clear(), chosen.clear()
        state = torch.get_rng_state()
        returns = script.evaluate(q_network, args, 3, seed, SimpleNamespace(received=False))
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


def test_acting_is_noisy_in_training_and_silent_in_evaluation(script, tmp_path, monkeypatch):
    """Values are asked for twice wherever a run acts: they differ in training, and agree in evaluation."""
    args = tiny(script, tmp_path)
    original, where, noisy = script.QNetwork.q_values, ["training"], {"training": [], "evaluation": []}
    evaluate = script.evaluate

    def q_values(self, obs):
        first = original(self, obs)
        if len(obs) == args.num_envs:  # acting, not learning
            noisy[where[0]].append(not torch.equal(first, original(self, obs)))
        return first

    def spied_evaluate(*arguments):
        where[0] = "evaluation"
        return evaluate(*arguments)

    monkeypatch.setattr(script.QNetwork, "q_values", q_values)
    monkeypatch.setattr(script, "evaluate", spied_evaluate)
    script.main(args)
    assert noisy["training"] == [True] * 60
    assert len(noisy["evaluation"]) >= 20 and not any(noisy["evaluation"])


@pytest.mark.parametrize("noisy", [True, False])
def test_epsilon_is_zero_with_noise_and_decays_without(script, tmp_path, monkeypatch, noisy):
    """What acts in a run is what the log says; without noise 1 until learning starts, then linear to the end value."""
    decay = {} if noisy else {"end_epsilon": 0.2, "epsilon_decay_steps": 50}
    args = tiny(script, tmp_path, noisy=noisy, eval_episodes=0, **decay)
    acted = spy(monkeypatch, script, "select_actions")
    logged = spy(monkeypatch, script.RunLog, "scalars")
    script.main(args)
    epsilons = [inputs[1] for inputs, _ in acted]
    shown = [inputs[2]["epsilon"] for inputs, _ in logged if "epsilon" in inputs[2]]
    steps = range(0, 120, 2)
    expected = [0.0 if noisy else 1 - 0.8 * min(max((step - 40) / 50, 0), 1) for step in steps]
    assert epsilons == pytest.approx(expected)
    assert shown == pytest.approx([expected[steps.index(step - 2)] for step in (20, 40, 60, 80, 100, 120)])


# --------------------------------------------------------------------------------------------------- augmentation


def crops(obs, padding=4):
    """All (2 * padding + 1)^2 crops of the frames with repeated edges, in float: {(row, column): (B, 4, H, W)}."""
    H, W = obs.shape[2:]
    padded = F.pad(obs.float(), (padding,) * 4, mode="replicate")
    offsets = range(2 * padding + 1)
    return {(y - padding, x - padding): padded[:, :, y : y + H, x : x + W] for y in offsets for x in offsets}


def explain(obs, augmented):
    """(B, places) bool and (B, places): which crops, times one number per sample, give the sample; those numbers."""
    matches, factors = [], []
    for crop in crops(obs).values():
        ratio = (augmented / crop).flatten(1)
        factors.append(ratio.mean(dim=1))
        matches.append((ratio - ratio[:, :1]).abs().amax(dim=1) < 1e-5)
    return torch.stack(matches, dim=1), torch.stack(factors, dim=1)


@pytest.fixture(scope="module")
def augmentation():
    """3000 random stacks of small oblong frames, augmented; the crops that explain them; their factors."""
    torch.manual_seed(1)
    obs = torch.randint(1, 256, (3000, 4, 5, 7), dtype=torch.uint8)
    augmented = der_softmoe.augment(obs)
    return obs, augmented, *explain(obs, augmented)


def test_augmented_frames_are_float_and_keep_their_shape(augmentation):
    obs, augmented, _, _ = augmentation
    assert augmented.shape == obs.shape and augmented.dtype == torch.float32


def test_augmentation_is_one_crop_of_the_repeated_edges_and_one_intensity_per_sample(augmentation):
    """All four frames of a stack alike; of the 81 crops exactly one explains a sample of random pixels."""
    _, _, matches, _ = augmentation
    assert (matches.sum(dim=1) == 1).all()


def test_augmentation_shifts_by_all_of_minus_4_to_4_in_both_axes_alike(augmentation):
    """Uniform over the 81 places."""
    _, _, matches, _ = augmentation
    counts = matches.sum(dim=0).double()
    assert counts.min() > 0
    expected = 3000 / 81
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert abs(chi_square - 80) < 5 * (2 * 80) ** 0.5
    assert counts.view(9, 9).sum(dim=1).min() > 240 and counts.view(9, 9).sum(dim=0).min() > 240  # of 333


def test_augmentation_scales_intensities_by_a_clipped_normal(augmentation):
    """1 + 0.05 N(0, 1), clipped at two sigma: 2.28% at either end."""
    _, _, matches, factors = augmentation
    factors = factors[matches]
    assert factors.min() > 0.9 - 1e-5 and factors.max() < 1.1 + 1e-5
    for at_end in (factors < 0.9 + 1e-5, factors > 1.1 - 1e-5):
        assert at_end.float().mean().item() == pytest.approx(0.0228, abs=0.012)
    inside = (factors - 1).abs() < 0.05
    assert inside.float().mean().item() == pytest.approx(0.683, abs=0.04)
    assert factors.mean().item() == pytest.approx(1, abs=0.004)


@pytest.mark.parametrize("size", [(3, 2), (1, 9), (84, 84)])
def test_augmentation_of_frames_of_other_sizes(size):
    """Also of frames smaller than the shift, where several places look alike."""
    obs = random_obs(8, size).clamp_min(1)
    assert explain(obs, der_softmoe.augment(obs))[0].any(dim=1).all()


def test_augmentation_draws_afresh_and_leaves_its_input_alone():
    obs = random_obs(4)
    before = obs.clone()
    assert not torch.equal(der_softmoe.augment(obs), der_softmoe.augment(obs))
    assert torch.equal(obs, before)


class Recorder(Table):
    """A table of logits that remembers what it saw."""

    def __init__(self):
        super().__init__(torch.zeros(256, A, 5), torch.linspace(-1, 2, 5))
        self.seen = []

    def forward(self, obs):
        self.seen.append(obs)
        return self.logits[torch.zeros(len(obs), dtype=torch.long)], None


def test_updates_see_augmented_frames_with_draws_of_their_own_for_obs_and_next_obs():
    """Online network: obs, then next_obs for double selection; the target sees the same next_obs."""
    online, target = Recorder(), Recorder()
    obs = random_obs(16).clamp_min(1)
    batch = make_batch(der_softmoe, obs, obs.clone())
    der_softmoe.td_loss(online, target, batch, der_softmoe.Args(**SMALL | {"augment": True, "layer": "dense"}))
    (first, second), (third,) = online.seen, target.seen
    assert torch.equal(second, third)
    places = []
    for seen in (first, second):
        matches, factors = explain(obs, seen)
        assert (matches.sum(dim=1) == 1).all() and seen.dtype == torch.float32
        assert ((factors[matches] - 1).abs() > 1e-6).sum() >= 12
        places.append((matches.long().argmax(dim=1), factors[matches]))
    assert (places[0][0] != places[1][0]).sum() >= 12  # of 16, where one in 81 is the same by chance
    assert ((places[0][1] - places[1][1]).abs() > 1e-6).sum() >= 12


def test_updates_see_the_raw_frames_by_default(script):
    online, target = Recorder(), Recorder()
    batch = make_batch(script, random_obs(4), random_obs(4))
    state = torch.get_rng_state()
    script.td_loss(online, target, batch, script.Args(**SMALL | {"layer": "dense"}))
    assert [seen is batch.next_obs for seen in online.seen + target.seen] == [False, True, True]
    assert online.seen[0] is batch.obs and batch.obs.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_augments_its_updates_and_nothing_else(tmp_path, monkeypatch):
    """Two calls per update, for obs and next_obs of a batch; none by default; acting sees the raw frames."""
    calls = spy(monkeypatch, der_softmoe, "augment")
    settings = {"total_timesteps": 60, "eval_episodes": 0}
    der_softmoe.main(tiny(der_softmoe, tmp_path, **settings))
    assert not calls
    der_softmoe.main(tiny(der_softmoe, tmp_path, augment=True, **settings))
    assert [len(inputs[0]) for inputs, _ in calls] == [8] * 2 * 10


# ------------------------------------------------------------------------------------------------------ arguments


def refused(script, capsys, **overrides):
    """The one line on stderr of arguments that must be refused."""
    with pytest.raises(SystemExit) as stop:
        script.check_args(script.Args(**overrides))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


BAD_SUPPORTS = [{"v_min": 10.0}, {"v_min": 11.0}, {"v_max": -10.0}, {"v_min": 3.0, "v_max": 2.0}]
BAD_SUPPORTS += [{name: value} for name in ("v_min", "v_max") for value in (math.inf, -math.inf, math.nan)]
BAD_SUPPORTS += [{"v_min": -math.inf, "v_max": math.inf}, {"v_min": math.nan, "v_max": math.nan}]
BAD_SUPPORTS += [{"num_atoms": n} for n in (1, 0, -51, 1001, 10**20)]
BAD_SUPPORTS += [{"v_min": 0.0, "v_max": 1e-46}, {"v_min": 1e8, "v_max": 1e8 + 1}, {"v_max": 1e39}]  # not in float32


@pytest.mark.parametrize("overrides", BAD_SUPPORTS, ids=str)
def test_supports_that_are_none_are_refused(script, capsys, overrides):
    line = refused(script, capsys, **overrides)
    assert all(f"--{name.replace('_', '-')}" in line for name in overrides)


@pytest.mark.parametrize("name, value", [("end_epsilon", 0.05), ("epsilon_decay_steps", 1000)])
def test_epsilon_s_arguments_are_refused_where_noise_explores(script, capsys, name, value):
    line = refused(script, capsys, **{name: value})
    assert f"--{name.replace('_', '-')}" in line and "--no-noisy" in line
    script.check_args(script.Args(**{name: value, "noisy": False}))


def test_defaults_and_other_supports_are_accepted(script):
    for overrides in ({}, {"num_atoms": 2, "v_min": 0.0, "v_max": 1.0}, {"noisy": False}, {"v_min": -1}):
        script.check_args(script.Args(**overrides))


SHARED_DEFAULTS = {
    "layer": "softmoe",
    "num_experts": 4,
    "expert_hidden_dim": 512,
    "tokenization": "PerConv",
    "capacity_factor": 1.0,
    "normalize_router": False,
    "learned_phi": True,
    "load_balancing": "none",
    "importance_weight": 1.0,
    "load_weight": 1.0,
    "encoder_width": 1,
    "buffer_size": 1_000_000,
    "batch_size": 32,
    "gamma": 0.99,
    "adam_eps": 1.5e-4,
    "num_atoms": 51,
    "v_min": -10.0,
    "v_max": 10.0,
    "double": True,
    "dueling": True,
    "noisy": True,
    "prioritized": True,
    "end_epsilon": 0.01,
    "eval_epsilon": 0.001,
}
RAINBOW_DEFAULTS = SHARED_DEFAULTS | {
    "num_envs": 4,
    "total_timesteps": 50_000_000,
    "iteration_steps": 250_000,
    "sticky_actions": 0.25,
    "noop_max": 0,
    "terminal_on_life_loss": False,
    "encoder": "impala",
    "n_step": 3,
    "replay_ratio": 0.25,  # an update per 4 agent steps
    "epsilon_decay_steps": 250_000,
    "learning_rate": 6.25e-5,
    "learning_starts": 20_000,
    "target_network_frequency": 8_000,
}
DER_DEFAULTS = SHARED_DEFAULTS | {
    "total_timesteps": 100_000,
    "iteration_steps": 10_000,
    "num_envs": 1,
    "eval_episodes": 100,
    "sticky_actions": 0.0,
    "noop_max": 30,
    "terminal_on_life_loss": True,
    "encoder": "nature",
    "n_step": 10,
    "replay_ratio": 1.0,
    "epsilon_decay_steps": 2_000,  # Dopamine's DER
    "learning_rate": 1e-4,
    "learning_starts": 1_600,
    "target_network_frequency": 2_000,
    "augment": False,
}


@pytest.mark.parametrize(
    "script, expected", [(rainbow_softmoe, RAINBOW_DEFAULTS), (der_softmoe, DER_DEFAULTS)], ids=["rainbow", "der"]
)
def test_defaults_are_the_paper_s(script, expected):
    args = vars(script.Args())
    assert {name: args[name] for name in expected} == expected
