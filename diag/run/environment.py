"""With what a result was made: versions, machine, revision and command, and nothing that names a person."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from diag.models.families import all_families


def version() -> str:
    """The installed version of attnbias."""
    try:
        return metadata.version("attnbias")
    except metadata.PackageNotFoundError:
        return "0+source"


def environment() -> dict[str, Any]:
    """Versions and machine, without anything that names a person or a host. Does not import torch."""
    versions: dict[str, str | None] = {}
    libraries = (name for family in all_families() for name in family.packages)
    for package in ("torch", *libraries, "numpy", "pandas"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "attnbias": version(),
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions,
    }


def _git_revision() -> str | None:
    """The revision of the source checkout, with a `+` if it has changes; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = [["git", "-C", str(root), *rest] for rest in (["rev-parse", "HEAD"], ["status", "--porcelain"])]
        head, changes = (
            subprocess.run(r, capture_output=True, text=True, check=True, timeout=5).stdout for r in run
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changes.strip() else "")


def command_line() -> str:
    """The command that is running, as a shell would take it, without this process's share of it."""
    words = shlex.join(["attnbias", *sys.argv[1:]])
    return re.sub(r" --shard[ =]\S+", "", words)
