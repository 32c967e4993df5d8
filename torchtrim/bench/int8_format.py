"""The 8-bit types that are fast and exact on a processor."""

from __future__ import annotations

from typing import NamedTuple

from torchtrim.bench.machine import Machine

VNNI = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})
ARM = frozenset({"asimd", "asimddp", "i8mm", "sve"})


class Int8Format(NamedTuple):
    """How static int8 is written for a processor.

    Attributes:
        activations: `uint8` or `int8`.
        weights: `int8` or `uint8`; of depthwise convolutions `int8` in any case.
        reduce_range: Weights in 7 bits; those of depthwise convolutions keep 8, for their sums do not saturate.
        exact: The share of the multiplications whose weights keep 8 bits too, and are unsigned.
    """

    activations: str
    weights: str
    reduce_range: bool
    exact: float = 0.0


HALF_UNSIGNED = Int8Format("uint8", "int8", True, 0.5)
UNSIGNED = Int8Format("uint8", "uint8", False)  # exact everywhere, and slower


def exact_formats(found: Int8Format) -> list[tuple[str, Int8Format]]:
    """Formats that are nearer where a bit has to be left out, the faster one first; with what to call them."""
    if not found.reduce_range or found.activations != "uint8":
        return []
    return [("8 bits for half, unsigned", HALF_UNSIGNED), ("8 bits, both unsigned", UNSIGNED)]


def best_format(machine: Machine) -> Int8Format:
    """The format for ONNX Runtime's CPU provider.

    With VNNI, `vpdpbusd` multiplies unsigned by signed bytes and adds up in 32 bits: uint8 activations and int8 weights
    (U8S8), nothing saturates. ARM multiplies signed bytes (`sdot`, `smmla`): S8S8.

    AVX2 without VNNI has `vpmaddubsw` only, which adds two products of an unsigned and a signed byte in 16 bits, and
    saturates (255 x 127 x 2 = 64,770 > 32,767). Weights of 7 bits, up to 64, stay below it. The alternatives were
    measured (ONNX Runtime 1.31.1, AMD EPYC with AVX2, one thread; milliseconds are the least of two times 20 seconds of
    alternating runs on a busy machine; cosine to the float file; random weights): the kernels for signed activations
    saturate too, and those for two unsigned bytes are exact but slower.

    | model | float | U8S8 | U8S8, 7 bits | U8U8 | S8S8 |
    | --- | --- | --- | --- | --- | --- |
    | resnet18 | 62 ms | 27 ms, 0.9994 | 26 ms, 0.9992 | 38 ms, 0.9997 | 41 ms, 0.9994 |
    | mobilenet_v3_small | 2.8 ms | 3.3 ms, 0.9968 | 3.3 ms, 0.9996 | 3.9 ms, 0.9999 | 13.0 ms, 0.9998 |
    | test_efficientnet | 1.8 ms | 1.4 ms, 0.9868 | 1.4 ms, 0.9997 | 1.9 ms, 0.9999 | 3.6 ms, 0.9914 |
    | test_vit | 1.6 ms | 1.4 ms, 0.9945 | 1.4 ms, 0.9995 | 1.5 ms, 0.9997 | 1.4 ms, 0.9945 |

    So U8S8 with 7-bit weights there, and U8U8, for a half of the multiplications or for all, where its accuracy does
    not do. Depthwise convolutions are U8S8 with 8 bits in both (see `torchtrim.export.weight_types`; the table is from
    before that). A processor of which nothing is known
    gets the 7 bits too: they are right everywhere.

    Args:
        machine: What `torchtrim.bench.machine.machine()` gives.

    Example:
        >>> from torchtrim.bench.machine import machine
        >>> best_format(machine()).activations in ("uint8", "int8")
        True
    """
    instructions = set(machine.instructions)
    if instructions & VNNI:
        return Int8Format("uint8", "int8", False)
    if instructions & ARM or machine.system.split()[-1].lower() in ("arm64", "aarch64"):
        return Int8Format("int8", "int8", False)
    return Int8Format("uint8", "int8", True)
