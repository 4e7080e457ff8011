"""Rainbow with mixture-of-experts layers on Atari.

    python rainbow_softmoe.py --num-experts 4 --env-id BreakoutNoFrameskip-v4

Reproduces "Mixtures of Experts Unlock Parameter Scaling for Deep RL" (Obando-Ceron et al., 2024, arXiv 2402.08609).
C51 with dueling heads, double selection, noisy layers, n-step returns and prioritised replay, its dense layer replaced
by a Soft MoE over the tokens of the encoder's feature map; see `diff dqn_softmoe.py rainbow_softmoe.py`.
Needs `moe_layers.py` beside it and nothing else of this repository.

Differs from the authors' code (google/dopamine, labs/moes) on purpose:
- Four environments step in parallel, and the one update per four agent steps runs while they emulate, so it does not
  see the newest four transitions. Every update still follows exactly four steps of one policy.
- The step that resets an environment counts as an agent step (about one in 200 on Breakout, fewer elsewhere).
- A checkpoint cuts the running episodes because emulators cannot be saved: as a truncation (their values bootstrap),
  and their returns are not counted.
- An episode cut by the frame limit bootstraps from its last frame.
- Evaluation is without noise everywhere; the authors' experts stay noisy in it. The two heads draw their noise apart.
"""

import csv
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections import deque
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
    total_timesteps: int = 50_000_000
    """agent steps; one is 4 frames (paper: 50M, which is 200M frames; DER: 100,000)"""
    runs_dir: str = "runs"
    """folder of run directories"""
    run_name: str | None = None
    """name of the run directory (default: environment, agent, layer, experts, seed)"""
    resume: str | None = None
    """run directory to continue from its last checkpoint, with the arguments it was started with"""
    checkpoint_every: int = 2_500_000
    """agent steps between checkpoints, which start new games (0: only at the end and on a signal)"""
    iteration_steps: int = 250_000
    """agent steps per row of metrics.csv (paper: 250,000; DER: 10,000)"""
    log_every: int = 1_000
    """agent steps between TensorBoard points"""
    eval_episodes: int = 10
    """evaluation episodes at the end of training (DER: 100)"""
    cuda: bool = True
    """run on the GPU where there is one"""
    compile: bool = True
    """torch.compile the loss and its gradient (GPU only)"""
    cuda_graphs: bool = True
    """capture acting, storing and learning in CUDA graphs (GPU only)"""

    # Environment
    num_envs: int = 4
    """environments stepped in parallel; one round is `num_envs` agent steps"""
    sticky_actions: float = 0.25
    """probability that the emulator repeats the previous action (Machado et al., 2018; DER: 0; Atari only)"""
    noop_max: int = 0
    """random no-ops at an episode's start, at most (paper: 0; DER: 30; Atari only)"""
    terminal_on_life_loss: bool = False
    """a lost life ends the learner's episode while the game goes on (paper: no; DER: yes; Atari only)"""

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

    # Replay
    buffer_size: int = 1_000_000
    """transitions in replay (paper: 1M)"""
    batch_size: int = 32
    """transitions per update (paper: 32)"""
    n_step: int = 3
    """steps of the return before bootstrapping (paper: DQN 1, Rainbow 3, DER 10)"""
    replay_ratio: float = 0.25
    """updates per agent step (paper: 0.25; figure 4: 0.5, 1, 2; DER: 1)"""
    replay_device: Literal["auto", "cpu"] = "auto"
    """auto: GPU memory when the replay fits there, else host memory"""
    save_replay: bool = False
    """log every transition below the run directory, in the layout of the DQN Replay Dataset"""
    replay_shard_size: int = 1_000_000
    """rows per shard of that log (published data: 1M)"""

    # Optimisation
    learning_rate: float = 6.25e-5
    """Adam's learning rate (paper: 6.25e-5; DER: 1e-4)"""
    adam_eps: float = 1.5e-4
    """Adam's epsilon (paper: 1.5e-4)"""
    gamma: float = 0.99
    """discount (paper: 0.99)"""
    learning_starts: int = 20_000
    """agent steps before the first update (paper: 20,000; DER: 1,600)"""
    target_network_frequency: int = 8_000
    """agent steps between copies to the target network (paper: 8,000; DER: 2,000)"""

    # Rainbow
    num_atoms: int = 51
    """atoms of the return distribution (Bellemare et al., 2017; paper: 51)"""
    v_min: float = -10.0
    """lowest atom, in clipped returns (paper: -10)"""
    v_max: float = 10.0
    """highest atom, in clipped returns (paper: 10)"""
    double: bool = True
    """choose the target's action with the online network (van Hasselt et al., 2016)"""
    dueling: bool = True
    """value and advantage heads (Wang et al., 2016)"""
    noisy: bool = True
    """noisy heads and noisy first layers of experts instead of epsilon (Fortunato et al., 2018; sigma_0 = 0.1)"""
    prioritized: bool = True
    """draw transitions in proportion to the square root of their loss (Schaul et al., 2016)"""
    end_epsilon: float = 0.01
    """exploration after the decay (paper: 0.01; not with --noisy)"""
    epsilon_decay_steps: int = 250_000
    """agent steps of linear decay from 1 after learning starts (paper: 250,000; DER: 2,000; not with --noisy)"""
    eval_epsilon: float = 0.001
    """exploration in evaluation (paper: 0.001)"""

    def __post_init__(self):
        if self.num_experts is None:
            self.num_experts = 1 if self.layer == "dense" else 4


