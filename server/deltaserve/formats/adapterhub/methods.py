"""AdapterHub's methods and how each is lowered; an adapter alone, or a setup of several."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.sites import BackboneSpec, Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition, InvalidArgument
from deltaserve.formats import options
from deltaserve.formats.adapterhub import bottlenecks, composition, embedded, heads, lora, prefixes, reft
from deltaserve.formats.adapterhub.composition import Block, One
from deltaserve.formats.adapterhub.fusing import Fusing
from deltaserve.formats.adapterhub.member import Member
from deltaserve.formats.draft import Draft
from deltaserve.formats.folder import HUB, HUB_FUSION, HUB_HEAD, HUB_SETUP, Folder
from deltaserve.formats.ledger import Ledger
from deltaserve.formats.lowered import delta_of
from deltaserve.formats.options import shown
from deltaserve.formats.wanted import Wanted
from deltaserve.formats.work import UNLIMITED, Work


@dataclass(frozen=True)
class Setup:
    """`members` act together as `block` says. `task_id`: which of its tasks was chosen, if it has any."""

    block: Block
    members: tuple[Member, ...]
    fusings: tuple[Fusing, ...]
    head: Folder | None
    task_id: int | None = None

    def folders(self) -> tuple[Folder, ...]:
        heads = () if self.head is None else (self.head,)
        return (*(one.folder for one in self.members), *(one.folder for one in self.fusings), *heads)

    def ledgers(self) -> tuple[Ledger, ...]:
        return (*(one.tensors for one in self.members), *(one.tensors for one in self.fusings))


Lower = Callable[[Setup, Draft, Weights], None]
METHODS: Mapping[str | None, Lower] = {
    None: lambda setup, draft, _: bottlenecks.lower(setup.members, setup.block, setup.fusings, draft),
    "lora": lambda setup, draft, weights: lora.lower(setup.members, setup.block, draft, weights),
    "prefix_tuning": lambda setup, draft, _: prefixes.lower(setup.members, setup.block, draft),
    "prompt_tuning": lambda setup, draft, _: embedded.prompts(setup.members, setup.block, draft),
    "reft": lambda setup, draft, _: reft.lower(setup.members, setup.block, draft),
}
"""By architecture; None is a bottleneck, and MTL-LoRA is a LoRA."""


def lower(folder: Folder, backbone: BackboneSpec, weights: Weights, wanted: Wanted, work: Work = UNLIMITED) -> Delta:
    """A checkpoint as a delta for this backbone. Raises BadCheckpoint, FailedPrecondition, InvalidArgument."""
    setup = _setup(folder, backbone, wanted)
    _check_methods(setup.members, backbone)
    draft = Draft(setup.task_id)
    headed, tensors = heads.lower(setup.head, backbone, wanted, draft, weights)
    for method in work.steps(list(METHODS.values())):
        method(setup, draft, weights)
    hooked = setup.members[0].places.layout.hooked
    embedded.couplings(setup.members, setup.block, headed.through or (hooked and "generate" in backbone.tasks), draft)
    ledgers = [*setup.ledgers(), *([] if tensors is None else [tensors])]
    for ledger in ledgers:
        ledger.finish()
    provenance = Provenance(
        format="adapterhub",
        content_hash=folder.content_hash(),
        file_bytes=sum(one.tensor_bytes for one in setup.folders()),
        tensors_matched=sum(ledger.taken for ledger in ledgers),
        base_model=str(setup.members[0].config.get("model_name") or "")[:500],
        warnings=tuple(dict.fromkeys(text for ledger in ledgers for text in ledger.warnings)),
        guessed=("task",) if headed.guessed else (),
    )
    return delta_of(draft, headed.task, headed.spec, wanted, headed.model, provenance)


def _setup(folder: Folder, backbone: BackboneSpec, wanted: Wanted) -> Setup:
    if folder.layout == HUB_FUSION:
        raise FailedPrecondition(
            f"{folder.path.name!r} holds a fusion alone; its members are in folders of their own: save all of them "
            "with save_adapter_setup, and give that folder",
            reason="INCOMPLETE_CHECKPOINT",
        )
    if folder.layout == HUB:
        if wanted.task_id is not None:
            raise InvalidArgument(
                f"task_id is {wanted.task_id}; an adapter alone has no tasks to choose from, leave it out",
                field="task_id",
            )
        member = Member(folder, backbone)
        return Setup(One(member.name), (member,), (), folder.beside(HUB_HEAD))
    assert folder.layout == HUB_SETUP
    return _several(folder, backbone, wanted)


def _several(folder: Folder, backbone: BackboneSpec, wanted: Wanted) -> Setup:
    """The folders are found by what is in them; no name of a file or of a config becomes a path."""
    block, task_id = composition.parse(folder.config().get("adapter_setup"), wanted.task_id)
    inside = folder.inside()
    told = {str(one.config().get("name")): one for one in inside if one.layout == HUB}
    missing = [name for name in block.names() if name not in told]
    if missing:
        raise BadCheckpoint(
            f"adapter_setup.json names {shown(missing[0])}, and none of its folders holds an adapter of that name"
        )
    members = {name: Member(told[name], backbone) for name in dict.fromkeys(block.names())}
    for average in _children(block):
        if isinstance(average, composition.Average) and abs(average.total - 1) > 1e-6:
            members[block.names()[0]].tensors.warn(
                f"the weights of an Average sum to {average.total:g}: the library divides by that when it loads them, "
                "and so does this server, whatever they were in training"
            )
    fusings = [Fusing(one, backbone) for one in inside if one.layout == HUB_FUSION]
    used = tuple(one for one in fusings if one.members in _fused(block))
    last = block.names()[-1]
    head = told[last].beside(HUB_HEAD) or next((one for one in inside if one.layout == HUB_HEAD), None)
    return Setup(block, tuple(members.values()), used, head or folder.beside(HUB_HEAD), task_id)


def _fused(block: Block) -> list[tuple[str, ...]]:
    return [child.names() for child in _children(block) if isinstance(child, composition.Fuse)]


def _children(block: Block) -> Sequence[Block]:
    return block.children if isinstance(block, composition.Stack) else (block,)


def _check_methods(members: Sequence[Member], backbone: BackboneSpec) -> None:
    for member in members:
        refused = member.places.layout.refused
        for part in member.parts:
            if "use_gating" in part.told and part.gated and "generate" in backbone.tasks:
                raise options.not_served(
                    "use_gating",
                    True,
                    "a gate averages over the whole sequence, tokens to come too, which no cache of keys and values "
                    f"can give; gates are served on encoders, and this backbone is {backbone.family}",
                )
            if part.architecture in refused:
                why = _REFUSED.get((part.architecture, backbone.family), "the library does not have this method there")
                raise FailedPrecondition(
                    f"config key 'architecture' is {part.architecture!r} and the backbone is {backbone.family}: {why}",
                    reason="KIND_NOT_SERVED",
                    metadata={"architecture": str(part.architecture), "family": backbone.family},
                )


_REFUSED: Mapping[tuple[str | None, str], str] = {
    (
        "reft",
        "t5",
    ): "the library's decoder takes positions of the encoder's text, and raises where its own is shorter",
}
