"""Clocks, power, temperature and throttling of the GPU while points are measured.

Asks `nvidia-smi` in the background, and changes nothing. Where it is missing, nothing is known.
"""

from __future__ import annotations

import functools
import subprocess
import threading
from collections.abc import Iterable
from statistics import median

EVERY_MS = 50
SLOWER = 0.9  # a clock under this share of the best seen counts as throttled
IDLE_BIT = 0x1
# Bits of clocks_event_reasons.active that slow a busy device: power cap, hardware slowdown, heat.
SLOWING_BITS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
FORMAT = "--format=csv,noheader,nounits"
QUERY = "clocks.sm,power.draw,temperature.gpu,clocks_throttle_reasons.active"
Sample = tuple[float, float, float, int]  # MHz, W, degrees, reasons


class Health:
    """Samples since the last question; a context that ends the sampling."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._best_mhz = 0.0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Health:
        """Begin to sample, where `nvidia-smi` is there."""
        command = ["nvidia-smi", f"--query-gpu={QUERY}", FORMAT, "--id=0", f"--loop-ms={EVERY_MS}"]
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return self
        self._reader = threading.Thread(target=self.read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the sampling."""
        if self._process is not None:
            self._process.kill()
            self._reader.join()
            self._process.communicate()

    def since_last(self) -> dict[str, object]:
        """`telemetry` of a row: what was seen since the last question; {} for nothing."""
        samples, self._samples = self._samples, []
        busy = [sample for sample in samples if not sample[3] & IDLE_BIT]
        if not busy:
            return {}
        mhz, watt, heat, reasons = zip(*busy, strict=True)
        self._best_mhz = max(self._best_mhz, *mhz)
        slowed = any(reason & SLOWING_BITS for reason in reasons)
        return {
            "sm_mhz": median(mhz), "watt": median(watt), "temp_c": median(heat),
            "throttled": slowed or median(mhz) < SLOWER * self._best_mhz, "samples": len(busy),
        }  # fmt: skip

    def read(self, lines: Iterable[str]) -> None:
        """Take lines of `nvidia-smi` until they end."""
        for line in lines:
            sample = parse(line)
            if sample is not None:
                self._samples.append(sample)


def parse(line: str) -> Sample | None:
    """One line of `nvidia-smi`; None where a figure is not a number (a device may hide some)."""
    try:
        mhz, watt, heat, reasons = (part.strip() for part in line.split(","))
        return float(mhz), float(watt), float(heat), int(reasons, 16)
    except ValueError:
        return None


@functools.cache
def driver() -> str:
    """Version of the GPU driver, "" when not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", FORMAT, "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
