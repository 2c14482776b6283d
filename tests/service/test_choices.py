"""Multiple choice: each choice's score is PEFT's, and one request may have many inputs with many choices."""

from typing import Any

import torch

from deltaserve_kernels.testing import error_ratio
from deltaserve_protos.v1 import deltas_pb2 as dp
from deltaserve_protos.v1 import inference_pb2 as pb

EXACT = 1e-5
FIRST = ("the film was", ["bad", "not a very good film", "food"])
SECOND = ("is the food good", ["very", "the film was not bad", "bad", "is a", "the the"])


def asked(text: str, choices: list[str]) -> pb.Input:
    return pb.Input(text=text, choices=[pb.Choice(text=choice) for choice in choices])


def logits(server: Any, text: str, choices: list[str]) -> torch.Tensor:
    """PEFT's own [choices], each of them alone, so that nothing is padded."""
    model = server.made.tuned("which", "AutoModelForMultipleChoice")
    tokenizer = server.app.served.backbone.tokenizer
    with torch.no_grad():
        rows = [tokenizer(text, choice, return_tensors="pt") for choice in choices]
        return torch.stack([model(**{k: v.unsqueeze(0) for k, v in row.items()}).logits[0, 0] for row in rows])


def test_scores_are_pefts(bert: Any) -> None:
    request = {"deltas": ["which"], "inputs": [asked(*FIRST), asked(*SECOND)]}
    raw = bert("Classify", **request, scores_as=pb.SCORES_AS_RAW)
    likely = bert("Classify", **request)
    assert (raw.scores_as, likely.scores_as) == (pb.SCORES_AS_RAW, pb.SCORES_AS_SOFTMAX)
    assert not raw.labels and raw.delta == "which@1"
    for given, plain, one in zip((FIRST, SECOND), raw.results, likely.results, strict=True):
        wanted = logits(bert, *given)
        assert error_ratio(torch.tensor(list(plain.choice.scores)), wanted) < EXACT
        assert error_ratio(torch.tensor(list(one.choice.scores)), wanted.softmax(0)) < EXACT
        assert one.choice.index == plain.choice.index == int(wanted.argmax())
    tokenizer = bert.app.served.backbone.tokenizer
    pairs = [(text, choice) for text, choices in (FIRST, SECOND) for choice in choices]
    assert raw.usage.input_tokens == sum(len(tokenizer(*pair)["input_ids"]) for pair in pairs)


def test_rows_of_ids(bert: Any) -> None:
    tokenizer = bert.app.served.backbone.tokenizer
    rows = [tokenizer(FIRST[0], choice) for choice in FIRST[1]]
    choices = [pb.Choice(ids=row["input_ids"], token_type_ids=row["token_type_ids"]) for row in rows]
    told = bert("Classify", deltas=["which"], inputs=[pb.Input(choices=choices), asked(*FIRST)])
    by_ids, by_text = told.results
    assert by_ids.choice.index == by_text.choice.index
    scores = [torch.tensor(list(one.choice.scores)) for one in (by_ids, by_text)]
    assert error_ratio(*scores) < EXACT


def test_one_choice_is_certain(bert: Any) -> None:
    (result,) = bert("Classify", deltas=["which"], inputs=[asked("the food", ["bad"])]).results
    assert (result.choice.index, list(result.choice.scores)) == (0, [1.0])


def test_a_long_text_is_cut_for_each_choice(bert: Any) -> None:
    given = asked("very " * 80, ["bad", "good " * 70])
    answer = bert("Classify", deltas=["which"], inputs=[given], truncate=pb.TRUNCATE_END)
    assert answer.usage.input_tokens == 128 and len(answer.results[0].choice.scores) == 2


def test_more_choices_than_the_queue_holds(called: Any, bert: Any) -> None:
    server = called("bert", max_queued=8)
    server.load("which", task=dp.TASK_MULTIPLE_CHOICE)
    failure = server.fails("Classify", deltas=["which"], inputs=[asked(*SECOND)] * 2)
    assert (failure.code, failure.reason, failure.field) == ("INVALID_ARGUMENT", "REQUEST_TOO_LARGE", "inputs")
    assert "10 sequences" in failure.message and server.idle()


def test_what_is_told_of_it(bert: Any) -> None:
    delta = bert("GetDelta", name="which").delta
    assert delta.task == dp.TASK_MULTIPLE_CHOICE and not delta.labels and not delta.guessed
    assert not delta.problem_type and "head" in delta.kinds
    untold = bert.load("which-untold", "which")
    assert untold.task == dp.TASK_SEQUENCE_CLASSIFICATION and "task" in untold.guessed
    assert untold.problem_type == dp.PROBLEM_TYPE_REGRESSION
