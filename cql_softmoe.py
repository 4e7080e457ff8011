"""Offline reinforcement learning on Atari: CQL and CQL+C51 with mixture-of-experts layers.

    python dqn_softmoe.py --env-id BreakoutNoFrameskip-v4 --save-replay       # logs its transitions
    python cql_softmoe.py --env-id BreakoutNoFrameskip-v4 --dataset-dir runs/BreakoutNoFrameskip-v4__dqn_softmoe8__seed1

Reproduces "Mixtures of Experts Unlock Parameter Scaling for Deep RL" (Obando-Ceron et al., 2024, arXiv 2402.08609).
C51 or DQN with the regulariser of CQL (Kumar et al., 2020), its dense layer replaced by a Soft MoE over the tokens of
the encoder's feature map. Reads logs of the other scripts and the DQN Replay Dataset (Agarwal et al., 2020).
Needs `moe_layers.py` beside it and nothing else of this repository.

Differs from the authors' code (google/dopamine, labs/moes) on purpose:
- An episode that was cut bootstraps from its last frame, where the data says so.
- Evaluation plays `--eval-steps` agent steps in ten games at once, each to the end of its last episode.
"""

import csv
import gzip
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from moe_layers import (
    DenseLayer,
    MoEOutput,
    PatchTokenizer,
    SoftMoE,
    Top1MoE,
    importance_loss,
    lecun_normal_,
    linear,
    load_loss,
    routing_stats,
    tokenize,
)


@dataclass
class Args:
    # Run
    env_id: str = "BreakoutNoFrameskip-v4"
    """Atari id of any style (only the game counts), or a Gymnasium id with single uint8 frames ("module:Game-v0")"""
    seed: int = 1
    """seed of networks, exploration, replay draws and environments"""
    dataset_dir: str = ""
    """folder of logged transitions: of a run with --save-replay, or of the DQN Replay Dataset (<Game>/<run>)"""
    total_updates: int = 12_500_000
    """updates (paper: 200 iterations of 62,500)"""
    runs_dir: str = "runs"
    """folder of run directories"""
    run_name: str | None = None
    """name of the run directory (default: environment, agent, layer, experts, seed)"""
    resume: str | None = None
    """run directory to continue from its last checkpoint, with the arguments it was started with"""
    checkpoint_every: int = 62_500
    """updates between checkpoints (0: only at the end and on a signal)"""
    iteration_updates: int = 62_500
    """updates per evaluation and row of metrics.csv (paper: 62,500)"""
    log_every: int = 250
    """updates between TensorBoard points"""
    eval_steps: int = 125_000
    """agent steps of each evaluation, whose last episodes are played to their end (paper: 125,000)"""
    cuda: bool = True
    """run on the GPU where there is one"""
    compile: bool = True
    """torch.compile the loss and its gradient (GPU only)"""
    cuda_graphs: bool = True
    """capture acting, storing and learning in CUDA graphs (GPU only)"""

    # Environment
    num_envs: int = 10
    """games that an evaluation plays at once"""
    sticky_actions: float = 0.25
    """probability that the emulator repeats the previous action (Machado et al., 2018; DER: 0; Atari only)"""
    noop_max: int = 0
    """random no-ops at an episode's start, at most (paper: 0; DER: 30; Atari only)"""
    terminal_on_life_loss: bool = False
    """a lost life clears the frame stack in evaluation, as in data logged that way (Atari only)"""

    # Network
    layer: Literal["softmoe", "top1moe", "dense"] = "softmoe"
    """penultimate layer"""
    num_experts: int | None = None
    """experts (default: DQN, CQL 8; Rainbow, DER 4); `dense`: the scaled baseline's factor of width (default: 1)"""
    expert_hidden_dim: int = 512
    """hidden width of an expert, or of the dense layer"""
    tokenization: Literal["PerConv", "PerFeat", "PerSamp", "PerPatch", "PerPatchAvg"] = "PerConv"
    """how the feature map becomes tokens (paper, figure 3); PerPatchAvg pools patches instead of embedding them"""
    capacity_factor: float = 1.0
    """slots per token: an expert has ceil(tokens * this / experts) of them"""
    normalize_router: bool = False
    """L2-normalise tokens and phi in the router (softmoe; paper, figures 13-15)"""
    learned_phi: bool = True
    """learn phi, or draw it afresh at every forward (softmoe; paper, figure 8)"""
    load_balancing: Literal["none", "importance", "load", "importance+load"] = "none"
    """auxiliary losses of the router (top1moe; paper, figure 9)"""
    importance_weight: float = 1.0
    """weight of the importance loss (authors' code: 1)"""
    load_weight: float = 1.0
    """weight of the load loss (authors' code: 1)"""
    encoder: Literal["impala", "nature"] = "impala"
    """convolutional encoder (paper: Impala; DER and figure 7: Nature CNN)"""
    encoder_width: int = 1
    """multiplies the encoder's channels"""

    # Data
    data_fraction: float = 1.0
    """first share of every shard that is used (paper: 0.05, 0.1, 0.5)"""
    max_shards: int | None = None
    """shards that are used, from the first (default: all)"""
    cache_dir: str | None = None
    """folder for the unpacked data (default: beside the data)"""
    batch_size: int = 32
    """transitions per update (paper: 32)"""
    n_step: int | None = None
    """steps of the return before bootstrapping (default, paper: CQL+C51 3, CQL 1)"""
    replay_device: Literal["auto", "cpu"] = "auto"
    """auto: GPU memory when the data fits there, else the disk"""

    # Optimisation
    learning_rate: float | None = None
    """Adam's learning rate (default, paper: CQL+C51 6.25e-5, CQL 5e-5)"""
    adam_eps: float | None = None
    """Adam's epsilon (default, paper: CQL+C51 1.5e-4, CQL 3.125e-4)"""
    gamma: float = 0.99
    """discount (paper: 0.99)"""
    target_network_frequency: int | None = None
    """updates between copies to the target network (default, paper: CQL+C51 100, CQL 2,000)"""

    # CQL
    distributional: bool = True
    """CQL+C51; else CQL, on expected values with the Huber loss"""
    cql_alpha: float = 0.1
    """weight of CQL's regulariser (paper: 0.1; 0 is offline C51 or DQN)"""
    num_atoms: int = 51
    """atoms of the return distribution (Bellemare et al., 2017; paper: 51)"""
    v_min: float = -10.0
    """lowest atom, in clipped returns (paper: -10)"""
    v_max: float = 10.0
    """highest atom, in clipped returns (paper: 10)"""
    double: bool = True
    """choose the target's action with the online network (distributional; van Hasselt et al., 2016)"""
    dueling: bool = True
    """value and advantage heads (distributional; Wang et al., 2016)"""
    eval_epsilon: float = 0.001
    """exploration in evaluation (paper: 0.001)"""

    def __post_init__(self):
        if self.num_experts is None:
            self.num_experts = 1 if self.layer == "dense" else 8
        defaults = {"n_step": (3, 1), "learning_rate": (6.25e-5, 5e-5), "adam_eps": (1.5e-4, 3.125e-4)}
        for name, (c51, cql) in (defaults | {"target_network_frequency": (100, 2_000)}).items():
            if getattr(self, name) is None:
                setattr(self, name, c51 if self.distributional else cql)


def fail(message: object) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_types(args: Args) -> Args:
    """Raise ValueError for values of the wrong type: a caller's, or a damaged config.json's."""
    for name, hint in get_type_hints(Args).items():
        value, choices = getattr(args, name), get_args(hint) if get_origin(hint) is Literal else ()
        if not (value in choices if choices else isinstance(value, hint) or hint is float and type(value) is int):
            raise ValueError(f"{flag(name)} {value!r} is not {' or '.join(choices) or hint}")
    return args


