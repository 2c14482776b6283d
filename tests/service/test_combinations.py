"""Requests that name several deltas, over gRPC: what answers, what is refused, and what is left behind."""

import json
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from deltaserve_protos.v1 import deltas_pb2 as dp
from deltaserve_protos.v1 import inference_pb2 as pb

ASK = {"inputs": [pb.Input(ids=[9, 30, 7])]}
GREEDY = {**ASK, "sampling": pb.Sampling(max_new_tokens=8, ignore_eos=True, logprobs=3)}
SECONDS = 60.0


@pytest.fixture(scope="module")
def members(gpt2: Any) -> Any:
    """The session's server, which has a LoRA `lora` and `prompt`, with a LoRA `other`, `ia3` and `prefix`."""
    made = gpt2.made
    made.delta("other", 11, made.lora(r=2, lora_alpha=6))
    made.delta("ia3", 12, peft.IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[]))
    made.delta("prefix", 13, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for name in ("other", "ia3", "prefix"):
        gpt2.load(name)
    return gpt2


def said(answer: Any) -> tuple[list[int], list[float]]:
    (sample,) = answer.results[0].samples
    return list(sample.ids), [place.chosen.logprob for place in sample.logprobs]


def scraped(server: Any, name: str) -> float:
    with urllib.request.urlopen(f"http://{server.running.metrics}/metrics", timeout=5) as page:
        lines = [line for line in page.read().decode().splitlines() if line.startswith(f"deltaserve_{name}")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_every_method_takes_several_and_says_which_answered(members: Any) -> None:
    names, label = ["lora", "ia3@1", "prefix"], "lora@1+ia3@1+prefix@1"
    assert members("Generate", deltas=names, **GREEDY).delta == label
    assert {each.delta for each in members("StreamGenerate", deltas=names, **GREEDY)} == {label}
    assert members("Embed", deltas=names, **ASK).delta == label
    continuations = [pb.ScoreRequest.Continuations(continuations=[pb.Continuation(ids=[5, 6])])]
    assert members("Score", deltas=names, continuations=continuations, **ASK).delta == label
    assert members("Classify", deltas=["ia3", "mood"], **ASK).delta == "ia3@1+mood@1"
    step = members("GetServerInfo", steps=True).steps[-1]
    assert list(step.deltas) == ["ia3@1+mood@1"] and {"ia3", "lora", "head"} <= set(step.kinds)


def test_several_are_neither_of_them(members: Any) -> None:
    both = said(members("Generate", deltas=["lora", "ia3"], **GREEDY))
    for other in ({"deltas": ["lora"]}, {"deltas": ["ia3"]}, {"backbone": True}):
        assert said(members("Generate", **other, **GREEDY)) != both


def test_what_adds_up_does_so_in_any_order(members: Any) -> None:
    one = said(members("Generate", deltas=["lora", "other"], **GREEDY))
    two = said(members("Generate", deltas=["other", "lora"], **GREEDY))
    assert one[0] == two[0] and one[1] == pytest.approx(two[1], abs=1e-5)


def test_weights_scale_what_is_added(members: Any) -> None:
    answer = members("Generate", deltas=["lora", "other"], delta_weights=[1, 0.25], **GREEDY)
    assert answer.delta == "lora@1+0.25*other@1"
    plain = said(members("Generate", deltas=["lora"], **GREEDY))
    assert said(answer)[1] != pytest.approx(plain[1], abs=1e-5)
    nearly = members("Generate", deltas=["lora", "other"], delta_weights=[1, 1e-9], **GREEDY)
    assert said(nearly)[0] == plain[0] and said(nearly)[1] == pytest.approx(plain[1], abs=1e-5)
    alone = members("Embed", deltas=["lora"], delta_weights=[1e-9], normalize=False, **ASK)
    bare = members("Embed", backbone=True, normalize=False, **ASK)
    assert list(alone.results[0].values) == pytest.approx(list(bare.results[0].values), abs=1e-5)
    assert members("Embed", deltas=["lora"], delta_weights=[1.0], **ASK).delta == "lora@1", "no combination of one"


def test_prompt_rows_of_all_members_count(members: Any) -> None:
    members.made.delta("prompt-2", 14, peft.PromptTuningConfig(num_virtual_tokens=50, task_type="CAUSAL_LM"))
    members.load("prompt-2")
    ask = {"inputs": [pb.Input(ids=[5] * 6)], "sampling": pb.Sampling(max_new_tokens=2)}
    assert members("Generate", deltas=["prompt", "prompt-2"], **ask).usage.input_tokens == 6
    failure = members.fails("Generate", deltas=["prompt", "prompt-2"], **ask | {"inputs": [pb.Input(ids=[5] * 7)]})
    assert failure.code == "INVALID_ARGUMENT" and "soft-prompt" in failure.message


def test_combinations_are_counted_and_not_listed(called: Callable[..., Any], members: Any) -> None:
    server = called("gpt2", max_running=7)
    for name in ("lora", "other"):
        server.load(name)
    listed = [each.name for each in server("ListDeltas").deltas]
    calls = [
        server.inference.Generate.future(pb.GenerateRequest(deltas=["lora", "other"], **GREEDY), timeout=SECONDS)
        for _ in range(5)
    ]
    assert len({str(said(call.result())[0]) for call in calls}) == 1
    assert scraped(server, 'delta_loads_total{from="members",outcome="ok"}') == 1, "five that came together made one"
    info = server("GetServerInfo")
    assert (info.resident, info.combinations) == (3, 1) and scraped(server, "combinations_resident") == 1
    assert [each.name for each in server("ListDeltas").deltas] == listed == ["lora", "other"]
    assert server.fails("GetDelta", name="lora+other").code == "INVALID_ARGUMENT"
    assert scraped(server, 'requests_total{code="OK",delta="lora+other",task="generate"}') == 5


def test_a_member_that_leaves_takes_its_combinations_along(called: Callable[..., Any], members: Any) -> None:
    server = called("gpt2", max_running=9)
    for name in ("lora", "other", "ia3"):
        server.load(name)
    kept = server("GetServerInfo").memory.pool_used_bytes
    for names in (["lora", "other"], ["ia3", "lora"], ["other", "ia3"]):
        server("Generate", deltas=names, **GREEDY)
    before = server("GetServerInfo")
    assert before.combinations == 3 and before.memory.pool_used_bytes > kept
    own = server("GetDelta", name="lora").delta.device_bytes
    assert server("UnloadDelta", name="lora", wait=True).freed_bytes > own
    after = server("GetServerInfo")
    assert (after.combinations, after.resident) == (1, 3)
    assert server.fails("Generate", deltas=["lora", "other"], **GREEDY).code == "NOT_FOUND"
    server("UnloadDelta", name="other", wait=True)
    server("UnloadDelta", name="ia3", wait=True)
    assert server("GetServerInfo").memory.pool_used_bytes == 0 and server.idle()


def test_running_requests_keep_a_combination_whose_member_leaves(called: Callable[..., Any], members: Any) -> None:
    server = called("gpt2", max_running=11)
    for name in ("lora", "other"):
        server.load(name)
    want = said(server("Generate", deltas=["lora", "other"], **GREEDY))
    long = pb.StreamGenerateRequest(
        deltas=["lora", "other"], **ASK, sampling=pb.Sampling(max_new_tokens=60, ignore_eos=True)
    )
    stream = server.inference.StreamGenerate(long, timeout=SECONDS)
    ids = list(next(stream).ids)
    (gone,) = server("UnloadDelta", name="lora").deltas
    assert gone.state == dp.DELTA_STATE_DRAINING
    for piece in stream:
        ids += piece.ids
    assert len(ids) == 60 and ids[:8] == want[0]
    server("UnloadDelta", name="other", wait=True)
    for _ in range(200):
        if not server("GetServerInfo").resident:
            break
    assert server("GetServerInfo").resident == 0


def test_a_new_version_of_a_member_makes_another_combination(called: Callable[..., Any], members: Any) -> None:
    server = called("gpt2", max_running=13)
    server.load("a", "lora")
    server.load("b", "other")
    one = server("Generate", deltas=["a", "b"], **GREEDY)
    server.load("a", "ia3", replace=True)
    two = server("Generate", deltas=["a", "b"], **GREEDY)
    assert (one.delta, two.delta) == ("a@1+b@1", "a@2+b@1") and said(one) != said(two)
    for _ in range(200):
        if server("GetServerInfo").combinations == 1:
            break
    assert server("GetServerInfo").combinations == 1


def test_an_evicted_combination_is_composed_again(called: Callable[..., Any], members: Any) -> None:
    """The pool holds a combination and little else."""
    server = called("gpt2", pool_bytes=24_000)
    for name in ("lora", "other", "ia3"):
        server.load(name)
    pairs = (["lora", "other"], ["ia3", "lora"], ["other", "ia3"])
    first = [said(server("Generate", deltas=names, **GREEDY)) for names in pairs]
    for _ in range(3):
        assert [said(server("Generate", deltas=names, **GREEDY)) for names in pairs] == first
    assert scraped(server, 'delta_loads_total{from="disk"') > 3, "nothing had to be composed again"
    assert server.idle()
    server.app.engine._pool.check()


def test_one_that_is_too_large_for_the_pool_says_so(called: Callable[..., Any], members: Any) -> None:
    server = called("gpt2", pool_bytes=12_000)
    for name in ("lora", "other"):
        server.load(name)
    for _ in range(2):
        failure = server.fails("Generate", deltas=["lora", "other"], **GREEDY)
        assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "DELTA_TOO_LARGE")
    assert server("GetServerInfo").combinations == 0 and server.idle()


def clash(server: Any, method: str, first: str, second: str, why: str, **fields: Any) -> None:
    """Refused each time, with both names, before anything is queued."""
    for _ in range(2):
        failure = server.fails(method, deltas=[first, second], **ASK | fields)
        assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "DELTAS_DO_NOT_COMBINE"), failure.message
        assert f"{first}@1" in failure.message and f"{second}@1" in failure.message and why in failure.message
        assert failure.details["ErrorInfo"].metadata["first"] == f"{first}@1"
    assert server.idle()


