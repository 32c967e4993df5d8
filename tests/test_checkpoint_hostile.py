"""Two hundred and more files that are damaged or forged: none runs code, none crashes, each is a clear error."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import resource
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.checkpoint.load import load, read_history
from torchtrim.checkpoint.plain import to_plain
from torchtrim.checkpoint.save import save
from torchtrim.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    CheckpointTooNew,
    CheckpointUntrusted,
)

X = torch.zeros(1, 3, 9, 9)
HEAD = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 5, 3))


def good(folder: Path) -> bytes:
    net = tt.attach_head(tt.cut(model(), X, after="2"), X, head=HEAD)
    path = folder / "good.trim"
    optimizer = torch.optim.AdamW(net.parameters())
    net.eval()(X).sum().backward()
    optimizer.step()
    save(net, path, optimizer=optimizer)
    return path.read_bytes()


class Forged:
    """A file taken apart, to be changed and put together again with checksums that are right."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        self.table: dict[str, Any] = json.loads(data[8 : 8 + length])
        self.texts: dict[str, Any] = self.table.pop("__metadata__")
        self.document: dict[str, Any] = json.loads(self.texts["torchtrim"])
        self.data = data[8 + length :]
        self.raw: str | None = None  # the document's text, instead

    def bytes(self) -> bytes:
        texts = {**self.texts, "torchtrim": json.dumps(self.document) if self.raw is None else self.raw}
        if isinstance(texts.get("torchtrim_tensors"), str):
            texts["torchtrim_tensors"] = "".join(self._sum(item) for item in self.table.values())
        texts["torchtrim_header"] = "00000000"
        blank = self._header(texts)
        texts["torchtrim_header"] = f"{zlib.crc32(blank):08x}"
        header = self._header(texts)
        return len(header).to_bytes(8, "little") + header + self.data

    def _header(self, texts: dict[str, Any]) -> bytes:
        return json.dumps({"__metadata__": texts, **self.table}, separators=(",", ":")).encode()

    def _sum(self, item: Any) -> str:
        try:
            begin, end = item["data_offsets"]
            return f"{zlib.crc32(self.data[begin:end]):08x}"
        except (KeyError, TypeError, ValueError):
            return "00000000"


Change = Callable[[Forged], Any]
Case = tuple[str, bytes, type[CheckpointError]]


def cases(data: bytes) -> Iterator[Case]:
    yield from accidents(data)
    yield from other_files(data)
    for group in (tables, texts, documents, factories, edits):
        for name, change, error in group():
            forged = Forged(data)
            change(forged)
            yield f"{group.__name__}: {name}", forged.bytes(), error


def accidents(data: bytes) -> Iterator[Case]:
    """Cut short, bits turned, bytes lost, doubled and added: at places all over the file."""
    start = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    for end in [0, 1, 7, 8, 9, 10, start - 1, start, start + 1, len(data) - 1, *rng.sample(range(len(data)), 25)]:
        yield f"cut at {end}", data[:end], CheckpointDamaged
    places = [*range(8), 8, 9, start - 1, start, len(data) - 1, *rng.sample(range(len(data)), 60)]
    for place in places:
        turned = bytearray(data)
        turned[place] ^= 1 << rng.randrange(8)
        yield f"a bit turned at {place}", bytes(turned), CheckpointDamaged
    for place in rng.sample(range(len(data)), 5):
        yield f"a byte lost at {place}", data[:place] + data[place + 1 :], CheckpointDamaged
        yield f"a byte doubled at {place}", data[:place] + data[place : place + 1] + data[place:], CheckpointDamaged
    yield "more at the end", data + b"\0" * 64, CheckpointDamaged
    yield "twice", data + data, CheckpointDamaged


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not be seen",))