def check_args(args: Args) -> None:
    """Refuse arguments that cannot work or would silently do nothing."""
    try:
        check_types(args)
    except ValueError as error:
        fail(error)
    positive = "total_updates iteration_updates log_every num_envs eval_steps num_experts expert_hidden_dim"
    for name in f"{positive} encoder_width batch_size n_step target_network_frequency".split():
        if getattr(args, name) < 1:
            fail(f"{flag(name)} must be at least 1, not {getattr(args, name)}")
    if args.max_shards is not None and args.max_shards < 1:
        fail(f"--max-shards must be at least 1, not {args.max_shards}")
    for name in "seed checkpoint_every noop_max".split():
        if not 0 <= getattr(args, name) < 2**63:
            fail(f"{flag(name)} must be a number from 0 to 2^63 - 1, not {getattr(args, name)}")
    if args.noop_max > 1_000:
        fail(f"--noop-max must be at most 1000, not {args.noop_max}")
    for name in "sticky_actions eval_epsilon gamma".split():
        if not 0 <= getattr(args, name) <= 1:
            fail(f"{flag(name)} must lie in [0, 1], not {getattr(args, name)}")
    for name in "capacity_factor learning_rate adam_eps importance_weight load_weight".split():
        if not 0 < getattr(args, name) < math.inf:
            fail(f"{flag(name)} must be above 0, not {getattr(args, name)}")
    if not 0 <= args.cql_alpha < math.inf:
        fail(f"--cql-alpha must be 0 or more, not {args.cql_alpha}")
    if not 0 < args.data_fraction <= 1:
        fail(f"--data-fraction must lie in (0, 1], not {args.data_fraction}")
    largest = max(1, abs(args.v_min), abs(args.v_max))
    if not (1 < args.num_atoms <= 1_000 and args.v_max - args.v_min > 1e-6 * largest and largest < 1e36):
        wanted = "--num-atoms must be 2 to 1000, and --v-min below --v-max"
        fail(f"{wanted}, not {args.num_atoms} from {args.v_min:g} to {args.v_max:g}")
    for name, works, needs in (
        ("tokenization", args.layer != "dense", "--layer softmoe or top1moe"),
        ("capacity_factor", args.layer != "dense", "--layer softmoe or top1moe"),
        ("normalize_router", args.layer == "softmoe", "--layer softmoe"),
        ("learned_phi", args.layer == "softmoe", "--layer softmoe"),
        ("load_balancing", args.layer == "top1moe", "--layer top1moe"),
        ("importance_weight", "importance" in args.load_balancing, "--load-balancing importance"),
        ("load_weight", "load" in args.load_balancing, "--load-balancing load"),
        *((name, args.distributional, "--distributional") for name in "num_atoms v_min v_max double dueling".split()),
    ):
        if not works and getattr(args, name) != getattr(Args, name):
            fail(f"{flag(name)} has no effect with these arguments: it needs {needs}")
    if not args.dataset_dir:
        fail("--dataset-dir is missing: python dqn_softmoe.py --save-replay logs transitions for this script")


# --------------------------------------------------------------------------------------------------- environments

STACK_SIZE = 4  # frames per observation (Mnih et al., 2015)
MAX_STEPS = 27_000  # agent steps of an Atari game, 30 minutes (Machado et al., 2018)


class Step(NamedTuple):
    """What came of one step in every environment. After a game over, the next step is a reset."""

    frame: np.ndarray  # (N, H, W) uint8
    reward: np.ndarray  # (N,) raw
    terminated: np.ndarray  # (N,) bool: the episode ended, for the learner: a lost life may count
    truncated: np.ndarray  # (N,) bool: it was cut by the frame limit
    game_over: np.ndarray  # (N,) bool: the next step ignores its action and returns the first frame of a new game


class Environments:
    """N environments that reset themselves in the step after a game over (Gymnasium's NEXT_STEP).

    Atari games run in ale-py's C++ threads: `send`, do other work, `recv`. Anything else runs through `gym.make_vec`.
    """

    def __init__(self, envs: gym.vector.VectorEnv, description: str, life_loss: bool):
        self.envs, self.description, self.life_loss = envs, description, life_loss
        self.num_envs = envs.num_envs
        self.num_actions = int(envs.single_action_space.n)
        self.frame_shape = envs.single_observation_space.shape[-2:]  # (H, W)

    def reset(self, seed: int) -> np.ndarray:
        """Start a new game everywhere; returns the first frames (N, H, W)."""
        obs, info = self.envs.reset(seed=seed)
        self.lives, self.steps = info.get("lives"), np.zeros(self.num_envs, dtype=int)
        return obs.reshape(self.num_envs, *self.frame_shape)

    def send(self, action: np.ndarray) -> None:
        """Start a step with actions (N,), all in range: an out-of-range one would hang ale-py."""
        if isinstance(self.envs, AtariVectorEnv):
            self.envs.send(action)
        else:
            self.action = action

    def recv(self) -> Step:
        """Wait for the step that `send` began."""
        atari = isinstance(self.envs, AtariVectorEnv)
        obs, reward, terminated, truncated, info = self.envs.recv() if atari else self.envs.step(self.action)
        over = truncated | terminated
        if self.life_loss:
            # ale-py reports a lost life as terminated, but only while lives are left, and some games go on without any
            # (Bank Heist): the loss that leaves none counts too. Others end with a life left (Adventure). And ale-py
            # does not report that the frame limit cut the game where a life was lost in that very step.
            lost = info["lives"] < self.lives
            self.steps += 1
            over = truncated | (terminated & ~(lost & (info["lives"] > 0))) | (self.steps == MAX_STEPS)
            terminated = terminated | lost
            self.lives, self.steps = info["lives"].copy(), np.where(over, -1, self.steps)
        return Step(obs.reshape(self.num_envs, *self.frame_shape), reward, terminated, truncated, over)

    def close(self) -> None:
        self.envs.close()


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_envs(args: Args, num_envs: int) -> Environments:
    """The environments of a run: the paper's Atari protocol, or any Gymnasium id with single uint8 frames."""
    gym.register_envs(ale_py)
    module, _, env_id = args.env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        spec = gym.spec(env_id)
    except Exception as error:  # Gymnasium's, or whatever the module raises
        fail(f"--env-id {args.env_id}: {error}")
    if str(spec.entry_point).startswith("ale_py") and spec.kwargs.get("obs_type", "rgb") == "rgb":
        envs = AtariVectorEnv(
            spec.kwargs["game"],
            num_envs,
            # Its threads compete with the learner: leave it one core.
            num_threads=max(1, min(num_envs, num_cores() - 1)),
            repeat_action_probability=args.sticky_actions,
            life_loss_info=args.terminal_on_life_loss,
            noop_max=args.noop_max + 1,  # ale-py draws fewer than that
            max_num_frames_per_episode=4 * MAX_STEPS,
            stack_num=1,
            use_fire_reset=False,
            reward_clipping=False,
        )
        description = f"ALE {spec.kwargs['game']}, sticky actions {args.sticky_actions:g}, frame skip 4"
        description += f", up to {args.noop_max} no-ops" if args.noop_max else ""
        description += ", a lost life is terminal" if args.terminal_on_life_loss else ""
        return Environments(envs, description, args.terminal_on_life_loss)
    try:
        mode = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        envs = gym.make_vec(env_id, num_envs, vectorization_mode="sync", vector_kwargs=mode)
    except Exception as error:  # whatever the environment's own code raises
        fail(f"--env-id {args.env_id} cannot be made: {type(error).__name__}: {error}")
    space, actions = envs.single_observation_space, envs.single_action_space
    if not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        fail(f"--env-id {args.env_id}: actions must be Discrete and start at 0, not {actions}")
    shape = space.shape or ()
    if space.dtype != np.uint8 or not (len(shape) == 2 or len(shape) == 3 and shape[0] == 1):
        fail(f"--env-id {args.env_id}: observations must be single uint8 frames (H, W), not {space.dtype} {shape}")
    return Environments(envs, f"Gymnasium {env_id} as it is (no Atari settings apply)", False)


