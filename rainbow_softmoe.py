"""Rainbow with mixture-of-experts layers on Atari.

    python rainbow_softmoe.py --num-experts 4 --env-id BreakoutNoFrameskip-v4

Reimplements "Mixtures of Experts Unlock Parameter Scaling for Deep RL" (Obando-Ceron et al., 2024, arXiv 2402.08609).
C51 with dueling heads, double Q-learning, noisy layers, n-step returns and prioritised replay. A Soft MoE over the
tokens of the encoder's feature map replaces its dense layer. Compare with `diff dqn_softmoe.py rainbow_softmoe.py`.
Needs `moe_layers.py` beside it and nothing else of this repository.

Differs on purpose from the authors' code (google/dopamine, labs/moes); tests/README.md has the whole table:
- Four environments step in parallel, and the one update per four agent steps runs while they emulate.
- A checkpoint cuts the running episodes, because ale-py's vector environments cannot be saved.
- The last step of an episode is learned from, unless a time limit or a checkpoint cut the episode. N-step returns that
  reach such a cut bootstrap from the last frame before it.
- There is no noise in evaluation; the authors' experts stay noisy there. The two heads draw noise independently.
- A prioritised batch has one draw from each of B equal shares of the sum (Schaul et al., 2016), not B independent ones.
"""

import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

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

import moe_layers as moe

STACK_SIZE = 4  # frames per observation (Mnih et al., 2015)
MAX_EPISODE_STEPS = 27_000  # agent steps after which a game is cut, 30 minutes (Hessel et al., 2018)
SEGMENT_STEPS = 50_000  # agent steps per segment: 350 MB before compression
LOG_EVERY = 1_000  # agent steps between TensorBoard points
BAR = {"dynamic_ncols": True, "mininterval": 0.5 if sys.stderr.isatty() else 30.0}  # in a log file, every 30 s


@dataclass
class Args(moe.LayerArgs):
    # Run
    env_id: str = "BreakoutNoFrameskip-v4"  # Atari id, or a Gymnasium id with single uint8 frames ("module:Game-v0")
    seed: int = 1  # seed of networks, exploration, replay draws and environments
    total_timesteps: int = 50_000_000  # agent steps; one is 4 frames (paper: 50M, which is 200M frames; DER: 100,000)
    runs_dir: str = "runs"  # folder of run directories
    run_name: str | None = None  # name of the run directory (default: environment, agent, layer, experts, seed)
    resume: str | None = None  # directory of the run to continue; auto: this run's directory, if it exists
    checkpoint_every: int = 2_500_000  # agent steps between checkpoints; each starts new games (0: only at the end)
    checkpoint_at_end: bool = True  # keep the last checkpoint of a finished run, so that it can be continued
    weights_every: int = 0  # agent steps between copies of the weights, weights/<step>.pt (0: only at the end)
    iteration_steps: int = 250_000  # agent steps per row of metrics.csv (paper: 250,000; DER: 10,000)
    eval_episodes: int = 10  # evaluation episodes at the end of training (DER: 100)
    cuda: bool = True  # run on the GPU where there is one
    compile: bool = True  # torch.compile acting, storing, drawing and the loss (GPU only)
    cuda_graphs: bool = True  # capture acting, storing, learning, evaluation in CUDA graphs (GPU only)

    # Environment
    num_envs: int = 4  # environments stepped in parallel; one round is `num_envs` agent steps
    sticky_actions: float = 0.25  # chance that the last action is repeated (Machado et al., 2018; DER: 0; Atari only)
    noop_max: int = 0  # a game starts with up to 4 * (noop_max - 1) no-op frames (DER: 30; Atari only)
    terminal_on_life_loss: bool = False  # a lost life ends the learner's episode, not the game (DER: yes; Atari only)

    # Network
    encoder: Literal["impala", "nature"] = "impala"  # convolutions (paper: Impala; DER and figure 7: Nature CNN)
    encoder_width: int = 1  # multiplies the encoder's channels
    impala_filter: int = 3  # kernel of Impala's convolutions (paper: 3; figure 18: 4, 6)

    # Replay
    buffer_size: int = 1_000_000  # transitions in replay (paper: 1M)
    batch_size: int = 32  # transitions per update (paper: 32)
    n_step: int = 3  # steps of the return before bootstrapping (paper: DQN 1, Rainbow 3, DER 10)
    replay_ratio: float = 0.25  # updates per agent step (paper: 0.25; figure 4: 0.5, 1, 2; DER: 1)
    replay_device: Literal["auto", "cpu"] = "auto"  # auto: GPU memory when the replay fits there, else host memory
    save_replay: bool = False  # keep every transition in replay/ of the run directory, for cql_softmoe.py

    # Optimisation
    learning_rate: float = 6.25e-5  # Adam's learning rate (paper: 6.25e-5; DER: 1e-4)
    adam_eps: float = 1.5e-4  # Adam's epsilon (paper: 1.5e-4)
    gamma: float = 0.99  # discount (paper: 0.99)
    learning_starts: int = 20_000  # agent steps before the first update (paper: 20,000; DER: 1,600)
    target_network_frequency: int = 8_000  # agent steps between copies to the target network (paper: 8,000; DER: 2,000)

    # Rainbow
    distributional: bool = True  # C51; else one value per action and the Huber loss, as in DrQ(eps)
    num_atoms: int = 51  # atoms of the return distribution (Bellemare et al., 2017; paper: 51)
    v_min: float = -10.0  # lowest atom, in clipped returns (paper: -10)
    v_max: float = 10.0  # highest atom, in clipped returns (paper: 10)
    double: bool = True  # choose the target's action with the online network (van Hasselt et al., 2016)
    dueling: bool = True  # value and advantage heads (Wang et al., 2016)
    noisy: bool = True  # noisy heads and experts, or dense layer, instead of epsilon (Fortunato et al., 2018)
    prioritized: bool = True  # draw transitions in proportion to the square root of their loss (Schaul et al., 2016)
    end_epsilon: float = 0.01  # exploration after the decay (paper: 0.01; noisy layers: 0)
    epsilon_decay_steps: int = 250_000  # agent steps of linear decay from 1 after learning starts (DER: 2,000)
    eval_epsilon: float = 0.001  # exploration in evaluation (paper: 0.001)

    default_num_experts = 4  # read by LayerArgs


