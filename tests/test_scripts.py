"""Tests of the scripts' source: definitions that they share are identical, all names are used, files stay short."""

import ast
import difflib
import functools
import re
import sys

import pytest
from runs import ROOT

# Numbers of lines, with a tolerance of 5%: of a file, of the longest function, of `main`, and of a diff of two files.
BUDGETS = {
    "moe_layers.py": 570,
    "dqn_softmoe.py": 975,
    "rainbow_softmoe.py": 1_070,
    "der_softmoe.py": 1_080,
    "cql_softmoe.py": 970,
    "longest function": 40,
    "main": 75,
    "dqn_softmoe.py -> rainbow_softmoe.py": 160,
    "rainbow_softmoe.py -> der_softmoe.py": 60,
}
SCRIPTS = ["dqn_softmoe.py", "rainbow_softmoe.py", "der_softmoe.py", "cql_softmoe.py"]
# A script, the scripts whose definitions it repeats, and the definitions of the same name that differ on purpose.
# `QNetwork` is the class without its methods, and `QNetwork.forward` a method. CQL's `Dataset` is its `ReplayBuffer`.
ITS_OWN = [
    (
        "rainbow_softmoe.py",
        ["dqn_softmoe.py"],
        "Args QNetwork QNetwork.__init__ QNetwork.forward QNetwork.q_values Batch td_loss ReplayBuffer.gather "
        "Agent.__init__ Agent.learn Agent.update check_args describe main",
    ),
    ("der_softmoe.py", ["rainbow_softmoe.py"], "Args td_loss"),
    (
        "cql_softmoe.py",
        ["dqn_softmoe.py", "rainbow_softmoe.py"],
        "Args QNetwork QNetwork.__init__ Batch td_loss ReplayBuffer ReplayBuffer.__init__ ReplayBuffer.sample evaluate "
        "Agent Agent.__init__ Agent.learn check_args run_path MAY_CHANGE RunLog RunLog.__init__ RunLog.scalars "
        "RunLog.update RunLog.iteration describe LOG_EVERY due checkpoint main",
    ),
]
# Flags of cql_softmoe.py whose help must differ, because they count updates or depend on the loss.
HELP_OF_ITS_OWN = """
checkpoint_every weights_every compile cuda_graphs num_envs terminal_on_life_loss n_step replay_device learning_rate
adam_eps target_network_frequency distributional double dueling
""".split()


@functools.cache
def parse(script):
    return ast.parse((ROOT / script).read_text())


@functools.cache
def lines(script):
    return (ROOT / script).read_text().splitlines()


