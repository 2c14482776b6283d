"""Tiny random backbones with tokenizers, PEFT checkpoints for them, and servers of them that are called by stubs."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import peft
import pytest
import tokenizers
import torch
import transformers
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig, T5Config

from deltaserve_protos.v1 import deltas_pb2, deltas_pb2_grpc, inference_pb2, inference_pb2_grpc

SECONDS = 60.0
POSITIONS = 64
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "food", "the", "a", "is", "was", "not", "very")
BYTES = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {
    letter: 3 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
}
VOCABULARY = len(BYTES)


def _byte_tokenizer(ends: bool) -> Any:
    """One token a byte, so that characters come in pieces; `ends`: inputs end in </s>, as T5's do."""
    made = tokenizers.Tokenizer(models.BPE(vocab=BYTES, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if ends:
        made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


def _word_tokenizer() -> Any:
    made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **special)


@dataclass(frozen=True)
class Family:
    config: Callable[[], PretrainedConfig]
    auto: str
    tokenizer: Callable[[], Any] | None
    targets: tuple[str, ...]
    task: str


_SMALL = {"vocab_size": VOCABULARY, "eos_token_id": 1, "pad_token_id": 0}
_HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, bos_token_id=1, **_SMALL),
        "AutoModelForCausalLM",
        lambda: _byte_tokenizer(ends=False),
        ("c_attn", "c_fc"),
        "CAUSAL_LM",
    ),
    "llama": Family(
        lambda: LlamaConfig(num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, **_HIDDEN, **_SMALL),
        "AutoModelForCausalLM",
        None,
        ("q_proj", "v_proj"),
        "CAUSAL_LM",
    ),
    "t5": Family(
        lambda: T5Config(d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, decoder_start_token_id=0, **_SMALL),
        "AutoModelForSeq2SeqLM",
        lambda: _byte_tokenizer(ends=True),
        ("q", "v"),
        "SEQ_2_SEQ_LM",
    ),
    "bert": Family(
        lambda: BertConfig(max_position_embeddings=POSITIONS, **_HIDDEN | {"vocab_size": len(WORDS)}),
        "AutoModel",
        _word_tokenizer,
        ("query", "value"),
        "FEATURE_EXTRACTION",
    ),
}


def drawn(model: torch.nn.Module, seed: int, trainable: bool = False) -> None:
    """New numbers for all parameters or the trainable ones: a fresh adapter would change nothing."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trainable and not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1:
                parameter.copy_((1.0 if "norm" in name.lower() or "ln_" in name else 0.0) + 0.2 * noise)
            else:
                parameter.copy_(noise * (1.0 if "emb" in name else parameter.shape[-1] ** -0.5))


class Made:
    """One family's backbone, and checkpoints for it below `root`."""

    def __init__(self, family: str, folder: Path) -> None:
        self._family = FAMILIES[family]
        self.backbone, self.root = folder / "backbone", folder / "root"
        self.root.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(transformers, self._family.auto).from_config(self._family.config())
            drawn(model, 7)
            model.tie_weights()
            model.save_pretrained(self.backbone)
        if self._family.tokenizer is not None:
            self._family.tokenizer().save_pretrained(self.backbone)

    def model(self, auto: str | None = None, **told: Any) -> Any:
        """transformers' own, in float32."""
        loader = getattr(transformers, auto or self._family.auto)
        return loader.from_pretrained(self.backbone, attn_implementation="eager", dtype=torch.float32, **told).eval()

    def delta(self, name: str, seed: int, config: Any = None, auto: str | None = None, **told: Any) -> None:
        """A checkpoint `root/name`; LoRA if nothing else is said."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config or self.lora()
            model = peft.get_peft_model(self.model(auto, **told), config)
            drawn(model, seed, trainable=True)
            model.save_pretrained(self.root / name)

    def tuned(self, name: str, auto: str | None = None, **told: Any) -> Any:
        """PEFT's model of a checkpoint that was made."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(self.model(auto, **told), self.root / name).eval()

    def lora(self, **told: Any) -> Any:
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": list(self._family.targets), "task_type": self._family.task}
        return peft.LoraConfig(**chosen | told)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """`made("t5")`: a backbone on disk, the same for the whole session."""
    return functools.cache(lambda family: Made(family, tmp_path_factory.mktemp(family)))


