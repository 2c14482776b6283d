"""Arguments become the contract's fields, all of them, and wrong ones say which they are."""

import inspect
from typing import Any, get_args, get_type_hints

import pytest

from deltaserve_client import (
    AsyncClient,
    AsyncDeltas,
    Client,
    Deltas,
    Input,
    connection,
    inputs,
    options,
    requests,
    words,
)
from deltaserve_protos.v1 import deltas_pb2, inference_pb2

SAMPLING: dict[str, Any] = {
    "temperature": 0.5, "top_k": 2, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5, "presence_penalty": 0.5,
    "frequency_penalty": 0.25, "seed": 2**63, "max_new_tokens": 3, "min_new_tokens": 1, "stop": ["."], "stop_ids": [4],
    "ignore_eos": True, "n": 2, "logprobs": 0, "prompt_logprobs": 1,
}  # fmt: skip


def test_every_sampling_field_is_a_keyword() -> None:
    assert set(SAMPLING) == set(inference_pb2.Sampling.DESCRIPTOR.fields_by_name)
    for build in (requests.generate, requests.stream):
        sampling = build("a", {"delta": "d", **SAMPLING}).request.sampling
        assert {
            name: list(v) if name.startswith("stop") else v for name in SAMPLING for v in [getattr(sampling, name)]
        } == (SAMPLING)
        assert sampling.HasField("logprobs")  # 0 is not the same as left out


@pytest.mark.parametrize(
    ("message", "keywords", "positional"),
    [
        (inference_pb2.GenerateRequest, options.GenerateOptions, {"inputs", "sampling"}),
        (inference_pb2.StreamGenerateRequest, options.GenerateOptions, {"inputs", "sampling"}),
        (inference_pb2.ClassifyRequest, options.ClassifyOptions, {"inputs"}),
        (inference_pb2.EmbedRequest, options.EmbedOptions, {"inputs"}),
        (inference_pb2.ScoreRequest, options.ScoreOptions, {"inputs", "continuations"}),
        (deltas_pb2.LoadDeltaRequest, options.LoadOptions, {"name", "source"}),
        (deltas_pb2.UnloadDeltaRequest, options.UnloadOptions, {"name"}),
    ],
)
def test_keywords_are_the_fields(message: Any, keywords: type, positional: set[str]) -> None:
    sampling = set(SAMPLING) if "sampling" in positional else set()
    fields = set(message.DESCRIPTOR.fields_by_name)
    assert set(get_type_hints(keywords)) - {"timeout", "delta"} - sampling == fields - positional


@pytest.mark.parametrize(
    ("literal", "known"),
    [
        (options.TruncateWord, words.TRUNCATE),
        (options.ScoresAsWord, words.SCORES_AS),
        (options.PoolingWord, words.POOLING),
        (options.TaskWord, words.TASK),
        (options.ProblemTypeWord, words.PROBLEM_TYPE),
    ],
)
def test_words_are_the_enums(literal: Any, known: words.Words) -> None:
    assert list(get_args(literal)) == known.all
    assert [known.word(known.number("x", word)) for word in known.all] == known.all


def test_left_out_is_unset() -> None:
    bare = requests.generate("a", {"delta": "d"})
    told: Any = dict.fromkeys(options.GenerateOptions.__annotations__)
    assert requests.generate("a", {**told, "delta": "d"}) == bare
    assert (bare.timeout, bare.metadata) == (None, (("x-deltaserve-delta", "d"),))


def test_delta_that_is_no_header_value_goes_in_the_request_only() -> None:
    call = requests.embed("a", {"delta": "größer\n"})
    assert call.metadata == ()
    assert list(call.request.deltas) == ["größer\n"]  # type: ignore[attr-defined]


def test_several_deltas_keep_their_order() -> None:
    call = requests.embed("a", {"deltas": ("b", "a")})
    assert list(call.request.deltas) == ["b", "a"]  # type: ignore[attr-defined]
    assert call.metadata == (("x-deltaserve-delta", "b,a"),)


