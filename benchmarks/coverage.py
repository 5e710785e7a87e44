"""What attnbias says of every architecture that can be built small, judged by an observer of its own.

    python benchmarks/coverage.py                         # everything, and docs/coverage.md
    python benchmarks/coverage.py --library timm --only 'swin' --route module
    python benchmarks/coverage.py --page docs/coverage.md # the page again, from what is known

Each model is built with random weights and judged in one of two processes; one that hangs or dies costs its
time limit and nothing else. Verdicts are kept by name in a JSON file, which a partial run adds to.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARIES = ("torch", "timm", "open_clip", "transformers", "others")
ROUTES = ("module", "name")
UNNAMED = ("torch", "others")
"""Libraries whose models attnbias cannot be asked for by name."""
SITE = "ATTNBIAS_ZOO_SITE"
KNOWN = HERE / "coverage.json"
LIMIT = 180.0
PORTION = 12
"""Seconds for one model and route; models that one process takes after another."""


def main() -> None:
    """Judges what the options ask for and writes the page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--library", choices=LIBRARIES, action="append")
    options.add_argument("--route", choices=ROUTES, action="append")
    options.add_argument("--only", default="", help="a pattern that names must match")
    options.add_argument("--kept", type=Path, default=KNOWN, help="the JSON file of verdicts")
    options.add_argument("--page", type=Path, default=HERE.parent / "docs" / "coverage.md")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument(
        "--site", type=Path, help="the folder of other libraries' packages (docs/coverage.md)"
    )
    options.add_argument("--missing", action="store_true", help="judge only what is not known yet")
    options.add_argument("--show", action="store_true", help="print what is known and judge nothing")
    options.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker is not None:
        work(given.worker)
        return
    if given.site is not None:
        os.environ[SITE] = str(given.site.resolve())
    known: dict[str, Any] = json.loads(given.kept.read_text()) if given.kept.exists() else {}
    if not given.show:
        run(given, known)
    from zoo.page import written

    given.page.write_text(written(known, given.site))
    print(f"{given.page}")


def run(given: argparse.Namespace, known: dict[str, Any]) -> None:
    """Judges in processes of their own, a portion of models each; a model that ends one is tried no more."""
    jobs = [
        f"{library}|{route}|{name}"
        for library in given.library or LIBRARIES
        for name in listed(library)
        for route in given.route or ROUTES
        if re.search(given.only, name) and not (library in UNNAMED and route == "name")
    ]
    if given.missing:
        jobs = [job for job in jobs if job not in known]
    portions = [jobs[start : start + PORTION] for start in range(0, len(jobs), PORTION)]
    began, done = time.time(), 0
    with ThreadPoolExecutor(given.processes) as pool:
        for found in pool.map(lambda portion: dict(judged_apart(portion)), portions):
            known |= found
            done += len(found)
            given.kept.write_text(json.dumps(known, indent=1, sort_keys=True))
            bad = {
                job: of["verdict"]
                for job, of in found.items()
                if of["verdict"] in ("wrong", "silently incomplete", "no verdict", "judge failed")
            }
            print(f"{done}/{len(jobs)} {time.time() - began:.0f} s {bad or ''}", flush=True)


def listed(library: str) -> list[str]:
    """The names of a library's models here."""
    from zoo.builders import BUILDERS

    return BUILDERS[library]().names()


def judged_apart(jobs: list[str]) -> Iterator[tuple[str, Any]]:
    """Verdicts on some models, from as many processes as it takes."""
    left = list(jobs)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")])
        ),
    }
    while left:
        command = [sys.executable, __file__, "--worker", *left]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    found = json.loads(line)
                    job = found.pop("job")
                    left.remove(job)
                    yield job, found
        if left:  # the first one that is left has ended the process
            job = left.pop(0)
            yield (
                job,
                {
                    "verdict": "no verdict",
                    "reasons": [f"its process ended, or took more than {LIMIT:.0f} s"],
                    "seconds": LIMIT,
                },
            )


def work(jobs: list[str]) -> None:
    """Judges in this process and prints a line of JSON for each."""
    import signal

    from zoo.builders import verdict_of

    for job in jobs:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(LIMIT))
        began = time.time()
        try:
            found = verdict_of(*job.split("|"))
            word, reasons = found.word, found.reasons[:6]
        except Exception:  # a fault of the judge, which is to be seen and mended
            word, reasons = "judge failed", traceback.format_exc().splitlines()[-5:]
        signal.alarm(0)
        line = {"job": job, "verdict": word, "reasons": reasons, "seconds": round(time.time() - began, 1)}
        print("\n" + json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
