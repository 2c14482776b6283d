"""What is refused, how, and in which words: one row each. Nothing of a refused request was queued."""

import time
from typing import Any

import grpc
import pytest

from deltaserve_protos.v1 import deltas_pb2 as dp
from deltaserve_protos.v1 import inference_pb2 as pb

ONE = [pb.Input(ids=[5, 6, 7])]
MANY = [pb.Input(ids=[5])] * 65
WORDS = [pb.Input(text="ab")]
TWO = [pb.Choice(text="bad"), pb.Choice(text="good film")]
CHOOSE = pb.Input(text="the food was", choices=TWO)
SAID = pb.ScoreRequest.Continuations(continuations=[pb.Continuation(ids=[5])])
EMPTY = pb.ScoreRequest.Continuations()


def bare(**fields: Any) -> dict[str, Any]:
    return {"backbone": True, "inputs": ONE} | fields


def sampled(**fields: Any) -> dict[str, Any]:
    return bare(sampling=pb.Sampling(**fields))


INVALID: list[tuple[str, str, dict[str, Any], str, str]] = [
    # family, method, fields, the field that is named, what the message says
    ("gpt2", "Generate", {"inputs": ONE}, "deltas", "`backbone` to true"),
    ("gpt2", "Generate", {"inputs": ONE, "deltas": ["lora"] * 9}, "deltas", "8 at most"),
    ("gpt2", "Generate", {"inputs": ONE, "deltas": ["lora", "lora@1"]}, "deltas[1]", "named twice"),
    ("gpt2", "Generate", {"inputs": ONE, "deltas": ["lora", "no name"]}, "deltas[1]", "a name is"),
    ("gpt2", "Generate", {"inputs": ONE, "deltas": ["lora"], "delta_weights": [1, 2]}, "delta_weights", "2 weights"),
    ("gpt2", "Score", bare(delta_weights=[1], continuations=[SAID]), "delta_weights", "1 weights for 0"),
    ("gpt2", "Embed", {"inputs": ONE, "deltas": ["lora"], "delta_weights": [0]}, "delta_weights[0]", "not 0"),
    (
        "gpt2",
        "StreamGenerate",
        {"inputs": ONE, "deltas": ["prompt", "lora"], "delta_weights": [1, float("nan")]},
        "delta_weights[1]",
        "finite",
    ),
    ("gpt2", "Generate", bare(deltas=["lora"]), "backbone", "set one of the two"),
    ("gpt2", "Generate", {"inputs": ONE, "deltas": ["No Name"]}, "deltas[0]", "a name is"),
    ("gpt2", "Generate", {"inputs": ONE, "deltas": ["lora@0"]}, "deltas[0]", "from 1"),
    ("gpt2", "Generate", {"inputs": ONE, "deltas": ["a/b/c"]}, "deltas[0]", "a name is"),
    ("gpt2", "Generate", {"inputs": ONE, "deltas": [""]}, "deltas[0]", "a name is"),
    ("gpt2", "Generate", bare(inputs=[]), "inputs", "1 to 64"),
    ("gpt2", "Generate", bare(inputs=MANY), "inputs", "65 inputs"),
    ("gpt2", "Generate", bare(inputs=[pb.Input()]), "inputs[0]", "neither"),
    ("gpt2", "Generate", bare(inputs=[*ONE, pb.Input(text="a", ids=[5])]), "inputs[1]", "both"),
    ("gpt2", "Generate", bare(inputs=[pb.Input(text="")]), "inputs[0]", "no tokens"),
    ("gpt2", "Generate", bare(inputs=[pb.Input(ids=[5, 259])]), "inputs[0].ids", "vocabulary size 259"),
    ("gpt2", "Generate", bare(inputs=[pb.Input(ids=[5], text_pair="a")]), "inputs[0].text_pair", "with text"),
    ("gpt2", "Generate", bare(inputs=[pb.Input(ids=[5], token_type_ids=[0])]), "inputs[0].token_type_ids", "segments"),
    ("bert", "Embed", bare(inputs=[pb.Input(ids=[4], token_type_ids=[0, 1])]), "inputs[0].token_type_ids", "2 of them"),
    ("bert", "Embed", bare(inputs=[pb.Input(ids=[4], token_type_ids=[2])]), "inputs[0].token_type_ids", "0 to 1"),
    ("bert", "Embed", bare(inputs=[pb.Input(text="a", token_type_ids=[0])]), "inputs[0].token_type_ids", "its own"),
    ("gpt2", "Generate", bare(truncate=7), "truncate", "no value 7"),
    ("gpt2", "Generate", sampled(temperature=-1), "sampling.temperature", "from 0 to 100"),
    ("gpt2", "Generate", sampled(temperature=float("nan")), "sampling.temperature", "nan"),
    ("gpt2", "Generate", sampled(top_p=0), "sampling.top_p", "above 0"),
    ("gpt2", "Generate", sampled(top_p=1.5), "sampling.top_p", "up to 1"),
    ("gpt2", "Generate", sampled(min_p=2), "sampling.min_p", "from 0 to 1"),
    ("gpt2", "Generate", sampled(repetition_penalty=0), "sampling.repetition_penalty", "above 0"),
    ("gpt2", "Generate", sampled(presence_penalty=3), "sampling.presence_penalty", "-2 to 2"),
    ("gpt2", "Generate", sampled(frequency_penalty=-3), "sampling.frequency_penalty", "-2 to 2"),
    ("gpt2", "Generate", sampled(max_new_tokens=0), "sampling.max_new_tokens", "at least 1"),
    ("gpt2", "Generate", sampled(max_new_tokens=64), "sampling.max_new_tokens", "limit of 64"),
    ("gpt2", "Generate", sampled(max_new_tokens=2, min_new_tokens=3), "sampling.min_new_tokens", "above max_new"),
    ("gpt2", "Generate", sampled(min_new_tokens=62), "sampling.min_new_tokens", "room that input 0 leaves"),
    ("gpt2", "Generate", sampled(n=0), "sampling.n", "from 1 to 16"),
    ("gpt2", "Generate", sampled(n=17, temperature=1), "sampling.n", "from 1 to 16"),
    ("gpt2", "Generate", sampled(n=2), "sampling.n", "temperature"),
    ("gpt2", "Generate", sampled(logprobs=21), "sampling.logprobs", "from 0 to 20"),
    ("gpt2", "Generate", sampled(prompt_logprobs=21), "sampling.prompt_logprobs", "from 0 to 20"),
    ("gpt2", "Generate", sampled(stop=["x"] * 17), "sampling.stop", "16 at most"),
    ("gpt2", "Generate", sampled(stop=["x", ""]), "sampling.stop[1]", "1 to 256"),
    ("gpt2", "Generate", sampled(stop=["x" * 257]), "sampling.stop[0]", "1 to 256"),
    ("gpt2", "Generate", sampled(stop_ids=[5] * 17), "sampling.stop_ids", "16 at most"),
    ("gpt2", "Generate", sampled(stop_ids=[5, 259]), "sampling.stop_ids[1]", "vocabulary"),
    ("gpt2", "StreamGenerate", bare(inputs=[]), "inputs", "1 to 64"),
    ("gpt2", "StreamGenerate", sampled(n=17), "sampling.n", "from 1 to 16"),
    ("gpt2", "Generate", bare(inputs=[pb.Input(ids=[5] * 64)]), "inputs[0]", "at most 63"),
    ("gpt2", "Embed", bare(inputs=[*ONE, pb.Input(ids=[5] * 65)]), "inputs[1]", "at most 64"),
    ("gpt2", "Embed", bare(pooling=9), "pooling", "no value 9"),
    ("bert", "Classify", {"deltas": ["mood"], "inputs": ONE, "scores_as": 9}, "scores_as", "no value 9"),
    ("bert", "Classify", {"deltas": ["mood"], "inputs": ONE, "top_k": 2}, "top_k", "is for question_answering"),
    ("bert", "Classify", {"deltas": ["tags"], "inputs": ONE, "max_answer_tokens": 2}, "max_answer_tokens", "is for"),
    ("bert", "Classify", {"deltas": ["where"], "inputs": ONE, "top_k": 0}, "top_k", "1 to 64"),
    ("bert", "Classify", {"deltas": ["where"], "inputs": ONE, "top_k": 65}, "top_k", "1 to 64"),
    ("bert", "Classify", {"deltas": ["where"], "inputs": ONE, "max_answer_tokens": 0}, "max_answer_tokens", "to 512"),
    ("bert", "Classify", {"deltas": ["where"], "inputs": ONE, "scores_as": pb.SCORES_AS_SIGMOID}, "scores_as", "RAW"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": ONE}, "inputs[0].choices", "1 to 64"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [CHOOSE, pb.Input(text="a", choices=TWO * 33)]},
     "inputs[1].choices", "66 choices"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [pb.Input(choices=TWO)]}, "inputs[0].text", "has none"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [pb.Input(text="a", choices=[*TWO, pb.Choice(ids=[4])])]},
     "inputs[0].choices[2].ids", "a whole row"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [pb.Input(text="a", choices=[*TWO, pb.Choice()])]},
     "inputs[0].choices[2]", "neither"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [pb.Input(text="a", text_pair="b", choices=TWO)]},
     "inputs[0].text_pair", "nothing beside them"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [pb.Input(ids=[4], choices=TWO)]}, "inputs[0].ids", "beside"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [pb.Input(choices=[pb.Choice(ids=[99])])]},
     "inputs[0].choices[0].ids", "vocabulary"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [pb.Input(text="a", choices=[pb.Choice(text="bad " * 70)])]},
     "inputs[0].choices[0]", "choice 0 of input 0 has 74 tokens"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [CHOOSE], "top_k": 1}, "top_k", "delta for multiple_choice"),
    ("bert", "Classify", {"deltas": ["which"], "inputs": [pb.Input(text="a" * 8000, choices=TWO * 32)] * 2},
     "inputs", "524288 are read at most"),
    ("bert", "Classify", {"deltas": ["mood"], "inputs": [CHOOSE]}, "inputs[0].choices", "for multiple choice"),
    ("bert", "Embed", bare(inputs=[*ONE, CHOOSE]), "inputs[1].choices", "for multiple choice"),
    ("bert", "LoadDelta", {"name": "a", "source": "which", "labels": ["x"], "task": dp.TASK_MULTIPLE_CHOICE},
     "labels", "no labels"),
    ("bert", "LoadDelta", {"name": "a", "source": "where", "labels": ["x", "y"]}, "labels", "no labels"),
    ("bert", "LoadDelta", {"name": "a", "source": "where", "problem_type": 2}, "problem_type", "no labels"),
    ("gpt2", "Score", bare(), "continuations", "0 sets"),
    ("gpt2", "Score", bare(continuations=[SAID, SAID]), "continuations", "2 sets"),
    ("gpt2", "Score", bare(continuations=[EMPTY]), "continuations[0].continuations", "1 to 64"),
    ("gpt2", "Score", bare(continuations=[SAID], logprobs=21), "logprobs", "from 0 to 20"),
    ("gpt2", "Score", bare(continuations=[{"continuations": [pb.Continuation()]}]),
     "continuations[0].continuations[0]", "neither"),
    ("gpt2", "Score", bare(continuations=[{"continuations": [pb.Continuation(ids=[300])]}]),
     "continuations[0].continuations[0].ids", "vocabulary"),
    ("gpt2", "Score", bare(continuations=[{"continuations": [pb.Continuation(ids=[5] * 64)]}]),
     "continuations[0].continuations", "limit of 64"),
    ("gpt2", "LoadDelta", {"name": "Bad", "source": "lora"}, "name", "a name is"),
    ("gpt2", "LoadDelta", {"name": "a@1", "source": "lora"}, "name", "without a version"),
    ("gpt2", "LoadDelta", {"name": "a,b", "source": "lora"}, "name", "a name is"),
    ("gpt2", "LoadDelta", {"name": "a" * 64, "source": "lora"}, "name", "1 to 63"),
    ("gpt2", "LoadDelta", {"name": "a", "source": ""}, "source", "relative to --delta-root"),
    ("gpt2", "LoadDelta", {"name": "a", "source": "/etc"}, "source", "absolute"),
    ("gpt2", "LoadDelta", {"name": "a", "source": "lora/../../backbone"}, "source", "`..`"),
    ("gpt2", "LoadDelta", {"name": "a", "source": "lo\0ra"}, "source", "relative to --delta-root"),
    ("gpt2", "LoadDelta", {"name": "a", "source": "lora", "task": 9}, "task", "no value 9"),
    ("gpt2", "LoadDelta", {"name": "a", "source": "lora", "problem_type": 9}, "problem_type", "no value 9"),
    ("gpt2", "LoadDelta", {"name": "a", "source": "mood", "labels": ["x", "x", "y"]}, "labels", "the same"),
    ("gpt2", "LoadDelta", {"name": "a", "source": "mood", "labels": ["x", "", "y"]}, "labels[1]", "1 to 256"),
    ("gpt2", "UnloadDelta", {"name": "a@x"}, "name", "number"),
    ("gpt2", "GetDelta", {"name": "A"}, "name", "a name is"),
    ("gpt2", "ListDeltas", {"page_size": 0}, "page_size", "1 to 1000"),
    ("gpt2", "ListDeltas", {"page_size": 1001}, "page_size", "1 to 1000"),
    ("gpt2", "ListDeltas", {"page_token": "%"}, "page_token", "not one that"),
    ("gpt2", "ListDeltas", {"page_token": "bG9yYQ=="}, "page_token", "not one that"),
]  # fmt: skip

