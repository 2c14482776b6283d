"""Every kernel compiled for GPUs that are not here: what it takes of each, and whether it uses their tensor cores."""

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
import triton.backends.nvidia
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltaserve_kernels.gpu.variants import Variant

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_PRODUCTS = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)"


@dataclass(frozen=True)
class Chip:
    """A target. `shared`: bytes of shared memory that one program may have. `products`: what its tensor cores obey."""

    name: str
    target: GPUTarget
    shared: int
    products: frozenset[str]


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, frozenset({"mma.sync"})),
        Chip("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, frozenset({"mma.sync", "wgmma.mma_async"})),
        Chip("sm_100", GPUTarget("cuda", 100, 32), 227 << 10, frozenset({"mma.sync", "tcgen05.mma"})),
        Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, frozenset()),
    )
}


@dataclass(frozen=True)
class Compiled:
    """`registers` a thread, `stack` bytes a thread that did not fit into registers, `shared` bytes a program.

    Of AMD's chips registers and stack are not read: None.
    """

    chip: str
    variant: str
    warps: int
    shared: int
    registers: int | None
    stack: int | None
    products: tuple[str, ...]
    dot: bool

    @property
    def objection(self) -> str | None:
        """What is wrong with it, or None."""
        chip = CHIPS[self.chip]
        if self.stack:
            return f"{self.stack} bytes a thread are spilt"
        if self.shared > chip.shared:
            return f"{self.shared} bytes of shared memory, and the chip has {chip.shared}"
        if self.dot and chip.products and not chip.products & set(self.products):
            return "its products are not on tensor cores"
        return None


def compiled(chip: Chip, variant: Variant) -> Compiled:
    names = list(variant.kernel.arg_names)
    # On AMD's chips products of fp32 rows stay fp32: they have no TF32 to be exact with.
    told = {"PRECISION": "ieee"} if chip.target.backend == "hip" and "PRECISION" in variant.fixed else {}
    fixed = {**variant.fixed, **told}
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    made = triton.compile(source, target=chip.target, options={"num_warps": variant.warps})
    registers, stack = _resources(made.asm["cubin"]) if "cubin" in made.asm else (None, None)
    return Compiled(
        chip=chip.name,
        variant=variant.name,
        warps=variant.warps,
        shared=int(made.metadata.shared),
        registers=registers,
        stack=stack,
        products=tuple(sorted(set(re.findall(_PRODUCTS, made.asm.get("ptx", ""))))),
        dot=variant.dot,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found is not None, shown
    return int(found[1]), int(found[2])


def write(file: Path, found: Sequence[Compiled], told: Mapping[str, object]) -> None:
    """The table as JSON; `told` says where and when it was made."""
    kernels = [asdict(one) for one in found]
    file.write_text(json.dumps({"triton": triton.__version__, **told, "kernels": kernels}, indent=1) + "\n")


def table(found: Sequence[Compiled]) -> Table:
    """A line for each kernel: on each chip its registers, shared memory and stack, and what is wrong."""
    chips = list(dict.fromkeys(one.chip for one in found))
    shown = Table(
        title="registers a thread / KiB of shared memory / bytes spilt; * on tensor cores", title_justify="left"
    )
    shown.add_column("kernel")
    for chip in chips:
        shown.add_column(chip, justify="right")
    shown.add_column("wrong")
    for variant in dict.fromkeys(one.variant for one in found):
        of = {one.chip: one for one in found if one.variant == variant}
        wrong = "; ".join(f"{chip}: {one.objection}" for chip, one in of.items() if one.objection)
        shown.add_row(variant, *(_cell(of[chip]) for chip in chips), wrong)
    return shown


def _cell(one: Compiled) -> str:
    star = "*" if one.products else ""
    return f"{_told(one.registers)}/{one.shared / 1024:.1f}/{_told(one.stack)}{star}"


def _told(number: int | None) -> str:
    return "?" if number is None else str(number)
