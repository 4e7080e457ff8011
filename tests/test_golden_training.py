"""Compares losses and weights with those of the authors' train step over thirty updates.

`golden/training_*.npz` holds the losses, per-sample losses and weight norms of `dqn_moe_agent.train` and
`full_rainbow_moe_agent.train` (google/dopamine, 5873f54), computed in float64. NumPy generates the same initial weights
and batches on both sides. Networks have 6 actions and 4 experts. The target is updated once, after the 15th update.
"""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import der_softmoe
import dqn_softmoe
import rainbow_softmoe

GOLDEN = Path(__file__).parent / "golden"
RAINBOW = {"encoder": "nature", "noisy": False}
CASES = {  # name of the golden file: script, arguments
    "dqn_impala_softmoe4": (dqn_softmoe, {"encoder": "impala"}),
    "dqn_nature_top1moe4": (dqn_softmoe, {"encoder": "nature", "layer": "top1moe"}),
    "dqn_nature_top1moe4_importance": (
        dqn_softmoe,
        {"encoder": "nature", "layer": "top1moe", "load_balancing": "importance"},
    ),
    "rainbow_impala_top1moe4": (rainbow_softmoe, RAINBOW | {"encoder": "impala", "layer": "top1moe"}),
    "rainbow_nature_softmoe4": (rainbow_softmoe, RAINBOW),
    "rainbow_nature_softmoe4_plain": (rainbow_softmoe, RAINBOW | {"double": False, "dueling": False}),
    "rainbow_nature_softmoe4_values": (der_softmoe, RAINBOW | {"distributional": False}),
}


def batches(script, n_step, dtype):
    """Yield the batches of 8 transitions. The order of the draws is that of the golden files."""
    rng = np.random.default_rng(3)
    pool = rng.integers(0, 256, (64, 4, 12, 12))
    for _ in range(30):
        i, j = rng.integers(0, 64, 8), rng.integers(0, 64, 8)
        obs, next_obs = (np.kron(pool[k], np.ones((1, 1, 7, 7))).astype(np.uint8) for k in (i, j))
        action, reward = rng.integers(0, 6, 8), rng.choice([-1.0, 0.0, 1.0], 8)
        discount = 0.99**n_step * (1 - (rng.random(8) < 0.2))
        weights = 1 / np.sqrt(rng.uniform(0.1, 2, 8))
        reward, discount, weights = (torch.from_numpy(x).to(dtype) for x in (reward, discount, weights / weights.max()))
        obs, action, next_obs, index = map(torch.from_numpy, (obs, action, next_obs, np.arange(8)))
        parts = (obs, action, reward, discount, next_obs, index)
        yield script.Batch(*parts) if script is dqn_softmoe else script.Batch(*parts, weights)


def train(name, dtype, updates):
    """Return our losses, per-sample losses and norms of the weights before and after, and the authors' arrays."""
    script, settings = CASES[name]
    with np.load(GOLDEN / f"training_{name}.npz") as file:
        golden = dict(file)
    args = script.Args(**{"num_experts": 4, "learning_rate": 6.25e-5} | settings)
    q_network, target_network = (script.QNetwork(args, (4, 84, 84), 6).to(dtype) for _ in range(2))
    parameters = dict(q_network.named_parameters())
    assert sorted(parameters) == golden["names"].tolist()
    with torch.no_grad():
        for key, fan_in in zip(golden["names"], golden["fan_in"], strict=True):
            drawn = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(parameters[key].shape)
            if key != "moe.scale":
                parameters[key].copy_(torch.from_numpy(drawn / np.sqrt(fan_in)))
    target_network.load_state_dict(q_network.state_dict())
    norms = [[parameters[key].norm().item() for key in golden["names"]]]
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps)
    losses, per_sample, n_step = [], [], 1 if script is dqn_softmoe else 3
    for update, batch in zip(range(updates), batches(script, n_step, dtype), strict=False):
        loss, _, _, *each = script.td_loss(q_network, target_network, batch, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        per_sample.append(each[0].numpy() if each else np.zeros(8))
        if update == 14:
            target_network.load_state_dict(q_network.state_dict())
    norms.append([parameters[key].norm().item() for key in golden["names"]])
    return np.array(losses), np.array(per_sample), np.array(norms), golden


@pytest.mark.parametrize("name", CASES)
def test_thirty_updates_in_float64_match_the_authors(name):
    losses, per_sample, norms, golden = train(name, torch.float64, 30)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-6)
    np.testing.assert_allclose(per_sample, golden.get("per_sample", np.zeros((30, 8))), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(norms[0], golden["norm_before"], rtol=1e-12)
    np.testing.assert_allclose(norms[1] - norms[0], golden["norm_after"] - golden["norm_before"], rtol=1e-4, atol=1e-9)


def test_ten_updates_in_float32_match_the_authors():
    losses, *_, golden = train("rainbow_nature_softmoe4", torch.float32, 10)
    np.testing.assert_allclose(losses, golden["losses"][:10], rtol=1e-3)
