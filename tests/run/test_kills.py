"""A sample of the kills: every verb has its turn in `python tests/kills.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "kills.py"


def test_what_was_killed_is_whole_when_its_command_is_given_again() -> None:
    verbs = "^(probe --overwrite|compare, again)$"
    given = [sys.executable, str(PROGRAM), "--kills", "4", "--seed", "1", "--only", verbs]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, *counts = done.stdout.splitlines()[-2].split()
    assert counts == ["4", "4", "0", "0"]
