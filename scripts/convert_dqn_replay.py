"""Convert logged transitions: the published DQN Replay Dataset to segments of `--save-replay`, or the other way.

    python scripts/convert_dqn_replay.py data/Breakout/1 data/breakout_segments  # for cql_softmoe.py
    python scripts/convert_dqn_replay.py runs/<run>/replay exported/Breakout/1  # for readers of the published files

What SOURCE holds decides the direction. Damaged data ends in one line; TARGET is made whole or not at all.

Published (Agarwal et al., 2020): `replay_logs/` has gzipped arrays of suffix 0, 1, ..., a row per agent step. Three
black rows, no steps, open an episode. Rows from `add_count % length` on are junk: in the published data one row, the
step between two files, so no episode goes on in the next file. A row is padding if `episode_end` (below) says so. Where
that is not there, padding is what is black, with action and reward 0, in the three rows after a terminal one, and in
any run of such rows the first three; a run is three rows or longer, unless the file begins or ends in it.

Segments: `<first agent step>.npz` and metadata.json, as dqn_softmoe.py writes them. What follows a truncated row is not
there: it is no transition, but rows before it bootstrap from its frame. The last row before a hole in the numbers, or
of all, is one. After a hole the frames before the first three rows are not known: the rows are no transitions, only
part of later stacks. So are, when published, three rows that open an episode without padding: a hole is left before.

Shards made here have a seventh file, `episode_end`: 0 a step, 1 the last one of an episode that terminated, 2 of one
that was cut, 3 no step. A truncated row is a 3, and the row before it, whose next frame it has, a 2. `terminal` is 1 in
both, and where `episode_end` is 1, so readers of the six files never cross episodes.
"""

import contextlib
import gzip
import importlib
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
cql_softmoe = importlib.import_module("cql_softmoe")

MOST_ACTIONS = 2**31  # where their number is not known
COLUMNS = {"action": "int32", "reward": "float32", "terminal": "uint8", "episode_end": "uint8"}
PUBLISHED = {"observation": "uint8"} | COLUMNS
SEGMENT = {"frames": "uint8", "action": "int64", "reward": "float32", "terminated": "bool", "truncated": "bool"}
PADDING = 3  # black rows before an episode: Dopamine's stacks of 4 read them
SHARD_ROWS = 1_000_000  # rows of a published shard at most, unless a single episode is longer
SEGMENT_ROWS = 50_000  # rows of a segment at most: 350 MB before it is compressed
CHUNK_ROWS = 2_000  # rows that are unpacked at a time to look at them
LEVEL = 6  # of compression, as np.savez_compressed has it
MARGIN = 1.25  # what level 6 takes of what level 9 took: 1.09 to 1.19 on frames of Breakout, Pong and Seaquest
BAR = {"dynamic_ncols": True, "mininterval": 0.5 if sys.stderr.isatty() else 30.0}  # in a file a line every 30 s


