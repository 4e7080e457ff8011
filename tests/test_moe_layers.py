"""Tests of moe_layers.py: the authors' golden numbers, slow oracles, initialisation, statistics, errors.

Shapes: B batch, T tokens, D token dim, E experts, S slots per expert, H expert hidden, C/h/w feature map.
An oracle loops over samples, tokens, experts and slots in float64. It is written from the formula, not from the layer.
`tests/golden` holds inputs, weights and outputs of the authors' JAX layers (google/dopamine, labs/moes).
"""

import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from operations import Operations
from torch import nn
from torch.utils._pytree import tree_leaves

from moe_layers import (
    BigExperts,
    DenseLayer,
    ExpertChoiceMoE,
    MoEOutput,
    NoisyLinear,
    PatchTokenizer,
    Routing,
    ShuffledTokenizer,
    SoftMoE,
    TokenizedLayer,
    Top1MoE,
    dormant_fraction,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    routing_stats,
    tokenize,
)

MOE_LAYERS = [SoftMoE, Top1MoE, ExpertChoiceMoE]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def draws(monkeypatch):
    """Return a list that collects every tensor that torch.randn and torch.randn_like return during the test."""
    recorded = []

    def recorder(original):
        def record(*args, **kwargs):
            recorded.append(original(*args, **kwargs))
            return recorded[-1]

        return record

    for name in ("randn", "randn_like"):
        monkeypatch.setattr(torch, name, recorder(getattr(torch, name)))
    return recorded


def normal(*shape):
    """Return normal float64 inputs, which the `draws` fixture does not collect."""
    return torch.empty(shape, dtype=torch.float64).normal_()