PRECONDITION: list[tuple[str, str, dict[str, Any], str, str]] = [
    # family, method, fields, reason, what the message says
    ("bert", "Generate", bare(), "WRONG_TASK", "Classify, Embed"),
    ("bert", "StreamGenerate", bare(), "WRONG_TASK", "Classify, Embed"),
    ("bert", "Score", bare(continuations=[SAID]), "WRONG_TASK", "Classify, Embed"),
    ("t5", "Classify", {"deltas": ["lora"], "inputs": ONE}, "WRONG_TASK", "Generate, Embed, Score"),
    ("bert", "Classify", bare(), "NO_HEAD", "name a delta"),
    ("bert", "Classify", {"deltas": ["plain"], "inputs": ONE}, "WRONG_TASK", "it serves Embed"),
    ("gpt2", "Classify", {"deltas": ["lora"], "inputs": ONE}, "WRONG_TASK", "it serves Generate, Embed, Score"),
    ("gpt2", "Generate", {"deltas": ["mood"], "inputs": ONE}, "WRONG_TASK", "it serves Classify, Embed"),
    ("gpt2", "Score", {"deltas": ["mood"], "inputs": ONE, "continuations": [SAID]}, "WRONG_TASK", "Classify, Embed"),
    ("llama", "Generate", bare(inputs=WORDS), "NO_TOKENIZER", "send ids"),
    ("llama", "Generate", sampled(stop=["x"]), "NO_TOKENIZER", "sampling.stop"),
    ("llama", "Score", bare(continuations=[{"continuations": [pb.Continuation(text="x")]}]), "NO_TOKENIZER", "ids"),
    ("t5", "Generate", sampled(prompt_logprobs=1), "NOT_SERVED_HERE", "Score"),
    ("gpt2", "LoadDelta", {"name": "a", "source": "nowhere"}, "BAD_CHECKPOINT", "nowhere"),
    ("bert", "Score", {"deltas": ["where"], "inputs": ONE, "continuations": [SAID]}, "WRONG_TASK", "Classify, Embed"),
    (
        "bert",
        "LoadDelta",
        {"name": "a", "source": "mood", "task": dp.TASK_QUESTION_ANSWERING},
        "BAD_CHECKPOINT",
        "no tensors of its head 'qa_outputs'",
    ),
    ("t5", "LoadDelta", {"name": "a", "source": "lora", "task": dp.TASK_QUESTION_ANSWERING}, "TASK_NOT_SERVED", "t5"),
    ("gpt2", "LoadDelta", {"name": "a", "source": "mood", "task": dp.TASK_MULTIPLE_CHOICE}, "TASK_NOT_SERVED", "gpt2"),
    (
        "bert",
        "LoadDelta",
        {"name": "a", "source": "mood", "task": dp.TASK_MULTIPLE_CHOICE},
        "BAD_CHECKPOINT",
        "has 3 outputs; for this task it has 1",
    ),
]

