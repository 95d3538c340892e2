"""Everything that is wrong with an input, told at once; and the check for numbers that are none."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nemotron_jax.checkpoint.safetensors import NAMES
from nemotron_jax.errors import CheckpointError

SHOWN = 100  # faults of one kind that are told one by one

# dtype -> (mask, limit): an element is NaN or infinite when (its bits & mask) >= limit.
_NOT_FINITE = {
    "BF16": (0x7FFF, 0x7F80),
    "F16": (0x7FFF, 0x7C00),
    "F32": (0x7FFFFFFF, 0x7F800000),
    "F64": (0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "F8_E4M3": (0x7F, 0x7F),
    "F8_E5M2": (0x7F, 0x7C),
}
_BLOCK = 1 << 18  # elements looked at together: they stay in the cache


class Report:
    """Faults of one input. ``subject`` names it in the message."""

    def __init__(self, subject: object) -> None:
        self._subject = subject
        self._faults: dict[str, list[str]] = {}
        self._seen: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._faults)

    def add(self, fault: str, kind: str = "") -> None:
        """Adds a sentence, once; many of one kind are cut short."""
        if fault in self._seen:
            return
        self._seen.add(fault)
        self._faults.setdefault(kind or fault, []).append(fault)

    def extend(self, faults: Iterable[str], kind: str = "") -> None:
        for fault in faults:
            self.add(fault, kind)

    def check_finite(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array as it is; NaN and infinity in it are a fault of ``name``."""
        if not is_finite(array):
            self.add(f"{name} holds NaN or infinity.", "values")
        return array

    def raise_if_any(self, advice: str = "Nothing was written.") -> None:
        """Raises CheckpointError with all faults, one a line."""
        if not self._faults:
            return
        lines = []
        for faults in self._faults.values():
            lines += faults[:SHOWN]
            if len(faults) > SHOWN:
                lines.append(f"... and {len(faults) - SHOWN:,} more like the last.")
        count = sum(len(faults) for faults in self._faults.values())
        what = "1 fault" if count == 1 else f"{count:,} faults"
        raise CheckpointError(f"{self._subject} has {what}. {advice}\n  " + "\n  ".join(lines))


def is_finite(array: np.ndarray) -> bool:
    """No NaN and no infinity in a contiguous array of any type of a checkpoint."""
    name = NAMES[array.dtype]
    if name not in _NOT_FINITE:
        return True
    mask, limit = _NOT_FINITE[name]
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    kind = bits.dtype.type
    return all((bits[first : first + _BLOCK] & kind(mask)).max() < limit for first in range(0, bits.size, _BLOCK))