def randomise(module):
    """Make every parameter random, so that an unused one is detected. Returns the module in float64, in eval mode."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def small_layer(layer_class, num_tokens=7, token_dim=5, num_experts=3, hidden_dim=6, **options):
    return randomise(layer_class(num_tokens, token_dim, num_experts, hidden_dim, **options))


def golden(name):
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def weights_of(module):
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def assert_close(actual, expected, atol=1e-10, name="value"):
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape, name
    difference = (actual - expected).abs().max().item()
    assert difference <= atol, f"{name} differs by {difference}"


def assert_same_output(actual, expected):
    """Check that two MoEOutputs agree in every field."""
    for name in Routing._fields:
        assert_close(getattr(actual.routing, name), getattr(expected.routing, name), name=name)
    assert_close(actual.hidden, expected.hidden, name="hidden")
    assert_close(actual.tokens, expected.tokens, name="tokens")


# --------------------------------------------------------------------------------------------------------- oracles


def signed_sqrt(x):
    return np.sign(x) * np.sqrt(np.abs(x))


def softmax(x):
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


def noisy_weights(mean, bias, mean_sigma, bias_sigma, p, q):
    """Return the noisy weights (in, out) and biases (out,) of one sample (Fortunato et al., eq. 9-11)."""
    noise = np.outer(signed_sqrt(p), signed_sqrt(q))
    return mean + mean_sigma * noise, bias + bias_sigma * signed_sqrt(q)


def expert_oracle(x, weights, e, noise):
    """Apply expert e to one vector: (D,) -> (D,), (H,). `noise` is (p (D,), q (H,)) of the sample, or None."""
    w1, b1, w2, b2 = (weights[f"experts.{name}"][e] for name in ("w1", "b1", "w2", "b2"))
    if noise is not None:
        w1, b1 = noisy_weights(w1, b1, weights["experts.w1_sigma"][e], weights["experts.b1_sigma"][e], *noise)
    hidden = np.maximum(x @ w1 + b1, 0)
    return hidden @ w2 + b2, hidden


def empty_output(layer, B):
    """Return an MoEOutput of NumPy arrays of zeros, for an oracle to fill."""
    T, D, E, S = layer.num_tokens, layer.token_dim, layer.num_experts, layer.num_slots
    S = min(S, T) if isinstance(layer, ExpertChoiceMoE) else S  # expert choice takes a token at most once per expert
    H = layer.experts.w1.shape[2]
    routing = [np.zeros((B, T, E, S)), np.zeros((B, T, E, S)), np.zeros((B, T, E)), np.zeros((B, T, E))]
    return MoEOutput(np.zeros((B, T, D)), Routing(*routing), np.zeros((B, E, S, H)))


def soft_moe_oracle(layer, tokens, noise=None, phi=None):
    """Algorithm 1 of Soft MoE (2308.00951), slot by slot. `noise` has (p, q) per sample, `phi` (D, E, S) per sample."""
    weights, tokens = weights_of(layer), tokens.numpy()
    output = empty_output(layer, len(tokens))
    out, (dispatch, combine, router_logits, router_probs), hidden = output
    slots = list(np.ndindex(layer.num_experts, layer.num_slots))
    for b, x in enumerate(tokens):
        logits = np.zeros(dispatch.shape[1:])  # (T, E, S)
        for t, (e, s) in itertools.product(range(len(x)), slots):
            token, column = x[t], (weights["phi"] if phi is None else phi[b])[:, e, s]
            if layer.normalize:
                token = token / (np.linalg.norm(token) + 1e-6)
                column = weights["scale"] * column / (np.linalg.norm(column) + 1e-6)
            logits[t, e, s] = token @ column
        for t in range(len(x)):
            combine[b, t] = softmax(logits[t])
            router_logits[b, t] = np.log(np.exp(logits[t]).sum(axis=1))
            router_probs[b, t] = combine[b, t].mean(axis=1)
        for e, s in slots:
            dispatch[b, :, e, s] = softmax(logits[:, e, s])
            mixture = sum(dispatch[b, t, e, s] * x[t] for t in range(len(x)))
            result, hidden[b, e, s] = expert_oracle(mixture, weights, e, noise and noise[b])
            for t in range(len(x)):
                out[b, t] += combine[b, t, e, s] * result
    return output


def top1_oracle(layer, tokens, noise=None, router_noise=None):
    """Switch routing, token by token. The best expert takes a token if it has room. Outputs are scaled by the gate."""
    weights, tokens = weights_of(layer), tokens.numpy()
    output = empty_output(layer, len(tokens))
    out, (dispatch, combine, router_logits, router_probs), hidden = output
    for b, x in enumerate(tokens):
        queues = [[] for _ in range(layer.num_experts)]
        for t, token in enumerate(x):
            router_logits[b, t] = weights["router.weight"] @ token
            router_probs[b, t] = softmax(router_logits[b, t] + (0 if router_noise is None else router_noise[b, t]))
            best = router_probs[b, t].argmax()
            if len(queues[best]) < layer.num_slots:
                queues[best].append(t)
        for e, s in np.ndindex(layer.num_experts, layer.num_slots):
            t = queues[e][s] if s < len(queues[e]) else None
            token = np.zeros(layer.token_dim) if t is None else x[t]
            result, hidden[b, e, s] = expert_oracle(token, weights, e, noise and noise[b])
            if t is not None:
                dispatch[b, t, e, s], combine[b, t, e, s] = 1, router_probs[b, t, e]
                out[b, t] = router_probs[b, t, e] * result
    return output


def expert_choice_oracle(layer, tokens, noise=None):
    """Expert choice, expert by expert. An expert takes its most probable tokens and scales outputs by the gates."""
    weights, tokens = weights_of(layer), tokens.numpy()
    output = empty_output(layer, len(tokens))
    out, (dispatch, combine, router_logits, router_probs), hidden = output
    for b, x in enumerate(tokens):
        for t, token in enumerate(x):
            router_logits[b, t] = weights["router.weight"] @ token
            router_probs[b, t] = softmax(router_logits[b, t])
        for e in range(layer.num_experts):
            best = sorted(range(len(x)), key=lambda t: -router_probs[b, t, e])
            for s, t in enumerate(best[: layer.num_slots]):
                result, hidden[b, e, s] = expert_oracle(x[t], weights, e, noise and noise[b])
                dispatch[b, t, e, s], combine[b, t, e, s] = 1, router_probs[b, t, e]
                out[b, t] += router_probs[b, t, e] * result
    return output


ORACLES = {SoftMoE: soft_moe_oracle, Top1MoE: top1_oracle, ExpertChoiceMoE: expert_choice_oracle}


# --------------------------------------------------------------------------------------------- parity with the authors


@pytest.mark.parametrize("layer_class, name", [(SoftMoE, "layer_softmoe_n4"), (Top1MoE, "layer_top1_n4")])
def test_layers_match_the_authors_outputs(layer_class, name):
    arrays = golden(name)
    E, D, H = arrays["w1"].shape
    layer = layer_class(arrays["tokens"].shape[1], D, E, H)
    theirs = {"router.weight": "router_weight"} | {f"experts.{name}": name for name in ("w1", "b1", "w2", "b2")}
    layer.load_state_dict({name: arrays[theirs.get(name, name)] for name in layer.state_dict()})
    tokens, routing, hidden = layer(arrays["tokens"])
    assert_close(tokens, arrays["out"], atol=1e-5)
    assert_close(hidden, arrays["hidden"], atol=1e-5)
    assert_close(routing.router_probs, arrays["router_probs"], atol=1e-5)
    if layer_class is Top1MoE:
        assert_close(routing.router_logits, arrays["router_logits"], atol=1e-5)
        assert torch.equal(routing.router_logits.argmax(dim=2), arrays["top_expert"].long())
        assert routing.dispatch_weights.sum(dim=(2, 3)).flatten().long().bincount().tolist() == [12, 2 * 121 - 12]


def test_losses_match_the_authors_values():
    arrays = golden("aux_losses")
    logits, noise_std = arrays["router_logits"], arrays["noise_std"].item()
    noisy_logits = logits + noise_std * arrays["unit_noise"]
    assert_close(importance_loss(logits.softmax(dim=2)), arrays["importance_loss"], atol=1e-5)
    assert_close(entropy_loss(logits.softmax(dim=2)), arrays["entropy_loss"], atol=1e-5)
    assert_close(load_loss(logits, noisy_logits, noise_std), arrays["load_loss"], atol=1e-5)


# -------------------------------------------------------------------------------------------------- layers and oracles


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("capacity_factor", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_layer_matches_its_oracle(layer_class, num_experts, capacity_factor, num_tokens):
    layer = small_layer(layer_class, num_tokens, num_experts=num_experts, capacity_factor=capacity_factor)
    tokens = normal(2, num_tokens, 5)
    assert layer.num_slots == -(-num_tokens * capacity_factor // num_experts)
    assert_same_output(layer(tokens), ORACLES[layer_class](layer, tokens))


@pytest.mark.parametrize("num_experts", [1, 3])
def test_normalized_soft_moe_matches_its_oracle_and_mixes_raw_tokens(num_experts):
    layer, tokens = small_layer(SoftMoE, num_experts=num_experts, normalize=True), normal(2, 7, 5) * 4
    nn.init.constant_(layer.scale, 2.5)
    assert_same_output(layer(tokens), soft_moe_oracle(layer, tokens))
    dispatch = layer(tokens).routing.dispatch_weights
    assert_close(layer(3 * tokens).routing.dispatch_weights, dispatch, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_unlearned_phi_is_drawn_for_every_sample_and_forward(training, draws):
    layer, tokens = small_layer(SoftMoE, learned_phi=False, normalize=True).train(training), normal(2, 7, 5)
    outputs = layer(tokens), layer(tokens)
    assert len(draws) == 2
    for output, phi in zip(outputs, draws, strict=True):
        phi = phi.reshape(2, 5, layer.num_experts, layer.num_slots).numpy()
        assert_same_output(output, soft_moe_oracle(layer, tokens, phi=phi))


def test_top1_takes_tokens_in_order_until_an_expert_is_full_in_each_sample():
    layer, tokens = small_layer(Top1MoE, num_experts=2), normal(2, 7, 5)
    nn.init.zeros_(layer.router.weight)
    layer.router.weight.data[1, 0] = 3.0  # tokens with a positive first entry go to expert 1
    tokens[0, :, 0], tokens[1, :, 0] = torch.arange(1, 8), torch.tensor([0.5, -1, -1, -1, 1, 1, 1])
    output = layer(tokens)
    assert layer.num_slots == 4
    assert output.routing.dispatch_weights.sum(dim=(2, 3)).tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert (output.tokens[0, 4:] == 0).all() and (output.tokens[0, :4].abs().sum(dim=1) > 0).all()
    gate = 1 / (1 + math.exp(-1.5))
    expert, _ = layer.experts(tokens[1:, None, :1].expand(1, 2, 1, 5))
    assert_close(output.tokens[1, 0], gate * expert[0, 1, 0])


def test_top1_router_noise_acts_in_training_mode_only(draws):
    layer, tokens = small_layer(Top1MoE, router_noise_std=0.7), normal(2, 7, 5)
    assert_same_output(layer(tokens), top1_oracle(layer, tokens))
    assert not draws
    noisy = layer.train()(tokens)
    (noise,) = draws
    assert_same_output(noisy, top1_oracle(layer, tokens, router_noise=0.7 * noise.numpy()))
    layer.router_noise_std = 0.0
    assert_same_output(layer(tokens), top1_oracle(layer, tokens))
    assert len(draws) == 1


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_noisy_experts_match_the_oracle_and_have_no_noise_in_evaluation_mode(layer_class, draws):
    """The experts and slots of a sample share one draw (p, q)."""
    layer, tokens = small_layer(layer_class, noisy=True), normal(2, 7, 5)
    assert_same_output(layer(tokens), ORACLES[layer_class](layer, tokens))
    assert not draws
    output = layer.train()(tokens)
    p, q = draws
    noise = list(zip(p.reshape(2, 5).numpy(), q.reshape(2, 6).numpy(), strict=True))
    assert_same_output(output, ORACLES[layer_class](layer, tokens, noise=noise))


def test_noisy_linear_matches_its_oracle_and_has_no_noise_in_evaluation_mode(draws):
    layer, x = randomise(NoisyLinear(5, 3)), normal(4, 5)
    assert_close(layer(x), torch.stack([layer.weight @ sample + layer.bias for sample in x]))
    assert not draws
    output, weights = layer.train()(x), weights_of(layer)
    noise = {draw.shape[-1]: draw.numpy() for draw in draws}  # p (B, 5) and q (B, 3)
    matrices = weights["weight"].T, weights["bias"], weights["weight_sigma"].T, weights["bias_sigma"]
    for b in range(4):
        weight, bias = noisy_weights(*matrices, noise[5][b], noise[3][b])
        assert_close(output[b], x[b].numpy() @ weight + bias)


def test_dense_layer_is_flatten_linear_relu():
    layer, x = randomise(DenseLayer(12, 4)), normal(3, 2, 3, 2)
    for sample, output in zip(x, layer(x), strict=True):
        flat = torch.stack([sample[i] for i in np.ndindex(2, 3, 2)])
        assert_close(output, (layer.linear.weight @ flat + layer.linear.bias).clamp(min=0))
    noisy = randomise(DenseLayer(12, 4, noisy=True)).train()
    torch.manual_seed(1)
    expected = noisy.linear(x.flatten(1)).relu()
    torch.manual_seed(1)
    assert isinstance(noisy.linear, NoisyLinear) and torch.equal(noisy(x), expected)


def test_tokenized_layer_sums_over_tokens_that_share_their_noise(draws):
    layer, x = randomise(TokenizedLayer(5, 4)), normal(3, 7, 5)
    expected = [sum((layer.linear.weight @ token + layer.linear.bias).clamp(min=0) for token in sample) for sample in x]
    assert_close(layer(x), torch.stack(expected))
    noisy = randomise(TokenizedLayer(5, 4, noisy=True)).train()
    output, weights = noisy(x), weights_of(noisy.linear)
    p, q = ({draw.shape: draw.numpy() for draw in draws}[shape] for shape in ((3, 1, 5), (3, 1, 4)))
    matrices = weights["weight"].T, weights["bias"], weights["weight_sigma"].T, weights["bias_sigma"]
    for b in range(3):
        weight, bias = noisy_weights(*matrices, p[b, 0], q[b, 0])
        assert_close(output[b], np.maximum(x[b].numpy() @ weight + bias, 0).sum(axis=0))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("num_tokens, num_slots", [(48, 16), (29, 9)])
def test_big_experts_apply_their_own_encoders_to_images_of_slots(num_tokens, num_slots, noisy):
    def make_encoder():
        return nn.Sequential(nn.Conv2d(5, 2, 2, padding=1), nn.ReLU(), nn.Conv2d(2, 4, 3, stride=2))

    layer = small_layer(SoftMoE, num_tokens, make_encoder=make_encoder, noisy=noisy, normalize=True)
    assert isinstance(layer.experts, BigExperts) and layer.num_slots == num_slots
    tokens = normal(2, num_tokens, 5)
    output, side = layer(tokens), math.isqrt(num_slots)
    slots = torch.einsum("btd,btes->besd", tokens, output.routing.dispatch_weights)
    results, mlp = torch.zeros_like(slots), weights_of(layer.experts)
    for b, e in np.ndindex(2, 3):
        encoder = make_encoder().double()
        encoder.load_state_dict({name.replace("-", "."): x[e] for name, x in layer.experts.encoders.items()})
        image = torch.stack([slots[b, e, y * side : (y + 1) * side].T for y in range(side)], dim=1)  # (D, side, side)
        features = encoder(image[None])[0].permute(1, 2, 0).flatten().detach().numpy()  # (h, w, C), as Flax
        result, hidden = expert_oracle(features, mlp, e, None)
        results[b, e] = torch.as_tensor(result).view(num_slots, 5)
        assert_close(output.hidden[b, e, 0], hidden)
    assert_close(output.tokens, torch.einsum("besd,btes->btd", results, output.routing.combine_weights))


# ------------------------------------------------------------------------------------------------------- tokenizers


def test_shuffled_tokens_are_the_features_in_one_fixed_permutation():
    features, tokenizer = torch.arange(2 * 3 * 20.0).view(2, 3, 4, 5), ShuffledTokenizer((3, 4, 5))
    tokens, places = tokenizer(features), tokenizer.permutation
    for b, c, y, x in np.ndindex(features.shape):
        assert tokens[b, y * 5 + x, c] == features[b].flatten()[places[c * 20 + y * 5 + x]]
    assert not torch.equal(tokens, tokenize(features, "PerConv")) and torch.equal(tokens, tokenizer(features))
    other = ShuffledTokenizer((3, 4, 5))
    other.load_state_dict(tokenizer.state_dict())  # as a target network does
    assert torch.equal(other(features), tokens)


def test_tokenize_matches_loops_over_the_feature_map():
    B, C, h, w = 2, 3, 4, 5
    features = torch.arange(B * C * h * w, dtype=torch.float64).view(B, C, h, w)
    per_conv, per_feat, per_samp = (tokenize(features, name) for name in ("PerConv", "PerFeat", "PerSamp"))
    assert (per_conv.shape, per_feat.shape, per_samp.shape) == ((B, 20, C), (B, C, 20), (B, 1, 60))
    assert_close(tokenize(features, "Average"), per_feat.mean(dim=2)[:, None])
    for b, c, y, x in np.ndindex(B, C, h, w):
        expected = features[b, c, y, x]
        assert per_conv[b, y * w + x, c] == per_feat[b, c, y * w + x] == per_samp[b, 0, (y * w + x) * C + c] == expected


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("size, map_size", [(3, (11, 11)), (3, (3, 8)), (2, (5, 4))])
def test_patch_tokenizer_matches_loops_over_patches(size, map_size, average):
    tokenizer = randomise(PatchTokenizer(3, 3 if average else 4, patch_size=size, average=average))
    features, tokens = normal(2, 3, *map_size), []
    for top in range(0, map_size[0] - size + 1, size):
        for left in range(0, map_size[1] - size + 1, size):
            patch = features[:, None, :, top : top + size, left : left + size]  # (B, 1, C, size, size)
            if average:
                tokens.append(patch[:, 0].mean(dim=(2, 3)))
            else:
                tokens.append((patch * tokenizer.embedding.weight).sum(dim=(2, 3, 4)) + tokenizer.embedding.bias)
    assert_close(tokenizer(features), torch.stack(tokens, dim=1))
    assert len(list(tokenizer.parameters())) == (0 if average else 2)


# --------------------------------------------------------------------------------------- parameters, initialisation

EXPERTS = {"experts.w1": (3, 5, 6), "experts.b1": (3, 6), "experts.w2": (3, 6, 5), "experts.b2": (3, 5)}
SIGMAS = {"experts.w1_sigma": (3, 5, 6), "experts.b1_sigma": (3, 6)}


@pytest.mark.parametrize(
    "layer, expected",
    [
        (SoftMoE(7, 5, 3, 6), {"phi": (5, 3, 3), "scale": (1,)} | EXPERTS),
        (SoftMoE(7, 5, 3, 6, noisy=True), {"phi": (5, 3, 3), "scale": (1,)} | EXPERTS | SIGMAS),
        (SoftMoE(7, 5, 3, 6, learned_phi=False), {"scale": (1,)} | EXPERTS),
        (Top1MoE(7, 5, 3, 6), {"router.weight": (3, 5)} | EXPERTS),
        (Top1MoE(7, 5, 3, 6, noisy=True), {"router.weight": (3, 5)} | EXPERTS | SIGMAS),
        (NoisyLinear(5, 3), {"weight": (3, 5), "bias": (3,), "weight_sigma": (3, 5), "bias_sigma": (3,)}),
        (DenseLayer(5, 3), {"linear.weight": (3, 5), "linear.bias": (3,)}),
        (PatchTokenizer(3, 4), {"embedding.weight": (4, 3, 3, 3), "embedding.bias": (4,)}),
    ],
)
def test_parameters_have_the_documented_names_and_shapes(layer, expected):
    assert {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} == expected
    assert set(layer.state_dict()) == set(expected)


def assert_truncated_normal(weight, std):
    """Check for a normal that is truncated at two sigma. `std` is its standard deviation after the truncation."""
    cut = 2 * std / 0.87962566103423978
    assert weight.std().item() == pytest.approx(std, rel=0.04)
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())
    assert 0.97 * cut < weight.abs().max().item() <= cut * (1 + 1e-6)


def assert_uniform(weight, bound):
    assert 0.98 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04)
    assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * weight.numel())


@torch.no_grad()
def test_initial_parameters_match_the_authors():
    for num_experts in (1, 8):  # the fan-in of phi is experts * token dim
        soft = SoftMoE(121, 64, num_experts, 4)
        assert_truncated_normal(soft.phi, (num_experts * 64) ** -0.5)
        assert soft.scale == 1
    assert_truncated_normal(Top1MoE(8, 512, 16, 4).router.weight, 512**-0.5)
    embedding, linear = PatchTokenizer(16, 64).embedding, DenseLayer(96, 128).linear
    assert_truncated_normal(embedding.weight, (16 * 9) ** -0.5)
    assert_uniform(linear.weight, math.sqrt(6 / (96 + 128)))
    assert not embedding.bias.any() and not linear.bias.any()
    for layer_class in MOE_LAYERS:
        experts = layer_class(121, 48, 8, 96).experts
        for weight in (experts.w1, experts.w2):  # Xavier uniform, drawn for each expert on its own
            for expert in weight:
                assert_uniform(expert, math.sqrt(6 / (48 + 96)))
            assert len({expert.sum().item() for expert in weight}) == 8
        assert not experts.b1.any() and not experts.b2.any()
        experts = layer_class(121, 48, 8, 512, noisy=True).experts  # only the first layer is noisy
        assert_uniform(experts.w1, 48**-0.5)
        assert_uniform(experts.b1, 48**-0.5)
        assert_uniform(experts.w2, math.sqrt(6 / (48 + 512)))
        assert not experts.b2.any()
        assert all(torch.allclose(x, torch.tensor(0.1 * 48**-0.5)) for x in (experts.w1_sigma, experts.b1_sigma))
    for sigma_0, layer in ((0.1, NoisyLinear(64, 2048)), (0.5, NoisyLinear(64, 2048, 0.5))):
        assert_uniform(layer.weight, 1 / 8)
        assert_uniform(layer.bias, 1 / 8)
        assert all(torch.allclose(x, torch.tensor(sigma_0 / 8)) for x in (layer.weight_sigma, layer.bias_sigma))


# ---------------------------------------------------------------------------------- outputs, gradients, static shapes


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_outputs_are_as_documented_and_forward_changes_no_state(layer_class):
    assert MoEOutput._fields == ("tokens", "routing", "hidden")
    assert Routing._fields == ("dispatch_weights", "combine_weights", "router_logits", "router_probs")
    layer = layer_class(7, 5, 3, 6, noisy=True)
    assert layer_class(7, 5, 3).experts.w1.shape == (3, 5, 512)
    state, attributes = {name: value.clone() for name, value in layer.state_dict().items()}, set(vars(layer))
    output = layer(torch.randn(2, 7, 5))
    assert output.tokens.shape == (2, 7, 5) and output.hidden.shape == (2, 3, 3, 6) and output.hidden.min() == 0
    assert [tuple(tensor.shape) for tensor in output.routing] == [(2, 7, 3, 3)] * 2 + [(2, 7, 3)] * 2
    assert set(vars(layer)) == attributes
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    detached = output.detach()
    assert output.tokens.requires_grad and type(detached) is MoEOutput and type(detached.routing) is Routing
    for before, after in zip(tree_leaves(output), tree_leaves(detached), strict=True):
        assert torch.equal(before, after) and not after.requires_grad


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"capacity_factor": 0.5}])
@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_gradients_match_finite_differences(layer_class, options):
    options = options if layer_class is SoftMoE else {"capacity_factor": options.get("capacity_factor", 1.0)}
    layer, tokens = small_layer(layer_class, 3, 2, 2, 3, **options), normal(2, 3, 2).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(tokens, *parameters):
        output = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), tokens)
        return output.tokens, output.hidden, output.routing.router_logits, output.routing.router_probs

    assert torch.autograd.gradcheck(forward, (tokens, *parameters))


def test_zero_tokens_and_huge_logits_stay_finite():
    layer, tokens = small_layer(SoftMoE, normalize=True), torch.zeros(2, 7, 5, dtype=torch.float64, requires_grad=True)
    layer(tokens).tokens.sum().backward()
    assert tokens.grad.isfinite().all() and layer.phi.grad.isfinite().all()
    for layer_class in MOE_LAYERS:
        output = layer_class(7, 5, 3, 6)(1e6 * torch.randn(2, 7, 5))
        assert all(tensor.isfinite().all() for tensor in tree_leaves(output))


OPTIONS = [
    (SoftMoE, {"noisy": True, "normalize": True}),
    (SoftMoE, {"learned_phi": False, "capacity_factor": 0.5}),
    (Top1MoE, {"noisy": True, "router_noise_std": 0.3}),
    (Top1MoE, {"capacity_factor": 0.5}),
    (ExpertChoiceMoE, {"noisy": True}),
]


@pytest.mark.parametrize("layer_class, options", OPTIONS)
def test_everything_runs_on_the_meta_device(layer_class, options):
    """Meta tensors have no data. Code that waits for the device or has a data-dependent shape raises on them."""
    for function in (lambda x: x.item(), torch.nonzero, lambda x: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            function(torch.ones((), device="meta"))
    output = layer_class(7, 5, 3, 6, **options).to("meta")(torch.zeros(2, 7, 5, device="meta"))
    loss = load_balancing_loss(output, "importance+load", 1.0, 1.0)
    (output.tokens.sum() + loss).backward()
    dormant = [dormant_fraction(output.hidden, 0.1), dormant_fraction(output.hidden.flatten(0, 2))]
    scalars = [loss, entropy_loss(output.routing.router_probs), *routing_stats(output).values(), *dormant]
    assert {x.device.type for x in [*tree_leaves(output), *scalars]} == {"meta"} and {x.shape for x in scalars} == {()}
    for module, shape in ((NoisyLinear(6, 3), (2, 6)), (DenseLayer(6, 3), (2, 6)), (PatchTokenizer(6), (2, 6, 3, 3))):
        module.to("meta")(torch.zeros(shape, device="meta")).sum().backward()


@pytest.mark.parametrize("layer_class, options", OPTIONS)
def test_number_of_operations_does_not_grow_with_batch_tokens_experts_or_slots(layer_class, options):
    counts = set()
    for B, T, E in [(2, 12, 3), (5, 12, 3), (2, 24, 3), (2, 24, 6)]:
        layer, tokens = layer_class(T, 5, E, 6, **options), torch.randn(B, T, 5)
        with Operations() as operations:
            layer(tokens)
        counts.add(len(operations.names))
    assert len(counts) == 1


def test_no_operation_makes_noisy_weights_for_every_sample():
    layers = NoisyLinear(100, 80), SoftMoE(6, 40, 2, 50, noisy=True), Top1MoE(6, 40, 2, 50, noisy=True)
    for layer, shape in zip(layers, [(9, 100), (9, 6, 40), (9, 6, 40)], strict=True):
        with Operations() as operations, torch.no_grad():
            layer(torch.randn(shape))
        assert operations.largest_output < 9 * max(parameter.numel() for parameter in layer.parameters())


# -------------------------------------------------------------------------------------------- load-balancing losses


def squared_variation(values):
    return (np.std(values) / np.mean(values)) ** 2


def importance_oracle(probs):
    return np.mean([squared_variation(sum(sample)) for sample in probs])


def load_oracle(logits, noisy_logits, noise_std):
    """An expert's load is P(logit + noise_std * N(0, 1) > the highest noisy logit), averaged over the tokens."""
    losses, cdf = [], np.vectorize(statistics.NormalDist().cdf)
    for clean, noisy in zip(logits, noisy_logits, strict=True):
        wins = [cdf((x - max(y)) / noise_std) for x, y in zip(clean, noisy, strict=True)]
        losses.append(squared_variation(np.mean(wins, axis=0)))
    return np.mean(losses)


