"""Checkpoints of PEFT (github.com/huggingface/peft): adapter_config.json and adapter_model.safetensors."""

from deltaserve.formats.peft.types import KINDS, lower

__all__ = ["KINDS", "lower"]
