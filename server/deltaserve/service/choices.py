"""Multiple choice: an input's choices, each as a row of its own. Runs in the tokenizer's thread."""

from deltaserve.errors import InvalidArgument
from deltaserve.service.inputs import CHARACTERS_A_TOKEN, MOST_INPUTS, Need, Place, Reader, Room
from deltaserve.service.text import Encoding
from deltaserve_protos.v1 import inference_pb2 as pb

MOST_CHOICES = 64


def check(message: pb.ClassifyRequest) -> int:
    """The number of rows. Raises InvalidArgument where an input has no choices, or too many."""
    for index, given in enumerate(message.inputs):
        if not 1 <= len(given.choices) <= MOST_CHOICES:
            raise InvalidArgument(
                f"input {index} has {len(given.choices)} choices; for this delta it must have 1 to {MOST_CHOICES}",
                field=f"inputs[{index}].choices",
            )
    return sum(len(given.choices) for given in message.inputs)


def read(reader: Reader, message: pb.ClassifyRequest, room: Room) -> list[list[Encoding]]:
    """For each input one encoding for each of its choices. Raises InvalidArgument, FailedPrecondition."""
    characters = sum(len(given.text) + len(choice.text) for given in message.inputs for choice in given.choices)
    most = MOST_INPUTS * CHARACTERS_A_TOKEN * room.limit
    if characters > most:  # an input's text is read once for each choice
        raise InvalidArgument(
            f"the choices with the texts beside them have {characters} characters; {most} are read at most, for a "
            f"limit of {room.limit} tokens; split the request",
            reason="INPUT_TOO_LONG",
            field="inputs",
            metadata={"characters": str(characters), "limit": str(most)},
        )
    return [
        [
            reader.row(message, _row(given, choice, Place(index, number)), room, Need(), Place(index, number))
            for number, choice in enumerate(given.choices)
        ]
        for index, given in enumerate(message.inputs)
    ]


def _row(given: pb.Input, choice: pb.Choice, place: Place) -> pb.Input:
    """The pair of the input's text and the choice's, or the choice's own ids."""
    for field, there in (
        ("text_pair", given.HasField("text_pair")),
        ("ids", bool(given.ids)),
        ("token_type_ids", bool(given.token_type_ids)),
    ):
        if there:
            name = f"{Place(place.input).field}.{field}"
            raise InvalidArgument(f"{name}: an input with choices has text, or nothing beside them", field=name)
    if choice.HasField("text") and not given.HasField("text"):
        raise InvalidArgument(
            f"{place} is a text, the second segment beside the input's own, and the input has none",
            field=f"{Place(place.input).field}.text",
        )
    if choice.ids and given.HasField("text"):
        raise InvalidArgument(
            f"{place} has ids, which are a whole row; give the input no text, or the choice a text",
            field=f"{place.field}.ids",
        )
    pair = choice.text if choice.HasField("text") else None
    return pb.Input(
        text=None if pair is None else given.text, text_pair=pair, ids=choice.ids, token_type_ids=choice.token_type_ids
    )
