"""Tars of images as WebDataset writes them: which members there are, where each lies, and its bytes.

Only the headers are read to list a tar; a member is then one seek away. That is why this is plain `tarfile`
and not the `webdataset` library, which streams: to reach the inputs of one shard it reads all before them,
and every worker would decode what belongs to others.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diag.errors import UnreadableInput, UserError, visible
from diag.inputs.folders import files_below, is_hidden
from diag.inputs.outside import MEGABYTE, named, reason, regular, too_large

SUFFIX = ".tar"
TIP = "--images takes a folder, an image or .tar file, 'DIR/{000..099}.tar', hf:NAME or 'demo'"
MOST_TARS, MOST_DIGITS = 1_000_000, 100
"""Names that braces may stand for, and digits of a number in them."""

MOST_MEMBER = 64 * MEGABYTE
"""Bytes of a member that is read, such as the name of a class; images may be larger."""

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
END = b"\0" * tarfile.BLOCKSIZE
"""What stands after the last member of a whole tar (twice; other programs too are content with one)."""


@dataclass(frozen=True)
class Index:
    """Members of tars in the order of the tars and of their members, in columns: 100,000 take some 15 MB.

    ids: `tar/member`, the tar as it lies below the folder that holds them all.
    owners: the place of each member's tar in `tars`. offsets, sizes: in bytes.
    unreadable: place → why, known from the header alone.
    """

    tars: Sequence[Path]
    ids: list[str] = field(default_factory=list)
    owners: array[int] = field(default_factory=lambda: array("L"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    unreadable: dict[int, str] = field(default_factory=dict)

    def read(self, place: int) -> bytes:
        """A member's bytes. Raises UnreadableInput with the reason.

        The file is opened anew: a descriptor that forked processes share has one position for all of them.
        """
        if place in self.unreadable:
            raise UnreadableInput(self.unreadable[place])
        tar, size = self.tars[self.owners[place]], self.sizes[place]
        try:
            with tar.open("rb") as file:
                file.seek(self.offsets[place])
                content = file.read(size)
        except OSError as error:
            raise UnreadableInput(f"cannot read '{visible(str(tar))}': {reason(error)}") from error
        if len(content) < size:
            raise UnreadableInput(f"'{visible(tar.name)}' breaks off after {len(content)} of {size} bytes")
        return content


def named_tars(source: str) -> list[Path]:
    """The tars that a source names: one file, or a range such as `data/{00000..00099}.tar`; else none.

    Raises UserError for a tar that is not there, or is compressed.
    """
    if source.endswith(COMPRESSED):
        raise UserError(
            f"'{source}' is compressed: no image in it can be reached without reading all before it",
            "unpack it first: gunzip, bunzip2, unxz or unzstd FILE",
        )
    if not source.endswith(SUFFIX) or os.path.isdir(source):
        return []
    tars = [named(name, TIP) for name in _expanded(source)]
    missing = [tar for tar in tars if not os.path.exists(tar)]
    if missing:
        of = f" ({len(missing)} of {len(tars)} tars are missing)" if len(tars) > 1 else ""
        raise UserError(f"'{missing[0]}' does not exist{of}", TIP)
    for tar in tars:
        regular(tar, "tar", TIP)
    return tars


def tars_below(folder: Path) -> list[Path]:
    """The tars below a folder, in the order of their paths, also such as cannot be read."""
    found, _ = files_below(folder, lambda name: name.endswith(SUFFIX))
    return [folder / name for name, *_ in found if not name.endswith("/")]


def listed(tars: Sequence[Path], root: Path, suffixes: tuple[str, ...], *, most: int = MOST_MEMBER) -> Index:
    """The members of `tars` whose name ends in one of `suffixes` (lower case), without reading any.

    root: the folder that ids start from. most: bytes of a member. Links, sparse and too large members, the
    rest of a damaged tar and a tar that is no plain file are listed as unreadable, each with an id, so that
    they are told and not lost. Of two members with one name the later counts, as in unpacking.
    """
    index = Index(tars)
    for owner, tar in enumerate(tars):
        name = visible(tar.relative_to(root).as_posix())
        members: dict[str, tuple[int, int, str | None]] = {}
        try:
            for member in _members(tar):
                if any(map(is_hidden, member.name.split("/"))):
                    continue
                if member.name.lower().endswith(suffixes) and not member.isdir():
                    plain = visible(member.name.removeprefix("./").lstrip("/"))
                    lies = (member.offset_data, member.size) if 0 <= member.size <= most else (0, 0)
                    members[f"{name}/{plain}"] = (*lies, _problem(member, most))
        except UserError as error:
            members[name] = (0, 0, str(error))
        except tarfile.ReadError as error:
            said = f"tar '{visible(tar.name)}' is damaged after {len(members)} images: {reason(error)}"
            members[name] = (0, 0, said)
        for place, (offset, size, problem) in enumerate(members.values(), len(index.ids)):
            index.owners.append(owner)
            index.offsets.append(offset)
            index.sizes.append(size)
            if problem is not None:
                index.unreadable[place] = problem
        index.ids.extend(members)
    return index


def common_root(tars: Sequence[Path]) -> Path:
    """The deepest folder that holds all of them."""
    return Path(os.path.commonpath([tar.parent for tar in tars]))


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar. Raises tarfile.ReadError where it ends without saying so."""
    regular(tar, "tar", TIP)
    opened: Any  # its list of members has no name in public
    try:
        with tarfile.open(tar, "r:") as opened:
            while (member := opened.next()) is not None:
                opened.members.clear()  # the library keeps every header
                if opened.offset <= member.offset:
                    raise tarfile.ReadError("a member of negative size")  # it would come again without end
                yield member
            # it takes anything that is no header for the end: a tar cut between members would look whole
            with tar.open("rb") as file:
                file.seek(opened.offset)
                if file.read(len(END)) != END:
                    raise tarfile.ReadError("no end mark where the next member should be")
    except Exception as error:  # of damaged headers the library raises whatever breaks first
        raise tarfile.ReadError(reason(error)) from error