def test_two_heads_are_refused(bert: Any) -> None:
    clash(bert, "Classify", "mood", "stars", "both bring a head")


def test_two_replacements_of_one_weight_are_refused(members: Any) -> None:
    for seed, name in enumerate(("whole-1", "whole-2")):
        members.made.delta(name, 30 + seed, members.made.lora(modules_to_save=["mlp.c_proj"]))
        members.load(name)
    clash(members, "Generate", "whole-1", "whole-2", "both replace the whole weight")


def test_two_replacements_of_a_norm_are_refused(members: Any) -> None:
    for seed, name in enumerate(("norms-1", "norms-2")):
        members.made.delta(name, 34 + seed, peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_1"]))
        members.load(name)
    clash(members, "Generate", "norms-1", "norms-2", "both replace the norm's weight")


def test_two_rows_of_one_token_are_refused(members: Any) -> None:
    for name, tokens in (("tokens-1", [5, 9]), ("tokens-2", [9]), ("tokens-3", [8])):
        config = peft.TrainableTokensConfig(task_type="CAUSAL_LM", target_modules=["wte"], token_indices=tokens)
        members.made.delta(name, 36, config)
        members.load(name)
    clash(members, "Generate", "tokens-1", "tokens-2", "row of token 9")
    assert members("Generate", deltas=["tokens-1", "tokens-3"], **GREEDY).delta == "tokens-1@1+tokens-3@1"


def test_blocks_of_unlike_shapes_are_refused(llama: Any) -> None:
    for name, size in (("oft-4", 4), ("oft-8", 8)):
        config = peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=size, r=0)
        llama.made.delta(name, 41, config)
        llama.load(name)
    clash(llama, "Generate", "oft-4", "oft-8", "blocks of unlike shapes")