def reset_seed(seed: int, global_step: int, evaluation: bool = False) -> int:
    """Environment seed after `global_step` agent steps of run `seed`; environment i adds i."""
    return int(np.random.SeedSequence([seed, global_step, evaluation]).generate_state(1)[0]) % 2**30


class FrameStack:
    """The last frames of each environment as the network sees them, on the device; zeros before an episode's start."""

    def __init__(self, num_envs: int, frame_shape: tuple[int, int], device: torch.device):
        self.obs = torch.zeros(num_envs, STACK_SIZE, *frame_shape, dtype=torch.uint8, device=device)

    def push(self, frame: Tensor | np.ndarray, start: Tensor | np.ndarray) -> Tensor:
        """Append frames (N, H, W), forgetting the past where `start` (N,) is set; returns (N, stack, H, W) uint8."""
        frame, start = (torch.as_tensor(x, device=self.obs.device) for x in (frame, start))
        past = self.obs[:, 1:] * ~start[:, None, None, None]
        return self.obs.copy_(torch.cat([past, frame[:, None]], dim=1))


# ------------------------------------------------------------------------------------------------------- networks


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, *, lecun: bool = False):
    """Convolution with zero biases and Xavier-uniform (or LeCun-normal) weights."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding)
    nn.init.zeros_(layer.bias)
    if lecun:
        lecun_normal_(layer.weight, in_channels * kernel**2)
    else:
        nn.init.xavier_uniform_(layer.weight)
    return layer


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """(before, after) padding of one axis for ceil(size / stride) outputs: Flax's SAME puts the odd pixel after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class NatureEncoder(nn.Module):
    """The CNN of Mnih et al. (2015) with Flax's SAME padding: (B, 4, 84, 84) -> (B, 64 * width, 11, 11)."""

    def __init__(self, in_channels: int, width: int = 1):
        super().__init__()
        self.conv0 = conv(in_channels, 32 * width, 8, stride=4)
        self.conv1 = conv(32 * width, 64 * width, 4, stride=2)
        self.conv2 = conv(64 * width, 64 * width, 3, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv0, self.conv1, self.conv2):
            top, bottom = same_padding(x.shape[2], layer.kernel_size[0], layer.stride[0])
            left, right = same_padding(x.shape[3], layer.kernel_size[1], layer.stride[1])
            if (top, left) != (bottom, right):  # the convolution itself can only pad both sides alike
                x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
            x = F.relu(F.conv2d(x, layer.weight, layer.bias, layer.stride, (top, left)))
        return x


class ImpalaStack(nn.Module):
    """Convolution, max-pool, two residual blocks: (B, C, h, w) -> (B, channels, ceil(h/2), ceil(w/2))."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv0 = conv(in_channels, channels, 3, padding=1)
        self.conv1 = conv(channels, channels, 3, padding=1, lecun=True)
        self.conv2 = conv(channels, channels, 3, padding=1, lecun=True)
        self.conv3 = conv(channels, channels, 3, padding=1, lecun=True)
        self.conv4 = conv(channels, channels, 3, padding=1, lecun=True)

    def forward(self, x: Tensor) -> Tensor:
        # Flax pads an even axis (0, 1), which is ceil_mode here, and an odd one (1, 1); never with a real value.
        padding = (x.shape[2] % 2, x.shape[3] % 2)
        x = F.max_pool2d(self.conv0(x), 3, stride=2, padding=padding, ceil_mode=True)
        x = x + self.conv2(F.relu(self.conv1(F.relu(x))))
        return x + self.conv4(F.relu(self.conv3(F.relu(x))))


class ImpalaEncoder(nn.Module):
    """The ResNet of Espeholt et al. (2018): (B, 4, 84, 84) -> (B, 32 * width, 11, 11)."""

    def __init__(self, in_channels: int, width: int = 1):
        super().__init__()
        self.stack0 = ImpalaStack(in_channels, 16 * width)
        self.stack1 = ImpalaStack(16 * width, 32 * width)
        self.stack2 = ImpalaStack(32 * width, 32 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.stack2(self.stack1(self.stack0(x))))


class QNetwork(nn.Module):
    """Encoder, tokens, mixture of experts (or a dense layer), head: dueling over atoms, or plain.

    `forward(obs uint8 (B, 4, H, W)) -> (logits (B, A, N), MoEOutput or None)`; without `distributional` N = 1, and they
    are Q-values. As in the authors' code nothing stands between the experts' output tokens and the heads: no ReLU, no
    residual, no norm. Without dueling `advantage` alone gives the logits.
    """

    def __init__(self, args: Args, obs_shape: tuple[int, int, int], num_actions: int):
        super().__init__()
        encoder = {"impala": ImpalaEncoder, "nature": NatureEncoder}[args.encoder]
        self.encoder = encoder(obs_shape[0], args.encoder_width)
        with torch.no_grad():
            features = self.encoder(torch.zeros(1, *obs_shape))  # (1, C, h, w)
        self.layer, self.tokenization = args.layer, args.tokenization
        if args.layer == "dense":
            num_features = args.expert_hidden_dim * args.num_experts
            self.moe = DenseLayer(features.numel(), num_features)
        else:
            if args.tokenization.startswith("PerPatch"):
                self.tokenizer = PatchTokenizer(features.shape[1], average=args.tokenization == "PerPatchAvg")
            _, num_tokens, token_dim = self.tokens(features).shape
            num_features = num_tokens * token_dim
            sizes = (num_tokens, token_dim, args.num_experts, args.expert_hidden_dim)
            if args.layer == "softmoe":
                router = {"normalize": args.normalize_router, "learned_phi": args.learned_phi}
                self.moe = SoftMoE(*sizes, capacity_factor=args.capacity_factor, **router)
            else:
                self.moe = Top1MoE(*sizes, capacity_factor=args.capacity_factor)
        self.distributional, num_atoms = args.distributional, args.num_atoms if args.distributional else 1
        self.advantage = linear(num_features, num_actions * num_atoms)
        self.value = linear(num_features, num_atoms) if args.distributional and args.dueling else None
        support = torch.linspace(args.v_min, args.v_max, num_atoms)  # (N,)
        self.register_buffer("support", support, persistent=False)
        # Channels last: 1.7 times faster convolutions on a CPU, and PerConv tokens without a copy.
        self.to(memory_format=torch.channels_last)

    def tokens(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, T, D)."""
        if self.tokenization.startswith("PerPatch"):
            return self.tokenizer(features)
        return tokenize(features, self.tokenization)

    def features(self, obs: Tensor) -> tuple[Tensor, MoEOutput | None]:
        """What the head reads: (B, T * D), the tokens row-major; or the dense layer's (B, H)."""
        x = obs.to(dtype=torch.float32, memory_format=torch.channels_last) / 255
        x = self.encoder(x)  # (B, C, h, w)
        if self.layer == "dense":
            return self.moe(tokenize(x, "PerSamp")), None
        output = self.moe(self.tokens(x))
        return output.tokens.flatten(1), output

    def forward(self, obs: Tensor) -> tuple[Tensor, MoEOutput | None]:
        features, output = self.features(obs)
        logits = self.advantage(features).unflatten(1, (-1, self.support.numel()))  # (B, A, N)
        if self.value is not None:
            logits = self.value(features)[:, None] + logits - logits.mean(dim=1, keepdim=True)
        return logits, output

    def q_values(self, obs: Tensor) -> Tensor:
        """(B, 4, H, W) uint8 -> (B, A): expected returns."""
        return self.expected(self(obs)[0])

    def expected(self, logits: Tensor) -> Tensor:
        """(B, A, N) -> (B, A)."""
        return logits.softmax(dim=2) @ self.support if self.distributional else logits[:, :, 0]


