"""The scripts repeat each other to the letter: what they share cannot drift apart, and their diffs stay short."""

import ast
import difflib

import pytest
from conftest import ROOT

# What each script may have of its own, against the one before it. `QNetwork.__init__` is its class's, and so on.
ITS_OWN = {
    ("dqn_softmoe.py", "rainbow_softmoe.py"): {
        "Args",
        "Args.__post_init__",
        "check_args",
        "QNetwork",
        "QNetwork.__init__",
        "QNetwork.forward",
        "QNetwork.q_values",
        "Batch",
        "td_loss",
        "describe",
        "main",
        # of one script alone
        "BLOCK_SIZE",
        "first_above",
        "PrioritizedReplayBuffer",
        "project_distribution",
    },
    ("rainbow_softmoe.py", "der_softmoe.py"): {"Args", "td_loss", "describe", "augment"},
}
# What the offline script has word for word as Rainbow has it.
OFFLINE_SHARES = """
STACK_SIZE Step Environments Environments.__init__ Environments.reset Environments.send Environments.recv
Environments.close num_cores make_envs reset_seed FrameStack FrameStack.push conv same_padding NatureEncoder
NatureEncoder.__init__ NatureEncoder.forward ImpalaStack ImpalaStack.__init__ ImpalaStack.forward ImpalaEncoder
ImpalaEncoder.__init__ ImpalaEncoder.forward QNetwork.tokens QNetwork.features QNetwork.forward make_networks
available_memory load_balancing_loss project_distribution select_actions CudaGraph CudaGraph.__init__
CudaGraph.__call__ bar_style to_floats write_json write_synced last_checkpoint load_args parse_args save_args StopSignal
StopSignal.__enter__ StopSignal.receive StopSignal.__exit__ fail flag check_types game_name
""".split()
# What Rainbow leaves out of DQN, where it has definitions of its own; it keeps all their other lines, in their order.
LEFT_OUT = {
    "Args": ["n_step: int = 1", "# DQN"],
    "check_args": [],
    "QNetwork.__init__": ["self.head = linear(num_features, num_actions)"],
    "QNetwork.forward": ["return self.head(features), output  # (B, A)"],
    "main": [
        "replay = ReplayBuffer(args.buffer_size, args.num_envs, envs.frame_shape, **window, device=replay_on)",
        "return metrics",
        "epsilon = linear_schedule(args, global_step)",
        "metrics = update(*replay.sample(args.batch_size)) if learn_from_host else update()",
    ],
}
MOST_CHANGED_LINES = {("dqn_softmoe.py", "rainbow_softmoe.py"): 200, ("rainbow_softmoe.py", "der_softmoe.py"): 70}


def definitions(script):
    """Name -> source of every function, class header, method and constant; a class without its methods."""
    source = (ROOT / script).read_text()
    lines = source.splitlines()

    def text(node, without=()):
        skipped = {n for child in without for n in range(first_line(child), child.end_lineno + 1)}
        return "\n".join(lines[n - 1] for n in range(first_line(node), node.end_lineno + 1) if n not in skipped)

    def first_line(node):
        return min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])

    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found[node.name] = text(node, without=methods)
            found |= {f"{node.name}.{method.name}": text(method) for method in methods}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = text(node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = text(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found[f"import of {text(node).split()[1]}"] = text(node)
        else:  # the docstring and the last two lines
            assert isinstance(node, ast.Expr | ast.If)
    return found


@pytest.mark.parametrize("pair", ITS_OWN, ids=" ".join)
def test_shared_definitions_are_the_same_to_the_letter_and_in_the_same_order(pair):
    one, other = map(definitions, pair)
    own = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    own = {name for name in own if not name.startswith("PrioritizedReplayBuffer.") or name in one}
    assert own == ITS_OWN[pair]
    both = one.keys() & other.keys()
    assert [name for name in one if name in both] == [name for name in other if name in both]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_rainbow_keeps_what_dqn_does(name):
    dqn, rainbow = (definitions(f"{agent}_softmoe.py")[name] for agent in ("dqn", "rainbow"))
    lines = difflib.ndiff(dqn.splitlines(), rainbow.replace(", noisy=args.noisy", "").splitlines())
    assert [line[2:].strip() for line in lines if line.startswith("- ")] == LEFT_OUT[name]


@pytest.mark.parametrize("pair", ITS_OWN, ids=" ".join)
def test_a_diff_reads_as_what_one_agent_adds_to_the_other(pair):
    one, other = ((ROOT / name).read_text().splitlines() for name in pair)
    changed = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
    assert len(changed) <= MOST_CHANGED_LINES[pair]


def test_the_sections_have_the_same_headings():
    headings = [
        [line for line in (ROOT / script).read_text().splitlines() if line.startswith("# ------")]
        for script in ("dqn_softmoe.py", "rainbow_softmoe.py", "der_softmoe.py")
    ]
    assert headings[0] == headings[1] == headings[2] and len(headings[0]) == 6


def test_the_offline_script_has_the_same_environments_networks_and_running():
    rainbow, cql = definitions("rainbow_softmoe.py"), definitions("cql_softmoe.py")
    assert [name for name in OFFLINE_SHARES if rainbow[name] != cql[name]] == []