def entropy_oracle(probs):
    losses = []
    for sample in probs:
        shares = np.unique(sample.argmax(axis=1), return_counts=True)[1] / len(sample)
        losses.append(1 + (shares * np.log(shares)).sum() / np.log(sample.shape[1]))
    return np.mean(losses)


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_losses_match_their_oracles_and_finite_differences(num_experts):
    logits, noise = normal(3, 11, num_experts).requires_grad_(), normal(3, 11, num_experts)
    probs, noise_std = logits.softmax(dim=2), 1 / num_experts
    noisy = logits + noise_std * noise
    pairs = [(importance_loss, importance_oracle, (probs,)), (entropy_loss, entropy_oracle, (probs,))]
    for loss, oracle, arguments in [*pairs, (load_loss, load_oracle, (logits, noisy))]:
        rest = (noise_std,) if loss is load_loss else ()
        expected = oracle(*(x.detach().numpy() for x in arguments), *rest)
        assert loss(*arguments, *rest).item() == pytest.approx(expected, abs=1e-5 if loss is entropy_loss else 1e-10)
    assert not entropy_loss(probs).requires_grad
    assert torch.autograd.gradcheck(lambda logits: importance_loss(logits.softmax(2)), (logits,))
    assert torch.autograd.gradcheck(lambda x: load_loss(x, x + noise_std * noise, noise_std), (logits,))


