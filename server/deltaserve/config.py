"""Every setting of the server, with its default, in one place. Flags, environment and files all end here."""

import difflib
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from deltaserve.errors import InvalidArgument

PREFIX = "DELTASERVE_"
NOT_OURS = ("ADDRESS", "API_KEY", "SERVICE_HOST", "SERVICE_PORT", "PORT")
"""DELTASERVE_* that belong to others: the client's, and those that Kubernetes sets for a service of our name."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _auto(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in ("auto", "") else value


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _pair(value: str) -> str:
    name, equals, path = value.partition("=")
    if not (name and equals and path):
        raise ValueError(f"{value!r} is not name=path")
    return value


Size = Annotated[ByteSize, Field(gt=0)]
AutoSize = Annotated[Size | None, BeforeValidator(_auto)]
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """What `deltaserve serve` can be told. Unknown keys are errors; sizes may be like `8GiB`; 0 as a port picks one."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True, validate_default=False
    )

    backbone: str = Field(
        min_length=1, description="Folder of a transformers model (safetensors), or its id on the Hub."
    )
    served_name: str | None = Field(None, description="What the backbone is called in answers; by default its name.")
    revision: str | None = Field(None, description="Branch, tag or commit of the backbone on the Hub.")
    tokenizer: str | None = Field(None, description="Folder or id of the tokenizer, where it is not the backbone's.")
    dtype: Dtype = Field(
        "auto",
        description="Of the backbone. auto: bfloat16 on GPUs and on CPUs that multiply it natively, else float32.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:n.")
    delta_dtype: Dtype = Field("auto", description="Of the deltas on the device. auto: as in their files.")
    threads: Count | None = Field(
        None, description="CPU threads of the engine; by default chosen from the usable cores."
    )

    host: str = Field("127.0.0.1", description="Address to listen on. Any but loopback needs --insecure.")
    grpc_port: Port = Field(9000, description="Port of gRPC; 0 picks one and prints it.")
    metrics_port: Port = Field(9400, description="Port of the Prometheus endpoint; 0 picks one and prints it.")
    insecure: bool = Field(False, description="Allow an address that others can reach, without keys or TLS.")

    delta: Annotated[tuple[Annotated[str, BeforeValidator(_pair)], ...], NoDecode, BeforeValidator(_listed)] = Field(
        (),
        description="name=path of a delta to load at start; repeatable. Relative paths are tried under --delta-root.",
    )
    delta_root: Path | None = Field(
        None, description="Folder that LoadDelta may read from; without it nothing is loaded later."
    )
    lowering_seconds: Annotated[float, Field(ge=0)] = Field(
        30,
        description="A checkpoint whose lowering would take longer is refused: `deltaserve convert` does it ahead. "
        "0 refuses all that computes with whole weights.",
    )
    allow_pickle_archives: bool = Field(
        False,
        description="Also read .bin checkpoints (weights only, bounded); AdapterHub's prefixes, OpenDelta's all.",
    )

    max_model_len: Count | None = Field(
        None, description="Tokens of one sequence; by default what the backbone can take."
    )
    max_running: Count = Field(64, description="Sequences in one forward.")
    max_queued: Count = Field(1024, description="Sequences that may wait; more are refused.")
    max_batch_tokens: Count | None = Field(None, description="Rows of one forward; by default chosen from the device.")
    batch_wait_ms: Annotated[float, Field(ge=0, le=10_000)] = Field(
        0, description="Milliseconds that the first waiting request lets a batch gather."
    )
    pool_bytes: AutoSize = Field(
        None, description="Device memory for deltas. auto: an eighth of what is free, 1GiB at most."
    )
    kv_bytes: AutoSize = Field(None, description="Device memory for keys and values. auto: chosen from what is free.")
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of a GPU's memory that may be used, where kv_bytes is auto."
    )

    max_message_bytes: Size = Field(ByteSize(16 << 20), description="Bytes of one message, in and out.")
    request_timeout: Annotated[float, Field(gt=0)] = Field(600, description="Seconds, for calls without a deadline.")
    drain_seconds: Annotated[float, Field(ge=0)] = Field(
        30, description="Seconds that running requests get at the end."
    )

    log_format: LogFormat = Field("auto", description="auto: console on a terminal, else one JSON object a line.")
    log_level: LogLevel = Field("info", description="debug also logs each request that worked.")

    @model_validator(mode="after")
    def _guarded(self) -> "Settings":
        if not self.insecure and not _loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached by others, and this release has no keys yet: "
                "keep 127.0.0.1, or say --insecure on purpose"
            )
        return self

    @property
    def deltas(self) -> tuple[tuple[str, str], ...]:
        """(name, path) of the deltas to load at start."""
        return tuple((name, path) for name, _, path in (pair.partition("=") for pair in self.delta))


def settings(values: Mapping[str, Any]) -> Settings:
    """Settings from given values, then the environment, then the defaults. Raises InvalidArgument, in one message.

    A value of None counts as not given.
    """
    stray = _stray(os.environ)
    if stray:
        raise InvalidArgument("; ".join(stray), reason="BAD_CONFIGURATION")
    try:
        return Settings(**{key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise InvalidArgument("; ".join(_told(error)), reason="BAD_CONFIGURATION") from error


def _told(error: ValidationError) -> Iterable[str]:
    for problem in error.errors(include_url=False):
        name = "-".join(str(part) for part in problem["loc"][:1]).replace("_", "-")
        said = problem["msg"].removeprefix("Value error, ")
        yield f"--{name}: {said}" if name else said


def _stray(environment: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that name no setting."""
    known = {name.upper() for name in Settings.model_fields}
    stray = []
    for variable in sorted(environment):
        name = variable.upper().removeprefix(PREFIX)
        if not variable.upper().startswith(PREFIX) or name in known or name.startswith(NOT_OURS):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        stray.append(f"{variable} is no setting" + (f"; did you mean {PREFIX}{near[0]}?" if near else ""))
    return stray


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