# ------------------------------------------------------------------------------------------------------- networks
class Conv2d(nn.Conv2d):
    """Convolution as in Flax: SAME padding with the odd pixel at the end, Xavier weights, zero biases."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, init=nn.init.xavier_uniform_):
        super().__init__(in_channels, out_channels, kernel, stride)
        init(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        pads = [max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size, kernel, stride in sizes]
        if any(pad % 2 for pad in pads):  # F.conv2d pads both sides by the same amount
            x = F.pad(x, (0, pads[1] % 2, 0, pads[0] % 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, [pad // 2 for pad in pads])


class ImpalaStack(nn.Module):
    """Convolution, max-pool, two residual blocks: (B, C, h, w) -> (B, channels, ceil(h/2), ceil(w/2))."""

    def __init__(self, in_channels: int, channels: int, kernel: int):
        super().__init__()
        self.conv0 = Conv2d(in_channels, channels, kernel)
        lecun = functools.partial(moe.lecun_normal_, fan_in=channels * kernel**2)
        convs = (Conv2d(channels, channels, kernel, init=lecun) for _ in range(4))
        self.conv1, self.conv2, self.conv3, self.conv4 = convs

    def forward(self, x: Tensor) -> Tensor:
        # Flax pads an even axis by (0, 1), as ceil_mode does, and an odd one by (1, 1). The padding is -inf.
        padding = (x.shape[2] % 2, x.shape[3] % 2)
        x = F.max_pool2d(self.conv0(x), 3, stride=2, padding=padding, ceil_mode=True)
        x = x + self.conv2(F.relu(self.conv1(F.relu(x))))
        return x + self.conv4(F.relu(self.conv3(F.relu(x))))


def impala_cnn(channels: int, width: int, kernel: int = 3) -> nn.Module:
    """The ResNet of Espeholt et al. (2018): (B, 4, 84, 84) -> (B, 32 * width, 11, 11)."""
    sizes = channels, 16 * width, 32 * width, 32 * width
    return nn.Sequential(*(ImpalaStack(*pair, kernel) for pair in itertools.pairwise(sizes)), nn.ReLU())


def nature_cnn(channels: int, width: int) -> nn.Module:
    """The CNN of Mnih et al. (2015): (B, 4, 84, 84) -> (B, 64 * width, 11, 11)."""
    convs = Conv2d(channels, 32 * width, 8, 4), Conv2d(32 * width, 64 * width, 4, 2), Conv2d(64 * width, 64 * width, 3)
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.ReLU())


class QNetwork(nn.Module):
    """Encoder, tokens, mixture of experts (or a dense layer), dueling heads over atoms.

    `forward(obs uint8 (B, 4, H, W)) -> (logits (B, A, N), MoEOutput or None)`; without `distributional`, N = 1 and
    the logits are Q-values. As in the authors' code, there is no ReLU, residual connection or norm between the experts'
    output tokens and the heads. Without dueling, `advantage` alone gives the logits. Noise is drawn for every sample in
    every forward pass, in training mode only.
    """

    def __init__(self, args: Args, obs_shape: tuple[int, int, int], num_actions: int):
        super().__init__()
        encoders = {"nature": nature_cnn, "impala": functools.partial(impala_cnn, kernel=args.impala_filter)}
        make_encoder = functools.partial(encoders[args.encoder], width=args.encoder_width)
        big = args.expert_variant == "big"  # each expert has an encoder of its own
        self.encoder = nn.Identity() if big else make_encoder(obs_shape[0])
        shape = self.encoder(torch.zeros(1, *obs_shape)).shape[1:]  # C, h, w
        layer = moe.build_layer(args, shape, noisy=args.noisy, patch_dim=64, make_encoder=make_encoder)  # authors: 64
        self.tokenizer, self.moe, num_features = layer  # `moe` may be a dense layer
        self.distributional, num_atoms = args.distributional, (args.num_atoms if args.distributional else 1)
        self.advantage = moe.linear(num_features, num_actions * num_atoms, noisy=args.noisy)
        self.value = moe.linear(num_features, num_atoms, noisy=args.noisy) if args.dueling else None
        self.support = nn.Buffer(torch.linspace(args.v_min, args.v_max, num_atoms), persistent=False)  # (N,)
        # Channels last makes convolutions 1.7 times faster on a CPU, and PerConv tokens need no copy.
        self.encoder.to(memory_format=torch.channels_last)

    def features(self, obs: Tensor) -> tuple[Tensor, moe.MoEOutput | None]:
        """Return the features that the head reads, (B, F), and the MoEOutput (None for a dense layer)."""
        x = obs.to(dtype=next(self.parameters()).dtype, memory_format=torch.channels_last) / 255
        return moe.flatten_output(self.moe(self.tokenizer(self.encoder(x))))

    def forward(self, obs: Tensor) -> tuple[Tensor, moe.MoEOutput | None]:
        features, output = self.features(obs)
        logits = self.advantage(features).unflatten(1, (-1, self.support.numel()))  # (B, A, N)
        if self.value is not None:
            logits = self.value(features)[:, None] + logits - logits.mean(dim=1, keepdim=True)
        return logits, output

    def q_values(self, obs: Tensor) -> Tensor:
        """(B, 4, H, W) uint8 -> (B, A): expected returns."""
        return self.expected(self(obs)[0])

    def expected(self, logits: Tensor) -> Tensor:
        """(..., N) -> (...)."""
        return logits.softmax(dim=-1) @ self.support if self.distributional else logits[..., 0]


# ----------------------------------------------------------------------------------------------------------- loss
class Batch(NamedTuple):
    """A batch of B transitions. The target of the loss is `reward + discount * value(next_obs)`."""

    obs: Tensor  # (B, stack, H, W) uint8
    action: Tensor  # (B,) int64
    reward: Tensor  # (B,) float32: n-step return within the episode
    discount: Tensor  # (B,) float32: gamma^k * (1 - terminated) for the k steps actually taken
    next_obs: Tensor  # (B, stack, H, W) uint8: k steps later; not used where terminated
    index: Tensor  # (B,) int64: place in the replay
    importance_weights: Tensor  # (B,) float32: 1/sqrt(p), divided by the batch's largest (beta = 0.5, as the authors)


def project_distribution(atoms: Tensor, probs: Tensor, support: Tensor) -> Tensor:
    """Project probs (B, N) at atoms (B, N) onto the evenly spaced support (N,) -> (B, N).

    An atom's mass is divided between its two neighbours in the support. Beyond the ends it goes to the end (Bellemare
    et al., 2017, eq. 7). Nothing is scattered, so the result is deterministic on a GPU too.
    """
    spacing = (support[-1] - support[0]) / (support.numel() - 1)
    distance = (atoms.clamp(support[0], support[-1])[:, None] - support[:, None]).abs() / spacing  # (B, N, N)
    return ((1 - distance).clamp_min(0) * probs[:, None]).sum(dim=2)  # no matrix product: that would be in TF32


def td_loss(q_network: QNetwork, target_network: QNetwork, batch: Batch, args: Args) -> tuple:
    """C51's loss, or without `distributional` the Huber loss of Q-values, as in DrQ(eps).

    C51: cross-entropy to the projected `reward + discount * Z_target(next_obs, a)` (Bellemare et al., 2017, algorithm
    1). Else: Huber loss to `reward + discount * Q_target(next_obs, a)`. The action a is the best one by the online
    network with `double`, else by the target network. Returns the loss (0-D), weighted by the importance weights,
    0-D metrics, the online network's MoEOutput or None, and the losses (B,) for the priorities.
    """
    logits, output = q_network(batch.obs)  # (B, A, N)
    # take_along_dim is used because the gradient of logits[rows, actions] sorts the indices.
    logits = logits.take_along_dim(batch.action[:, None, None], dim=1)[:, 0]  # (B, N): of the actions taken
    q_taken = q_network.expected(logits)  # (B,)
    with torch.no_grad():
        next_logits = target_network(batch.next_obs)[0]  # (B, A, N)
        next_q = q_network.q_values(batch.next_obs) if args.double else target_network.expected(next_logits)  # (B, A)
        next_logits = next_logits.take_along_dim(next_q.argmax(dim=1)[:, None, None], dim=1)[:, 0]  # (B, N)
    if args.distributional:
        atoms = batch.reward[:, None] + batch.discount[:, None] * q_network.support  # (B, N)
        target_probs = project_distribution(atoms, next_logits.softmax(dim=1), q_network.support)  # (B, N)
        losses = F.cross_entropy(logits, target_probs, reduction="none")  # (B,)
    else:
        target = batch.reward + batch.discount * next_logits[:, 0]  # (B,)
        losses = F.smooth_l1_loss(q_taken, target, reduction="none")  # (B,)
    loss = (batch.importance_weights * losses).mean()
    metrics = {"td_loss": loss.detach(), "q_values": q_taken.detach().mean()}
    if args.load_balancing != "none":
        balancing = moe.load_balancing_loss(output, args.load_balancing, args.importance_weight, args.load_weight)
        metrics["load_balancing_loss"] = balancing.detach()
        loss = loss + balancing
    return loss, metrics | {"loss": loss.detach()}, (None if output is None else output.detach()), losses.detach()


# --------------------------------------------------------------------------------------------------------- replay
class ReplayBuffer(nn.Module):
    """Ring buffer of single frames that draws transitions exactly uniformly.

    Row r of environment i is at place r * N + i of every array, so the next step of an environment is N places later.
    Frame stacks and n-step returns are assembled when a transition is drawn. It can be drawn once the row after its
    n-step window is added, until the oldest frame of its stack is overwritten. Its `weight` is then 1, else 0. The
    frame that follows a `truncated` step is not in the ring. That step is therefore never drawn, and windows that reach
    it bootstrap from its frame. Shapes are fixed and nothing waits for the device, so that `add` and `sample` run in
    CUDA graphs. Raises ValueError if the ring is too small for one stack and window.
    """

    FIELDS = ("frames", "action", "reward", "terminated", "truncated")

    def __init__(self, capacity: int, num_envs: int, frame_shape: tuple, *, n_step: int = 1, gamma: float = 0.99):
        super().__init__()
        self.num_envs, self.rows = num_envs, capacity // num_envs
        self.size = self.rows * num_envs
        if self.rows <= STACK_SIZE + n_step:
            raise ValueError(f"--buffer-size must be at least {(STACK_SIZE + n_step + 1) * num_envs}, not {capacity}")
        # The last frame stays black and fills stacks at an episode's start. NumPy's zeros take no memory until written.
        self.frames = nn.Buffer(torch.from_numpy(np.zeros((self.size + 1, *frame_shape), np.uint8)))
        self.action = nn.Buffer(torch.zeros(self.size, dtype=torch.int64))
        self.reward = nn.Buffer(torch.zeros(self.size))
        self.terminated = nn.Buffer(torch.zeros(self.size, dtype=torch.bool))
        self.truncated = nn.Buffer(torch.ones(self.size, dtype=torch.bool))  # so that unwritten rows are never drawn
        # Weights are ones, or in prioritised replay multiples of 2^-20, so that their float64 sums are exact.
        self.weight = nn.Buffer(torch.zeros(self.size, dtype=torch.float64))
        self.new_weight = nn.Buffer(torch.ones(1, dtype=torch.float64))  # weight of a new transition
        self.cursor = nn.Buffer(torch.zeros(1, dtype=torch.int64))  # number of rows written so far
        self.env_offsets = nn.Buffer(torch.arange(num_envs), persistent=False)
        self.stack_offsets = nn.Buffer(torch.arange(1 - STACK_SIZE, 1), persistent=False)  # -3 .. 0
        self.window_offsets = nn.Buffer(torch.arange(n_step), persistent=False)  # 0 .. n-1
        self.gammas = nn.Buffer(torch.tensor([gamma**k for k in range(n_step + 1)]), persistent=False)  # (n+1,)

    def add(self, frame, action, reward, terminated, truncated) -> None:
        """Append a row: the frames (N, H, W), the actions (N,) chosen for them, and the outcome of these actions."""
        place = self.cursor % self.rows * self.num_envs + self.env_offsets  # (N,)
        for name, values in zip(self.FIELDS, (frame, action, reward, terminated, truncated), strict=True):
            buffer = self.get_buffer(name)
            buffer.index_copy_(0, place, torch.as_tensor(values).to(buffer))
        complete = self.later(place, -len(self.window_offsets))  # this row follows their n-step windows
        expired = self.later(place, STACK_SIZE - 1)  # the oldest frame of their stacks is overwritten
        self.weight.index_copy_(0, complete, ~self.truncated[complete] * self.new_weight)
        self.weight.index_fill_(0, expired, 0)
        self.cursor.add_(1)

    def cut(self) -> None:
        """Truncate the running episodes at the newest row, because their next step will not be in the ring."""
        newest = (self.cursor - 1) % self.rows * self.num_envs + self.env_offsets  # (N,)
        self.truncated.index_copy_(0, newest, ~self.terminated[newest])

    def newest(self, rows: int) -> dict[str, np.ndarray]:
        """Return copies of the last rows, (N, rows, ...). Frames of one environment side by side compress best."""
        row = (self.cursor - rows + torch.arange(rows, device=self.cursor.device)) % self.rows
        place = row * self.num_envs + self.env_offsets[:, None]  # (N, rows)
        return {name: self.get_buffer(name)[place].cpu().numpy() for name in self.FIELDS}

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement."""
        cumulative = self.weight.cumsum(dim=0)  # (places,)
        draw = torch.rand(batch_size, dtype=torch.float64, device=cumulative.device) * cumulative[-1]
        return self.gather(torch.searchsorted(cumulative, draw, right=True))

    def gather(self, index: Tensor) -> Batch:
        """Return the transitions that start at places (B,)."""
        window = self.later(index[:, None], self.window_offsets)  # (B, n)
        terminated, truncated = self.terminated[window], self.truncated[window]  # (B, n)
        ended = (terminated | truncated).long()
        taken = (ended.cumsum(dim=1) - ended == 0) & ~truncated  # no end before this step, and no cut at it
        reward = torch.where(taken, self.reward[window] * self.gammas[:-1], 0).sum(dim=1)
        num_steps = taken.sum(dim=1)
        discount = self.gammas[num_steps] * ~(taken & terminated).any(dim=1)
        obs, next_obs = self.observation(torch.stack([index, self.later(index, num_steps)]))
        weight = self.weight[index]
        importance_weights = (weight.min() / weight).sqrt().float()
        return Batch(obs, self.action[index], reward, discount, next_obs, index, importance_weights)

    def observation(self, index: Tensor) -> Tensor:
        """Return the stacks of frames (..., stack, H, W) that end at places (...)."""
        stack = self.later(index[..., None], self.stack_offsets)  # (..., stack)
        ended = (self.terminated[stack] | self.truncated[stack]).long()
        forgotten = ended.flip(-1).cumsum(dim=-1).flip(-1) - ended[..., -1:] > 0  # frames of an earlier episode
        stack = torch.where(forgotten, self.size, stack)  # the black frame
        return self.frames.index_select(0, stack.view(-1)).view(*stack.shape, *self.frames.shape[1:])

    def later(self, place: Tensor, steps: Tensor | int) -> Tensor:
        """Return the places of the same environments `steps` steps later."""
        return (place + steps * self.num_envs) % self.size

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state on the host, with only the frames that were written."""
        state = super().state_dict()
        state["frames"] = state["frames"][: min(int(self.cursor), self.rows) * self.num_envs]
        # Arrays pass through NumPy, or torch.save would write the whole ring.
        return {name: torch.from_numpy(x.cpu().numpy()) for name, x in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name in super().state_dict():
            self.get_buffer(name)[: len(state[name])].copy_(state[name])


class PrioritizedReplayBuffer(ReplayBuffer):
    """Draws transitions in proportion to their weight, the square root of their last loss (Schaul et al., 2016).

    New transitions get the largest weight so far. Weights are multiples of 2^-20, so their float64 sums are exact in
    any order of addition. A place of weight 0 is therefore never drawn, on any device.
    """

    def sample(self, batch_size: int) -> Batch:
        """Draw one transition from each of `batch_size` strata of equal weight."""
        cumulative = self.weight.cumsum(dim=0)  # (places,)
        draw = torch.rand(batch_size, dtype=torch.float64, device=cumulative.device)
        share = (torch.arange(batch_size, device=draw.device) + draw) / batch_size
        share = share.clamp_max(1 - 2**-53)  # rounding may reach 1
        return self.gather(torch.searchsorted(cumulative, share * cumulative[-1], right=True))

    def update_priorities(self, index: Tensor, losses: Tensor) -> None:
        """Set the weights of places `index` (B,) from the unweighted losses (B,).

        A place that was drawn twice gets its larger loss. A place that can no longer be drawn keeps weight 0. A loss
        that is not finite counts as 0, so that the sums stay finite until the run stops for it.
        """
        index, losses = index.to(self.weight.device), losses.detach().to(self.weight).nan_to_num(0.0, 0.0, 0.0)
        weight = ((losses.clamp(0, 2**20) + 1e-10).sqrt() * 2**20).ceil() / 2**20  # 1e-10 is Dopamine's
        weight = weight * (self.weight[index] > 0)
        self.new_weight.copy_(torch.maximum(self.new_weight, weight.max()))
        largest = torch.where(index[:, None] == index, weight, 0).amax(dim=1)  # (B, B) -> (B,)
        self.weight.index_copy_(0, index, largest)


def free_memory() -> float:
    """Return the bytes of host memory that this process may use, in the system and its cgroups (not Linux: inf)."""
    # Folder of a version of cgroups, file of the limit, and the name of the memory in use in memory.stat.
    v1 = "/memory", "memory.limit_in_bytes", "total_rss"
    v2 = "", "memory.max", "anon"
    with contextlib.suppress(OSError):  # not Linux
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root, limit, used = v1 if "memory" in controllers else v2
            group = Path(f"/sys/fs/cgroup{root}{path}")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError, KeyError):  # no limit there
                    usage = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    free = min(free, int((folder / limit).read_text()) - int(usage[used]))
        return free
    return math.inf


def replay_device(args: Args, frame_shape: tuple[int, int], device: torch.device) -> torch.device:
    """Return the device of the replay: the GPU if it fits there, else the CPU. ValueError if it fits nowhere."""
    size = math.prod(frame_shape) + 8 + 4 + 2 + 8  # bytes of a transition: frame, action, reward, ends, weight
    on_gpu = device.type == "cuda" and args.replay_device == "auto"
    if on_gpu and args.buffer_size * size < 0.8 * torch.cuda.mem_get_info(device)[0]:
        return device
    need = size * min(args.buffer_size, args.total_timesteps)  # host memory is only taken by rows that are written
    if need > 0.9 * (free := free_memory()):  # the process itself needs memory too
        raise ValueError(f"--buffer-size {args.buffer_size} takes {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    return torch.device("cpu")


# --------------------------------------------------------------------------------------------------- environments
class Environments:
    """N games in parallel. The step that ends a game returns the first frame of the next (Gymnasium's SAME_STEP).

    Atari games run in ale-py's C++ threads with the paper's settings: call `send`, do other work, then call `recv`.
    Other Gymnasium ids are made as they are. Raises ValueError if observations are not single uint8 frames or actions
    are not Discrete.
    """

    def __init__(self, args: Args, num_envs: int):
        module, _, env_id = args.env_id.rpartition(":")
        if module:
            importlib.import_module(module)
        spec = gym.spec(env_id)
        atari = str(spec.entry_point).startswith("ale_py") and spec.kwargs.get("obs_type", "rgb") == "rgb"
        self.game = spec.kwargs["game"] if atari else None
        args.check_effect("sticky_actions noop_max terminal_on_life_loss", atari, "an Atari game")
        if self.game:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self.envs = AtariVectorEnv(
                self.game,
                num_envs,
                repeat_action_probability=args.sticky_actions,
                noop_max=max(4 * args.noop_max - 3, 1),  # one more than the largest number of no-op frames
                use_fire_reset=False,
                max_num_frames_per_episode=4 * MAX_EPISODE_STEPS,
                reward_clipping=False,
                stack_num=1,
                autoreset_mode="SameStep",
                num_threads=max(1, min(num_envs, cores - 1)),  # they spin, so one core is left for the learner
            )
        else:
            self.envs = gym.make_vec(env_id, num_envs, "sync", vector_kwargs={"autoreset_mode": "SameStep"})
        space, actions = self.envs.single_observation_space, self.envs.single_action_space
        if space.dtype != np.uint8 or len(space.shape) not in (2, 3) or math.prod(space.shape[:-2]) != 1:
            raise ValueError(f"--env-id {args.env_id}: observations must be single uint8 frames (H, W), not {space}")
        if not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
            raise ValueError(f"--env-id {args.env_id}: actions must be Discrete and start at 0, not {actions}")
        self.frame_shape, self.num_actions = space.shape[-2:], int(actions.n)
        self.life_loss = atari and args.terminal_on_life_loss

    def reset(self, seed: int) -> np.ndarray:
        """Start a new game in every environment and return the first frames (N, H, W)."""
        obs, info = self.envs.reset(seed=seed)
        self.lives = info.get("lives")
        return obs.reshape(-1, *self.frame_shape)

    def send(self, action: np.ndarray) -> None:
        """Start a step with actions (N,). Every action must be in range: ale-py hangs on one that is not."""
        self.action = action
        if self.game:
            self.envs.send(action)

    def recv(self) -> tuple[np.ndarray, ...]:
        """Wait for the step. Returns next frame, raw reward, terminated, truncated, game over, all (N, ...).

        `terminated` and `truncated` are those of the learner's episode and never both set. A lost life may set
        `terminated` while the game goes on.
        """
        obs, reward, terminated, truncated, info = self.envs.recv() if self.game else self.envs.step(self.action)
        over = terminated | truncated
        if self.life_loss:  # after the end of a game, `info` has the lives of the next game
            terminated = terminated | (info["lives"] < self.lives) & ~over
            self.lives = info["lives"]
        return obs.reshape(-1, *self.frame_shape), reward, terminated, truncated & ~terminated, over


def reset_seed(seed: int, global_step: int, evaluation: bool = False) -> int:
    """Return the seed of the games that start at `global_step` of run `seed`. Environment i adds i to it."""
    return int(np.random.SeedSequence([seed, global_step, evaluation]).generate_state(1)[0]) % 2**30


def push(obs: Tensor, frame: Tensor | np.ndarray, start: Tensor | np.ndarray) -> Tensor:
    """Append frames (N, H, W) to stacks (N, 4, H, W) in place. A stack is cleared first where `start` (N,) is true."""
    frame, start = (torch.as_tensor(x, device=obs.device) for x in (frame, start))
    return obs.copy_(torch.cat([obs[:, 1:] * ~start[:, None, None, None], frame[:, None]], dim=1))


def select_actions(q_values: Tensor, epsilon: Tensor | float) -> Tensor:
    """Epsilon-greedy actions (N,) from q_values (N, A)."""
    N, A = q_values.shape
    random = torch.randint(A, (N,), device=q_values.device)
    explore = torch.rand(N, device=q_values.device) < epsilon
    return torch.where(explore, random, q_values.argmax(dim=1))


@torch.no_grad()
def policy(q_network: QNetwork, obs: Tensor, frame, start, epsilon) -> Tensor:
    """Push frames (N, H, W) to the stacks `obs` (N, 4, H, W) and return epsilon-greedy actions (N,)."""
    return select_actions(q_network.q_values(push(obs, frame, start)), epsilon)


def evaluate(q_network: QNetwork, args: Args, seed: int, stop: threading.Event) -> list[float]:
    """Return the raw returns of `eval_episodes` whole games, played in parallel at `eval_epsilon` without noise.

    A game is cut after `MAX_EPISODE_STEPS`. A signal ends the evaluation. Training's random state does not change.
    """
    N, device = args.eval_episodes, next(q_network.parameters()).device
    envs = Environments(args, N)
    obs = torch.zeros(N, STACK_SIZE, *envs.frame_shape, dtype=torch.uint8, device=device)
    choose = functools.partial(policy, q_network, obs, epsilon=args.eval_epsilon)
    choose = CudaGraph(choose) if device.type == "cuda" and args.cuda_graphs else choose
    frame, start, playing, returns = envs.reset(seed), np.ones(N, bool), np.ones(N, bool), np.zeros(N)
    q_network.eval()
    bar = tqdm(total=N, desc="evaluating", unit="episode", **BAR)
    with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(MAX_EPISODE_STEPS):
            envs.send(choose(frame, start).cpu().numpy())
            frame, reward, terminated, truncated, over = envs.recv()
            start, returns = terminated | truncated, returns + reward * playing
            bar.update(int((playing & over).sum()))
            playing &= ~over
            if stop.is_set() or not playing.any():
                break
    q_network.train()
    if playing.any() and not stop.is_set():
        print(f"evaluation: {playing.sum()} games were cut after {MAX_EPISODE_STEPS:,} steps", file=sys.stderr)
    return returns.tolist()


# ---------------------------------------------------------------------------------------------------------- agent
class CudaGraph:
    """Calls `function` as one CUDA graph, so that an update of many kernels costs one launch.

    The first `warmup` calls run eagerly: cuDNN picks its algorithms, and torch.compile compiles. The next call is
    captured and replayed. Capturing executes nothing, so every call takes effect once. Inputs are host arrays of the
    same shapes and types in every call; they reach the device through pinned memory. `function` must only use tensors
    that stay in place, and random numbers of the default generators.
    """

    def __init__(self, function: Callable, warmup: int = 10):
        self.function, self.warmup, self.graph, self.inputs = function, warmup, None, None
        self.copied = torch.cuda.Event()

    def __call__(self, *inputs):
        inputs = [torch.as_tensor(x) for x in inputs]
        if self.inputs is None:
            self.pinned = [torch.empty_like(x, pin_memory=True) for x in inputs]
            self.inputs = [torch.empty_like(x, device="cuda") for x in inputs]
        if inputs:
            self.copied.synchronize()  # the copies of the last call may still read the pinned memory
            for x, pinned, on_device in zip(inputs, self.pinned, self.inputs, strict=True):
                on_device.copy_(pinned.copy_(x), non_blocking=True)
            self.copied.record()
        if self.warmup > 0:
            self.warmup -= 1
            return self.function(*self.inputs)
        if self.graph is None:
            self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            # Other threads (TensorBoard, pinning) may call CUDA while this one captures.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        self.graph.replay()
        return self.outputs


def open_device(args: Args) -> torch.device:
    """Return the GPU if there is one and `--cuda` is set, else the CPU. ValueError if `--compile` lacks a compiler."""
    if not (args.cuda and torch.cuda.is_available()):
        return torch.device("cpu")
    compilers, headers = (os.environ.get("CC", "cc"), "gcc", "clang"), Path(sysconfig.get_path("include"), "Python.h")
    if args.compile and not (any(map(shutil.which, compilers)) and headers.exists()):
        raise ValueError(f"--compile needs a C compiler, gcc or clang, and {headers}; --no-compile does without")
    if torch.cuda.current_stream() == torch.cuda.default_stream():  # CUDA graphs cannot be captured on it
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, as JAX uses it on GPUs
    return torch.device("cuda")


class Agent:
    """The state of a run: networks, optimizer and replay."""

    PARTS = ("q_network", "target_network", "optimizer", "replay")

    def __init__(self, args: Args, envs: Environments):
        device = open_device(args)
        graphs = args.cuda_graphs and device.type == "cuda"
        compiled = args.compile and device.type == "cuda"
        self.args, self.device = args, device
        self.obs = torch.zeros(args.num_envs, STACK_SIZE, *envs.frame_shape, dtype=torch.uint8, device=device)
        self.action = torch.zeros(args.num_envs, dtype=torch.int64, device=device)
        networks = (QNetwork(args, self.obs.shape[1:], envs.num_actions).to(device) for _ in range(2))
        self.q_network, self.target_network = networks
        self.target_network.load_state_dict(self.q_network.state_dict())
        self.generators = [torch.default_generator, *(torch.cuda.default_generators if device.type == "cuda" else ())]
        adam = {"lr": args.learning_rate, "eps": args.adam_eps, "fused": True, "capturable": graphs}
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), **adam)
        location = replay_device(args, envs.frame_shape, device)
        window = {"n_step": args.n_step, "gamma": args.gamma}
        buffer = PrioritizedReplayBuffer if args.prioritized else ReplayBuffer
        self.replay = buffer(args.buffer_size, args.num_envs, envs.frame_shape, **window).to(location)
        compile = functools.partial(torch.compile, dynamic=False, fullgraph=True, disable=not compiled)
        self.loss, self.policy = compile(td_loss), compile(policy)
        if location == device:
            # `fallback_random` draws in float64, as eager code does. Autotuning would copy the whole ring to the host.
            options = {"fallback_random": True, "triton.autotune_pointwise": False}
            self.replay.add = compile(self.replay.add, options=options)
            self.replay.sample = compile(self.replay.sample, options=options)
            if args.prioritized:
                self.replay.update_priorities = compile(self.replay.update_priorities)
        if graphs:
            warnings.filterwarnings("ignore", ".*capturable=True.*")  # the warm-up runs without a graph on purpose
            # A replay on the host cannot be in a graph.
            names = ("act", "observe", "learn") if location == device else ("act", "update")
            for name in names:
                setattr(self, name, CudaGraph(getattr(self, name)))

    def act(self, frame, start, epsilon) -> Tensor:
        """Return actions (N,) for frames (N, H, W). `start` (N,) says whether a frame is the first of its episode."""
        frame, start, epsilon = (torch.as_tensor(x, device=self.device) for x in (frame, start, epsilon))
        return self.action.copy_(self.policy(self.q_network, self.obs, frame, start, epsilon))

    def observe(self, reward, terminated, truncated) -> None:
        """Add a row to the replay: the newest frames, the last actions and their outcome, all (N,)."""
        self.replay.add(self.obs[:, -1], self.action, reward, terminated, truncated)

    def learn(self) -> tuple:
        """Draw a batch and update on it. Returns the metrics and the MoEOutput of the loss."""
        batch = self.replay.sample(self.args.batch_size)
        metrics, output, losses = self.update(*batch)
        if self.args.prioritized:
            self.replay.update_priorities(batch.index, losses)
        return metrics, output

    def update(self, *batch: Tensor) -> tuple:
        """One step of gradient descent on a `Batch`."""
        batch = Batch(*(x.to(self.device) for x in batch))
        self.optimizer.zero_grad()
        loss, metrics, output, losses = self.loss(self.q_network, self.target_network, batch, self.args)
        loss.backward()
        self.optimizer.step()
        return metrics, output, losses

    @torch.no_grad()
    def update_target(self) -> None:
        """Copy the weights to the target network, in one launch."""
        torch._foreach_copy_([*self.target_network.parameters()], [*self.q_network.parameters()])

    def save(self, path: Path, progress: dict) -> None:
        """Replace the checkpoint. Raises FloatingPointError if a weight is not finite."""
        if not nn.utils.get_total_norm(self.q_network.parameters(), math.inf).isfinite():  # the largest weight
            raise FloatingPointError(f"a weight is not finite; {path} stays as it was")
        state = {name: getattr(self, name).state_dict() for name in self.PARTS} | {"progress": progress}
        state["random"] = [generator.get_state() for generator in self.generators]
        write_file(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> dict:
        """Restore what `save` wrote and return its progress."""
        state = read_file(path)
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.optimizer.param_groups[0]["capturable"] = self.optimizer.defaults["capturable"]  # the saved run may differ
        for generator, random in zip(self.generators, state["random"], strict=False):  # a run on a CPU has only one
            generator.set_state(random)
        return state["progress"]


# ----------------------------------------------------------------------------------------------------------- runs
@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds and out-of-memory errors, which are no bugs, into one line and exit code 2."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        no_memory = re.search("allocate memory|create a primitive", text)  # words of PyTorch and of oneDNN on a CPU
        if no_memory or isinstance(error, MemoryError | torch.OutOfMemoryError):
            text = f"out of memory. {text}"
        elif not isinstance(error, kinds):
            raise
        elif type(error) is not ValueError:
            text = f"{type(error).__name__}: {text}"
        with contextlib.suppress(OSError):  # stderr may be closed
            print(f"error: {text}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM, SIGINT, SIGHUP and SIGUSR1 set. The second signal of a kind ends the process."""
    stop = threading.Event()

    def handle(number: int, _) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    with contextlib.ExitStack() as stack:
        for name in {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"} & set(dir(signal)):  # Windows has only two of them
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, for example
                stack.callback(signal.signal, number, signal.signal(number, handle))
        yield stop


def write_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` with a temporary file and rename it when it is on the disk. A failure leaves the old file."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save hides the system's error, such as a full disk, in it
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path: Path) -> dict:
    """Load what `torch.save` wrote. ValueError if a byte has changed, which a mapped load does not notice."""
    try:
        with zipfile.ZipFile(path) as archive:
            if name := archive.testzip():
                raise zipfile.BadZipFile(f"{name} has changed")
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return torch.load(path, "cpu", weights_only=True, mmap=True)


def write_json(path: Path, content: dict) -> None:
    write_file(path, lambda file: file.write(f"{json.dumps(content, indent=2)}\n".encode()))


def write_weights(path: Path, q_network: QNetwork) -> None:
    weights = {name: weight.cpu() for name, weight in q_network.state_dict().items()}
    write_file(path, lambda file: torch.save(weights, file))


def check_args(args: Args) -> None:
    """Raise ValueError for arguments that cannot work or would silently do nothing. Libraries check the rest."""
    args.check_range("total_timesteps iteration_steps num_envs batch_size n_step target_network_frequency", 1)
    args.check_range("encoder_width impala_filter", 1, 1_000)
    args.check_range("seed weights_every eval_episodes epsilon_decay_steps", 0)
    if args.checkpoint_every:  # a checkpoint cuts the games, and not every step may be cut
        args.check_range("checkpoint_every", 2 * args.num_envs)
    args.check_range("learning_starts", args.num_envs * (args.n_step + 2))  # a transition is drawable
    args.check_range("noop_max", 0, 1_000)
    args.check_range("sticky_actions end_epsilon eval_epsilon gamma", 0, 1)
    args.check_range("learning_rate adam_eps", 1e-30, 1e30)
    args.check_range("replay_ratio", 1e-6, 100)
    args.check_range("num_atoms", 2, 1_000)
    args.check_range("v_max", -1e30, 1e30)
    # Neighbouring atoms must be at least 1,000 float32 steps apart, or the projection would lose mass.
    resolved = 2**-13 * args.num_atoms * max(abs(args.v_min), abs(args.v_max), 1e-3)
    args.check_range("v_min", -1e30, args.v_max - resolved)
    args.check_effect("num_atoms v_min v_max", args.distributional, "--distributional")
    args.check_effect("end_epsilon epsilon_decay_steps", not args.noisy, "--no-noisy")
    args.check_effect("impala_filter", args.encoder == "impala", "--encoder impala")
    args.check_layer()
    if args.total_timesteps <= args.learning_starts:
        print("warning: nothing will be learned, --total-timesteps is not above --learning-starts", file=sys.stderr)


def run_path(args: Args) -> Path:
    """Return the directory that --resume names, or one named after environment, agent, layer, experts, seed."""
    agent, env_id = Path(__file__).stem.removesuffix("_softmoe"), re.sub("[/:]", "-", args.env_id)
    name = args.run_name or f"{env_id}__{agent}_{args.layer}{args.num_experts}__seed{args.seed}"
    return Path(args.runs_dir) / name if args.resume in (None, "auto") else Path(args.resume)


def parse_args() -> Args:
    """Parse the command line. With --resume, flags that are not given keep the values of the resumed run."""
    sigpipe = getattr(signal, "SIGPIPE", signal.SIGTERM)  # Windows has none
    old = signal.signal(sigpipe, signal.SIG_DFL)  # so that `--help | head` ends silently
    args = tyro.cli(Args, description=(__doc__ or "").split("\n\n")[0])
    signal.signal(sigpipe, old)
    config = run_path(args) / "config.json"
    if args.resume is None or (args.resume == "auto" and not config.exists()):
        return args
    saved = json.loads(config.read_text())
    if saved["script"] != Path(__file__).name:
        raise ValueError(f"--resume {args.resume}: {config} is of {saved['script']}")
    warnings.filterwarnings("error", module="tyro")  # refuse a value of config.json that its flag does not take
    return tyro.cli(Args, default=Args(**saved["args"] | {"resume": args.resume}))


MAY_CHANGE = (  # when a run is resumed
    "resume runs_dir run_name cuda compile cuda_graphs replay_device checkpoint_every checkpoint_at_end weights_every "
    "total_timesteps eval_episodes"
).split()


def lock_run(run_dir: Path) -> IO | None:
    """Make the directory and lock it while the returned file is open. None if another process has locked it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir / "lock", "w")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except (OSError, ImportError) as error:  # a file system without locks, or Windows
        print(f"warning: nothing keeps a second process from {run_dir}: {error}", file=sys.stderr)
    return lock


def open_run(args: Args) -> tuple[Path, dict, IO]:
    """Return directory, config.json and lock of a new run, or of the one to resume. ValueError if that fails."""
    path = run_dir = run_path(args)
    for number in itertools.count(2):
        lock = lock_run(run_dir)
        has_run = (run_dir / "config.json").exists() or (run_dir / "checkpoint.pt").exists()
        if args.resume is not None or (lock and not has_run):
            break
        run_dir = path.with_name(f"{path.name}-{number}")  # never overwrite a run
    if lock is None:
        raise ValueError(f"{run_dir} is in use by another process")
    versions = {"torch": torch.__version__, "ale_py": ale_py.__version__, "gymnasium": gym.__version__}
    config = {"script": Path(__file__).name, "args": vars(args) | {"resume": None}, "versions": versions, "finished": 0}
    saved = config | (json.loads((run_dir / "config.json").read_text()) if has_run else {})
    old, new = saved["args"], {name: x for name, x in config["args"].items() if name not in MAY_CHANGE}
    changed = [f"{name} {x} (was {old.get(name)})" for name, x in new.items() if x != old.get(name)]
    if changed:
        raise ValueError(f"--resume {args.resume}: arguments contradict the run in {run_dir}: {', '.join(changed)}")
    return run_dir, config | {"finished": saved["finished"]}, lock


class ReplayLog:
    """Writes the transitions of a run to `replay/`, in segments that a thread compresses, and metadata.json.

    `<first agent step>.npz` holds the ring's arrays, (N, rows, ...). Segments follow each other without a gap. A
    resumed run deletes the segments that begin at or after its checkpoint and writes them again.
    """

    def __init__(self, folder: Path, args: Args, envs: Environments, global_step: int):
        folder.mkdir(exist_ok=True)
        self.folder, self.written, self.thread = folder, global_step, ThreadPoolExecutor(1)
        self.every = min(SEGMENT_STEPS, args.buffer_size) // args.num_envs * args.num_envs
        for path in folder.glob("[0-9]" * 12 + ".npz"):
            if int(path.stem) >= global_step:
                path.unlink()
        rom = Path(ale_py.roms.get_rom_path(envs.game)).read_bytes() if envs.game else b""
        metadata = {"env_id": args.env_id, "num_actions": envs.num_actions, "num_envs": args.num_envs}
        metadata |= {"ale_py": ale_py.__version__, "rom_md5": hashlib.md5(rom).hexdigest(), "args": vars(args)}
        self.pending = self.thread.submit(write_json, folder / "metadata.json", metadata)
        self.pending.result()

    def write(self, replay: ReplayBuffer, global_step: int) -> None:
        """Start writing the steps that no segment has yet. Raises the error of the previous segment, if any."""
        self.pending.result()
        if global_step > self.written:
            arrays = replay.newest((global_step - self.written) // replay.num_envs)
            path, self.written = self.folder / f"{self.written:012d}.npz", global_step
            save = functools.partial(np.savez_compressed, **arrays)
            self.pending = self.thread.submit(write_file, path, save)


def to_floats(metrics: dict[str, Tensor], output: moe.MoEOutput | None) -> dict[str, float]:
    """Convert what an update returned to floats, by TensorBoard tag. Waits for the device once."""
    values = {f"losses/{name}": value for name, value in metrics.items()}
    values |= {f"moe/{name}": value for name, value in moe.routing_stats(output).items()} if output else {}
    return dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True)) if values else {}


class RunLog:
    """Writes episodes.csv, metrics.csv and TensorBoard, and shows progress. Checkpoints keep the rows of the files."""

    HEADERS = {
        "episodes.csv": "global_step,episode_return,episode_length",
        "metrics.csv": "iteration,global_step,episodes,mean_return,sps",
    }

    def __init__(self, run_dir: Path, args: Args, progress: dict):
        self.args, self.path = args, run_dir / "checkpoint.pt"
        self.rows = progress.get("rows", {name: [] for name in self.HEADERS})
        for name, rows in self.rows.items():
            (run_dir / name).write_text("".join(f"{row}\n" for row in (self.HEADERS[name], *rows)))
        self.returns = [float(row.split(",")[1]) for row in self.rows["episodes.csv"]]
        self.running_return, self.running_length = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
        global_step = progress["global_step"]
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=global_step + 1)
        self.started = global_step, time.monotonic()
        self.bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True, **BAR)

    def write(self, name: str, *values) -> None:
        """Append a row to the file `name`."""
        self.rows[name].append(",".join(map(str, values)))
        with open(self.path.with_name(name), "a") as file:
            file.write(f"{self.rows[name][-1]}\n")

    def scalars(self, global_step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, global_step)

    def round(self, global_step: int, reward: np.ndarray, over: np.ndarray) -> None:
        """Add up raw rewards (N,), and write a row for each game that is over (N,)."""
        self.running_return += reward
        self.running_length += 1
        for episode_return, length in zip(self.running_return[over], self.running_length[over], strict=True):
            self.returns.append(episode_return)
            self.write("episodes.csv", global_step, f"{episode_return:.17g}", length)
            self.scalars(global_step, {"charts/episodic_return": episode_return, "charts/episodic_length": length})
        self.running_return[over], self.running_length[over] = 0, 0
        self.bar.update(len(over))

    def update(self, global_step: int, epsilon: float, values: dict[str, float]) -> None:
        """Log the last update and show its loss. Raises FloatingPointError if the loss is not finite."""
        self.scalars(global_step, values | {"charts/epsilon": epsilon, "charts/sps": self.sps(global_step)})
        shown = [f"return {np.mean(self.returns[-100:]):.2f}"] if self.returns else []
        if values:  # there was an update
            loss = values["losses/loss"]
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at agent step {global_step}; {self.path} stays as it was")
            shown.append(f"loss {loss:.4f}")
        self.bar.set_postfix_str(", ".join(shown), refresh=False)

    def iteration(self, global_step: int) -> None:
        """Write the paper's score: mean raw return of the episodes that ended in the last `iteration_steps`."""
        scored = sum(int(row.split(",")[2]) for row in self.rows["metrics.csv"])  # episodes of past iterations
        returns = self.returns[scored:]
        number = global_step // self.args.iteration_steps - 1
        mean = f"{np.mean(returns):.4f}" if returns else ""
        self.write("metrics.csv", number, global_step, len(returns), mean, f"{self.sps(global_step):.1f}")
        self.scalars(global_step, {"charts/iteration_return": np.mean(returns)} if returns else {})
        self.started = global_step, time.monotonic()

    def sps(self, global_step: int) -> float:
        """Agent steps per second since the iteration began."""
        return (global_step - self.started[0]) / (time.monotonic() - self.started[1])


def describe(args: Args, run_dir: Path, envs: Environments, agent: Agent) -> str:
    """Return the text that says what runs, for the console."""
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in agent.q_network.named_children()}
    frames, threads = agent.replay.frames, f"CPU, {torch.get_num_threads()} threads"
    components = [f"{args.num_atoms} atoms" if args.distributional else "Huber loss", f"{args.n_step}-step"]
    components += [name for name in ("double", "dueling", "noisy", "prioritized") if getattr(args, name)]
    return f"""{Path(__file__).name}: {args.env_id}, seed {args.seed}
  environment  {args.num_envs} in parallel, {envs.num_actions} actions, {STACK_SIZE} frames of {envs.frame_shape}
  network      {args.encoder}, {args.layer}, {args.num_experts} x {args.expert_hidden_dim} hidden units
  parameters   {sum(sizes.values()):,} = {" + ".join(f"{name} {size:,}" for name, size in sizes.items() if size)}
  agent        {", ".join(components)}
  replay       {args.buffer_size:,} transitions, {frames.nbytes / 1e9:.2f} GB on the {frames.device} when full
  training     {args.total_timesteps:,} agent steps, {args.replay_ratio:g} updates of {args.batch_size} per step
  device       {torch.cuda.get_device_name() if agent.device.type == "cuda" else threads}
  run          {run_dir}"""


# ------------------------------------------------------------------------------------------------------- training
def due(every: int, step: int, round_steps: int) -> bool:
    """Whether one of the last `round_steps` steps is a multiple of `every`. Never if `every` is 0."""
    return every > 0 and step // every > (step - round_steps) // every


def updates_until(step: int, args: Args) -> int:
    """Number of updates that are due in the first `step` agent steps."""
    return int(max(step - args.learning_starts, 0) * args.replay_ratio)


def epsilon_at(step: int, args: Args) -> float:
    """Probability of a random action: 1 until learning starts, then a linear decay to `end_epsilon`."""
    return np.interp(step - args.learning_starts, (0, args.epsilon_decay_steps), (1, args.end_epsilon))


def checkpoint(agent: Agent, run_dir: Path, log: RunLog, replay_log: ReplayLog | None, global_step: int) -> bool:
    """Cut the running episodes and save. Returns False, after a warning, if a file cannot be written."""
    agent.replay.cut()
    log.running_return[:], log.running_length[:] = 0, 0  # the games that are cut do not count
    try:
        if replay_log:
            replay_log.write(agent.replay, global_step)
            replay_log.pending.result()  # wait until the segment is on the disk
        agent.save(run_dir / "checkpoint.pt", {"global_step": global_step, "rows": log.rows})
    except OSError as error:
        tqdm.write(f"warning: the last good checkpoint stays, not one of step {global_step}: {error}", sys.stderr)
        return False
    log.tensorboard.flush()
    return True


def evaluate_run(args: Args, agent: Agent, log: RunLog, run_dir: Path, stop: threading.Event, global_step: int) -> None:
    """Write weights.pt, evaluate, and write eval.json, after the last step."""
    write_weights(run_dir / "weights.pt", agent.q_network)
    seed = reset_seed(args.seed, global_step, evaluation=True)
    returns = evaluate(agent.q_network, args, seed, stop) if args.eval_episodes else []
    if returns and not stop.is_set():
        mean, std = np.mean(returns).item(), np.std(returns).item()
        result = {"episodes": len(returns), "mean_return": mean, "std_return": std, "epsilon": args.eval_epsilon}
        result |= {"global_step": global_step, "returns": returns}
        write_json(run_dir / "eval.json", result)
        log.scalars(global_step + 1, {"charts/eval_return": mean})  # one step later, so that resuming purges it
        print(f"evaluation: mean return {mean:.2f} over {len(returns)} episodes")


def main(args: Args) -> None:
    with one_line_errors(OSError, ValueError, RuntimeError, ImportError, gym.error.Error):
        check_args(args)
        torch.manual_seed(args.seed)
        envs = Environments(args, args.num_envs)
        run_dir, config, lock = open_run(args)  # the lock is released when this function ends
        if args.resume == "auto" and config["finished"] >= args.total_timesteps:
            print(f"{run_dir} is finished")
            return
        agent = Agent(args, envs)
        progress = {"global_step": 0}
        if (run_dir / "checkpoint.pt").exists():
            with one_line_errors(Exception):  # a damaged file can raise nearly anything
                progress = agent.load(run_dir / "checkpoint.pt")
        elif config["finished"] or args.resume not in (None, "auto"):
            raise ValueError(f"--resume {args.resume}: {run_dir} has no checkpoint to continue from")
        global_step = new_games_step = progress["global_step"]
        if global_step >= args.total_timesteps + args.num_envs:  # the last round may pass the total
            raise ValueError(f"--total-timesteps {args.total_timesteps}: the run has done {global_step} already")
        write_json(run_dir / "config.json", config | {"finished": 0})
        print(describe(args, run_dir, envs, agent), flush=True)
        replay_log = ReplayLog(run_dir / "replay", args, envs, global_step) if args.save_replay else None
        if args.weights_every:
            (run_dir / "weights").mkdir(exist_ok=True)
        log = RunLog(run_dir, args, progress)

    saved, metrics, output, N = True, {}, None, args.num_envs
    with one_line_errors(OSError, FloatingPointError), log.bar, log.tensorboard, stop_on_signals() as stop:
        # A round chooses actions, learns while the games emulate, and stores the outcome of the actions. A checkpoint
        # ends the running games. The next round starts new ones, with a seed that follows from the step, so that a
        # resumed run equals an unbroken one.
        while global_step < args.total_timesteps and not stop.is_set():
            if global_step == new_games_step:
                frame = envs.reset(reset_seed(args.seed, global_step))
                start = np.ones(N, bool)
            epsilon = 0.0 if args.noisy else epsilon_at(global_step, args)
            envs.send(agent.act(frame, start, epsilon).cpu().numpy())
            if replay_log and due(replay_log.every, global_step, N):
                replay_log.write(agent.replay, global_step)
            for _ in range(updates_until(global_step + N, args) - updates_until(global_step, args)):
                if metrics or agent.replay.weight.any():  # nothing can be drawn if every step so far was truncated
                    metrics, output = agent.learn()
            frame, reward, terminated, truncated, over = envs.recv()
            agent.observe(reward.clip(-1, 1), terminated, truncated)
            start = terminated | truncated
            global_step += N
            if due(args.target_network_frequency, global_step, N):
                agent.update_target()

            try:
                log.round(global_step, reward, over)
                if due(LOG_EVERY, global_step, N):
                    log.update(global_step, epsilon, to_floats(metrics, output))
                if due(args.iteration_steps, global_step, N):
                    log.iteration(global_step)
                if due(args.weights_every, global_step, N):
                    write_weights(run_dir / "weights" / f"{global_step}.pt", agent.q_network)
            except OSError:  # a full disk or a closed pipe: the steps done so far are not lost
                checkpoint(agent, run_dir, log, replay_log, global_step)
                raise
            if due(args.checkpoint_every, global_step, N):
                saved = checkpoint(agent, run_dir, log, replay_log, global_step)
                new_games_step = global_step
        if global_step > new_games_step:
            saved = checkpoint(agent, run_dir, log, replay_log, global_step)
        log.bar.close()
        if not stop.is_set():
            evaluate_run(args, agent, log, run_dir, stop, global_step)
        print(f"{global_step:,} agent steps done, in {run_dir}")
        if not saved:
            raise SystemExit(1)
        if stop.is_set():
            print(f"stopped by a signal; continue with: python {shlex.join([sys.argv[0], '--resume', str(run_dir)])}")
            raise SystemExit(75)  # EX_TEMPFAIL of sysexits.h
        write_json(run_dir / "config.json", config | {"finished": global_step})
        if not args.checkpoint_at_end:
            (run_dir / "checkpoint.pt").unlink()


if __name__ == "__main__":
    with one_line_errors(Exception):
        args = parse_args()
    try:
        main(args)
    except Exception:  # a bug: print its traceback and exit with EX_SOFTWARE of sysexits.h
        sys.excepthook(*sys.exc_info())
        raise SystemExit(70) from None