@functools.cache
def definitions(script):
    """Return the sources of functions, classes without methods, methods, constants, imports, headings, by name."""
    found = [(n, line, line) for n, line in enumerate(lines(script), 1) if line.startswith("# ---")]

    def add(name, node, without=()):
        first, skipped = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]), set()
        for child in without:
            skipped |= set(range(child.lineno - len(child.decorator_list), child.end_lineno + 1))
        text = "\n".join(lines(script)[n - 1] for n in range(first, node.end_lineno + 1) if n not in skipped)
        found.append((first, name.replace("Dataset", "ReplayBuffer"), text))

    for node in parse(script).body:
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            add(node.name, node, without=methods)
            for method in methods:
                add(f"{node.name}.{method.name}", method)
        elif isinstance(node, ast.FunctionDef):
            add(node.name, node)
        elif isinstance(node, ast.Assign):
            add(node.targets[0].id, node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            add(" ".join(lines(script)[node.lineno - 1].split()[:2]), node)
        else:
            assert isinstance(node, ast.Expr) and node.lineno == 1 or isinstance(node, ast.If)
            add("docstring" if isinstance(node, ast.Expr) else "start", node)
    assert len({name for _, name, _ in found}) == len(found)  # all names are unique
    return {name: text for _, name, text in sorted(found)}


@pytest.mark.parametrize("script, others, own", ITS_OWN)
def test_shared_definitions_are_identical(script, others, own):
    others, found = [definitions(other) for other in others], definitions(script)
    shared = {name for name in found if any(name in other for other in others)} - {"docstring"}
    assert len(shared) > 60
    assert {name for name in shared if found[name] not in [other.get(name) for other in others]} == set(own.split())


@pytest.mark.parametrize("script, others, own", ITS_OWN)
def test_sections_and_definitions_have_the_same_order(script, others, own):
    for other in others:
        one, two = ([re.sub("# -+ ", "# ", name) for name in definitions(file)] for file in (other, script))
        two = ["# replay" if name == "# data" else name for name in two]
        assert [name for name in one if name in two] == [name for name in two if name in one]
        assert [name for name in one if name[0] == "#"] == [name for name in two if name[0] == "#"]
        if script != "cql_softmoe.py":  # the other scripts only add definitions
            assert set(one) <= set(two)


def measure(what):
    """Return the number of lines of a file, of the longest function or `main`, or of a diff ("one -> other")."""
    if "->" in what:
        return sum(line[0] in "+-" for line in difflib.ndiff(*map(lines, what.split(" -> "))))
    if what.endswith(".py"):
        return len(lines(what))
    nodes = (node for script in ["moe_layers.py", *SCRIPTS] for node in ast.walk(parse(script)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return max(f.end_lineno - f.lineno + 1 for f in functions if (f.name == "main") == (what == "main"))


@pytest.mark.parametrize("what", BUDGETS)
def test_files_functions_and_diffs_stay_short(what):
    assert measure(what) <= 1.05 * BUDGETS[what]


def test_scripts_import_the_required_packages_and_the_layers_alone():
    required = {re.split("[=<>~]", line)[0].replace("-", "_") for line in lines("requirements.txt")}
    for script in ["moe_layers.py", *SCRIPTS]:
        nodes = list(ast.walk(parse(script)))
        modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        modules += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
        allowed = {"torch"} if script == "moe_layers.py" else {"moe_layers", *required}
        assert {module.split(".")[0] for module in modules} <= allowed | set(sys.stdlib_module_names), script


def flags(script):
    """Return the help text of each flag, which is the comment at the end of its line."""
    fields = next(node for node in parse(script).body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    fields = [field for field in fields if isinstance(field, ast.AnnAssign)]
    sources = {field.target.id: lines(script)[field.lineno - 1 : field.end_lineno] for field in fields}
    helps = {name: [line.split("  # ")[1] for line in source if "  # " in line] for name, source in sources.items()}
    return {name: comments[0] for name, comments in helps.items()}


def test_a_flag_has_the_same_help_in_every_script():
    dqn, rainbow, der, cql = map(flags, SCRIPTS)
    assert len(dqn) > 30 and dqn.items() <= rainbow.items() <= der.items()
    assert [name for name in cql if name in der and cql[name] != der[name]] == HELP_OF_ITS_OWN


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_parameter_and_definition_is_used(script):
    own = [node for node in parse(script).body if getattr(node, "name", "") not in ("Args", "check_args")]
    nodes = [node for part in own for node in ast.walk(part)]
    nodes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    read = [ast.unparse(node) for node in nodes]
    assert [name for name in flags(script) if not any(text.endswith(f"args.{name}") for text in read)] == []
    for function in (node for node in ast.walk(parse(script)) if isinstance(node, ast.FunctionDef)):
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        arguments = [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)]
        assert [name for name in arguments if name not in names | {"self", "_"}] == [], function.name
    used = {"forward", "docstring", "start", "ReplayBuffer"}  # these are not used by name
    nodes = list(ast.walk(parse(script)))
    used |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names = [name.split(".")[-1] for name in definitions(script) if re.fullmatch(r"[\w.]+", name)]
    assert [name for name in names if name not in used and not name.startswith("__")] == []
