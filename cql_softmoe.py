"""Offline reinforcement learning on Atari: CQL and CQL+C51 with mixture-of-experts layers.

    python dqn_softmoe.py --total-timesteps 1000000 --save-replay --run-name data  # saves its transitions
    python cql_softmoe.py --dataset-dir runs/data

Reimplements "Mixtures of Experts Unlock Parameter Scaling for Deep RL" (Obando-Ceron et al., 2024, arXiv 2402.08609).
C51 or DQN with the regulariser of CQL (Kumar et al., 2020). A Soft MoE over the tokens of the encoder's feature map
replaces its dense layer. Needs `moe_layers.py` beside it and nothing else of this repository.

Differs on purpose from the authors' code (google/dopamine, labs/moes); tests/README.md has the whole table:
- An evaluation plays `--eval-steps` agent steps in ten games in parallel, and the last episode of each to its end.
- The last step of an episode that was cut is not learned from, and the steps before it bootstrap from its frame.
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
LOG_EVERY = 250  # updates between TensorBoard points
BAR = {"dynamic_ncols": True, "mininterval": 0.5 if sys.stderr.isatty() else 30.0}  # in a log file, every 30 s


@dataclass
class Args(moe.LayerArgs):
    # Run
    env_id: str = "BreakoutNoFrameskip-v4"  # Atari id, or a Gymnasium id with single uint8 frames ("module:Game-v0")
    seed: int = 1  # seed of networks, exploration, replay draws and environments
    dataset_dir: str = ""  # data: a run with --save-replay, or a folder of segments (scripts/convert_dqn_replay.py)
    total_updates: int = 12_500_000  # updates (paper: 200 iterations of 62,500)
    runs_dir: str = "runs"  # folder of run directories
    run_name: str | None = None  # name of the run directory (default: environment, agent, layer, experts, seed)
    resume: str | None = None  # directory of the run to continue; auto: this run's directory, if it exists
    checkpoint_every: int = 62_500  # updates between checkpoints (0: only at the end)
    checkpoint_at_end: bool = True  # keep the last checkpoint of a finished run, so that it can be continued
    weights_every: int = 0  # updates between copies of the weights, weights/<update>.pt (0: only at the end)
    iteration_updates: int = 62_500  # updates per evaluation and row of metrics.csv (paper: 62,500)
    eval_steps: int = 125_000  # agent steps of an evaluation; last episodes are played to their end (paper: 125,000)
    cuda: bool = True  # run on the GPU where there is one
    compile: bool = True  # torch.compile drawing and the loss (GPU only)
    cuda_graphs: bool = True  # capture learning and evaluation in CUDA graphs (GPU only)

    # Environment
    num_envs: int = 10  # games that an evaluation plays at once
    sticky_actions: float = 0.25  # chance that the last action is repeated (Machado et al., 2018; DER: 0; Atari only)
    noop_max: int = 0  # a game starts with up to 4 * (noop_max - 1) no-op frames (DER: 30; Atari only)
    terminal_on_life_loss: bool = False  # a lost life clears the stack in evaluation, as in such data (Atari only)

    # Network
    encoder: Literal["impala", "nature"] = "impala"  # convolutions (paper: Impala; DER and figure 7: Nature CNN)
    encoder_width: int = 1  # multiplies the encoder's channels
    impala_filter: int = 3  # kernel of Impala's convolutions (paper: 3; figure 18: 4, 6)

    # Data
    data_fraction: float = 1.0  # share of every segment that is used, from its start (paper: 0.05, 0.1, 0.5)
    max_shards: int | None = None  # number of segments that are used, from the first (default: all)
    cache_dir: str | None = None  # folder for the unpacked data (default: beside the data)
    batch_size: int = 32  # transitions per update (paper: 32)
    n_step: int | None = None  # steps of the return before bootstrapping (default, paper: CQL+C51 3, CQL 1)
    replay_device: Literal["auto", "cpu"] = "auto"  # auto: GPU memory when the data fits there, else the disk

    # Optimisation
    learning_rate: float | None = None  # Adam's learning rate (default, paper: CQL+C51 6.25e-5, CQL 5e-5)
    adam_eps: float | None = None  # Adam's epsilon (default, paper: CQL+C51 1.5e-4, CQL 3.125e-4)
    gamma: float = 0.99  # discount (paper: 0.99)
    target_network_frequency: int | None = None  # updates between copies to the target (CQL+C51 100, CQL 2,000)

    # CQL
    distributional: bool = True  # CQL+C51; else CQL, on expected values with the Huber loss
    cql_alpha: float = 0.1  # weight of CQL's regulariser (paper: 0.1; 0 is offline C51 or DQN)
    num_atoms: int = 51  # atoms of the return distribution (Bellemare et al., 2017; paper: 51)
    v_min: float = -10.0  # lowest atom, in clipped returns (paper: -10)
    v_max: float = 10.0  # highest atom, in clipped returns (paper: 10)
    double: bool = True  # choose the target's action with the online network (distributional; van Hasselt et al., 2016)
    dueling: bool = True  # value and advantage heads (distributional; Wang et al., 2016)
    eval_epsilon: float = 0.001  # exploration in evaluation (paper: 0.001)

    def __post_init__(self):
        super().__post_init__()
        defaults = {"n_step": (3, 1), "learning_rate": (6.25e-5, 5e-5), "adam_eps": (1.5e-4, 3.125e-4)}
        for name, (c51, cql) in (defaults | {"target_network_frequency": (100, 2_000)}).items():
            if getattr(self, name) is None:
                setattr(self, name, c51 if self.distributional else cql)


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
    """Encoder, tokens, mixture of experts (or a dense layer), head: dueling over atoms, or plain.

    `forward(obs uint8 (B, 4, H, W)) -> (logits (B, A, N), MoEOutput or None)`; without `distributional`, N = 1 and
    the logits are Q-values. As in the authors' code, there is no ReLU, residual connection or norm between the experts'
    output tokens and the heads. Without dueling, `advantage` alone gives the logits.
    """

    def __init__(self, args: Args, obs_shape: tuple[int, int, int], num_actions: int):
        super().__init__()
        encoders = {"nature": nature_cnn, "impala": functools.partial(impala_cnn, kernel=args.impala_filter)}
        make_encoder = functools.partial(encoders[args.encoder], width=args.encoder_width)
        big = args.expert_variant == "big"  # each expert has an encoder of its own
        self.encoder = nn.Identity() if big else make_encoder(obs_shape[0])
        shape = self.encoder(torch.zeros(1, *obs_shape)).shape[1:]  # C, h, w
        layer = moe.build_layer(args, shape, make_encoder=make_encoder)
        self.tokenizer, self.moe, num_features = layer  # `moe` may be a dense layer
        self.distributional, num_atoms = args.distributional, (args.num_atoms if args.distributional else 1)
        self.advantage = moe.linear(num_features, num_actions * num_atoms)
        self.value = moe.linear(num_features, num_atoms) if args.distributional and args.dueling else None
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
    index: Tensor  # (B,) int64: place in the data


def project_distribution(atoms: Tensor, probs: Tensor, support: Tensor) -> Tensor:
    """Project probs (B, N) at atoms (B, N) onto the evenly spaced support (N,) -> (B, N).

    An atom's mass is divided between its two neighbours in the support. Beyond the ends it goes to the end (Bellemare
    et al., 2017, eq. 7). Nothing is scattered, so the result is deterministic on a GPU too.
    """
    spacing = (support[-1] - support[0]) / (support.numel() - 1)
    distance = (atoms.clamp(support[0], support[-1])[:, None] - support[:, None]).abs() / spacing  # (B, N, N)
    return ((1 - distance).clamp_min(0) * probs[:, None]).sum(dim=2)  # no matrix product: that would be in TF32


def td_loss(q_network: QNetwork, target_network: QNetwork, batch: Batch, args: Args) -> tuple:
    """C51's loss or the Huber loss of Q-values, plus `cql_alpha` times CQL's regulariser (Kumar et al., 2020, eq. 4).

    C51: cross-entropy to the projected `reward + discount * Z_target(next_obs, a)` (Bellemare et al., 2017). Else:
    Huber loss to `reward + discount * max_a Q_target(next_obs, a)`. CQL: mean of logsumexp_a Q(obs, a) - Q(obs, a_data)
    on expected returns. Returns the loss (0-D), 0-D metrics, and the online network's MoEOutput or None.
    """
    logits, output = q_network(batch.obs)  # (B, A, N)
    q_values = q_network.expected(logits)  # (B, A)
    q_taken = q_values.gather(1, batch.action[:, None])[:, 0]  # (B,)
    with torch.no_grad():
        next_logits = target_network(batch.next_obs)[0]  # (B, A, N)
        double = args.distributional and args.double
        next_q = q_network.q_values(batch.next_obs) if double else target_network.expected(next_logits)  # (B, A)
        next_logits = next_logits.take_along_dim(next_q.argmax(dim=1)[:, None, None], dim=1)[:, 0]  # (B, N)
    if args.distributional:
        atoms = batch.reward[:, None] + batch.discount[:, None] * q_network.support  # (B, N)
        target_probs = project_distribution(atoms, next_logits.softmax(dim=1), q_network.support)  # (B, N)
        # take_along_dim is used because the gradient of logits[rows, actions] sorts the indices.
        logits = logits.take_along_dim(batch.action[:, None, None], dim=1)[:, 0]  # (B, N): of the actions taken
        loss = F.cross_entropy(logits, target_probs)
    else:
        loss = F.smooth_l1_loss(q_taken, batch.reward + batch.discount * next_logits[:, 0])
    cql = (q_values.logsumexp(dim=1) - q_taken).mean()
    metrics = {"td_loss": loss.detach(), "cql_loss": cql.detach(), "q_data": q_taken.detach().mean()}
    metrics["q_greedy"] = q_values.detach().max(dim=1).values.mean()
    loss = loss + args.cql_alpha * cql
    if args.load_balancing != "none":
        balancing = moe.load_balancing_loss(output, args.load_balancing, args.importance_weight, args.load_weight)
        metrics["load_balancing_loss"] = balancing.detach()
        loss = loss + balancing
    return loss, metrics | {"loss": loss.detach()}, (None if output is None else output.detach())


# ----------------------------------------------------------------------------------------------------------- data
class Dataset(nn.Module):
    """Saved transitions, memory-mapped or on the GPU. Batches are drawn exactly uniformly.

    `folder` has flat arrays: frames.npy and so on. Row r of environment i is at place r * N + i, so the next step of an
    environment is N places later. Frame stacks and n-step returns are assembled when a transition is drawn. Only the
    places in `drawable` are drawn. The frame that follows a `truncated` step is not in the data. That step is therefore
    never drawn, and windows that reach it bootstrap from its frame. Shapes are fixed and nothing waits for the device,
    so that `sample` runs in CUDA graphs.
    """

    FIELDS = {"frames": "uint8", "action": "int64", "reward": "float32", "terminated": "bool", "truncated": "bool"}

    def __init__(self, folder: Path, num_envs: int, *, n_step: int = 1, gamma: float = 0.99):
        super().__init__()
        warnings.filterwarnings("ignore", ".*not writable.*")  # the data is only read
        for name in self.FIELDS:
            self.register_buffer(name, torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="r")))
        self.num_envs, self.size = num_envs, len(self.action)
        self.drawable = nn.Buffer(torch.from_numpy(np.load(folder / "drawable.npy").nonzero()[0]))  # places
        self.stack_offsets = nn.Buffer(torch.arange(1 - STACK_SIZE, 1), persistent=False)  # -3 .. 0
        self.window_offsets = nn.Buffer(torch.arange(n_step), persistent=False)  # 0 .. n-1
        self.gammas = nn.Buffer(torch.tensor([gamma**k for k in range(n_step + 1)]), persistent=False)  # (n+1,)

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement."""
        draw = torch.rand(batch_size, dtype=torch.float64, device=self.drawable.device)
        return self.gather(self.drawable[(draw * len(self.drawable)).long()])

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
        return Batch(obs, self.action[index], reward, discount, next_obs, index)

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


