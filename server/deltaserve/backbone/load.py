"""From a folder or a Hub id to a frozen backbone on its device. safetensors only; never code from a checkpoint."""

import logging
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from deltaserve.backbone import attention
from deltaserve.backbone.families import Family, family_of
from deltaserve.backbone.model import Backbone
from deltaserve.deltas.sites import THROUGH_POOLER
from deltaserve.errors import FailedPrecondition

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str,
    *,
    served_name: str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    tokenized: bool = True,
    dtype: str = "auto",
    device: str = "auto",
) -> Backbone:
    """Loads a backbone and opens it up; from then on it is called `served_name`, or else `name`.

    `name` is a folder or a Hub id, `tokenizer` another one for the tokenizer only; unless `tokenized` none is looked
    for. `dtype` `auto` is bfloat16 on GPUs
    and on CPUs that multiply it natively, else float32. `device` is `auto`, `cpu`, `cuda` or `cuda:n`. Without a
    tokenizer the backbone serves token ids. Raises FailedPrecondition where it cannot be had or is not served.
    """
    config = _config(name, revision)
    family = family_of(config, name)
    _alone(name, config)
    place = _device(device)
    kind = _dtype(dtype, place)
    model = _model(name, revision, family, config, kind)
    missing = _missing(name, model[1], family)
    backbone = Backbone(
        name=served_name or name,
        family=family,
        model=model[0].to(place).eval().requires_grad_(False),
        tokenizer=_tokenizer(tokenizer or name, None if tokenizer else revision) if tokenized else None,
        has_pooler=not missing,
    )
    return backbone


def _config(name: str, revision: str | None) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FailedPrecondition(
            f"backbone {name!r} cannot be read: {_first_line(error)}; give a folder with config.json and safetensors, "
            "or the id of a model on the Hub",
            reason="BACKBONE_NOT_FOUND",
        ) from error
    assert isinstance(config, PretrainedConfig)
    return config


def _alone(name: str, config: PretrainedConfig) -> None:
    """Refuses what makes a row depend on rows of other requests, or attend otherwise than its family does."""
    given = getattr(config, "rope_parameters", None) or {}
    each = [given, *(values for values in given.values() if isinstance(values, dict))]  # by kind of layer, in some
    kind = next((v["rope_type"] for v in each if v.get("rope_type") in ("dynamic", "longrope")), None)
    if kind is not None:
        raise FailedPrecondition(
            f"backbone {name!r} has rope_type {kind!r}, whose angles depend on the longest sequence of a batch; this "
            "release serves those that do not",
            reason="BACKBONE_NOT_SERVED",
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise FailedPrecondition(
            f"backbone {name!r} has use_bidirectional_attention set: a {config.model_type} model that attends both "
            "ways is not served",
            reason="BACKBONE_NOT_SERVED",
        )
    if getattr(config, "is_decoder", False) and not config.is_encoder_decoder:
        raise FailedPrecondition(
            f"backbone {name!r} has is_decoder set: a {config.model_type} model that attends causally is not served",
            reason="BACKBONE_NOT_SERVED",
        )


def _model(
    name: str, revision: str | None, family: Family, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    attention.register()
    try:
        model, info = getattr(transformers, family.loader).from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention.NAME,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FailedPrecondition(
            f"backbone {name!r} cannot be loaded: {_first_line(error)}", reason="BACKBONE_NOT_LOADED"
        ) from error
    for module in family.unused:
        delattr(model, module)
    return model, info


def _missing(name: str, info: dict[str, Any], family: Family) -> bool:
    """Whether only the pooler's weights are absent (BERT's masked language models). Raises for any other."""
    start = family.prefix + "."
    missing = [key for key in sorted(info.get("missing_keys", ())) if key.partition(".")[0] not in family.unused]
    below = (family.pooler or "").removeprefix(start) + "."
    if missing and family.pooler and all(key.removeprefix(start).startswith(below) for key in missing):
        lost = " and ".join(task for task, head in family.heads.items() if head.pooling in THROUGH_POOLER)
        log.warning("the backbone's checkpoint has no %s: deltas for %s will be refused", family.pooler, lost)
        return True
    if missing:
        raise FailedPrecondition(
            f"backbone {name!r} lacks {len(missing)} of its weights, the first being {missing[0]!r}",
            reason="BACKBONE_NOT_LOADED",
        )
    return False


def _tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        log.warning("no tokenizer (%s): this server takes and gives token ids only", _first_line(error))
        return None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if not _has_files(name, revision, tokenizer):
        log.warning("no tokenizer (%s has no files of one): this server takes and gives token ids only", name)
        return None
    return tokenizer


def _has_files(name: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it was read from somewhere: without files transformers makes an empty one, which knows no words."""
    files = {"tokenizer.json", "tokenizer_config.json", *tokenizer.vocab_files_names.values()}
    tolerant = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    return any(cached_file(name, file, revision=revision, **tolerant) is not None for file in sorted(files))


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not (index or "0").isdecimal() or int(index or "0") >= there:
        raise FailedPrecondition(f"--device {device}: not on this machine; use auto or cpu", reason="NO_DEVICE")
    return torch.device(device)


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.bfloat16 if device.type == "cuda" or native_bfloat16() else torch.float32


def usual_dtype() -> str:
    """What `auto` is on this machine."""
    return str(_dtype("auto", _device("auto"))).removeprefix("torch.")


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