def make_networks(args: Args, envs: Environments, device: torch.device) -> tuple[QNetwork, QNetwork]:
    """The Q-network and its target, equal, on the device; fails where the sizes do not fit."""
    obs_shape = (STACK_SIZE, *envs.frame_shape)
    try:
        q_network, target_network = (QNetwork(args, obs_shape, envs.num_actions) for _ in range(2))
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # RuntimeError: not enough memory
        fail(f"no such network for frames of {envs.frame_shape}: {error}")
    target_network.load_state_dict(q_network.state_dict())
    return q_network.to(device), target_network.to(device)


# ----------------------------------------------------------------------------------------------------------- data


class Batch(NamedTuple):
    """B transitions. The loss needs no more than `reward + discount * value(next_obs)`."""

    obs: Tensor  # (B, stack, H, W) uint8
    action: Tensor  # (B,) int64
    reward: Tensor  # (B,) float32: n-step return within the episode
    discount: Tensor  # (B,) float32: gamma^k * (1 - terminated) for the k steps really taken
    next_obs: Tensor  # (B, stack, H, W) uint8: k steps later; any frames where terminated
    index: Tensor  # (B,) int64: row


STORED = {"observation": "uint8", "action": "int32", "reward": "float32", "terminal": "uint8"}  # and maybe episode_end
CHUNK = 2**24  # bytes that are unpacked at a time


class Shard(NamedTuple):
    """The files of one suffix, and how many rows of them to read."""

    suffix: int
    files: dict[str, Path]
    rows: int


def find_replay_logs(dataset_dir: str) -> Path:
    """The one folder `replay_logs` in or below `dataset_dir`, or itself; fails where there is none, or several."""
    root = Path(dataset_dir)
    if root.name == "replay_logs" and root.is_dir():
        return root
    found = sorted(path for path in root.glob("**/replay_logs") if path.is_dir())
    if not found:
        fail(
            f"--dataset-dir {root}: no folder replay_logs is there; python dqn_softmoe.py --save-replay makes one in "
            "its run directory"
        )
    if len(found) > 1:
        fail(f"--dataset-dir {root} holds {len(found)} logs, choose one: {', '.join(map(str, found))}")
    return found[0]


def open_array(path: Path, dtype: str, frame_shape: tuple[int, ...]) -> tuple[gzip.GzipFile, int]:
    """A gzipped array's stream after its header, and its number of rows; ValueError for another type or shape."""
    file = gzip.open(path)  # noqa: SIM115
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{path.name} is of an unknown version {version}")
    shape, fortran_order, found = read_header[version](file)
    if found != np.dtype(dtype) or len(shape) != 1 + len(frame_shape) or shape[1:] != frame_shape or fortran_order:
        raise ValueError(f"{path.name} holds {found} {shape}, expected {dtype} {('rows', *frame_shape)}")
    return file, shape[0]


def find_shards(folder: Path, args: Args, frame_shape: tuple[int, int]) -> list[Shard]:
    """The shards to read, of equal lengths in each; fails on damaged files. Names may be missing between suffixes."""
    pattern = re.compile(r"(?:\$store\$_)?(\w+)_ckpt\.(\d+)\.gz")
    suffixes: dict[int, dict[str, Path]] = {}
    for path in folder.iterdir():
        if match := pattern.fullmatch(path.name):
            suffixes.setdefault(int(match[2]), {})[match[1]] = path
    shards = []
    for suffix, files in sorted(suffixes.items()):
        missing = [name for name in (*STORED, "add_count") if name not in files]
        if missing:
            warn(f"shard {suffix} of {folder} lacks {', '.join(missing)}: left out")
            continue
        try:
            with gzip.open(files["add_count"]) as file:
                count = np.lib.format.read_array(file, allow_pickle=False)
                file.read(1)  # gzip keeps the checksum at the end
            if count.shape != () or count.dtype.kind not in "iu" or count < 0:
                raise ValueError(f"add_count is {count.dtype} {count.shape}, not one number")
            lengths = {}
            for name in (name for name in (*STORED, "episode_end") if name in files):
                shape = frame_shape if name == "observation" else ()
                file, lengths[name] = open_array(files[name], STORED.get(name, "uint8"), shape)
                file.close()
            if len(set(lengths.values())) > 1:
                raise ValueError(f"its files are of different lengths: {lengths}")
        except Exception as error:  # a damaged file can raise nearly anything
            fail(f"shard {suffix} of {folder} is damaged: {type(error).__name__}: {error}")
        length = lengths["action"]
        count = int(count)  # rows ever added to the ring that was saved; what comes after them is older, or junk
        rows = count if count <= length else (count % length or length)
        if rows > 0:
            shards.append(Shard(suffix, files, math.ceil(rows * args.data_fraction)))
    if not shards:
        fail(f"no shard of logged transitions is in {folder}")
    return shards[: args.max_shards]


def unpack(shards: list[Shard], name: str, target: np.ndarray, whole: bool, bar: tqdm, stop: "StopSignal") -> None:
    """Write an array of all shards, one after the other, into `target`. Raises what a damaged file raises."""
    start = 0
    for shard in shards:
        file, length = open_array(shard.files[name], STORED.get(name, "uint8"), target.shape[1:])
        with file:
            rows = target[start : start + shard.rows]
            left = length * rows[:1].nbytes - rows.nbytes
            step = max(1, CHUNK // max(rows[:1].nbytes, 1))
            for i in range(0, shard.rows, step):
                part = rows[i : i + step]
                content = file.read(part.nbytes)
                if len(content) < part.nbytes:
                    raise EOFError(f"{shard.files[name].name} ends too early")
                part[:] = np.frombuffer(content, part.dtype).reshape(part.shape)
                bar.update(part.nbytes)
                if stop.received:
                    raise InterruptedError("stopped by a signal")
            while whole and (content := file.read(CHUNK)):  # to its end, where gzip keeps the checksum
                left -= len(content)
            if whole and left != 0:
                raise EOFError(f"{shard.files[name].name} has not the {length} rows that its header says")
        start += shard.rows


def unpack_dataset(folder: Path, shards: list[Shard], args: Args, frame_shape: tuple[int, int]) -> dict:
    """Arrays over all rows of all shards, memory-mapped; unpacked once, into a cache named after its sources."""
    names = [name for name in (*STORED, "episode_end") if all(name in shard.files for shard in shards)]
    sources = {
        f"{name} {shard.suffix}": [shard.rows, shard.files[name].stat().st_size, shard.files[name].stat().st_mtime_ns]
        for shard in shards
        for name in names
    }
    root = Path(args.cache_dir or folder.parent / "replay_cache")
    key = hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:12]
    cache = root / f"{folder.parent.parent.name}-{folder.parent.name}-{key}"
    if not cache.exists():
        rows = sum(shard.rows for shard in shards)
        shapes = {name: (rows, *frame_shape) if name == "observation" else (rows,) for name in names}
        need = sum(math.prod(shapes[name]) * np.dtype(STORED.get(name, "uint8")).itemsize for name in names)
        temporary = root / f"{cache.name}.{time.time_ns()}.tmp"  # several runs may start at once
        try:
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(root).free
            if need > free:
                fail(f"the unpacked data takes {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free in {root}")
            print(f"unpacking {rows:,} rows, {need / 1e9:.2f} GB of {free / 1e9:.2f} GB free, into {cache}", flush=True)
            bar = tqdm(total=need, desc="unpacking", unit="B", unit_scale=True, **bar_style())
            with bar, StopSignal() as stop:
                for name in names:
                    array = np.lib.format.open_memmap(
                        temporary / f"{name}.npy", mode="w+", dtype=STORED.get(name, "uint8"), shape=shapes[name]
                    )
                    unpack(shards, name, array, args.data_fraction == 1, bar, stop)
                    array.flush()
            if not cache.exists():  # another run was not faster
                temporary.rename(cache)
        except Exception as error:
            fail(f"cannot unpack {folder} into {root} (--cache-dir): {type(error).__name__}: {error}")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    try:
        # Read-only: Linux refuses a writable private map that is larger than its memory.
        return {name: np.load(cache / f"{name}.npy", mmap_mode="r") for name in names}
    except Exception as error:
        fail(f"cannot read {cache}, if it is damaged delete it: {type(error).__name__}: {error}")


