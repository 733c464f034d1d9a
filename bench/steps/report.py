"""The rows as lines and as a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def lines(row: Mapping[str, Any]) -> Iterator[str]:
    """One for each implementation, and one for each thing to know."""
    for name, found in row["variants"].items():
        yield f"{row['status']:11} {row['name']} {name}: {figures(found)}"
    if not row["variants"]:
        yield f"{row['status']:11} {row['name']}: {row.get('error', 'nothing was measured')}"
    elif "error" in row:
        yield f"            {row['error']}"
    yield from (f"            {note}" for note in row.get("notes", []))


def figures(found: Mapping[str, Any]) -> str:
    """Of one implementation, in a line."""
    if "seconds" not in found:
        return str(found.get("error", "no time was taken"))
    said = [f"{1e3 * found['seconds']:.1f} ms ({len(found['times'])} times)"]
    said.append(f"{found['samples_per_second']:.2f} samples/s")
    if found.get("tokens_per_second"):
        said.append(f"{found['tokens_per_second']:,.0f} tokens/s")
    said.append(f"{found['flop_rate'] / 1e12:.1f} TFLOP/s")
    said.append(f"MFU {100 * found['mfu']:.1f}% of the measured product")
    if found.get("sheet_mfu"):
        said.append(f"{100 * found['sheet_mfu']:.1f}% of the data sheet")
    if "peak" in found:
        said.append(f"peak {found['peak'] / 1e9:.2f} GB")
    if "profile" in found:
        said.append(f"GPU idle {100 * found['profile']['idle share']:.1f}%")
    return ", ".join(said)


def page(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """report.md."""
    device = next((row["device"] for row in rows if "device" in row), "nothing was measured")
    said = [
        "# Training steps of whole models\n",
        "**A rehearsal on a CPU with the tiny presets: no figure below says anything of a GPU.**\n" * head["rehearsed"]
        + f"{device}, {head['date']}, commit {head['commit']}, torch {head['versions'].get('torch')}. `{head['command']}`\n",
        "Medians. Model FLOPs, without what activation checkpointing does again, over the median; MFU of the matrix product "
        "measured in the row's own process, and of the data sheet. Random data on the device: no loader. One device: "
        "nothing is exchanged. \"One of N ZeRO-2 ranks\": whole bf16 weights; a 1/N part of fp32 gradients, master weights "
        "and moments. Tokens: patches of pictures, sounds and clips, and words. "
        '"timm-style": the same model with window attention by roll, partition, bias and mask added to all logits, softmax.\n',
        "| row | attention | ms | samples/s | tokens/s | TFLOP/s | MFU | of data sheet | peak GB | GPU idle |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        said += [*table(row)]
    said += ["", *beside_the_plan(rows), *ratios(rows), *profiles(rows)]
    notes = [f"- {row['name']}: {note}" for row in rows for note in (*row.get("notes", []), *errors(row))]
    if notes:
        said += ["## To know\n", *notes, ""]
    return "\n".join(said)


def errors(row: Mapping[str, Any]) -> Iterator[str]:
    """What went wrong."""
    if row["status"] != "ok":
        yield f"{row['status']}. {row.get('error', '')}"


def table(row: Mapping[str, Any]) -> Iterator[str]:
    """The row's lines in the first table."""
    for name, found in row["variants"].items():
        if "seconds" not in found:
            yield f"| {row['title']} | {name} | {found.get('error', row['status'])} | | | | | | | |"
            continue
        sheet, tokens = found.get("sheet_mfu"), found.get("tokens_per_second")
        cells = [
            row["title"], name, f"{1e3 * found['seconds']:.1f}", f"{found['samples_per_second']:.2f}",
            f"{tokens:,.0f}" if tokens else "", f"{found['flop_rate'] / 1e12:.1f}", f"{100 * found['mfu']:.1f}%",
            f"{100 * sheet:.1f}%" if sheet else "", f"{found['peak'] / 1e9:.2f}" if "peak" in found else "",
            f"{100 * found['profile']['idle share']:.1f}%" if "profile" in found else "",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    if not row["variants"]:
        yield f"| {row['title']} | | {row['status']} | | | | | | | |"


def beside_the_plan(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was planned for the steps."""
    planned = [row for row in rows if row.get("plan") and "seconds" in row["variants"].get("ours", {})]
    if not planned:
        return
    yield "## Beside train.plan\n"
    yield (
        "Memory without the buckets of communication, which one device does not have. Floor: every operation at three quarters "
        "of the data sheet's peak or at 87% of its bandwidth. With recomputing: what checkpointing does again counts as work.\n"
    )
    yield "| row | peak GB | planned | off | seconds | planned | floor | floor / seconds | MFU with recomputing |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in planned:
        ours, plan = row["variants"]["ours"], row["plan"]
        if plan["samples"] != row["samples"]:
            yield f"| {row['title']} | planned for {plan['samples']} samples at a time | | | | | | | |"
            continue
        peak, want = ours.get("peak"), plan["without_buckets"]
        memory = (
            [f"{peak / 1e9:.2f}", f"{want / 1e9:.2f}", f"{100 * (want / peak - 1):+.1f}%"]
            if peak
            else [""] * 3
        )
        cells = [
            row["title"], *memory, f"{ours['seconds']:.3f}", f"{plan['seconds']:.3f} at {100 * plan['mfu']:.0f}%",
            f"{plan['floor']:.3f}", f"{100 * plan['floor'] / ours['seconds']:.0f}%",
            f"{100 * (ours['sheet_mfu'] or ours['mfu']) * (1 + plan['recomputed']):.1f}%",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield ""


def ratios(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Ours over the usual attention, within rounds."""
    for row in rows:
        both = [row["variants"].get(name, {}) for name in ("ours", "timm-style")]
        if not all("times" in one for one in both):
            continue
        pairs = [a / b for a, b in zip(both[0]["times"], both[1]["times"], strict=False)]
        said = (
            f"{row['title']}: ours takes {statistics.median(pairs):.3f} of the time of timm-style attention"
        )
        said += f" ({min(pairs):.3f} to {max(pairs):.3f} in {len(pairs)} rounds)"
        if all("peak" in one for one in both):
            said += f", and {both[0]['peak'] / both[1]['peak']:.3f} of its peak memory"
        yield said + ".\n"


def profiles(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where the time goes."""
    for row in rows:
        for name, found in row["variants"].items():
            if not (profile := found.get("profile")):
                continue
            one = ", one micro-step and the update" if row["kind"] == "step" else ""
            yield (
                f"## Where the time goes: {row['name']}, {name}\n\n{1e3 * profile['seconds']:.1f} ms{one}, "
                f"{profile['kernels']:,} kernels, GPU idle {100 * profile['idle share']:.1f}%.\n"
            )
            yield "| group | ms | share |\n|---|---|---|"
            for group, seconds in profile["groups"].items():
                yield f"| {group} | {1e3 * seconds:.1f} | {100 * seconds / profile['seconds']:.1f}% |"
            yield "\n| longest kernels | group | ms | calls |\n|---|---|---|---|"
            for kernel in profile["longest"]:
                shown = kernel["name"].replace("|", "\\|")
                yield f"| `{shown}` | {kernel['group']} | {1e3 * kernel['seconds']:.1f} | {kernel['calls']} |"
            yield ""
