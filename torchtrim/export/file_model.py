"""An ONNX file that is called like the model it came from, so that one function evaluates both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportError
from torchtrim.graph.copying import kept_random_state, structural_copy
from torchtrim.graph.inputs import Inputs


class FileModel(nn.Module):
    """An ONNX file in ONNX Runtime as a module: it takes what the model takes, and returns what the model returns.

    Its only parameter is an empty one on the model's device, for code that asks a model where it is. Gradients do not
    flow through it.

    Args:
        path: The file, exported from the model.
        model: The model; it is run once, to see what its output is made of. It is left as it was.
        example: Example inputs.
        providers: ONNX Runtime's execution providers; the CPU's by default.
        threads: Threads; PyTorch's present number by default.

    Raises:
        ExportError: The file does not open, or has another number of outputs than the model.

    Example:
        >>> import tempfile
        >>> from torchtrim import export_onnx
        >>> net, x = nn.Linear(4, 2).eval(), torch.randn(3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_onnx(net, x, f"{folder}/net.onnx", benchmark=False)
        ...     file = FileModel(report.path, net, Inputs.of(x))
        ...     bool(torch.allclose(file(x), net(x), atol=1e-5))
        True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        example: Inputs,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        device = next((held.device for held in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self._session = OnnxSession(path, providers=providers, threads=threads)
        twin = structural_copy(model, own_buffers=True, user_hooks=False).eval()
        with torch.no_grad(), kept_random_state():
            leaves, self._form = pytree.tree_flatten(example.fresh().call(twin))
        self._leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        names = self._session.output_names
        if len(names) != len(self._places):
            raise ExportError(
                "the file does not return as many tensors as the model",
                path=path,
                found=len(names),
                expected=len(self._places),
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file."""
        inputs = Inputs(args, kwargs)
        feed = self._session.feed(inputs, cast=True)
        device = next((tensor.device for tensor in inputs.tensors), torch.device("cpu"))
        leaves = list(self._leaves)
        for place, array in zip(self._places, self._session.run(feed), strict=True):
            leaves[place] = torch.from_numpy(array).to(device)
        return pytree.tree_unflatten(leaves, self._form)
