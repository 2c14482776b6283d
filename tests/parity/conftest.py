"""Tiny random backbones, PEFT checkpoints for each of them, and what PEFT alone answers.

Nothing is trained: every number of a checkpoint is drawn anew, because fresh adapters change nothing.
"""

import functools
import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedModel, T5Config

VOCABULARY, SPECIAL = 96, 4
SEED = 20_261_124
NEW_TOKENS = 16
LABELS = 3


@dataclass(frozen=True)
class Family:
    """`auto` makes the plain model; `linears` and `ia3` (targets, feed-forward ones) are names of its modules."""

    name: str
    config: Callable[[], Any]
    auto: str
    task: str
    linears: tuple[str, ...]
    deep: str
    ia3: tuple[tuple[str, ...], tuple[str, ...]]
    prefix: Mapping[str, int] = field(default_factory=dict)
    encoder_decoder: bool = False


def _t5(**changes: Any) -> T5Config:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 3}
    sizes |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5Config(**(sizes | changes))


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "t5", _t5, "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", ("q", "v", "wi", "wo"),
            r".*decoder.*\.(q|wo)", (("k", "v", "wo"), ("wo",)), encoder_decoder=True,
        ),
        Family(
            "flan-t5",
            lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_kv=12, num_decoder_layers=3),
            "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", ("q", "v", "wi_0", "wo"), r".*EncDecAttention\.(k|o)",
            (("k", "v", "wo"), ("wo",)), {"token_dim": 48, "num_attention_heads": 4}, encoder_decoder=True,
        ),
        Family(
            "bert",
            lambda: BertConfig(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=64, hidden_act="gelu",
            ),
            "AutoModel", "FEATURE_EXTRACTION", ("query", "value", "dense"), r".*layer\.[12].*(key|output\.dense)",
            (("key", "value", "output.dense"), ("output.dense",)),
        ),
        Family(
            "gpt2",
            lambda: GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=96, bos_token_id=1,
                eos_token_id=1, pad_token_id=0,
            ),
            "AutoModelForCausalLM", "CAUSAL_LM", ("c_attn", "c_fc", "c_proj"), r".*h\.1\..*c_proj",
            (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
        ),
        Family(
            "llama",
            lambda: LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, bos_token_id=1,
                eos_token_id=1, pad_token_id=0, tie_word_embeddings=False, attention_bias=True,
            ),
            "AutoModelForCausalLM", "CAUSAL_LM", ("q_proj", "v_proj", "down_proj"), r".*layers\.[02].*(k|up)_proj",
            (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
        ),
    )
}  # fmt: skip

Make = Callable[[Family], Any]


def _tuner(word: str, **told: Any) -> Make:
    """`peft.<word>Config`; a callable is given the family."""

    def make(family: Family) -> Any:
        chosen = {"target_modules": list(family.linears[:2])} | told
        return getattr(peft, f"{word}Config")(**{key: v(family) if callable(v) else v for key, v in chosen.items()})

    return make


def _lora(**told: Any) -> Make:
    return _tuner("Lora", **({"r": 4, "lora_alpha": 6} | told))


def _ia3(family: Family) -> Any:
    return peft.IA3Config(target_modules=list(family.ia3[0]), feedforward_modules=list(family.ia3[1]))