@tyro.conf.configure(tyro.conf.Positional)
@dataclass
class Args:
    source: Annotated[Path, tyro.conf.arg(metavar="SOURCE")]  # folder of logged transitions, or a folder above it
    target: Annotated[Path, tyro.conf.arg(metavar="TARGET")]  # folder to make: it does not exist, or is empty


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """Damaged data can raise nearly anything: say where it is."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot read {what}: {type(error).__name__}: {error}") from error


def find_log(source: Path) -> tuple[Path, bool]:
    """The one folder of a log in `source` or up to four folders below, and whether it is of the published layout."""
    source, found = Path(os.path.abspath(source)), {}
    for pattern, depth in itertools.product(("*_ckpt.*.gz", "*.npz"), range(5)):
        for path in source.glob("*/" * depth + pattern):
            found[path.parent.resolve(), pattern] = path.parent
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found.values())))
        raise ValueError(f"{source} has {len(found)} logs (replay_logs, or segments *.npz), not one: {names or 'none'}")
    [((resolved, pattern), folder)] = found.items()
    # A link above it may have the game's name; one to it has not.
    return folder if folder.name == "replay_logs" else resolved, pattern != "*.npz"


def read_metadata(path: Path) -> dict:
    with reading(path):
        metadata = json.loads(path.read_text())
        num_actions = metadata["num_actions"]
        return metadata | {"env_id": str(metadata["env_id"]), "num_actions": num_actions and int(num_actions)}


def count_actions(env_id: str) -> int | None:
    """Actions of an Atari game, from its ROM; None where there is no such game."""
    gym.register_envs(ale_py)
    if env_id not in gym.registry:
        return None
    ale = ale_py.ALEInterface()
    ale.loadROM(ale_py.roms.get_rom_path(gym.spec(env_id).kwargs["game"]))
    return len(ale.getMinimalActionSet())


def check_rows(action: np.ndarray, reward: np.ndarray, num_actions: int) -> None:
    if action.min(initial=0) < 0 or action.max(initial=0) >= num_actions:
        raise ValueError(f"actions {action.min()} to {action.max()}, not 0 to {num_actions - 1}")
    if not (np.abs(reward) <= 1).all():  # nor where it is not a number
        raise ValueError("a reward is not clipped to -1 to 1")


# ------------------------------------------------------------------------------------------- published -> segments
class Shard(NamedTuple):
    suffix: int
    files: dict[str, Path]
    shape: tuple[int, int, int]  # of the observations
    rows: int  # that are not junk


def find_shards(folder: Path) -> list[Shard]:
    """The suffixes that have all six files; any may be missing between them."""
    suffixes, shards = {}, []
    for path in sorted(folder.iterdir()):
        if match := re.fullmatch(r"(?:\$store\$_)?(\w+)_ckpt\.(\d+)\.gz", path.name):
            files = suffixes.setdefault(int(match[2]), {})
            if match[1] in files or not path.is_file():  # a pipe would be waited for
                raise ValueError(f"{path} is no file, or suffix {int(match[2])} has it twice")
            files[match[1]] = path
    for suffix, files in sorted(suffixes.items()):
        if missing := {*PUBLISHED, "add_count"} - {*files, "episode_end"}:
            print(f"warning: suffix {suffix} lacks {', '.join(sorted(missing))}: it is left out", file=sys.stderr)
            continue
        with reading(files["observation"]), gzip.open(files["observation"]) as file:
            np.lib.format.read_magic(file)
            length, height, width = shape = np.lib.format.read_array_header_1_0(file)[0]
        with reading(files["add_count"]), gzip.open(files["add_count"]) as file:
            count = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1) or count.shape != () or count.dtype.kind not in "iu" or count < 0:
                raise ValueError(f"{count.dtype} {count.shape}, not one number")
            # Rows ever added to the ring that was saved; those after them in it are older, or were never written.
            rows = int(count) if count <= length else (int(count) % length or length)
        shards += [Shard(suffix, files, shape, rows)] if rows else []
    if len({shard.shape[1:] for shard in shards}) != 1:
        raise ValueError(f"{folder} has frames of several sizes" if shards else f"{folder} has no whole shard")
    return shards


def read_rows(shard: Shard, name: str, counts: list[int]) -> Iterator[np.ndarray]:
    """So many rows at a time from the first on; then the rest is unpacked too, because the checksum is at the end."""
    with reading(shard.files[name]), gzip.open(shard.files[name]) as file:
        wanted = shard.shape if name == "observation" else shard.shape[:1], False, np.dtype(PUBLISHED[name])
        np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0(file)  # shape, in Fortran's order or not, type
        if header != wanted:
            raise ValueError(f"an array {header}, not {wanted}")
        (length, *shape), _, dtype = wanted
        size = math.prod(shape) * dtype.itemsize
        for count in counts:
            yield np.frombuffer(file.read(count * size), dtype).reshape(count, *shape)
        if sum(map(len, iter(lambda: file.read(2**20), b""))) != (length - sum(counts)) * size:
            raise ValueError(f"not the {length} rows that its header says")


def label(rows: dict[str, np.ndarray], black: np.ndarray) -> dict[str, np.ndarray]:
    """Which rows are steps, which of them end an episode, and before which something is missing: (rows,) bool."""
    terminal = rows["terminal"] != 0
    if "episode_end" in rows:
        end = rows["episode_end"]
        if end.max() > 3:
            raise ValueError(f"episode_end has a {end.max()}")
        headless = (end == 3) & ~black & ~terminal  # a terminal one has the frame that follows a cut
        step, terminated, cut = (end != 3) | headless, end == 1, end == 2
    else:
        zero = black & (rows["action"] == 0) & (rows["reward"] == 0) & ~terminal
        later = np.append(zero, [True] * PADDING)  # the file's end may hide the rest of a run
        opens = zero & later[1:-2] & later[2:-1] & ~np.append(False, zero[:-1])
        opens[0] = zero[0]  # and its start what was before
        padding, after_terminal = opens.copy(), np.zeros_like(zero)
        for k in range(1, PADDING + 1):
            padding[k:] |= opens[:-k] & zero[k:] & (k < PADDING)  # no more: a game's own frames may be black
            after_terminal[k:] |= terminal[:-k]
        headless = after_terminal & ~zero & ~terminal
        step, terminated, cut = headless | ~(padding | after_terminal), terminal, np.zeros_like(zero)
    missing = headless & ~np.append(False, headless[:-1])
    missing[0] = step[0]
    truncated = step & ~terminated & (cut | ~np.append(step[1:], False))
    return {"step": step, "terminated": step & terminated, "truncated": truncated, "missing": missing}


def read_steps(shard: Shard, num_actions: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Where the steps are, before which rows something is missing, and all but the frames, named as in segments."""
    names = [name for name in COLUMNS if name in shard.files]
    rows = {name: np.concatenate([*read_rows(shard, name, [shard.rows])]) for name in names}
    chunks = np.diff([*range(0, shard.rows, CHUNK_ROWS), shard.rows])
    black = [~frames.any(axis=(1, 2)) for frames in read_rows(shard, "observation", chunks)]
    with reading(f"suffix {shard.suffix}"):
        rows |= label(rows, np.concatenate(black))
        steps = np.flatnonzero(rows["step"])
        check_rows(rows["action"][steps], rows["reward"][steps], num_actions)
    columns = {name: rows[name].astype(dtype) for name, dtype in SEGMENT.items() if name in rows}
    return steps, rows["missing"], columns


