"""Our own format, which `deltaserve convert` writes: delta.json and delta.safetensors, a lowered delta as it is."""

from deltaserve.formats.native.reading import lower
from deltaserve.formats.native.writing import write

__all__ = ["lower", "write"]