class Called:
    """A server as a caller sees it. `app` is the object itself, for what callers cannot see."""

    def __init__(self, running: Any, made: Made) -> None:
        self.running, self.made, self.app, self.root = running, made, running.app, made.root
        self.channel = grpc.insecure_channel(running.address)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.deltas = deltas_pb2_grpc.DeltaServiceStub(self.channel)

    def __call__(self, method: str, *, timeout: float = SECONDS, **fields: Any) -> Any:
        """`server("Generate", deltas=["a"], ...)`: the answer, a stream's as a list."""
        module = deltas_pb2 if hasattr(self.deltas, method) else inference_pb2
        stub = self.deltas if hasattr(self.deltas, method) else self.inference
        answer = getattr(stub, method)(getattr(module, f"{method}Request")(**fields), timeout=timeout)
        return list(answer) if method == "StreamGenerate" else answer

    def fails(self, method: str, **fields: Any) -> "Failure":
        with pytest.raises(grpc.RpcError) as caught:
            self(method, **fields)
        return Failure.of(caught.value)

    def load(self, name: str, source: str = "", **fields: Any) -> deltas_pb2.Delta:
        return self("LoadDelta", name=name, source=source or name, **fields).delta

    def idle(self) -> bool:
        """Whether the engine holds nothing: no sequence, no queue entry, no KV, no pin."""
        now = self.app.engine.stats()
        return not (now.running or now.waiting or now.kv_used_tokens or now.pins)


@dataclass(frozen=True)
class Failure:
    code: str
    message: str
    details: Mapping[str, Message]

    @staticmethod
    def of(error: Any) -> "Failure":
        trailing = dict(error.trailing_metadata() or ())
        found = {}
        for packed in Status.FromString(trailing.get("grpc-status-details-bin", b"")).details:
            detail = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
            assert packed.Unpack(detail)
            found[type(detail).__name__] = detail
        return Failure(error.code().name, error.details(), found)

    @property
    def reason(self) -> str:
        return self.details["ErrorInfo"].reason  # type: ignore[attr-defined]

    @property
    def field(self) -> str:
        return self.details["BadRequest"].field_violations[0].field  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def called(made: Callable[[str], Made], start: Callable[..., Any]) -> Iterator[Callable[..., Called]]:
    """`called("gpt2", **settings)`: a server with a --delta-root, one for the session with the same settings."""
    servers: dict[str, Called] = {}

    def server(family: str, **settings: Any) -> Called:
        key = repr((family, sorted(settings.items())))
        if key not in servers:
            given = {"delta_root": made(family).root} | settings
            servers[key] = Called(start(made(family).backbone, **given), made(family))
        return servers[key]

    yield server
    for each in servers.values():
        each.channel.close()
        each.running.stop()


@pytest.fixture(scope="session")
def gpt2(called: Callable[..., Called]) -> Called:
    """With LoRA `lora`, prompt tuning `prompt` and a classifier `mood`."""
    server = called("gpt2")
    server.made.delta("lora", 1)
    server.made.delta("prompt", 2, peft.PromptTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"))
    server.made.delta(
        "mood", 3, server.made.lora(task_type="SEQ_CLS"), "AutoModelForSequenceClassification", num_labels=3
    )
    for name in ("lora", "prompt", "mood"):
        server.load(name)
    return server


@pytest.fixture(scope="session")
def t5(called: Callable[..., Called]) -> Called:
    """With LoRA `lora`."""
    server = called("t5")
    server.made.delta("lora", 1)
    server.load("lora")
    return server


@pytest.fixture(scope="session")
def bert(called: Callable[..., Called]) -> Called:
    """With classifiers `mood` of three labels, `stars` of one, `topics` of several, `tags` of tokens; `where`; `plain`.

    `where` answers questions, `which` chooses.
    """
    server = called("bert")
    made, whole = server.made, "AutoModelForSequenceClassification"
    made.delta("mood", 1, made.lora(task_type="SEQ_CLS"), whole, num_labels=3)
    made.delta("stars", 2, made.lora(task_type="SEQ_CLS"), whole, num_labels=1)
    made.delta("tags", 3, made.lora(task_type="TOKEN_CLS"), "AutoModelForTokenClassification", num_labels=2)
    made.delta("where", 5, made.lora(task_type="QUESTION_ANS"), "AutoModelForQuestionAnswering")
    config = made.lora(task_type=None, modules_to_save=["classifier"])
    made.delta("which", 6, config, "AutoModelForMultipleChoice")
    made.delta("plain", 4)
    server.load("which", task=deltas_pb2.TASK_MULTIPLE_CHOICE)
    server.load("mood", labels=["bad", "so-so", "good"])
    server.load("topics", "mood", problem_type=deltas_pb2.PROBLEM_TYPE_MULTI_LABEL_CLASSIFICATION)
    for name in ("stars", "tags", "where", "plain"):
        server.load(name)
    return server


@pytest.fixture(scope="session")
def llama(called: Callable[..., Called]) -> Called:
    """Without a tokenizer, with room for long streams and LoRA `lora`."""
    server = called("llama")
    server.made.delta("lora", 1)
    server.load("lora")
    return server