def to_segments(folder: Path, target: Path, bar: tqdm) -> dict:
    """Write the segments; returns their metadata."""
    shards, path = find_shards(folder), folder.parent / "metadata.json"
    env_id = f"{folder.parent.parent.name}NoFrameskip-v4"
    metadata = {"env_id": env_id, "num_actions": count_actions(env_id)}
    if path.exists():
        metadata = read_metadata(path)
    else:
        print(f"warning: no {path}: taken for {metadata['env_id']}, of unknown ROM and version", file=sys.stderr)
    first, next_suffix = 0, 0
    bar.reset(total=sum(shard.rows * math.prod(shard.shape[1:]) for shard in shards))
    for shard in shards:
        steps, missing, rows = read_steps(shard, metadata["num_actions"] or MOST_ACTIONS)
        cuts = sorted({*range(SEGMENT_ROWS, len(steps), SEGMENT_ROWS), *np.flatnonzero(missing[steps])} - {0})
        parts = [part for part in np.split(steps, cuts) if len(part)]
        counts = np.diff([0, *(part[-1] + 1 for part in parts)])
        first += (shard.suffix - next_suffix) * shard.shape[0]
        next_suffix = shard.suffix + 1
        if first + len(steps) >= 10**12:
            raise ValueError(f"suffix {shard.suffix} is too large: agent steps have twelve digits")
        # The frames are unpacked a second time: which rows are steps was not known before the last one.
        for part, frames in zip(parts, read_rows(shard, "observation", counts), strict=True):
            arrays = {"frames": frames[None, part - part[-1] - 1]} | {name: rows[name][None, part] for name in rows}
            first += int(missing[part[0]])
            np.savez_compressed(target / f"{first:012d}.npz", **arrays)
            first += len(part)
            bar.update(frames.nbytes)
            del frames, arrays  # 350 MB each, before the next ones are read
    if not any(target.iterdir()):
        raise ValueError(f"{folder} has no step")
    kept = {"env_id": None, "num_actions": None, "num_envs": 1, "ale_py": None, "rom_md5": None, "args": {}}
    return kept | {name: metadata[name] for name in kept if metadata.get(name) is not None}


