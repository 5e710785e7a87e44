"""What can happen to any file, whatever is in it: bytes, and what lies in its place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

LARGE = 3 * 2**30
"""Bytes of a file that is too large to be read; it takes no room on the disk."""


def some_bytes(draw: Random, file: Path) -> str:
    """Bytes cut off, turned over, put in, taken out, or all of another encoding."""
    content = file.read_bytes()
    if not content:
        return "left as it is: empty"
    place, length = draw.randrange(len(content)), draw.choice((1, 2, 8, 100, 5000))
    early = draw.randrange(min(len(content), 200))
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 3, 30))):
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    noise = draw.randbytes(length)
    edits = {
        f"cut at {place}": content[:place],
        f"cut at {early}": content[:early],
        "cut by one": content[:-1],
        "bits turned over": bytes(flipped),
        f"{length} bytes put in at {place}": content[:place] + noise + content[place:],
        f"{length} bytes put in at {early}": content[:early] + noise + content[early:],
        f"{length} bytes taken out at {place}": content[:place] + content[place + length :],
        f"{length} bytes replaced at {early}": content[:early] + noise + content[early + length :],
        "empty": b"",
        "zeros": bytes(len(content)),
        "UTF-16": content.decode("latin-1").encode("utf-16"),
        "a byte that is not UTF-8": content[:early] + b"\xff" + content[early:],
        "more behind the end": content + noise,
        "noise": draw.randbytes(len(content)),
    }
    said = draw.choice(list(edits))
    file.unlink()
    file.write_bytes(edits[said])
    return said


def another_place(draw: Random, file: Path) -> str:
    """Something else in the place of a file: nothing, a folder, a pipe, a link, another file."""
    others = sorted(path for path in file.parent.rglob("*") if path.is_file() and path != file)
    ways = ["gone", "a folder", "a pipe", "a link to nothing", "a loop of links", "a large file", "a device"]
    ways += ["swapped", "a copy of another"] * bool(others)
    ways += ["unreadable"] * (os.geteuid() != 0)  # root reads everything
    said = draw.choice(ways)
    if said in ("swapped", "a copy of another"):
        other = draw.choice(others)
        mine, theirs = file.read_bytes(), other.read_bytes()
        file.unlink()
        file.write_bytes(theirs)
        if said == "swapped":
            other.unlink()
            other.write_bytes(mine)
        return f"{said}: {other.name}"
    if said == "unreadable":
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
        file.chmod(0)
        return said
    file.unlink()
    if said == "a folder":
        file.mkdir()
    elif said == "a pipe":
        os.mkfifo(file)
    elif said == "a link to nothing":
        file.symlink_to("nowhere")
    elif said == "a loop of links":
        file.symlink_to(file.name)
    elif said == "a device":
        file.symlink_to("/dev/zero")
    elif said == "a large file":
        with file.open("wb") as made:
            made.truncate(LARGE)
    return said


def another_name(draw: Random, file: Path) -> str:
    """The same file, or the folder it lies in, under a name that nobody expects."""
    names = (
        "=1+1",
        " ",
        "-q",
        "é",
        "\u202e",
        "two\nlines",
        "\x1b[31mred",
        "\udcff",
        "NA",
        "001",
        "a" * 240,
        "{0..9}",
    )
    name = draw.choice(names)
    if draw.random() < 0.3 and len(file.parents) and file.parent.name.isdigit():  # a class
        target = file.parent.with_name(name)
        file.parent.rename(target)
    else:
        target = file.with_name(f"{name}{file.suffix}")
        file.rename(target)
    return f"called {ascii(target.name)[:50]}"


def linked(draw: Random, file: Path) -> str:
    """A folder beside a file that is a link: to itself, to its parent, to another, to nothing."""
    link = file.parent / "linked"
    target = draw.choice((".", "..", "nowhere", "linked", "/proc/self", "../texts"))
    link.symlink_to(target)
    return f"beside it a link to {target}"


def tree(folder: Path) -> dict[str, str]:
    """What lies in a folder, by path: kind and content. Large files by their size and time."""
    found = {}
    for root, names, files in os.walk(folder):
        for name in (*names, *files):
            path = Path(root) / name
            about = path.lstat()
            if path.is_symlink():
                said = f"link {os.readlink(path)}"
            elif path.is_dir():
                said = "folder"
            elif not path.is_file():
                said = "special"
            elif about.st_size > 2**20:
                said = f"{about.st_size} {about.st_mtime_ns}"
            else:
                said = path.read_bytes().hex() if about.st_mode & 0o400 else "unreadable"
            found[str(path.relative_to(folder))] = said
    return found


def copied(source: Path, target: Path) -> None:
    """A copy of a folder; its large files are links, and whoever changes one writes it anew."""
    shutil.copytree(source, target, copy_function=_copy, symlinks=True)


def _copy(source: str, target: str) -> None:
    if os.path.getsize(source) > 2**18:
        os.link(source, target)
    else:
        shutil.copy2(source, target)
