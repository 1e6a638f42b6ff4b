"""The README's commands exist: make targets, launch files, links, and every flag."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from jaxserve.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = re.findall(r"^\.venv/bin/(jaxserve [^#\n]+)", SHELL, re.MULTILINE)


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_every_linked_file_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_flag_exists(command, monkeypatch, capsys):
    words = shlex.split(command)
    names = [word for word in words[1:3] if re.fullmatch(r"[a-z-]+", word)]
    monkeypatch.setattr(sys, "argv", ["jaxserve", *names, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert [word for word in words if word.startswith("--") and word not in text] == []
    assert [word for word in words if word.startswith("configs/") and not (ROOT / word).exists()] == []


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 5
