"""The kernels compile for devices that are not here: the interpreter takes more than the compiler does.

In a process of its own, because whether Triton interprets is settled when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diag.attention.kernels import triton_received, triton_scores, triton_statistics, triton_values

POINTERS = ("places", "into", "of_values", "of_outputs", "sums", "before")
SHARED = 99 * 1024

def check(kernel, formats, constants, warps=4, stages=1):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in formats:
            signature[name] = formats[name]
        elif name in ("scale", "hidden", "least"):
            signature[name] = "fp32"
        else:
            signature[name] = "*fp32" if name.endswith("_at") or name in POINTERS else "i32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    pointers = [i for i, kind in enumerate(signature.values()) if kind[0] == "*"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, places, aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert compiled.metadata.shared <= SHARED, compiled.metadata.shared
    print(kernel.fn.__name__)

def tiles(mask, distance, itemsize=2):
    size = triton_scores.blocks(itemsize, 64, mask != 0)
    constants = dict(DIM=64, PADDED=64, WIDTH=64, ROWS=size.rows, KEYS=size.keys, MASK=mask, BY_KEY=False)
    constants |= dict(CAUSAL=True, WIDEN=False, query_dim=1, key_dim=1, mask_key=1)
    number = {2: "*bf16", 4: "*fp32"}[itemsize]
    formats = dict(query_at=number, key_at=number, mask_at=[number, "*u8", "*fp32"][mask], chosen="*i64")
    rows = constants | dict(CHOSEN=1, DISTANCE=distance)
    return (formats, constants, size.warps, size.stages), (formats, rows, size.warps, size.stages)

of_keys, of_rows = tiles(0, 0)
check(triton_statistics._row_kernel, *of_rows)
check(triton_received._key_kernel, *of_keys)
check(triton_statistics._row_kernel, *tiles(1, 1)[1])
values = dict(value_at="*bf16", output_at="*bf16") | dict.fromkeys(("among_at", "real_at"), "*u8")
values |= dict.fromkeys(("sees_at", "rows_at"), "*u8")
block = dict(DIM=64, PADDED=64, SIZE=64, value_dim=1)
check(triton_values._sum_kernel, values, block)
check(triton_values._scan_kernel, values, dict(WIDTH=128))
check(triton_values._value_kernel, values, block | dict(CAUSAL=True, output_dim=1))
"""


def test_the_kernels_compile_and_fit(tmp_path: Path) -> None:
    """For compute capability 8.0: code for it, and no more shared memory than the smallest device has."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_kernels.py"  # Triton reads the source of kernels, not of this
    script.write_text(COMPILE, encoding="utf-8")
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = "_row_kernel _key_kernel _row_kernel _sum_kernel _scan_kernel _value_kernel"
    assert done.stdout.split() == names.split()