MISSING: list[tuple[str, dict[str, Any], str]] = [
    ("Generate", {"deltas": ["lorra"], "inputs": ONE}, 'did you mean "lora"?'),
    ("Embed", {"deltas": ["zzz"], "inputs": ONE}, "ListDeltas names them"),
    ("Generate", {"deltas": ["lora@7"], "inputs": ONE}, "lora@1"),
    ("Generate", {"deltas": ["acme/lora"], "inputs": ONE}, '"lora"'),
    ("GetDelta", {"name": "lorra"}, 'did you mean "lora"?'),
    ("UnloadDelta", {"name": "lora@9"}, "lora@1"),
]


def row(case: tuple[Any, ...]) -> str:
    return " ".join(part for part in case if isinstance(part, str))


@pytest.mark.parametrize("case", INVALID, ids=row)
def test_invalid_argument(case: Any, request: pytest.FixtureRequest) -> None:
    family, method, fields, field, said = case
    failure = request.getfixturevalue(family).fails(method, **fields)
    assert (failure.code, failure.field) == ("INVALID_ARGUMENT", field), failure.message
    assert said in failure.message
    assert failure.details["ErrorInfo"].domain == "deltaserve"
    assert failure.details["RequestInfo"].request_id


@pytest.mark.parametrize("case", PRECONDITION, ids=row)
def test_failed_precondition(case: Any, request: pytest.FixtureRequest) -> None:
    family, method, fields, reason, said = case
    failure = request.getfixturevalue(family).fails(method, **fields)
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", reason), failure.message
    assert said in failure.message


