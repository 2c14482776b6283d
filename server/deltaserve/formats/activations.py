"""The names that transformers and the libraries on it give to activations, and what they are called here."""

from collections.abc import Mapping

from deltaserve.errors import FailedPrecondition
from deltaserve.formats.options import shown, wrong

TRANSFORMERS: Mapping[str, str | None] = {
    "gelu": "gelu",
    "gelu_10": "gelu_10",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "laplace": "laplace",
    "leaky_relu": "leaky_relu",
    "linear": None,
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""By the names of `transformers.activations.get_activation`; those that learn something of their own are not served."""


def activation(value: object, key: str, own: Mapping[str, str | None]) -> str | None:
    """What a config's key names, by a library's own words first, in any case of letters. None is identity.

    Raises BadCheckpoint for what is no name, FailedPrecondition for one that this release does not serve.
    """
    if not isinstance(value, str):
        raise wrong(key, f"is {shown(value)}; the name of an activation is expected")
    known = {**TRANSFORMERS, **own}
    if value.lower() not in known:
        raise FailedPrecondition(
            f"config key {key!r} is {shown(value)}; this release serves {', '.join(sorted(known))}",
            reason="OPTION_NOT_SERVED",
            metadata={"key": key},
        )
    return known[value.lower()]
