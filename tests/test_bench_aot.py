"""`python -m bench.aot`: the project's kernels pass, planted ones fail for the reason that was planted."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.aot import __main__ as tool
from bench.aot import sass
from bench.aot.occupancy import CHIPS, KB, blocks_per_sm
from bench.aot.verdict import Row
from kernels import aot
from kernels.aot import AotCase, Expects

triton = pytest.importorskip("triton", reason="needs Triton, which is for Linux: pip install 'triton>=3.6'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: unset it, compiling is what is tested", allow_module_level=True)
tl = importlib.import_module("triton.language")
bias = importlib.import_module("kernels.window_attention.bias")
examine: Callable[[AotCase, int], Row] = importlib.import_module("bench.aot.examine").examine

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90)

# ---- the project's kernels


def test_kernels_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample that has every kernel: all of them take minutes, and `make aot` in CI has them. The JSON has what a later
    reader wants to know."""
    chosen = {arch: sample(aot.cases(arch)) for arch in ARCHS}
    monkeypatch.setattr(aot, "cases", chosen.__getitem__)
    assert tool.main(["--json", str(tmp_path / "aot.json")]) == 0
    written = capsys.readouterr().out
    record = json.loads((tmp_path / "aot.json").read_text(encoding="utf-8"))
    assert record["passed"] and record["versions"]["Triton"] == triton.__version__
    assert record["versions"]["ptxas"][0].isdigit() and record["date"].endswith("+00:00")
    assert len(record["rows"]) == sum(len(aot.cases(arch)) for arch in ARCHS)
    assert {row["arch"] for row in record["rows"]} == set(ARCHS)
    for row in record["rows"]:
        assert row["passed"] and row["failures"] == [] and row["expects"]["why"]
        assert 16 <= row["figures"]["registers"] <= 255 and row["figures"]["instructions"] > 50
        assert f"{row['kernel']}" in written and row["config"] in written
    assert f"{len(record['rows'])} of {len(record['rows'])} pass" in written


def sample(cases: list[aot.AotCase], each: int = 40) -> list[aot.AotCase]:
    """Of each kernel every `each`-th case."""
    found: dict[str, list[aot.AotCase]] = {}
    for case in cases:
        found.setdefault(case.name, []).append(case)
    return [case for some in found.values() for case in some[::each]]


ON_HOPPER = {"walking_query_grad_kernel", "walking_key_grad_kernel", "half_bias_kernel"}  # alone


def test_every_kernel_is_listed() -> None:
    """Every function under triton.jit in kernels/ whose name ends in _kernel has cases; nothing else has."""
    found = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(d) for d in node.decorator_list
            ):
                found.add(node.name)
    kernels = {name for name in found if name.endswith("_kernel")}
    for arch, others in zip(ARCHS, (ON_HOPPER, set()), strict=True):
        assert {case.name for case in aot.cases(arch)} == kernels - others


