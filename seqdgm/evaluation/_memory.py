"""Peak of the process' resident memory while something runs."""

from __future__ import annotations

from pathlib import Path
from typing import Self

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Growth of the resident set, from entry to its peak inside the block, in megabytes (1e6 B).

    Resident memory counts everything the process holds: tensors, compiled code and imports alike.
    What an earlier block had taken from the system and not given back is not counted again, so the
    figure is a lower bound. Known on Linux, whose kernel keeps the peak; NaN elsewhere.

    Attributes
    ----------
    megabytes : float
    """

    megabytes: float = float("nan")
    _start: float = float("nan")

    def __enter__(self) -> Self:
        try:
            _CLEAR.write_text("5")  # sets the peak back to the present size
            self._start = _field("VmRSS")
        except OSError:  # no such file: another system, or one that does not allow it
            self._start = float("nan")
        return self

    def __exit__(self, *error: object) -> None:
        if self._start == self._start:
            self.megabytes = max(_field("VmHWM") - self._start, 0.0)


def _field(name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return float(line.split()[1]) * 1024 / 1e6