def available_memory(device: torch.device) -> int:
    """Free bytes on the device; on the host, what the system and the container (cgroup) leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = Path("/proc/meminfo").read_text().split()
        free = int(meminfo[meminfo.index("MemAvailable:") + 1]) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
        if limit != "max":
            used = int((group / "memory.current").read_text())
            usage = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = int(usage["active_file"]) + int(usage["inactive_file"])  # given back when it is needed
            free = min(free, int(limit) - used + cache)
        return free
    except (OSError, ValueError, KeyError):  # not Linux: what is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class OfflineReplay:
    """Logged transitions, which are drawn uniformly: rows of single frames, as `ReplayBuffer` has them.

    Stacks and n-step windows are put together when a transition is drawn. A row can be drawn if it is a step, its stack
    lies in its shard, and so does its window, up to the frame to bootstrap from. Everything is a tensor of fixed shape,
    so `sample` runs inside a CUDA graph. Raises ValueError where no row can be drawn.
    """

    def __init__(self, arrays: dict[str, np.ndarray], shard_rows: list[int], *, n_step: int, gamma: float, device):
        self.frame_shape, self.device = arrays["observation"].shape[1:], torch.device(device)
        last = np.cumsum(shard_rows) - 1  # of each shard
        terminal = arrays["terminal"] != 0
        if "episode_end" in arrays:
            end = np.asarray(arrays["episode_end"])
            step, terminated, truncated = end != 3, end == 1, end == 2
            truncated[last] = False  # the frame to bootstrap from is not there
        else:  # Dopamine's rule: the three rows after a terminal one, and a shard's first three, are no starts
            step, terminated, truncated = np.ones_like(terminal), terminal, np.zeros_like(terminal)
            for k in range(1, STACK_SIZE):
                step[k:] &= ~terminal[:-k]
            first = last + 1 - np.array(shard_rows)
            step[(first[:, None] + np.arange(STACK_SIZE - 1)).clip(max=len(step) - 1)] = False
        ended = terminated | truncated
        for row, count in zip(last, shard_rows, strict=True):  # windows that would leave the shard
            tail = slice(row + 1 - min(n_step, count), row + 1)
            step[tail] &= np.logical_or.accumulate(ended[tail][::-1])[::-1]
        starts = np.flatnonzero(step)
        if len(starts) == 0:
            raise ValueError("no transition of the data has its whole stack and n-step window")

        def tensor(array) -> Tensor:
            warnings.filterwarnings("ignore", ".*not writable.*")  # nothing writes to data that is mapped
            return torch.from_numpy(np.ascontiguousarray(array) if array.ndim == 1 else array).to(self.device)

        self.frames = tensor(arrays["observation"].reshape(len(step), -1))  # on the disk, if on the host
        self.action, self.reward = tensor(arrays["action"]), tensor(arrays["reward"])
        self.terminated, self.ended, self.starts = tensor(terminated), tensor(ended), tensor(starts)
        self.stack_offsets = torch.arange(STACK_SIZE - 1, -1, -1, device=device)  # oldest first
        self.steps = torch.arange(n_step, device=device)  # 0 .. n-1
        self.gammas = torch.tensor([gamma**k for k in range(n_step + 1)], device=device)  # (n+1,)

    def __len__(self) -> int:
        """Number of transitions that can be drawn."""
        return len(self.starts)

    @staticmethod
    def nbytes(rows: int, frame_shape: tuple[int, int]) -> int:
        """Bytes of so many rows."""
        return rows * (math.prod(frame_shape) + 4 + 4 + 1 + 1 + 8)

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement."""
        draw = torch.rand(batch_size, dtype=torch.float64, device=self.device) * len(self.starts)
        return self.gather(self.starts[draw.long()])

    def gather(self, row: Tensor) -> Batch:
        """The transitions that start at rows (B,)."""
        window = (row[:, None] + self.steps).clamp_max(len(self.action) - 1)  # (B, n)
        ended = self.ended[window]
        taken = ended.cumsum(dim=1) - ended.long() == 0  # (B, n): no end before this step
        reward = (torch.where(taken, self.reward[window], 0) * self.gammas[:-1]).sum(dim=1)
        terminated = (self.terminated[window] & taken).any(dim=1)
        num_steps = taken.sum(dim=1)
        discount = self.gammas[num_steps] * ~terminated
        next_row = (row + num_steps).clamp_max(len(self.action) - 1)
        return Batch(self._stack(row), self.action[row].long(), reward, discount, self._stack(next_row), row)

    def _stack(self, row: Tensor) -> Tensor:
        """Stacked frames (B, stack, H, W) that end at rows (B,); before an episode's start the data has black rows."""
        index = row[:, None] - self.stack_offsets  # (B, stack)
        return self.frames.index_select(0, index.view(-1)).view(*index.shape, *self.frame_shape)


def game_name(env_id: str) -> str:
    """Breakout for BreakoutNoFrameskip-v4, ALE/Breakout-v5, my_module:Breakout-v0."""
    return re.split(r"NoFrameskip|Deterministic|-v\d", re.split("[:/]", env_id)[-1])[0]


def check_game(folder: Path, args: Args, num_actions: int) -> None:
    """Fail where the data is of another game than --env-id; warn where it does not say how it was made."""
    try:
        metadata = json.loads((folder.parent / "metadata.json").read_text())
        env_id, data_actions = str(metadata["env_id"]), int(metadata["num_actions"])
    except FileNotFoundError:
        env_id, data_actions = folder.parent.parent.name, num_actions
        warn(f"{folder.parent} has no metadata.json: the ROM and its version may differ from what evaluation plays")
        if gym.envs.registration.registry.get(f"{env_id}NoFrameskip-v4") is None:
            return  # the folder is not named after a game
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder.parent / 'metadata.json'} is damaged: {type(error).__name__}: {error}")
    if game_name(env_id) != game_name(args.env_id) or data_actions != num_actions:
        fail(f"--env-id {args.env_id} is not the game of {folder}: that is {env_id}")


