"""Convert logged transitions between the published DQN Replay Dataset and the segments of `--save-replay`.

    python scripts/convert_dqn_replay.py data/Breakout/1 data/breakout_segments  # for cql_softmoe.py
    python scripts/convert_dqn_replay.py runs/<run>/replay exported/Breakout/1  # for readers of the published files

The layout of SOURCE decides the direction. Damaged data gives a one-line error. TARGET is complete or does not exist.

Published layout (Agarwal et al., 2020): `replay_logs/` has six gzipped files for each suffix 0, 1, ...: observation,
action, reward and terminal with a row per agent step, add_count and invalid_range. An episode begins with three black
rows of padding, which are not steps. Rows from `add_count % length` on are invalid. In the published data this is one
row, the step between two files, so no episode continues in the next file. The file `episode_end` (see below) marks
padding. Without it, a row is called blank if it is black and not terminal and its action and reward are 0. The blank
ones of the three rows after a terminal row are padding, and so are the first three rows of a run of blank rows. A run
has at least three rows, except at the start and at the end of a file.

Segments: `<first agent step>.npz` and metadata.json, as dqn_softmoe.py writes them. The frame after a truncated row is
not stored: the row is not a transition, but the rows before it bootstrap from its frame. The last row before a gap in
the step numbers counts as truncated, and so does the last row of the log. After a gap the frames before the first three
rows are unknown: these rows are only parts of later stacks. A published episode without padding gets a gap before it.

Shards written here have a seventh file, `episode_end`: 1 is the last step of an episode that terminated, 2 of one that
was truncated, 0 any other step, 3 any other row. A truncated row becomes a 3, and the row before it, whose next frame
it has, a 2. `terminal` is 1 in both and where `episode_end` is 1, so readers of the six files never cross episodes.
"""

import contextlib
import gzip
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql_softmoe

MAX_ACTIONS = 2**31  # if the number of actions is unknown
COLUMNS = {"action": "int32", "reward": "float32", "terminal": "uint8", "episode_end": "uint8"}
PUBLISHED = {"observation": "uint8"} | COLUMNS
SEGMENT = {"frames": "uint8", "action": "int64", "reward": "float32", "terminated": "bool", "truncated": "bool"}
PADDING = 3  # black rows before an episode, for Dopamine's stacks of 4 frames
SHARD_ROWS = 1_000_000  # largest number of rows in a published shard, unless a single episode is longer
SEGMENT_ROWS = 50_000  # largest number of rows in a segment: 350 MB before compression
CHUNK_ROWS = 2_000  # rows per read when looking for black frames
LEVEL = 6  # compression level, as in np.savez_compressed
MARGIN = 1.25  # bound on the size TARGET / SOURCE; level 6 takes 1.09 to 1.19 times as much as level 9 on three games


@tyro.conf.configure(tyro.conf.Positional)
@dataclass
class Args:
    source: Annotated[Path, tyro.conf.arg(metavar="SOURCE")]  # folder of logged transitions, or a folder above it
    target: Annotated[Path, tyro.conf.arg(metavar="TARGET")]  # folder to write, new or empty


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn any error into a ValueError that names `what`. Damaged data can raise nearly anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot read {what}: {type(error).__name__}: {error}") from error


def find_log(source: Path) -> tuple[Path, bool]:
    """Return the folder of the only log in `source` or up to four levels below, and whether its layout is published."""
    source, found = Path(os.path.abspath(source)), {}
    for pattern, depth in itertools.product(("*_ckpt.*.gz", "*.npz"), range(5)):
        for path in source.glob("*/" * depth + pattern):
            found[path.parent.resolve(), pattern] = path.parent
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found.values())))
        raise ValueError(f"{source} has {len(found)} logs (*_ckpt.*.gz or *.npz files), not one: {names or 'none'}")
    [((resolved, pattern), folder)] = found.items()
    # A link to a folder above the log may be named after the game, but a link to the log itself is not.
    return (folder if folder.name == "replay_logs" else resolved), pattern != "*.npz"


