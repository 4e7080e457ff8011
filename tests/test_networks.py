"""DQN's networks and loss: the authors' numbers, explicit padding, loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN

from dqn_softmoe import (
    Args,
    Batch,
    ImpalaEncoder,
    NatureEncoder,
    QNetwork,
    linear_schedule,
    load_balancing_loss,
    same_padding,
    select_actions,
    td_loss,
)

GOLDEN_NETWORKS = {
    "dqn_impala_softmoe_perconv_n4": ("impala", "softmoe"),
    "dqn_nature_top1_perconv_n4": ("nature", "top1moe"),
}


def golden_network(name):
    if not GOLDEN.is_dir():
        pytest.skip("the authors' whole-network numbers are not beside this checkout")
    data = np.load(GOLDEN / f"{name}.npz")
    encoder, layer = GOLDEN_NETWORKS[name]
    args = Args(encoder=encoder, layer=layer, num_experts=4, expert_hidden_dim=64)
    q_network = QNetwork(args, (4, 84, 84), num_actions=4)
    weights = {key.removeprefix("param/"): data[key] for key in data.files if key.startswith("param/")}
    q_network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return q_network, args, data


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_q_values_are_the_authors(name):
    q_network, _, data = golden_network(name)
    obs = torch.from_numpy(data["obs"])
    expected = torch.from_numpy(data["q_values"])
    torch.testing.assert_close(q_network(obs)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(q_network.q_values(obs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_loss_and_gradients_are_the_authors(name):
    q_network, args, data = golden_network(name)
    obs = torch.from_numpy(data["obs"])
    target = torch.from_numpy(data["target"])
    action = torch.from_numpy(data["actions"]).long()
    batch = Batch(obs, action, target, torch.zeros(3), obs, torch.zeros(3))  # discount 0: the target is the reward
    loss, metrics = td_loss(q_network, q_network, batch, args)
    loss.backward()
    assert loss.item() == pytest.approx(float(data["loss"]), abs=1e-5)
    assert metrics["td_loss"].item() == pytest.approx(float(data["loss"]), abs=1e-5)
    for key, parameter in q_network.named_parameters():
        expected = torch.from_numpy(data[f"grad/{key}"])
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = expected.abs().max().item()
        assert (gradient - expected).abs().max().item() <= 1e-4 * scale, key


def conv_same(x, layer):
    """A convolution with Flax's SAME padding written out: ceil(size / stride) outputs, the odd pixel after."""
    kernel, stride = layer.kernel_size[0], layer.stride[0]
    pads = []
    for size in (x.shape[3], x.shape[2]):  # F.pad wants the last axis first
        outputs = -(-size // stride)
        total = max((outputs - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), layer.weight, layer.bias, stride)


def max_pool_same(x):
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = (-(-size // 2) - 1) * 2 + 3 - size
        pads += [total // 2, total - total // 2]
    return F.max_pool2d(F.pad(x, pads, value=-np.inf), 3, 2)


SIZES = [(84, 84), (64, 64), (21, 30), (12, 12), (7, 5), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_nature_encoder_pads_as_flax_does(size):
    encoder, x = NatureEncoder(4), torch.randn(2, 4, *size)
    expected = x
    for layer in (encoder.conv0, encoder.conv1, encoder.conv2):
        expected = conv_same(expected, layer).relu()
    torch.testing.assert_close(encoder(x), expected)


@pytest.mark.parametrize("size", SIZES)
def test_impala_encoder_pads_as_flax_does(size):
    encoder, x = ImpalaEncoder(4), torch.randn(2, 4, *size)
    expected = x
    for stack in (encoder.stack0, encoder.stack1, encoder.stack2):
        expected = max_pool_same(conv_same(expected, stack.conv0))
        for first, second in ((stack.conv1, stack.conv2), (stack.conv3, stack.conv4)):
            expected = expected + conv_same(conv_same(expected.relu(), first).relu(), second)
    torch.testing.assert_close(encoder(x), expected.relu(), rtol=1e-4, atol=1e-5)


def test_the_paper_s_feature_maps_and_paddings():
    assert NatureEncoder(4)(torch.zeros(1, 4, 84, 84)).shape == (1, 64, 11, 11)
    assert ImpalaEncoder(4)(torch.zeros(1, 4, 84, 84)).shape == (1, 32, 11, 11)
    assert ImpalaEncoder(4, width=2)(torch.zeros(1, 4, 84, 84)).shape == (1, 64, 11, 11)
    assert [same_padding(84, 8, 4), same_padding(21, 4, 2), same_padding(11, 3, 1)] == [(2, 2), (1, 2), (1, 1)]


@pytest.mark.parametrize("encoder", ["impala", "nature"])
def test_encoders_start_as_flax_s_initialisers_do(encoder):
    torch.manual_seed(0)
    q_network = QNetwork(Args(encoder=encoder, encoder_width=4), (4, 84, 84), 18)
    for name, layer in q_network.encoder.named_modules():
        if not isinstance(layer, torch.nn.Conv2d):
            continue
        assert (layer.bias == 0).all()
        fan_in, fan_out = (channels * layer.kernel_size[0] ** 2 for channels in (layer.in_channels, layer.out_channels))
        weight = layer.weight.detach()
        if encoder == "impala" and not name.endswith("conv0"):  # residual convolutions: LeCun-normal, cut at 2 sigma
            assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
            assert weight.abs().max().item() <= 2 * fan_in**-0.5 / 0.8796
        else:  # Xavier-uniform
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.95 * bound < weight.abs().max().item() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (q_network.head.bias == 0).all()


def test_tokens_reach_the_head_row_major_with_nothing_between():
    q_network = QNetwork(Args(num_experts=2, expert_hidden_dim=8, encoder="nature"), (4, 84, 84), 3)
    obs = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    features = q_network.encoder(obs.float() / 255)
    tokens = torch.stack([features[:, :, y, x] for y in range(11) for x in range(11)], dim=1)
    output = q_network.moe(tokens)
    q_values, returned = q_network(obs)
    torch.testing.assert_close(q_values, q_network.head(output.tokens.reshape(2, -1)))
    torch.testing.assert_close(returned.tokens, output.tokens)


def test_the_dense_layer_flattens_in_the_authors_order():
    q_network = QNetwork(Args(layer="dense", encoder="nature", expert_hidden_dim=8), (4, 84, 84), 3)
    obs = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    features = q_network.encoder(obs.float() / 255)
    flat = features.permute(0, 2, 3, 1).reshape(2, -1)  # (h, w, C), as Flax
    q_values, returned = q_network(obs)
    torch.testing.assert_close(q_values, q_network.head(q_network.moe.linear(flat).relu()))
    assert returned is None


@pytest.mark.parametrize("layer", ["softmoe", "top1moe", "dense"])
@pytest.mark.parametrize("tokenization", ["PerConv", "PerFeat", "PerSamp", "PerPatch", "PerPatchAvg"])
def test_every_layer_and_tokenization_gives_values_and_gradients(layer, tokenization):
    if layer == "dense" and tokenization != "PerConv":
        pytest.skip("the dense layer has no tokens")
    args = Args(layer=layer, tokenization=tokenization, encoder="nature", num_experts=2, expert_hidden_dim=8)
    q_network = QNetwork(args, (4, 36, 36), 5)
    q_values = q_network.q_values(torch.randint(0, 256, (3, 4, 36, 36), dtype=torch.uint8))
    q_values.square().sum().backward()
    assert q_values.shape == (3, 5)
    assert all(p.grad is not None for name, p in q_network.named_parameters() if name != "moe.scale")


class Table(torch.nn.Module):
    """Q-values read from a table by the first pixel of the newest frame."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(values)

    def q_values(self, obs):
        return self.values[obs[:, -1, 0, 0].long()]

    def forward(self, obs):
        return self.q_values(obs), None


def random_batch(n, num_actions):
    pixels = torch.arange(2 * n, dtype=torch.uint8)[:, None, None, None].expand(2 * n, 4, 2, 2)
    action, reward = torch.randint(num_actions, (n,)), torch.randn(n)
    discount = torch.rand(n) * (torch.arange(n) % 3 > 0)
    return Batch(pixels[:n], action, reward, discount, pixels[n:], torch.arange(n))


def test_td_loss_is_the_loop_s():
    torch.manual_seed(0)
    online, target = Table(torch.randn(16, 3)), Table(torch.randn(16, 3))
    batch = random_batch(8, 3)
    loss, metrics = td_loss(online, target, batch, Args(layer="dense"))
    total, chosen = 0.0, 0.0
    for i in range(8):
        bootstrap = max(target.values[8 + i].tolist())
        goal = batch.reward[i].item() + batch.discount[i].item() * bootstrap
        q = online.values[i, batch.action[i]].item()
        total, chosen = total + (q - goal) ** 2 / 8, chosen + q / 8
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert metrics["q_values"].item() == pytest.approx(chosen, rel=1e-4)
    loss.backward()
    assert target.values.grad is None
    assert (online.values.grad[8:] == 0).all()


@pytest.mark.parametrize("balancing", ["importance", "load", "importance+load"])
def test_load_balancing_adds_the_weighted_losses(balancing):
    from moe_layers import importance_loss, load_loss

    args = Args(layer="top1moe", encoder="nature", num_experts=4, expert_hidden_dim=8, load_balancing=balancing)
    args.importance_weight, args.load_weight = 2.0, 3.0
    q_network = QNetwork(args, (4, 84, 84), 3)
    _, output = q_network(torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8))
    logits = output.routing.router_logits
    torch.manual_seed(5)
    noisy = logits + torch.randn_like(logits) / 4
    expected = 2 * importance_loss(logits.softmax(2)) * ("importance" in balancing)
    expected = expected + 3 * load_loss(logits, noisy, 1 / 4) * (balancing != "importance")
    torch.manual_seed(5)
    torch.testing.assert_close(load_balancing_loss(output, args), expected)


def test_epsilon_is_dopamine_s_schedule():
    args = Args(learning_starts=20_000, epsilon_decay_steps=250_000, end_epsilon=0.01)
    steps = [0, 20_000, 145_000, 270_000, 1_000_000]
    assert [linear_schedule(args, step) for step in steps] == pytest.approx([1, 1, 0.505, 0.01, 0.01])


def test_actions_are_epsilon_greedy():
    torch.manual_seed(0)
    q_values = torch.tensor([0.0, 2.0, 1.0, -1.0]).expand(40_000, 4)
    share = torch.bincount(select_actions(q_values, 0.4), minlength=4) / 40_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.7, 0.1, 0.1]), rtol=0, atol=0.01)
    assert (select_actions(q_values, 0.0) == 1).all()
