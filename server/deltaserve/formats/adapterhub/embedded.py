"""What acts on embedded rows: prompt tuning behind the embeddings, and invertible adapters."""

from collections.abc import Sequence

from deltaserve.deltas.adapters import Coupling, Net
from deltaserve.deltas.primitives import SoftPrompt
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.adapterhub.composition import Block, first
from deltaserve.formats.adapterhub.configs import Part, activation
from deltaserve.formats.adapterhub.member import Member
from deltaserve.formats.draft import Draft
from deltaserve.formats.options import shown

MOST_ROWS = 1 << 14
_PLACES = {"prefix": 0, "prefix_after_bos": 1}
_MOST_WIDTH = 1 << 24


def prompts(members: Sequence[Member], block: Block, draft: Draft) -> None:
    """Rows in what the embedding module gives (arXiv 2104.08691). Of several adapters the library uses the first's."""
    for member in members:
        for part in member.of("prompt_tuning"):
            rows = part.integer("prompt_length", most=MOST_ROWS)
            place = options.choice(part.told, "combine", tuple(_PLACES))
            spec = member.places.spec
            if spec.max_positions is not None and rows >= spec.max_positions:
                raise BadCheckpoint(f"a prompt of {rows} rows; this backbone has {spec.max_positions} positions")
            at = f"prompt_tuning.prompt_tunings.{member.name}.prompt_embedding.weight"
            tensor = member.tensors.take(at, (rows, spec.hidden_size))
            if member.name != first(block):
                what = f"that of {shown(member.name)} is left out"
                member.tensors.warn(f"the library runs no prompt but the first adapter's: {what}")
            elif draft.prompt is not None:
                raise BadCheckpoint(f"two parts of the config of {shown(member.name)} are prompts")
            else:
                draft.kind("prompt-tuning")
                draft.prompt = SoftPrompt(tensor, _PLACES[place])


def couplings(members: Sequence[Member], block: Block, undone: bool, draft: Draft) -> None:
    """Invertible adapters (MAD-X, arXiv 2005.00052). Of several adapters the library uses the first's."""
    for member in members:
        for part in member.of(None):
            if part.told["inv_adapter"] in (None, False, "") or _unsaved(member):
                continue
            made = _coupling(member, part, undone)
            if member.name != first(block):
                what = f"that of {shown(member.name)} is left out"
                member.tensors.warn(f"the library runs no invertible adapter but the first adapter's: {what}")
            else:
                draft.kind("invertible-adapter")
                draft.coupling = made


def _unsaved(member: Member) -> bool:
    """adapter-transformers wrote the option into configs of task adapters that have no such tensors."""
    return member.config.get("type") == "text_task" and not member.tensors.below(_at(member))


def _at(member: Member) -> str:
    start = "encoder." if member.places.spec.encoder_decoder else ""
    return f"{start}invertible_adapters.{member.name}"


def _coupling(member: Member, part: Part, undone: bool) -> Coupling:
    told = part.told["inv_adapter"]
    if told == "glow":
        raise options.not_served("inv_adapter", told, "the library itself raises on it: its halves have unlike shapes")
    if told != "nice":
        raise options.wrong("inv_adapter", f"is {shown(told)}; 'nice' is expected")
    hidden = member.places.spec.hidden_size
    if hidden % 2:
        raise FailedPrecondition(
            f"an invertible adapter on rows of {hidden} numbers, which have no halves", reason="KIND_NOT_SERVED"
        )
    half, factor = hidden // 2, part.number("inv_adapter_reduction_factor")
    if factor <= 0 or half / factor > _MOST_WIDTH or half // factor < 1:
        raise options.wrong("inv_adapter_reduction_factor", f"is {factor:g}, of {half}: that is no width")
    inner, f = int(half // factor), activation(part.told)

    def net(word: str) -> Net:
        at, take = f"{_at(member)}.{word}", member.tensors.take
        return Net(
            take(f"{at}.0.weight", (inner, half)), take(f"{at}.0.bias", (inner,)),
            take(f"{at}.2.weight", (half, inner)), take(f"{at}.2.bias", (half,)), f,
        )  # fmt: skip

    return Coupling(net("F"), net("G"), undone)
