"""Tests of DQN's networks and loss against the authors' numbers, Flax's padding and initialisers, and loops."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import GOLDEN
from torch import nn

from dqn_softmoe import Args, Batch, QNetwork, impala_cnn, nature_cnn, select_actions, td_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_obs(n, size=84):
    return torch.randint(0, 256, (n, 4, size, size), dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------ the authors' numbers


def authors_names(q_network):
    """Map our parameter names to the authors'. The encoder's convolutions are matched in forward order."""
    ours = [f"encoder.{name}" for name, layer in q_network.encoder.named_modules() if isinstance(layer, nn.Conv2d)]
    impala = [f"encoder.stack{i}.conv{j}" for i in range(3) for j in range(5)]
    nature = [f"encoder.conv{i}" for i in range(3)]
    theirs = dict(zip(ours, impala if len(ours) == 15 else nature, strict=True))
    split = {name: name.rsplit(".", 1) for name, _ in q_network.named_parameters()}
    return {name: f"{theirs.get(module, module)}.{leaf}" for name, (module, leaf) in split.items()}


def load_golden(q_network, name):
    """Load the authors' weights. Returns the arrays of the file and the names of our parameters that it lacks."""
    if not GOLDEN.is_dir():
        pytest.skip("the authors' whole-network numbers are not beside this checkout")
    with np.load(GOLDEN / f"{name}.npz") as file:
        data = {key: torch.from_numpy(file[key]) for key in file.files}
    names = authors_names(q_network)
    weights = {ours: data[f"param/{theirs}"] for ours, theirs in names.items() if f"param/{theirs}" in data}
    assert len(weights) == sum(key.startswith("param/") for key in data)
    return data, q_network.load_state_dict(weights, strict=False).missing_keys


@pytest.mark.parametrize(
    "name, encoder, layer",
    [("dqn_impala_softmoe_perconv_n4", "impala", "softmoe"), ("dqn_nature_top1_perconv_n4", "nature", "top1moe")],
)
def test_q_values_loss_and_gradients_match_the_authors(name, encoder, layer):
    args = Args(encoder=encoder, layer=layer, num_experts=4, expert_hidden_dim=64)
    q_network = QNetwork(args, (4, 84, 84), num_actions=4)
    data, missing = load_golden(q_network, name)
    assert not missing
    torch.testing.assert_close(q_network(data["obs"])[0], data["q_values"], rtol=0, atol=1e-5)
    torch.testing.assert_close(q_network.q_values(data["obs"]), data["q_values"], rtol=0, atol=1e-5)
    zeros, obs = torch.zeros(3), data["obs"]  # a discount of 0 makes the reward the target
    batch = Batch(obs, data["actions"].long(), data["target"], zeros, obs, zeros)
    loss, metrics, _ = td_loss(q_network, q_network, batch, args)
    loss.backward()
    assert loss.item() == metrics["td_loss"].item() == pytest.approx(data["loss"].item(), abs=1e-5)
    for ours, theirs in authors_names(q_network).items():
        parameter, expected = q_network.get_parameter(ours), data[f"grad/{theirs}"]
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), ours


# ----------------------------------------------------------------------------------------------------------- encoders


