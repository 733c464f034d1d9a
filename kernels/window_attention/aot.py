"""Every form in which window attention's Triton kernels can be launched, with what its machine code must be like.

A form is what `launch.Form` says, so the list follows the launchers: `launched` repeats their choices without tensors,
and a test compares it with what they really launch. Importing this file imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from kernels.aot import AotCase, Expects
from kernels.launch import Config
from kernels.window_attention import half_bias
from kernels.window_attention.backward import bias_grad_kernel, key_grad_kernel, query_grad_kernel
from kernels.window_attention.backward_walking import walking_key_grad_kernel, walking_query_grad_kernel
from kernels.window_attention.backward_whole import whole_backward_kernel
from kernels.window_attention.forward import tiled_forward_kernel, whole_forward_kernel
from kernels.window_attention.launch import (
    Form,
    Kernel,
    configure,
    constants,
    fused_config,
    tail_of,
    walking_config,
)

DATA = {
    "qkv",
    "grad_out",
    "out",
    "pad_kv",
    "grad_qkv",
}  # pointers to the call's dtype; all others are to fp32

TILED: tuple[tuple[Kernel, Any], ...] = (
    ("queries", query_grad_kernel),
    ("keys", key_grad_kernel),
    ("bias", bias_grad_kernel),
)
HEAD_DIMS = (16, 32, 64, 128)


def forms(arch: int) -> Iterator[tuple[str, Form]]:
    """Each dtype with the forms that are compiled for it: every configuration, with the constants that need most.

    Window 7 is one tile of 64, window 14 three steps of 64 (sm_90: six of 32) and a tail of 16. The other windows, other
    tiles or tails of the same code, and fp16, which differs from bf16 in a conversion, are there for a few head_dims.
    """
    both = (False, True)
    small, large = (7, 7), (14, 14)
    for window, head_dim, cosine, pads in product((small, large), HEAD_DIMS, both, both):
        yield "bf16", Form(window, head_dim, True, cosine, pads, arch)
    if arch >= 90:
        for window, head_dim, cosine in product((small, large), HEAD_DIMS, both):
            yield "bf16", Form(window, head_dim, True, cosine, False, arch, exact=True)
        for window, head_dim in (((4, 4), 32), ((8, 8), 64), ((9, 9), 32), ((12, 12), 64), ((16, 16), 32)):
            yield "bf16", Form(window, head_dim, True, False, False, arch, exact=True)
        for window, cosine in product((small, large), both):
            yield "fp16", Form(window, 32, True, cosine, False, arch, exact=True)
    for window, head_dim in product(((4, 4), (4, 8), (9, 9), (16, 16)), (16, 64)):
        yield "bf16", Form(window, head_dim, True, False, False, arch)
    for window, head_dim in ((small, 24), (large, 24), (large, 48), (large, 96)):
        yield "bf16", Form(window, head_dim, True, True, False, arch)
    for window, cosine in product((small, large), both):
        yield "fp16", Form(window, 32, True, cosine, False, arch)
    for window, head_dim in product(((4, 4), small), (32, 64, 128)):
        yield "fp32", Form(window, head_dim, False, True, False, arch)


def aot_cases(arch: int) -> list[AotCase]:
    """The cases, each once: forms share kernels."""
    cases = {case.name + case.config: case for dtype, form in forms(arch) for case in launched(dtype, form)}
    return list(cases.values())


def launched(dtype: str, form: Form) -> Iterator[AotCase]:
    """What one call in training launches. In inference, KEEP_LSE is off: less of the same code."""
    fused = fused_config(form) if form.whole else None
    common = constants(form) | {"PADS_ARE_KEYS": form.pads_are_keys}
    forward = configure("forward", form)
    keep_lse = fused is None
    if form.whole:
        about = {"BLOCK": form.padded, "KEEP_LSE": keep_lse, "EXACT": form.exact, **common}
        yield _case(whole_forward_kernel, dtype, form, forward, about)
    else:
        about = _tiles(forward, form) | {"TAIL": tail_of(form), "KEEP_LSE": keep_lse, **common}
        yield _case(tiled_forward_kernel, dtype, form, forward, about)
    if fused is not None:
        about = {"BLOCK": form.padded, "BIAS_GRAD": True, "LATE": fused.late, **constants(form)}
        about |= {"EXACT": form.exact, "BY_PRODUCT": fused.by_product}
        yield _case(whole_backward_kernel, dtype, form, fused, about)
        return
    if form.walks:
        yield half_bias.aot_case(form)
        about = {key: value for key, value in constants(form).items() if key != "BLOCK_D"} | {
            "SIDE": form.side
        }
        about |= dict(zip(("N0", "N1", "N2", "N3"), form.pieces, strict=True))
        queries, keys = walking_config("walking queries", form), walking_config("walking keys", form)
        more = {"BLOCK": queries.queries, "BIAS_GRAD": True}
        yield _case(walking_query_grad_kernel, dtype, form, queries, about | more)
        yield _case(walking_key_grad_kernel, dtype, form, keys, about | {"BLOCK": keys.keys})
        return
    for name, kernel in TILED:
        config = configure(name, form)
        yield _case(kernel, dtype, form, config, _tiles(config, form) | common)


def _tiles(config: Config, form: Form) -> dict[str, int]:
    return {"BLOCK_Q": config.queries, "BLOCK_K": config.keys, "SIDE": form.side}


def _case(kernel: Any, dtype: str, form: Form, config: Config, about: dict[str, Any]) -> AotCase:
    numbers = {
        parameter.name: parameter.annotation_type
        for parameter in kernel.params
        if parameter.name not in about
    }
    pointers = {name for name, kind in numbers.items() if kind == "tensor" or not kind}
    unaligned = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    walks = kernel in (walking_query_grad_kernel, walking_key_grad_kernel)
    types = {name: f"*{dtype}" if name in DATA else "*fp32" for name in pointers}
    if walks:
        types["bias"] = "*fp16"
    wide = (
        form.arch == 90 and _rows(kernel, about) >= 64
    )  # sm_90's own instruction takes 64 rows of four warps
    # A copy of 16 bytes by every thread takes a tile of this size; pads pass through registers.
    copied = _columns(kernel, about) * form.block_d * 2 >= 16 * 32 * config.num_warps
    # What an H200 found fastest may spill a little: it was faster than what does not. Products in fp32 spill where a head
    # is wide.
    timed = form.half and form.arch == 90
    wide_fp32 = not form.half and form.block_d >= 64 and kernel in (query_grad_kernel, tiled_forward_kernel)
    stack, accesses = (160, 60) if wide_fp32 else (0, 0) if form.half else (8, 2)
    if timed:
        stack, accesses = (1000, 500) if walks else (400, 200)
    expects = Expects(
        "tensor-core products of tiles" if form.half else "products of tiles in true fp32, unrolled",
        tensor_cores=("HGMMA" if wide else "HMMA") if form.half else None,
        async_copies=form.half
        and config.num_stages > 1
        and copied
        and not form.pads_are_keys
        and _steps(kernel, about) > 1,
        max_stack_bytes=stack,
        max_local_accesses=accesses,
    )
    what = ["cosine" if form.cosine else "dot", *(["pads"] if form.pads_are_keys else [])]
    all_flags = ("KEEP_LSE", "BIAS_GRAD", "LATE", "EXACT", "BY_PRODUCT")
    flags = [name.lower() for name in all_flags if about.get(name)]
    sizes = [f"{key.lower()} {about[key]}" for key in ("BLOCK", "BLOCK_Q", "BLOCK_K", "TAIL") if key in about]
    return AotCase(
        kernel=kernel,
        config=", ".join(
            [f"{dtype} {form.window[0]}x{form.window[1]} D {form.head_dim}", *what, *sizes, *flags]
        ),
        signature=numbers | types,
        constants=about,
        divisible=frozenset(pointers - unaligned) | ({"kind_stride", "bias_stride"} & numbers.keys()),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=expects,
    )


def _rows(kernel: Any, about: dict[str, Any]) -> int:
    """Of the tile of logits."""
    return int(about.get("BLOCK") or about["BLOCK_K" if kernel is key_grad_kernel else "BLOCK_Q"])


def _columns(kernel: Any, about: dict[str, Any]) -> int:
    """Of the tile of logits: so many tokens are loaded at each step."""
    return int(about.get("BLOCK") or about["BLOCK_Q" if kernel is key_grad_kernel else "BLOCK_K"])


def _steps(kernel: Any, about: dict[str, Any]) -> int:
    """Of the loop within which tiles are copied ahead, as far as the form says; a loop of one step is none."""
    slots = about["WY"] * about["WX"]
    if kernel is tiled_forward_kernel:
        return int(slots // about["BLOCK_K"])
    if kernel in (query_grad_kernel, key_grad_kernel):
        return int(-(-slots // _columns(kernel, about)))
    return 2