def test_inputs() -> None:
    assert inputs.wire("a") == [inference_pb2.Input(text="a")]
    assert inputs.wire(Input(ids=[1, 2], token_type_ids=(0, 1))) == [
        inference_pb2.Input(ids=[1, 2], token_type_ids=[0, 1])
    ]
    assert inputs.wire(("", (3,), Input("a", "b"))) == [
        inference_pb2.Input(text=""), inference_pb2.Input(ids=[3]), inference_pb2.Input(text="a", text_pair="b"),
    ]  # fmt: skip
    assert inputs.wire([]) == []


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ([1, 2], TypeError, r"inputs\[0\]: 1 is neither text nor .* write \[\[1, 2, 3\]\]"),
        ([None], TypeError, r"inputs\[0\]: None"),
        ([["a"]], TypeError, r"inputs\[0\]: \['a'\]"),
        ([[1.5]], TypeError, r"inputs\[0\]"),
        (None, TypeError, "inputs: None is neither text nor a sequence"),
        (b"bytes", TypeError, "inputs"),
        ({"text": "a"}, TypeError, "inputs"),
        ([[-1]], ValueError, r"inputs\[0\]: a token id is a number from 0"),
        ([[1 << 32]], ValueError, r"inputs\[0\]"),
        (Input("a", choices="bc"), TypeError, r"inputs\.choices: one text is no choice"),
        ([Input("a", choices=["b", 3])], TypeError, r"inputs\[0\]\.choices\[1\]: 3 is neither"),
        ([Input("a", choices=["b", Input("c")])], ValueError, r"inputs\[0\]\.choices\[1\]: a choice that is an Input"),
    ],
)
def test_wrong_inputs(given: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        inputs.wire(given)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": "a", "ids": [1]},
        {"ids": [1], "text_pair": "b"},
        {"text": "a", "token_type_ids": [0]},
        {"ids": [1], "choices": ["a"]},
        {"text": "a", "text_pair": "b", "choices": ["c"]},
    ],
)
def test_wrong_input(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"text|ids"):
        Input(**fields)


@pytest.mark.parametrize(
    ("given", "continuations", "sets"),
    [
        ("a", "x", [["x"]]),
        ("a", ["x", "y"], [["x", "y"]]),
        (Input("a"), [[1, 2], "y"], [[[1, 2], "y"]]),
        (["a", "b"], [["x"], ["y", "z"]], [["x"], ["y", "z"]]),
        (["a", "b"], ["x", "y"], [["x"], ["y"]]),
    ],
)
def test_continuations(given: Any, continuations: Any, sets: list[list[Any]]) -> None:
    wired = inputs.wire_continuations(given, continuations)
    assert [
        [one.text if one.HasField("text") else list(one.ids) for one in each.continuations] for each in wired
    ] == sets


@pytest.mark.parametrize(
    ("given", "continuations", "error"),
    [
        ("a", [1, 2], TypeError),
        (["a", "b"], "xy", TypeError),
        (["a", "b"], [["x"]], ValueError),
        ("a", None, TypeError),
    ],
)
def test_wrong_continuations(given: Any, continuations: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="continuations"):
        inputs.wire_continuations(given, continuations)


@pytest.mark.parametrize(
    ("told", "error", "match"),
    [
        ({"delta": "d", "deltas": ["e"]}, ValueError, "either delta or deltas"),
        ({"deltas": "d"}, TypeError, "deltas is a sequence"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"stop_ids": 5}, TypeError, "stop_ids"),
        ({"truncate": "middle"}, ValueError, "truncate: 'middle' is none of none, start, end"),
        ({"beams": 4}, TypeError, "unexpected keyword argument 'beams'"),
    ],
)
def test_wrong_options(told: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        requests.generate("a", told)


def test_the_two_clients_are_twins() -> None:
    for blocking, waiting in ((Client, AsyncClient), (Deltas, AsyncDeltas)):
        theirs = {name.replace("aclose", "close"): method for name, method in methods(waiting).items()}
        assert set(methods(blocking)) == set(theirs)
        for name, method in methods(blocking).items():
            assert inspect.signature(method).parameters == inspect.signature(theirs[name]).parameters


def methods(client: type) -> dict[str, Any]:
    return {name: method for name, method in vars(client).items() if callable(method) and not name.startswith("_")}


def test_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTASERVE_ADDRESS", raising=False)
    assert connection.Connection.to(None, 1).address == "127.0.0.1:9000"
    monkeypatch.setenv("DELTASERVE_ADDRESS", "gpu-7:9000")
    assert connection.Connection.to(None, 1).address == "gpu-7:9000"
    assert connection.Connection.to("gpu-8:9000", 1).address == "gpu-8:9000"
