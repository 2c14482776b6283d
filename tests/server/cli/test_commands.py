"""What the commands send, and what they print: in a pipe, on a terminal, as JSON."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest

from deltaserve_protos.v1 import deltas_pb2, inference_pb2


def test_generate_prints_the_text_and_no_more(command: Any, server: Any, generated: Any) -> None:
    generated.results[0].samples[0].ClearField("logprobs")
    server.answers["Generate"] = generated
    done = command("generate", "ja?", "--delta", "acme/yes", "--no-special-tokens", "--truncate", "end")
    assert (done.code, done.out, done.err) == (0, "[bold]ja[/bold]\n", "")
    (sent,) = server.requests
    assert sent == inference_pb2.GenerateRequest(
        deltas=["acme/yes"], inputs=[{"text": "ja?"}], add_special_tokens=False, truncate="TRUNCATE_END", sampling={}
    )


def test_every_sampling_field_has_a_flag(command: Any, server: Any, generated: Any) -> None:
    server.answers["Generate"] = generated
    flags = {
        "temperature": "0.5", "top_k": "2", "top_p": "0.5", "min_p": "0.25", "repetition_penalty": "1.5",
        "presence_penalty": "-0.5", "frequency_penalty": "0.25", "seed": str(2**64 - 1), "max_new_tokens": "3",
        "min_new_tokens": "1", "stop": ".", "stop_ids": "4", "ignore_eos": None, "n": "2", "logprobs": "0",
        "prompt_logprobs": "1",
    }  # fmt: skip
    assert set(flags) == set(inference_pb2.Sampling.DESCRIPTOR.fields_by_name)
    words = []
    for name, value in flags.items():
        flag = "--stop-id" if name == "stop_ids" else f"--{name.replace('_', '-')}"
        words += [flag] if value is None else [flag, value]
    assert command("generate", "a", "--backbone", *words).code == 0
    (sent,) = server.requests
    assert sent.backbone
    assert sent.sampling == inference_pb2.Sampling(
        temperature=0.5, top_k=2, top_p=0.5, min_p=0.25, repetition_penalty=1.5, presence_penalty=-0.5,
        frequency_penalty=0.25, seed=2**64 - 1, max_new_tokens=3, min_new_tokens=1, stop=["."], stop_ids=[4],
        ignore_eos=True, n=2, logprobs=0, prompt_logprobs=1,
    )  # fmt: skip


def test_generate_json_has_all_and_is_json(command: Any, server: Any, generated: Any) -> None:
    server.answers["Generate"] = generated
    done = command("generate", "ja?", "-d", "acme/yes", "--json")
    result = json.loads(done.out, parse_constant=pytest.fail)
    assert result["delta"] == "acme/yes@2"
    (sample,) = result["results"][0]["samples"]
    assert (sample["text"], sample["ids"], sample["finish_reason"]) == ("[bold]ja[/bold]", [7], "stop")
    assert sample["logprobs"][0]["chosen"] == {"id": 7, "token": "ja", "logprob": None, "rank": 1}


def test_lines_of_standard_input(command: Any, server: Any, generated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["Generate"] = generated
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n two \nthree"))
    assert command("generate", "zero", "-", "-d", "d").code == 0
    assert [each.text for each in server.requests[0].inputs] == ["zero", "one", " two ", "three"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    done = command("generate", "-", "-d", "d")
    assert done.code == 2
    assert "no lines" in done.err


def test_ids_and_pairs(command: Any, server: Any) -> None:
    server.answers["Classify"] = inference_pb2.ClassifyResponse(
        results=[{"sequence": {"label": "yes", "scores": [0.25, 0.75]}}] * 2, labels=["no", "yes"]
    )
    assert command("classify", "1,2", "3 4", "--ids", "-d", "d").code == 0
    done = command("classify", "a", "b", "--pair", "c", "--pair", "d", "-d", "d", "--scores-as", "raw")
    assert done.out.splitlines()[0].split() == ["input", "label", "no", "yes"]
    assert "0.2500" in done.out
    first, second = server.requests
    assert [list(each.ids) for each in first.inputs] == [[1, 2], [3, 4]]
    assert [(each.text, each.text_pair) for each in second.inputs] == [("a", "c"), ("b", "d")]
    assert second.scores_as == inference_pb2.SCORES_AS_RAW


def test_classify_tokens(command: Any, server: Any) -> None:
    tokens = [{"id": 5, "token": "Bonn", "label": "LOC", "scores": [0.5]}, {"id": 6, "label": "O", "scores": [0.5]}]
    server.answers["Classify"] = inference_pb2.ClassifyResponse(
        results=[{"tokens": {"tokens": tokens}}], labels=["LOC"]
    )
    done = command("classify", "Bonn", "-d", "ner")
    assert [line.split() for line in done.out.splitlines()[2:]] == [["Bonn", "LOC", "0.5000"], ["6", "O", "0.5000"]]


def test_classify_spans(command: Any, server: Any) -> None:
    spans = [{"start_token": 5, "end_token": 6, "text": "in Bonn", "score": 0.5}, {"start_token": 7, "end_token": 7}]
    server.answers["Classify"] = inference_pb2.ClassifyResponse(results=[{"spans": {"spans": spans}}])
    done = command(
        "classify", "where?", "--pair", "he is in Bonn", "-d", "d", "--top-k", "2", "--max-answer-tokens", "9"
    )
    assert done.out.splitlines()[0].split() == ["input", "answer", "score", "tokens"]
    assert [line.split()[-6:] for line in done.out.splitlines()[2:3]] == [["in", "Bonn", "0.5000", "5", "to", "6"]]
    assert (server.requests[0].top_k, server.requests[0].max_answer_tokens) == (2, 9)
    server.answers["Classify"] = inference_pb2.ClassifyResponse(results=[{"spans": {}}])
    assert command("classify", "where?", "-d", "d").out.splitlines()[0].split() == [
        "input",
        "answer",
        "score",
        "tokens",
    ]


def test_classify_choices(command: Any, server: Any) -> None:
    told = {"choice": {"index": 1, "scores": [0.25, 0.75]}}
    server.answers["Classify"] = inference_pb2.ClassifyResponse(results=[told, told])
    done = command("classify", "he", "she", "-c", "runs", "-c", "is red", "-d", "d")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["input", "choice", "score"] and lines[2] == ["he", "runs", "0.2500"]
    assert lines[3] == ["he", "is", "red", "0.7500", "best"] and lines[5][0] == "she"
    (sent,) = server.requests
    assert [[one.text for one in each.choices] for each in sent.inputs] == [["runs", "is red"]] * 2
    for words in (("--ids",), ("--pair", "a")):
        done = command("classify", "1", "-c", "x", "-d", "d", *words)
        assert done.code == 2 and "--choice" in done.err


def test_stream(command: Any, server: Any) -> None:
    piece, end = inference_pb2.StreamGenerateResponse, inference_pb2.FINISH_REASON_STOP
    server.answers["StreamGenerate"] = [piece(text="j", ids=[1]), piece(text="a", ids=[2], finish_reason=end)]
    assert command("generate", "a", "-d", "d", "--stream").out == "ja\n"
    server.answers["StreamGenerate"] = [piece(ids=[1]), piece(ids=[2], finish_reason=end)]
    assert command("generate", "a", "-d", "d", "--stream").out == "1 2\n"
    server.answers["StreamGenerate"] = [
        piece(text="b", input_index=1), piece(text="a"), piece(text="B", input_index=1, finish_reason=end),
        piece(text="A", finish_reason=end),
    ]  # fmt: skip
    assert command("generate", "a", "b", "-d", "d", "--stream").out == "1\tbB\n0\taA\n"
    lines = command("generate", "a", "b", "-d", "d", "--stream", "--json").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["b", "a", "B", "A"]


def test_embed(command: Any, server: Any) -> None:
    server.answers["Embed"] = inference_pb2.EmbedResponse(results=[{"values": [0.6, 0.8]}], pooling="POOLING_CLS")
    done = command("embed", "a", "-d", "d", "--no-normalize", "--pooling", "cls")
    assert done.out.splitlines()[2].split() == ["a", "2", "1.0000", "0.6000", "0.8000"]
    (sent,) = server.requests
    assert (sent.pooling, sent.HasField("normalize"), sent.normalize) == (inference_pb2.POOLING_CLS, True, False)
    assert json.loads(command("embed", "a", "-d", "d", "--json").out)["pooling"] == "cls"


def test_score(command: Any, server: Any) -> None:
    scores = {"scores": [{"logprob": -1.5, "greedy": True}, {"logprob": -2}]}
    server.answers["Score"] = inference_pb2.ScoreResponse(results=[scores, scores])
    done = command("score", "a", "b", "-c", "x", "-c", "y", "-d", "d", "--logprobs", "3")
    assert [line.split() for line in done.out.splitlines()[2:]] == [
        ["a", "x", "-1.5000", "greedy"], ["a", "y", "-2.0000"], ["b", "x", "-1.5000", "greedy"], ["b", "y", "-2.0000"],
    ]  # fmt: skip
    (sent,) = server.requests
    assert [[one.text for one in each.continuations] for each in sent.continuations] == [["x", "y"], ["x", "y"]]
    assert sent.logprobs == 3


def test_deltas(command: Any, server: Any, delta: deltas_pb2.Delta) -> None:
    server.answers["LoadDelta"] = deltas_pb2.LoadDeltaResponse(delta=delta)
    server.answers["GetDelta"] = deltas_pb2.GetDeltaResponse(delta=delta)
    server.answers["ListDeltas"] = deltas_pb2.ListDeltasResponse(deltas=[delta])
    server.answers["UnloadDelta"] = deltas_pb2.UnloadDeltaResponse(deltas=[delta], freed_bytes=1536)
    loaded = command(
        "deltas", "load", "acme/yes", "yes-lora", "--label", "no", "--label", "yes", "--replace",
        "--task", "sequence_classification", "--problem-type", "regression", "--task-id", "0",
    )  # fmt: skip
    assert "acme/yes@2" in loaded.out
    assert "no, yes (guessed)" in loaded.out
    assert re.search(r"task id +3 ", loaded.out)
    assert "made for [bold]another[/bold] backbone" in loaded.out
    assert command("deltas", "show", "acme/yes@2").out == loaded.out
    row = command("deltas", "ls").out.splitlines()[2].split()
    assert row[:3] == ["acme/yes@2", "lora", "head"]
    assert row[-7:] == ["1.5", "M", "3.0", "MiB", "resident", "0", "1"]
    assert command("deltas", "unload", "acme/yes", "--wait").out == "unloaded acme/yes@2; 1.5 KiB given back\n"
    assert json.loads(command("deltas", "ls", "--json").out)[0]["labels"] == ["no", "yes"]
    assert json.loads(command("deltas", "unload", "acme/yes", "--json").out)["freed_bytes"] == 1536
    assert server.requests[0] == deltas_pb2.LoadDeltaRequest(
        name="acme/yes", source="yes-lora", labels=["no", "yes"], replace=True,
        task=deltas_pb2.TASK_SEQUENCE_CLASSIFICATION, problem_type=deltas_pb2.PROBLEM_TYPE_REGRESSION, task_id=0,
    )  # fmt: skip
    assert server.requests[3] == deltas_pb2.UnloadDeltaRequest(name="acme/yes", wait=True)


def test_info(command: Any, server: Any) -> None:
    steps = [
        {"index": number, "phase": "decode", "kinds": ["lora"], "deltas": ["a@1"], "rows": 4} for number in range(30)
    ]
    server.answers["GetServerInfo"] = deltas_pb2.GetServerInfoResponse(
        version="0.1.0", backbone="tiny", family="t5", uptime=3723, steps=steps, memory={"backbone_bytes": 5 << 20}
    )
    done = command("info", "--steps")
    assert "up 1 h 2 min" in done.out
    assert "tiny (t5" in done.out
    assert "5.0 MiB" in done.out
    assert [line.split()[0] for line in done.out.splitlines()[-20:]] == [str(number) for number in range(10, 30)]
    assert server.requests[0].steps
    assert len(json.loads(command("info", "--steps", "--json").out)["steps"]) == 30


def test_several_answers_are_a_table_on_a_terminal(server: Any, generated: Any) -> None:
    generated.results.extend([generated.results[0]])
    server.answers["Generate"] = generated
    ours, theirs = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-m", "deltaserve", "generate", "eins", "zwei", "-d", "d"],
        env={**os.environ, "COLUMNS": "100", "TERM": "xterm"}, stdout=theirs, stderr=theirs, timeout=30,
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert process.returncode == 0, shown
    assert all(word in shown for word in ("input", "output", "eins", "zwei", "[bold]ja[/bold]", "stop"))
