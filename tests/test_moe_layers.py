"""Tests of moe_layers.py: the authors' golden numbers, slow oracles in plain loops, statistics, invariances, errors.

Shapes: B batch, T tokens, D token dim, E experts, S slots per expert, H expert hidden, C/h/w feature map.
An oracle is a float64 loop over samples, tokens, experts and slots, written from the formula and not from the library.
`tests/golden` holds inputs, weights and outputs of the authors' JAX layers (google/dopamine, labs/moes).
"""

import ast
import inspect
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import moe_layers
from moe_layers import (
    DenseLayer,
    MoEOutput,
    NoisyLinear,
    PatchTokenizer,
    Routing,
    SoftMoE,
    Top1MoE,
    dormant_fraction,
    entropy_loss,
    importance_loss,
    load_loss,
    routing_stats,
    tokenize,
)

MOE_LAYERS = [SoftMoE, Top1MoE]
CAPACITY_FACTORS = [0.25, 0.5, 1.0, 2.0]
MEAN_ABS_NORMAL = math.sqrt(2 / math.pi)  # E|N(0, 1)|: the variance of factorised noise f(N(0, 1))
TRUNCATED_STD = 0.87962566103423978  # the std of a unit normal cut at two sigma

# --------------------------------------------------------------------------------------------------------- helpers


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def draws(monkeypatch):
    """A list that fills with every tensor torch.randn and torch.randn_like return during the test, in order."""
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
    """Float64 inputs that the `draws` fixture does not see."""
    return torch.empty(shape, dtype=torch.float64).normal_()


def randomise(module):
    """A float64 module in evaluation mode whose every parameter is random, so that one that is left out shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def small(layer_class, num_tokens=7, token_dim=5, num_experts=3, hidden_dim=6, **options):
    return randomise(layer_class(num_tokens, token_dim, num_experts, hidden_dim, **options))


def golden(name):
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def weights_of(module):
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def shapes_of(module):
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def assert_close(actual, expected, atol=1e-10, name="value"):
    expected = torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape, name
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=atol, check_dtype=False, msg=lambda report: f"{name}: {report}"
    )


def assert_same_output(actual, expected):
    """Every field of two MoEOutputs agrees."""
    for name in Routing._fields:
        assert_close(getattr(actual.routing, name), getattr(expected.routing, name), name=name)
    assert_close(actual.hidden, expected.hidden, name="hidden")
    assert_close(actual.tokens, expected.tokens, name="tokens")


# --------------------------------------------------------------------------------------------------------- oracles


def signed_sqrt(value):
    return math.copysign(math.sqrt(abs(value)), value)


def softmax(values):
    """Of a list of floats."""
    exponentials = [math.exp(value - max(values)) for value in values]
    return [exponential / sum(exponentials) for exponential in exponentials]


def noisy_weights(mean, bias, mean_sigma, bias_sigma, p, q):
    """The noisy (in, out) matrix and (out,) bias of one sample, entry by entry (Fortunato et al., eq. 9-11)."""
    weight, bias = mean.copy(), bias.copy()
    for j in range(len(q)):
        for i in range(len(p)):
            weight[i, j] += mean_sigma[i, j] * signed_sqrt(p[i]) * signed_sqrt(q[j])
        bias[j] += bias_sigma[j] * signed_sqrt(q[j])
    return weight, bias


def expert_oracle(x, weights, e, noise=None):
    """(D,) -> (D,), (H,): expert e on one vector; `noise` is this sample's (p (D,), q (H,))."""
    w1, b1 = weights["experts.w1"][e], weights["experts.b1"][e]
    if noise is not None:
        w1, b1 = noisy_weights(w1, b1, weights["experts.w1_sigma"][e], weights["experts.b1_sigma"][e], *noise)
    D, H = w1.shape
    hidden = [max(0.0, b1[j] + sum(x[i] * w1[i, j] for i in range(D))) for j in range(H)]
    w2, b2 = weights["experts.w2"][e], weights["experts.b2"][e]
    return [b2[i] + sum(hidden[j] * w2[j, i] for j in range(H)) for i in range(D)], hidden


def empty_output(layer, B):
    """Zeros of an MoEOutput's shapes, as numpy arrays to fill."""
    T, D, E, S = layer.num_tokens, layer.token_dim, layer.num_experts, layer.num_slots
    H = layer.experts.w1.shape[2]
    routing = [np.zeros((B, T, E, S)), np.zeros((B, T, E, S)), np.zeros((B, T, E)), np.zeros((B, T, E))]
    return np.zeros((B, T, D)), routing, np.zeros((B, E, S, H))


def as_output(tokens, routing, hidden):
    return MoEOutput(torch.from_numpy(tokens), Routing(*map(torch.from_numpy, routing)), torch.from_numpy(hidden))


def soft_logit(x, phi_column, scale, normalize):
    """One token, one slot."""
    if normalize:
        x = x / (math.sqrt(sum(v * v for v in x)) + 1e-6)
        phi_column = scale * phi_column / (math.sqrt(sum(v * v for v in phi_column)) + 1e-6)
    return sum(a * b for a, b in zip(x, phi_column, strict=True))


def soft_moe_oracle(layer, tokens, noise=None, phi=None):
    """Soft MoE (2308.00951), algorithm 1, slot by slot. `noise`: (p, q) per sample; `phi`: (D, E, S) per sample."""
    weights, tokens = weights_of(layer), tokens.numpy()
    B, T, D = tokens.shape
    E, S = layer.num_experts, layer.num_slots
    slots = [(e, s) for e in range(E) for s in range(S)]
    out, (dispatch, combine, router_logits, router_probs), hidden = empty_output(layer, B)
    for b in range(B):
        phi_b = weights["phi"] if phi is None else phi[b]
        logits = np.zeros((T, E, S))
        for t in range(T):
            for e, s in slots:
                logits[t, e, s] = soft_logit(tokens[b, t], phi_b[:, e, s], weights["scale"][0], layer.normalize)
        for e, s in slots:
            dispatch[b, :, e, s] = softmax([logits[t, e, s] for t in range(T)])
        for t in range(T):
            for (e, s), share in zip(slots, softmax([logits[t, e, s] for e, s in slots]), strict=True):
                combine[b, t, e, s] = share
            for e in range(E):
                router_logits[b, t, e] = math.log(sum(math.exp(logits[t, e, s]) for s in range(S)))
                router_probs[b, t, e] = statistics.fmean(combine[b, t, e])
        for e, s in slots:
            mixture = [sum(dispatch[b, t, e, s] * tokens[b, t, i] for t in range(T)) for i in range(D)]
            result, hidden[b, e, s] = expert_oracle(mixture, weights, e, noise and noise[b])
            for t in range(T):
                for i in range(D):
                    out[b, t, i] += combine[b, t, e, s] * result[i]
    return as_output(out, (dispatch, combine, router_logits, router_probs), hidden)