def test_an_invocation_beside_another_is_refused(llama: Any) -> None:
    config = llama.made.lora(alora_invocation_tokens=[7, 8])
    llama.made.delta("invoked", 42, config)
    llama.load("invoked")
    clash(llama, "Generate", "invoked", "lora", "invocation tokens")


def hub(server: Any, name: str, tensors: Mapping[str, tuple[int, ...]], **config: Any) -> None:
    """A checkpoint in AdapterHub's layout, loaded; `{}` in names of tensors is its name."""
    folder = server.made.root / name
    folder.mkdir()
    random = torch.Generator().manual_seed(sum(map(ord, name)))
    drawn = {word.format(name): torch.randn(shape, generator=random) for word, shape in tensors.items()}
    save_file(drawn, folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"config": config, "name": name, "version": "adapters.1.3.0", "hidden_size": 32})
    )
    server.load(name)


def bottleneck(*sites: str) -> dict[str, tuple[int, ...]]:
    shapes = {"down.0.weight": (8, 32), "down.0.bias": (8,), "up.weight": (32, 8), "up.bias": (32,)}
    return {f"{site}.adapters.{{}}.adapter_{word}": shape for site in sites for word, shape in shapes.items()}


LAYERS = ("encoder.layer.0.output", "encoder.layer.1.output")
NETS = {f"invertible_adapters.{{}}.{net}.{i}.{w}": (16, 8)[:n] if i else (8, 16)[:n] for net in "FG" for i in (0, 2)
        for w, n in (("weight", 2), ("bias", 1))}  # fmt: skip


