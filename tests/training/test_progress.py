"""What a run shows: numbers for people, the table at the start, the line of progress, the use of the chips."""

import fcntl
import io
import os
import struct
import termios

import pytest

from nemotron_jax.training import progress
from nemotron_jax.training.progress import PEAK_FLOPS, Progress, duration, human, mfu, peak_flops, startup_table


@pytest.mark.parametrize(
    "value, text",
    [
        (1.23e9, "1.23 G"), (0, "0"), (7, "7"), (512, "512"), (999, "999"), (999.6, "1.00 k"), (1000, "1.00 k"),
        (9994, "9.99 k"), (9996, "10.0 k"), (131_072, "131 k"), (999_600, "1.00 M"), (31_577_940_288, "31.6 G"),
        (560e9, "560 G"), (2.5e15, "2.50 P"), (4e20, "400 E"), (88.123, "88.1"), (0.01234, "0.0123"),
        (-45_600, "-45.6 k"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_human(value, text):
    assert human(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (5.4, "0:05"), (59.6, "1:00"), (65, "1:05"), (3599.7, "1:00:00"), (7384, "2:03:04"),
     (86_399, "23:59:59"), (86_400, "1d 00:00:00"), (93_784, "1d 02:03:04")],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_startup_table():
    table = startup_table({
        "machine": {"devices": "8 x NVIDIA H200", "mesh": "data=8"},
        "nothing": {},
        "operations": {"causal_conv1d": "reference", "ssd": "pallas\nmosaic", "moe": ""},
    })  # fmt: skip
    assert table == "\n".join([
        "machine",
        "  devices        8 x NVIDIA H200",
        "  mesh           data=8",
        "",
        "operations",
        "  causal_conv1d  reference",
        "  ssd            pallas",
        "                 mosaic",
        "  moe",
    ])  # fmt: skip
    assert startup_table({}) == ""


@pytest.mark.parametrize(
    "device_kind, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4), ("NVIDIA GH200 480GB", 990), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA L4", 121), ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05), ("NVIDIA GeForce RTX 4090", 165.2),
        # Other chips, whatever parts of known names theirs may hold.
        ("cpu", None), ("", None), ("TPU v5 lite", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA A100X", None),
        ("NVIDIA H100 80GB HBM2e", None), ("NVIDIA H200 NVL", None), ("NVIDIA L40G", None), ("NVIDIA A10", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)  # fmt: skip
def test_peak_flops(device_kind, teraflops):
    assert peak_flops(device_kind) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_every_chip_of_the_table_is_found_by_its_own_name():
    assert {name: peak_flops(f"NVIDIA {name}") for name in PEAK_FLOPS} == PEAK_FLOPS


def test_mfu():
    assert mfu(20.8e9, 2 * 19_027, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(0.4, rel=1e-3)
    assert mfu(20.8e9, 1000.0, "cpu", 8) is None


class Terminal(io.StringIO):
    """A stream that calls itself a terminal, and what would stand on it."""

    def __init__(self, encoding: str = "utf-8"):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines, column = [""], 0
        text = self.getvalue()
        while text:
            if text.startswith("\x1b[K"):
                lines[-1], text = lines[-1][:column], text[3:]
                continue
            if text[0] == "\n":
                lines, column = [*lines, ""], 0
            elif text[0] == "\r":
                column = 0
            else:
                lines[-1] = lines[-1][:column] + text[0] + lines[-1][column + 1 :]
                column += 1
            text = text[1:]
        return lines


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock[0] is the time."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    return now


def test_a_terminal_has_one_line(clock):
    terminal = Terminal()
    bar = Progress(200, stream=terminal, enabled=True)
    bar.message("starting")
    bar.update(50, {"loss": 3.25, "tokens_per_second": 12_345.0, "mfu": 0.4123, "grad_norm": 1.0})
    assert "ETA" not in terminal.screen()[-1]
    clock[0] += 60
    bar.update(100, {"loss": 2.5, "tokens_per_second": 900.0, "mfu": None})
    assert terminal.screen() == [
        "starting",
        "━" * 10 + "─" * 10 + "  50%  step 100/200  loss 2.5000  900 tokens/s  ETA 2:00",
    ]
    bar.message("first\nsecond")
    assert terminal.screen()[:-1] == ["starting", "first", "second"]
    assert terminal.screen()[-1].endswith("ETA 2:00")
    clock[0] += 60
    bar.update(200, {"loss": 1.0})
    bar.close()
    bar.close()
    bar.message("done")
    assert terminal.screen()[-4:-2] == ["second", "━" * 30 + " 100%  step 200/200  loss 1.0000  ETA 0:00"]
    assert terminal.screen()[-2:] == ["done", ""]


def test_a_log_file_has_a_line_for_each_update(clock):
    file = io.StringIO()
    bar = Progress(200, stream=file, enabled=True)
    bar.message("starting")
    bar.update(1, {"loss": 9.0})
    clock[0] += 3600
    bar.update(2, {"loss": 8.5, "tokens_per_second": 1.5e6, "mfu": 0.4123})
    bar.message("saved")
    bar.update(3, {})
    bar.close()
    assert file.getvalue().splitlines() == [
        "starting",
        "step   1/200 | loss 9.0000",
        "step   2/200 | loss 8.5000 | 1.50 M tokens/s | MFU 41.2% | ETA 8d 06:00:00",
        "saved",
        "step   3/200 | ETA 4d 02:30:00",
    ]
    assert "\r" not in file.getvalue() and "\x1b" not in file.getvalue()


def test_the_time_left_follows_the_pace_of_late(clock):
    file = io.StringIO()
    bar = Progress(10_000, stream=file, enabled=True)
    for step in range(1, 2001):  # ten times faster from step 1000 on
        bar.update(step, {})
        clock[0] += 10 if step < 1000 else 1
    assert file.getvalue().splitlines()[-1].endswith(f"ETA {duration(8000)}")


def test_a_resumed_run_counts_its_own_steps_only(clock):
    file = io.StringIO()
    bar = Progress(1000, stream=file, enabled=True)
    bar.update(900, {})
    clock[0] += 10
    bar.update(910, {})
    assert file.getvalue().splitlines()[-1] == "step  910/1000 | ETA 1:30"


def test_disabled_shows_nothing():
    terminal = Terminal()
    bar = Progress(10, stream=terminal, enabled=False)
    bar.update(1, {"loss": 1.0})
    bar.message("text")
    bar.close()
    assert terminal.getvalue() == ""


def test_losses_that_are_not_finite():
    file = io.StringIO()
    Progress(10, stream=file, enabled=True).update(1, {"loss": float("nan")})
    assert file.getvalue() == "step  1/10 | loss nan\n"


def test_a_terminal_without_the_characters(clock):
    terminal = Terminal(encoding="ascii")
    Progress(10, stream=terminal, enabled=True).update(5, {})
    assert terminal.screen()[-1] == "#" * 20 + "-" * 20 + "  50%  step  5/10"


def test_a_dumb_terminal_gets_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    Progress(10, stream=terminal, enabled=True).update(5, {"loss": 1.0})
    assert terminal.getvalue() == "step  5/10 | loss 1.0000\n"


@pytest.mark.parametrize("columns, shown", [(120, "━"), (60, "━"), (30, "step 10/20  loss 2.0000  1.00")])
def test_the_line_fits_a_real_terminal(clock, columns, shown):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    with open(theirs, "w") as stream:
        Progress(20, stream=stream, enabled=True).update(10, {"loss": 2.0, "tokens_per_second": 1000.0})
        line = os.read(ours, 4096).decode()
    os.close(ours)
    line = line.removeprefix("\r").removesuffix("\x1b[K")
    assert line.startswith(shown) and len(line) <= columns - 1


def test_a_terminal_that_has_gone_does_not_end_the_run():
    reading, writing = os.pipe()
    os.close(reading)
    stream = io.TextIOWrapper(io.FileIO(writing, "w"), write_through=True)
    bar = Progress(10, stream=stream, enabled=True)
    bar.update(1, {"loss": 1.0})
    bar.message("text")
    bar.close()
    stream.detach().close()


def test_standard_error_is_looked_up_when_the_display_starts(capsys):
    Progress(10, enabled=True).update(1, {"loss": 1.0})
    assert capsys.readouterr().err == "step  1/10 | loss 1.0000\n"
