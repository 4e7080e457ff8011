"""Mixture-of-experts layers for value networks: Soft MoE, Top-1 MoE, tokenizers, dense and noisy layers.

The penultimate layer of a Q-network becomes a mixture of experts over the tokens of the encoder's feature map, as in
"Mixtures of Experts Unlock Parameter Scaling for Deep RL" (Obando-Ceron et al., ICML 2024, arXiv 2402.08609):

    tokens = tokenize(features, "PerConv")                         # (B, C, h, w) -> (B, T, D)
    moe = SoftMoE(num_tokens=121, token_dim=32, num_experts=8)
    output = moe(tokens)                                           # output.tokens: (B, T, D)

`LayerArgs` holds the flags that choose such a layer, and `build_layer` makes the tokenizer and the layer they describe.

Shapes: B batch, T tokens, D token dim, E experts, S slots per expert, H expert hidden, C/h/w feature map.
Initialisation and semantics are those of the authors' JAX code (google/dopamine, labs/moes/architectures), with which
the layers agree to 1e-5. Shapes are static and nothing waits for the device, so every layer runs in a CUDA graph.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMA_0 = 0.1  # initial scale of noisy weights (authors' code; Fortunato et al. use 0.5)


class Routing(NamedTuple):
    """Soft MoE: two softmaxes of the logits. Sparse: dispatch is 0 or 1, and combine is dispatch times the gate."""

    dispatch_weights: Tensor  # (B, T, E, S): slot (e, s) reads this mixture of the tokens
    combine_weights: Tensor  # (B, T, E, S): token t reads this mixture of the slots' outputs
    router_logits: Tensor  # (B, T, E): before any router noise; for Soft MoE logsumexp over an expert's slots
    router_probs: Tensor  # (B, T, E): softmax; for Soft MoE combine weights averaged over an expert's slots


class MoEOutput(NamedTuple):
    """What a mixture-of-experts layer returns."""

    tokens: Tensor  # (B, T, D)
    routing: Routing
    hidden: Tensor  # (B, E, S, H): the experts' hidden activations, after the ReLU; of `BigExperts` (B, E, 1, H)

    def detach(self) -> "MoEOutput":
        """Return the same values, detached from the graph."""
        return MoEOutput(self.tokens.detach(), Routing(*(x.detach() for x in self.routing)), self.hidden.detach())


# ----------------------------------------------------------------------------------------------------- initialisers
def lecun_normal_(weight: Tensor, fan_in: int) -> Tensor:
    """Fill with a normal of std 1/sqrt(fan_in) that is truncated at two sigma and rescaled (Flax's `lecun_normal`)."""
    std = fan_in**-0.5 / 0.87962566103423978  # the std of a unit normal truncated to [-2, 2]
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def signed_sqrt(x: Tensor) -> Tensor:
    """f(x) = sign(x) sqrt(|x|), the factorised noise of Fortunato et al. (2018), eq. 10-11."""
    return x.sign() * x.abs().sqrt()


# ------------------------------------------------------------------------------------------------------- tokenizers
def tokenize(features: Tensor, tokenization: str) -> Tensor:
    """Turn a feature map into tokens, (B, C, h, w) -> (B, T, D) (paper, figure 3).

    "PerConv": h*w tokens of dim C, row-major over (h, w). "PerFeat": C tokens of dim h*w. "PerSamp": one token of dim
    C*h*w, flattened in (h, w, C) order as the authors' channels-last code does. "Average": one token of dim C, the mean
    over (h, w) (Mind the GAP, 2505.17749). Raises ValueError for any other name: "PerPatch" has parameters, see
    `PatchTokenizer`, and "Shuffled" a state, see `ShuffledTokenizer`.
    """
    if tokenization == "PerConv":
        return features.permute(0, 2, 3, 1).flatten(1, 2)  # (B, h*w, C)
    if tokenization == "PerFeat":
        return features.flatten(2)  # (B, C, h*w)
    if tokenization == "PerSamp":
        return features.permute(0, 2, 3, 1).flatten(1)[:, None]  # (B, 1, h*w*C)
    if tokenization == "Average":
        return features.mean(dim=(2, 3))[:, None]  # (B, 1, C)
    raise ValueError(f"tokenization {tokenization!r} is not 'PerConv', 'PerFeat', 'PerSamp' or 'Average'")


class ShuffledTokenizer(nn.Module):
    """ "Shuffled" tokens: "PerConv" after one fixed permutation of all C*h*w features (2410.01930).

    (B, C, h, w) -> (B, h*w, C). The permutation is drawn at construction and is a buffer.
    """

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.permutation = nn.Buffer(torch.randperm(math.prod(shape)))

    def forward(self, features: Tensor) -> Tensor:
        shuffled = features.flatten(1).index_select(1, self.permutation)  # (B, C*h*w)
        return tokenize(shuffled.view(features.shape), "PerConv")


class PatchTokenizer(nn.Module):
    """ "PerPatch" tokens: one per 3x3 patch, embedded by a 3x3/3 VALID convolution, or average-pooled.

    (B, C, h, w) -> (B, (h//3)*(w//3), token_dim). `average=True` has no parameters and keeps C channels. Raises
    ValueError where `token_dim` does not fit or, in forward, where the feature map is smaller than one patch.
    Source: authors' networks.py, RoutingType.PER_PATCH.
    """

    def __init__(self, in_channels: int, token_dim: int | None = None, *, patch_size: int = 3, average: bool = False):
        super().__init__()
        token_dim = in_channels if token_dim is None else token_dim
        check_positive(in_channels=in_channels, token_dim=token_dim, patch_size=patch_size)
        if average and token_dim != in_channels:
            raise ValueError(f"average pooling keeps {in_channels} channels: token_dim {token_dim} does not fit")
        self.patch_size = patch_size
        if average:
            self.embedding = nn.AvgPool2d(patch_size)
        else:
            self.embedding = nn.Conv2d(in_channels, token_dim, patch_size, stride=patch_size)
            lecun_normal_(self.embedding.weight, in_channels * patch_size**2)
            nn.init.zeros_(self.embedding.bias)

    def forward(self, features: Tensor) -> Tensor:
        if min(features.shape[2:]) < self.patch_size:
            h, w = features.shape[2:]
            raise ValueError(f"a {h}x{w} feature map is smaller than one {self.patch_size}x{self.patch_size} patch")
        return tokenize(self.embedding(features), "PerConv")  # (B, T, D)


# ---------------------------------------------------------------------------------------------------------- experts
class Experts(nn.Module):
    """E independent two-layer networks D -> H -> D with a ReLU between, as stacked weights.

    `forward(slots (B, E, S, D)) -> (outputs (B, E, S, D), hidden (B, E, S, H))`. With `noisy`, the first layer has
    factorised Gaussian noise in training mode: one draw per sample, shared by all experts and slots of that sample
    (authors' networks.py, ExpertModel: first layer noisy, second never).
    """

    def __init__(self, num_experts: int, in_dim: int, hidden_dim: int, *, out_dim: int = 0, noisy: bool = False):
        super().__init__()
        self.noisy, out_dim = noisy, out_dim or in_dim
        self.w1 = nn.Parameter(torch.empty(num_experts, in_dim, hidden_dim))
        self.b1 = nn.Parameter(torch.zeros(num_experts, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_dim, out_dim))
        self.b2 = nn.Parameter(torch.zeros(num_experts, out_dim))
        for weight in (self.w1, self.w2):
            xavier = math.sqrt(6 / sum(weight.shape[1:]))  # per expert: fan-in and fan-out of one matrix
            nn.init.uniform_(weight, -xavier, xavier)
        if noisy:  # the first layer starts as a `NoisyLinear`
            bound = in_dim**-0.5
            nn.init.uniform_(self.w1, -bound, bound)
            nn.init.uniform_(self.b1, -bound, bound)
            self.w1_sigma = nn.Parameter(torch.full_like(self.w1, SIGMA_0 * bound))
            self.b1_sigma = nn.Parameter(torch.full_like(self.b1, SIGMA_0 * bound))

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        B, E, S, D = slots.shape
        x = slots.transpose(0, 1).reshape(E, B * S, D)
        hidden = torch.baddbmm(self.b1[:, None], x, self.w1)  # (E, B*S, H)
        if self.noisy and self.training:
            p = signed_sqrt(torch.randn(B, 1, D, device=x.device, dtype=x.dtype))
            q = signed_sqrt(torch.randn(B, 1, self.w1.shape[2], device=x.device, dtype=x.dtype))
            scaled = (x.view(E, B, S, D) * p).view(E, B * S, D)
            noise = torch.baddbmm(self.b1_sigma[:, None], scaled, self.w1_sigma)  # (E, B*S, H)
            hidden = torch.addcmul(hidden.view(E, B, S, -1), noise.view(E, B, S, -1), q).view_as(hidden)
        hidden = F.relu(hidden)
        outputs = torch.baddbmm(self.b2[:, None], hidden, self.w2)  # (E, B*S, D)
        return outputs.view(E, B, S, -1).transpose(0, 1), hidden.view(E, B, S, -1).transpose(0, 1)


class BigExperts(nn.Module):
    """Experts that each begin with an encoder of their own: an expert's S slots are the pixels of its square image.

    `forward(slots (B, E, S, D)) -> (outputs (B, E, S, D), hidden (B, E, 1, H))`: encoder, flattened, H, ReLU, S * D.
    `make_encoder()` gives a network from (B, D, sqrt(S), sqrt(S)) to a feature map. Source: authors' BigExpertModel.
    """

    def __init__(self, make_encoder, num_experts: int, num_slots: int, token_dim: int, hidden_dim: int, *, noisy: bool):
        super().__init__()
        encoders = [make_encoder() for _ in range(num_experts)]
        self.side = math.isqrt(num_slots)
        parameters, _ = torch.func.stack_module_state(encoders)  # (E, ...) each
        # A ParameterDict takes no dots in its names.
        self.encoders = nn.ParameterDict({name.replace(".", "-"): x.detach() for name, x in parameters.items()})
        self.encoder = [encoders[0]]  # in a list, so that it is no submodule
        size = encoders[0](torch.zeros(1, token_dim, self.side, self.side)).numel()
        self.experts = Experts(num_experts, size, hidden_dim, out_dim=num_slots * token_dim, noisy=noisy)

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        images = slots.unflatten(2, (self.side, self.side)).permute(1, 0, 4, 2, 3)  # (E, B, D, side, side)
        parameters = {name.replace("-", "."): x for name, x in self.encoders.items()}
        encode = torch.vmap(functools.partial(torch.func.functional_call, self.encoder[0]))
        features = encode(parameters, images)  # (E, B, C, h, w)
        features = features.permute(1, 0, 3, 4, 2).flatten(2)[:, :, None]  # (B, E, 1, h*w*C)
        outputs, hidden = self.experts(features)
        return outputs.view(slots.shape), hidden


def apply_experts(tokens: Tensor, routing: Routing, experts: Experts) -> MoEOutput:
    """Mix tokens (B, T, D) into slots, run the experts, mix the slots back. The same for sparse and soft routing."""
    B, T, E, S = routing.dispatch_weights.shape
    dispatch = routing.dispatch_weights.reshape(B, T, E * S)
    slots = torch.bmm(dispatch.transpose(1, 2), tokens)  # (B, E*S, D)
    outputs, hidden = experts(slots.view(B, E, S, -1))  # (B, E, S, D), (B, E, S, H)
    combine = routing.combine_weights.reshape(B, T, E * S)
    return MoEOutput(torch.bmm(combine, outputs.reshape(B, E * S, -1)), routing, hidden)  # tokens: (B, T, D)


def slots_per_expert(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """S = ceil(T * capacity_factor / E): an expert's slots (Soft MoE) or its capacity per sample (Top-1)."""
    check_positive(num_tokens=num_tokens, num_experts=num_experts)
    if not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor must be above 0, not {capacity_factor}")
    return math.ceil(num_tokens * capacity_factor / num_experts)


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not 1 <= size < math.inf:
            raise ValueError(f"{name} must be at least 1, not {size}")


# ------------------------------------------------------------------------------------------------------ MoE layers
class SoftMoE(nn.Module):
    """Soft mixture of experts: every slot reads a convex mixture of all tokens (Puigcerver et al., 2308.00951).

    `forward(tokens (B, T, D)) -> MoEOutput`, with S = ceil(T * capacity_factor / E) slots per expert.
    `normalize` takes the logits from L2-normalised tokens and phi, times a learned scale (2308.00951, section 2.3);
    the slots always mix the raw tokens. `learned_phi=False` redraws phi ~ N(0, 1) for every sample in every forward,
    in evaluation too (paper, figure 8; as the authors' code). `noisy`: see `Experts`. `make_encoder`: the experts are
    `BigExperts`, S is rounded down to a square (paper, figures 13-15).
    Raises ValueError for sizes below 1, `capacity_factor` <= 0, or tokens of another shape.
    Parameters: phi (D, E, S) unless redrawn, scale (1,), which only `normalize` uses, experts.{w1, b1, w2, b2}.
    Source: authors' softmoe.py.
    """

    def __init__(
        self,
        num_tokens: int,
        token_dim: int,
        num_experts: int,
        hidden_dim: int = 512,
        *,
        capacity_factor: float = 1.0,
        noisy: bool = False,
        normalize: bool = False,
        learned_phi: bool = True,
        make_encoder: Callable[[], nn.Module] | None = None,
    ):
        super().__init__()
        check_positive(token_dim=token_dim, hidden_dim=hidden_dim)
        self.num_tokens, self.token_dim, self.num_experts = num_tokens, token_dim, num_experts
        self.num_slots = slots_per_expert(num_tokens, num_experts, capacity_factor)
        if make_encoder:
            self.num_slots = math.isqrt(self.num_slots) ** 2
        self.normalize, self.learned_phi = normalize, learned_phi
        if learned_phi:
            self.phi = nn.Parameter(torch.empty(token_dim, num_experts, self.num_slots))
            lecun_normal_(self.phi, num_experts * token_dim)  # Flax's fan-in of a (D, E, S) kernel is D*E
        self.scale = nn.Parameter(torch.ones(1))
        if make_encoder:
            self.experts = BigExperts(make_encoder, num_experts, self.num_slots, token_dim, hidden_dim, noisy=noisy)
        else:
            self.experts = Experts(num_experts, token_dim, hidden_dim, noisy=noisy)

    def forward(self, tokens: Tensor) -> MoEOutput:
        check_tokens(tokens, self.num_tokens, self.token_dim)
        return apply_experts(tokens, self.route(tokens), self.experts)

    def route(self, tokens: Tensor) -> Routing:
        """Soft MoE eq. 1-3: logits = X phi; dispatch = softmax over tokens, combine = softmax over all slots."""
        B, T, D = tokens.shape
        E, S = self.num_experts, self.num_slots
        if self.learned_phi:
            phi = self.phi.flatten(1)  # (D, E*S)
        else:
            phi = torch.randn(B, D, E * S, device=tokens.device, dtype=tokens.dtype)
        if self.normalize:
            tokens = tokens / (torch.linalg.vector_norm(tokens, dim=-1, keepdim=True) + 1e-6)
            phi = self.scale * phi / (torch.linalg.vector_norm(phi, dim=-2, keepdim=True) + 1e-6)
        logits = tokens @ phi  # (B, T, E*S)
        dispatch_weights = logits.softmax(dim=1).view(B, T, E, S)
        combine_weights = logits.softmax(dim=2).view(B, T, E, S)
        router_logits = logits.view(B, T, E, S).logsumexp(dim=3)  # (B, T, E)
        return Routing(dispatch_weights, combine_weights, router_logits, combine_weights.mean(dim=3))


class Top1MoE(nn.Module):
    """Sparse mixture of experts: each token goes to its most probable expert (Switch, Fedus et al., 2101.03961).

    `forward(tokens (B, T, D)) -> MoEOutput`. An expert takes at most S = ceil(T * capacity_factor / E) tokens of each
    sample, in token order; tokens beyond that are dropped (output 0). Outputs are scaled by the gate probability.
    `router_noise_std` adds Gaussian noise to the logits in training mode. In the authors' code it is off by default; if
    on, it is 1/E, and on in evaluation too. Slots that no token fills read zeros.
    Raises ValueError for sizes below 1, `capacity_factor` <= 0, negative noise, or tokens of another shape.
    Parameters: router.weight (E, D), experts.{w1, b1, w2, b2}. Source: authors' moe.py and routers.py.
    """

    def __init__(
        self,
        num_tokens: int,
        token_dim: int,
        num_experts: int,
        hidden_dim: int = 512,
        *,
        capacity_factor: float = 1.0,
        noisy: bool = False,
        router_noise_std: float = 0.0,
    ):
        super().__init__()
        check_positive(token_dim=token_dim, hidden_dim=hidden_dim)
        if not 0 <= router_noise_std < math.inf:
            raise ValueError(f"router_noise_std must be 0 or more, not {router_noise_std}")
        self.num_tokens, self.token_dim, self.num_experts = num_tokens, token_dim, num_experts
        self.num_slots = slots_per_expert(num_tokens, num_experts, capacity_factor)
        self.router_noise_std = router_noise_std
        self.router = nn.Linear(token_dim, num_experts, bias=False)
        lecun_normal_(self.router.weight, token_dim)
        self.experts = Experts(num_experts, token_dim, hidden_dim, noisy=noisy)

    def forward(self, tokens: Tensor) -> MoEOutput:
        check_tokens(tokens, self.num_tokens, self.token_dim)
        return apply_experts(tokens, self.route(tokens), self.experts)

    def route(self, tokens: Tensor) -> Routing:
        logits = noisy_logits = self.router(tokens)  # (B, T, E)
        if self.training and self.router_noise_std > 0:
            noisy_logits = logits + self.router_noise_std * torch.randn_like(logits)
        probs = noisy_logits.softmax(dim=2)
        gate, expert = probs.max(dim=2)  # (B, T)
        chosen = expert[:, :, None] == torch.arange(self.num_experts, device=tokens.device)  # (B, T, E)
        place = (chosen.cumsum(dim=1) * chosen).sum(dim=2) - 1  # (B, T): a token's place among its expert's tokens
        slot = place[:, :, None] == torch.arange(self.num_slots, device=tokens.device)  # (B, T, S): overflow fits none
        dispatch_weights = (chosen[:, :, :, None] & slot[:, :, None, :]).to(tokens.dtype)  # (B, T, E, S)
        return Routing(dispatch_weights, dispatch_weights * gate[:, :, None, None], logits, probs)


class ExpertChoiceMoE(Top1MoE):
    """Sparse mixture of experts in which each expert takes the S tokens that it is most probable for (2202.09368).

    Unlike in `Top1MoE`, a token may go to several experts or to none, an expert takes at most T tokens, and
    `router_noise_std` has no effect.
    """

    def route(self, tokens: Tensor) -> Routing:
        logits = self.router(tokens)  # (B, T, E)
        probs = logits.softmax(dim=2)
        chosen = probs.argsort(dim=1, descending=True, stable=True)[:, : self.num_slots].transpose(1, 2)  # (B, E, S)
        places = torch.arange(self.num_tokens, device=tokens.device)
        dispatch_weights = (chosen[:, None] == places[:, None, None]).to(tokens.dtype)  # (B, T, E, S)
        return Routing(dispatch_weights, dispatch_weights * probs[:, :, :, None], logits, probs)


def check_tokens(tokens: Tensor, num_tokens: int, token_dim: int) -> None:
    if tokens.shape[1:] != (num_tokens, token_dim):
        raise ValueError(f"expected tokens of shape (B, {num_tokens}, {token_dim}), got {tuple(tokens.shape)}")


# --------------------------------------------------------------------------------------------- dense, noisy layers
class NoisyLinear(nn.Module):
    """Linear layer with factorised Gaussian noise, a fresh draw per sample (Fortunato et al., 2018; NoisyNets).

    `forward(x (B, in) or (B, T, in)) -> (..., out)`: x W + b + ((x * p) W_sigma + b_sigma) * q with p, q = f(N(0, 1)),
    two matrix products instead of B noisy matrices. No noise in eval(). Raises ValueError for sizes below 1.
    Means start at U(-1/sqrt(in), 1/sqrt(in)), sigmas at sigma_0/sqrt(in) (authors: sigma_0 = 0.1).
    """

    def __init__(self, in_features: int, out_features: int, sigma_0: float = SIGMA_0):
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((out_features, in_features), sigma_0 * bound))
        self.bias_sigma = nn.Parameter(torch.full((out_features,), sigma_0 * bound))

    def forward(self, x: Tensor) -> Tensor:
        mean = F.linear(x, self.weight, self.bias)  # (B, out)
        if not self.training:
            return mean
        draws = len(x), *[1] * (x.dim() - 2)  # the tokens of a sample share one draw
        p = signed_sqrt(torch.randn(*draws, x.shape[-1], device=x.device, dtype=x.dtype))
        q = signed_sqrt(torch.randn(*draws, mean.shape[-1], device=x.device, dtype=x.dtype))
        return mean + F.linear(x * p, self.weight_sigma, self.bias_sigma) * q


def linear(in_features: int, out_features: int, *, noisy: bool = False) -> nn.Module:
    """A `NoisyLinear`, or an `nn.Linear` with Xavier-uniform weights and zero biases (authors' feature_layer)."""
    if noisy:
        return NoisyLinear(in_features, out_features)
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class DenseLayer(nn.Module):
    """The paper's baseline penultimate layer: flatten, linear, ReLU. (B, ...) -> (B, hidden_dim).

    The "scaled" baseline of the paper is `hidden_dim = 512 * num_experts`. Xavier-uniform weights, zero biases; with
    `noisy`, a `NoisyLinear` instead. Raises ValueError for sizes below 1.
    """

    def __init__(self, in_features: int, hidden_dim: int, *, noisy: bool = False):
        super().__init__()
        check_positive(in_features=in_features, hidden_dim=hidden_dim)
        self.linear = linear(in_features, hidden_dim, noisy=noisy)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x.flatten(1)))


