"""Every form in which the contrastive loss's Triton kernels can be launched, with what its machine code must be like.
Importing this file imports Triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels.aot import AotCase, Expects
from kernels.contrastive_loss.backward import logit_grads_kernel
from kernels.contrastive_loss.forward import logit_sums_kernel
from kernels.contrastive_loss.launch import Form, configure

DATA = {"image", "text", "left", "right", "grad"}  # pointers to the call's dtype; all others are to fp32


def aot_cases(arch: int) -> list[AotCase]:
    """Widths that a tile divides and one that it does not, in every kind of loss."""
    forms = [("bf16", Form(width, True, arch)) for width in (32, 512, 768)]
    forms += [
        ("bf16", Form(100, True, arch)),
        ("fp16", Form(768, True, arch)),
        ("fp32", Form(512, False, arch)),
    ]
    return [case for dtype, form in forms for case in launched(dtype, form)]


def launched(dtype: str, form: Form) -> Iterator[AotCase]:
    """What calls in training launch."""
    yield _case(logit_sums_kernel, "sums", dtype, form, {})
    for sigmoid in (False, True):
        for swapped in (False, True) if form.half else (False,):
            yield _case(logit_grads_kernel, "grads", dtype, form, {"SIGMOID": sigmoid, "SWAPPED": swapped})


def _case(kernel: Any, name: str, dtype: str, form: Form, flags: dict[str, bool]) -> AotCase:
    config = configure(name, form)  # type: ignore[arg-type]
    about = {
        "WIDTH": form.width, "BLOCK_D": form.block_d, "BLOCK_M": config.queries, "BLOCK_N": config.keys, **flags,
    }  # fmt: skip
    numbers = {p.name: p.annotation_type for p in kernel.params if p.name not in about}
    pointers = {
        n: f"*{dtype}" if n in DATA else "*fp32"
        for n, kind in numbers.items()
        if not kind or kind == "tensor"
    }
    said = [flag.lower() for flag, on in flags.items() if on]
    return AotCase(
        kernel=kernel,
        config=", ".join([f"{dtype} D {form.width}", f"{config.queries}x{config.keys}", *said]),
        signature=numbers | pointers,
        constants=about,
        divisible=frozenset(pointers),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=Expects(
            "tensor-core products of tiles" if form.half else "products of tiles in true fp32, unrolled",
            tensor_cores=("HGMMA" if form.arch == 90 else "HMMA") if form.half else None,
            async_copies=form.half and form.width % form.block_d == 0 and form.width > form.block_d,
        ),
    )
