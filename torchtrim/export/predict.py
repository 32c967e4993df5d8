"""Say what is in pictures: `python predict.py PICTURE...`; needs onnxruntime, numpy and pillow."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(picture: Image.Image, how: dict[str, Any]) -> np.ndarray[Any, Any]:
    """A picture as the model takes it, as a batch of one; `how` is what preprocessing.json says."""
    picture = ImageOps.exif_transpose(picture).convert("L" if how["channels"] == "L" else "RGB")
    if how["in_graph"] != "everything":
        (width, height), resize, kernel = picture.size, how["resize"], Image.Resampling[how["filter"]]
        if isinstance(resize, int):  # the shorter side
            short = min(width, height)
            picture = picture.resize((resize * width // short, resize * height // short), kernel)
        elif resize is not None:
            ratio = min(height / resize[0], width / resize[1])
            size = [round(height / ratio), round(width / ratio)] if how["fit"] == "cover" else resize
            picture = picture.resize((size[1], size[0]), kernel)
        over = [picture.height - how["crop"][0], picture.width - how["crop"][1]]
        top, left = [round(n / 2) if n > 0 else int(n / 2) for n in over]  # past the edges is black
        picture = picture.crop((left, top, left + how["crop"][1], top + how["crop"][0]))
    pixels = np.asarray(picture).reshape(1, picture.height, picture.width, -1)
    if how["in_graph"] != "nothing":
        return pixels
    pixels = pixels[..., ::-1] if how["channels"] == "BGR" else pixels
    floats = (pixels.astype(np.float32) / np.float32(255) - np.float32(how["mean"])) / np.float32(how["std"])
    return np.ascontiguousarray(floats.transpose(0, 3, 1, 2), dtype=how["dtype"])


def main(pictures: list[str], folder: Path) -> None:
    """Print the five likeliest classes of each picture."""
    how = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
    names = folder / "labels.json"
    labels = json.loads(names.read_text(encoding="utf-8")) if names.is_file() else None
    session = onnxruntime.InferenceSession(str(folder / how["model"]), providers=how["providers"])
    outputs = session.get_outputs()  # of several, the one that is named, or the first of the form (batch, classes)
    output = how.get("output") or next((each for each in outputs if len(each.shape) == 2), outputs[0]).name
    for name in pictures:
        with Image.open(name) as picture:
            scores = session.run([output], {how["input"]: prepare(picture, how)})[0][0].astype(np.float64)
        if scores.min() >= 0 and abs(scores.sum() - 1) <= 1e-3:
            shares = scores  # the model ends in a softmax
        else:
            shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        print(name)
        for index in np.argsort(-scores, kind="stable")[:5]:
            print(f"  {shares[index]:7.2%}  {index}" + (f"  {labels[index]}" if labels else ""))


if __name__ == "__main__":
    main(sys.argv[1:], Path(__file__).resolve().parent)
