"""Tests of the four READMEs: their commands, flags, files, code blocks and console output agree with the code."""

import importlib
import os
import re
import shlex
import sys
from dataclasses import fields

import pytest
import torch
from runs import AGENTS, ROOT

import moe_layers as moe

PATHS = [ROOT / folder / "README.md" for folder in ("", "scripts", "scripts/results", "tests")]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
README = TEXTS["README.md"]
SCRIPTS = [*AGENTS, "cql_softmoe"]
BASH = [block for text in TEXTS.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
COMMANDS = {re.sub(r"\s+# .*", "", line).strip() for block in BASH for line in block.replace("\\\n", "").splitlines()}
PAST = ("cleanrl/", "scripts/fig12_low_data.sh")  # in other repositories, and in the commits of old records
COMMANDS = sorted(command for command in COMMANDS if not any(name in command for name in PAST))


def words_of(command: str) -> list[str]:
    """Return the words of a command, without variables before it, redirections and further commands."""
    words = shlex.split(re.split(r" [>&|]+ ", command)[0])
    return words[next(i for i, word in enumerate(words) if "=" not in word or word.startswith("-")) :]


def agent_commands() -> list[list[str]]:
    """Return the words of each command that starts an agent, directly or through doctor.py."""
    found = (words_of(command) for command in COMMANDS if "_softmoe.py" in command)
    return [words[words.index("python", 1) :] if "scripts/doctor.py" in words else words for words in found]


@pytest.mark.parametrize("words", agent_commands(), ids=" ".join)
def test_every_command_of_an_agent_is_valid(words, monkeypatch):
    script = importlib.import_module(words[1].removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", words[1:])
    script.check_args(script.parse_args())


def options(script):
    """Return the flags of a file in scripts/: those in its text, fields of its dataclasses, and their --no- forms."""
    text = script.read_text()
    found = set(re.findall(r"--?[a-z][\w-]*", text))
    found |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+):", text, re.MULTILINE)}
    return found | {f"--no-{name[2:]}" for name in found}


def test_every_option_of_a_script_exists():
    commands = [words_of(command) for command in COMMANDS if "scripts/" in command]
    assert len(commands) > 20
    for words in commands:
        script = next(word for word in words if word.startswith("scripts/"))
        if words[0] not in ("pip", "sbatch") and "scripts/doctor.py" not in words:
            given = {word for word in words if re.match("--?[a-z]", word)}
            assert given <= options(ROOT / script), words


def defaults(script):
    """Return the default of each flag, as the README writes it."""
    formats = {type(None): lambda _: "none", int: "{:,}".format, float: "{:g}".format}
    args = importlib.import_module(script).Args()
    values = {f"--{f.name.replace('_', '-')}": getattr(args, f.name) for f in fields(args)}
    return {name: formats.get(type(value), str)(value) for name, value in values.items()}


def test_the_table_of_flags_has_their_defaults():
    rows = re.findall(r"^\| `(--[\w-]+)` \|(.*?)\|(.*?)\|(.*?)\|", README, re.MULTILINE)
    assert rows
    for name, *cells in rows:
        assert [cell.strip() for cell in cells] == [defaults(script)[name] for script in AGENTS], name


@pytest.mark.parametrize("name", TEXTS)
def test_flags_and_files_that_are_mentioned_exist(name):
    known = {flag for script in SCRIPTS for flag in defaults(script)} | {"--help", "--logdir"}
    known |= {f"--no-{flag[2:]}" for flag in known}
    known = known.union(*(options(path) for path in (ROOT / "scripts").glob("*.*")))
    text = re.sub(r".*cleanrl/.*\n.*|.*fig12_low_data.*", "", TEXTS[name])
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= known | {"--array", "--gres", "--time", "--export"}
    links = re.findall(r"\]\(([\w./]+)[)#]", text)
    assert not [link for link in links if not ((ROOT / name).parent / link).exists()]
    files = set(re.findall(r"(?<![\w/<.*-])(?:\w+/)*\w+\.(?:py|sh|sbatch)\b", text))
    folders = [ROOT / folder for folder in ("", "scripts", "tests", "tests/helpers")]
    assert {file for file in files if not any((folder / file).exists() for folder in folders)} <= {"accumulator.py"}


def test_the_layer_in_the_readme_is_the_layer():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    layer = moe.SoftMoE(num_tokens=7, token_dim=5, num_experts=3, hidden_dim=4)
    tokens = torch.randn(2, 7, 5)
    scope = {"torch": torch, "tokens": tokens, "phi": layer.phi, "B": 2, "E": 3, "S": layer.num_slots, "D": 5}
    scope |= {name: getattr(layer.experts, name) for name in ("w1", "b1", "w2", "b2")}
    exec(blocks[0], scope)
    torch.testing.assert_close(scope["tokens"], layer(tokens).tokens)
    scope = {"C": 3, "h": 4, "w": 5, "feature_map": torch.randn(2, 3, 4, 5)}
    exec(blocks[1], scope)
    assert scope["features"].shape == (2, scope["num_features"]) and "router_entropy" in scope["statistics"]


def test_the_start_block_in_the_readme_is_what_the_script_prints(tmp_path, monkeypatch, capsys):
    dqn = importlib.import_module("dqn_softmoe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dqn, "free_memory", lambda: float("inf"))
    monkeypatch.setattr(dqn.RunLog, "__init__", lambda *_: os.stat("no file"))  # the run ends after the block
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit):
        dqn.main(dqn.Args(cuda=False))
    assert capsys.readouterr().out.strip() in README
