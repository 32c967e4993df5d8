"""How a picture becomes a model's input: resize, crop, normalise."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torchtrim.errors import InputError, MissingDependency, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_CHANNELS = ("RGB", "BGR", "L")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROP_PCT = 0.875  # by timm's convention, where a model's configuration does not say


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a picture before a model sees it.

    A picture is turned upright (by its EXIF tag), converted to `channels`, resized with antialiasing, cropped in the
    middle (past its edges is black), divided by 255, less `mean` and over `std`.

    Attributes:
        crop: Height and width of the model's input.
        resize: The length of the shorter side before the crop, or height and width; None: not resized.
        fit: With a height and a width: `squash` to exactly these, or `cover` them and keep the picture's shape.
        interpolation: `nearest`, `bilinear`, `bicubic`, `lanczos`, `box` or `hamming`, as Pillow has them.
        mean: For each channel, of values between 0 and 1, in the model's order of channels.
        std: For each channel.
        channels: `RGB`, `BGR`, or `L` for grey.

    Raises:
        InputError: A size, a number or a name that makes no sense.

    Example:
        >>> from PIL import Image
        >>> usual = Preprocessing(crop=(224, 224), resize=256, interpolation="bilinear")
        >>> usual.apply(Image.new("L", (300, 200))).shape
        (3, 224, 224)
    """

    crop: tuple[int, int]
    resize: int | tuple[int, int] | None = None
    fit: str = "squash"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    channels: str = "RGB"

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", _pair("crop", self.crop))
        if self.resize is not None and (isinstance(self.resize, bool) or not isinstance(self.resize, int)):
            object.__setattr__(self, "resize", _pair("resize", self.resize))
        elif isinstance(self.resize, int) and self.resize < 1:
            raise InputError("resize is a positive length", found=self.resize)
        for name, known in (("interpolation", _INTERPOLATIONS), ("channels", _CHANNELS), ("fit", ("squash", "cover"))):
            value = getattr(self, name)
            if value not in known:
                hint = nearest(value, known) if isinstance(value, str) else None
                raise InputError(f"unknown {name}", found=value, expected=", ".join(known), hint=hint)
        wanted = 1 if self.channels == "L" else 3
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), wanted))
        if min(self.std) <= 0:
            raise InputError("std is positive", found=self.std)

    @staticmethod
    def of(source: Any) -> Preprocessing:
        """What a model, or the weights it was trained with, say of it.

        Args:
            source: A model with a configuration by timm's convention (`pretrained_cfg`), that configuration, or
                weights of torchvision (`ResNet18_Weights.DEFAULT`, which torchvision's models do not carry) or
                their `transforms()`. A `Preprocessing` is given back.

        Raises:
            InputError: It says nothing of pictures, or asks for something that this class does not do.

        Example:
            >>> Preprocessing.of({"input_size": (3, 160, 160), "crop_pct": 0.95, "interpolation": "bilinear"}).resize
            168
        """
        if isinstance(source, Preprocessing):
            return source
        transforms = getattr(source, "transforms", None)
        preset = transforms() if callable(transforms) else source
        if all(hasattr(preset, name) for name in ("crop_size", "resize_size", "mean", "std", "interpolation")):
            return _of_preset(preset)
        config = source if isinstance(source, Mapping) else getattr(source, "pretrained_cfg", None)
        if isinstance(config, Mapping) and config.get("input_size"):
            return _of_config(config)
        raise InputError(
            "nothing says how its pictures are prepared",
            found=type(source).__name__,
            expected="a model with a pretrained_cfg, or weights of torchvision",
            hint="Preprocessing(crop=(224, 224), resize=256, ...), or Preprocessing.of(ResNet18_Weights.DEFAULT)",
        )

    def apply(self, picture: Image.Image | str | os.PathLike[str]) -> NDArray[np.float32]:
        """A picture as the model takes it: `(channels, height, width)` in float32.

        Args:
            picture: A picture of Pillow's in any mode, or the path of one.

        Raises:
            InputError: It cannot be read.
            MissingDependency: Pillow is not installed.
        """
        try:
            from PIL import Image

            from torchtrim.export.predict import prepare
        except ImportError as error:
            raise MissingDependency("Pillow and ONNX Runtime are needed", hint="pip install pillow") from error
        if not isinstance(picture, (str, os.PathLike)):
            return prepare(picture, self.settings())[0]  # type: ignore[no-any-return]
        try:
            with Image.open(picture) as opened:
                return prepare(opened, self.settings())[0]  # type: ignore[no-any-return]
        except OSError as error:
            raise InputError(f"the picture cannot be read: {error}", path=picture) from error

    def settings(self, *, in_graph: str = "nothing", dtype: str = "float32") -> dict[str, Any]:
        """What `predict.py` reads, ready for JSON.

        Args:
            in_graph: What the file does by itself: `nothing`, `normalise` or `everything`.
            dtype: The type of the model's input.
        """
        return {**self.to_dict(), "filter": self.interpolation.upper(), "in_graph": in_graph, "dtype": dtype}

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        height, width = self.crop
        if isinstance(self.resize, tuple):
            how = "resized to" if self.fit == "squash" else "resized to cover"
            first = f"{how} {self.resize[0]} x {self.resize[1]} ({self.interpolation}), "
        else:
            first = "" if self.resize is None else f"shorter side resized to {self.resize} ({self.interpolation}), "
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{self.channels}, {first}middle {height} x {width}, over 255, less ({mean}), over ({std})"


def _of_preset(preset: Any) -> Preprocessing:
    crop, resize = list(preset.crop_size), list(preset.resize_size)
    interpolation = getattr(preset.interpolation, "value", preset.interpolation)
    if len(crop) > 2 or not all(isinstance(size, int) for size in (*crop, *resize)):
        raise InputError("not the preparation of single pictures", found=type(preset).__name__)
    return Preprocessing(
        crop=(crop[0], crop[-1]),
        resize=resize[0] if len(resize) == 1 else (resize[0], resize[1]),
        interpolation=str(interpolation),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _of_config(config: Mapping[str, Any]) -> Preprocessing:
    channels, height, width = (int(size) for size in config["input_size"])
    share = config.get("crop_pct") or _CROP_PCT
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise InputError("a way to crop that is not known here", found=mode, expected="center or squash")
    scaled = (math.floor(height / share), math.floor(width / share))
    keep = mode == "center"
    mean, std = config.get("mean") or _IMAGENET_MEAN, config.get("std") or _IMAGENET_STD
    return Preprocessing(
        crop=(height, width),
        resize=scaled[0] if keep and scaled[0] == scaled[1] else scaled,
        fit="cover" if keep and scaled[0] != scaled[1] else "squash",
        interpolation=config.get("interpolation") or "bicubic",
        mean=tuple(mean),
        std=tuple(std),
        channels="L" if channels == 1 else "RGB",
    )


def _pair(name: str, given: Any) -> tuple[int, int]:
    whole = isinstance(given, (tuple, list)) and len(given) == 2
    if not whole or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in given):
        raise InputError(f"{name} is a height and a width", found=given, expected="(224, 224)")
    return (given[0], given[1])


def _numbers(name: str, given: Any, wanted: int) -> tuple[float, ...]:
    if not isinstance(given, (tuple, list)) or len(given) != wanted:
        raise InputError(f"{name} has a value for each channel", found=given, expected=wanted)
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) or not math.isfinite(n) for n in given):
        raise InputError(f"{name} holds finite numbers", found=given)
    return tuple(float(n) for n in given)