def open_dataset(args: Args, envs: "Environments") -> tuple[Path, int]:
    """Unpack the data once, into a folder named after what is used. Returns the folder and the data's `num_envs`."""
    root = Path(args.dataset_dir)
    source = root / "replay" if (root / "replay").is_dir() else root
    paths = sorted(source.glob("[0-9]" * 12 + ".npz"))[: args.max_shards]
    if not paths:
        raise ValueError(f"--dataset-dir {root}: no data is there, python dqn_softmoe.py --save-replay makes it")
    metadata = json.loads((source / "metadata.json").read_text())
    specs = (gym.spec(env_id.rpartition(":")[2]) for env_id in (metadata["env_id"], args.env_id))
    its_game, our_game = (spec.kwargs.get("game", spec.id) for spec in specs)
    if its_game != our_game or metadata["num_actions"] not in (None, envs.num_actions):
        raise ValueError(f"--env-id {args.env_id}: the data of {source} is of {metadata['env_id']}")
    used = [args.data_fraction, *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)]
    cache = Path(args.cache_dir or source.parent / "replay_cache") / hashlib.md5(json.dumps(used).encode()).hexdigest()
    if not cache.exists():
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")  # several runs may start at once
        temporary.mkdir(parents=True, exist_ok=True)  # a killed process of this number may have left it
        try:
            with stop_on_signals() as stop:
                unpack(paths, args.data_fraction, metadata["num_envs"], envs, temporary, stop)
                if not stop.is_set():
                    write_json(temporary / "checksums.json", checksums(temporary))
                    with contextlib.suppress(OSError):  # another run was faster
                        temporary.rename(cache)
            if stop.is_set():
                print("stopped by a signal before training; start the same command again")
                raise SystemExit(75)  # EX_TEMPFAIL of sysexits.h
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if checksums(cache) != json.loads((cache / "checksums.json").read_text()):
        raise ValueError(f"{cache} is damaged: remove it, and the data will be unpacked anew")
    return cache, metadata["num_envs"]


