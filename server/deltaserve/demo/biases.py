"""BitFit (arXiv 2106.10199): a bias at each linear of a backbone that has none, written as a converted delta.

No library stores BitFit of a T5, so it stands on disk as `deltaserve convert` would write it.
"""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaserve.backbone.load import load
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import Affine
from deltaserve.deltas.sites import Task
from deltaserve.demo.tasks import BACKBONE, Recipe
from deltaserve.formats import native
from deltaserve.formats.weighed import Weighed


def attach(recipe: Recipe, backbone: Any) -> Any:
    """A copy of the backbone, frozen but for fresh biases of zero."""
    model = copy.deepcopy(backbone).requires_grad_(False)
    for _, linear in _linears(model):
        linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    return model


def save(recipe: Recipe, model: Any, folder: Path) -> None:
    """Writes `delta.json` and `delta.safetensors`."""
    at = {name: (Affine(shift=linear.bias.detach()),) for name, linear in _linears(model)}
    size = sum(4 * linear.out_features for _, linear in _linears(model))
    delta = Delta(("bitfit",), at, Task.GENERATION, Provenance("deltaserve", "", size, len(at), BACKBONE))
    bare = copy.deepcopy(model)
    for _, linear in _linears(bare):
        linear.register_parameter("bias", None)
    with tempfile.TemporaryDirectory() as place:
        bare.save_pretrained(place)
        backbone = load(place, served_name=BACKBONE, tokenized=False, dtype="float32", device="cpu")
    folder.parent.mkdir(parents=True, exist_ok=True)
    native.write(delta, folder, backbone.spec, Weighed(backbone.weights), replace=True)


def _linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".block." in name:
            yield name, module