def fail(message: object) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


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
    positive = (
        "total_timesteps iteration_steps log_every num_envs num_experts expert_hidden_dim encoder_width batch_size"
    )
    for name in f"{positive} buffer_size n_step target_network_frequency replay_shard_size".split():
        if getattr(args, name) < 1:
            fail(f"{flag(name)} must be at least 1, not {getattr(args, name)}")
    for name in "seed checkpoint_every eval_episodes noop_max epsilon_decay_steps learning_starts".split():
        if not 0 <= getattr(args, name) < 2**63:
            fail(f"{flag(name)} must be a number from 0 to 2^63 - 1, not {getattr(args, name)}")
    if args.noop_max > 1_000:
        fail(f"--noop-max must be at most 1000, not {args.noop_max}")
    for name in "sticky_actions end_epsilon eval_epsilon gamma".split():
        if not 0 <= getattr(args, name) <= 1:
            fail(f"{flag(name)} must lie in [0, 1], not {getattr(args, name)}")
    for name in "capacity_factor learning_rate adam_eps importance_weight load_weight".split():
        if not 0 < getattr(args, name) < math.inf:
            fail(f"{flag(name)} must be above 0, not {getattr(args, name)}")
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
        ("replay_shard_size", args.save_replay, "--save-replay"),
        ("end_epsilon", not args.noisy, "--no-noisy"),
        ("epsilon_decay_steps", not args.noisy, "--no-noisy"),
    ):
        if not works and getattr(args, name) != getattr(Args, name):
            fail(f"{flag(name)} has no effect with these arguments: it needs {needs}")
    N, updates = args.num_envs, args.replay_ratio * args.num_envs
    if not (1 <= updates < math.inf and math.isclose(updates, round(updates))):
        fail(
            f"--replay-ratio {args.replay_ratio} with --num-envs {N} is {updates:g} updates per round of {N} agent "
            "steps: it must be a whole number, 1 or more"
        )
    need = max(args.batch_size, N * (STACK_SIZE + args.n_step + 2))  # + 2: beside two reset rows one can be drawn
    if args.buffer_size < need:
        fail(f"--buffer-size {args.buffer_size} is too small for batch, stack and n-step: at least {need}")
    if args.learning_starts < N * (args.n_step + 2):
        fail(f"--learning-starts must be at least {N * (args.n_step + 2)} to fill one n-step window")


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
    """Encoder, tokens, mixture of experts (or a dense layer), dueling heads over atoms.

    `forward(obs uint8 (B, 4, H, W)) -> (logits (B, A, N), MoEOutput or None)`. As in the authors' code nothing stands
    between the experts' output tokens and the heads: no ReLU, no residual, no norm. Without dueling `advantage` alone
    gives the logits. Noise, a fresh draw per sample and forward, in training mode only.
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
            self.moe = DenseLayer(features.numel(), num_features, noisy=args.noisy)
        else:
            if args.tokenization.startswith("PerPatch"):
                self.tokenizer = PatchTokenizer(features.shape[1], average=args.tokenization == "PerPatchAvg")
            _, num_tokens, token_dim = self.tokens(features).shape
            num_features = num_tokens * token_dim
            sizes = (num_tokens, token_dim, args.num_experts, args.expert_hidden_dim)
            if args.layer == "softmoe":
                router = {"normalize": args.normalize_router, "learned_phi": args.learned_phi}
                self.moe = SoftMoE(*sizes, capacity_factor=args.capacity_factor, noisy=args.noisy, **router)
            else:
                self.moe = Top1MoE(*sizes, capacity_factor=args.capacity_factor, noisy=args.noisy)
        self.advantage = linear(num_features, num_actions * args.num_atoms, noisy=args.noisy)
        self.value = linear(num_features, args.num_atoms, noisy=args.noisy) if args.dueling else None
        support = torch.linspace(args.v_min, args.v_max, args.num_atoms)  # (N,)
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
        return self(obs)[0].softmax(dim=2) @ self.support


def make_networks(args: Args, envs: Environments, device: torch.device) -> tuple[QNetwork, QNetwork]:
    """The Q-network and its target, equal, on the device; fails where the sizes do not fit."""
    obs_shape = (STACK_SIZE, *envs.frame_shape)
    try:
        q_network, target_network = (QNetwork(args, obs_shape, envs.num_actions) for _ in range(2))
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # RuntimeError: not enough memory
        fail(f"no such network for frames of {envs.frame_shape}: {error}")
    target_network.load_state_dict(q_network.state_dict())
    return q_network.to(device), target_network.to(device)


# --------------------------------------------------------------------------------------------------------- replay


class Batch(NamedTuple):
    """B transitions. The loss needs no more than `reward + discount * value(next_obs)`."""

    obs: Tensor  # (B, stack, H, W) uint8
    action: Tensor  # (B,) int64
    reward: Tensor  # (B,) float32: n-step return within the episode
    discount: Tensor  # (B,) float32: gamma^k * (1 - terminated) for the k steps really taken
    next_obs: Tensor  # (B, stack, H, W) uint8: k steps later; any frames where terminated
    index: Tensor  # (B,) int64: row * num_envs + environment
    importance_weights: Tensor | float = 1.0  # (B,) float32, or one for all


class ReplayBuffer:
    """Single frames in a ring, one lane per environment; draws transitions exactly uniformly.

    A row of a lane is one agent step: the frame the agent saw, its action, what came of it. Stacks and n-step windows
    are put together when a transition is drawn. A row can be drawn while all rows of its stack and of its window are
    in the ring. In each lane rows become drawable, and cease to be, in the order they were added, so the drawable rows
    are a first-in-first-out queue; drawing is one look-up in it, without rejection.
    Everything is a tensor of fixed shape, so `add` and `sample` run inside a CUDA graph and never wait for the device.
    Raises ValueError where the ring is too small for one stack and window.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        frame_shape: tuple[int, int],
        *,
        stack_size: int = 4,
        n_step: int = 1,
        gamma: float = 0.99,
        device: torch.device | str = "cpu",
    ):
        self.rows, self.num_envs, self.frame_shape = capacity // num_envs, num_envs, tuple(frame_shape)
        self.stack_size, self.n_step, self.device = stack_size, n_step, torch.device(device)
        if self.rows < stack_size + n_step:
            raise ValueError(f"{self.rows} rows per environment cannot hold a stack of {stack_size} and {n_step} steps")
        shape = (self.rows, num_envs)
        # One frame more than rows: the last one stays black, for the frames before an episode's start.
        frames = (self.rows * num_envs + 1, math.prod(frame_shape))
        if self.device.type == "cpu":  # NumPy's zeros take memory only once they are written to, torch's at once
            self.frames = torch.from_numpy(np.zeros(frames, dtype=np.uint8))
        else:
            self.frames = torch.zeros(frames, dtype=torch.uint8, device=device)
        self.action = torch.zeros(shape, dtype=torch.int64, device=device)
        self.reward = torch.zeros(shape, device=device)
        self.terminated = torch.zeros(shape, dtype=torch.bool, device=device)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)  # terminated, truncated or cut
        self.valid = torch.zeros(shape, dtype=torch.bool, device=device)
        self.depth = torch.zeros(shape, dtype=torch.uint8, device=device)  # earlier frames in the row's stack
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)  # rows ever written, per lane
        # Queue of drawable rows per lane; its last column takes the writes of rows that do not join it.
        self.queue = torch.zeros(num_envs, self.rows + 1, dtype=torch.int64, device=device)
        self.head = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.tail = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.stack_offsets = torch.arange(stack_size, device=device)  # 0 .. stack-1
        self.steps = torch.arange(n_step, device=device)  # 0 .. n-1
        self.gammas = torch.tensor([gamma**k for k in range(n_step + 1)], device=device)  # (n+1,)

    def __len__(self) -> int:
        """Number of transitions that can be drawn (waits for the device)."""
        return int((self.tail - self.head).sum())

    @staticmethod
    def nbytes(capacity: int, num_envs: int, frame_shape: tuple[int, int]) -> int:
        """Bytes a buffer takes once it is full: frame, action, reward, four one-byte fields and queue per row."""
        return capacity // num_envs * num_envs * (math.prod(frame_shape) + 8 + 4 + 4 + 8)

    def add(self, frame, action, reward, terminated, truncated, valid=None) -> None:
        """Append one row to every lane; arrays over environments.

        `frame` (N, H, W) is what the agent saw, `action` (N,) what it did there, `reward`, `terminated`, `truncated`
        (N,) what came of it. `valid=False` marks a row that is no transition: the step that resets, whose frame is the
        ended episode's last. It ends the episode before it even if nothing else did; what is beside it is ignored.
        """
        frame = torch.as_tensor(frame, device=self.device).reshape(1, self.num_envs, -1)
        valid = torch.ones_like(self.valid[:1]) if valid is None else self._row(valid, torch.bool)
        terminated = self._row(terminated, torch.bool) & valid
        ended = self._row(truncated, torch.bool) & valid | terminated
        row = self.cursor % self.rows  # (1,)
        previous = (row - 1) % self.rows
        start = ~self.valid[previous] | self.terminated[previous]  # (1, N)
        depth = torch.where(start, 0, (self.depth[previous] + 1).clamp_max(self.stack_size - 1))
        self._retire(*self._expiring(row))
        self.frames[:-1].view(self.rows, self.num_envs, -1).index_copy_(0, row, frame)
        self.action.index_copy_(0, row, self._row(action, torch.int64))
        self.reward.index_copy_(0, row, self._row(reward, torch.float32))
        self.terminated.index_copy_(0, row, terminated)
        self.ended.index_copy_(0, row, ended)
        self.ended.index_copy_(0, previous, self.ended[previous] | ~valid & self.valid[previous])
        self.valid.index_copy_(0, row, valid)
        self.depth.index_copy_(0, row, depth)
        self._release(*self._completed(row))
        self.cursor.add_(1)

    def _row(self, values, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, device=self.device).to(dtype).reshape(1, self.num_envs)

    def _expiring(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (stack,) and which of them (stack, N) have a stack that reaches back to `row` (1,), soon overwritten."""
        rows = (row + self.stack_offsets) % self.rows  # (stack,)
        return rows, self.valid[rows] & (self.depth[rows] == self.stack_offsets[:, None])

    def _completed(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (n,), newest first, and which of them (n, N) have a whole window now that `row` (1,) is written.

        `row` is not among them: it has the frame that the others bootstrap from.
        """
        rows = (row - 1 - self.steps) % self.rows  # (n,)
        ended = self.ended[rows]  # (n, N)
        # Windows that met an earlier end were complete before; of the others, all if row - 1 ended, else the longest.
        open_until_now = ended.cumsum(dim=0) == ended[:1]
        longest = self.steps[:, None] == self.n_step - 1
        return rows, self.valid[rows] & open_until_now & (ended[:1] | longest)

    def _retire(self, rows: Tensor, expiring: Tensor) -> None:
        """Take rows (k,) of the lanes where `expiring` (k, N) from the queue: they are its oldest."""
        self.head.add_(expiring.sum(dim=0))

    def _release(self, rows: Tensor, completed: Tensor) -> None:
        """Put rows (k,), newest first, of the lanes where `completed` (k, N) at the end of the queue."""
        count = completed.cumsum(dim=0)
        place = (self.tail + count[-1] - count) % self.rows
        place = torch.where(completed, place, self.rows)
        self.queue.scatter_(1, place.T, rows.expand(self.num_envs, -1))
        self.tail.add_(count[-1])

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement."""
        count = (self.tail - self.head).cumsum(dim=0)  # (N,)
        draw = (torch.rand(batch_size, dtype=torch.float64, device=self.device) * count[-1]).long()  # (B,)
        lane = torch.searchsorted(count, draw, right=True)
        place = self.tail[lane] - (count[lane] - draw)  # so many places before the end of the lane's queue
        row = self.queue[lane, place % self.rows]
        return self._gather(row, lane)

    def _gather(self, row: Tensor, lane: Tensor) -> Batch:
        """The transitions that start at rows (B,) of lanes (B,)."""
        window = (row[:, None] + self.steps) % self.rows * self.num_envs + lane[:, None]  # (B, n)
        ended = self.ended.view(-1)[window]
        taken = ended.cumsum(dim=1) - ended.long() == 0  # (B, n): no end before this step
        reward = (torch.where(taken, self.reward.view(-1)[window], 0) * self.gammas[:-1]).sum(dim=1)
        terminated = (self.terminated.view(-1)[window] & taken).any(dim=1)
        num_steps = taken.sum(dim=1)
        discount = self.gammas[num_steps] * ~terminated
        obs = self._stack(row, lane)
        next_obs = self._stack((row + num_steps) % self.rows, lane)
        index = row * self.num_envs + lane
        return Batch(obs, self.action.view(-1)[index], reward, discount, next_obs, index)

    def _stack(self, row: Tensor, lane: Tensor) -> Tensor:
        """Stacked frames (B, stack, H, W) that end at rows (B,) of lanes (B,)."""
        offsets = self.stack_offsets.flip(0)  # oldest first
        index = (row[:, None] - offsets) % self.rows * self.num_envs + lane[:, None]  # (B, stack)
        inside = offsets <= self.depth[row, lane][:, None]
        index = torch.where(inside, index, self.rows * self.num_envs)  # the black frame
        return self.frames.index_select(0, index.view(-1)).view(*index.shape, *self.frame_shape)

    def _parts(self, cursor: int) -> dict[str, Tensor]:
        """All that has been written once `cursor` rows were added, as views."""
        rows = min(cursor, self.rows)
        parts = {"frames": self.frames[: rows * self.num_envs].view(rows, self.num_envs, *self.frame_shape)}
        for name in ("action", "reward", "terminated", "ended", "valid", "depth"):
            parts[name] = getattr(self, name)[:rows]
        return parts | {name: getattr(self, name) for name in ("cursor", "queue", "head", "tail")}

    def state_dict(self) -> dict[str, Tensor]:
        """All that was written, as host tensors."""
        return {name: part.cpu() for name, part in self._parts(int(self.cursor)).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises ValueError for other sizes, KeyError if a part is missing."""
        targets = self._parts(int(state["cursor"]))
        for name, target in targets.items():
            if state[name].shape != target.shape or state[name].dtype != target.dtype:
                found, expected = ((tuple(x.shape), x.dtype) for x in (state[name], target))
                raise ValueError(f"replay {name} is {found}, expected {expected}")
        self.valid.zero_()  # rows that the state does not reach
        for name, target in targets.items():
            target.copy_(state[name])


BLOCK_SIZE = 512  # priorities that are summed together: about the square root of 1M is fastest


def first_above(shares: Tensor, ends: Tensor, mass: Tensor) -> Tensor:
    """Index of the first positive of the `shares` (..., n) whose cumulative sum, in `ends`, is above `mass` (..., k).

    Never another, though rounding may put mass below 0 or at the end, and a GPU's parallel sums do not quite rise.
    """
    ends = torch.where(shares > 0, ends, 0).cummax(dim=-1).values
    below = ends[..., -1:] * (1 - 2**-52)
    return torch.searchsorted(ends, mass.clamp_min(0).minimum(below), right=True)


class PrioritizedReplayBuffer(ReplayBuffer):
    """Draws transitions in proportion to their priorities (Schaul et al., 2016), as the authors' code does.

    A priority is the square root of a transition's last loss; new ones get the largest so far, rows that cannot be
    drawn have 0. A draw looks up the sums of blocks of rows, then one block. All in float64: float32 sums over 1M rows
    would leave many of them unreachable. A changed block is summed afresh, so that errors do not build up.
    """

    def __init__(self, capacity: int, num_envs: int, frame_shape: tuple[int, int], **window):
        super().__init__(capacity, num_envs, frame_shape, **window)
        size = {"dtype": torch.float64, "device": self.device}
        self.priorities = torch.zeros(math.ceil(self.rows * num_envs / BLOCK_SIZE), BLOCK_SIZE, **size)
        self.block_sums = torch.zeros(len(self.priorities), **size)
        self.max_priority = torch.ones(1, **size)
        self.lanes = torch.arange(num_envs, device=self.device)

    def _retire(self, rows: Tensor, expiring: Tensor) -> None:
        super()._retire(rows, expiring)
        index = (rows[:, None] * self.num_envs + self.lanes).view(-1)  # (k * N,)
        self._set(index, torch.where(expiring.view(-1), 0, self.priorities.view(-1)[index]))

    def _release(self, rows: Tensor, completed: Tensor) -> None:
        super()._release(rows, completed)
        index = (rows[:, None] * self.num_envs + self.lanes).view(-1)  # (k * N,)
        self._set(index, torch.where(completed.view(-1), self.max_priority, self.priorities.view(-1)[index]))

    def _set(self, index: Tensor, priorities: Tensor) -> None:
        """Write priorities (k,) at index (k,), equal ones where it repeats itself, and sum the changed blocks."""
        self.priorities.view(-1).index_copy_(0, index, priorities)
        block = index // BLOCK_SIZE
        self.block_sums.index_copy_(0, block, self.priorities.index_select(0, block).sum(dim=1))

    def sample(self, batch_size: int) -> Batch:
        """Draw one transition from each of `batch_size` strata of equal mass.

        Importance weights are 1/sqrt(p) over their largest in the batch (beta = 0.5, fixed, as in the authors' code).
        """
        ends = self.block_sums.cumsum(dim=0)  # (blocks,)
        draw = torch.arange(batch_size, device=self.device)
        draw = draw + torch.rand(batch_size, dtype=torch.float64, device=self.device)
        mass = draw * (ends[-1] / batch_size)  # (B,)
        block = first_above(self.block_sums, ends, mass)
        mass = mass - (ends - self.block_sums)[block]
        shares = self.priorities.index_select(0, block)  # (B, BLOCK_SIZE)
        index = block * BLOCK_SIZE + first_above(shares, shares.cumsum(dim=1), mass[:, None])[:, 0]
        priorities = self.priorities.view(-1)[index]
        weights = (priorities.min() / priorities).sqrt().float()
        return self._gather(index // self.num_envs, index % self.num_envs)._replace(importance_weights=weights)

    def update_priorities(self, index: Tensor, loss: Tensor) -> None:
        """Set priorities from losses (B,), before importance weights, of the batch with `index` (B,).

        Where one was drawn twice its larger loss counts; rows that can no longer be drawn keep 0. A loss that is not
        finite counts as none, so that the sums stay whole until the run stops for it.
        """
        index = index.to(self.device)
        loss = loss.detach().to(self.block_sums).nan_to_num(0.0, 0.0, 0.0).clamp_min(0)
        priorities = (loss + 1e-10).sqrt() * (self.priorities.view(-1)[index] > 0)  # Dopamine's floor
        self.max_priority.copy_(torch.maximum(self.max_priority, priorities.max()))
        self._set(index, torch.where(index[:, None] == index, priorities, 0).amax(dim=1))  # (B, B) -> (B,)

    def _parts(self, cursor: int) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in ("priorities", "block_sums", "max_priority")}
        return super()._parts(cursor) | own


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


def replay_device(args: Args, frame_shape: tuple[int, int], device: torch.device) -> torch.device:
    """Where the replay goes: on the GPU if it fits, else in host memory; fails before allocating if in neither."""
    need = ReplayBuffer.nbytes(args.buffer_size, args.num_envs, frame_shape)
    if device.type == "cuda" and args.replay_device == "auto" and need < 0.8 * available_memory(device):
        return device
    free = available_memory(torch.device("cpu"))
    if need > 0.9 * free:  # the process itself needs some
        fail(f"--buffer-size {args.buffer_size} takes {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB of memory are free")
    return torch.device("cpu")


# ----------------------------------------------------------------------------------------------------- replay log


class ReplayLog:
    """Every transition of a run on disk, in the layout of the DQN Replay Dataset (Agarwal et al., 2020).

    `<folder>/replay_logs/` has shards N = 0, 1, ... of gzipped arrays, one row per agent step: the frame that the agent
    saw, its action, the clipped reward, whether the episode ended there. Three black rows open an episode, row
    `add_count` of a shard is junk. Episodes are written whole, so environments do not interleave.
    A seventh array, `episode_end`, says what the published six cannot: 0 a step, 1 the last one of an episode that
    terminated, 2 the last one of an episode that was cut (the next row has the frame to bootstrap from), 3 no step.
    `terminal` is 1 where it is 1 or 2 and in that next row, so that readers of the six never cross episodes.
    `<folder>/metadata.json` has environment, protocol, versions, arguments, and the episodes with their raw returns.

    A thread compresses. A shard under way has `.tmp` names, and every episode in it is a gzip member of its own, so
    that a resumed run cuts it back to where its checkpoint was.
    """

    ARRAYS = {"observation": "uint8", "action": "int32", "reward": "float32", "terminal": "uint8"}
    ARRAYS |= {"episode_end": "uint8"}
    PADDING = 3  # black rows before an episode: Dopamine's stacks of 4 read them

    def __init__(self, folder: Path, num_envs: int, frame_shape: tuple[int, int], shard_size: int, metadata: dict):
        self.folder, self.frame_shape, self.shard_size = folder / "replay_logs", tuple(frame_shape), shard_size
        self.metadata, self.error = metadata, None
        self.running: list[list[tuple]] = [[] for _ in range(num_envs)]  # steps of the episodes under way
        self.shard, self.rows = 0, 0  # of the shard under way
        self.episodes: list[list[float]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.queue: queue.Queue = queue.Queue(maxsize=64)  # a learner that is too fast waits here
        threading.Thread(target=self._work, daemon=True).start()

    def add(self, frame, action, reward, terminated, truncated, valid) -> None:
        """Append one row per environment, as `ReplayBuffer.add`, but with raw rewards. Fails if writing has failed."""
        if self.error is not None:
            fail(f"cannot write the replay log in {self.folder}: {self.error}")
        for i, steps in enumerate(self.running):
            if valid[i]:
                steps.append((frame[i].copy(), action[i], reward[i]))
            if steps and (terminated[i] or not valid[i]):
                self.queue.put((steps, None if valid[i] else frame[i].copy()))
                self.running[i] = []

    def _work(self) -> None:
        while True:
            episode = self.queue.get()
            try:
                if self.error is None:
                    self._write(*episode)
            except Exception as error:  # most likely a full disk; the next `add` says so
                self.error = error
            self.queue.task_done()

    def _write(self, steps: list[tuple], last_frame: np.ndarray | None) -> None:
        """Append an episode; `last_frame` is what came after a cut one's last step."""
        frames, actions, rewards = zip(*steps, strict=True)
        first, last = self.PADDING, self.PADDING + len(steps) - 1
        count = last + (1 if last_frame is None else 2)
        rows = {name: np.zeros(count, dtype) for name, dtype in self.ARRAYS.items()}
        rows["observation"] = np.zeros((count, *self.frame_shape), np.uint8)
        rows["observation"][first : last + 1] = frames
        rows["action"][first : last + 1] = actions
        rows["reward"][first : last + 1] = np.clip(rewards, -1, 1)
        rows["terminal"][last:] = 1
        rows["episode_end"][:first] = 3
        rows["episode_end"][last:] = [1] if last_frame is None else [2, 3]
        if last_frame is not None:
            rows["observation"][-1] = last_frame
        if self.rows and self.rows + count + 1 > self.shard_size:
            self._finish_shard()
        for name, array in rows.items():
            with open(self._path(name, ".tmp"), "ab") as file:
                file.write(b"" if self.rows else self._header(name, 0))
                file.write(gzip.compress(array.tobytes(), compresslevel=1, mtime=0))
        self.episodes.append([self.shard, self.rows + first, len(steps), float(sum(rewards)), last_frame is None])
        self.rows += count

    def _path(self, name: str, suffix: str = "", shard: int | None = None) -> Path:
        name = f"$store$_{name}" if name in self.ARRAYS else name
        return self.folder / f"{name}_ckpt.{self.shard if shard is None else shard}.gz{suffix}"

    def _header(self, name: str, rows: int) -> bytes:
        """The array's header for so many rows, stored as it is: of the same length for any number."""
        shape = (rows, *self.frame_shape) if name == "observation" else (rows,)
        header, descr = io.BytesIO(), np.lib.format.dtype_to_descr(np.dtype(self.ARRAYS[name]))
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
        return gzip.compress(header.getvalue(), compresslevel=0, mtime=0)

    def _finish_shard(self) -> None:
        """Add the junk row, write the number of rows, give the files their names; `add_count` comes last."""
        for name, dtype in self.ARRAYS.items():
            with open(self._path(name, ".tmp"), "r+b") as file:
                file.write(self._header(name, self.rows + 1))
                file.seek(0, os.SEEK_END)
                row = np.zeros(math.prod(self.frame_shape) if name == "observation" else 1, dtype)
                file.write(gzip.compress(row.tobytes(), mtime=0))
                file.flush()
                os.fsync(file.fileno())
        n = self.rows
        for name, array in (("invalid_range", [n - 1, n, 0, 1, 2]), ("add_count", n)):
            content = io.BytesIO()
            np.save(content, np.array(array))
            self._path(name, ".tmp").write_bytes(gzip.compress(content.getvalue(), mtime=0))
        for name in (*self.ARRAYS, "invalid_range", "add_count"):
            self._path(name, ".tmp").rename(self._path(name))
        self.shard, self.rows = self.shard + 1, 0
        self._write_metadata()

    def _write_metadata(self) -> None:
        columns = ["shard", "row", "length", "raw_return", "terminated"]
        done = [episode for episode in self.episodes if episode[0] < self.shard]
        write_json(self.folder.parent / "metadata.json", self.metadata | {"columns": columns, "episodes": done}, None)

    def state(self) -> dict:
        """Where the log is once all that was added is on the disk."""
        self.queue.join()
        sizes = {}
        for path in (self._path(name, ".tmp") for name in self.ARRAYS if self.rows):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
                sizes[path.name] = path.stat().st_size
        episodes = torch.tensor(self.episodes, dtype=torch.float64).view(-1, 5)  # long lists load slowly
        return {"shard": self.shard, "rows": self.rows, "sizes": sizes, "episodes": episodes}

    def load_state(self, state: dict) -> None:
        """Go back to what `state` gave: later shards go, the one under way loses what came after."""
        self.shard, self.rows = state["shard"], state["rows"]
        self.episodes = [[int(a), int(b), int(c), d, bool(e)] for a, b, c, d, e in state["episodes"].tolist()]
        for path in self.folder.glob("*_ckpt.*"):
            name = path.name.removesuffix(".tmp")
            if f"{name}.tmp" in state["sizes"]:
                path.rename(self.folder / f"{name}.tmp")
            elif int(name.split(".")[-2]) >= self.shard:
                path.unlink()
        for name, size in state["sizes"].items():
            if (self.folder / name).stat().st_size < size:
                raise OSError(f"{name} is shorter than at the checkpoint")
            os.truncate(self.folder / name, size)

    def close(self) -> None:
        """Write what is there as a last, shorter shard."""
        self.queue.join()
        if self.error is None and self.rows:
            self._finish_shard()


def game_name(env_id: str) -> str:
    """Breakout for BreakoutNoFrameskip-v4, ALE/Breakout-v5, my_module:Breakout-v0."""
    return re.split(r"NoFrameskip|Deterministic|-v\d", re.split("[:/]", env_id)[-1])[0]


def open_replay_log(args: Args, run_dir: Path, envs: Environments, state: dict | None) -> ReplayLog | None:
    """The run's log (with --save-replay), where the checkpoint left it; fails where it cannot be written."""
    if not args.save_replay:
        return None
    game = gym.spec(args.env_id.rpartition(":")[2]).kwargs.get("game")
    rom = None if game is None else hashlib.md5(Path(ale_py.roms.get_rom_path(game)).read_bytes()).hexdigest()
    protocol = {name: getattr(args, name) for name in ("sticky_actions", "noop_max", "terminal_on_life_loss")}
    metadata = {"format": "DQN Replay, with episode_end", "env_id": args.env_id, "num_actions": envs.num_actions}
    metadata |= {"frame_skip": 4, **protocol} if game else {}
    metadata |= {"ale_py": ale_py.__version__, "rom_md5": rom, "args": asdict(args)}
    try:
        folder = run_dir / "replay" / game_name(args.env_id) / str(args.seed)
        log = ReplayLog(folder, args.num_envs, envs.frame_shape, args.replay_shard_size, metadata)
        if state is not None:
            log.load_state(state)
        return log
    except OSError as error:
        fail(f"cannot write the replay log of {run_dir}: {error}")


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
    """Cross-entropy to the projected `reward + discount * Z_target(next_obs, a)` (Bellemare et al., 2017, algorithm 1).

    Returns the loss (0-D), weighted by the importance weights, and metrics: 0-D, but `losses` (B,) for the priorities.
    """
    B, support = batch.action.shape[0], q_network.support
    rows = torch.arange(B, device=batch.action.device)
    logits, output = q_network(batch.obs)  # (B, A, N)
    with torch.no_grad():
        next_probs = target_network(batch.next_obs)[0].softmax(dim=2)  # (B, A, N)
        next_q = q_network.q_values(batch.next_obs) if args.double else next_probs @ support  # (B, A)
        atoms = batch.reward[:, None] + batch.discount[:, None] * support  # (B, N)
        target_probs = project_distribution(atoms, next_probs[rows, next_q.argmax(dim=1)], support)  # (B, N)
    log_probs = logits[rows, batch.action].log_softmax(dim=1)  # (B, N)
    losses = -(target_probs * log_probs).sum(dim=1)  # (B,)
    loss = (batch.importance_weights * losses).mean()
    q_taken = log_probs.detach().exp() @ support  # (B,)
    metrics = {"td_loss": loss.detach(), "q_values": q_taken.mean(), "losses": losses.detach()}
    if args.load_balancing != "none":
        balancing = load_balancing_loss(output, args)
        loss = loss + balancing
        metrics["load_balancing_loss"] = balancing.detach()
    return loss, metrics | {"loss": loss.detach()}


# ----------------------------------------------------------------------------------------------- training, running


def linear_schedule(args: Args, global_step: int) -> float:
    """Exploration: 1 until learning starts, then linearly down to `end_epsilon` (Dopamine's schedule)."""
    done = (global_step - args.learning_starts) / max(args.epsilon_decay_steps, 1)
    return 1.0 + (args.end_epsilon - 1.0) * min(max(done, 0.0), 1.0)


def select_actions(q_values: Tensor, epsilon: Tensor | float) -> Tensor:
    """Epsilon-greedy actions (N,) from q_values (N, A)."""
    N, A = q_values.shape
    random = torch.randint(A, (N,), device=q_values.device)
    explore = torch.rand(N, device=q_values.device) < epsilon
    return torch.where(explore, random, q_values.argmax(dim=1))


@torch.no_grad()
def evaluate(q_network: QNetwork, args: Args, num_episodes: int, seed: int, stop: "StopSignal") -> list[float]:
    """Raw returns of `num_episodes` whole games at `eval_epsilon` in environments of their own, noise off.

    Each environment plays a fixed share of the games: taking the first to finish would favour short ones. Training's
    random state is left as it was. Returns fewer only where a signal stops it.
    """
    device = next(q_network.parameters()).device
    envs = make_envs(args, min(num_episodes, 10))
    stack = FrameStack(envs.num_envs, envs.frame_shape, device)
    share = np.bincount(np.arange(num_episodes) % envs.num_envs)  # (N,)
    returns: list[list[float]] = [[] for _ in range(envs.num_envs)]
    running = np.zeros(envs.num_envs)
    frame, start = envs.reset(seed), np.ones(envs.num_envs, dtype=bool)
    valid = np.ones(envs.num_envs, dtype=bool)
    q_network.eval()
    bar = tqdm(total=num_episodes, desc="evaluating", unit="episode", **bar_style())
    with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while sum(map(len, returns)) < num_episodes and not stop.received:
            q_values = q_network.q_values(stack.push(frame, start))
            envs.send(select_actions(q_values, args.eval_epsilon).cpu().numpy())
            step = envs.recv()
            running += step.reward * valid
            over = step.game_over & valid
            for i in np.flatnonzero(over):
                if len(returns[i]) < share[i]:
                    returns[i].append(float(running[i]))
                    bar.update()
            running[over] = 0.0
            frame, start, valid = step.frame, ~valid | step.terminated, ~over
    q_network.train()
    envs.close()
    return [value for lane in returns for value in lane]


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
    """A run directory: config.json, episodes.csv, metrics.csv, TensorBoard events, checkpoints, results.

    episodes.csv: agent step, raw return, length in agent steps. metrics.csv, per iteration: mean raw return of the
    training episodes that ended in it (the paper's score; empty if none did), and agent steps per second.
    """

    def __init__(self, run_dir: Path, total_timesteps: int, global_step: int, state: dict | None):
        lines = {"mode": "a+", "newline": "", "buffering": 1}  # a row is in the file at once
        self.files = {name: open(run_dir / name, **lines) for name in ("episodes.csv", "metrics.csv")}  # noqa: SIM115
        self.writers = {name: csv.writer(file) for name, file in self.files.items()}
        self.recent: deque[float] = deque(maxlen=100)
        self.iteration_returns: list[float] = []
        if state is None:
            self.writers["episodes.csv"].writerow(["global_step", "episode_return", "episode_length"])
            self.writers["metrics.csv"].writerow(["iteration", "global_step", "episodes", "mean_return", "sps"])
        else:  # forget what was logged after the checkpoint
            self.iteration_returns = list(state["iteration_returns"])
            self.recent.extend(state["recent"])
            for name, size in state["sizes"].items():
                self.files[name].truncate(min(size, os.fstat(self.files[name].fileno()).st_size))
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=global_step + 1 if state else None)
        self.started, self.started_step = time.monotonic(), global_step
        units = {"unit": "step", "unit_scale": True}
        self.bar = tqdm(total=total_timesteps, initial=global_step, **units, **bar_style())

    def episode(self, global_step: int, episode_return: float, length: int) -> None:
        self.iteration_returns.append(episode_return)
        self.recent.append(episode_return)
        self.writers["episodes.csv"].writerow([global_step, f"{episode_return:.10g}", length])
        self.scalars("charts", {"episodic_return": episode_return, "episodic_length": length}, global_step)

    def iteration(self, number: int, global_step: int) -> None:
        sps = (global_step - self.started_step) / (time.monotonic() - self.started)
        self.started, self.started_step = time.monotonic(), global_step
        returns, self.iteration_returns = self.iteration_returns, []
        mean = f"{np.mean(returns):.4f}" if returns else ""
        self.writers["metrics.csv"].writerow([number, global_step, len(returns), mean, f"{sps:.1f}"])
        if returns:
            self.tensorboard.add_scalar("charts/iteration_return", np.mean(returns), global_step)

    def training(self, values: dict[str, float], epsilon: float, global_step: int) -> None:
        sps = (global_step - self.started_step) / (time.monotonic() - self.started)
        self.scalars("losses", values, global_step)
        self.scalars("charts", {"epsilon": epsilon, "sps": sps}, global_step)
        recent = f"{np.mean(self.recent):.2f}" if self.recent else "-"
        loss = f"{values['loss']:.4f}" if values else "-"
        self.bar.set_postfix_str(f"return {recent}, loss {loss}", refresh=False)

    def scalars(self, prefix: str, values: dict[str, float], global_step: int) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{prefix}/{name}", value, global_step)

    def state(self) -> dict:
        """What a checkpoint must remember to go on with the same records."""
        self.tensorboard.flush()
        for file in self.files.values():
            os.fsync(file.fileno())
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}
        return {"sizes": sizes, "iteration_returns": self.iteration_returns, "recent": list(self.recent)}

    def close(self) -> None:
        self.bar.close()
        self.tensorboard.close()
        for file in self.files.values():
            file.close()


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


