"""What a run shows: the table at its start, the line of progress below it, and how well it uses its chips."""

from __future__ import annotations

import collections
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

# Dense bfloat16 FLOP/s of a chip with float32 accumulation, without sparsity, as NVIDIA publishes them. Data sheets
# often give the rate with 2:4 sparsity only, which is twice this. Chips whose figure could not be confirmed are left
# out, and so are variants of a chip that run at clocks of their own (MIG slices, laptops).
PEAK_FLOPS = {
    "GB200": 2500e12,  # Blackwell architecture brief
    "B200": 2250e12,  # Blackwell architecture brief, HGX B200
    "GH200": 990e12,  # GH200 data sheet
    "H200": 989.4e12,  # H200 data sheet (1,979 with sparsity): the SXM module
    "H100": 989.4e12,  # H100 architecture white paper: the SXM5 module
    "H100 PCIe": 756e12,  # H100 architecture white paper
    "H100 NVL": 835.5e12,  # H100 data sheet (1,671 with sparsity)
    "A100": 312e12,  # A100 data sheet
    "A100 PCIe": 312e12,  # A100 data sheet
    "L40S": 362.05e12,  # L40S data sheet
    "L40": 181.05e12,  # L40 data sheet
    "L4": 121e12,  # L4 data sheet (242 with sparsity)
    "RTX 4090": 165.2e12,  # Ada architecture white paper
}
# Words of a device kind that change nothing about its speed: makers, form factors and memories of the entries above.
# Not HBM2e, which tells another H100 from that of the table.
_SAME_CHIP = re.compile(r"nvidia|geforce|sxm\d?|\d+gb|hbm3e?")


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a chip by ``jax.Device.device_kind``; None where it is not known (a CPU, say)."""
    words = [word for word in re.split(r"[\s-]+", device_kind.lower()) if not _SAME_CHIP.fullmatch(word)]
    known = {name.lower(): peak for name, peak in PEAK_FLOPS.items()}
    return known.get(" ".join(words))


def mfu(flops_per_token: float, tokens_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Model FLOPs utilisation: the share of the chips' peak that the model's own arithmetic makes use of.

    mfu = flops_per_token * tokens_per_second / (num_devices * peak_flops(device_kind))

    flops_per_token are those of a training step without recomputation (``model.counts.flops_per_token``), and the
    peak is that of dense bfloat16 whatever the precision of the run, so that runs can be compared.

    Args:
      tokens_per_second: of all devices together.

    Returns:
      A fraction (0.4 for 40%), None on chips whose peak is not known.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (num_devices * peak)


def human(value: float) -> str:
    """Three significant digits and a decimal prefix: ``1.23 G``, ``45.6 k``, ``512``."""
    prefixes = ["", *"kMGTPE"]
    while abs(value) >= 999.5 and len(prefixes) > 1:  # what would be rounded to 1000 takes the next prefix
        value /= 1000
        prefixes.pop(0)
    digits = f"{value:#.3g}".rstrip(".") if prefixes[0] else f"{value:.3g}"
    return f"{digits} {prefixes[0]}".rstrip()


def duration(seconds: float) -> str:
    """``1:05`` (minutes and seconds), ``2:03:04``, ``1d 02:03:04``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def startup_table(sections: Mapping[str, Mapping[str, str]]) -> str:
    """Plain text: each section's title, and its names and values in two columns that all sections share.

    Further lines of a value stand below its first; a section without entries is left out.
    """
    width = max((len(name) for entries in sections.values() for name in entries), default=0)
    blocks = []
    for title, entries in sections.items():
        lines = [title]
        for name, value in entries.items():
            first, *more = value.splitlines() or [""]
            lines.append(f"  {name:<{width}}  {first}".rstrip())
            lines += [f"{'':<{width + 4}}{line}".rstrip() for line in more]
        if entries:
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


class Progress:
    """Where a run is: step, loss, tokens/s, MFU where it is known, and the time left.

    On a terminal this is one line, redrawn in place; elsewhere (a log file, CI) a plain line for each update. A stream
    that fails, such as a terminal that has been closed, silences the display and never ends the run.
    """

    _WINDOW = 100  # updates that the time left is measured over: many log lines, so that a validation pass evens out

    def __init__(self, total_steps: int, *, stream: TextIO | None = None, enabled: bool) -> None:
        """
        Args:
          total_steps: the last step of the run; a resumed run starts above 0 and counts to the same one.
          stream: standard error unless given.
          enabled: whether this process shows anything (process 0 of a run).
        """
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._redraw = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = "━─" if _can_write("━─", self._stream) else "#-"
        self._seen: collections.deque[tuple[int, float]] = collections.deque(maxlen=self._WINDOW)
        self._line = ""  # on the terminal now, below everything else

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows a logged step. ``values`` may hold loss, tokens_per_second and mfu; other names are passed over."""
        self._seen.append((step, time.monotonic()))
        parts = self._describe(step, values)
        if not self._redraw:
            self._show(" | ".join(parts) + "\n")
            return
        self._line = self._fit(step, parts)
        self._show(f"\r{self._line}\x1b[K")

    def message(self, text: str) -> None:
        """Prints a text above the line of progress."""
        self._show((f"\r\x1b[K{text}\n{self._line}") if self._redraw else f"{text}\n")

    def close(self) -> None:
        """Leaves the last line standing; a second call does nothing."""
        if self._line:
            self._show("\n")
        self._line = ""

    def _describe(self, step: int, values: Mapping[str, Any]) -> list[str]:
        width = len(str(self._total))
        parts = [f"step {step:>{width}}/{self._total}"]
        if (loss := values.get("loss")) is not None:
            parts.append(f"loss {loss:.4f}")
        if (rate := values.get("tokens_per_second")) is not None:
            parts.append(f"{human(rate)} tokens/s")
        if (used := values.get("mfu")) is not None:
            parts.append(f"MFU {used:.1%}")
        if (left := self._seconds_left()) is not None:
            parts.append(f"ETA {duration(left)}")
        return parts

    def _seconds_left(self) -> float | None:
        """At the pace of the last updates; None before there are two of them. The first step, which compiles, is left
        out: the pace counts from its end."""
        (first_step, first), (last_step, last) = self._seen[0], self._seen[-1]
        if last_step <= first_step:
            return None
        return (self._total - last_step) * (last - first) / (last_step - first_step)

    def _fit(self, step: int, parts: list[str]) -> str:
        """One line of the terminal, whose last column stays free: writing to it would wrap. The bar takes the room that
        is left; without enough for one, the end of the text is cut."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):  # no file behind the stream
            columns = 80
        room = (columns or 80) - 1
        percent = f"{step / self._total:4.0%}"
        text = "  ".join(parts)
        cells = min(40, room - len(text) - len(percent) - 3) // 10 * 10  # so that a digit more does not shift it
        if cells < 10:
            return text[:room]
        full = min(cells, round(cells * step / self._total))
        return f"{self._bar[0] * full}{self._bar[1] * (cells - full)} {percent}  {text}"

    def _show(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._enabled = False


def _can_write(text: str, stream: TextIO) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