def launches(arch: int, monkeypatch: pytest.MonkeyPatch, launch: Callable[[], None]) -> set[Any]:
    """What Triton would compile while `launch` runs: types, constants, what is a multiple of 16, options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    launched: set[Any] = set()

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(0 < size < 2**16 for size in grid[1:])
        specialize = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, found, options = specialize(*args, **kwargs)
        found = dict(zip(kernel.arg_names, found, strict=True))
        types = {name: kind for name, (kind, _) in found.items() if kind != "constexpr"}
        constants = {name: value for name, (kind, value) in found.items() if kind == "constexpr"}
        divisible = [name for name, (kind, key) in found.items() if kind != "constexpr" and key == "D"]
        launched.add(form(kernel.__name__, types, constants, divisible, options))

    monkeypatch.setattr(JITFunction, "run", record)
    launch()
    return launched


def form(name: str, types: Any, constants: Any, divisible: Any, options: Any) -> Any:
    """Hashable."""
    return name, *(frozenset(part.items()) for part in (types, constants, options)), frozenset(divisible)


def listed(cases: Iterable[aot.AotCase]) -> set[Any]:
    return {
        form(
            case.name,
            case.signature,
            case.constants,
            case.divisible,
            {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options},
        )
        for case in cases
    }


def launch_bias_kernels() -> None:
    for wy, wx in ((1, 1), (1, 16), (2, 3), (4, 4), (7, 7), (7, 9), (12, 12), (13, 14), (28, 28)):
        for padded in (wy * wx, wy * wx + 3, -(-wy * wx // 16) * 16):
            for heads in (1, 3, 16):
                table = torch.zeros((2 * wy - 1) * (2 * wx - 1) * heads + 1)
                for some in (table[:-1], table[1:]):
                    bias.expand(some.view(-1, heads), wy, wx, padded, 1.0)
            for groups in (1, 2, 16):
                partials = torch.zeros(groups * padded**2 + 1)
                for some in (partials[:-1], partials[1:]):
                    bias.table_grad(some.view(groups, 1, padded, padded), wy, wx, 1.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_bias_launches_are_the_listed_ones(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launches(arch, monkeypatch, launch_bias_kernels) == listed(bias.aot_cases(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_window_launches_are_the_listed_ones(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of every form, with a map that is padded where it can be."""
    from kernels.window_attention import aot as window_aot
    from kernels.window_attention import launch, triton_ops

    monkeypatch.setattr(launch, "processor", lambda device: (arch, 108))
    expanded = partial(torch.zeros, 3)
    monkeypatch.setattr(bias, "expand", lambda table, wy, wx, padded, multiplier: expanded(padded, padded))
    monkeypatch.setattr(bias, "table_grad", lambda partials, wy, wx, multiplier: torch.zeros(wy, 3))
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def launch_all() -> None:
        for dtype, form in window_aot.forms(arch):
            wy, wx = form.window
            qkv = torch.zeros(
                2, 2 * wy if form.exact else wy + 1, 2 * wx, 3, 3, form.head_dim, dtype=dtypes[dtype]
            )
            numbers = (wy, wx, 1, 0, 0.5)
            scale = torch.zeros(3) if form.cosine else None
            pads = torch.zeros(7, 3, form.head_dim).to(qkv)[1:3] if form.pads_are_keys else None
            table = torch.zeros(wy, 3)
            out, lse = triton_ops._forward(qkv, table, scale, pads, *numbers, True)
            triton_ops._backward(torch.zeros_like(out), qkv, out, lse, table, scale, pads, *numbers, True)

    assert launches(arch, monkeypatch, launch_all) == listed(window_aot.aot_cases(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_latent_launches_are_the_listed_ones(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of every form, in one part and in several."""
    from kernels.latent_attention import aot as latent_aot
    from kernels.latent_attention import forward, triton_ops

    monkeypatch.setattr(forward, "processor", lambda device: (arch, 108))
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def launch_all() -> None:
        for dtype, form, several in latent_aot.forms(arch):
            monkeypatch.setattr(forward, "splits", lambda *_, parts=3 if several else 1: parts)
            q, k, v = (torch.zeros(30, 2, d, dtype=dtypes[dtype]) for d in (form.dqk, form.dqk, form.dv))
            mask = torch.zeros(1, 30, dtype=torch.uint8) if form.masked else None
            seed = torch.tensor(1) if form.dropout else None
            rest = (torch.tensor([0]), torch.tensor([30]), mask, seed, 30, True, 0.5, 0.1)
            out, lse = triton_ops._forward(q[None], k, v, *rest)
            triton_ops._backward(out, lse, out, lse, q[None], k, v, *rest)

    assert launches(arch, monkeypatch, launch_all) == listed(latent_aot.aot_cases(arch))


# ---- planted kernels


@triton.jit
def spilling_kernel(x, out, BLOCK: tl.constexpr):
    """One warp holds 16384 values, 512 a thread, where a thread has 255 registers."""
    place = tl.arange(0, BLOCK)
    values = tl.load(x + place)
    tl.store(out + place, values - tl.sum(values, 0))


@triton.jit
def product_kernel(a, b, out, inner, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK, inner] @ [inner, BLOCK], in pieces of BLOCK_K that are copied ahead."""
    i, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, inner, BLOCK_K):
        left = tl.load(a + i[:, None] * inner + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * BLOCK + i[None, :])
        acc = tl.dot(left, right, acc)
    tl.store(out + i[:, None] * BLOCK + i[None, :], acc)


@triton.jit
def copy_kernel(x, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place))


@triton.jit
def broken_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, 3)))


