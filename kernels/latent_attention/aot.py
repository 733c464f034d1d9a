"""Every form in which latent attention's Triton kernels can be launched, with what its machine code must be like.

A form is what `launch.Form` says, and whether there are several parts (then results are fp32). Importing this file
imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels.aot import AotCase, Expects
from kernels.latent_attention.backward import key_grad_kernel, query_grad_kernel
from kernels.latent_attention.forward import COMBINE, combine_kernel, latent_forward_kernel
from kernels.latent_attention.launch import Form, configure
from kernels.launch import Config

DATA = {"q", "k", "v", "grad_out"}  # pointers to the call's dtype
RESULTS = {"out", "grad_q", "grad_k", "grad_v"}  # likewise, or to fp32 where there are several parts
OTHERS = {
    "starts": "*i64", "lengths": "*i64", "seed": "*i64", "mask": "*u8", "owners": "*i32", "places": "*i32",
    "lse": "*fp32", "delta": "*fp32", "outs": "*fp32", "lses": "*fp32",
}  # fmt: skip
KERNELS = {"forward": latent_forward_kernel, "queries": query_grad_kernel, "keys": key_grad_kernel}


def forms(arch: int) -> Iterator[tuple[str, Form, bool]]:
    """(dtype, form, several parts): every configuration, with the constants that need most."""
    for head_dim in (32, 64, 128, 256):
        yield "bf16", Form(head_dim, head_dim, True, False, False, arch), False
    for head_dim in (64, 128, 256):
        yield "bf16", Form(head_dim, head_dim, True, True, True, arch), True
        yield "bf16", Form(head_dim, head_dim, True, True, False, arch), True
    yield "bf16", Form(64, 128, True, False, False, arch), True
    yield "fp16", Form(64, 64, True, False, False, arch), True
    yield "fp32", Form(64, 64, False, True, True, arch), True
    yield "fp32", Form(128, 128, False, False, False, arch), False


def aot_cases(arch: int) -> list[AotCase]:
    """The cases, each once: forms share kernels."""
    cases = {
        case.name + case.config: case
        for dtype, form, several in forms(arch)
        for case in launched(dtype, form, several)
    }
    return list(cases.values())


def launched(dtype: str, form: Form, several: bool) -> Iterator[AotCase]:
    """What one call in training launches."""
    for name, kernel in KERNELS.items():
        config = configure(name, form)  # type: ignore[arg-type]
        about = {"BLOCK_M": config.queries, "BLOCK_N": config.keys, "APART": config.apart, **form.constants}
        yield _case(kernel, dtype, form, config, about, "fp32" if several else dtype)
    if several:
        about = {"BLOCK": COMBINE.queries, "DV": form.dv, "BLOCK_DV": form.constants["BLOCK_DV"]}
        yield _case(combine_kernel, dtype, form, COMBINE, about, dtype)


def _case(kernel: Any, dtype: str, form: Form, config: Config, about: dict[str, Any], result: str) -> AotCase:
    numbers = {
        parameter.name: parameter.annotation_type
        for parameter in kernel.params
        if parameter.name not in about
    }
    types = dict.fromkeys(DATA, f"*{dtype}") | dict.fromkeys(RESULTS, f"*{result}") | OTHERS
    pointers = {name: types[name] for name, kind in numbers.items() if not kind}
    if kernel is combine_kernel:
        expects = Expects("a sum of a few parts", min_blocks_per_sm=4)
        name = f"{dtype} DV {form.dv}"
    else:
        rows = about["BLOCK_N" if kernel is key_grad_kernel else "BLOCK_M"]
        wide = form.arch == 90 and rows >= 64
        # What an H200 found fastest may spill a little: it was faster than what does not.
        timed = form.half and form.arch == 90 and not form.dropout
        expects = Expects(
            "tensor-core products of tiles" if form.half else "products of tiles in true fp32, unrolled",
            tensor_cores=("HGMMA" if wide else "HMMA") if form.half else None,
            async_copies=form.half and config.num_stages > 1,
            max_stack_bytes=400 if timed else 0 if form.half else 16,
            max_local_accesses=200 if timed else 0 if form.half else 10,
        )
        flags = [
            flag
            for flag, on in (("mask", form.masked), ("dropout", form.dropout), ("parts", result != dtype))
            if on
        ]
        name = ", ".join([f"{dtype} D {form.dqk}/{form.dv}", f"{config.queries}x{config.keys}", *flags])
    return AotCase(
        kernel=kernel,
        config=name,
        signature=numbers | pointers,
        constants=about,
        divisible=frozenset(pointers) | ({"k_stride", "v_stride"} & numbers.keys()),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=expects,
    )
