"""What the README says of flags, files, the layer and the console is what the code says and does."""

import importlib
import re
from dataclasses import fields

import pytest
import torch
from runs import AGENTS, ROOT

import moe_layers as moe

README = (ROOT / "README.md").read_text()
SCRIPTS = [*AGENTS, "cql_softmoe"]


def defaults(script):
    """Flag -> default as the README writes it."""
    show = {
        type(None): lambda _: "none",
        bool: {True: "on", False: "off"}.get,
        int: "{:,}".format,
        float: "{:g}".format,
    }
    args = importlib.import_module(script).Args()
    values = {f"--{f.name.replace('_', '-')}": getattr(args, f.name) for f in fields(args)}
    return {name: show.get(type(value), str)(value) for name, value in values.items()}


def test_the_table_of_flags_has_their_defaults():
    rows = re.findall(r"^\| `(--[\w-]+)` \|(.*?)\|(.*?)\|(.*?)\|", README, re.MULTILINE)
    assert rows
    for name, *cells in rows:
        expected = [defaults(script)[name] for script in AGENTS]
        shown = [cell.strip() for cell in cells]
        shown = [cell or next(left for left in reversed(shown[: i + 1]) if left) for i, cell in enumerate(shown)]
        assert shown == expected, name


def test_every_flag_that_is_mentioned_exists():
    known = {name for script in SCRIPTS for name in defaults(script)} | {"--help"}
    known |= {f"--no-{name[2:]}" for script in SCRIPTS for name in defaults(script)}
    for path in (ROOT / "scripts").glob("*.*"):
        known |= set(re.findall(r"--[a-z][\w-]+", path.read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= known


def test_every_file_that_is_mentioned_exists():
    files = r"\b(?:scripts/|tests/)?[\w]+\.(?:py|sh|sbatch|txt)\b|\b(?:scripts|tests)/[\w/]*(?:\.png)?"
    names = re.findall(files, README)
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_the_layer_in_the_readme_is_the_layer():
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "dispatch" in block)
    layer = moe.SoftMoE(num_tokens=7, token_dim=5, num_experts=3, hidden_dim=4)
    tokens = torch.randn(2, 7, 5)
    scope = {"torch": torch, "tokens": tokens, "phi": layer.phi, "B": 2, "E": 3, "S": layer.num_slots, "D": 5}
    scope |= {name: getattr(layer.experts, name) for name in ("w1", "b1", "w2", "b2")}
    exec(code, scope)
    torch.testing.assert_close(scope["tokens"], layer(tokens).tokens)


def test_the_start_block_in_the_readme_is_what_the_script_prints(tmp_path, monkeypatch, capsys):
    dqn = importlib.import_module("dqn_softmoe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dqn, "free_memory", lambda: float("inf"))
    monkeypatch.setattr(dqn.RunLog, "__init__", lambda *_: 1 / 0)  # the block is printed just before
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit):
        dqn.main(dqn.Args(cuda=False))
    assert capsys.readouterr().out.strip() in README
