"""What a whole call costs: `diag.probe` and the command line, beside the model alone.

    python benchmarks/whole.py                              # every row, every method
    python benchmarks/whole.py --row vit-1 --row gpt2-1 --methods plain,probe
    python benchmarks/whole.py --against ../older           # another checkout of the project in the same run

Each measurement is a process of its own. The processes of a round follow each other (plain, probe, dense,
…), so that a slow moment of the machine hits all of them, and a ratio is that of two neighbours of one round;
what is printed is the median over rounds. In a row of `diag.probe` imports are done, the model is built and
has run once, and the call that is timed is the first one, as a user makes it. In a row of the command line
all of it is timed, imports and figures included; one round before the others is not counted, for caches on
the disk. With `--threads 1` time is that of the processor, which other programs on the machine hardly
disturb; with more threads, or on a GPU, it is the clock's. Memory is the peak beyond the loaded model, in a
row of the command line that of the process. Weights are random. Linux only.

The row of a folder runs over photographs as JPEGs that this program makes (`--images` of them). *plain* is a
loop over a torch DataLoader with `--loaders` workers, *probe* a run with its folder and tables, without
figures; both build their model in the time that is told. With one thread let no worker decode, whose
processor time is not in the sum: `--loaders 0 --workers 0`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from methods import Cost, Shape, build, dense_run, lens_run, model_input, nnsight_run, peak, restart_peak
from overhead import MEBIBYTE, telling

HERE = Path(__file__).resolve()
MODEL = "vit_base_patch16_224"


SMALL = "vit_small_patch16_224"
FOLDER = "ATTNBIAS_FOLDER"
"""The variable of the environment that tells a process where the JPEGs are."""


class Row(NamedTuple):
    """What is measured. told: in words. case: of a model in this process (`methods.py`). batches: how many.

    inputs: in each of them. target: how many times the plain forward the issue of speed allows.
    in_process: whether a process measures itself, not this one a whole process.
    """

    told: str
    target: float | None
    case: str = ""
    inputs: int = 1
    batches: int = 1
    in_process: bool = True


ROWS = {
    "vit-1": Row("diag.probe, ViT-B/16, 1 batch of 8", 1.25, "vit-196", 8),
    "vit-8": Row("diag.probe, ViT-B/16, 8 batches of 8", 1.12, "vit-196", 8, 8),
    "gpt2-1": Row("diag.probe, GPT-2 small, 1 input of 1,024 tokens", 1.20, "gpt2-1024"),
    "gpt2-8": Row("diag.probe, GPT-2 small, 8 inputs of 1,024 tokens", 1.08, "gpt2-1024", 1, 8),
    "command": Row(f"attnbias probe -m timm:{MODEL} --random-init --images demo", 1.20, in_process=False),
    "names": Row("attnbias models QUERY, beside import timm", None, in_process=False),
    "folder": Row(f"a run of timm:{SMALL} over a folder of JPEGs, beside model and DataLoader", 1.11),
}
LONG = {
    "vit-256": Row("diag.probe, ViT-B/16, 4 batches of 256", None, "vit-196", 256, 4),
    "gpt2-4096": Row("diag.probe, GPT-2 small, 8 inputs of 4,096 tokens", 1.10, "gpt2-4096", 1, 8),
    "gpt2-16384": Row("diag.probe, GPT-2 small, 4 inputs of 16,384 tokens", None, "gpt2-16384", 1, 4),
    "llama-4096": Row("diag.probe, Llama-shaped, 1.1 B, 4 inputs of 4,096 tokens", 1.10, "llama-4096", 1, 4),
}
"""Rows for a GPU, which are measured only where they are asked for."""

PROBE, BEFORE = "probe", "before"
METHODS = {
    "plain": "the same forwards alone; for the command line a script that loads, prepares and runs them",
    PROBE: "every default metric of attnbias, tables and intervals",
    BEFORE: "the same by the checkout that --against names",
    "dense": "eager attention with patterns kept, token x token cosines, 4 statistics",
    "lens": "TransformerLens run_with_cache, then the same 4 statistics (GPT-2 only)",
    "nnsight": "nnsight trace of the eager model, then the same 4 statistics",
}


def main() -> None:
    """Reads the command line and prints tables."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="methods: " + "; ".join(f"{name}: {what}" for name, what in METHODS.items()),
    )
    parser.add_argument(
        "--row",
        action="append",
        choices=[*ROWS, *LONG],
        help="what to measure (default: all that take seconds)",
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="any of %(default)s (each where it can)")
    parser.add_argument("--against", type=Path, help="another checkout of the project, for 'before'")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of processes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(default: every core)")
    parser.add_argument("--device", default="cpu", help="of the rows of diag.probe (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of their models (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=256, help="of the row of a folder (default: %(default)s)"
    )
    parser.add_argument(
        "--loaders", type=int, default=1, help="workers of its DataLoader (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="of its probe (default: what a run takes)")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, options)))
        return
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown method '{unknown.pop()}'; methods are {', '.join(METHODS)}")
    if options.against is not None and not (options.against / "diag").is_dir():
        parser.error(f"--against: no package 'diag' in '{options.against}'")
    found, asked = [], options.row or ROWS
    with tempfile.TemporaryDirectory() as folder:
        if "folder" in asked:
            os.environ[FOLDER] = folder
            make_photographs(Path(folder), options.images)
        for name in asked:
            chosen = [method for method in methods if _is_able(name, method, options.against)]
            rows = compare(name, chosen, options)
            found += rows
            if not options.json:
                show(rows)
    if options.json:
        print(json.dumps({**_told(options), "rows": found}, indent=1))


def compare(name: str, methods: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One table row per method, with ratios to plain where plain was measured; what fails is told."""
    of_process = not (ROWS | LONG)[name].in_process
    costs, left = dict[str, list[Cost]](), list(methods)
    for number in range(options.rounds + of_process):
        for method in list(left):
            with telling(f"{name}, {method}: round {number + 1}"):
                try:
                    cost = (of_command if of_process else of_call)(name, method, options)
                except RuntimeError as error:
                    print(f"\n{error}", file=sys.stderr)
                    left.remove(method)
                    continue
            if number or not of_process:
                costs.setdefault(method, []).append(cost)
    complete = {method: own for method, own in costs.items() if len(own) == options.rounds}
    return [_line(name, method, own, complete.get("plain")) for method, own in complete.items()]


def _line(name: str, method: str, own: Sequence[Cost], plain: Sequence[Cost] | None) -> dict[str, Any]:
    ratios = [cost.seconds / other.seconds for cost, other in zip(own, plain or (), strict=False)]
    return {
        "row": name,
        "method": method,
        "seconds": statistics.median(cost.seconds for cost in own),
        "times_plain": statistics.median(ratios) if ratios else None,
        "from": min(ratios, default=None),
        "to": max(ratios, default=None),
        "memory_mib": statistics.median(cost.memory for cost in own) / MEBIBYTE,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A row as a plain table of 80 columns."""
    if not rows:
        return
    row = (ROWS | LONG)[rows[0]["row"]]
    target = "" if row.target is None else f" (to reach: {row.target:.2f} x plain)"
    print(f"\n{row.told}{target}")
    print(f"{'':8}{'seconds':>10}{'x plain':>10}{'from':>8}{'to':>8}{'peak MiB':>11}")
    for one in rows:
        ratios = "".join(
            f"{'' if one[key] is None else format(one[key], '.2f'):>{width}}"
            for key, width in (("times_plain", 10), ("from", 8), ("to", 8))
        )
        print(f"{one['method']:8}{one['seconds']:>10.3f}{ratios}{one['memory_mib']:>11,.0f}", flush=True)


def of_call(name: str, method: str, options: argparse.Namespace) -> Cost:
    """One call in a process of its own, which measures itself. Raises RuntimeError with its last words."""
    own = ["--device", options.device, "--dtype", options.dtype, "--loaders", str(options.loaders)]
    own += [] if options.workers is None else ["--workers", str(options.workers)]
    own += ["--one", name, method]
    done = subprocess.run(
        [sys.executable, str(HERE), *own],
        env=_environment(method, options),
        capture_output=True,
        text=True,
    )
    _refuse(done.returncode, f"{name} {method}", done.stderr)
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def of_command(name: str, method: str, options: argparse.Namespace) -> Cost:
    """A whole process, measured from outside. Raises RuntimeError with its last words."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as told:
        if method != "plain":
            model = [
                "probe",
                "-m",
                f"timm:{MODEL}",
                "--random-init",
                "--images",
                "demo",
                "-o",
                f"{folder}/run",
            ]
            command = ["-m", "diag", *(model if name == "command" else ["models", "vit_base"])]
        elif name == "command":
            command = [str(HERE), "--one", name, method]
        else:
            command = ["-c", "import timm"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            env=_environment(method, options),
            stdout=subprocess.DEVNULL,
            stderr=told,
            cwd=folder,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        told.seek(0)
        _refuse(process.returncode, f"{name} {method}", told.read())
    seconds = used.ru_utime + used.ru_stime if options.threads == 1 else seconds
    return Cost(seconds, used.ru_maxrss * 1024)


def _environment(method: str, options: argparse.Namespace) -> dict[str, str]:
    """Of a process: the checkout that is measured stands first."""
    root = options.against.resolve() if method == BEFORE else HERE.parents[1]
    paths = filter(None, [str(root), os.environ.get("PYTHONPATH")])
    own = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(paths)}


def _refuse(code: int, what: str, told: str) -> None:
    if code:
        last = f"ended by signal {-code}" if code < 0 else (told.strip().splitlines() or [""])[-1]
        raise RuntimeError(f"{what}: {last}")


def _is_able(name: str, method: str, against: Path | None) -> bool:
    """Whether a method is measured in a row here."""
    case = (ROWS | LONG)[name].case
    if name == "folder" and method == "dense":
        return False
    if method == BEFORE:
        return against is not None
    if method == "lens":
        return case == "gpt2-1024" and importlib.util.find_spec("transformer_lens") is not None
    if method == "nnsight":
        return case in ("vit-196", "gpt2-1024") and importlib.util.find_spec("nnsight") is not None
    return bool(case) and not case.startswith("llama") if method == "dense" else True


def _told(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("threads", "rounds", "device", "dtype")}


# --- in a process of its own


def one(name: str, method: str, options: argparse.Namespace) -> Cost | None:
    """One measurement, in this process."""
    device, dtype = options.device, options.dtype
    if name == "command":
        return script()
    if name == "folder":
        return over_folder(method, options)
    row = (ROWS | LONG)[name]
    import torch

    torch.manual_seed(0)
    shape = Shape.of(row.case)._replace(batch=row.inputs)
    if method == "lens":
        with tempfile.TemporaryDirectory() as folder:
            run = lens_run(shape, Path(folder))
        with torch.inference_mode():
            return _timed(run, lambda: [run() for _ in range(row.batches)], device)
    kind = getattr(torch, dtype)
    model = build(shape, eager=method in ("dense", "nnsight")).to(device, kind)
    given = [model_input(shape, model).to(device) for _ in range(row.batches)]
    given = [x.to(kind) if x.is_floating_point() else x for x in given]
    if method in ("plain", PROBE, BEFORE):
        import diag

        probe = diag.probe  # now it is imported
        with torch.inference_mode():
            warm = lambda: model(given[0])  # noqa: E731
            if method == "plain":
                return _timed(warm, lambda: [model(x) for x in given], device)
            return _timed(warm, lambda: probe(model, given, limit=row.inputs * row.batches), device)
    run = (dense_run if method == "dense" else nnsight_run)(model, given[0], shape)
    with torch.inference_mode():
        return _timed(run, lambda: [run() for _ in range(row.batches)], device)


def _timed(warm: Callable[[], object], call: Callable[[], object], device: str) -> Cost:
    """One call, behind another that warms up. On a GPU memory is that of the GPU."""
    import torch

    on_gpu = device.startswith("cuda")
    clock = time.process_time if os.environ["OMP_NUM_THREADS"] == "1" and not on_gpu else time.perf_counter
    before = torch.cuda.memory_allocated() if on_gpu else restart_peak()
    warm()
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - began
    return Cost(seconds, (torch.cuda.max_memory_allocated() if on_gpu else peak()) - before)


def make_photographs(folder: Path, count: int) -> None:
    """So many JPEGs of 500 x 375 pixels: the demo's photographs, cut out at places of their own."""
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(HERE.parents[1]))
    from diag.inputs.images import PHOTOGRAPHS, photograph

    sources = [Image.open(photograph(name)).convert("RGB").resize((700, 600)) for name in PHOTOGRAPHS]
    places = np.random.default_rng(0).integers(0, (200, 225), (count, 2))
    for number, (left, top) in enumerate(places.tolist()):
        cut = sources[number % len(sources)].crop((left, top, left + 500, top + 375))
        cut.save(folder / f"{number:06d}.jpg", quality=90)


def over_folder(method: str, options: argparse.Namespace) -> Cost:
    """One model over a folder of JPEGs, imports apart."""
    import timm
    import torch
    from PIL import Image

    from diag.run.plan import ProbePlan
    from diag.run.run import run_probe

    folder = Path(os.environ[FOLDER])
    files = sorted(folder.iterdir())

    def loop() -> None:
        model = timm.create_model(SMALL).eval().to(options.device, getattr(torch, options.dtype))
        prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        # a list is a data set to torch's loader, and what is made of its items is made by the workers
        loader = torch.utils.data.DataLoader(
            list(range(len(files))),
            batch_size=8 if options.device == "cpu" else 256,
            num_workers=options.loaders,
            pin_memory=options.device != "cpu",
            collate_fn=lambda places: torch.stack(
                [prepare(Image.open(files[place]).convert("RGB")) for place in places]
            ),
        )
        with torch.inference_mode():
            for batch in loader:
                model(batch.to(options.device, getattr(torch, options.dtype), non_blocking=True))

    def probe() -> None:
        plan = ProbePlan(
            models=(f"timm:{SMALL}",),
            random_init=True,
            images=str(folder),
            limit=len(files),
            batch_size=8 if options.device == "cpu" else 256,
            device=options.device,
            dtype=options.dtype,
            figures="none",
            workers=options.workers,
        )
        with tempfile.TemporaryDirectory() as out:
            run_probe(plan, Path(out) / "run")

    return _timed(lambda: None, loop if method == "plain" else probe, options.device)


def script() -> None:
    """What a user's own script does: loads the model, prepares the demo's photographs, runs it."""
    import timm
    import torch
    from PIL import Image

    from diag.inputs.images import PHOTOGRAPHS, photograph  # where the files are

    model = timm.create_model(MODEL).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = [prepare(Image.open(photograph(name)).convert("RGB")) for name in PHOTOGRAPHS]
    with torch.inference_mode():
        for batch in torch.stack(images).split(8):
            model(batch)


if __name__ == "__main__":
    main()
