"""Tests of the GPU path without a GPU.

With emulated CUDA graphs, graphed runs equal eager ones bit for bit. With fake tensors, nothing mixes devices or waits
for the device. torch.compile makes one graph of each function, once. All planted faults are found.
"""

import importlib
import json
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cuda_emulation import CaptureError, Graph, HazardError, emulated_cuda
from runs import HELPERS, ROOT, only_run, outcome, quick, same

sys.path.append(str(ROOT / "scripts"))
import evaluate

OFFLINE = {"total_updates": 90, "iteration_updates": 40, "eval_steps": 60, "num_envs": 3, "checkpoint_every": 30}
OFFLINE |= {"batch_size": 8}
SHORT = {"total_timesteps": 240, "learning_starts": 80, "checkpoint_every": 96, "epsilon_decay_steps": 60}
SHORT |= {"batch_size": 8}


def load_script(script: str, old: str = "", new: str = ""):
    """Return a copy of a script as a module, in which `new` replaces `old`."""
    text, copy = (ROOT / f"{script}.py").read_text(), types.ModuleType(f"{script}_copy")
    assert not old or text.count(old) == 1, f"{old!r} stands there {text.count(old)} times"
    sys.modules[copy.__name__] = copy  # dataclasses look the module up there
    copy.__file__ = str(ROOT / f"{script}.py")
    exec(compile(text.replace(old, new) if old else text, copy.__file__, "exec"), copy.__dict__)
    copy.LOG_EVERY = 20
    return copy


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    dqn = load_script("dqn_softmoe")
    dqn.main(dqn.Args(**quick(runs_dir=str(folder), save_replay=True, eval_episodes=0)))
    return only_run(folder)


def test_evaluate_captures_its_graph(data, capsys):
    said = []
    for cuda in (False, True):
        with emulated_cuda() if cuda else torch.enable_grad():
            evaluate.main(evaluate.Options(data, episodes=3, cuda=cuda))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and Graph.replays > 5


@pytest.fixture
def compare_graphed_with_eager(tmp_path, monkeypatch, data):
    """Return a function that runs and resumes a script, graphed and eagerly, and compares the outcomes."""
    scalars = []

    def add_scalar(_, name, value, step):
        if name not in ("charts/sps", "charts/ups"):
            scalars[-1].append((name, float(value), step))

    monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, "add_scalar", add_scalar)

    def compare(script, **settings):
        offline = "total_updates" in script.Args.__dataclass_fields__
        small = quick(**SHORT)
        if offline:
            small = {name: small[name] for name in ("env_id", "encoder", "num_experts", "expert_hidden_dim", "cuda")}
            small |= OFFLINE | {"dataset_dir": str(data)}
        if getattr(script.Args, "noisy", False) and settings.get("noisy", True):
            small.pop("epsilon_decay_steps", None)
        whole = script.Args(**small | {"target_network_frequency": 20, "compile": False} | settings)
        length = "total_updates" if offline else "total_timesteps"
        for cuda in (True, False):
            scalars.append([])
            args = replace(whole, cuda=cuda, runs_dir=str(tmp_path / str(cuda)))
            with emulated_cuda() if cuda else torch.enable_grad():
                script.main(replace(args, **{length: 60 if offline else 160}))
                script.main(replace(args, resume=str(only_run(args.runs_dir))))
            assert Graph.replays > 50, "nothing was captured"
        assert scalars[-2] == scalars[-1]
        eager, graphed = (outcome(only_run(tmp_path / str(cuda))) for cuda in (False, True))
        graphed["optimizer"]["param_groups"][0]["capturable"] = False
        assert [part for part in eager if not same(eager[part], graphed[part])] == []

    return compare