def read_metadata(path: Path) -> dict:
    with reading(path):
        metadata = json.loads(path.read_text())
        num_actions = metadata["num_actions"]
        return metadata | {"env_id": str(metadata["env_id"]), "num_actions": num_actions and int(num_actions)}


def count_actions(env_id: str) -> int | None:
    """Return the number of actions of an Atari game, read from its ROM, or None if there is no such game."""
    gym.register_envs(ale_py)
    if env_id not in gym.registry:
        return None
    ale = ale_py.ALEInterface()
    ale.loadROM(ale_py.roms.get_rom_path(gym.spec(env_id).kwargs["game"]))
    return len(ale.getMinimalActionSet())


def check_rows(action: np.ndarray, reward: np.ndarray, num_actions: int) -> None:
    """Raise ValueError for actions that are not from 0 to `num_actions` - 1 and for rewards that are not clipped."""
    if action.min(initial=0) < 0 or action.max(initial=0) >= num_actions:
        raise ValueError(f"there are actions {action.min()} to {action.max()}, not 0 to {num_actions - 1}")
    if not (np.abs(reward) <= 1).all():  # false for NaN, too
        raise ValueError("a reward is not from -1 to 1")


# ------------------------------------------------------------------------------------------- published -> segments
class Shard(NamedTuple):
    suffix: int
    files: dict[str, Path]  # by name of the array
    shape: tuple[int, int, int]  # length, height and width of `observation`
    rows: int  # number of valid rows


def find_shards(folder: Path) -> list[Shard]:
    """Return the shards that have all files that are read, in the order of their suffixes. Some may be missing."""
    suffixes, shards = {}, []
    for path in sorted(folder.iterdir()):
        if match := re.fullmatch(r"(?:\$store\$_)?(\w+)_ckpt\.(\d+)\.gz", path.name):
            files = suffixes.setdefault(int(match[2]), {})
            if match[1] in files or not path.is_file():  # reading a pipe would block
                raise ValueError(f"{path} is not a file, or suffix {int(match[2])} has it twice")
            files[match[1]] = path
    for suffix, files in sorted(suffixes.items()):
        if missing := {*PUBLISHED, "add_count"} - {*files, "episode_end"}:
            print(f"warning: suffix {suffix} lacks {', '.join(sorted(missing))} and is left out", file=sys.stderr)
            continue
        with reading(files["observation"]), gzip.open(files["observation"]) as file:
            np.lib.format.read_magic(file)
            length, height, width = shape = np.lib.format.read_array_header_1_0(file)[0]
        with reading(files["add_count"]), gzip.open(files["add_count"]) as file:
            count = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1) or count.shape != () or count.dtype.kind not in "iu" or count < 0:
                raise ValueError(f"the count is {count.dtype} {count.shape}, not an integer from 0 on")
            # The shard is a ring buffer, to which `count` rows were added. The rows after them are older or unused.
            rows = int(count) if count <= length else (int(count) % length or length)
        if rows:
            shards.append(Shard(suffix, files, shape, rows))
    if len({shard.shape[1:] for shard in shards}) != 1:
        raise ValueError(f"{folder} has frames of several sizes" if shards else f"{folder} has no complete shard")
    return shards


def read_rows(shard: Shard, name: str, counts: list[int]) -> Iterator[np.ndarray]:
    """Yield `counts[0]` rows of an array, then `counts[1]` rows, and so on. Verifies the checksum at the file's end."""
    with reading(shard.files[name]), gzip.open(shard.files[name]) as file:
        wanted = (shard.shape if name == "observation" else shard.shape[:1]), False, np.dtype(PUBLISHED[name])
        np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0(file)  # shape, whether in Fortran order, dtype
        if header != wanted:
            raise ValueError(f"the array is {header}, not {wanted}")
        (length, *shape), _, dtype = wanted
        size = math.prod(shape) * dtype.itemsize
        for count in counts:
            yield np.frombuffer(file.read(count * size), dtype).reshape(count, *shape)
        rest = sum(len(block) for block in iter(lambda: file.read(2**20), b""))
        if rest != (length - sum(counts)) * size:
            raise ValueError(f"the number of rows is not {length}, as the header says")


