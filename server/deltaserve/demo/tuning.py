"""PEFT's tuners on the frozen backbone, and what they leave on disk. The only file here that imports peft."""

import copy
import json
from pathlib import Path
from typing import Any

from deltaserve.demo.tasks import BACKBONE, Recipe


def attach(recipe: Recipe, backbone: Any) -> Any:
    """A copy of the backbone, frozen, with the recipe's fresh tuner on it."""
    import peft

    configurations = {
        "lora": peft.LoraConfig,
        "ia3": peft.IA3Config,
        "prefix-tuning": peft.PrefixTuningConfig,
        "prompt-tuning": peft.PromptTuningConfig,
    }
    configuration = configurations[recipe.method](task_type="SEQ_2_SEQ_LM", **recipe.options)
    return peft.get_peft_model(copy.deepcopy(backbone), configuration)


def save(recipe: Recipe, model: Any, folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, without a trace of this machine."""
    model.peft_config["default"].base_model_name_or_path = BACKBONE
    # PEFT would ask the Hub whether the backbone's vocabulary was resized; it was not.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text())
    for key in ("target_modules", "feedforward_modules"):  # sets: their order differs from run to run
        if isinstance(written.get(key), list):
            written[key].sort()
    file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
