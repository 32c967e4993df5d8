"""What a measurement was made on: processor, instruction sets, system, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_INSTRUCTIONS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
_PACKAGES = (
    "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "torchao", "onnx", "onnxscript", "timm",
    "torchvision", "numpy",
)  # fmt: skip
_CPU = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Machine:
    """A fingerprint of this machine.

    Attributes:
        processor: The processor's name.
        cores: How many cores this process may use.
        instructions: The instruction sets that matter for inference, of those it has.
        memory_gb: Main memory in GB, 0.0 where it cannot be told.
        gpu: The first GPU's name, or None.
        governor: How the system chooses the clock (`performance`, `powersave`), or None where it cannot be told.
        turbo: Whether the clock may go above its nominal rate while the processor is cool; None: cannot be told.
        system: The operating system and its architecture.
        python: The Python version.
        versions: The versions of the packages that were measured with.
    """

    processor: str
    cores: int
    instructions: tuple[str, ...]
    memory_gb: float
    gpu: str | None
    governor: str | None
    turbo: bool | None
    system: str
    python: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "instructions": list(self.instructions)}

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        clock = [f"governor {self.governor}"] if self.governor else []
        clock += [] if self.turbo is None else [f"turbo {'on' if self.turbo else 'off'}"]
        lines = [
            f"{self.processor}, {self.cores} core{'s' * (self.cores != 1)}, {self.memory_gb:.0f} GB"
            + (f", {self.gpu}" if self.gpu else ""),
            f"instructions: {', '.join(self.instructions) or 'unknown'}",
            *([f"clock: {', '.join(clock)}"] if clock else []),
            f"{self.system}, Python {self.python}",
            versions,
        ]
        return "\n".join(lines)


@cache
def machine() -> Machine:
    """This machine, as measurements should name it.

    Example:
        >>> machine().cores > 0
        True
    """
    processor, flags = _processor()
    return Machine(
        processor=processor,
        cores=_cores(),
        instructions=tuple(name for name in _INSTRUCTIONS if name in flags),
        memory_gb=_memory_gb(),
        gpu=_gpu(),
        governor=_line_of(_CPU / "cpu0" / "cpufreq" / "scaling_governor"),
        turbo=_turbo(_CPU),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions=_versions(),
    )


def _processor() -> tuple[str, frozenset[str]]:
    """Its name, and the instruction sets the system reports."""
    if platform.system() == "Linux":
        fields: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip().lower(), value.strip())
        flags = fields.get("flags", fields.get("features", "")).split()
        return fields.get("model name") or fields.get("hardware") or platform.machine(), frozenset(flags)
    if platform.system() == "Darwin":
        answer = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return answer.stdout.strip() or platform.machine(), frozenset()
    return platform.processor() or platform.machine(), frozenset()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gb() -> float:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return 0.0
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _line_of(file: Path) -> str | None:
    """What a file of the system says; None where there is no such file, or it may not be read."""
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _turbo(cpu: Path) -> bool | None:
    """Intel's driver says whether turbo is off, the others whether it is on."""
    off, on = _line_of(cpu / "intel_pstate" / "no_turbo"), _line_of(cpu / "cpufreq" / "boost")
    if off is not None:
        return off == "0"
    return None if on is None else on == "1"


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