def label(rows: dict[str, np.ndarray], black: np.ndarray) -> dict[str, np.ndarray]:
    """Return which rows are steps, which of them are terminated or truncated, and which follow a gap: (rows,) bool."""
    terminal = rows["terminal"] != 0
    if "episode_end" in rows:
        end = rows["episode_end"]
        if end.max() > 3:
            raise ValueError(f"episode_end has the value {end.max()}, which is above 3")
        unpadded = (end == 3) & ~black & ~terminal  # a terminal row has the frame after the last step
        step, terminated, cut = (end != 3) | unpadded, end == 1, end == 2
    else:
        blank = black & (rows["action"] == 0) & (rows["reward"] == 0) & ~terminal  # looks like padding
        later = np.append(blank, [True] * PADDING)  # a run may continue after the end of the file
        opens = blank & later[1:-2] & later[2:-1] & ~np.append(False, blank[:-1])
        opens[0] = blank[0]  # or may have begun before its start
        padding, after_terminal = opens.copy(), np.zeros_like(blank)
        for k in range(1, PADDING):  # the rest of a run is part of the game, whose frames may be black
            padding[k:] |= opens[:-k] & blank[k:]
        for k in range(1, PADDING + 1):
            after_terminal[k:] |= terminal[:-k]
        unpadded = after_terminal & ~blank & ~terminal
        step, terminated, cut = unpadded | ~(padding | after_terminal), terminal, np.zeros_like(blank)
    after_gap = unpadded & ~np.append(False, unpadded[:-1])
    after_gap[0] = step[0]
    truncated = step & ~terminated & (cut | ~np.append(step[1:], False))
    return {"step": step, "terminated": step & terminated, "truncated": truncated, "after_gap": after_gap}