def same_padding(x, kernel, stride):
    """Return Flax's SAME padding for F.pad: ceil(size / stride) outputs, with the odd pixel at the end."""
    totals = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
    return [pad for total in totals for pad in (total // 2, total - total // 2)]


def conv_same(x, layer):
    kernel, stride = layer.kernel_size[0], layer.stride[0]
    return F.conv2d(F.pad(x, same_padding(x, kernel, stride)), layer.weight, layer.bias, stride)


def max_pool_same(x):
    return F.max_pool2d(F.pad(x, same_padding(x, 3, 2), value=-np.inf), 3, 2)


def convolutions(encoder):
    return [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize("size", [(84, 84), (64, 64), (21, 30), (12, 12), (7, 5), (2, 3), (1, 1)])
def test_encoders_pad_as_flax_does(size):
    x = torch.randn(2, 4, *size)
    nature, expected = nature_cnn(4, 1), x
    for layer in convolutions(nature):
        expected = conv_same(expected, layer).relu()
    torch.testing.assert_close(nature(x), expected)
    for kernel in (3, 4, 6):
        impala, expected = impala_cnn(4, 1, kernel), x
        for i in (0, 5, 10):
            first, *residual = convolutions(impala)[i : i + 5]
            assert first.kernel_size == residual[0].kernel_size == (kernel, kernel)
            expected = max_pool_same(conv_same(expected, first))
            for one, two in (residual[:2], residual[2:]):
                expected = expected + conv_same(conv_same(expected.relu(), one).relu(), two)
        torch.testing.assert_close(impala(x), expected.relu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_feature_maps_match_the_paper(width):
    obs = torch.zeros(1, 4, 84, 84)
    assert nature_cnn(4, width)(obs).shape == (1, 64 * width, 11, 11)
    assert impala_cnn(4, width)(obs).shape == (1, 32 * width, 11, 11)
    nature = [
        (layer.out_channels // width, layer.kernel_size[0], layer.stride[0])
        for layer in convolutions(nature_cnn(4, width))
    ]
    assert nature == [(32, 8, 4), (64, 4, 2), (64, 3, 1)]
    assert [layer.out_channels // width for layer in convolutions(impala_cnn(4, width))] == [16] * 5 + [32] * 10


@pytest.mark.parametrize("encoder", ["impala", "nature"])
def test_initial_weights_match_flax_s_initialisers(encoder):
    q_network = QNetwork(Args(encoder=encoder, encoder_width=4), (4, 84, 84), 18)
    for i, layer in enumerate(convolutions(q_network.encoder)):
        assert (layer.bias == 0).all()
        fan_in, fan_out = (channels * layer.kernel_size[0] ** 2 for channels in (layer.in_channels, layer.out_channels))
        largest, std = layer.weight.abs().max().item(), layer.weight.std().item()
        if encoder == "impala" and i % 5:  # residual convolutions: LeCun normal, truncated at two sigma
            cut = 2 * fan_in**-0.5 / 0.8796
            assert 0.95 * cut < largest <= cut and std == pytest.approx(fan_in**-0.5, rel=0.05)
        else:  # Xavier uniform
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.95 * bound < largest <= bound and std == pytest.approx(bound / 3**0.5, rel=0.05)
    head = q_network.head
    bound = (6 / (head.in_features + 18)) ** 0.5
    assert (head.bias == 0).all() and 0.98 * bound < head.weight.abs().max() <= bound


# ------------------------------------------------------------------------------------------- from encoder to the head


def test_head_reads_the_row_major_tokens_directly():
    q_network, obs = QNetwork(Args(num_experts=2, expert_hidden_dim=8, encoder="nature"), (4, 84, 84), 3), random_obs(2)
    features = q_network.encoder(obs.float() / 255)
    tokens = torch.stack([features[:, :, y, x] for y in range(11) for x in range(11)], dim=1)
    output = q_network.moe(tokens)
    q_values, returned = q_network(obs)
    torch.testing.assert_close(q_values, q_network.head(output.tokens.reshape(2, -1)))
    torch.testing.assert_close(returned.tokens, output.tokens)


def test_the_dense_layer_flattens_in_the_authors_order():
    q_network = QNetwork(Args(layer="dense", encoder="nature", expert_hidden_dim=8), (4, 84, 84), 3)
    obs = random_obs(2)
    flat = q_network.encoder(obs.float() / 255).permute(0, 2, 3, 1).reshape(2, -1)  # (h, w, C), as Flax
    q_values, returned = q_network(obs)
    torch.testing.assert_close(q_values, q_network.head(q_network.moe.linear(flat).relu()))
    assert returned is None


TOKENS = {"PerConv": (25, 64), "PerFeat": (64, 25), "PerSamp": (1, 1600), "PerPatch": (1, 64), "PerPatchAvg": (1, 64)}
TOKENS |= {"Shuffled": (25, 64)}
LAYERS = [(layer, t) for layer in ("softmoe", "top1moe", "expert_choice", "tokenized") for t in TOKENS]
LAYERS += [("dense", "PerConv"), ("gap", "PerConv")]


@pytest.mark.parametrize("layer, tokenization", LAYERS)
def test_every_layer_and_tokenization_gives_values_and_gradients(layer, tokenization):
    args = Args(layer=layer, tokenization=tokenization, encoder="nature", num_experts=2, expert_hidden_dim=8)
    q_network = QNetwork(args, (4, 36, 36), 5)
    q_values, output = q_network(random_obs(3, 36))
    q_values.square().sum().backward()
    assert q_values.shape == (3, 5) and (output is None or output.tokens.shape[1:] == TOKENS[tokenization])
    assert (output is None) == (layer in ("dense", "gap", "tokenized"))
    assert all(p.grad is not None for name, p in q_network.named_parameters() if name != "moe.scale")


@pytest.mark.parametrize("script, channels", [("dqn_softmoe", 32), ("rainbow_softmoe", 64), ("der_softmoe", 64)])
def test_patches_have_the_authors_channels(script, channels):
    script = importlib.import_module(script)
    for tokenization, dim in (("PerPatch", channels), ("PerPatchAvg", 32)):
        args = script.Args(tokenization=tokenization, encoder="impala", expert_hidden_dim=8)
        assert script.QNetwork(args, (4, 84, 84), 3).moe.token_dim == dim


def test_the_layer_gets_its_options():
    def layer(**options):
        return QNetwork(Args(encoder="nature", expert_hidden_dim=8, **options), (4, 84, 84), 3).moe

    soft, plain = layer(normalize_router=True, learned_phi=False, capacity_factor=0.5, num_experts=3), layer()
    assert (soft.normalize, soft.learned_phi, soft.num_slots) == (True, False, 21)
    assert (plain.normalize, plain.learned_phi, plain.num_slots, plain.num_experts) == (False, True, 16, 8)
    top1 = layer(layer="top1moe", num_experts=3, capacity_factor=0.5)
    assert (top1.num_slots, top1.router_noise_std, top1.experts.w1.shape) == (21, 0, (3, 64, 8))
    assert layer(layer="dense", num_experts=3).linear.weight.shape == (24, 11 * 11 * 64)
    assert layer(layer="gap", num_experts=3).linear.weight.shape == (24, 64)
    assert layer(layer="tokenized", num_experts=3).linear.weight.shape == (24, 64)
    assert layer(layer="expert_choice", num_experts=3, capacity_factor=0.5).num_slots == 21
    big = layer(expert_variant="big", encoder_width=2)  # 84 * 84 / 8 slots each, 29 * 29 used
    assert (big.num_slots, big.token_dim, big.experts.side) == (29**2, 4, 29)
    assert big.experts.encoders["0-weight"].shape == (8, 64, 4, 8, 8)


def test_gap_layer_reads_the_mean_of_the_feature_map():
    q_network, obs = QNetwork(Args(layer="gap", encoder="nature"), (4, 84, 84), 3), random_obs(2)
    mean = q_network.encoder(obs.float() / 255).mean(dim=(2, 3))
    torch.testing.assert_close(q_network(obs)[0], q_network.head(q_network.moe.linear(mean).relu()))


# --------------------------------------------------------------------------------------------------- loss and actions


class Table(nn.Module):
    """A network that looks its Q-values up in a table, by the first pixel of the newest frame."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)

    def q_values(self, obs):
        return self.values[obs[:, -1, 0, 0].long()]

    def forward(self, obs):
        return self.q_values(obs), None


def test_td_loss_matches_a_loop():
    online, target = Table(torch.randn(16, 3)), Table(torch.randn(16, 3))
    pixels = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(16, 4, 2, 2)
    discount = torch.rand(8) * (torch.arange(8) % 3 > 0)
    batch = Batch(pixels[:8], torch.randint(3, (8,)), torch.randn(8), discount, pixels[8:], torch.arange(8))
    loss, metrics, output = td_loss(online, target, batch, Args(layer="dense"))
    expected, mean_q = 0.0, 0.0
    for i in range(8):
        td_target = batch.reward[i].item() + discount[i].item() * max(target.values[8 + i].tolist())
        q = online.values[i, batch.action[i]].item()
        expected, mean_q = expected + (q - td_target) ** 2 / 8, mean_q + q / 8
    assert loss.item() == metrics["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert metrics["q_values"].item() == pytest.approx(mean_q, rel=1e-4)
    loss.backward()
    assert target.values.grad is None and (online.values.grad[8:] == 0).all() and output is None


def test_actions_are_epsilon_greedy():
    q_values = torch.tensor([0.0, 2.0, 1.0, -1.0]).expand(40_000, 4)
    share = torch.bincount(select_actions(q_values, 0.4), minlength=4) / 40_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.7, 0.1, 0.1]), rtol=0, atol=0.01)
    assert (select_actions(q_values, 0.0) == 1).all()