def top1_oracle(layer, tokens, noise=None, router_noise=None):
    """Switch routing, token by token: the best expert, a place in its queue while it has room, output times gate."""
    weights, tokens = weights_of(layer), tokens.numpy()
    B, T, D = tokens.shape
    E, S = layer.num_experts, layer.num_slots
    out, (dispatch, combine, router_logits, router_probs), hidden = empty_output(layer, B)
    for b in range(B):
        queues = [[] for _ in range(E)]
        for t in range(T):
            for e in range(E):
                router_logits[b, t, e] = sum(tokens[b, t, i] * weights["router.weight"][e, i] for i in range(D))
            noisy = router_logits[b, t] if router_noise is None else router_logits[b, t] + router_noise[b, t]
            router_probs[b, t] = softmax(list(noisy))
            best = max(range(E), key=lambda e: router_probs[b, t, e])
            if len(queues[best]) < S:
                queues[best].append(t)
        for e in range(E):
            for s in range(S):
                t = queues[e][s] if s < len(queues[e]) else None
                x = np.zeros(D) if t is None else tokens[b, t]
                result, hidden[b, e, s] = expert_oracle(x, weights, e, noise and noise[b])
                if t is not None:
                    dispatch[b, t, e, s] = 1
                    combine[b, t, e, s] = router_probs[b, t, e]
                    out[b, t] = router_probs[b, t, e] * np.array(result)
    return as_output(out, (dispatch, combine, router_logits, router_probs), hidden)


ORACLES = {SoftMoE: soft_moe_oracle, Top1MoE: top1_oracle}


def squared_variation_oracle(values):
    return statistics.pvariance(values) / statistics.fmean(values) ** 2


# --------------------------------------------------------------------------------------------- parity with the authors


def load_golden_layer(layer_class, arrays):
    E, D, H = arrays["w1"].shape
    layer = layer_class(arrays["tokens"].shape[1], D, E, H)
    router = ["phi", "scale"] if layer_class is SoftMoE else ["router_weight"]
    names = {"router_weight": "router.weight"} | {name: f"experts.{name}" for name in ("w1", "b1", "w2", "b2")}
    layer.load_state_dict({names.get(name, name): arrays[name] for name in [*router, "w1", "b1", "w2", "b2"]})
    return layer


@pytest.mark.parametrize("layer_class, name", [(SoftMoE, "layer_softmoe_n4"), (Top1MoE, "layer_top1_n4")])
def test_layers_reproduce_the_authors_outputs(layer_class, name):
    arrays = golden(name)
    output = load_golden_layer(layer_class, arrays)(arrays["tokens"])
    assert_close(output.tokens, arrays["out"], atol=1e-5)
    assert_close(output.hidden, arrays["hidden"], atol=1e-5)
    assert_close(output.routing.router_probs, arrays["router_probs"], atol=1e-5)


def test_top1_reproduces_the_authors_routing():
    arrays = golden("layer_top1_n4")
    routing = load_golden_layer(Top1MoE, arrays)(arrays["tokens"]).routing
    assert_close(routing.router_logits, arrays["router_logits"], atol=1e-5)
    assert torch.equal(routing.router_logits.argmax(dim=2), arrays["top_expert"].long())
    taken = routing.dispatch_weights.sum(dim=(2, 3))  # (B, T)
    assert (taken == 0).sum() == 12
    assert (taken == 1).sum() == taken.numel() - 12


def test_losses_reproduce_the_authors_values():
    arrays = golden("aux_losses")
    logits, noise_std = arrays["router_logits"], arrays["noise_std"].item()
    noisy_logits = logits + noise_std * arrays["unit_noise"]
    assert_close(importance_loss(logits.softmax(dim=2)), arrays["importance_loss"], atol=1e-5)
    assert_close(entropy_loss(logits.softmax(dim=2)), arrays["entropy_loss"], atol=1e-5)
    assert_close(load_loss(logits, noisy_logits, noise_std), arrays["load_loss"], atol=1e-5)


# -------------------------------------------------------------------------------------------------- layers and oracles


@pytest.mark.parametrize("capacity_factor", CAPACITY_FACTORS)
@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_layer_matches_its_oracle(layer_class, num_experts, capacity_factor):
    layer = small(layer_class, num_experts=num_experts, capacity_factor=capacity_factor)
    tokens = normal(2, 7, 5)
    assert layer.num_slots == -(-7 * capacity_factor // num_experts)
    assert_same_output(layer(tokens), ORACLES[layer_class](layer, tokens))


@pytest.mark.parametrize("num_experts", [1, 3])
def test_normalized_soft_moe_matches_its_oracle_and_mixes_raw_tokens(num_experts):
    layer = small(SoftMoE, num_experts=num_experts, normalize=True)
    nn.init.constant_(layer.scale, 2.5)
    tokens = normal(2, 7, 5) * 4
    assert_same_output(layer(tokens), soft_moe_oracle(layer, tokens))


def test_normalized_routing_does_not_depend_on_the_tokens_lengths_but_outputs_do():
    layer, tokens = small(SoftMoE, normalize=True), normal(2, 7, 5)
    once, thrice = layer(tokens), layer(3 * tokens)
    assert_close(thrice.routing.dispatch_weights, once.routing.dispatch_weights, atol=1e-5)
    assert not torch.allclose(thrice.tokens, once.tokens, atol=1e-2)


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
@pytest.mark.parametrize("num_experts", [1, 3])
def test_layer_with_one_token_matches_its_oracle(layer_class, num_experts):
    layer = small(layer_class, num_tokens=1, num_experts=num_experts)
    tokens = normal(4, 1, 5)
    assert layer.num_slots == 1
    assert_same_output(layer(tokens), ORACLES[layer_class](layer, tokens))


def one_sided_top1(**options):
    """A Top1MoE whose router sends every token with a positive first entry to expert 1."""
    layer = small(Top1MoE, num_experts=2, **options)
    nn.init.zeros_(layer.router.weight)
    nn.init.constant_(layer.router.weight[1, 0], 3.0)
    return layer


def test_top1_drops_the_last_tokens_of_a_full_expert_to_exactly_zero():
    layer, tokens = one_sided_top1(), normal(2, 7, 5)
    tokens[:, :, 0] = 1.0
    output = layer(tokens)
    assert layer.num_slots == 4
    assert (output.tokens[:, 4:] == 0).all()
    assert (output.tokens[:, :4].abs().sum(dim=2) > 0).all()
    assert torch.equal(output.routing.dispatch_weights[0, :4, 1], torch.eye(4, dtype=torch.float64))
    assert (output.routing.dispatch_weights[:, :, 0] == 0).all()


def test_top1_keeps_tokens_in_token_order_whatever_their_gates():
    layer, tokens = one_sided_top1(), normal(1, 7, 5)
    tokens[0, :, 0] = torch.arange(1, 8)  # later tokens are surer of expert 1
    kept = layer(tokens).routing.dispatch_weights.sum(dim=(2, 3))
    assert kept.tolist() == [[1, 1, 1, 1, 0, 0, 0]]


def test_top1_counts_capacity_per_sample():
    layer, tokens = one_sided_top1(), normal(2, 7, 5)
    tokens[0, :, 0], tokens[1, :, 0] = 1.0, torch.tensor([1.0, -1, -1, -1, 1, 1, 1])
    kept = layer(tokens).routing.dispatch_weights.sum(dim=(2, 3))
    assert kept.tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]