def elementwise(kernel: Any, expects: Expects, *, block: int = 1024, warps: int = 4) -> AotCase:
    return AotCase(
        kernel=kernel,
        config="planted",
        signature={"x": "*fp32", "out": "*fp32"},
        constants={"BLOCK": block},
        divisible=frozenset({"x", "out"}),
        num_warps=warps,
        num_stages=1,
        expects=expects,
    )


def product(expects: Expects, *, block: int = 64, block_k: int = 64, stages: int = 3) -> AotCase:
    return AotCase(
        kernel=product_kernel,
        config="planted",
        signature={"a": "*bf16", "b": "*bf16", "out": "*fp32", "inner": "i32"},
        constants={"BLOCK": block, "BLOCK_K": block_k},
        divisible=frozenset({"a", "b", "out", "inner"}),
        num_warps=4,
        num_stages=stages,
        expects=expects,
    )


def test_a_good_kernel_passes_for_what_it_promised() -> None:
    """A product has the tensor cores and the asynchronous copies of its chip, and they are seen."""
    for arch, mnemonic in ((80, "HMMA.16816.F32.BF16"), (90, "HGMMA")):
        row = examine(product(Expects("a product", tensor_cores=mnemonic, async_copies=True)), arch)
        assert row.figures and row.failures == (), row
        assert row.figures.shared >= 2 * 2 * 64 * 64 * 2, "two stages of two tiles at least"
        assert all(name.startswith(mnemonic) for name in row.figures.tensor_core)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_spill_fails(arch: int) -> None:
    row = examine(elementwise(spilling_kernel, Expects("too much"), block=16384, warps=1), arch)
    assert row.figures and row.figures.stack > 0 and row.figures.local_accesses > 0
    (reason,) = row.failures
    assert reason.startswith("spills: ") and f"{row.figures.stack} bytes of stack" in reason


