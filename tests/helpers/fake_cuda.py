"""Runs acting, storing and learning on fake "cuda" tensors, to find mixed devices and waits without a GPU.

    python tests/helpers/fake_cuda.py FOLDER        # writes its files to FOLDER and prints one line of JSON per case

PyTorch's fake tensors have shapes, dtypes and devices, but no values. Code that mixes devices or needs a value raises.
`Watch` counts the operations on the device and lists the transfers between it and the host. A CPU build has no device
guard for CUDA, so a library registers PyTorch's fake guard and reports one GPU. It is loaded before torch is imported.
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

LIBRARY = r"""
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


def load_library(folder: Path) -> None:
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    source, library = folder / "fake_cuda.cpp", folder / "fake_cuda.so"
    source.write_text(LIBRARY)
    command = ["g++", "-std=c++20", "-w", "-shared", "-fPIC", f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
    command += [str(source), "-o", str(library), "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library))


if __name__ == "__main__":
    load_library(Path(sys.argv[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

COPIES = ("_to_copy", "copy_", "copy")
FREE = ("detach", "empty", "empty_strided", "empty_like", "new_empty", "_unsafe_view")  # launch no kernel


class Watch(TorchDispatchMode):
    """Counts the operations that launch kernels on the device, and lists the transfers between it and the host."""

    def __init__(self):
        super().__init__()
        self.launched, self.passed = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.namespace == "prim":  # a query of a fake tensor's device
            return result
        inputs, outputs = (  # types of their devices
            [x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
            for tree in ((args, kwargs), result)
        )
        name = func._schema.name.split("::")[1]
        if name in COPIES:
            source, target = (inputs[-1], inputs[0]) if name != "_to_copy" else (inputs[0], outputs[0])
            if source != target:
                self.passed.append(f"{name} from {source} to {target}")
        elif name.startswith("lift") or {"cpu", "cuda"} <= set(inputs):
            self.passed.append(f"{name} reads the host's memory")
        views = any(returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns)
        if "cuda" in (outputs or inputs) and not views and name not in FREE:
            self.launched += 1
        return result


def cases() -> list[tuple[str, dict]]:
    """Return the script and the settings of every case."""
    layers = [{"layer": layer} for layer in ("softmoe", "top1moe", "dense")]
    dqn = [{"layer": "top1moe", "load_balancing": "importance+load"}, {"encoder": "impala"}, {"normalize_router": True}]
    dqn += [{"tokenization": name} for name in ("PerFeat", "PerPatch")]
    dqn += [{"learned_phi": False, "replay_device": "cpu"}]
    rainbow = [{"prioritized": False}, {"noisy": False, "double": False, "dueling": False}, {"replay_device": "cpu"}]
    found = [("dqn_softmoe", given) for given in layers + dqn]
    found += [("rainbow_softmoe", given) for given in layers + rainbow]
    found += [("der_softmoe", {"augment": augment}) for augment in (True, False)]
    return found + [("cql_softmoe", {"distributional": c51}) for c51 in (True, False)]


def move(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Move a module to the fake device in place, as `.to("cuda")` does. Its values are lost."""
    for part in module.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = value if value is None else torch.nn.Parameter(mode.from_tensor(value).to("cuda"))
        part._buffers |= {name: mode.from_tensor(value).to("cuda") for name, value in part._buffers.items()}


def measure(script, settings: dict) -> dict:
    """Return the number of launches and the list of transfers of `act`, `observe` and `learn`."""
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
        agent.learn()  # creates Adam's state
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


def plant_fault(script, fault: str) -> None:
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
        plant_fault(script, fault)
        try:
            print(json.dumps({"case": fault, **measure(script, {})}))
        except RuntimeError as error:  # mixed devices, or a value that is needed
            print(json.dumps({"case": fault, "learn": {"passed": [f"{type(error).__name__}: {error}"]}}))
