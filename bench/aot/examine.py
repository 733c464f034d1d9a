"""One case, compiled and disassembled for one architecture, without a GPU. Importing this imports Triton."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import tempfile
import threading
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from bench.aot import sass
from bench.aot.occupancy import WARP
from bench.aot.verdict import Row, failures, measure
from kernels.aot import AotCase

PARSING = threading.Lock()
parse = JITFunction.parse


def parse_alone(self: JITFunction) -> ast.Module:
    """CPython 3.11 counts the depth of a syntax tree in one place for all threads. Where the garbage collector calls
    Python code (Hypothesis has such a callback), another thread's parse can come in between: "SystemError: AST constructor
    recursion depth mismatch".
    """
    with PARSING:
        return parse(self)


JITFunction.parse = parse_alone


def examine(case: AotCase, arch: int) -> Row:
    """Compile, disassemble, judge. A case that does not compile is a row that fails, not an exception."""
    about = (case.name, case.config, arch, case.num_warps, case.num_stages, case.expects)
    try:
        cubin, shared = compile_case(case, arch)
    except Exception as error:  # whatever the compiler's many stages raise, it is about this case
        return Row(
            *about, None, (f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}",)
        )
    figures = measure(sass.parse(disassemble(cubin)), arch, shared, case.num_warps)
    return Row(*about, figures, tuple(failures(figures, case.expects, arch)))


def compile_case(case: AotCase, arch: int) -> tuple[bytes, int]:
    """(machine code, bytes of shared memory). The second time it comes from Triton's cache."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    # What Triton itself finds out at a launch about a multiple of 16.
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(case.divisible)}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


def disassemble(cubin: bytes) -> str:
    """Resources and SASS as text. It takes longer than compiling, so it too is kept in Triton's cache."""
    cache = get_cache_manager(hashlib.sha256(b"cuobjdump" + cubin).hexdigest())
    kept = cache.get_file("kernel.sass")
    if kept is not None:
        return Path(kept).read_text(encoding="utf-8")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cache.put(text, "kernel.sass", binary=False)
    return text
