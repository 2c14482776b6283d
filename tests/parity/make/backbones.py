"""Writes the tiny backbone of each family that oracles are made on: `python -P -m make.backbones`, before the others.

The numbers come from torch's generator and the sizes from families.py. The config holds only what every version of
transformers reads alike.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from drawn import drawn
from families import FAMILIES
from make.recorded import ORACLES, SEED
from safetensors.torch import save_file

NAMES = ("bert", "roberta", "t5", "flan-t5", "gpt2", "opt", "llama", "qwen3", "gemma2")
LATER = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "layer_types", "use_cache")
"""Keys that one version writes and another reads otherwise."""


OWN: Mapping[str, tuple[str, Mapping[str, Any]]] = {"opendelta-llama": ("llama", {"attention_bias": False})}
"""What one library needs otherwise: OpenDelta's transformers knows no biases in Llama's attention."""


def write(name: str) -> None:
    of, changed = OWN.get(name, (name, {}))
    family, folder = FAMILIES[of], ORACLES / "backbones" / name
    given = family.config()
    given.update(dict(changed))
    model = getattr(transformers, family.auto).from_config(given)
    drawn(model, SEED)
    model.tie_weights()
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in LATER}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    kept: dict[int, str] = {}
    for key, tensor in model.state_dict().items():
        kept.setdefault(tensor.data_ptr(), key)
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key in kept.values()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(SEED)
    for name in sys.argv[1:] or (*NAMES, *OWN):
        write(name)


if __name__ == "__main__":
    main()