def read_steps(shard: Shard, num_actions: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return the indices of the steps, which rows follow a gap, and all arrays of a segment but the frames, (rows,)."""
    rows = {name: np.concatenate([*read_rows(shard, name, [shard.rows])]) for name in COLUMNS if name in shard.files}
    chunks = np.diff([*range(0, shard.rows, CHUNK_ROWS), shard.rows])
    black = [~frames.any(axis=(1, 2)) for frames in read_rows(shard, "observation", chunks)]
    with reading(f"suffix {shard.suffix}"):
        rows |= label(rows, np.concatenate(black))
        steps = np.flatnonzero(rows["step"])
        check_rows(rows["action"][steps], rows["reward"][steps], num_actions)
    columns = {name: rows[name].astype(dtype) for name, dtype in SEGMENT.items() if name in rows}
    return steps, rows["after_gap"], columns


def to_segments(folder: Path, target: Path, bar: tqdm) -> dict:
    """Write segments to `target` and return their metadata."""
    shards, path = find_shards(folder), folder.parent / "metadata.json"
    if path.exists():
        metadata = read_metadata(path)
    else:
        env_id = f"{folder.parent.parent.name}NoFrameskip-v4"
        metadata = {"env_id": env_id, "num_actions": count_actions(env_id)}
        print(f"warning: there is no {path}; assuming {env_id}, ROM and version unknown", file=sys.stderr)
    first, next_suffix = 0, 0
    bar.reset(total=sum(shard.rows * math.prod(shard.shape[1:]) for shard in shards))
    for shard in shards:
        steps, after_gap, columns = read_steps(shard, metadata["num_actions"] or MAX_ACTIONS)
        cuts = sorted({*range(SEGMENT_ROWS, len(steps), SEGMENT_ROWS), *np.flatnonzero(after_gap[steps])} - {0})
        parts = [part for part in np.split(steps, cuts) if len(part)]
        counts = np.diff([0, *(part[-1] + 1 for part in parts)])
        first += (shard.suffix - next_suffix) * shard.shape[0]
        next_suffix = shard.suffix + 1
        if first + len(steps) >= 10**12:
            raise ValueError(f"suffix {shard.suffix} is too large: agent steps have twelve digits")
        # The frames are unpacked again, because all rows must be read before it is known which ones are steps.
        for part, frames in zip(parts, read_rows(shard, "observation", counts), strict=True):
            first += int(after_gap[part[0]])
            arrays = {"frames": frames[None, part - part[-1] - 1]}  # `frames` ends at the last row of `part`
            arrays |= {name: column[None, part] for name, column in columns.items()}
            np.savez_compressed(target / f"{first:012d}.npz", **arrays)
            first += len(part)
            bar.update(frames.nbytes)
            del frames, arrays  # frees 350 MB each before the next read
    if not any(target.iterdir()):
        raise ValueError(f"{folder} has no steps")
    kept = {name: metadata.get(name) for name in ("env_id", "num_actions", "ale_py", "rom_md5")}
    return kept | {"num_envs": 1, "args": metadata.get("args") or {}}


# ------------------------------------------------------------------------------------------- segments -> published
def read_episodes(paths: list[Path], num_envs: int, frame_shape: tuple, num_actions: int, bar: tqdm) -> Iterator[tuple]:
    """Yield the episodes of all environments in the order in which they end, as (parts, terminated, after_gap).

    A part is (frames, actions, rewards). Its frames are gzipped, so that unfinished episodes take little memory.
    """
    bar.reset(total=sum(path.stat().st_size for path in paths))
    running, after_gap, next_first = [[] for _ in range(num_envs)], [False] * num_envs, 0
    for path in paths:
        first, segment = int(path.stem), cql_softmoe.read_segment(path, num_envs, frame_shape, num_actions, next_first)
        rows = segment["action"].shape[1]
        if first > next_first:  # the rest of the running episodes is missing
            yield from zip(running, [False] * num_envs, after_gap, strict=True)
            running, after_gap = [[] for _ in range(num_envs)], [True] * num_envs
        ended = segment["terminated"] | segment["truncated"]  # (N, rows)
        for env, (frames, action, reward, terminated, _) in enumerate(zip(*segment.values(), strict=True)):
            for start, stop in itertools.pairwise([0, *(np.flatnonzero(ended[env]) + 1), rows]):
                if start < stop:
                    packed = gzip.compress(frames[start:stop], LEVEL, mtime=0)
                    running[env].append((packed, action[start:stop], reward[start:stop]))
                if ended[env, start:stop].any():
                    yield running[env], bool(terminated[stop - 1]), after_gap[env]
                    running[env], after_gap[env] = [], False
        next_first = first + num_envs * rows
        bar.update(path.stat().st_size)
    yield from zip(running, [False] * num_envs, after_gap, strict=True)


class ShardWriter:
    """Writes episodes as shards. Frames are written at once, so that those of a whole shard are never in memory."""

    def __init__(self, folder: Path, frame_shape: tuple[int, ...]):
        self.folder, self.frame_shape, self.frames = folder, frame_shape, folder / "frames"
        self.black = gzip.compress(bytes(math.prod(frame_shape)), LEVEL, mtime=0)
        self.suffix, self.rows, self.episodes = 0, 0, []  # of the current shard
        folder.mkdir()

    def add(self, parts: list[tuple], terminated: bool, after_gap: bool) -> None:
        """Append an episode, unless it has no transition. After a gap its first 3 rows take the padding's place."""
        start = 0 if after_gap else PADDING
        count = start + sum(len(action) for _, action, _ in parts)
        last = count - 1 if terminated else count - 2  # row of the last transition; a truncated row is not one
        if last < PADDING:
            return
        if self.rows and self.rows + count + 1 > SHARD_ROWS:
            self.finish()
        frames, action, reward = zip(*parts, strict=True)
        with open(self.frames, "ab") as file:
            file.writelines([*[self.black] * start, *frames])
        rows = {name: np.zeros(count, dtype) for name, dtype in COLUMNS.items()}
        rows["action"][start:], rows["reward"][start:] = np.concatenate(action), np.concatenate(reward)
        rows["terminal"][last:], rows["episode_end"][:PADDING] = 1, 3
        rows["episode_end"][last:] = [1] if terminated else [2, 3]
        self.episodes.append(rows)
        self.rows += count

    def finish(self) -> None:
        """Write the frames with a header, which needs their number, and the other arrays. The last row is invalid."""
        n, end = self.rows, f"_ckpt.{self.suffix}.gz"
        path, header = self.folder / f"$store$_observation{end}", {"descr": "|u1", "fortran_order": False}
        with gzip.GzipFile(path, "wb", LEVEL, mtime=0) as file:
            np.lib.format.write_array_header_1_0(file, header | {"shape": (n + 1, *self.frame_shape)})
        with open(path, "ab") as file, open(self.frames, "rb") as frames:  # gzip files may be concatenated
            shutil.copyfileobj(frames, file)
            file.write(self.black)
        self.frames.unlink()
        arrays = {"add_count": np.array(n), "invalid_range": np.array([n - 1, n, 0, 1, 2])}
        for name, dtype in COLUMNS.items():
            arrays[f"$store$_{name}"] = np.concatenate([*(rows[name] for rows in self.episodes), np.zeros(1, dtype)])
        for name, array in arrays.items():
            with gzip.GzipFile(self.folder / f"{name}{end}", "wb", LEVEL, mtime=0) as file:
                np.save(file, array)
        self.suffix, self.rows, self.episodes = self.suffix + 1, 0, []


def to_published(folder: Path, target: Path, bar: tqdm) -> dict:
    """Write shards to `target` and return their metadata."""
    metadata, paths = read_metadata(folder / "metadata.json"), sorted(folder.glob("*.npz"))
    num_envs, _, *frame_shape = cql_softmoe.load_segment(paths[0], ["frames"])["frames"].shape
    writer = ShardWriter(target / "replay_logs", frame_shape)
    for episode in read_episodes(paths, num_envs, tuple(frame_shape), metadata["num_actions"] or MAX_ACTIONS, bar):
        writer.add(*episode)
    if not (writer.rows or writer.suffix):
        raise ValueError(f"{folder} has no transitions")
    writer.finish()
    return metadata


# -------------------------------------------------------------------------------------------------------- running
def stop(*_) -> None:
    raise KeyboardInterrupt("stopped by a signal")


def main(args: Args) -> None:
    folder, published = find_log(args.source)
    target = args.target.resolve()
    if target.is_mount() or target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists: TARGET must be a new or empty folder and not a mount point")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    need = MARGIN * sum(path.stat().st_size for path in folder.glob("*.gz" if published else "*.npz")) / 1e9
    try:
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free / 1e9
        print(f"{folder} -> {target}: at most {need:.2f} GB, {MARGIN} times the source; {free:.2f} GB free", flush=True)
        if need > free:
            raise ValueError(f"{target} may take {need:.2f} GB, but only {free:.2f} GB are free")
        with tqdm(unit="B", unit_scale=True, **cql_softmoe.BAR) as bar:
            metadata = (to_segments if published else to_published)(folder, temporary, bar) | {"source": str(folder)}
        (temporary / "metadata.json").write_text(f"{json.dumps(metadata, indent=2)}\n")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    quiet = getattr(signal, "SIGPIPE", signal.SIGTERM)  # Windows has none
    old = signal.signal(quiet, signal.SIG_DFL)  # so that `--help | head` ends silently
    args = tyro.cli(Args, description=__doc__)
    signal.signal(quiet, old)
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        with cql_softmoe.one_line_errors(Exception):
            main(args)
    except KeyboardInterrupt as error:
        print(f"error: KeyboardInterrupt: {error}", file=sys.stderr)
        raise SystemExit(2) from error
