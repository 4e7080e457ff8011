"""What the README says of flags and files is what the code says, and the code speaks of itself alone."""

import ast
from dataclasses import fields

import pytest
from conftest import ROOT

from dqn_softmoe import Args

README = (ROOT / "README.md").read_text()


def show(default):
    if default is None or isinstance(default, bool):
        return {None: "", True: "on", False: "off"}[default]
    return f"{default:,}" if isinstance(default, int) else f"{default:g}" if isinstance(default, float) else default


def flag_rows(script):
    """One README table row per field of Args: flag, default, help text."""
    tree = ast.parse((ROOT / script).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    defaults = {field.name: field.default for field in fields(Args)}
    for field, doc in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            shown = show(defaults[field.target.id])
            yield f"| `--{field.target.id.replace('_', '-')}` | {shown} | {doc.value.value} |"


def test_the_readme_lists_every_flag_with_its_default_and_help():
    for row in flag_rows("dqn_softmoe.py"):
        assert row in README, row


@pytest.mark.parametrize("name", ["dqn_softmoe.py", "moe_layers.py", "scripts/benchmark.py"])
def test_the_readme_counts_lines_to_the_nearest_ten(name):
    lines = len((ROOT / name).read_text().splitlines())
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    assert abs(int(row.split("|")[3]) - lines) <= 10