@pytest.mark.parametrize("losses", ["importance", "load", "importance+load"])
def test_load_balancing_loss_is_a_weighted_sum_with_noise_of_std_one_over_experts(losses, draws):
    output = small_layer(Top1MoE)(normal(2, 7, 5))
    loss, logits = load_balancing_loss(output, losses, 2.0, 3.0), output.routing.router_logits
    expected = 2 * importance_loss(logits.softmax(2)) if "importance" in losses else 0
    assert len(draws) == ("load" in losses)
    if draws:
        expected = expected + 3 * load_loss(logits, logits + draws[0] / 3, 1 / 3)
    assert_close(loss, expected)


def test_losses_are_zero_for_balanced_experts_and_largest_when_one_takes_all():
    balanced = torch.eye(4).repeat(2, 3, 1)  # (2, 12, 4): every expert is the top one of three tokens
    alone = torch.eye(4)[2].repeat(2, 12, 1)
    for probs, largest, entropy in ((balanced, 0, 0), (alone, 3, 1)):  # (std / mean)^2 of one-hot shares: E - 1
        assert importance_loss(probs).item() == pytest.approx(largest, abs=1e-6)
        assert load_loss(100 * probs, 100 * probs, 0.25).item() == pytest.approx(largest, abs=1e-6)
        assert entropy_loss(probs).item() == pytest.approx(entropy, abs=1e-4)


