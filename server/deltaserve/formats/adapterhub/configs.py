"""What an AdapterHub config says: the parts that act, each with its architecture and all of its keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import activations, options
from deltaserve.formats.adapterhub.presets import DEFAULTS, PRESETS
from deltaserve.formats.options import Options, shown

MOST_PARTS = 16

_SHARED = frozenset({"architecture", "dropout", "init_weights", "init_weights_seed", "dtype"})
"""These change nothing at inference: `dtype` is that of the tensors that the file holds anyway."""
_FACTORS = {"phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_bias"}
_BOTTLENECK = Options(
    used=frozenset(DEFAULTS[None]) | _FACTORS,
    inert=_SHARED
    | {"stochastic_depth", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity"}
    | {"invertible_adapter", "attention_type", "new_attention_norm"},  # of adapter-transformers; the first is read
)
_LOW_RANK = Options(used=frozenset(DEFAULTS["lora"]), inert=_SHARED)

ARCHITECTURES: Mapping[str | None, Options] = {
    None: _BOTTLENECK,
    "prefix_tuning": Options(used=frozenset(DEFAULTS["prefix_tuning"]), inert=_SHARED),
    "lora": _LOW_RANK,
    "mtl_lora": Options(used=frozenset(DEFAULTS["mtl_lora"]), inert=_SHARED),
    "reft": Options(used=frozenset(DEFAULTS["reft"]), inert=_SHARED | {"output_reft"}),
    "prompt_tuning": Options(
        used=frozenset(DEFAULTS["prompt_tuning"]),
        # The start of a training; nothing is tokenised or opened for it.
        inert=_SHARED | {"prompt_init", "prompt_init_text", "random_uniform_scale"},
    ),
}
"""The keys of each architecture; None is a bottleneck."""


@dataclass(frozen=True)
class Part:
    """One method of an adapter. `told` has every key of its architecture, and nothing of it is checked but the keys."""

    architecture: str | None
    told: Mapping[str, Any]

    def flag(self, key: str) -> bool:
        return options.flag(self.told, key)

    def integer(self, key: str, most: int = options.MOST_RANK) -> int:
        return options.integer(self.told, key, most=most)

    def number(self, key: str) -> float:
        return options.number(self.told, key, 0.0)

    def acts(self, layer: int) -> bool:
        """Whether this layer is not left out."""
        return layer not in (options.indices(self.told, "leave_out") or ())

    @property
    def gated(self) -> bool:
        return self.flag("use_gating")


def parts(config: Mapping[str, Any]) -> tuple[Part, ...]:
    """The methods of an adapter_config.json. Raises BadCheckpoint, FailedPrecondition."""
    version = config.get("version")
    found = _resolved(config.get("config"), config.get("type"))
    made = tuple(_part(told, version) for told in found)
    if isinstance(version, str) and len(found) == 1 and found[0].get("architecture") == "lora" and _faulty(version):
        # The library's scale was not alpha / r before 1.1.0, and it mends the files of that time so.
        made = (Part("lora", {**made[0].told, "alpha": made[0].told["r"]}),)
    return made


def _resolved(told: Any, kind: Any) -> list[Mapping[str, Any]]:
    """A config, a name, names joined by |, or a union of these."""
    if isinstance(told, str):
        return [one for name in told.split("|")[: MOST_PARTS + 1] for one in _named(name.strip())]
    if not isinstance(told, dict):
        raise BadCheckpoint(f"config key 'config' is {shown(told)}; an object or the name of one is expected")
    if told.get("architecture") != "union":
        return [told]
    inner = told.get("configs")
    if not isinstance(inner, list) or not 1 <= len(inner) <= MOST_PARTS:
        raise BadCheckpoint(f"config key 'configs' is {shown(inner)}; a list of 1 to {MOST_PARTS} objects is expected")
    found: list[Mapping[str, Any]] = []
    for one in inner:
        if not isinstance(one, dict) or one.get("architecture") == "union":
            raise BadCheckpoint(f"config key 'configs' holds {shown(one)}; objects that are no unions are expected")
        found.append(one)
    return found


def _named(name: str) -> list[Mapping[str, Any]]:
    if name not in PRESETS:
        raise FailedPrecondition(
            f"config key 'config' is the name {shown(name)}; this release knows {', '.join(PRESETS)}: write the whole "
            "config into the file",
            reason="OPTION_NOT_SERVED",
            metadata={"key": "config"},
        )
    told = PRESETS[name]
    return list(told["configs"]) if told.get("architecture") == "union" else [told]


def _part(told: Mapping[str, Any], version: Any) -> Part:
    architecture = told.get("architecture")
    known = architecture is None or isinstance(architecture, str)
    if not known or architecture not in ARCHITECTURES:
        served = ", ".join(name or "null" for name in ARCHITECTURES)
        raise FailedPrecondition(
            f"config key 'architecture' is {shown(architecture)}; this release serves {served} and union",
            reason="KIND_NOT_SERVED",
            metadata={"architecture": shown(architecture)},
        )
    ARCHITECTURES[architecture].check(told)
    whole = {**DEFAULTS[architecture], **told}
    if architecture is None:
        whole = _legacy(whole, version)
    return Part(architecture, whole)


def _legacy(told: dict[str, Any], version: Any) -> dict[str, Any]:
    """What adapter-transformers wrote otherwise: a nested invertible adapter, and other words for two activations."""
    nested = told.get("invertible_adapter")
    if nested:
        if not isinstance(nested, dict):
            raise BadCheckpoint(f"config key 'invertible_adapter' is {shown(nested)}; an object is expected")
        told |= {
            "inv_adapter": nested.get("block_type"),
            "inv_adapter_reduction_factor": nested.get("reduction_factor"),
        }
    if version is None and told["non_linearity"] in ("gelu", "gelu_orig"):
        told["non_linearity"] = {"gelu": "gelu_new", "gelu_orig": "gelu"}[told["non_linearity"]]
    return told


def _faulty(version: str) -> bool:
    """Whether `adapters.X.Y.Z` is before 1.1.0; a version that cannot be read is not."""
    start, _, rest = version.partition("adapters.")
    numbers = rest.split(".")[:2]
    if start or len(numbers) < 2 or not all(n.isascii() and n.isdigit() and len(n) < 6 for n in numbers):
        return False
    return (int(numbers[0]), int(numbers[1])) < (1, 1)


def activation(told: Mapping[str, Any], key: str = "non_linearity") -> str | None:
    """Ours for what the config names; None is identity. Raises BadCheckpoint, FailedPrecondition."""
    return None if told.get(key) is None else activations.activation(told[key], key, _OWN)


_OWN: Mapping[str, str | None] = {"leakyrelu": "leaky_relu"}