@pytest.mark.parametrize("case", MISSING, ids=row)
def test_not_found(case: Any, gpt2: Any) -> None:
    method, fields, said = case
    failure = gpt2.fails(method, **fields)
    assert (failure.code, failure.reason) == ("NOT_FOUND", "DELTA_NOT_FOUND")
    assert said in failure.message


def test_every_method_is_refused_in_some_way() -> None:
    refused = {row[1] for row in INVALID + PRECONDITION} | {row[0] for row in MISSING}
    methods = [m for file in (pb, dp) for s in file.DESCRIPTOR.services_by_name.values() for m in s.methods_by_name]
    assert set(methods) - refused == {"GetServerInfo"}


def test_one_bad_input_queues_none(gpt2: Any) -> None:
    before = gpt2("GetServerInfo", steps=True).steps[-1:]
    gpt2.fails("Generate", backbone=True, inputs=[*ONE * 5, pb.Input(ids=[999])])
    after = gpt2("GetServerInfo", steps=True)
    assert list(after.steps[-1:]) == list(before) and gpt2.idle()


def test_more_sequences_than_the_queue_holds_never_fit(called: Any) -> None:
    server = called("gpt2", max_queued=8)
    ask = {"backbone": True, "inputs": ONE * 9, "sampling": pb.Sampling(max_new_tokens=1)}
    failure = server.fails("Generate", **ask)
    assert (failure.code, failure.reason) == ("INVALID_ARGUMENT", "REQUEST_TOO_LARGE")
    assert len(server("Generate", **ask | {"inputs": ONE * 8}).results) == 8


def test_a_full_queue_is_told_when_to_come_back(called: Any) -> None:
    """What waits is bounded: one runs, eight wait, and what is over that is refused and not kept."""
    server = called("llama", max_queued=8, max_running=1)
    long = pb.StreamGenerateRequest(
        backbone=True, inputs=ONE, sampling=pb.Sampling(max_new_tokens=4000, ignore_eos=True)
    )
    streams = [server.inference.StreamGenerate(long, timeout=60)]
    next(streams[0])
    streams += [server.inference.StreamGenerate(long, timeout=60) for _ in range(12)]
    refused = []
    for stream in streams[1:]:
        # A call that has ended takes no callback any more.
        if not stream.add_callback(lambda stream=stream: refused.append(stream.code())):
            refused.append(stream.code())
    until = time.monotonic() + 30
    while len(refused) < 4 and time.monotonic() < until:
        server("GetServerInfo")
    assert refused == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4
    failure = server.fails("Generate", backbone=True, inputs=ONE)
    assert (failure.code, failure.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert failure.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
    assert server("GetServerInfo").waiting == 8
    for stream in streams:
        stream.cancel()