def test_top1_scales_outputs_by_the_gate_probability():
    layer, tokens = one_sided_top1(capacity_factor=2.0), normal(1, 7, 5)
    tokens[0, :, 0] = 0.5
    output = layer(tokens)
    gate = 1 / (1 + math.exp(-1.5))
    expert, _ = layer.experts(tokens[:, None].expand(1, 2, 7, 5))
    assert_close(output.tokens[0], gate * expert[0, 1])
    assert_close(output.routing.combine_weights.sum(dim=(2, 3)), torch.full((1, 7), gate, dtype=torch.float64))


def test_top1_router_noise_acts_in_training_mode_only(draws):
    layer, tokens = small(Top1MoE, router_noise_std=0.7), normal(2, 7, 5)
    quiet = layer(tokens)
    assert not draws
    assert_same_output(quiet, top1_oracle(layer, tokens))
    loud = layer.train()(tokens)
    (noise,) = draws
    assert_same_output(loud, top1_oracle(layer, tokens, router_noise=0.7 * noise.numpy()))
    assert_close(loud.routing.router_logits, quiet.routing.router_logits)
    assert not torch.allclose(loud.routing.router_probs, quiet.routing.router_probs, atol=1e-3)


def test_top1_without_router_noise_draws_nothing_in_training_mode(draws):
    layer, tokens = small(Top1MoE), normal(2, 7, 5)
    assert_same_output(layer.train()(tokens), layer.eval()(tokens))
    assert not draws


def test_unlearned_phi_matches_the_oracle(draws):
    layer, tokens = small(SoftMoE, learned_phi=False, normalize=True), normal(2, 7, 5)
    output = layer(tokens)
    (phi,) = draws
    phi = phi.reshape(2, 5, layer.num_experts, layer.num_slots).numpy()
    assert_same_output(output, soft_moe_oracle(layer, tokens, phi=phi))


@pytest.mark.parametrize("training", [False, True])
def test_unlearned_phi_is_a_unit_normal_drawn_afresh_for_every_sample_and_forward(training):
    layer = SoftMoE(4, 4, 4, 3, learned_phi=False).train(training)  # one slot per expert
    tokens = torch.eye(4).expand(2000, 4, 4)  # one-hot tokens: the logits are phi itself
    first, second = layer(tokens).routing.router_logits, layer(tokens).routing.router_logits
    assert abs(first.mean()) < 0.03
    assert first.std() == pytest.approx(1, abs=0.02)
    correlations = torch.corrcoef(torch.stack([first[::2].flatten(), first[1::2].flatten(), second[::2].flatten()]))
    assert_close(correlations, torch.eye(3), atol=0.03)


# ------------------------------------------------------------------------------------------------------- tokenizers


def test_tokenize_matches_loops_over_the_feature_map():
    B, C, h, w = 2, 3, 4, 5
    features = torch.arange(B * C * h * w, dtype=torch.float64).view(B, C, h, w)
    per_conv, per_feat, per_samp = (tokenize(features, name) for name in ("PerConv", "PerFeat", "PerSamp"))
    assert (per_conv.shape, per_feat.shape, per_samp.shape) == ((B, 20, C), (B, C, 20), (B, 1, 60))
    for b in range(B):
        for c in range(C):
            for y in range(h):
                for x in range(w):
                    expected = features[b, c, y, x]
                    assert per_conv[b, y * w + x, c] == expected
                    assert per_feat[b, c, y * w + x] == expected
                    assert per_samp[b, 0, (y * w + x) * C + c] == expected


@pytest.mark.parametrize("name", ["PerConv", "PerFeat", "PerSamp", "PerPatch", "PerPatchAvg"])
def test_every_listed_tokenization_is_a_function_or_a_patch_tokenizer(name):
    features = normal(2, 3, 6, 6)
    if name.startswith("PerPatch"):
        assert randomise(PatchTokenizer(3, average=name == "PerPatchAvg"))(features).shape == (2, 4, 3)
    else:
        assert tokenize(features, name).numel() == features.numel()


def patches(features, size):
    """Every whole patch of one sample (C, h, w), row by row."""
    _, h, w = features.shape
    for top in range(0, h - size + 1, size):
        for left in range(0, w - size + 1, size):
            yield features[:, top : top + size, left : left + size]