class TokenizedLayer(DenseLayer):
    """A `DenseLayer` on every token, summed over tokens: (B, T, D) -> (B, hidden_dim) (2410.01930)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.relu(self.linear(tokens)).sum(dim=1)


# --------------------------------------------------------------------------------------- load balancing, statistics
def squared_variation(x: Tensor) -> Tensor:
    """Squared coefficient of variation, (std / mean)^2, over the last axis, averaged over the others."""
    return (x.var(dim=-1, unbiased=False) / x.mean(dim=-1).square()).mean()


def importance_loss(router_probs: Tensor) -> Tensor:
    """(B, T, E) -> 0-D: squared variation of the experts' summed gate probabilities (V-MoE, 2106.05974, app. A.2)."""
    return squared_variation(router_probs.sum(dim=1))


def load_loss(router_logits: Tensor, noisy_logits: Tensor, noise_std: float) -> Tensor:
    """(B, T, E) twice -> 0-D: squared variation of the experts' smooth load (V-MoE, 2106.05974, app. A.2).

    The load is the probability that an expert would be the top one if the noise on its clean logit were drawn afresh.
    """
    threshold = noisy_logits.max(dim=2, keepdim=True).values  # (B, T, 1)
    win = torch.special.ndtr((router_logits - threshold) / noise_std)  # (B, T, E)
    return squared_variation(win.mean(dim=1))


