"""Checkpoints that OpenDelta 0.3 wrote: config.json and pytorch_model.bin, or the same tensors as safetensors."""

from deltaserve.formats.opendelta.types import lower

__all__ = ["lower"]