@pytest.mark.parametrize("size, map_size", [(3, (11, 11)), (3, (3, 8)), (2, (5, 4))])
def test_patch_convolution_matches_loops_over_patches(size, map_size):
    tokenizer = randomise(PatchTokenizer(3, 4, patch_size=size))
    features = normal(2, 3, *map_size)
    expected = torch.zeros(2, (map_size[0] // size) * (map_size[1] // size), 4, dtype=torch.float64)
    weight, bias = tokenizer.embedding.weight, tokenizer.embedding.bias
    for b in range(2):
        for t, patch in enumerate(patches(features[b], size)):
            for channel in range(4):
                expected[b, t, channel] = (weight[channel] * patch).sum() + bias[channel]
    assert_close(tokenizer(features), expected)


@pytest.mark.parametrize("size, map_size", [(3, (11, 11)), (2, (5, 4))])
def test_patch_average_matches_loops_over_patches(size, map_size):
    tokenizer = PatchTokenizer(3, patch_size=size, average=True)
    features = normal(2, 3, *map_size)
    expected = [[[patch[c].mean() for c in range(3)] for patch in patches(features[b], size)] for b in range(2)]
    assert_close(tokenizer(features), torch.tensor(expected, dtype=torch.float64))
    assert not list(tokenizer.parameters())


# ------------------------------------------------------------------------------------------- dense and noisy layers


def test_dense_layer_is_flatten_linear_relu():
    layer, x = randomise(DenseLayer(12, 4)), normal(3, 2, 3, 2)
    weight, bias = layer.linear.weight, layer.linear.bias
    output = layer(x)
    for b in range(3):
        flat = [x[b, i, j, k] for i in range(2) for j in range(3) for k in range(2)]
        for j in range(4):
            expected = max(0.0, bias[j].item() + sum((weight[j, i] * flat[i]).item() for i in range(12)))
            assert output[b, j].item() == pytest.approx(expected, abs=1e-10)


def test_noisy_dense_layer_is_the_relu_of_a_noisy_linear_layer():
    layer, x = randomise(DenseLayer(6, 4, noisy=True)), normal(3, 2, 3)
    assert isinstance(layer.linear, NoisyLinear)
    torch.manual_seed(1)
    expected = layer.linear.train()(x.flatten(1)).relu()
    torch.manual_seed(1)
    assert_close(layer(x), expected)


def test_noisy_linear_matches_its_oracle(draws):
    layer, x = randomise(NoisyLinear(5, 3)), normal(4, 5)
    output = layer.train()(x)
    noise = {draw.shape[-1]: draw.numpy() for draw in draws}  # p (B, 5) and q (B, 3)
    weights = weights_of(layer)
    matrices = weights["weight"].T, weights["bias"], weights["weight_sigma"].T, weights["bias_sigma"]
    for b in range(4):
        weight, bias = noisy_weights(*matrices, noise[5][b], noise[3][b])
        for j in range(3):
            expected = bias[j] + sum(x[b, i].item() * weight[i, j] for i in range(5))
            assert output[b, j].item() == pytest.approx(expected, abs=1e-10)


def test_noisy_linear_is_silent_in_evaluation_mode(draws):
    layer, x = randomise(NoisyLinear(5, 3)), normal(4, 5)
    expected = torch.stack([layer.weight @ sample + layer.bias for sample in x])
    assert_close(layer(x), expected)
    assert not draws


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_noisy_experts_match_the_oracle(layer_class, draws):
    layer, tokens = small(layer_class, noisy=True), normal(2, 7, 5)
    output = layer.train()(tokens)
    p, q = draws
    noise = list(zip(p.reshape(2, 5).numpy(), q.reshape(2, 6).numpy(), strict=True))
    assert_same_output(output, ORACLES[layer_class](layer, tokens, noise=noise))


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_noisy_experts_are_silent_in_evaluation_mode(layer_class, draws):
    layer, tokens = small(layer_class, noisy=True), normal(2, 7, 5)
    assert_same_output(layer(tokens), ORACLES[layer_class](layer, tokens))
    assert not draws


def noise_of_repeated_sample(module, x, count):
    """`count` draws of a module's noise on the same input: (count, ...), training minus evaluation output."""
    x = x.expand(count, *x.shape)
    with torch.no_grad():
        mean = module.eval()(x)
        noisy = module.train()(x)
    if isinstance(mean, tuple):  # experts return outputs and hidden activations: the noise enters the latter
        return noisy[1] - mean[1]
    return noisy - mean


def assert_noise_moments(noise, variance):
    """Zero mean and the given variances, over the first axis."""
    standard_error = (variance / len(noise)).sqrt()
    assert (noise.mean(dim=0).abs() < 5 * standard_error).all()
    torch.testing.assert_close(noise.var(dim=0), variance, rtol=0.08, atol=0)


def test_noise_of_noisy_linear_has_zero_mean_and_the_predicted_variance_per_sample():
    layer, x = randomise(NoisyLinear(4, 3)), normal(4)
    noise = noise_of_repeated_sample(layer, x, 20000)  # (N, 3)
    weight = layer.weight_sigma.detach().square() @ x.square() * MEAN_ABS_NORMAL
    variance = (weight + layer.bias_sigma.detach().square()) * MEAN_ABS_NORMAL
    assert_noise_moments(noise, variance)
    assert torch.corrcoef(torch.stack([noise[::2, 0], noise[1::2, 0]]))[0, 1].abs() < 0.05


def loud_experts(num_experts=2):
    """Noisy experts whose biases keep every unit active, so that hidden activations show the noise linearly."""
    experts = randomise(moe_layers.Experts(num_experts, 3, 4, noisy=True))
    nn.init.constant_(experts.b1, 1000.0)
    return experts


def test_noise_of_experts_has_zero_mean_and_the_predicted_variance_per_sample():
    experts, slots = loud_experts(), normal(2, 1, 3)
    noise = noise_of_repeated_sample(experts, slots, 20000)[:, :, 0]  # (N, E, H)
    weight = torch.einsum("ed,edh->eh", slots[:, 0].square(), experts.w1_sigma.detach().square()) * MEAN_ABS_NORMAL
    variance = (weight + experts.b1_sigma.detach().square()) * MEAN_ABS_NORMAL
    assert_noise_moments(noise, variance)
    assert torch.corrcoef(torch.stack([noise[::2, 0, 0], noise[1::2, 0, 0]]))[0, 1].abs() < 0.05


def test_noise_of_experts_is_shared_by_all_experts_and_slots_of_a_sample_and_by_no_other_sample():
    experts = loud_experts(num_experts=3)
    for parameter in experts.parameters():
        parameter.data.copy_(parameter.data[:1].expand_as(parameter))  # every expert is the same
    hidden = experts.train()(normal(3).expand(2, 3, 4, 3))[1]  # (B, E, S, H)
    assert_close(hidden, hidden[:, :1, :1].expand_as(hidden))
    assert ((hidden[0] - hidden[1]).abs() > 1e-6).all()


@pytest.mark.parametrize("build", [lambda: SoftMoE(7, 5, 3, 6, noisy=True), lambda: Top1MoE(7, 5, 3, 6, noisy=True)])
def test_gradients_reach_the_sigmas_of_noisy_experts(build):
    layer = build()
    layer(torch.randn(8, 7, 5)).tokens.square().sum().backward()
    assert (layer.experts.w1_sigma.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert (layer.experts.b1_sigma.grad.abs().sum(dim=1) > 0).all()


def test_gradients_reach_the_sigmas_of_noisy_linear():
    layer = NoisyLinear(5, 3)
    layer(torch.randn(4, 5)).square().sum().backward()
    assert (layer.weight_sigma.grad != 0).all()
    assert (layer.bias_sigma.grad != 0).all()


# --------------------------------------------------------------------------------------- parameters, initialisation

EXPERT_SHAPES = {"experts.w1": (3, 5, 6), "experts.b1": (3, 6), "experts.w2": (3, 6, 5), "experts.b2": (3, 5)}
SIGMA_SHAPES = {"experts.w1_sigma": (3, 5, 6), "experts.b1_sigma": (3, 6)}


@pytest.mark.parametrize(
    "layer, expected",
    [
        (SoftMoE(7, 5, 3, 6), {"phi": (5, 3, 3), "scale": (1,)} | EXPERT_SHAPES),
        (SoftMoE(7, 5, 3, 6, noisy=True), {"phi": (5, 3, 3), "scale": (1,)} | EXPERT_SHAPES | SIGMA_SHAPES),
        (SoftMoE(7, 5, 3, 6, learned_phi=False), {"scale": (1,)} | EXPERT_SHAPES),
        (Top1MoE(7, 5, 3, 6), {"router.weight": (3, 5)} | EXPERT_SHAPES),
        (Top1MoE(7, 5, 3, 6, noisy=True), {"router.weight": (3, 5)} | EXPERT_SHAPES | SIGMA_SHAPES),
        (NoisyLinear(5, 3), {"weight": (3, 5), "bias": (3,), "weight_sigma": (3, 5), "bias_sigma": (3,)}),
        (DenseLayer(5, 3), {"linear.weight": (3, 5), "linear.bias": (3,)}),
        (PatchTokenizer(3, 4), {"embedding.weight": (4, 3, 3, 3), "embedding.bias": (4,)}),
    ],
)
def test_parameters_have_the_documented_names_and_shapes(layer, expected):
    assert shapes_of(layer) == expected
    assert set(layer.state_dict()) == set(expected)


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_experts_have_512_hidden_units_by_default(layer_class):
    assert layer_class(7, 5, 3).experts.w1.shape == (3, 5, 512)


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
@pytest.mark.parametrize("num_experts, num_slots", [(1, 121), (2, 61), (4, 31), (8, 16)])
def test_slots_share_the_tokens_rounded_up(layer_class, num_experts, num_slots):
    assert layer_class(121, 4, num_experts, 4).num_slots == num_slots


def assert_truncated_normal(weight, std):
    """Of the given std after a cut at two sigma: no entry beyond the cut, some close to it."""
    cut = 2 * std / TRUNCATED_STD
    assert weight.std().item() == pytest.approx(std, rel=0.04)
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())
    assert 0.97 * cut < weight.abs().max().item() <= cut * (1 + 1e-6)


def assert_uniform(weight, bound):
    assert 0.98 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04)
    assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * weight.numel())