def open_dataset(args: Args, envs: Environments, device: torch.device) -> OfflineReplay:
    """The data of --dataset-dir, on the GPU if it fits there, else on the disk; fails where it cannot be used."""
    folder = find_replay_logs(args.dataset_dir)
    check_game(folder, args, envs.num_actions)
    shards = find_shards(folder, args, tuple(envs.frame_shape))
    arrays = unpack_dataset(folder, shards, args, tuple(envs.frame_shape))
    lowest, highest = arrays["action"].min(), arrays["action"].max()
    if lowest < 0 or highest >= envs.num_actions:
        fail(f"{folder}: actions {lowest} to {highest}, but {args.env_id} has {envs.num_actions}")
    rows = [shard.rows for shard in shards]
    fits = OfflineReplay.nbytes(sum(rows), envs.frame_shape) < 0.8 * available_memory(device)
    memory = device if device.type == "cuda" and args.replay_device == "auto" and fits else torch.device("cpu")
    try:
        return OfflineReplay(arrays, rows, n_step=args.n_step, gamma=args.gamma, device=memory)
    except ValueError as error:
        fail(f"--dataset-dir {args.dataset_dir}: {error}")


# ----------------------------------------------------------------------------------------------------------- loss


def load_balancing_loss(output: MoEOutput, args: Args) -> Tensor:
    """Weighted sum of the chosen auxiliary losses of a Top-1 router; noise std 1/E as in the authors' code."""
    logits, probs = output.routing.router_logits, output.routing.router_probs
    loss = torch.zeros((), device=logits.device)
    if "importance" in args.load_balancing:
        loss = loss + args.importance_weight * importance_loss(probs)
    if "load" in args.load_balancing:
        noisy_logits = logits + torch.randn_like(logits) / args.num_experts
        loss = loss + args.load_weight * load_loss(logits, noisy_logits, 1 / args.num_experts)
    return loss


def project_distribution(atoms: Tensor, probs: Tensor, support: Tensor) -> Tensor:
    """Project probs (B, N) at atoms (B, N) onto the evenly spaced support (N,) -> (B, N).

    An atom's mass is shared by its two neighbours in the support, beyond the ends it goes to the end (Bellemare et al.,
    2017, eq. 7). Dense, so deterministic on a GPU too.
    """
    spacing = (support[-1] - support[0]) / (support.numel() - 1)
    distance = (atoms.clamp(support[0], support[-1])[:, None] - support[:, None]).abs() / spacing  # (B, N, N)
    return torch.einsum("bij,bj->bi", (1 - distance).clamp_min(0), probs)  # i: support, j: atoms


def td_loss(
    q_network: QNetwork, target_network: QNetwork, batch: Batch, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """C51's or DQN's loss plus `cql_alpha` times CQL's regulariser (Kumar et al., 2020, eq. 4: CQL(H)).

    C51: cross-entropy to the projected `reward + discount * Z_target(next_obs, a)` (Bellemare et al., 2017). DQN: Huber
    loss to `reward + discount * max_a Q_target(next_obs, a)`. CQL: mean of logsumexp_a Q(obs, a) - Q(obs, action), on
    expected returns. Returns the loss (0-D) and 0-D metrics.
    """
    support = q_network.support
    rows = torch.arange(batch.action.shape[0], device=batch.action.device)
    logits, output = q_network(batch.obs)  # (B, A, N)
    q_values = q_network.expected(logits)  # (B, A)
    q_taken = q_values[rows, batch.action]  # (B,)
    with torch.no_grad():
        next_logits = target_network(batch.next_obs)[0]  # (B, A, N)
        double = args.distributional and args.double
        next_q = q_network.q_values(batch.next_obs) if double else target_network.expected(next_logits)  # (B, A)
        next_logits = next_logits[rows, next_q.argmax(dim=1)]  # (B, N)
    if args.distributional:
        atoms = batch.reward[:, None] + batch.discount[:, None] * support  # (B, N)
        target_probs = project_distribution(atoms, next_logits.softmax(dim=1), support)  # (B, N)
        loss = -(target_probs * logits[rows, batch.action].log_softmax(dim=1)).sum(dim=1).mean()
    else:
        loss = F.smooth_l1_loss(q_taken, batch.reward + batch.discount * next_logits[:, 0])
    cql = (q_values.logsumexp(dim=1) - q_taken).mean()
    metrics = {"td_loss": loss.detach(), "cql_loss": cql.detach(), "q_data": q_taken.detach().mean()}
    metrics["q_greedy"] = q_values.detach().max(dim=1).values.mean()
    loss = loss + args.cql_alpha * cql
    if args.load_balancing != "none":
        balancing = load_balancing_loss(output, args)
        loss = loss + balancing
        metrics["load_balancing_loss"] = balancing.detach()
    return loss, metrics | {"loss": loss.detach()}


# ----------------------------------------------------------------------------------------------- training, running


def select_actions(q_values: Tensor, epsilon: Tensor | float) -> Tensor:
    """Epsilon-greedy actions (N,) from q_values (N, A)."""
    N, A = q_values.shape
    random = torch.randint(A, (N,), device=q_values.device)
    explore = torch.rand(N, device=q_values.device) < epsilon
    return torch.where(explore, random, q_values.argmax(dim=1))


@torch.no_grad()
def evaluate(q_network: QNetwork, args: Args, envs: Environments, seed: int, stop: "StopSignal") -> list[float]:
    """Raw returns of whole games at `eval_epsilon`: each environment plays its share of `eval_steps` and its last game.

    Training's random state is left as it was. Returns fewer only where a signal stops it.
    """
    device = next(q_network.parameters()).device
    stack = FrameStack(envs.num_envs, envs.frame_shape, device)
    share = math.ceil(args.eval_steps / envs.num_envs)
    returns: list[float] = []
    running, steps = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=int)
    frame, start = envs.reset(seed), np.ones(envs.num_envs, dtype=bool)
    valid, playing = np.ones((2, envs.num_envs), dtype=bool)
    bar = tqdm(total=args.eval_steps, desc="evaluating", unit="step", unit_scale=True, leave=False, **bar_style())
    with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while playing.any() and not stop.received:
            q_values = q_network.q_values(stack.push(frame, start))
            envs.send(select_actions(q_values, args.eval_epsilon).cpu().numpy())
            step = envs.recv()
            running += step.reward * valid
            steps += valid
            bar.update(int((valid & playing).sum()))
            over = step.game_over & valid
            returns += running[over & playing].tolist()
            playing &= ~(over & (steps >= share))
            running[over] = 0.0
            frame, start, valid = step.frame, ~valid | step.terminated, ~over
    return returns


class CudaGraph:
    """Calls `function` as one CUDA graph: a launch-bound update costs one launch.

    The first calls run eagerly (cuDNN picks its algorithms, torch.compile compiles), the next is captured, and each
    call counts once: capturing does not execute. Inputs keep their shapes; host arrays travel through pinned memory.
    `function` must only use tensors that stay in place, and the default generators for random numbers.
    """

    def __init__(self, function: Callable, warmup: int = 10):
        self.function, self.warmup = function, warmup
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] | None = None
        self.pinned: list[Tensor] = []
        self.stream, self.copied = torch.cuda.Stream(), torch.cuda.Event()

    def __call__(self, *inputs):
        tensors = [torch.as_tensor(x) for x in inputs]
        if self.inputs is None:
            self.pinned = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
            self.inputs = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in tensors]
        if tensors:
            self.copied.synchronize()  # the last call's copies still read the pinned buffers
        for staged, static, x in zip(self.pinned, self.inputs, tensors, strict=True):
            static.copy_(x if x.is_cuda else staged.copy_(x), non_blocking=True)
        self.copied.record()
        if self.warmup > 0:
            self.warmup -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Other threads (TensorBoard, pinning) may call CUDA while this one captures.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        self.graph.replay()
        return self.outputs