METHODS: Mapping[str, Make] = {
    "lora": _lora(),
    "lora-rslora": _lora(use_rslora=True, r=5, target_modules=lambda f: list(f.linears)),
    "lora-patterns": _lora(
        target_modules=lambda f: list(f.linears),
        rank_pattern=lambda f: {f.linears[0]: 7, f.linears[-1]: 2},
        alpha_pattern=lambda f: {f.linears[1]: 11},
    ),
    "lora-layers": _lora(layers_to_transform=[1]),
    "lora-regex": _lora(target_modules=lambda f: f.deep),
    "lora-all-linear": _lora(target_modules="all-linear", r=3),
    "lora-own-bias": _lora(lora_bias=True),
    "lora-bias-only": _lora(bias="lora_only"),
    "lora-bias-all": _lora(bias="all", target_modules=lambda f: list(f.linears)),
    "dora": _lora(use_dora=True, target_modules=lambda f: list(f.linears)),
    "dora-bias": _lora(use_dora=True, bias="lora_only"),
    "pissa": _lora(init_lora_weights="pissa"),
    "adalora": _tuner("AdaLora", init_r=5, target_r=3, lora_alpha=7, total_step=10),
    "vera": _tuner("Vera", r=6, target_modules=lambda f: list(f.linears)),
    "vera-drawn": _tuner("Vera", r=6, save_projection=False, projection_prng_key=5),
    "pvera": _tuner("Pvera", r=4),
    "vblora": _tuner("VBLoRA", r=3, num_vectors=8, vector_length=8, topk=2),
    "vblora-topk": _tuner("VBLoRA", r=3, num_vectors=8, vector_length=8, topk=3, save_only_topk_weights=True),
    "gralora": _tuner("Gralora", r=4, gralora_k=2, alpha=6),
    "gralora-hybrid": _tuner("Gralora", r=4, gralora_k=2, alpha=6, hybrid_r=2),
    "fourierft": _tuner("FourierFT", n_frequency=60, scaling=30.0),
    "hira": _tuner("Hira", r=4),
    "ia3": _ia3,
    "prefix": lambda f: peft.PrefixTuningConfig(num_virtual_tokens=5, **f.prefix),
    "prefix-projected": lambda f: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **f.prefix
    ),
    "prompt": lambda f: peft.PromptTuningConfig(num_virtual_tokens=6),
    "p-tuning": lambda f: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16),
}
LINEAR_ONLY: Mapping[str, Make] = {
    "kasa": _lora(kasa_config=lambda f: peft.KasaConfig()),
    "delora": _tuner("Delora", r=4),
    "hra": _tuner("HRA", r=4),
    "hra-orthogonal": _tuner("HRA", r=4, apply_GS=True),
    "miss": _tuner("Miss", r=4),
    "miss-bat": _tuner("Miss", r=4, init_weights="bat"),
    "miss-mini": _tuner("Miss", r=4, mini_r=4, init_weights="mini"),
    "loha": _tuner("LoHa", r=3, alpha=40),
    "loha-small": _tuner("LoHa", r=2, alpha=40),
    "lokr": _tuner("LoKr", r=2, alpha=5),
    "lokr-both": _tuner("LoKr", r=1, alpha=2, decompose_both=True, decompose_factor=4),
    "c3a": _tuner("C3A", block_size=8),
}
"""PEFT does these at nn.Linear alone, so not on GPT-2."""
GENERATING: Mapping[str, Make] = {
    "lora-lm-head": _lora(target_modules=lambda f: [f.linears[0], "lm_head"]),
    "lora-saved-head": _lora(modules_to_save=["lm_head"]),
}
HEADED = ("lora", "lora-bias-all", "ia3", "prefix", "prompt")
HEADS = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}
HEADED_FAMILIES = {
    "bert": ("SEQ_CLS", "TOKEN_CLS"),
    "gpt2": ("SEQ_CLS", "TOKEN_CLS"),
    "llama": ("SEQ_CLS", "TOKEN_CLS"),
}
CANNOT = {("gpt2", "TOKEN_CLS", "prompt"), ("llama", "TOKEN_CLS", "prompt")}


@dataclass(frozen=True)
class Case:
    """One delta. `task` is PEFT's task_type; `""` in `method` is the bare backbone."""

    family: str
    method: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.method}.{self.task.lower().replace('_', '-')}"


def cases(family: str) -> list[Case]:
    """Every delta that is tried on a family."""
    row = FAMILIES[family]
    methods = (
        list(METHODS)
        + (list(LINEAR_ONLY) if family != "gpt2" else [])
        + (list(GENERATING) if row.task != "FEATURE_EXTRACTION" else [])
    )
    plain = [Case(family, method, row.task) for method in methods]
    headed = [
        Case(family, method, task)
        for task in HEADED_FAMILIES.get(family, ())
        for method in HEADED
        if (family, task, method) not in CANNOT
    ]
    return plain + headed


def drawn(model: torch.nn.Module, seed: int, trainable: bool = False) -> None:
    """New numbers for all parameters, or for the trainable ones, of a size that keeps a model lively."""
    random = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in done or (trainable and not parameter.requires_grad):
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=random)
            if "ia3_l" in name or (("norm" in name.lower() or "ln_" in name) and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.numel() == 1:  # DeLoRA's bound
                parameter.fill_(6.0)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "embed" in name or "shared" in name or "wte" in name or "wpe" in name or "prompt" in name:
                parameter.copy_(0.8 * noise)
            else:
                # Tuned weights are small beside the backbone's, as they are in life; else float32 itself is too coarse.
                parameter.copy_((0.5 if trainable else 1.0) * noise * parameter.shape[-1] ** -0.5)


def backbone(family: Family, folder: Path) -> None:
    """Writes a tiny random model."""
    transformers.set_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, family.auto).from_config(family.config())
        drawn(model, SEED)
        model.tie_weights()
        model.save_pretrained(folder)