@pytest.mark.parametrize("num_experts", [1, 8])
def test_phi_starts_as_a_truncated_normal_with_fan_in_experts_times_token_dim(num_experts):
    layer = SoftMoE(121, 64, num_experts, 4)
    assert_truncated_normal(layer.phi.detach(), (num_experts * 64) ** -0.5)
    assert layer.scale.item() == 1


def test_router_starts_as_a_truncated_normal_with_fan_in_token_dim():
    assert_truncated_normal(Top1MoE(8, 512, 16, 4).router.weight.detach(), 512**-0.5)


def test_patch_embedding_starts_as_a_truncated_normal_with_zero_bias():
    embedding = PatchTokenizer(16, 64).embedding
    assert_truncated_normal(embedding.weight.detach(), (16 * 9) ** -0.5)
    assert (embedding.bias == 0).all()


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_experts_start_xavier_uniform_each_on_its_own_with_zero_biases(layer_class):
    experts = layer_class(121, 48, 8, 96).experts
    for weight in (experts.w1.detach(), experts.w2.detach()):
        for expert in weight:
            assert_uniform(expert, math.sqrt(6 / (48 + 96)))
        assert len({expert.sum().item() for expert in weight}) == 8
    assert (experts.b1 == 0).all()
    assert (experts.b2 == 0).all()


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_noisy_experts_start_with_a_noisy_first_and_a_plain_second_layer(layer_class):
    experts = layer_class(121, 48, 8, 512, noisy=True).experts
    bound = 48**-0.5
    assert_uniform(experts.w1.detach(), bound)
    assert_uniform(experts.b1.detach(), bound)
    assert_uniform(experts.w2.detach(), math.sqrt(6 / (48 + 512)))
    assert (experts.b2 == 0).all()
    assert torch.allclose(experts.w1_sigma, torch.tensor(0.1 * bound))
    assert torch.allclose(experts.b1_sigma, torch.tensor(0.1 * bound))


@pytest.mark.parametrize("sigma_0", [None, 0.5])
def test_noisy_linear_starts_uniform_with_constant_sigmas(sigma_0):
    layer = NoisyLinear(64, 2048) if sigma_0 is None else NoisyLinear(64, 2048, sigma_0)
    assert_uniform(layer.weight.detach(), 64**-0.5)
    assert_uniform(layer.bias.detach(), 64**-0.5)
    sigma = torch.tensor((sigma_0 or 0.1) / 8)
    assert torch.allclose(layer.weight_sigma, sigma)
    assert torch.allclose(layer.bias_sigma, sigma)


def test_dense_layer_starts_xavier_uniform_with_zero_bias():
    linear = DenseLayer(96, 128).linear
    assert_uniform(linear.weight.detach(), math.sqrt(6 / (96 + 128)))
    assert (linear.bias == 0).all()


# ------------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("normalize", [False, True])
def test_soft_moe_dispatch_sums_to_one_over_tokens_and_combine_over_slots(normalize):
    layer = small(SoftMoE, normalize=normalize)
    routing = layer(10 * normal(2, 7, 5)).routing
    assert_close(routing.dispatch_weights.sum(dim=1), torch.ones(2, 3, 3))
    assert_close(routing.combine_weights.sum(dim=(2, 3)), torch.ones(2, 7))


def test_top1_gives_every_slot_one_token_at_most_and_every_token_one_slot_at_most():
    dispatch = small(Top1MoE)(normal(20, 7, 5)).routing.dispatch_weights
    assert set(dispatch.unique().tolist()) == {0.0, 1.0}
    assert dispatch.sum(dim=1).max() == 1
    assert dispatch.sum(dim=(2, 3)).max() == 1


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_order_of_the_experts_does_not_matter(layer_class):
    layer, tokens, order = small(layer_class), normal(2, 7, 5), [2, 0, 1]
    before = layer(tokens)
    for name, parameter in layer.named_parameters():
        if name != "scale":
            parameter.data.copy_(parameter.data[:, order] if name == "phi" else parameter.data[order])
    after = layer(tokens)
    assert_close(after.tokens, before.tokens)
    assert_close(after.hidden, before.hidden[:, order])
    assert_close(after.routing.router_probs, before.routing.router_probs[:, :, order])