def load_balancing_loss(output: MoEOutput, losses: str, importance_weight: float, load_weight: float) -> Tensor:
    """Weighted sum of a Top-1 layer's `losses` ("importance+load"), 0-D.

    The load loss adds noise of std 1/E to the logits, as in the authors' code. The routing itself has no noise.
    """
    logits, loss = output.routing.router_logits, 0.0
    if "importance" in losses:
        loss = loss + importance_weight * importance_loss(output.routing.router_probs)
    if "load" in losses:
        noise_std = 1 / logits.shape[2]
        loss = loss + load_weight * load_loss(logits, logits + noise_std * torch.randn_like(logits), noise_std)
    return loss


def entropy_loss(router_probs: Tensor) -> Tensor:
    """(B, T, E) -> 0-D: 1 - (entropy of the histogram of top experts) / log E. It has no gradient."""
    E = router_probs.shape[2]
    top = router_probs.argmax(dim=2, keepdim=True) == torch.arange(E, device=router_probs.device)  # (B, T, E)
    share = top.sum(dim=1) + 1e-6
    share = share / share.sum(dim=1, keepdim=True)  # (B, E)
    return 1 - (-(share * share.log()).sum(dim=1) / math.log(max(E, 2))).mean()


@torch.no_grad()
def routing_stats(output: MoEOutput) -> dict[str, Tensor]:
    """Statistics of one forward pass as 0-D tensors, for logging.

    `router_entropy`: entropy of a token's distribution over experts, divided by log E. `expert_load/i`: share of the
    tokens that expert i processes (Soft MoE: its share of the combine weights). `dropped_fraction`: share of the
    tokens that no expert takes (Soft MoE: 0). `dormant_fraction`: see that function; with `/i`, of expert i.
    """
    E = output.hidden.shape[1]
    probs = output.routing.router_probs.float()  # (B, T, E)
    probs = probs / probs.sum(dim=2, keepdim=True)
    entropy = -torch.special.xlogy(probs, probs).sum(dim=2).mean() / math.log(max(E, 2))
    taken = output.routing.combine_weights.float().sum(dim=3)  # (B, T, E)
    total = taken.sum(dim=2, keepdim=True)  # (B, T, 1): 0 where a token was dropped
    load = (taken / total.clamp_min(1e-12)).mean(dim=(0, 1))  # (E,)
    dormant = dormant_neurons(output.hidden, 0.0).float().mean(dim=1)  # (E,)
    return {
        "router_entropy": entropy,
        "dropped_fraction": (total == 0).float().mean(),
        "dormant_fraction": dormant.mean(),
        **{f"expert_load/{i}": share for i, share in enumerate(load)},
        **{f"dormant_fraction/{i}": share for i, share in enumerate(dormant)},
    }


