"""The demo's pictures: scikit-learn's 1,797 handwritten digits, grown to a size that an ImageNet model can read."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Digits:
    """Pictures `(N, 3, pixels, pixels)` in [-1, 1] with their labels `(N,)`; the test part is never trained on."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits(pixels: int = 64) -> Digits:
    """The digits as colour pictures, a quarter of each digit's held out.

    Args:
        pixels: Height and width to resize the 8 x 8 pictures to.

    Source: `sklearn.datasets.load_digits`, the test part of the UCI set "Optical Recognition of Handwritten Digits".

    Example:
        >>> digits = load_digits(pixels=16)
        >>> digits.train_images.shape, digits.test_images.shape
        (torch.Size([1347, 3, 16, 16]), torch.Size([450, 3, 16, 16]))
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    raw = datasets.load_digits()
    train, test = train_test_split(range(len(raw.target)), test_size=0.25, stratify=raw.target, random_state=0)
    grey = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    grown = torch.nn.functional.interpolate(grey, size=(pixels, pixels), mode="bicubic").clamp(0, 1)
    images = (grown * 2 - 1).repeat(1, 3, 1, 1)
    labels = torch.tensor(raw.target)
    return Digits(images[train], labels[train], images[test], labels[test])