def bar_style() -> dict:
    """Progress bars fit the terminal; in a log file they print a line every 30 s."""
    return {"dynamic_ncols": True, "mininterval": 0.5 if sys.stderr.isatty() else 30.0}


class RunLog:
    """A run directory: config.json, metrics.csv, TensorBoard events, checkpoints, results.

    metrics.csv, per iteration: mean raw return of its evaluation (the paper's score), losses and Q-values of the last
    update, updates per second.
    """

    COLUMNS = ("iteration", "updates", "episodes", "mean_return", "td_loss", "cql_loss", "q_data", "q_greedy", "ups")

    def __init__(self, run_dir: Path, total_updates: int, update: int, state: dict | None):
        self.file = open(run_dir / "metrics.csv", "a+", newline="", buffering=1)  # noqa: SIM115
        self.writer = csv.writer(self.file)
        if state is None:
            self.writer.writerow(self.COLUMNS)
        else:  # forget what was logged after the checkpoint
            self.file.truncate(min(state["size"], os.fstat(self.file.fileno()).st_size))
        self.score = "-"
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=update + 1 if state else None)
        self.started, self.started_update = time.monotonic(), update
        units = {"unit": "update", "unit_scale": True}
        self.bar = tqdm(total=total_updates, initial=update, **units, **bar_style())

    def restart_clock(self, update: int) -> None:
        """Evaluation does not count as time of the updates."""
        self.started, self.started_update = time.monotonic(), update

    def ups(self, update: int) -> float:
        return (update - self.started_update) / (time.monotonic() - self.started)

    def iteration(self, number: int, update: int, returns: list[float], values: dict[str, float], ups: float) -> None:
        mean = float(np.mean(returns))
        self.score = f"{mean:.2f}"
        losses = [f"{values[name]:.6g}" for name in self.COLUMNS[4:8]]
        self.writer.writerow([number, update, len(returns), f"{mean:.4f}", *losses, f"{ups:.1f}"])
        self.scalars("charts", {"eval_return": mean}, update)

    def training(self, values: dict[str, float], update: int) -> None:
        self.scalars("losses", values, update)
        self.scalars("charts", {"ups": self.ups(update)}, update)
        self.bar.set_postfix_str(f"return {self.score}, loss {values['loss']:.4f}", refresh=False)

    def scalars(self, prefix: str, values: dict[str, float], update: int) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{prefix}/{name}", value, update)

    def state(self) -> dict:
        """What a checkpoint must remember to go on with the same records."""
        self.tensorboard.flush()
        os.fsync(self.file.fileno())
        return {"size": os.fstat(self.file.fileno()).st_size}

    def close(self) -> None:
        self.bar.close()
        self.tensorboard.close()
        self.file.close()