def test_soft_moe_is_equivariant_to_the_order_of_the_tokens():
    layer, tokens, order = small(SoftMoE), normal(2, 7, 5), torch.randperm(7)
    assert_close(layer(tokens[:, order]).tokens, layer(tokens).tokens[:, order])


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_output_of_a_sample_does_not_depend_on_the_other_samples(layer_class):
    layer, tokens = small(layer_class), normal(3, 7, 5)
    together = layer(tokens)
    for b in range(3):
        alone = layer(tokens[b : b + 1])
        assert_close(together.tokens[b], alone.tokens[0])
        assert_close(together.hidden[b], alone.hidden[0])


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_forward_leaves_no_state_behind(layer_class):
    layer = small(layer_class, noisy=True).train()
    state, attributes = layer.state_dict(), set(vars(layer))
    copies = {name: value.clone() for name, value in state.items()}
    layer(normal(2, 7, 5))
    assert set(vars(layer)) == attributes
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in copies.items())


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_outputs_have_the_documented_shapes_and_dtype(layer_class):
    layer = layer_class(7, 5, 3, 6, noisy=True)
    for dtype in (torch.float32, torch.float64):
        output = layer.to(dtype)(torch.randn(2, 7, 5, dtype=dtype))
        assert {tensor.dtype for tensor in (output.tokens, output.hidden, *output.routing)} == {dtype}
        assert output.tokens.shape == (2, 7, 5)
        assert output.hidden.shape == (2, 3, 3, 6)
        assert output.hidden.min() == 0
        assert [tuple(tensor.shape) for tensor in output.routing] == [(2, 7, 3, 3)] * 2 + [(2, 7, 3)] * 2


def test_tuples_have_the_documented_fields():
    assert MoEOutput._fields == ("tokens", "routing", "hidden")
    assert Routing._fields == ("dispatch_weights", "combine_weights", "router_logits", "router_probs")


@pytest.mark.parametrize(
    "layer_class, options",
    [(SoftMoE, {}), (SoftMoE, {"normalize": True}), (Top1MoE, {}), (Top1MoE, {"capacity_factor": 0.5})],
)
def test_gradients_match_finite_differences(layer_class, options):
    layer, tokens = small(layer_class, 3, 2, 2, 3, **options), normal(2, 3, 2).requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(tokens, *parameters):
        output = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), tokens)
        return output.tokens, output.hidden, output.routing.router_logits, output.routing.router_probs

    assert torch.autograd.gradcheck(forward, (tokens, *parameters))


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_gradients_reach_every_parameter_that_takes_part(layer_class):
    options = {"normalize": True} if layer_class is SoftMoE else {}
    layer = small(layer_class, noisy=True, **options).train()
    layer(normal(16, 7, 5)).tokens.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_normalized_soft_moe_has_finite_gradients_for_zero_tokens():
    layer, tokens = small(SoftMoE, normalize=True), torch.zeros(2, 7, 5, dtype=torch.float64, requires_grad=True)
    layer(tokens).tokens.sum().backward()
    assert tokens.grad.isfinite().all()
    assert layer.phi.grad.isfinite().all()


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
def test_huge_logits_do_not_overflow(layer_class):
    output = layer_class(7, 5, 3, 6)(1e6 * torch.randn(2, 7, 5))
    assert all(tensor.isfinite().all() for tensor in (output.tokens, output.hidden, *output.routing))


# -------------------------------------------------------------------------------------------- load-balancing losses


def importance_oracle(probs):
    B, T, E = probs.shape
    importance = [[sum(probs[b, t, e].item() for t in range(T)) for e in range(E)] for b in range(B)]
    return statistics.fmean(squared_variation_oracle(row) for row in importance)


def load_oracle(logits, noisy_logits, noise_std):
    """P(logit + noise_std * N(0, 1) > the highest noisy logit), averaged over the tokens of an expert."""
    B, T, E = logits.shape
    losses = []
    for b in range(B):
        load = [0.0] * E
        for t in range(T):
            threshold = max(noisy_logits[b, t].tolist())
            for e in range(E):
                z = (threshold - logits[b, t, e].item()) / noise_std
                load[e] += (1 - statistics.NormalDist().cdf(z)) / T
        losses.append(squared_variation_oracle(load))
    return statistics.fmean(losses)


def entropy_oracle(probs):
    B, T, E = probs.shape
    losses = []
    for b in range(B):
        histogram = [0] * E
        for t in range(T):
            histogram[max(range(E), key=lambda e: probs[b, t, e].item())] += 1
        shares = [count / T for count in histogram if count]
        losses.append(1 + sum(share * math.log(share) for share in shares) / math.log(E))
    return statistics.fmean(losses)


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_losses_match_their_oracles(num_experts):
    logits, noise = normal(3, 11, num_experts), normal(3, 11, num_experts)
    probs, noise_std = logits.softmax(dim=2), 1 / num_experts
    noisy_logits = logits + noise_std * noise
    assert importance_loss(probs).item() == pytest.approx(importance_oracle(probs), abs=1e-10)
    assert load_loss(logits, noisy_logits, noise_std).item() == pytest.approx(
        load_oracle(logits, noisy_logits, noise_std), abs=1e-10
    )
    assert entropy_loss(probs).item() == pytest.approx(entropy_oracle(probs), abs=1e-5)


def test_losses_are_zero_for_balanced_experts():
    probs = torch.eye(4).repeat(2, 3, 1)  # (2, 12, 4): every expert is the top one of three tokens
    assert importance_loss(probs).item() == pytest.approx(0, abs=1e-6)
    assert load_loss(10 * probs, 10 * probs, 0.25).item() == pytest.approx(0, abs=1e-6)
    assert entropy_loss(probs).item() == pytest.approx(0, abs=1e-5)


def test_losses_are_largest_when_one_expert_takes_all():
    probs = torch.eye(4)[2].repeat(2, 12, 1)
    assert importance_loss(probs).item() == pytest.approx(3)  # (std / mean)^2 of one-hot shares: E - 1
    assert load_loss(100 * probs, 100 * probs, 0.25).item() == pytest.approx(3)
    assert entropy_loss(probs).item() == pytest.approx(1, abs=1e-4)


def test_losses_are_averaged_over_the_batch():
    logits = normal(2, 11, 4)
    noisy = logits + 0.25 * normal(2, 11, 4)
    cases = [
        (importance_loss, (logits.softmax(2),), ()),
        (entropy_loss, (logits.softmax(2),), ()),
        (load_loss, (logits, noisy), (0.25,)),
    ]
    for loss, tensors, rest in cases:
        alone = [loss(*(tensor[b : b + 1] for tensor in tensors), *rest).item() for b in range(2)]
        assert loss(*tensors, *rest).shape == ()
        assert loss(*tensors, *rest).item() == pytest.approx(statistics.fmean(alone), abs=1e-6)