@pytest.mark.parametrize("arch", ARCHS)
def test_too_much_shared_memory_fails(arch: int) -> None:
    wants = Expects("a product", tensor_cores="H", max_stack_bytes=9999, max_local_accesses=9999)
    row = examine(product(wants, block=128, block_k=128, stages=5), arch)
    assert row.figures and row.figures.shared > 227 * KB and row.figures.blocks_per_sm == 0
    (reason,) = row.failures
    assert (
        reason.startswith("shared memory: ") and f"at most {CHIPS[arch].shared_per_block // KB} KB" in reason
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_a_broken_promise_fails(arch: int) -> None:
    wants = Expects("says that it is a product", tensor_cores="HMMA", async_copies=True, min_blocks_per_sm=33)
    row = examine(elementwise(copy_kernel, wants), arch)
    assert [reason.split(":")[0] for reason in row.failures] == [
        "occupancy",
        "tensor cores",
        "asynchronous copies of 16 bytes",
    ]
    assert "HMMA promised, found none" in row.failures[1]
    row = examine(product(Expects("says that it is a copy", wide_accesses=True)), arch)
    assert any("tensor cores: none expected, found H" in reason for reason in row.failures)


def test_what_does_not_compile_is_a_row() -> None:
    row = examine(elementwise(broken_kernel, Expects("not a kernel")), 80)
    assert row.figures is None
    (reason,) = row.failures
    assert reason.startswith("does not compile: CompilationError")


# ---- the command


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts cases in the place of the project's own."""
    return lambda *cases: monkeypatch.setattr(aot, "cases", lambda arch: list(cases))


def test_exit_code_and_reason_of_a_failure(planted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    good = elementwise(copy_kernel, Expects("a copy", wide_accesses=True))
    bad = elementwise(copy_kernel, Expects("a copy, it says", tensor_cores="HMMA"))
    planted(good, bad, elementwise(broken_kernel, Expects("not a kernel")))
    assert tool.main(["--arch", "80", "--kernel", "copy_kernel"]) == 1
    out = capsys.readouterr().out
    assert (
        "FAIL copy_kernel (planted) on sm_80: tensor cores: HMMA promised, found none. It is: a copy, it says"
        in out
    )
    assert "1 of 2 pass" in out and "broken_kernel" not in out
    planted(good)
    assert tool.main([]) == 0


def test_json_goes_to_standard_output(planted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    planted(elementwise(broken_kernel, Expects("not a kernel")))
    assert tool.main(["--arch", "90", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    (row,) = record["rows"]
    assert not record["passed"] and not row["passed"] and row["figures"] is None and row["failures"]
    assert "broken_kernel" in tool.table([examine(elementwise(broken_kernel, Expects("none")), 90)])


def test_the_second_time_is_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    case = elementwise(copy_kernel, Expects("a copy"), block=512)
    first = examine(case, 80)

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("a tool was started again")

    monkeypatch.setattr("subprocess.run", run)
    assert examine(case, 80) == first


def test_cannot_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--kernel", "no_such_kernel"]) == 2
    assert "no kernel named no_such_kernel; there are: bias_expand_kernel" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        assert tool.main([]) == 2
        assert "unset it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", None)
    assert tool.main([]) == 2
    assert "needs Triton" in capsys.readouterr().err


# ---- arithmetic and reading


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "want"),
    [
        # CUDA C++ Programming Guide, technical specifications: 64 warps, 32 blocks, 64 K registers on both
        (80, 32, 0, 8, (8, "warps")),
        (80, 16, 0, 1, (32, "blocks")),
        (80, 64, 0, 32, (1, "registers")),
        (90, 128, 0, 4, (4, "registers")),
        # 255 is allotted as 256, 33 as 40 (units of 256 registers a warp)
        (80, 255, 0, 4, (2, "registers")),
        (80, 33, 0, 8, (6, "registers")),
        # 208 x 32 = 6656: two warps in each of four partitions, not the nine of an undivided register file
        (80, 208, 0, 1, (8, "registers")),
        # 164 and 228 KB an SM, a block takes 1 KB more than it asks for; 163 and 227 KB a block at most
        (80, 32, 48 * KB, 4, (3, "shared memory")),
        (90, 32, 48 * KB, 4, (4, "shared memory")),
        (80, 32, 163 * KB, 4, (1, "shared memory")),
        (90, 32, 227 * KB, 4, (1, "shared memory")),
        (80, 32, 163 * KB + 1, 4, (0, "shared memory")),
        (90, 32, 227 * KB + 1, 4, (0, "shared memory")),
        # 40 KB + 1 KB goes 4 times into 164 KB, one byte more does not (units of 128 bytes)
        (80, 32, 40 * KB, 4, (4, "shared memory")),
        (80, 32, 40 * KB + 1, 4, (3, "shared memory")),
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, warps: int, want: tuple[int, str]) -> None:
    assert blocks_per_sm(CHIPS[arch], registers=registers, shared=shared, warps=warps) == want


SASS = """
 Function some_kernel:
  REG:72 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a0000017624 */
                                                                             /* 0x000fe400078e00ff */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;                   /* 0x0000000402047981 */
        /*0020*/               @P1 LDGSTS.E.BYPASS.128 [R9], [R2.64] ;       /* 0x0000000402097fae */
        /*0030*/                   LDGSTS.E [R9], [R2.64] ;                  /* 0x0000000402097fae */
        /*0040*/             @UP0  UBLKCP [UR8], [UR4], UR6 ;                /* 0x00000008040073ba */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;     /* 0x0000000c0804723c */
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ; /* 0x00e0000004187df0 */
        /*0070*/                   STL.64 [R1], R4 ;                         /* 0x0000000401007387 */
        /*10080*/                  LDL R4, [R1] ;                            /* 0x0000000001047983 */
        /*10090*/                  STG.E [R2.64], R4 ;                       /* 0x0000000402007986 */
        /*100a0*/                  NOP;                                      /* 0x0000000000007918 */
"""


def test_reads_sass() -> None:
    code = sass.parse(SASS)
    assert (code.registers, code.stack, code.mnemonics.total()) == (72, 16, 10)
    assert code.count(sass.TENSOR_CORE) == 2 and code.count(sass.LOCAL_ACCESS) == 2
    assert code.count(sass.ASYNC_COPY) == 3 and code.count(sass.ASYNC_COPY_16) == 2
    assert code.count(sass.WIDE_ACCESS) == 1
    for text in ("", "REG:1 STACK:0", SASS + SASS):
        with pytest.raises(ValueError, match="not the disassembly of one kernel"):
            sass.parse(text)


def test_table_is_aligned() -> None:
    rows = [Row("k" * n, "c", 80, 4, 1, Expects("a copy"), None, ("does not compile",)) for n in (1, 9)]
    lines = tool.table(rows).splitlines()
    assert lines[2].index("FAIL") == lines[3].index("FAIL") and len(lines) == 6