def to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """0-D tensors to numbers, waiting for the device once."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True)) if metrics else {}


def write_json(path: Path, content: dict, indent: int | None = 2) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=indent) + "\n")
    temporary.replace(path)


def write_synced(path: Path, write: Callable) -> None:
    """Call `write(file)` and wait until the file is on the disk."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def save_checkpoint(run_dir: Path, update: int, state: dict) -> bool:
    """Write checkpoint-<update> beside the last one, then drop that: a crash or a full disk leaves the last one.

    Returns False, after a warning, where it could not be written.
    """
    path, temporary = run_dir / f"checkpoint-{update:012d}", run_dir / "checkpoint.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_synced(temporary / "state.pt", lambda file: torch.save(state, file))
        temporary.rename(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        tqdm.write(f"warning: no checkpoint at update {update}, the last good one stays: {error}", file=sys.stderr)
        return False
    for old in run_dir.glob("checkpoint-*"):
        if old != path:
            shutil.rmtree(old, ignore_errors=True)
    return True


def last_checkpoint(run_dir: Path) -> Path | None:
    return max(run_dir.glob("checkpoint-*"), default=None)


def load_checkpoint(run_dir: Path, parts: dict, device: torch.device) -> dict:
    """Restore networks, optimizer and random state from the last checkpoint; returns the rest of it.

    Fails on a missing, damaged or foreign one.
    """
    path = last_checkpoint(run_dir)
    if path is None:
        fail(f"--resume {run_dir}: there is no checkpoint")
    capturable = parts["optimizer"].param_groups[0]["capturable"]
    try:
        if not zipfile.is_zipfile(path / "state.pt"):  # torch.load would warn, then try older formats
            raise ValueError("state.pt is no archive of PyTorch's")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        for group in parts["optimizer"].param_groups:
            group["capturable"] = capturable  # the run may have moved to another device
        torch.set_rng_state(state["random"]["cpu"])
        if device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"])
        return {name: state[name] for name in ("update", "evaluated", "values", "log", "transitions")}
    except Exception as error:  # a damaged file can raise nearly anything
        fail(f"--resume: {path} is damaged or not a checkpoint of this run: {type(error).__name__}: {error}")


def load_args(run_dir: str) -> Args:
    """The arguments that a run was started with."""
    try:
        config = json.loads((Path(run_dir) / "config.json").read_text())
        if config["script"] != Path(__file__).name:
            fail(f"--resume {run_dir}: a run of {config['script']}, not of {Path(__file__).name}")
        return check_types(Args(**config["args"] | {"resume": run_dir}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--resume {run_dir}: no run of {Path(__file__).name} is there ({type(error).__name__}: {error})")


def check_resume(args: Args, saved: Args) -> None:
    """Fail where arguments contradict the resumed run, except those of `may_change`."""
    may_change = "resume total_updates checkpoint_every dataset_dir cache_dir".split()
    may_change += "cuda compile cuda_graphs replay_device".split()
    contradictions = [
        f"{flag(field.name)} {getattr(args, field.name)} (was {getattr(saved, field.name)})"
        for field in fields(Args)
        if field.name not in may_change and getattr(args, field.name) != getattr(saved, field.name)
    ]
    if contradictions:
        fail(f"--resume {args.resume}: arguments contradict the run: {', '.join(contradictions)}")


def parse_args() -> Args:
    """Command line to Args; with --resume, what is not given is as in the resumed run."""
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    if args.resume is not None:
        args = tyro.cli(Args, default=load_args(args.resume))
    return args


def save_args(run_dir: Path, args: Args) -> None:
    """Write config.json, what `load_args` reads."""
    versions = {"torch": torch.__version__, "ale_py": ale_py.__version__, "gymnasium": gym.__version__}
    config = {"script": Path(__file__).name, "args": asdict(replace(args, resume=None)), "versions": versions}
    write_json(run_dir / "config.json", config)


def open_run_dir(args: Args) -> Path:
    """Make a directory that names environment, agent, layer, experts and seed; never one that exists."""
    agent = "cql_c51" if args.distributional else "cql"
    env = args.env_id.replace("/", "-").replace(":", "-")
    name = args.run_name or f"{env}__{agent}_{args.layer}{args.num_experts}__seed{args.seed}"
    for suffix in ["", *(f"-{i}" for i in range(2, 10_000))]:
        run_dir = Path(args.runs_dir) / f"{name}{suffix}"
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            fail(f"cannot write the run directory {run_dir}: {error.strerror}")
        return run_dir
    fail(f"too many runs named {name} in {args.runs_dir}")


def describe(args: Args, run_dir: Path, envs: Environments, q_network: QNetwork, data: OfflineReplay) -> str:
    """What runs, for the console."""

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    on_gpu = next(q_network.parameters()).is_cuda
    processor = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    moe, encoder = q_network.moe, count(q_network.encoder)
    middle, total = count(moe, getattr(q_network, "tokenizer", nn.Identity())), count(q_network)
    layer = f"dense layer of {args.expert_hidden_dim * args.num_experts}"
    if args.layer != "dense":
        layer = f"{args.layer}, {args.num_experts} experts of {args.expert_hidden_dim}, {moe.num_slots} slots each, "
        layer += f"{moe.num_tokens} tokens of {moe.token_dim}"
    parts = [name for name in ("double", "dueling") if args.distributional and getattr(args, name)]
    parts = [f"CQL+C51, {args.num_atoms} atoms" if args.distributional else "CQL", f"{args.n_step}-step", *parts]
    memory = data.nbytes(len(data.action), data.frame_shape)
    where = "GPU memory" if data.device.type == "cuda" else "disk, memory-mapped"
    h, w = envs.frame_shape
    return f"""{Path(__file__).name}: {args.env_id}, seed {args.seed}
  data         {len(data):,} transitions of {args.dataset_dir}
               {memory / 1e9:.2f} GB of {where}
  evaluation   {envs.description}
               {args.num_envs} in parallel, {envs.num_actions} actions, {STACK_SIZE} frames of {h}x{w}
  encoder      {args.encoder}, width {args.encoder_width}
  layer        {layer}
  agent        {", ".join(parts)}, alpha {args.cql_alpha:g}
  parameters   {total:,} = encoder {encoder:,} + layer {middle:,} + head {total - encoder - middle:,}
  training     {args.total_updates:,} updates of {args.batch_size}
  device       {processor}
  run          {run_dir}"""


class StopSignal:
    """`with StopSignal() as stop`: SIGTERM, SIGINT or SIGUSR1 sets `stop.received`; the same again acts as usual."""

    def __enter__(self) -> "StopSignal":
        self.received, self.old = False, {}
        if threading.current_thread() is threading.main_thread():
            for name in {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGINT)}:
                self.old[name] = signal.signal(name, self.receive)
        return self

    def receive(self, number: int, _) -> None:
        self.received = True
        signal.signal(number, self.old.pop(number))

    def __exit__(self, *_) -> None:
        for name, handler in self.old.items():
            signal.signal(name, handler)


def check_finite(values: dict[str, float], q_network: QNetwork, update: int, run_dir: Path, log: RunLog) -> None:
    """Stop the run where the loss or a weight is not finite: such a state never reaches a checkpoint."""
    finite = torch.stack([weight.isfinite().all() for weight in q_network.parameters()]).all()
    if not (finite and math.isfinite(values.get("loss", 0.0))):
        log.close()
        good = last_checkpoint(run_dir)
        fail(f"the loss is {values.get('loss')} at update {update}; the last good checkpoint is {good}")


def measure_routing(q_network: QNetwork, data: OfflineReplay, args: Args, device: torch.device) -> dict[str, float]:
    """Routing statistics on a batch of the data; training's random state stays as it is."""
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _, output = q_network(data.sample(args.batch_size).obs.to(device))
    return to_floats(routing_stats(output))


def main(args: Args) -> None:
    if args.resume is not None:
        check_resume(args, load_args(args.resume))
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if args.cuda and not on_gpu:
        print("no CUDA device: running on the CPU", file=sys.stderr)
    if on_gpu and args.compile and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        fail("--compile needs a C compiler, gcc or clang; --no-compile does without")
    torch.backends.cudnn.benchmark = on_gpu
    torch.manual_seed(args.seed)
    envs = make_envs(args, args.num_envs)
    data = open_dataset(args, envs, device)
    q_network, target_network = make_networks(args, envs, device)
    graphs = on_gpu and args.cuda_graphs
    adam = {"lr": args.learning_rate, "eps": args.adam_eps, "fused": True, "capturable": graphs}
    optimizer = torch.optim.Adam(q_network.parameters(), **adam)
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer}
    state = {"update": 0, "evaluated": 0, "values": {}, "log": None, "transitions": len(data)}
    if args.resume is not None:
        state = load_checkpoint(Path(args.resume), parts, device)
    if len(data) != state["transitions"]:
        fail(f"--resume {args.resume}: {state['transitions']:,} transitions were in the data, now {len(data):,} are")
    run_dir = open_run_dir(args) if args.resume is None else Path(args.resume)
    done = saved_update = state["update"]
    evaluated, values = state["evaluated"], state["values"]
    save_args(run_dir, args)
    print(describe(args, run_dir, envs, q_network, data), flush=True)
    log = RunLog(run_dir, args.total_updates, done, state["log"])
    loss_function = torch.compile(td_loss, dynamic=False) if on_gpu and args.compile else td_loss

    def update(*batch):
        batch = Batch(*(torch.as_tensor(x, device=device) for x in batch)) if batch else data.sample(args.batch_size)
        optimizer.zero_grad(set_to_none=True)
        loss, metrics = loss_function(q_network, target_network, batch, args)
        loss.backward()
        optimizer.step()
        return metrics

    learn_from_host = data.device != device
    periods = [every for every in (args.log_every, args.iteration_updates, args.checkpoint_every) if every]
    if graphs:
        warnings.filterwarnings("ignore", ".*capturable=True.*")  # the warm-up runs it uncaptured on purpose
        update = CudaGraph(update)

    def checkpoint() -> bool:
        random = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if on_gpu else {})
        state = {name: part.state_dict() for name, part in parts.items()} | {"random": random}
        state |= {"update": done, "evaluated": evaluated, "values": values, "log": log.state()}
        state["transitions"] = len(data)
        return save_checkpoint(run_dir, done, state)

    saved = True
    with StopSignal() as stop:
        while not stop.received:
            last = done >= args.total_updates
            if done > evaluated and (last or done % args.iteration_updates == 0):
                ups = log.ups(done)
                returns = evaluate(q_network, args, envs, reset_seed(args.seed, done, evaluation=True), stop)
                if stop.received:
                    break  # the resumed run repeats this evaluation
                log.iteration(math.ceil(done / args.iteration_updates) - 1, done, returns, values, ups)
                log.restart_clock(done)
                evaluated = done
            if done > saved_update and (last or args.checkpoint_every and done % args.checkpoint_every == 0):
                saved, saved_update = checkpoint(), done
            if last:
                break
            metrics = update(*data.sample(args.batch_size)) if learn_from_host else update()
            done += 1
            log.bar.update()
            if done % args.target_network_frequency == 0:
                target_network.load_state_dict(q_network.state_dict())
            if any(done % every == 0 for every in periods) or done == args.total_updates:
                values = to_floats(metrics)
                check_finite(values, q_network, done, run_dir, log)
            if done % args.log_every == 0:
                log.training(values, done)
                if args.layer != "dense":
                    log.scalars("moe", measure_routing(q_network, data, args, device), done)
        if stop.received and done > saved_update:
            check_finite(to_floats(metrics), q_network, done, run_dir, log)
            saved = checkpoint()
        envs.close()
    log.close()
    if not stop.received:
        torch.save({name: weight.cpu() for name, weight in q_network.state_dict().items()}, run_dir / "weights.pt")
    print(f"{done:,} updates done, in {run_dir}")
    if stop.received and last_checkpoint(run_dir):
        print(f"stopped by a signal; continue with: python {Path(__file__).name} --resume {run_dir}")
    if not saved:
        raise SystemExit(1)


if __name__ == "__main__":
    main(parse_args())