def other_files(data: bytes) -> Iterator[Case]:
    stream = io.BytesIO()
    torch.save({"weight": torch.zeros(1)}, stream)
    table = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    files = {
        "a text": b"Dear reader,\n" * 40,
        "zeros": b"\0" * 5000,
        "torch.save": stream.getvalue(),
        "a pickle": pickle.dumps(Evil()),
        "an old pickle": pickle.dumps(Evil(), protocol=0) + b" " * 20,
        "a script": b"#!/bin/sh\necho this must not be seen\n",
        "plain safetensors": len(table).to_bytes(8, "little") + table + b"\0" * 4,
        "an empty header": (2).to_bytes(8, "little") + b"{}",
        "a header that is a list": (2).to_bytes(8, "little") + b"[]",
        "deep arrays": _raw(b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "deep objects": _raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a header that never closes": _raw(b'{"a":' * 1000),
        "bytes that are no text": _raw(b'{"\xff\xfe":1}'),
        "a number without end": _raw(b'{"a":' + b"9" * 10_000 + b"}"),
        "not a number": _raw(b'{"a":NaN}'),
        "a key twice": _raw(b'{"__metadata__":{},"__metadata__":{}}'),
    }
    for name, content in files.items():
        yield name, content, CheckpointDamaged
    for length in (0, 1, 100_000_001, 2**31, 2**32, 2**62, 2**63, 2**64 - 1):
        yield f"a header of {length}", length.to_bytes(8, "little") + data[8:], CheckpointDamaged


def _raw(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def tables() -> Iterator[tuple[str, Change, type[CheckpointError]]]:
    """The table of tensors."""

    def entry(key: str, value: Any) -> Change:
        return lambda f: f.table["model.0.weight"].__setitem__(key, value)

    values: list[tuple[str, Any]] = [
        ("dtype", "F31"), ("dtype", 7), ("dtype", "F64"), ("dtype", None), ("dtype", "U8"),
        ("shape", [4, 3, 3, 2**50]), ("shape", [-4, -3, 3, 3]), ("shape", [4.0, 3, 3, 3]), ("shape", "4"),
        ("shape", [0]),        ("shape", [2**40, 2**40]), ("shape", [1] * 100), ("shape", [True, 108]), ("shape", {}),
        ("data_offsets", [0, 0]), ("data_offsets", [0]), ("data_offsets", [-8, 424]),
        ("data_offsets", [2**60, 2**60 + 432]),        ("data_offsets", [432, 0]), ("data_offsets", None), ("more", 1),
    ]  # fmt: skip
    for key, value in values:
        yield f"{key} {value}"[:60], entry(key, value), CheckpointDamaged
    yield "a list", lambda f: f.table.__setitem__("model.0.weight", []), CheckpointDamaged
    yield "overlap", lambda f: f.table["model.0.bias"].update(f.table["model.1.bias"]), CheckpointDamaged
    yield "a name for nothing", _renamed("model.0.bias", "evil"), CheckpointDamaged
    yield "a weight less", _renamed("model.0.bias", "model.0.sabi"), CheckpointMismatch
    yield "another module", _renamed("model.0.bias", "model.9.bias"), CheckpointMismatch
    yield "a record's weight less", _renamed("edits.0.", "loose."), CheckpointDamaged
    yield "no optimizer's", _renamed("optimizer.", "loose."), CheckpointDamaged

    def empty(forged: Forged) -> None:
        forged.table, forged.data = {}, b""

    yield "no tensors", empty, CheckpointError

    def huge(forged: Forged) -> None:
        end = len(forged.data)
        forged.table["model.huge"] = {"dtype": "F32", "shape": [0, 2**47, 2**47], "data_offsets": [end, end]}

    yield "an empty tensor of a huge shape", huge, CheckpointError


def _renamed(old: str, new: str) -> Change:
    def change(forged: Forged) -> None:
        forged.table = {
            name.replace(old, new) if name.startswith(old) else name: item for name, item in forged.table.items()
        }

    return change


def texts() -> Iterator[tuple[str, Change, type[CheckpointError]]]:
    """The texts of the metadata."""
    for version in ("3", "17", "99999999999999999999"):
        yield f"format {version}", lambda f, v=version: f.texts.update(torchtrim_format=v), CheckpointTooNew
    for version in ("", "0", "-1", "one", "1.0", "٢", "1 "):
        yield f"format {version!r}", lambda f, v=version: f.texts.update(torchtrim_format=v), CheckpointDamaged
    yield "no format", lambda f: f.texts.pop("torchtrim_format"), CheckpointDamaged
    yield "a number", lambda f: f.texts.update(torchtrim_format=1), CheckpointDamaged
    yield "one too many", lambda f: f.texts.update(more="x"), CheckpointDamaged
    yield "no types", lambda f: f.texts.pop("torchtrim_dtypes"), CheckpointDamaged
    for types in ("", "[]", "1", '{"x": "float8_e5m2"}', '{"model.0.weight": "complex64"}', '{"model.0.weight": {}}'):
        yield f"types {types}", lambda f, t=types: f.texts.update(torchtrim_dtypes=t), CheckpointDamaged
    yield "sums", lambda f: f.texts.update(torchtrim_tensors=1), CheckpointDamaged
    for raw in (
        "",
        "null",
        "[]",
        "{}",
        "{",
        "[" * 100_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        '{"a": 1e999}',
        '{"a": NaN}',
    ):
        yield f"document {raw[:20]}", lambda f, r=raw: setattr(f, "raw", r), CheckpointDamaged


def documents() -> Iterator[tuple[str, Change, type[CheckpointError]]]:
    """The description of the model."""
    keys = [
        "torchtrim", "versions", "factory", "history", "weights", "parameters", "tied", "shared", "strides", "flags",
        "training", "settings", "loose", "optimizer",
    ]  # fmt: skip
    for key in keys:
        yield f"no {key}", lambda f, k=key: f.document.pop(k), CheckpointDamaged
        yield f"{key} a number", lambda f, k=key: f.document.update({k: 3.5}), CheckpointDamaged
        yield f"{key} a list of lists", lambda f, k=key: f.document.update({k: [[[]]]}), CheckpointDamaged
    yield "a key more", lambda f: f.document.update(code="import os"), CheckpointDamaged
    mismatches: dict[str, Any] = {
        "parameters": [], "flags": ["0.weight", "1.num_batches_tracked"], "tied": {"0.bias2": "0.bias"},
        "shared": {"0.more": "0.weight"}, "training": {"": True, "no.such": False},
        "settings": {"2": {"forward": 1}}, "kinds": {"2": "GELU"}, "held": ["no.such"],
    }  # fmt: skip
    for key, value in mismatches.items():
        yield f"{key} {value}"[:50], lambda f, k=key, v=value: f.document.update({k: v}), CheckpointMismatch
    for name in ("__class__", "forward", "_modules", "_parameters", "training", "_forward_hooks", "_torchtrim_history"):
        yield f"set {name}", lambda f, n=name: f.document.update(settings={"": {n: 1}}), CheckpointMismatch
    damages: list[tuple[str, Any]] = [
        ("tied", {"a": "b"}), ("tied", {"a": "a"}), ("tied", {"a": "b", "b": "a"}), ("tied", {"0.weight": "0.bias"}),
        ("shared", {"a": "a"}), ("shared", {"a": "b", "b": "0.bias"}), ("strides", {"0.weight": [0, 0, 0, 0]}),
        ("strides", {"0.weight": [2**40, 9, 3, 1]}), ("strides", {"0.weight": [-27, 9, 3, 1]}),
        ("strides", {"no": [1]}),        ("strides", {"0.weight": [1]}), ("loose", ["x"]), ("weights", []),
        ("weights", [{"at": [], "names": []}]), ("weights", [{"at": ["entries", 0], "names": ["no"]}]),
        ("weights", [{"at": ["entries", 99, "edit"], "names": []}]),
        ("settings", {"": {"a": {"code": "import os"}}}), ("settings", {"": {"a": {"float": "x"}}}),
    ]  # fmt: skip
    for key, value in damages:
        yield f"{key} {value}"[:50], lambda f, k=key, v=value: f.document.update({k: v}), CheckpointError
    yield "no flag of its own", lambda f: f.document.update(training={}), CheckpointMismatch
    inputs = [
        {"shape": [2**40], "dtype": "float32"}, {"shape": [2**20, 2**20, 2**20], "dtype": "float64"},
        {"shape": [-1, 3], "dtype": "float32"}, {"shape": ["a"], "dtype": "float32"}, {"shape": [1], "dtype": "load"},
        {"shape": [1], "dtype": "quint8"}, {"shape": [1, 3, 9, 9], "dtype": 7}, "text", [], {"tuple": 5},
    ]  # fmt: skip
    for value in inputs:
        spec = {"args": [value], "kwargs": {}}
        yield f"inputs {value}"[:60], lambda f, s=spec: f.document["history"].update(inputs=s), CheckpointMismatch
    for spec in ({}, {"args": 3, "kwargs": {}}, {"args": [], "kwargs": 3}, []):
        yield f"inputs {spec}", lambda f, s=spec: f.document["history"].update(inputs=s), CheckpointError


def factories() -> Iterator[tuple[str, Change, type[CheckpointError]]]:
    """What makes the model: not code of the file's choice, and no weights from elsewhere."""
    untrusted: list[tuple[str, dict[str, Any]]] = [
        ("os:system", {"command": "touch evil"}), ("builtins:exec", {"source": "1/0"}), ("builtins:eval", {}),
        ("subprocess:Popen", {"args": ["true"]}), ("pickle:loads", {}), ("torch:load", {"f": "x"}),
        ("torch.hub:load", {}),        ("importlib:import_module", {"name": "antigravity"}), ("antigravity:x", {}),
        ("", {}), (":", {}), ("os", {}),
        ("timm.models:create_model", {"model_name": "resnet18", "checkpoint_path": "x"}), ("torch.nn:Linear", {}),
        ("timm:hf-hub:someone/model", {}), ("timm:local-dir:/etc", {}), ("timm:../resnet18", {}), ("timm:", {}),
        ("timm:resnet18", {"pretrained": True}), ("timm:resnet18", {"checkpoint_path": "evil.pth"}),
        ("timm:resnet18", {"pretrained_cfg": {"url": "http://x"}}), ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("torchvision:fcn_resnet50", {"weights_backbone": "DEFAULT"}), ("TIMM:resnet18", {}), ("timm;x:resnet18", {}),
    ]  # fmt: skip
    for name, arguments in untrusted:
        yield f"{name} {list(arguments)}", _factory(name, arguments), CheckpointUntrusted
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("timm:no_such_model", {}), ("torchvision:no_such_model", {}), ("timm:test_resnet", {}),
        ("timm:test_resnet", {"num_classes": 10**13}),
        ("timm:test_resnet", {"num_classes": 2 * 10**8}), ("timm:test_resnet", {"num_classes": -5}),
        ("timm:test_resnet", {"nonsense": 1}), ("timm:test_resnet", {"num_classes": "many"}),
        ("timm:test_vit", {"img_size": 10**6}), ("torchvision:resnet18", {"width_per_group": 10**9}),
    ]  # fmt: skip
    for name, arguments in wrong:
        yield f"{name} {arguments}", _factory(name, arguments), CheckpointError
    for arguments in ([], 3, {"dict": 3}, {"dict": [[1, 2]]}, {"dict": [["a"]]}, {"list": []}, {"dict": [[["a"], 1]]}):
        yield (
            f"arguments {arguments}",
            lambda f, a=arguments: f.document.update(factory={"name": "timm:test_resnet", "arguments": a}),
            CheckpointError,
        )


def _factory(name: str, arguments: dict[str, Any]) -> Change:
    plain = to_plain(arguments)
    return lambda f: f.document.update(factory={"name": name, "arguments": plain})


def edits() -> Iterator[tuple[str, Change, type[CheckpointError]]]:
    """The history."""

    def entry(**changes: Any) -> Change:
        return lambda f: f.document["history"]["entries"][0].update(changes)

    def edit(**changes: Any) -> Change:
        return lambda f: f.document["history"]["entries"][0]["edit"].update(changes)

    wrong = [
        {"kind": "run_code"}, {"kind": None}, {"kind": ["cut"]}, {"kind": "edit", "after": None},
        {"version": 0}, {"version": "1"}, {"after": 7}, {"after": [7]}, {"after": [[["layer"]]]},
        {"names": 3}, {"single": "perhaps"}, {"code": "import os"}, {"kind": "attach_head"},
    ]  # fmt: skip
    for changes in wrong:
        yield f"{changes}", edit(**changes), CheckpointDamaged
    for version in (2, 10**30):
        yield f"version {version}", edit(version=version), CheckpointTooNew

    def later(forged: Forged, **changes: Any) -> None:
        edit(**changes)(forged)
        forged.document["torchtrim"] = "99.0.1"

    yield "a kind of a later version", lambda f: later(f, kind="run_code"), CheckpointTooNew
    yield "a key of a later version", lambda f: f.document.update(code=1, torchtrim="0.2"), CheckpointTooNew
    for after in ("no.such", "", ":", "2#9", ":add", "../../etc/passwd", "0.weight", "__class__", "2:__import__('os')"):
        yield f"after {after!r}", edit(after=[after]), CheckpointMismatch
    for changes in (
        {"params_before": "many"},
        {"params_after": None},
        {"edit": 3},
        {"notes": 3},
    ):
        yield f"{changes}", entry(**changes), CheckpointDamaged
    yield "no entries", lambda f: f.document["history"].pop("entries"), CheckpointDamaged
    yield "entries of nothing", lambda f: f.document["history"].update(entries=[None]), CheckpointDamaged


def test_each_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = good(tmp_path)
    every = list(cases(data))
    assert len(every) >= 200
    assert Forged(data).bytes()  # the forger's own files are right, where nothing was changed:
    path = tmp_path / "case.trim"
    path.write_bytes(Forged(data).bytes())
    load(path, model=model())
    seen: list[str] = []
    watched = {"os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "socket.connect", "pickle.find_class"}
    watching = [True]
    sys.addaudithook(lambda event, args: seen.append(event) if watching[0] and event in watched else None)
    before, kilobytes = model(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    given = copy.deepcopy(before)
    wrong = []
    for name, content, expected in every:
        path.write_bytes(content)
        try:
            load(path, model=None if name.startswith("factories") else given)
        except expected as error:
            if str(path) not in str(error) or len(str(error)) > 1500:
                wrong.append(f"{name}: not a clear message: {error}")
        except (Exception, SystemExit) as error:  # noqa: BLE001
            wrong.append(f"{name}: {type(error).__name__} instead of {expected.__name__}: {error}")
        else:
            wrong.append(f"{name}: was loaded")
        try:
            read_history(path)
        except CheckpointError:
            continue
        except (Exception, SystemExit) as error:  # noqa: BLE001
            wrong.append(f"{name}: its history: {type(error).__name__}: {error}")
    watching[0] = False
    assert not wrong, f"{len(wrong)} of {len(every)}\n" + "\n".join(line[:400] for line in wrong)
    assert not seen
    assert "must not be seen" not in capsys.readouterr().out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes < 600_000  # 600 MB
    for one, other in zip(before.state_dict().values(), given.state_dict().values(), strict=True):
        assert torch.equal(one, other)
