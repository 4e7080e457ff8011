"""Acting, storing and learning with "cuda" tensors that have no data: device mixes and hidden waits, without a GPU.

    python tests/helpers/fake_cuda.py FOLDER        # a folder for a compiled helper; prints one line of JSON per case

PyTorch's fake tensors have shapes, types and devices, but no values: what mixes devices raises, and so does what needs
a value. `Watch` counts operations on the device and notes copies between it and the host. A CPU build knows no device
guard for CUDA; the helper registers PyTorch's own fake one, and says that there is a GPU, before torch is imported.
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

HELPER = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>) }
namespace at {
struct Hooks : public CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
"""


def load_helper(folder: Path) -> None:
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    source, library = folder / "fake_cuda.cpp", folder / "fake_cuda.so"
    source.write_text(HELPER)
    command = ["g++", "-std=c++20", "-w", "-shared", "-fPIC", f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
    command += [str(source), "-o", str(library), "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library))


if __name__ == "__main__":
    load_helper(Path(sys.argv[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

COPIES = ("_to_copy", "copy_", "copy")
FREE = ("detach", "empty", "empty_strided", "empty_like", "new_empty", "_unsafe_view")  # launch nothing


class Watch(TorchDispatchMode):
    """Counts the operations that launch something on the device, and notes what passes between it and the host."""

    def __init__(self):
        super().__init__()
        self.launched, self.passed = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.namespace == "prim":  # a fake tensor is asked for its device
            return result
        given, made = (
            [x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
            for tree in ((args, kwargs), result)
        )
        name = func._schema.name.split("::")[1]
        if name in COPIES:
            source, target = (given[-1], given[0]) if name != "_to_copy" else (given[0], made[0])
            if source != target:
                self.passed.append(f"{name} from {source} to {target}")
        elif name.startswith("lift") or {"cpu", "cuda"} <= set(given):
            self.passed.append(f"{name} reads the host's memory")
        views = any(returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns)
        if "cuda" in (made or given) and not views and name not in FREE:
            self.launched += 1
        return result


def cases() -> list[tuple[str, dict]]:
    settings = [{"layer": layer} for layer in ("softmoe", "top1moe", "dense")]
    more = [
        {"layer": "top1moe", "load_balancing": "importance+load"},
        {"encoder": "impala"},
        {"normalize_router": True},
    ]
    more += [{"tokenization": name} for name in ("PerFeat", "PerPatch")]
    more += [{"learned_phi": False, "replay_device": "cpu"}]
    rainbow = [{"prioritized": False}, {"noisy": False, "double": False, "dueling": False}, {"replay_device": "cpu"}]
    found = [("dqn_softmoe", given) for given in settings + more]
    found += [("rainbow_softmoe", given) for given in settings + rainbow]
    found += [("der_softmoe", {"augment": augment}) for augment in (True, False)]
    return found + [("cql_softmoe", {"distributional": c51}) for c51 in (True, False)]


def move(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """What `.to("cuda")` does: values are gone."""
    for part in module.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = value if value is None else torch.nn.Parameter(mode.from_tensor(value).to("cuda"))
        part._buffers |= {name: mode.from_tensor(value).to("cuda") for name, value in part._buffers.items()}


def measure(script, settings: dict) -> dict:
    """What `act`, `observe` and `learn` launch, and what passes between device and host in them."""
    args, watch, found = script.Args(**{"encoder": "nature", "cuda": False} | settings), Watch(), {}
    agent = script.Agent(args, SimpleNamespace(frame_shape=(84, 84), num_actions=6))
    online = hasattr(agent, "act")
    flag, number = (torch.zeros(args.num_envs, dtype=dtype) for dtype in (torch.bool, torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, watch:
        for part in (agent.q_network, agent.target_network, agent.replay if online else agent.data):
            if args.replay_device == "auto" or hasattr(part, "encoder"):
                move(part, mode)
        agent.device, flag, number = torch.device("cuda"), flag.to("cuda"), number.to("cuda")
        agent.optimizer = torch.optim.Adam(agent.q_network.parameters(), fused=True, capturable=True)
        agent.learn()  # makes Adam's state
        calls = {"learn": agent.learn}
        if online:
            agent.obs, agent.action = agent.obs.to("cuda"), agent.action.to("cuda")
            calls["act"] = lambda: agent.act(agent.obs[:, 0], flag, number[0])
            calls["observe"] = lambda: agent.observe(number, flag, flag)
        for name, call in calls.items():
            watch.launched, watch.passed = 0, []
            call()
            found[name] = {"launched": watch.launched, "passed": watch.passed}
    return found


def plant(script, fault: str) -> None:
    later, td_loss = script.ReplayBuffer.later, script.td_loss
    if fault == "a host tensor":
        script.ReplayBuffer.later = lambda replay, *given: later(replay, *given) + torch.arange(1)
    if fault == "a wait":
        script.td_loss = lambda *given: (result := td_loss(*given), float(result[0]))[0]
    if fault == "a number from the host":
        script.td_loss = lambda *given: (td_loss(*given)[0] * torch.tensor(1.0), *td_loss(*given)[1:])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    folder = Path(sys.argv[1])
    for name, dtype in {"action": "int64", "reward": "float32", "terminated": "?", "truncated": "?"}.items():
        np.save(folder / f"{name}.npy", np.zeros(50, dtype))
    np.save(folder / "frames.npy", np.zeros((51, 84, 84), np.uint8))
    np.save(folder / "drawable.npy", np.ones(50, bool))
    for name, settings in cases():
        script = importlib.import_module(name)
        script.open_dataset = lambda args, envs: (folder, 1)
        print(json.dumps({"case": f"{name} {settings}", **measure(script, settings)}), flush=True)
    for fault in ("a host tensor", "a wait", "a number from the host"):
        script = importlib.reload(importlib.import_module("dqn_softmoe"))
        plant(script, fault)
        try:
            print(json.dumps({"case": fault, **measure(script, {})}))
        except RuntimeError as error:  # what mixes devices, or needs a value
            print(json.dumps({"case": fault, "learn": {"passed": [f"{type(error).__name__}: {error}"]}}))