def tuned(case: Case, backbone_folder: Path) -> Any:
    """The PEFT model of a case, with numbers of its own."""
    family = FAMILIES[case.family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = getattr(transformers, HEADS.get(case.task, family.auto))
        told = {"num_labels": LABELS} if case.task in HEADS else {}
        model = auto.from_pretrained(backbone_folder, attn_implementation="eager", dtype=torch.float32, **told)
        config = (METHODS | LINEAR_ONLY | GENERATING)[case.method](family)
        config.task_type = case.task
        made = peft.get_peft_model(model, config)
        drawn(made, SEED + sum(map(ord, case.name)), trainable=True)
        return made.eval()


def bare(family: str, backbone_folder: Path) -> PreTrainedModel:
    auto = getattr(transformers, FAMILIES[family].auto)
    model = auto.from_pretrained(backbone_folder, attn_implementation="eager", dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def inputs(case: Case) -> list[list[int]]:
    """Two texts of odd lengths, others for each delta. A classified one also ends in a pad token, as texts may."""
    random = torch.Generator().manual_seed(SEED + 31 * sum(map(ord, case.name)))
    lengths = [int(torch.randint(3, 14, (), generator=random)) for _ in range(2)]
    first, second = (torch.randint(SPECIAL, VOCABULARY, (n,), generator=random).tolist() for n in lengths)
    return [first, [*second, 0] if case.task == "SEQ_CLS" else second]


def generated(model: Any, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens by PEFT's own generate, and the log-probabilities [NEW_TOKENS, vocabulary] it chose them by."""
    out = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
        eos_token_id=None,
    )  # fmt: skip
    tokens = out.sequences[0, -NEW_TOKENS:].tolist()
    return tokens, torch.log_softmax(torch.cat(out.logits).float(), -1)


Answer = tuple[list[int], torch.Tensor]
"""Greedy tokens (none for a head or a vector) and rows [n, width]: log-probabilities, raw scores or a vector."""


def answer(case: Case, model: Any, ids: list[int]) -> Answer:
    """What the model alone says, without batching, caches of ours, or padding."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if case.task in HEADS:
            scores = model(input_ids=torch.tensor([ids])).logits[0].float()
            # Beside a prompt transformers also labels the prompt's rows.
            return [], scores[-len(ids) :] if case.task == "TOKEN_CLS" else scores.unsqueeze(0)
        if case.task == "FEATURE_EXTRACTION":
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].float()
            return [], hidden[-len(ids) :].mean(0, keepdim=True)
        return generated(model, ids)


@dataclass(frozen=True)
class Prepared:
    """A family's folder, the cases that PEFT itself can do, and its answers to `inputs` by case and input."""

    folder: Path
    cases: tuple[Case, ...]
    references: Mapping[Case, tuple[Answer, ...]]
    without: Mapping[Case, tuple[Answer, ...]]
    """The same by the backbone alone, with the case's own head if it has one."""

    @staticmethod
    def inputs(case: Case) -> list[list[int]]:
        return inputs(case)


def _without_delta(case: Case, folder: Path, saved: Path) -> Any:
    if case.task not in HEADS:
        return bare(case.family, folder)
    model = getattr(transformers, HEADS[case.task]).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, num_labels=LABELS
    )
    heads = {name.rpartition("base_model.")[2].removeprefix("model."): t for name, t in load_file(saved).items()}
    own = [f"{head}.{part}" for head in ("classifier", "score") for part in ("weight", "bias")]
    heads = {name: tensor for name, tensor in heads.items() if name in own}
    assert heads and not model.load_state_dict(heads, strict=False).unexpected_keys
    return model.eval()


def prepare(family: str, folder: Path) -> Prepared:
    """Writes `backbone` and `deltas/<name>` below a folder and asks PEFT about each of them."""
    backbone(FAMILIES[family], folder / "backbone")
    references, without = {}, {}
    for case in cases(family):
        model = tuned(case, folder / "backbone")
        place = folder / "deltas" / case.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(place)
            alone = _without_delta(case, folder / "backbone", place / "adapter_model.safetensors")
        references[case] = tuple(answer(case, model, ids) for ids in inputs(case))
        without[case] = tuple(answer(case, alone, ids) for ids in inputs(case))
    return Prepared(folder, tuple(references), references, without)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    """`prepared("t5")`, made once."""
    return functools.cache(lambda family: prepare(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def server(prepared: Callable[[str], Prepared]) -> Iterator[Callable[[str], str]]:
    """`server("t5")` is the address of a real server process with that backbone, in float32."""
    running: dict[str, tuple[subprocess.Popen[bytes], str]] = {}

    def start(family: str) -> str:
        if family not in running:
            running[family] = launched(prepared(family).folder)
        return running[family][1]

    yield start
    for process, _ in running.values():
        process.send_signal(signal.SIGTERM)
    assert [process.wait(30) for process, _ in running.values()] == [0] * len(running)


def launched(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`deltaserve serve` on free ports; returns when it says that it is ready."""
    words = ["serve", str(folder / "backbone"), "--delta-root", str(folder / "deltas"), "--dtype", "float32"]
    words += [
        "--max-running",
        "256",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--kv-bytes",
        "32MiB",
        "--pool-bytes",
        "32MiB",
    ]
    words += ["--grpc-port", "0", "--metrics-port", "0", "--batch-wait-ms", "200", "--log-format", "json"]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "deltaserve", *words], stdout=out, stderr=out)
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line[-1] == "}"]
        address = next((event["grpc"] for event in events if event["event"] == "ready"), None)
        if address is not None:
            return process, address
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the server was not ready in time:\n{log.read_text()[-2000:]}")