DRQ_EPS = {"distributional": False, "noisy": False, "prioritized": False, "augment": True}
CASES = [("dqn_softmoe", {"layer": "top1moe", "load_balancing": "importance+load"})]
CASES += [("dqn_softmoe", {"replay_ratio": 0.5, "save_replay": True}), ("dqn_softmoe", {"replay_device": "cpu"})]
CASES += [("dqn_softmoe", {"layer": "dense", "num_experts": 1, "num_envs": 1}), ("dqn_softmoe", {"learned_phi": False})]
CASES += [("rainbow_softmoe", {}), ("rainbow_softmoe", {"replay_device": "cpu"})]
CASES += [("rainbow_softmoe", {"prioritized": False, "noisy": False, "replay_device": "cpu"})]
CASES += [("der_softmoe", {"augment": True, "replay_ratio": 0.5}), ("cql_softmoe", {})]
CASES += [("der_softmoe", DRQ_EPS | {"target_network_frequency": 1})]
CASES += [("cql_softmoe", {"distributional": False}), ("cql_softmoe", {"replay_device": "cpu"})]


@pytest.mark.parametrize("script, settings", CASES)
def test_graphed_runs_equal_eager_ones(script, settings, compare_graphed_with_eager):
    compare_graphed_with_eager(load_script(script), **settings)


