"""Checkpoints of PEFT (github.com/huggingface/peft): adapter_config.json and adapter_model.safetensors."""

from deltaserve.formats.peft.types import lower

__all__ = ["lower"]