def test_importance_and_load_losses_have_gradients_and_entropy_loss_has_none():
    layer, tokens = small(Top1MoE), normal(2, 7, 5)
    routing = layer(tokens).routing
    for loss in (importance_loss(routing.router_probs), load_loss(routing.router_logits, routing.router_logits, 0.3)):
        (gradient,) = torch.autograd.grad(loss, layer.router.weight, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert not entropy_loss(routing.router_probs).requires_grad


def test_gradients_of_importance_and_load_losses_match_finite_differences():
    logits, noise = normal(2, 5, 3).requires_grad_(), normal(2, 5, 3)
    assert torch.autograd.gradcheck(lambda logits: importance_loss(logits.softmax(2)), (logits,))
    assert torch.autograd.gradcheck(lambda logits: load_loss(logits, logits + noise / 3, 1 / 3), (logits,))


# ------------------------------------------------------------------------------------------------------- statistics


def output_with(*, router_probs=None, combine_weights=None, hidden=None):
    """An MoEOutput made by hand for two experts with one slot each; what is not given is all ones."""
    combine_weights = torch.ones(1, 2, 2, 1) if combine_weights is None else torch.tensor(combine_weights)
    B, T, E, S = combine_weights.shape
    router_probs = torch.ones(B, T, E) if router_probs is None else torch.tensor(router_probs)
    hidden = torch.ones(B, E, S, 3) if hidden is None else torch.tensor(hidden)
    routing = Routing((combine_weights > 0).float(), combine_weights, router_probs.log(), router_probs)
    return MoEOutput(torch.zeros(B, T, 5), routing, hidden)


def stats_of(**fields):
    return {key: value.item() for key, value in routing_stats(output_with(**fields)).items()}


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
@pytest.mark.parametrize("num_experts", [1, 3])
def test_routing_stats_are_scalar_tensors_with_the_documented_keys(layer_class, num_experts):
    stats = routing_stats(small(layer_class, num_experts=num_experts)(normal(2, 7, 5)))
    per_expert = {f"{name}/{e}" for name in ("expert_load", "dormant_fraction") for e in range(num_experts)}
    assert set(stats) == {"router_entropy", "dropped_fraction", "dormant_fraction"} | per_expert
    assert all(value.shape == () and not value.requires_grad for value in stats.values())
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in stats.values())


@pytest.mark.parametrize("scale", [1.0, 0.1])  # Soft MoE's averaged combine weights sum to 1/S
@pytest.mark.parametrize(
    "probs, entropy",
    [
        ([[0.5, 0.5], [0.5, 0.5]], 1.0),
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([[0.5, 0.5], [0.0, 1.0]], 0.5),
        ([[0.25, 0.75], [0.75, 0.25]], -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))),
    ],
)
def test_router_entropy_of_handmade_probabilities(probs, entropy, scale):
    probs = [[[scale * prob for prob in token] for token in probs]]
    assert stats_of(router_probs=probs)["router_entropy"] == pytest.approx(entropy, abs=1e-6)


def test_router_entropy_of_uniform_soft_routing_is_one():
    layer = small(SoftMoE)
    nn.init.zeros_(layer.phi)
    stats = routing_stats(layer(normal(2, 7, 5)))
    assert stats["router_entropy"].item() == pytest.approx(1)
    assert [stats[f"expert_load/{e}"].item() for e in range(3)] == pytest.approx([1 / 3] * 3)


def test_router_entropy_of_one_expert_is_zero():
    assert routing_stats(small(Top1MoE, num_experts=1)(normal(2, 7, 5)))["router_entropy"] == 0


def test_expert_load_of_sparse_routing_counts_tokens_and_not_gates():
    combine = [[[[0.9], [0.0]], [[0.0], [0.6]], [[0.0], [0.0]], [[0.0], [0.0]]]]  # two tokens dropped
    stats = stats_of(combine_weights=combine)
    assert stats["dropped_fraction"] == 0.5
    assert stats["expert_load/0"] == pytest.approx(0.25)
    assert stats["expert_load/1"] == pytest.approx(0.25)


def test_expert_load_of_soft_routing_is_the_share_of_the_combine_weights():
    combine = [[[[0.1, 0.2], [0.3, 0.4]], [[0.4, 0.4], [0.1, 0.1]]]]
    stats = stats_of(combine_weights=combine)
    assert stats["dropped_fraction"] == 0
    assert stats["expert_load/0"] == pytest.approx((0.3 + 0.8) / 2)
    assert stats["expert_load/1"] == pytest.approx((0.7 + 0.2) / 2)


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
@pytest.mark.parametrize("capacity_factor", CAPACITY_FACTORS)
def test_expert_loads_sum_to_the_share_of_tokens_that_was_not_dropped(layer_class, capacity_factor):
    output = small(layer_class, capacity_factor=capacity_factor)(normal(4, 7, 5))
    stats = routing_stats(output)
    dropped = (output.routing.dispatch_weights.sum(dim=(2, 3)) == 0).double().mean().item()
    assert stats["dropped_fraction"].item() == pytest.approx(0 if layer_class is SoftMoE else dropped)
    assert sum(stats[f"expert_load/{e}"].item() for e in range(3)) == pytest.approx(
        1 - stats["dropped_fraction"].item()
    )


# two samples, two experts, one slot, three units: unit 0 is dead in expert 0 only, unit 1 in both, unit 2 in neither
HALF_DEAD = [[[[0.0, 0.0, 1.0]], [[2.0, 0.0, 0.0]]], [[[0.0, 0.0, 0.0]], [[0.0, 0.0, 3.0]]]]


def test_dormant_units_are_counted_per_expert():
    stats = stats_of(hidden=HALF_DEAD)
    assert stats["dormant_fraction/0"] == pytest.approx(2 / 3)
    assert stats["dormant_fraction/1"] == pytest.approx(1 / 3)
    assert stats["dormant_fraction"] == pytest.approx(1 / 2)
    assert dormant_fraction(torch.tensor(HALF_DEAD)).item() == pytest.approx(1 / 2)


def test_the_authors_variant_of_dormant_units_must_be_dead_in_every_expert():
    assert dormant_fraction(torch.tensor(HALF_DEAD).flatten(0, 2)).item() == pytest.approx(1 / 3)


def test_a_unit_that_is_alive_in_one_slot_is_not_dormant():
    hidden = torch.zeros(2, 1, 3, 2)
    hidden[1, 0, 2, 0] = 1e-3
    assert dormant_fraction(hidden).item() == 0.5


@pytest.mark.parametrize("tau, expected", [(0.0, 0.25), (0.4, 0.25), (0.5, 0.5), (1.0, 0.75), (2.5, 1.0)])
def test_dormant_fraction_compares_scores_with_tau_times_their_mean(tau, expected):
    hidden = torch.tensor([[0.0, 1, 2, 1], [0, -1, 2, 9]])  # mean |h|: 0, 1, 2, 5, and 2 over the layer
    assert dormant_fraction(hidden, tau).item() == expected