def dormant_neurons(hidden: Tensor, tau: float) -> Tensor:
    """(B, H) or (B, E, S, H) -> (H,) or (E, H) bool: mean |h| over batch and slots is at most tau times the layer's."""
    score = hidden.abs().mean(dim=0 if hidden.dim() == 2 else (0, 2))
    return score <= tau * score.mean()


@torch.no_grad()
def dormant_fraction(hidden: Tensor, tau: float = 0.0) -> Tensor:
    """Share of tau-dormant neurons, (B, H) or (B, E, S, H) -> 0-D (ReDo, Sokar et al., 2302.12902, definition 3.1).

    Every expert's neurons count on their own. The authors' code instead averages hidden unit j over all experts, so
    that it is dormant only when it is dead in each of them: `dormant_fraction(hidden.flatten(0, 2))`.
    """
    return dormant_neurons(hidden, tau).float().mean()


# ------------------------------------------------------------------------------------------ from flags to a layer
Tokenization = Literal["PerConv", "PerFeat", "PerSamp", "PerPatch", "PerPatchAvg", "Shuffled"]
Balancing = Literal["none", "importance", "load", "importance+load"]


@dataclass
class LayerArgs:
    """Flags of the penultimate layer. The `Args` of a script inherit them."""

    default_num_experts: ClassVar[int] = 8

    layer: Literal["softmoe", "top1moe", "expert_choice", "dense", "gap", "tokenized"] = "softmoe"  # penultimate layer
    num_experts: int | None = None  # experts (default: DQN, CQL 8; Rainbow, DER 4); dense: factor of width (default: 1)
    expert_hidden_dim: int = 512  # hidden width of an expert, or of the dense layer
    tokenization: Tokenization = "PerConv"  # how the feature map becomes tokens (paper, figure 3)
    capacity_factor: float = 1.0  # slots per token: an expert has ceil(tokens * this / experts) of them
    normalize_router: bool = False  # L2-normalise tokens and phi in the router (softmoe; paper, figures 13-15)
    learned_phi: bool = True  # learn phi, or draw it afresh at every forward (softmoe; paper, figure 8)
    expert_variant: Literal["regular", "big"] = "regular"  # big: an encoder in each expert (softmoe; paper, figure 13)
    load_balancing: Balancing = "none"  # losses that spread the tokens over the experts (top1moe; paper, figure 9)
    importance_weight: float = 1.0  # weight of the importance loss (authors' code: 1)
    load_weight: float = 1.0  # weight of the load loss (authors' code: 1)

    def __post_init__(self):
        if self.num_experts is None:
            self.num_experts = 1 if self.layer in ("dense", "gap", "tokenized") else self.default_num_experts

    def check_range(self, names: str, low: float, high: float = 2**63 - 1) -> None:
        """Raise ValueError for the first of the named flags whose value is not from `low` to `high`."""
        for name in names.split():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bound = f"at least {low}" if value < low else f"at most {high}"
                raise ValueError(f"--{name.replace('_', '-')} must be {bound}, not {value}")

    def check_effect(self, names: str, works: bool, needs: str) -> None:
        """Raise ValueError for the first of the named flags that was changed without effect, unless `works`."""
        for name in names.split():
            if not works and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"--{name.replace('_', '-')} has no effect here: it needs {needs}")

    def check_layer(self) -> None:
        """Raise ValueError for flags of the layer that cannot work or have no effect."""
        self.check_range("num_experts expert_hidden_dim", 1)
        self.check_range("capacity_factor importance_weight load_weight", 1e-30, 1e30)
        self.check_effect("tokenization", self.layer not in ("dense", "gap"), "tokens, not --layer dense or gap")
        experts = self.layer not in ("dense", "gap", "tokenized")
        self.check_effect("capacity_factor", experts, "experts, as of --layer softmoe")
        self.check_effect("normalize_router learned_phi expert_variant", self.layer == "softmoe", "--layer softmoe")
        self.check_effect("load_balancing", self.layer == "top1moe", "--layer top1moe")
        self.check_effect("importance_weight", "importance" in self.load_balancing, "--load-balancing importance")
        self.check_effect("load_weight", "load" in self.load_balancing, "--load-balancing load")