HOST = {"replay_device": "cpu", "replay_ratio": 0.5}
FAULTS = {  # text of dqn_softmoe.py, its replacement, arguments of the run
    "epsilon is a Python number": (
        "return self.action.copy_(self.policy(self.q_network, self.obs, frame, start, epsilon))",
        "self.calls = getattr(self, 'calls', 0) + 1\n"
        "        return self.action.copy_(self.policy(self.q_network, self.obs, frame, start, 1 / self.calls))",
    ),
    "epsilon waits for the device": (
        "return self.action.copy_(self.policy(self.q_network, self.obs, frame, start, epsilon))",
        "return self.action.copy_(self.policy(self.q_network, self.obs, frame, start, float(epsilon)))",
    ),
    "the target network gets new memory": (
        "torch._foreach_copy_([*self.target_network.parameters()], [*self.q_network.parameters()])",
        "self.target_network.load_state_dict("
        "{name: x.clone() for name, x in self.q_network.state_dict().items()}, assign=True)",
    ),
    "no warm-up: Adam's state is made in the capture": ("warmup: int = 10", "warmup: int = 0"),
    "the default stream": ("        torch.cuda.set_stream(torch.cuda.Stream())", "        pass"),
    "Adam is not capturable": ('"capturable": graphs}', '"capturable": False}'),
    "the replay's cursor is a Python number": (
        "place = self.cursor % self.rows * self.num_envs + self.env_offsets  # (N,)",
        "self.row = getattr(self, 'row', -1) + 1\n"
        "        place = self.row % self.rows * self.num_envs + self.env_offsets",
    ),
    "the update waits for the device": ("loss.backward()", "loss.backward(); loss.item()"),
    "the stack gets new memory": (
        "return obs.copy_(torch.cat([obs[:, 1:] * ~start[:, None, None, None], frame[:, None]], dim=1))",
        "obs.set_(torch.cat([obs[:, 1:] * ~start[:, None, None, None], frame[:, None]], dim=1)); return obs",
    ),
    "metrics are read after the next update": (
        "metrics, output = agent.learn()",
        "kept = [*locals().get('kept', []), agent.learn()]; metrics, output = kept[-2:][0]",
    ),
    "draws come from NumPy": (
        "torch.rand(batch_size, dtype=torch.float64, device=cumulative.device)",
        "torch.as_tensor(np.random.default_rng(0).random(batch_size))",
    ),
    "a captured call is not run": ("        self.graph.replay()\n", "        else:\n            self.graph.replay()\n"),
    "the pinned copy is not waited for": ("            self.copied.synchronize()", "            pass", HOST),
    "the pinned copy has no event": ("            self.copied.record()\n", "", HOST),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_finds(fault, compare_graphed_with_eager):
    old, new, *settings = FAULTS[fault]
    with pytest.raises((AssertionError, CaptureError, HazardError)) as error:
        compare_graphed_with_eager(load_script("dqn_softmoe", old, new), **dict(*settings))
    assert "stands there" not in str(error.value) and "nothing was captured" not in str(error.value)


def test_nothing_mixes_devices_or_waits(tmp_path):
    """fake_cuda.py counts the operations that each function launches, and lists what passes between host and device.

    Nothing may pass if the replay is on the device, and only rows and batches if it is on the host. In three cases
    with planted faults something must pass.
    """
    if torch.backends.cuda.is_built() or shutil.which("g++") is None:
        pytest.skip("needs a CPU build of PyTorch, and g++ for a device guard that it lacks")
    command = [sys.executable, HELPERS / "fake_cuda.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fake = {result.pop("case"): result for result in map(json.loads, done.stdout.splitlines())}
    device = {name: result for name, result in fake.items() if name.count("softmoe {") and "cpu" not in name}
    assert len(device) > 15
    for name, result in device.items():
        assert all(part["launched"] > 10 and part["passed"] == [] for part in result.values()), f"{name}: {result}"
    host = [result for name, result in fake.items() if "cpu" in name]
    assert len(host) == 2
    for result in host:
        assert result["act"]["passed"] == []
        assert set(result["observe"]["passed"]) == {"_to_copy from cuda to cpu"}
        assert set(result["learn"]["passed"]) <= {"_to_copy from cpu to cuda", "_to_copy from cuda to cpu"}
        assert result["learn"]["passed"].count("_to_copy from cuda to cpu") <= 1  # the losses, for the priorities
    for fault in ("a host tensor", "a wait", "a number from the host"):
        assert fake[fault]["learn"]["passed"], fault


COMPILED = [("dqn_softmoe", {"layer": "top1moe", "encoder": "impala"}), ("rainbow_softmoe", {})]
COMPILED += [("rainbow_softmoe", {"layer": "dense", "num_experts": 1, "prioritized": False})]
COMPILED += [("der_softmoe", {"augment": True, "encoder": "impala"}), ("cql_softmoe", {"distributional": False})]
COMPILED += [("dqn_softmoe", {"expert_variant": "big"}), ("dqn_softmoe", {"layer": "expert_choice"})]
COMPILED += [("rainbow_softmoe", {"layer": "tokenized", "tokenization": "Shuffled"}), ("der_softmoe", DRQ_EPS)]


@pytest.mark.parametrize("script, settings", COMPILED)
def test_each_function_compiles_once_to_one_graph(script, settings, data, monkeypatch):
    graphs, compile = [], torch.compile

    def backend(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    def compile_eagerly(function, *, dynamic, fullgraph, disable, options=None):
        return compile(function, dynamic=dynamic, fullgraph=fullgraph, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    torch._dynamo.reset()
    script, small = importlib.import_module(script), {"encoder": "nature", "expert_hidden_dim": 16, "cuda": False}
    online = hasattr(script, "ReplayBuffer")
    small |= {"buffer_size": 200} if online else {"dataset_dir": str(data), "env_id": quick()["env_id"]}
    agent = script.Agent(script.Args(**small | settings), SimpleNamespace(frame_shape=(12, 12), num_actions=3))
    flag = torch.zeros(agent.args.num_envs, dtype=torch.bool)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(12 * online):
            agent.act(agent.obs[:, 0].numpy(), flag.numpy(), 0.0)
            agent.act(agent.obs[:, 0].numpy(), flag.numpy(), 0.5)
            agent.observe(flag.float().numpy(), flag.numpy(), flag.clone().numpy())
        for _ in range(2):
            agent.learn()
            agent.update_target()
            agent.q_network.eval().q_values(torch.zeros(3, 4, 12, 12, dtype=torch.uint8))
            agent.q_network.train()
        batch = agent.replay.sample(32) if online else agent.data.sample(32)
        agent.loss(agent.target_network, agent.q_network, batch, agent.args)  # other networks of the same sizes
    assert len(graphs) == 2 + 2 * online + getattr(agent.args, "prioritized", False)
