"""What the README says of flags and files is what the code says, and the code speaks of itself alone."""

import ast
import importlib
from dataclasses import fields

import pytest
from conftest import AGENTS, ROOT

README = (ROOT / "README.md").read_text()
OFFLINE = ("cql_softmoe", "dqn_softmoe")


def show(default):
    if default is None or isinstance(default, bool):
        return {None: "not set", True: "on", False: "off"}[default]
    return f"{default:,}" if isinstance(default, int) else f"{default:g}" if isinstance(default, float) else default


def helps(script):
    """Flag name -> help text."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    fields_and_docs = zip(body, body[1:], strict=False)
    return {field.target.id: doc.value.value for field, doc in fields_and_docs if isinstance(field, ast.AnnAssign)}


def flag_rows():
    """The README's table: flag, default in each script (empty: as to its left; –: no such flag), help text."""
    defaults = [{f.name: show(f.default) for f in fields(importlib.import_module(name).Args)} for name in AGENTS]
    texts = {name: text for script in reversed(AGENTS) for name, text in helps(script).items()}
    for name in max((list(each) for each in defaults), key=len):
        shown = [each.get(name, "–") for each in defaults]
        cells = [shown[0]] + ["" if b == a else b for a, b in zip(shown, shown[1:], strict=False)]
        yield f"| `--{name.replace('_', '-')}` | {' | '.join(cells)} | {texts[name]} |"


def offline_rows():
    """The table of `cql_softmoe.py`: what it has not in common with DQN."""
    cql, dqn = ({f.name: show(f.default) for f in fields(importlib.import_module(n).Args)} for n in OFFLINE)
    texts, dqn_texts = map(helps, OFFLINE)
    for name, default in cql.items():
        if (default, texts[name]) != (dqn.get(name), dqn_texts.get(name)):
            yield f"| `--{name.replace('_', '-')}` | {default} | {texts[name]} |"


def test_the_readme_lists_every_flag_with_its_defaults_and_help():
    for row in [*flag_rows(), *offline_rows()]:
        assert row in README, row


def test_a_flag_has_the_same_help_in_every_script():
    every = [helps(script) for script in AGENTS]
    for one in every:
        for name, text in one.items():
            assert all(other.get(name, text) == text for other in every), name


@pytest.mark.parametrize(
    "name", [*(f"{name}.py" for name in [*AGENTS, "cql_softmoe"]), "moe_layers.py", "scripts/benchmark.py"]
)
def test_the_readme_counts_lines_to_the_nearest_ten(name):
    lines = len((ROOT / name).read_text().splitlines())
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    assert abs(int(row.split("|")[3]) - lines) <= 10
