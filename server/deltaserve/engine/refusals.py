"""What the engine says of sequences that it could never run."""

from deltaserve.engine.sequence import Sequence
from deltaserve.errors import FailedPrecondition, InvalidArgument


def too_large(sequence: Sequence, batch_tokens: int, cache_tokens: int) -> InvalidArgument:
    """One that even an empty server has no room for."""
    return InvalidArgument(
        f"a request of {sequence.input_rows} input tokens and {sequence.room} to generate never fits: one forward "
        f"takes {batch_tokens} rows, the KV cache {cache_tokens} tokens (--max-batch-tokens, --kv-bytes)",
        reason="REQUEST_TOO_LARGE",
    )


def needs_whole_sequences(sequence: Sequence) -> FailedPrecondition:
    """A generation with a delta that reads or edits rows by what comes behind them."""
    assert sequence.request.delta is not None
    return FailedPrecondition(
        f"{sequence.request.delta.label} reads all rows of a sequence or edits its last ones, which no cache of keys "
        "and values reproduces: it classifies, embeds and scores, and does not generate",
        reason="NEEDS_WHOLE_SEQUENCES",
    )