# ------------------------------------------------------------------------------------------------------- statistics


def stats_of(*, router_probs=None, combine_weights=None, hidden=None):
    """Return the statistics of a handmade MoEOutput for two experts. Fields that are not given are all ones."""
    combine_weights = torch.ones(1, 2, 2, 1) if combine_weights is None else torch.tensor(combine_weights)
    B, T, E, S = combine_weights.shape
    router_probs = torch.ones(B, T, E) if router_probs is None else torch.tensor(router_probs)
    hidden = torch.ones(B, E, S, 3) if hidden is None else torch.tensor(hidden)
    routing = Routing((combine_weights > 0).float(), combine_weights, router_probs.log(), router_probs)
    stats = routing_stats(MoEOutput(torch.zeros(B, T, 5), routing, hidden))
    return {name: value.item() for name, value in stats.items()}


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
@pytest.mark.parametrize("num_experts, capacity_factor", [(1, 1.0), (3, 0.25), (3, 1.0), (3, 2.0)])
def test_routing_stats_are_scalar_tensors_with_the_documented_keys(layer_class, num_experts, capacity_factor):
    output = small_layer(layer_class, num_experts=num_experts, capacity_factor=capacity_factor)(normal(4, 7, 5))
    stats = routing_stats(output)
    loads = [f"expert_load/{e}" for e in range(num_experts)]
    dormant = [f"dormant_fraction/{e}" for e in range(num_experts)]
    assert set(stats) == {"router_entropy", "dropped_fraction", "dormant_fraction", *loads, *dormant}
    assert all(value.shape == () and not value.requires_grad for value in stats.values())
    assert all(-1e-6 <= value <= 1 + 1e-6 for value in stats.values())
    assert num_experts > 1 or stats["router_entropy"] == 0
    dropped = (output.routing.dispatch_weights.sum(dim=(2, 3)) == 0).double().mean().item()
    assert stats["dropped_fraction"].item() == pytest.approx(dropped)
    assert sum(stats[name].item() for name in loads) == pytest.approx(1 - dropped)