def checksums(folder: Path) -> dict[str, str]:
    """Return a checksum of each array. Later the arrays are only mapped, and damage would go unnoticed."""
    found = {}
    for path in sorted(folder.glob("*.npy")):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def unpack(paths: list[Path], fraction: float, num_envs: int, envs: "Environments", folder: Path, stop) -> None:
    """Write the first `fraction` of every segment into flat arrays, unless the event `stop` is set in between."""
    rows = [math.ceil(load_segment(path, ["action"])["action"].size // num_envs * fraction) for path in paths]
    size = sum(rows) * num_envs
    need, free = size * (math.prod(envs.frame_shape) + 8 + 4 + 3), shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"unpacked data takes {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {folder.parent}")
    arrays = {}
    for name, dtype in Dataset.FIELDS.items():
        shape = (size + 1, *envs.frame_shape) if name == "frames" else (size,)  # the last frame stays black
        arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    terminated, truncated, drawable = arrays["terminated"], arrays["truncated"], np.ones(size, bool)
    place, next_step, end = 0, 0, 0  # next place; agent step after the used part of a segment, and after all of it
    print(f"unpacking {size:,} steps, {need / 1e9:.2f} of {free / 1e9:.2f} GB free, into {folder.parent}", flush=True)
    for path, used in zip(tqdm(paths, desc="unpacking", unit="segment", **BAR), rows, strict=True):
        if stop.is_set():
            return
        segment = read_segment(path, num_envs, envs.frame_shape, envs.num_actions, end)
        first = int(path.stem)
        for name, array in arrays.items():
            values = segment[name][:, :used].swapaxes(0, 1)  # (used, N, ...)
            array[place : place + used * num_envs] = values.reshape(-1, *array.shape[1:])
        if first != next_step:  # a gap: the next stacks lack frames, and the steps before it are cut
            drawable[place : place + (STACK_SIZE - 1) * num_envs] = False
            truncated[place - num_envs : place] = ~terminated[place - num_envs : place]
        place, next_step, end = place + used * num_envs, first + used * num_envs, first + segment["action"].size
    truncated[-num_envs:] = ~terminated[-num_envs:]
    if not (drawable & ~truncated).any():
        raise ValueError("the data has no step to learn from")
    np.save(folder / "drawable.npy", drawable & ~truncated)


def load_segment(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Return the arrays of a segment. ValueError for any damage."""
    arrays = {}
    try:
        if not path.is_file():
            raise ValueError("it is not a file")  # opening a pipe would wait for its writer
        with zipfile.ZipFile(path) as archive:
            for name in names:
                with archive.open(f"{name}.npy") as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                    if file.read(1):  # the checksum is compared when the end of the array is read
                        raise ValueError(f"{name} is longer than its header says")
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return arrays


def read_segment(path: Path, num_envs: int, frame_shape: tuple, num_actions: int, end: int) -> dict[str, np.ndarray]:
    """Return the arrays (N, rows, ...) of a segment that begins at agent step `end` or later.

    Raises ValueError, with the file and the array, for anything that `ReplayLog` does not write.
    """
    arrays = load_segment(path, [*Dataset.FIELDS])
    if int(path.stem) < end or int(path.stem) % num_envs:
        raise ValueError(f"{path} must begin at a multiple of {num_envs} from {end} on")
    bounds = {"action": (0, num_actions - 1), "reward": (-1, 1), "terminated": (0, 1), "truncated": (0, 1)}
    for name, array in arrays.items():
        expected = (num_envs, *arrays["action"].shape[1:2], *(frame_shape if name == "frames" else ()))
        if array.dtype != Dataset.FIELDS[name] or array.shape != expected:
            raise ValueError(f"{path}: {name} is {array.dtype} {array.shape}, not {Dataset.FIELDS[name]} {expected}")
        low, high = bounds.get(name, (0, 255))
        numbers = array.view(np.uint8) if array.dtype == bool else array
        if name in bounds and not ((numbers >= low) & (numbers <= high)).all():  # false for a NaN
            raise ValueError(f"{path}: {name} has values that are not from {low} to {high}")
    if (arrays["terminated"] & arrays["truncated"]).any():
        raise ValueError(f"{path}: truncated has a row that is terminated, too")
    return arrays


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


def evaluate(q_network: QNetwork, args: Args, envs: Environments, seed: int, stop: threading.Event) -> list[float]:
    """Return the raw returns of whole games, played in parallel at `eval_epsilon`.

    Each environment plays its share of `eval_steps` and then finishes its last game. A game is cut after
    `MAX_EPISODE_STEPS`. A signal ends the evaluation. Training's random state does not change.
    """
    N, device = args.num_envs, next(q_network.parameters()).device
    obs = torch.zeros(N, STACK_SIZE, *envs.frame_shape, dtype=torch.uint8, device=device)
    choose = functools.partial(policy, q_network, obs, epsilon=args.eval_epsilon)
    choose = CudaGraph(choose) if device.type == "cuda" and args.cuda_graphs else choose
    frame, start, playing, returns = envs.reset(seed), np.ones(N, bool), np.ones(N, bool), []
    running, length, steps = np.zeros(N), np.zeros(N, int), 0
    q_network.eval()
    bar = tqdm(total=args.eval_steps, desc="evaluating", unit="step", unit_scale=True, leave=False, **BAR)
    with bar, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while playing.any() and not stop.is_set():
            envs.send(choose(frame, start).cpu().numpy())
            frame, reward, terminated, truncated, over = envs.recv()
            start, running, length, steps = terminated | truncated, running + reward, length + 1, steps + N
            over |= length == MAX_EPISODE_STEPS
            bar.update(int(playing.sum()))
            returns += running[over & playing].tolist()
            playing &= ~(over & (steps >= args.eval_steps))
            running[over], length[over] = 0, 0
    q_network.train()
    return returns


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
    """The state of a run: networks and optimizer. The data never changes."""

    PARTS = ("q_network", "target_network", "optimizer")

    def __init__(self, args: Args, envs: Environments):
        device = open_device(args)
        graphs = args.cuda_graphs and device.type == "cuda"
        compiled = args.compile and device.type == "cuda"
        self.args, self.device = args, device
        networks = (QNetwork(args, (STACK_SIZE, *envs.frame_shape), envs.num_actions).to(device) for _ in range(2))
        self.q_network, self.target_network = networks
        self.target_network.load_state_dict(self.q_network.state_dict())
        self.generators = [torch.default_generator, *(torch.cuda.default_generators if device.type == "cuda" else ())]
        adam = {"lr": args.learning_rate, "eps": args.adam_eps, "fused": True, "capturable": graphs}
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), **adam)
        with one_line_errors(Exception):  # damaged data can raise nearly anything
            folder, num_envs = open_dataset(args, envs)
        self.data = Dataset(folder, num_envs, n_step=args.n_step, gamma=args.gamma)
        need = sum(buffer.nbytes for buffer in self.data.buffers())
        on_gpu = device.type == "cuda" and args.replay_device == "auto"
        fits = on_gpu and need < 0.8 * torch.cuda.mem_get_info(device)[0]
        location = device if fits else torch.device("cpu")
        self.data.to(location)
        compile = functools.partial(torch.compile, dynamic=False, fullgraph=True, disable=not compiled)
        self.loss = compile(td_loss)
        if location == device:
            self.data.sample = compile(self.data.sample, options={"fallback_random": True})  # draws in float64
        if graphs:
            warnings.filterwarnings("ignore", ".*capturable=True.*")  # the warm-up runs without a graph on purpose
            name = "learn" if location == device else "update"  # data on the host cannot be in a graph
            setattr(self, name, CudaGraph(getattr(self, name)))

    def learn(self) -> tuple:
        """Draw a batch and update on it. Returns the metrics and the MoEOutput of the loss."""
        return self.update(*self.data.sample(self.args.batch_size))

    def update(self, *batch: Tensor) -> tuple:
        """One step of gradient descent on a `Batch`."""
        batch = Batch(*(x.to(self.device) for x in batch))
        self.optimizer.zero_grad()
        loss, metrics, output = self.loss(self.q_network, self.target_network, batch, self.args)
        loss.backward()
        self.optimizer.step()
        return metrics, output

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
    sizes = "total_updates iteration_updates eval_steps num_envs batch_size n_step target_network_frequency"
    args.check_range(f"{sizes} max_shards", 1)
    args.check_range("encoder_width impala_filter", 1, 1_000)
    args.check_range("seed checkpoint_every weights_every", 0)
    args.check_range("noop_max", 0, 1_000)
    args.check_range("sticky_actions eval_epsilon gamma", 0, 1)
    args.check_range("data_fraction", 1e-9, 1)
    args.check_range("cql_alpha", 0, 1e30)
    args.check_range("learning_rate adam_eps", 1e-30, 1e30)
    args.check_range("num_atoms", 2, 1_000)
    args.check_range("v_max", -1e30, 1e30)
    # Neighbouring atoms must be at least 1,000 float32 steps apart, or the projection would lose mass.
    resolved = 2**-13 * args.num_atoms * max(abs(args.v_min), abs(args.v_max), 1e-3)
    args.check_range("v_min", -1e30, args.v_max - resolved)
    args.check_effect("num_atoms v_min v_max double dueling", args.distributional, "--distributional")
    args.check_effect("impala_filter", args.encoder == "impala", "--encoder impala")
    args.check_layer()


def run_path(args: Args) -> Path:
    """Return the directory that --resume names, or one named after environment, agent, layer, experts, seed."""
    agent, env_id = "cql_c51" if args.distributional else "cql", re.sub("[/:]", "-", args.env_id)
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
    "total_updates dataset_dir cache_dir"
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


def to_floats(metrics: dict[str, Tensor], output: moe.MoEOutput | None) -> dict[str, float]:
    """Convert what an update returned to floats, by TensorBoard tag. Waits for the device once."""
    values = {f"losses/{name}": value for name, value in metrics.items()}
    values |= {f"moe/{name}": value for name, value in moe.routing_stats(output).items()} if output else {}
    return dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True)) if values else {}


class RunLog:
    """Writes metrics.csv and TensorBoard, and shows progress. Checkpoints keep the rows of the file."""

    HEADERS = {"metrics.csv": "iteration,updates,episodes,mean_return,td_loss,cql_loss,q_data,q_greedy,ups"}

    def __init__(self, run_dir: Path, args: Args, progress: dict):
        self.path = run_dir / "checkpoint.pt"
        self.rows = progress.get("rows", {name: [] for name in self.HEADERS})
        for name, rows in self.rows.items():
            (run_dir / name).write_text("".join(f"{row}\n" for row in (self.HEADERS[name], *rows)))
        rows = [row.split(",") for row in self.rows["metrics.csv"]]
        self.evaluated = int(rows[-1][1]) if rows else 0  # update of the last evaluation
        self.score = rows[-1][3] if rows else "-"
        update = progress["update"]
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=update + 1)
        self.started = update, time.monotonic()
        self.bar = tqdm(total=args.total_updates, initial=update, unit="update", unit_scale=True, **BAR)

    def write(self, name: str, *values) -> None:
        """Append a row to the file `name`."""
        self.rows[name].append(",".join(map(str, values)))
        with open(self.path.with_name(name), "a") as file:
            file.write(f"{self.rows[name][-1]}\n")

    def scalars(self, update: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, update)

    def update(self, update: int, values: dict[str, float]) -> None:
        """Log the last update and show its loss. Raises FloatingPointError if the loss is not finite."""
        self.scalars(update, values | {"charts/ups": self.ups(update)})
        loss = values["losses/loss"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at update {update}; {self.path} stays as it was")
        self.bar.set_postfix_str(f"return {self.score}, loss {loss:.4f}", refresh=False)

    def iteration(self, update: int, ups: float, values: dict[str, float], returns: list[float]) -> None:
        """Write the paper's score, the mean raw return of the evaluation, and the losses of the last update."""
        self.evaluated, self.score = update, f"{np.mean(returns):.4f}"
        losses = [f"{values[f'losses/{name}']:.6g}" for name in ("td_loss", "cql_loss", "q_data", "q_greedy")]
        number = len(self.rows["metrics.csv"])
        self.write("metrics.csv", number, update, len(returns), self.score, *losses, f"{ups:.1f}")
        self.scalars(update, {"charts/eval_return": np.mean(returns)})
        self.started = update, time.monotonic()  # the time of the evaluation does not count

    def ups(self, update: int) -> float:
        """Updates per second since the iteration began."""
        return (update - self.started[0]) / (time.monotonic() - self.started[1])


def describe(args: Args, run_dir: Path, envs: Environments, agent: Agent) -> str:
    """Return the text that says what runs, for the console."""
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in agent.q_network.named_children()}
    data, threads = agent.data, f"CPU, {torch.get_num_threads()} threads"
    components = [f"CQL+C51, {args.num_atoms} atoms" if args.distributional else "CQL", f"{args.n_step}-step"]
    components += [name for name in ("double", "dueling") if args.distributional and getattr(args, name)]
    return f"""{Path(__file__).name}: {args.env_id}, seed {args.seed}
  data         {len(data.drawable):,} transitions of {args.dataset_dir}
               {data.frames.nbytes / 1e9:.2f} GB, {"on the GPU" if data.frames.is_cuda else "mapped from the disk"}
  evaluation   {args.num_envs} in parallel, {envs.num_actions} actions, {STACK_SIZE} frames of {envs.frame_shape}
  network      {args.encoder}, {args.layer}, {args.num_experts} x {args.expert_hidden_dim} hidden units
  parameters   {sum(sizes.values()):,} = {" + ".join(f"{name} {size:,}" for name, size in sizes.items() if size)}
  agent        {", ".join(components)}, alpha {args.cql_alpha:g}
  training     {args.total_updates:,} updates of {args.batch_size}
  device       {torch.cuda.get_device_name() if agent.device.type == "cuda" else threads}
  run          {run_dir}"""


# ------------------------------------------------------------------------------------------------------- training
def due(every: int, update: int, args: Args) -> bool:
    """Whether an update is a multiple of `every` or the last one. Never if `every` is 0."""
    return every > 0 and (update % every == 0 or update == args.total_updates)


def checkpoint(agent: Agent, run_dir: Path, log: RunLog, progress: dict) -> bool:
    """Save. Returns False, after a warning, if the file cannot be written."""
    try:
        agent.save(run_dir / "checkpoint.pt", progress | {"rows": log.rows})
    except OSError as error:
        tqdm.write(f"warning: the last good checkpoint stays, not one of {progress['update']}: {error}", sys.stderr)
        return False
    log.tensorboard.flush()
    return True


def main(args: Args) -> None:
    with one_line_errors(OSError, ValueError, RuntimeError, ImportError, gym.error.Error):
        check_args(args)
        torch.manual_seed(args.seed)
        envs = Environments(args, args.num_envs)
        run_dir, config, lock = open_run(args)  # the lock is released when this function ends
        if args.resume == "auto" and config["finished"] >= args.total_updates:
            print(f"{run_dir} is finished")
            return
        agent = Agent(args, envs)
        transitions = len(agent.data.drawable)
        progress = {"update": 0, "metrics": {}, "transitions": transitions}
        if (run_dir / "checkpoint.pt").exists():
            with one_line_errors(Exception):  # a damaged file can raise nearly anything
                progress = agent.load(run_dir / "checkpoint.pt")
        elif config["finished"] or args.resume not in (None, "auto"):
            raise ValueError(f"--resume {args.resume}: {run_dir} has no checkpoint to continue from")
        if progress["update"] > args.total_updates:
            raise ValueError(f"--total-updates {args.total_updates}: the run has done {progress['update']} already")
        if transitions != progress["transitions"]:
            raise ValueError(f"--resume: {progress['transitions']:,} transitions were in the data, {transitions:,} are")
        write_json(run_dir / "config.json", config | {"finished": 0})
        print(describe(args, run_dir, envs, agent), flush=True)
        if args.weights_every:
            (run_dir / "weights").mkdir(exist_ok=True)
        log = RunLog(run_dir, args, progress)

    saved, update, metrics, output = True, progress["update"], progress["metrics"], None
    with one_line_errors(OSError, FloatingPointError), log.bar, log.tensorboard, stop_on_signals() as stop:
        try:
            while not stop.is_set():
                if due(args.iteration_updates, update, args) and update > log.evaluated:
                    ups, seed = log.ups(update), reset_seed(args.seed, update, evaluation=True)
                    returns = evaluate(agent.q_network, args, envs, seed, stop)
                    if stop.is_set():
                        break  # the resumed run repeats this evaluation
                    log.iteration(update, ups, to_floats(metrics, output), returns)
                    saved = False
                if update >= args.total_updates:
                    break
                if due(args.checkpoint_every, update, args) and not saved:
                    saved = checkpoint(agent, run_dir, log, progress)
                metrics, output = agent.learn()
                update += 1
                saved = False
                progress |= {"update": update, "metrics": metrics}
                if update % args.target_network_frequency == 0:
                    agent.update_target()
                if due(LOG_EVERY, update, args):
                    log.update(update, to_floats(metrics, output))
                if due(args.weights_every, update, args):
                    write_weights(run_dir / "weights" / f"{update}.pt", agent.q_network)
                log.bar.update()
        except OSError:  # a full disk or a closed pipe: the updates done so far are not lost
            checkpoint(agent, run_dir, log, progress)
            raise
        if not saved:
            saved = checkpoint(agent, run_dir, log, progress)
        log.bar.close()
        if not stop.is_set():
            write_weights(run_dir / "weights.pt", agent.q_network)
        print(f"{update:,} updates done, in {run_dir}")
        if not saved:
            raise SystemExit(1)
        if stop.is_set():
            print(f"stopped by a signal; continue with: python {shlex.join([sys.argv[0], '--resume', str(run_dir)])}")
            raise SystemExit(75)  # EX_TEMPFAIL of sysexits.h
        write_json(run_dir / "config.json", config | {"finished": update})
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