# ------------------------------------------------------------------------------------------- segments -> published
def read_episodes(paths: list[Path], num_envs: int, frame_shape: tuple, num_actions: int, bar: tqdm) -> Iterator[tuple]:
    """Every environment's episodes, whole, in the order in which they end; if they terminated, if they begin in a hole.

    They are lists of parts: frames, actions, rewards. Frames are gzipped: episodes under way must take little memory.
    """
    bar.reset(total=sum(path.stat().st_size for path in paths))
    running, headless, next_first = [[] for _ in range(num_envs)], [False] * num_envs, 0
    for path in paths:
        first, segment = int(path.stem), cql_softmoe.read_segment(path, num_envs, frame_shape, num_actions, next_first)
        rows = segment["action"].shape[1]
        if first > next_first:  # the rest of the episodes under way is missing
            yield from zip(running, [False] * num_envs, headless, strict=True)
            running, headless = [[] for _ in range(num_envs)], [True] * num_envs
        ended = segment["terminated"] | segment["truncated"]  # (N, rows)
        for env, (frames, action, reward, terminated, _) in enumerate(zip(*segment.values(), strict=True)):
            for start, stop in itertools.pairwise([0, *(np.flatnonzero(ended[env]) + 1), rows]):
                if start < stop:
                    packed = gzip.compress(frames[start:stop], LEVEL, mtime=0)
                    running[env].append((packed, action[start:stop], reward[start:stop]))
                if ended[env, start:stop].any():
                    yield running[env], bool(terminated[stop - 1]), headless[env]
                    running[env], headless[env] = [], False
        next_first = first + num_envs * rows
        bar.update(path.stat().st_size)
    yield from zip(running, [False] * num_envs, headless, strict=True)


class ShardWriter:
    """Writes episodes as shards, their frames at once: a shard's are never in memory."""

    def __init__(self, folder: Path, frame_shape: tuple[int, ...]):
        self.folder, self.frame_shape, self.frames = folder, frame_shape, folder / "frames"
        self.black = gzip.compress(bytes(math.prod(frame_shape)), LEVEL, mtime=0)
        self.suffix, self.rows, self.episodes = 0, 0, []  # of the shard under way
        folder.mkdir()

    def add(self, parts: list[tuple], terminated: bool, headless: bool) -> None:
        """Append an episode, unless it has no transition: the last row of one that was cut is none.

        One that begins in a hole has no padding: its first three rows are where readers expect such.
        """
        start = 0 if headless else PADDING
        count = start + sum(len(action) for _, action, _ in parts)
        last = count - 1 if terminated else count - 2
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
        """Give the frames their header, now that their number is known, and write the other files; a row of junk."""
        n, end = self.rows, f"_ckpt.{self.suffix}.gz"
        path, header = self.folder / f"$store$_observation{end}", {"descr": "|u1", "fortran_order": False}
        with gzip.GzipFile(path, "wb", LEVEL, mtime=0) as file:
            np.lib.format.write_array_header_1_0(file, header | {"shape": (n + 1, *self.frame_shape)})
        with open(path, "ab") as file, open(self.frames, "rb") as frames:  # a file of many gzip members
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
    """Write the shards; returns their metadata."""
    metadata, paths = read_metadata(folder / "metadata.json"), sorted(folder.glob("*.npz"))
    num_envs, _, *frame_shape = cql_softmoe.load_segment(paths[0], ["frames"])["frames"].shape
    writer = ShardWriter(target / "replay_logs", frame_shape)
    num_actions = metadata["num_actions"] or MOST_ACTIONS
    for episode in read_episodes(paths, num_envs, tuple(frame_shape), num_actions, bar):
        writer.add(*episode)
    if not (writer.rows or writer.suffix):
        raise ValueError(f"{folder} has no transition")
    writer.finish()
    return metadata


# -------------------------------------------------------------------------------------------------------- running
def stop(*_) -> None:
    raise KeyboardInterrupt("stopped by a signal")


def main(args: Args) -> None:
    folder, published = find_log(args.source)
    target = args.target.resolve()
    if target.is_mount() or target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists: name a folder that does not, or is empty and no mount point")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    need = MARGIN * sum(path.stat().st_size for path in folder.glob("*.gz" if published else "*.npz")) / 1e9
    try:
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free / 1e9
        print(f"{folder} -> {target}: at most {need:.2f} GB, {MARGIN} times the source; {free:.2f} GB free", flush=True)
        if need > free:
            raise ValueError(f"{target} may take {need:.2f} GB, but {free:.2f} GB are free")
        with tqdm(unit="B", unit_scale=True, **BAR) as bar:
            metadata = (to_segments if published else to_published)(folder, temporary, bar) | {"source": str(folder)}
        (temporary / "metadata.json").write_text(f"{json.dumps(metadata, indent=2)}\n")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, stop)
    try:
        try:
            main(tyro.cli(Args, description=__doc__))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads standard output any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        print(f"error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