EVEN, SURE, MIXED = [0.5, 0.5], [0.0, 1.0], [0.25, 0.75]
ENTROPIES = [([EVEN, EVEN], 1), ([SURE, SURE], 0), ([EVEN, SURE], 0.5), ([MIXED, MIXED], 2 - 0.75 * math.log2(3))]


@pytest.mark.parametrize("scale", [1.0, 0.1])  # Soft MoE's averaged combine weights sum to 1/S, not to 1
@pytest.mark.parametrize("probs, entropy", ENTROPIES)
def test_router_entropy_of_handmade_probabilities(probs, entropy, scale):
    probs = [[[scale * prob for prob in token] for token in probs]]
    assert stats_of(router_probs=probs)["router_entropy"] == pytest.approx(entropy, abs=1e-6)


def test_expert_load_counts_tokens_in_sparse_and_combine_weights_in_soft_routing():
    sparse = stats_of(combine_weights=[[[[0.9], [0.0]], [[0.0], [0.6]], [[0.0], [0.0]], [[0.0], [0.0]]]])
    assert [sparse[f"expert_load/{e}"] for e in (0, 1)] == pytest.approx([0.25, 0.25])
    assert sparse["dropped_fraction"] == 0.5
    soft = stats_of(combine_weights=[[[[0.1, 0.2], [0.3, 0.4]], [[0.4, 0.4], [0.1, 0.1]]]])
    assert [soft[f"expert_load/{e}"] for e in (0, 1)] == pytest.approx([(0.3 + 0.8) / 2, (0.7 + 0.2) / 2])
    assert soft["dropped_fraction"] == 0