def test_dormant_fraction_measures_experts_against_the_mean_of_the_whole_layer():
    hidden = torch.tensor([0.1, 1.9])[None, :, None, None].expand(2, 2, 3, 4)
    assert dormant_fraction(hidden, 0.2).item() == 0.5


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 1, 4)])
def test_dormant_fraction_of_a_dead_layer_is_one_and_of_a_live_layer_zero(shape):
    assert dormant_fraction(torch.zeros(shape), 0.1).item() == 1
    assert dormant_fraction(torch.ones(shape, requires_grad=True), 0.1).item() == 0
    assert dormant_fraction(torch.ones(shape, requires_grad=True)).shape == ()


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["PerPatch", "PerPatchAvg", "perconv", ""])
def test_tokenize_rejects_other_names(name):
    with pytest.raises(ValueError, match="is not 'PerConv'"):
        tokenize(torch.zeros(1, 2, 3, 3), name)


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("argument", ["in_channels", "token_dim", "patch_size"])
def test_patch_tokenizer_rejects_sizes_below_one(argument, size):
    with pytest.raises(ValueError, match=argument):
        PatchTokenizer(**({"in_channels": 3, "token_dim": 4, "patch_size": 3} | {argument: size}))


def test_patch_tokenizer_rejects_a_token_dim_that_averages_do_not_have():
    with pytest.raises(ValueError, match="token_dim 4"):
        PatchTokenizer(3, 4, average=True)
    assert PatchTokenizer(3, 3, average=True)(torch.zeros(1, 3, 3, 3)).shape == (1, 1, 3)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("map_size", [(2, 9), (9, 2)])
def test_patch_tokenizer_rejects_feature_maps_smaller_than_a_patch(map_size, average):
    with pytest.raises(ValueError, match=f"{map_size[0]}x{map_size[1]}"):
        PatchTokenizer(3, average=average)(torch.zeros(1, 3, *map_size))


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
@pytest.mark.parametrize("size", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("argument", ["num_tokens", "token_dim", "num_experts", "hidden_dim", "capacity_factor"])
def test_moe_layers_reject_sizes_out_of_range(layer_class, argument, size):
    sizes = {"num_tokens": 7, "token_dim": 5, "num_experts": 3, "hidden_dim": 6}
    with pytest.raises(ValueError, match=argument):
        layer_class(**(sizes | {argument: size}))


def test_top1_rejects_negative_router_noise():
    with pytest.raises(ValueError, match="router_noise_std"):
        Top1MoE(7, 5, 3, 6, router_noise_std=-0.1)


@pytest.mark.parametrize("layer_class", MOE_LAYERS)
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 7, 4), (2, 5, 7), (7, 5), (1, 2, 7, 5)])
def test_moe_layers_reject_tokens_of_another_shape(layer_class, shape):
    with pytest.raises(ValueError, match="expected tokens of shape"):
        layer_class(7, 5, 3, 6)(torch.zeros(shape))


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("build, argument", [(NoisyLinear, "out_features"), (DenseLayer, "hidden_dim")])
def test_linear_layers_reject_sizes_below_one(build, argument, size):
    with pytest.raises(ValueError, match="in_features"):
        build(size, 3)
    with pytest.raises(ValueError, match=argument):
        build(3, size)


# ------------------------------------------------------------------------------- static shapes, no wait for the device

OPTIONS = [
    (SoftMoE, {"noisy": True, "normalize": True}),
    (SoftMoE, {"learned_phi": False, "capacity_factor": 0.5}),
    (Top1MoE, {"noisy": True, "router_noise_std": 0.3}),
    (Top1MoE, {"capacity_factor": 0.5}),
]


def run_everything(layer, tokens):
    """Forward, backward, statistics and losses; returns every tensor that comes out."""
    output = layer(tokens)
    routing = output.routing
    losses = [
        importance_loss(routing.router_probs),
        load_loss(routing.router_logits, routing.router_logits, 0.3),
        entropy_loss(routing.router_probs),
    ]
    (output.tokens.sum() + sum(losses)).backward()
    dormant = [dormant_fraction(output.hidden, 0.1), dormant_fraction(output.hidden.flatten(0, 2))]
    return [output.tokens, output.hidden, *routing, *losses, *routing_stats(output).values(), *dormant]


def test_fake_tensors_refuse_operations_whose_result_depends_on_the_data():
    with FakeTensorMode():
        with pytest.raises(DataDependentOutputException):
            torch.ones(3).sum().item()
        with pytest.raises(DynamicOutputShapeException):
            torch.ones(3).nonzero()


def without_data(module, mode):
    """The module with fake tensors, which have a shape and no data, for parameters."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            child.register_parameter(name, mode.from_tensor(parameter))
    return module


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer_class, options", OPTIONS)
def test_layers_run_without_data(layer_class, options, training):
    mode = FakeTensorMode()
    layer = without_data(layer_class(7, 5, 3, 6, **options).train(training), mode)
    with mode:
        tensors = run_everything(layer, torch.zeros(2, 7, 5))
    assert tensors[0].shape == (2, 7, 5)


@pytest.mark.parametrize(
    "module, shape",
    [(NoisyLinear(6, 3), (2, 6)), (DenseLayer(6, 3), (2, 6)), (PatchTokenizer(6), (2, 6, 3, 3))],
)
def test_other_modules_run_without_data(module, shape):
    mode = FakeTensorMode()
    without_data(module, mode)
    with mode:
        module(torch.zeros(shape)).sum().backward()


@pytest.mark.parametrize("layer_class, options", OPTIONS)
def test_layers_stay_on_the_device_of_their_input(layer_class, options):
    layer = layer_class(7, 5, 3, 6, **options).to("meta")
    tensors = run_everything(layer, torch.zeros(2, 7, 5, device="meta"))
    assert {tensor.device.type for tensor in tensors} == {"meta"}


class OperationCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer_class, options", OPTIONS)
def test_number_of_operations_does_not_grow_with_batch_tokens_experts_or_slots(layer_class, options):
    counts = set()
    for B, T, E in [(2, 12, 3), (5, 12, 3), (2, 24, 3), (2, 24, 6)]:
        layer = layer_class(T, 5, E, 6, **options)
        tokens = torch.randn(B, T, 5)
        with OperationCounter() as counter:
            layer(tokens)
        counts.add(counter.count)
    assert len(counts) == 1


def test_library_imports_only_the_standard_library_and_torch():
    tree = ast.parse(inspect.getsource(moe_layers))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported}
    assert "torch" in packages
    assert packages <= {"torch", *sys.stdlib_module_names}
