"""What a kernel's machine code (SASS) consists of, read from the text of `cuobjdump -res-usage -sass`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

RESOURCES = re.compile(r"\bREG:(\d+)\s+STACK:(\d+)")
# An address in a comment, perhaps a predicate, then the mnemonic with its modifiers: /*0a70*/ @!P0 LDG.E.128 R4, ...
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
# Matrix products, whole warps (HMMA, IMMA, DMMA, BMMA, QMMA) and groups of four (HGMMA, IGMMA, BGMMA, QGMMA).
TENSOR_CORE = re.compile(r"[HIDBQ]G?MMA\b")
# Copies to shared memory that no register sees: LDGSTS per thread; bulk copies and TMA, which are 16 bytes or more.
ASYNC_COPY = re.compile(r"(LDGSTS|UBLKCP|UTMALDG)\b")
ASYNC_COPY_16 = re.compile(r"(LDGSTS\b.*\.128\b|UBLKCP\b|UTMALDG\b)")
WIDE_ACCESS = re.compile(r"(LDG|STG)\b.*\.128\b")
LOCAL_ACCESS = re.compile(r"(LDL|STL)\b")


@dataclass(frozen=True)
class Sass:
    """One kernel's code."""

    registers: int  # per thread
    stack: int  # bytes per thread
    mnemonics: Counter[
        str
    ]  # with modifiers, "HMMA.16816.F32.BF16" -> how many stand in the code; NOPs left out

    def count(self, pattern: re.Pattern[str]) -> int:
        """How many instructions start like this."""
        return sum(number for name, number in self.mnemonics.items() if pattern.match(name))


def parse(text: str) -> Sass:
    """Raises ValueError where the text is not that of exactly one kernel."""
    resources = RESOURCES.findall(text)
    mnemonics = Counter(name for name in INSTRUCTION.findall(text) if name != "NOP")
    if len(resources) != 1 or not mnemonics:
        raise ValueError(
            f"not the disassembly of one kernel: {len(resources)} resource lines, {text[:200]!r}"
        )
    registers, stack = map(int, resources[0])
    return Sass(registers, stack, mnemonics)