def test_dormant_units_are_counted_per_expert():
    """Of the three units, 0 is dead in expert 0 alone, 1 in both experts, and 2 in neither."""
    hidden = [[[[0.0, 0.0, 1.0]], [[2.0, 0.0, 0.0]]], [[[0.0, 0.0, 0.0]], [[0.0, 0.0, 3.0]]]]
    stats = stats_of(hidden=hidden)
    assert [stats[f"dormant_fraction{e}"] for e in ("/0", "/1", "")] == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert dormant_fraction(torch.tensor(hidden)).item() == pytest.approx(1 / 2)
    assert dormant_fraction(torch.tensor(hidden).flatten(0, 2)).item() == pytest.approx(1 / 3)  # the authors' variant
    one_slot = torch.zeros(2, 1, 3, 2)
    one_slot[1, 0, 2, 0] = 1e-3
    assert dormant_fraction(one_slot).item() == 0.5


@pytest.mark.parametrize("tau, expected", [(0.0, 0.25), (0.4, 0.25), (0.5, 0.5), (1.0, 0.75), (2.5, 1.0)])
def test_dormant_fraction_compares_scores_with_tau_times_the_mean_of_the_whole_layer(tau, expected):
    hidden = torch.tensor([[0.0, 1, 2, 1], [0, -1, 2, 9]], requires_grad=True)  # mean |h| is 0, 1, 2, 5, and 2 overall
    assert dormant_fraction(hidden, tau).item() == expected
    assert dormant_fraction(hidden.view(2, 4, 1, 1), tau).item() == expected  # one unit per expert
    assert dormant_fraction(torch.zeros(2, 3, 1, 4), tau).item() == 1


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
@pytest.mark.parametrize("size", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("argument", ["num_tokens", "token_dim", "num_experts", "hidden_dim", "capacity_factor"])
def test_moe_layers_reject_sizes_out_of_range(layer_class, argument, size):
    sizes = {"num_tokens": 7, "token_dim": 5, "num_experts": 3, "hidden_dim": 6}
    with pytest.raises(ValueError, match=argument):
        layer_class(**(sizes | {argument: size}))


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 7, 4), (2, 5, 7), (7, 5), (1, 2, 7, 5)])
def test_moe_layers_reject_tokens_of_another_shape(layer_class, shape):
    with pytest.raises(ValueError, match="expected tokens of shape"):
        layer_class(7, 5, 3, 6)(torch.zeros(shape))


