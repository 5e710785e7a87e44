"""Faulty files and words put to every verb: `python tests/fuzz.py --tries 2000` says how each try ended.

A try is known by its kind and seed, and is the same whenever it is made:
`python tests/fuzz.py --kind manifest --seed 17` shows one. Exit code 1 if any ended as it must not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if "PYTHONPATH" not in os.environ:  # else it says which checkout is tried
    sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from fuzzing.kinds import KINDS
from fuzzing.stock import Stock
from fuzzing.tries import FAULTS, FINE, SECONDS, Ended, light, one, tries


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tries", type=int, default=2 * len(KINDS), help="how many, over all kinds")
    parser.add_argument("--kind", action="append", help="only these, or those that begin so")
    parser.add_argument("--seed", type=int, help="one try of each kind, shown in full")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="how long a try may take")
    parser.add_argument("--shown", type=int, default=1, help="tries shown per distinct fault")
    parser.add_argument("--undrawn", action="store_true", help="leave out the layout of figures")
    given = parser.parse_args(arguments)
    asked = given.kind or [""]
    kinds = [name for name in asked if name in KINDS]
    kinds = kinds or [name for name in KINDS if name.startswith(tuple(asked))]
    if not kinds:
        parser.error(f"no such kind; there are {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, light(drawn=not given.undrawn):
        stock = Stock(Path(folder) / "stock")
        if given.seed is not None:
            found = [one(stock, name, given.seed, seconds=given.seconds) for name in kinds]
            print("\n\n".join(whole(ended) for ended in found))
        else:
            for kind in kinds:
                stock.ready(KINDS[kind].parts)
            began = time.time()
            found = []
            for ended in tries(stock, kinds, given.tries, first=given.first, seconds=given.seconds):
                found.append(ended)
                if ended.verdict in FAULTS:
                    print(f"{ended.kind} {ended.seed}: {ended.verdict}", file=sys.stderr, flush=True)
            print(table(found))
            print(f"{len(found)} tries in {time.time() - began:.0f} s")
            print(faults(found, given.shown), end="")
    return int(any(ended.verdict in FAULTS for ended in found))


def table(found: Sequence[Ended]) -> str:
    """Kind by verdict, counted."""
    columns = ("tries", *FINE, *FAULTS)
    lines = [f"{'kind':19} " + " ".join(f"{name:>6}" for name in columns)]
    for kind in [*dict.fromkeys(ended.kind for ended in found), "all"]:
        counts = Counter(ended.verdict for ended in found if kind in (ended.kind, "all"))
        counts["tries"] = counts.total()
        cells = (f"{counts[name] or '·':>{max(6, len(name))}}" for name in columns)
        lines.append(f"{kind:19} " + " ".join(cells))
    return "\n".join(lines)


def faults(found: Sequence[Ended], shown: int) -> str:
    """Distinct faults by area, the most frequent first, each with tries that show it."""
    wrong = [ended for ended in found if ended.verdict in FAULTS]
    counts = Counter((KINDS[ended.kind].area, ended.verdict, ended.message) for ended in wrong)
    lines: list[str] = []
    for key, count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1])):
        area, verdict, message = key
        lines.append(f"\n{area} · {count} × {verdict}: {message}")
        alike = [ended for ended in wrong if (KINDS[ended.kind].area, ended.verdict, ended.message) == key]
        for ended in alike[:shown]:
            lines.append(f"    --kind {ended.kind} --seed {ended.seed}   {ascii(ended.done)[1:-1]}")
            lines.append(f"    attnbias {ascii(' '.join(ended.words))[1:-1][:300]}")
            lines.append(f"    {ascii(ended.wrong)[1:-1][:400]}")
    return "".join(f"{line}\n" for line in lines)


def whole(ended: Ended) -> str:
    """Everything about one try."""
    said = "".join(f"    {ascii(line)[1:-1]}\n" for line in ended.said.splitlines())
    head = f"{ended.kind} {ended.seed}: exit code {ended.code}, {ended.verdict} {ended.wrong}"
    return f"{head}\n    {ascii(ended.done)[1:-1]}\n    attnbias {ascii(' '.join(ended.words))[1:-1]}\n{said}"


if __name__ == "__main__":
    sys.exit(main())