def test_prompts_of_unlike_places_are_refused(bert: Any) -> None:
    bert.made.delta("before", 51, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION"))
    bert.load("before")
    tensors = {"prompt_tuning.prompt_tunings.{}.prompt_embedding.weight": (3, 32)}
    hub(bert, "behind", tensors, architecture="prompt_tuning", prompt_length=3, combine="prefix")
    clash(bert, "Embed", "before", "behind", "their soft prompts stand before the token embeddings and behind row 0")


def test_placed_prompts_of_two_stand_together(bert: Any) -> None:
    tensors = {"prompt_tuning.prompt_tunings.{}.prompt_embedding.weight": (2, 32)}
    for name in ("placed-1", "placed-2"):
        hub(bert, name, tensors, architecture="prompt_tuning", prompt_length=2, combine="prefix_after_bos")
    ask = {"inputs": [pb.Input(ids=[1, 5, 6, 2])], "pooling": pb.POOLING_MEAN}
    both = (["placed-1", "placed-2"], ["placed-2", "placed-1"])
    answers = [bert("Embed", deltas=names, **ask) for names in (["placed-1"], ["placed-2"], *both)]
    told = [list(answer.results[0].values) for answer in answers]
    assert told[2] == pytest.approx(told[3], abs=1e-5), "rows that are embedded already have no order of their own"
    assert all(told[2] != pytest.approx(other, abs=1e-3) for other in told[:2])


def test_prefixes_that_count_otherwise_are_refused(t5: Any) -> None:
    t5.made.delta("counted", 52, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    t5.load("counted")
    tensors = {"prefix_tuning.prefix_tunings.{}.self_prefix.control_trans": (3 * 2 * 2 * 32,)}
    told = {"prefix_length": 3, "flat": True, "encoder_prefix": False, "cross_prefix": False}
    hub(t5, "shifted", tensors, architecture="prefix_tuning", **told)
    clash(t5, "Generate", "counted", "shifted", "by other rules")


def test_what_would_follow_the_whole_stream_is_refused(bert: Any) -> None:
    told = {"output_adapter": True, "non_linearity": "relu", "reduction_factor": 4}
    hub(bert, "stream", bottleneck(*LAYERS), **told, original_ln_before=True, original_ln_after=False)
    hub(bert, "pfeiffer", bottleneck(*LAYERS), **told, original_ln_before=True)
    clash(bert, "Embed", "stream", "pfeiffer", "nothing can follow it")
    assert bert("Embed", deltas=["pfeiffer", "stream"], inputs=[pb.Input(ids=[5, 6])]).delta == "pfeiffer@1+stream@1"


def test_two_invertible_blocks_are_refused(bert: Any) -> None:
    told = {"output_adapter": True, "non_linearity": "relu", "reduction_factor": 4, "original_ln_before": True}
    for name in ("nice-1", "nice-2"):
        hub(bert, name, bottleneck(*LAYERS) | NETS, **told, inv_adapter="nice", inv_adapter_reduction_factor=2)
    clash(bert, "Embed", "nice-1", "nice-2", "both have an invertible block")


def test_a_weight_of_factors_is_refused(members: Any) -> None:
    failure = members.fails("Generate", deltas=["ia3", "lora"], delta_weights=[0.5, 1], **ASK)
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "WEIGHT_MEANS_NOTHING")
    assert "ia3@1" in failure.message and "0.5" in failure.message


def test_what_all_together_cannot_do_is_refused(members: Any) -> None:
    failure = members.fails("Generate", deltas=["lora", "mood"], **ASK)
    assert (failure.code, failure.reason) == (
        "FAILED_PRECONDITION",
        "WRONG_TASK",
    ) and "lora@1+mood@1" in failure.message
    failure = members.fails("Classify", deltas=["lora", "prompt"], **ASK)
    assert failure.reason == "WRONG_TASK"
    failure = members.fails("Generate", deltas=["lora", "nobody"], **ASK)
    assert failure.code == "NOT_FOUND" and "nobody" in failure.message