def _problem(member: tarfile.TarInfo, most: int) -> str | None:
    if member.issym() or member.islnk():
        return f"a link to '{visible(member.linkname)}': pack files, not links"
    if not member.isreg() or member.issparse():
        return "no plain file"
    if member.size < 0:
        return "of negative size"
    if member.size > most:
        return too_large(member.size, most)
    return None


def _expanded(source: str) -> Iterator[str]:
    """`{08..10}` → 08, 09, 10 and `{a,b}` → a, b, wherever they stand; as a shell and WebDataset do.

    >>> list(_expanded("{a,b}-{08..10}.tar"))[:2]
    ['a-08.tar', 'a-09.tar']
    """
    pieces = re.split(r"\{([^{}]*)\}", source)  # text, inside of braces, text, …
    choices = [[piece] if place % 2 == 0 else _choices(piece) for place, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > MOST_TARS:
        raise _too_many(source)
    return ("".join(parts) for parts in itertools.product(*choices))


def _choices(inside: str) -> list[str]:
    ends = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", inside)
    if ends is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    if max(map(len, ends.groups())) > MOST_DIGITS:
        raise _too_many(f"{{{inside[:60]}}}")
    first, last = int(ends[1]), int(ends[2])
    if last < first:
        raise UserError(f"'{{{inside}}}' is an empty range", "write the smaller number first: {00000..00099}")
    if last - first >= MOST_TARS:
        raise _too_many(f"{{{inside}}}")
    width = len(ends[1]) if ends[1].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _too_many(braces: str) -> UserError:
    return UserError(
        f"'{braces}' stands for more than {MOST_TARS:,} tars", "write a smaller range: {00000..00099}"
    )
