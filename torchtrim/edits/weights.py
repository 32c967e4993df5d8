"""Tensors inside a record: what an edit decided from data, kept to the bit."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torchtrim.errors import EditError

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and "q" not in str(dtype) and "bits" not in str(dtype)
}


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by name, copied when the record is made, so that training does not change what the record says.

    Two are equal when all names, types, shapes and bits are.

    Example:
        >>> weights = Weights({"bias": torch.tensor([1.0, 2.0])})
        >>> weights.to_dict()
        {'bias': {'dtype': 'float32', 'shape': [2], 'data': 'AACAPwAAAEA='}}
        >>> Weights.from_dict(weights.to_dict()) == weights
        True
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self._tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in (tensors or {}).items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weights):
            return NotImplemented
        return self.keys() == other.keys() and all(_same_bits(self[name], other[name]) for name in self)

    def __hash__(self) -> int:
        return hash(frozenset((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.items()))

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.values())
        return f"<{count:,} values in {len(self)} tensor{'s' if len(self) != 1 else ''}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Weights:
        return self  # nothing in it changes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: base64 of the bytes, which are little-endian."""
        return {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "data": base64.b64encode(_bytes(tensor)).decode("ascii"),
            }
            for name, tensor in self.items()
        }

    @staticmethod
    def from_dict(data: Any) -> Weights:
        """The tensors that `to_dict` wrote.

        Raises:
            EditError: It is not such data; names the tensor.
        """
        if not isinstance(data, Mapping):
            raise EditError("weights are tensors by name", found=type(data).__name__, expected="an object")
        return Weights({str(name): _tensor(str(name), item) for name, item in data.items()})

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def read(value: Any) -> Weights:
            try:
                return value if isinstance(value, Weights) else Weights.from_dict(value)
            except EditError as error:
                raise ValueError(str(error)) from error

        return core_schema.no_info_plain_validator_function(read)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {
            "type": "object",
            "description": "Tensors by name; data is base64 of the little-endian bytes.",
            "additionalProperties": {
                "type": "object",
                "required": ["dtype", "shape", "data"],
                "additionalProperties": False,
                "properties": {
                    "dtype": {"enum": sorted(_DTYPES)},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "data": {"type": "string", "contentEncoding": "base64"},
                },
            },
        }


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def _tensor(name: str, item: Any) -> torch.Tensor:
    if not isinstance(item, Mapping) or set(item) != {"dtype", "shape", "data"}:
        raise EditError("not a tensor", path=name, expected="an object of dtype, shape and data")
    dtype, shape, data = item["dtype"], item["shape"], item["data"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise EditError("no such type of values", path=name, found=dtype)
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size >= 0 for size in shape):
        raise EditError("not a shape", path=name, found=shape)
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise EditError(f"the data is not base64: {error}", path=name) from error
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if len(content) != size:
        raise EditError("the data has not the length of its shape", path=name, found=len(content), expected=size)
    if not content:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(_DTYPES[dtype]).reshape(shape).clone()