def save_checkpoint(run_dir: Path, global_step: int, state: dict, replay: ReplayBuffer) -> bool:
    """Write checkpoint-<step> beside the last one, then drop that: a crash or a full disk leaves the last one.

    Returns False, after a warning, where it could not be written.
    """
    path, temporary = run_dir / f"checkpoint-{global_step:012d}", run_dir / "checkpoint.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, value in replay.state_dict().items():
            write_synced(temporary / f"replay_{name}.npy", lambda file, value=value: np.save(file, value.numpy()))
        write_synced(temporary / "state.pt", lambda file: torch.save(state, file))
        temporary.rename(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        message = f"warning: no checkpoint at agent step {global_step}, the last good one stays: {error}"
        tqdm.write(message, file=sys.stderr)
        return False
    for old in run_dir.glob("checkpoint-*"):
        if old != path:
            shutil.rmtree(old, ignore_errors=True)
    return True


def last_checkpoint(run_dir: Path) -> Path | None:
    return max(run_dir.glob("checkpoint-*"), default=None)


def load_checkpoint(run_dir: Path, parts: dict, replay: ReplayBuffer, device: torch.device) -> dict:
    """Restore networks, optimizer, replay and random state from the last checkpoint; returns the rest of it.

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
        arrays = {name: np.load(path / f"replay_{name}.npy", mmap_mode="c") for name in replay.state_dict()}
        replay.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        for name, part in parts.items():
            part.load_state_dict(state[name])
        for group in parts["optimizer"].param_groups:
            group["capturable"] = capturable  # the run may have moved to another device
        torch.set_rng_state(state["random"]["cpu"])
        if device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"])
        return {"global_step": int(state["global_step"]), "log": state["log"], "replay_log": state["replay_log"]}
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
    may_change = "resume total_timesteps checkpoint_every eval_episodes cuda compile cuda_graphs replay_device".split()
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
    agent = Path(__file__).stem.removesuffix("_softmoe")
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


def describe(args: Args, run_dir: Path, envs: Environments, q_network: QNetwork, replay: ReplayBuffer) -> str:
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
    components = [name for name in ("double", "dueling", "noisy", "prioritized") if getattr(args, name)]
    memory = ReplayBuffer.nbytes(args.buffer_size, args.num_envs, envs.frame_shape)
    where = "GPU" if replay.device.type == "cuda" else "host"
    h, w = envs.frame_shape
    frames = f" ({4 * args.total_timesteps:,} frames)" if isinstance(envs.envs, AtariVectorEnv) else ""
    return f"""{Path(__file__).name}: {args.env_id}, seed {args.seed}
  environment  {envs.description}
               {args.num_envs} in parallel, {envs.num_actions} actions, {STACK_SIZE} frames of {h}x{w}
  encoder      {args.encoder}, width {args.encoder_width}
  layer        {layer}
  Rainbow      {", ".join([f"{args.num_atoms} atoms", f"{args.n_step}-step", *components])}
  parameters   {total:,} = encoder {encoder:,} + layer {middle:,} + head {total - encoder - middle:,}
  replay       {args.buffer_size:,} transitions, {memory / 1e9:.2f} GB of {where} memory when full
  training     {args.total_timesteps:,} agent steps{frames}
               {args.replay_ratio:g} updates of {args.batch_size} per step, from step {args.learning_starts:,}
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


def check_finite(values: dict[str, float], q_network: QNetwork, global_step: int, run_dir: Path, log: RunLog) -> None:
    """Stop the run where the loss or a weight is not finite: such a state never reaches a checkpoint."""
    finite = torch.stack([weight.isfinite().all() for weight in q_network.parameters()]).all()
    if not (finite and math.isfinite(values.get("loss", 0.0))):
        log.close()
        good = last_checkpoint(run_dir)
        fail(f"the loss is {values.get('loss')} at agent step {global_step}; the last good checkpoint is {good}")


def measure_routing(q_network: QNetwork, replay: ReplayBuffer, args: Args, device: torch.device) -> dict[str, float]:
    """Routing statistics on a batch from replay; training's random state stays as it is."""
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _, output = q_network(replay.sample(args.batch_size).obs.to(device))
    return to_floats(routing_stats(output))


def finish(args: Args, q_network: QNetwork, log: RunLog, run_dir: Path, global_step: int, stop: StopSignal) -> None:
    """After the last step: write weights.pt, evaluate, write eval.json."""
    torch.save({name: weight.cpu() for name, weight in q_network.state_dict().items()}, run_dir / "weights.pt")
    seed = reset_seed(args.seed, global_step, evaluation=True)
    returns = evaluate(q_network, args, args.eval_episodes, seed, stop) if args.eval_episodes else []
    if returns and not stop.received:
        mean, std = float(np.mean(returns)), float(np.std(returns))
        result = {"episodes": len(returns), "mean_return": mean, "std_return": std, "epsilon": args.eval_epsilon}
        write_json(run_dir / "eval.json", result | {"global_step": global_step, "returns": returns})
        log.scalars("charts", {"eval_return": mean}, global_step)
        print(f"evaluation: mean return {mean:.2f} over {len(returns)} episodes")


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
    q_network, target_network = make_networks(args, envs, device)
    graphs = on_gpu and args.cuda_graphs
    adam = {"lr": args.learning_rate, "eps": args.adam_eps, "fused": True, "capturable": graphs}
    optimizer = torch.optim.Adam(q_network.parameters(), **adam)
    window = {"stack_size": STACK_SIZE, "n_step": args.n_step, "gamma": args.gamma}
    replay_on = replay_device(args, envs.frame_shape, device)
    replay_type = PrioritizedReplayBuffer if args.prioritized else ReplayBuffer
    replay = replay_type(args.buffer_size, args.num_envs, envs.frame_shape, **window, device=replay_on)
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer}
    state = {"global_step": 0, "log": None, "replay_log": None}
    if args.resume is not None:
        state = load_checkpoint(Path(args.resume), parts, replay, device)
    run_dir = open_run_dir(args) if args.resume is None else Path(args.resume)
    global_step = saved_step = state["global_step"]
    save_args(run_dir, args)
    print(describe(args, run_dir, envs, q_network, replay), flush=True)
    log = RunLog(run_dir, args.total_timesteps, global_step, state["log"])
    replay_log = open_replay_log(args, run_dir, envs, state["replay_log"])

    stack = FrameStack(args.num_envs, envs.frame_shape, device)
    loss_function = torch.compile(td_loss, dynamic=False) if on_gpu and args.compile else td_loss
    metrics: dict[str, Tensor] = {}

    @torch.no_grad()
    def act(frame, start, epsilon):
        return select_actions(q_network.q_values(stack.push(frame, start)), epsilon)

    def update(*batch):
        batch = Batch(*(torch.as_tensor(x, device=device) for x in batch)) if batch else replay.sample(args.batch_size)
        optimizer.zero_grad(set_to_none=True)
        loss, metrics = loss_function(q_network, target_network, batch, args)
        loss.backward()
        optimizer.step()
        losses = metrics.pop("losses")
        if args.prioritized and not learn_from_host:
            replay.update_priorities(batch.index, losses)
        return metrics, losses

    store, learn_from_host = replay.add, replay_on != device  # then batches are drawn outside `update`
    if graphs:
        warnings.filterwarnings("ignore", ".*capturable=True.*")  # the warm-up runs it uncaptured on purpose
        act, update, store = CudaGraph(act), CudaGraph(update), store if learn_from_host else CudaGraph(store)

    def due(every: int) -> bool:
        return every > 0 and global_step // every > (global_step - args.num_envs) // every

    def record(frame, action, reward, terminated, truncated, valid) -> None:
        store(frame, action, np.clip(reward, -1, 1), terminated, truncated, valid)
        if replay_log is not None:
            replay_log.add(frame, action, reward, terminated, truncated, valid)

    def checkpoint() -> bool:
        check_finite(to_floats(metrics), q_network, global_step, run_dir, log)
        no = np.zeros(args.num_envs, dtype=bool)
        record(frame, action, no, no, no, valid=no)  # the frames at which the running episodes are cut
        random = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if on_gpu else {})
        state = {name: part.state_dict() for name, part in parts.items()} | {"random": random}
        state |= {"global_step": global_step, "log": log.state()}
        state["replay_log"] = None if replay_log is None else replay_log.state()
        return save_checkpoint(run_dir, global_step, state, replay)

    saved = True
    with StopSignal() as stop:
        while global_step < args.total_timesteps and not stop.received:
            if global_step == saved_step:  # the seed follows from the step: a resumed run equals an unbroken one
                frame = envs.reset(reset_seed(args.seed, global_step))
                start, valid = np.ones((2, args.num_envs), dtype=bool)
                episode_return, episode_length = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=int)

            epsilon = 0.0 if args.noisy else linear_schedule(args, global_step)
            action = act(frame, start, epsilon).cpu().numpy()
            envs.send(action)  # emulation goes on while the learner works
            if global_step >= args.learning_starts:
                for _ in range(round(args.replay_ratio * args.num_envs)):
                    batch = replay.sample(args.batch_size) if learn_from_host else ()
                    metrics, losses = update(*batch)
                    if args.prioritized and learn_from_host:
                        replay.update_priorities(batch.index, losses)
            step = envs.recv()
            record(frame, action, step.reward, step.terminated, step.truncated, valid)
            global_step += args.num_envs
            log.bar.update(args.num_envs)
            if due(args.target_network_frequency):
                target_network.load_state_dict(q_network.state_dict())

            episode_return += step.reward * valid
            episode_length += valid
            over = step.game_over & valid
            for i in np.flatnonzero(over):
                log.episode(global_step, float(episode_return[i]), int(episode_length[i]))
            episode_return[over], episode_length[over] = 0, 0
            frame, start, valid = step.frame, ~valid | step.terminated, ~over  # after a game over: the reset step

            if due(args.log_every):
                values = to_floats(metrics)
                check_finite(values, q_network, global_step, run_dir, log)
                log.training(values, epsilon, global_step)
                if args.layer != "dense" and metrics:
                    log.scalars("moe", measure_routing(q_network, replay, args, device), global_step)
            if due(args.iteration_steps):
                log.iteration(global_step // args.iteration_steps - 1, global_step)
            if due(args.checkpoint_every):
                saved, saved_step = checkpoint(), global_step
        if global_step > saved_step:
            saved = checkpoint()
        log.bar.close()
        envs.close()
        if replay_log is not None:
            replay_log.close()
        if global_step >= args.total_timesteps and not stop.received:
            finish(args, q_network, log, run_dir, global_step, stop)
    log.close()
    print(f"{global_step:,} agent steps done, in {run_dir}")
    if stop.received and last_checkpoint(run_dir):
        print(f"stopped by a signal; continue with: python {Path(__file__).name} --resume {run_dir}")
    if not saved:
        raise SystemExit(1)


if __name__ == "__main__":
    main(parse_args())