def build_layer(
    args: LayerArgs,
    shape: tuple[int, int, int],
    *,
    noisy: bool = False,
    patch_dim: int | None = None,
    make_encoder: Callable[[int], nn.Module] | None = None,
) -> tuple[Callable[[Tensor], Tensor], nn.Module, int]:
    """Make the tokenizer and the layer that `args` describe, for feature maps of `shape` (C, h, w).

    Returns the tokenizer, the layer, and the number F of features that `flatten_output` gives:
    `flatten_output(layer(tokenizer(features)))` turns (B, C, h, w) into (B, F), and a MoEOutput. `patch_dim` is the
    token dim of "PerPatch" (default: C). `make_encoder(in_channels)` makes the encoder of an expert ("big" variant).
    Raises ValueError where the layer does not fit the feature map.
    """
    tokenization = {"dense": "PerSamp", "gap": "Average"}.get(args.layer, args.tokenization)
    if tokenization == "Shuffled":
        tokenizer = ShuffledTokenizer(shape)
    elif tokenization == "PerPatch":
        tokenizer = PatchTokenizer(shape[0], patch_dim)
    elif tokenization == "PerPatchAvg":
        tokenizer = PatchTokenizer(shape[0], average=True)
    else:
        tokenizer = functools.partial(tokenize, tokenization=tokenization)
    _, num_tokens, token_dim = tokenizer(torch.zeros(1, *shape)).shape
    dense_layers = {"dense": DenseLayer, "gap": DenseLayer, "tokenized": TokenizedLayer}
    if args.layer in dense_layers:
        width = args.expert_hidden_dim * args.num_experts
        return tokenizer, dense_layers[args.layer](token_dim, width, noisy=noisy), width
    sizes = num_tokens, token_dim, args.num_experts, args.expert_hidden_dim
    options = {"capacity_factor": args.capacity_factor, "noisy": noisy}
    if args.layer == "softmoe":
        options |= {"normalize": args.normalize_router, "learned_phi": args.learned_phi}
        if args.expert_variant == "big":
            options["make_encoder"] = functools.partial(make_encoder, token_dim)
    layers = {"softmoe": SoftMoE, "top1moe": Top1MoE, "expert_choice": ExpertChoiceMoE}
    return tokenizer, layers[args.layer](*sizes, **options), num_tokens * token_dim


def flatten_output(output: Tensor | MoEOutput) -> tuple[Tensor, MoEOutput | None]:
    """Return the features for the head, (B, F), and the MoEOutput. Tokens are flattened row-major."""
    return (output, None) if isinstance(output, Tensor) else (output.tokens.flatten(1), output)
