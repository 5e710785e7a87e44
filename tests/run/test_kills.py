"""A sample of the kills: every verb has its turn in `python tests/kills.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "kills.py"


@pytest.mark.parametrize("verbs", ["probe --overwrite", "compare, again"])
def test_what_was_killed_is_whole_when_its_command_is_given_again(verbs: str) -> None:
    given = [sys.executable, str(PROGRAM), "--kills", "3", "--seed", "1", "--only", verbs]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, *counts = done.stdout.splitlines()[-2].split()
    assert counts == ["3", "3", "0", "0"]