ERRORS = [(lambda name=name: tokenize(torch.zeros(1, 2, 3, 3), name), "'PerConv'") for name in ("PerPatch", "perconv")]
ERRORS += [(lambda a=a: PatchTokenizer(3, average=a)(torch.zeros(1, 3, 2, 9)), "2x9") for a in (False, True)]
ERRORS += [(lambda a=a: PatchTokenizer(3, average=a)(torch.zeros(1, 3, 9, 2)), "9x2") for a in (False, True)]
ERRORS += [(lambda: PatchTokenizer(3, 4, average=True), "token_dim 4"), (lambda: PatchTokenizer(0), "in_channels")]
ERRORS += [(lambda: PatchTokenizer(3, 0), "token_dim"), (lambda: PatchTokenizer(3, patch_size=-1), "patch_size")]
ERRORS += [(lambda: Top1MoE(7, 5, 3, 6, router_noise_std=-0.1), "router_noise_std")]
ERRORS += [(lambda: NoisyLinear(0, 3), "in_features"), (lambda: NoisyLinear(3, -1), "out_features")]
ERRORS += [(lambda: DenseLayer(-1, 3), "in_features"), (lambda: DenseLayer(3, 0), "hidden_dim")]


@pytest.mark.parametrize("call, words", ERRORS)
def test_invalid_arguments_and_inputs_are_rejected(call, words):
    with pytest.raises(ValueError, match=words):
        call()
