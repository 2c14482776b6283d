"""What lowering costs, by PEFT's type and before anything is computed: from sites, shapes in the file and the config.

A type that is not here costs nothing but reading its tensors.
"""

from collections.abc import Callable, Mapping

from deltaserve.errors import FailedPrecondition
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.targets import WEIGHTS, Target, targets
from deltaserve.formats.peft.wavelets import FILTERS
from deltaserve.formats.speed import Cost, fourier, product, qr, shuffle, solve, svd, sweep

Costs = Callable[[Target], Cost]

_PASSES = 4
"""In which the numbers of a matrix are looked at in the end: are they finite?"""


def check(checkpoint: Checkpoint) -> None:
    """Raises FailedPrecondition where lowering would take longer than the checkpoint's `work` allows."""
    work = checkpoint.work
    if work.seconds is None:
        return
    seconds = of(checkpoint).seconds
    if seconds > work.seconds:
        raise FailedPrecondition(
            f"lowering this {checkpoint.config['peft_type']} checkpoint would take about {_told(seconds)} here, and "
            f"--lowering-seconds allows {work.seconds:g}; do it ahead with `{work.command}` and load what that writes",
            reason="LOWERING_TOO_LONG",
            metadata={"seconds": f"{seconds:.3g}", "allowed": f"{work.seconds:g}"},
        )


def of(checkpoint: Checkpoint) -> Cost:
    """Of all targets together. Raises BadCheckpoint where the config names none."""
    row = COSTS.get(checkpoint.config["peft_type"])
    if row is None or not checkpoint.config.get("target_modules"):
        return Cost()
    return sum((row(target) for target in targets(checkpoint, Draft(), WEIGHTS)), Cost())


def _told(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _rank(target: Target, part: str, axis: int) -> int:
    """A size of a tensor in the file: what the config says of it is checked later."""
    shape = target.shape(part)
    return shape[axis] if len(shape) > axis else 0


def _weight(target: Target) -> Cost:
    """The backbone's weight as float32."""
    return sweep(1, target.inputs * target.outputs)


def _dense(target: Target, passes: int = 0) -> Cost:
    """A matrix as large as the weight is made in some passes, and its numbers are looked at."""
    return sweep(passes + _PASSES, target.inputs * target.outputs)


def _change(target: Target, rank: int) -> Cost:
    """B A [out, in]."""
    return product(target.outputs, rank, target.inputs)


def _lora(target: Target) -> Cost:
    config, rank = target.checkpoint.config, _rank(target, "lora_A.weight", 0)
    start = config.get("init_lora_weights")
    cost = Cost()
    if config.get("kasa_config") or start == "pissa":
        cost += _weight(target) + svd(target.outputs, target.inputs)
    elif start == "olora":
        cost += _weight(target) + qr(target.outputs, target.inputs)
    if config.get("use_dora"):
        rank = rank or _rank(target, "lora_embedding_A", 0)
        cost += _weight(target) + _change(target, rank) + _dense(target)
    return cost


def _of_weight(part: str, axis: int) -> Costs:
    """W times a matrix of low rank."""

    def cost(target: Target) -> Cost:
        return _weight(target) + _change(target, _rank(target, part, axis))

    return cost


def _miss(target: Target) -> Cost:
    if target.checkpoint.config.get("init_weights") != "bat":
        return Cost()
    return _weight(target) + _change(target, _rank(target, "miss_block", 1)) + _dense(target, 6)


def _loha(target: Target) -> Cost:
    rank = _rank(target, "hada_w1_a", 1)
    if rank**2 * (target.inputs + target.outputs) < target.inputs * target.outputs:
        return sweep(8, rank**2 * (target.inputs + target.outputs))
    return _change(target, 2 * rank) + _dense(target, 6)


def _hira(target: Target) -> Cost:
    rank = _rank(target, "hira_A", 0) or _rank(target, "hira_embedding_A", 0)
    return _weight(target) + _change(target, rank) + _dense(target, 2)


def _randlora(target: Target) -> Cost:
    least, most = sorted((target.inputs, target.outputs))
    bases = _rank(target, "randlora_lambda", 1) * _rank(target, "randlora_lambda", 0)
    return product(most, bases, least) + sweep(4, bases * least) + _dense(target, 4)


def _frod(target: Target) -> Cost:
    width = target.inputs
    middle = product(target.outputs, 2 * width, width)
    return _weight(target) + solve(width, target.outputs) + middle + sweep(8, width**2) + _dense(target, 8)


def _fourierft(target: Target) -> Cost:
    numbers = target.inputs * target.outputs
    return shuffle(numbers) + fourier(numbers) + _dense(target, 6)


def _waveft(target: Target) -> Cost:
    numbers, config = target.inputs * target.outputs, target.checkpoint.config
    taps = len(FILTERS.get(str(config.get("wavelet_family", "db1")), ())) if config.get("use_idwt", True) else 0
    return shuffle(numbers) + product(1, numbers, taps**2) + _dense(target, 30)


def _psoft(target: Target) -> Cost:
    config = target.checkpoint.config
    rank, rounds = config.get("r", 32), config.get("psoft_svd_lowrank_niter", 10)
    if config.get("psoft_svd") != "lowrank" or type(rank) is not int or type(rounds) is not int:
        return _weight(target) + svd(target.outputs, target.inputs)
    rank = min(abs(rank), target.inputs, target.outputs)
    each = _change(target, 2 * rank) + qr(target.outputs, rank) + qr(target.inputs, rank)
    return _weight(target) + sum((each for _ in range(2 + min(abs(rounds), 100))), Cost())


def _supertuning(target: Target) -> Cost:
    """The largest weights are looked for where the file does not say which they are, and put in order."""
    if target.has("supertuning_indices"):
        return Cost()
    numbers = target.inputs * target.outputs
    return _weight(target) + sweep(8, numbers) + sweep(40, min(_rank(target, "supertuning_values", 0), numbers))


def _osf(target: Target) -> Cost:
    rank = _rank(target, "osf_svd_params.S_low", 0)
    if rank == 0:
        return Cost()
    numbers = 2 * rank * (target.inputs + target.outputs)
    cost = _weight(target) + svd(target.outputs, target.inputs) + sweep(6, numbers)
    return cost if numbers < target.inputs * target.outputs else cost + _change(target, 2 * rank) + _dense(target)


def _deft(target: Target) -> Cost:
    rank = _rank(target, "deft_P", 1)
    first = qr(target.outputs, rank) if target.checkpoint.config.get("decomposition_method") == "qr" else Cost()
    return first + _weight(target) + _change(target, rank)


def _peanut(target: Target) -> Cost:
    rank, depth = _rank(target, "peanut_A.weight", 0), target.checkpoint.config.get("depth")
    inner = product(target.inputs, rank, rank * 2 * (depth if type(depth) is int and 0 < depth <= 64 else 0))
    return _weight(target) + _change(target, rank) + inner


def _glora(target: Target) -> Cost:
    ranks = _rank(target, "glora_A.Xd", 1) + _rank(target, "glora_B.Xd", 1)
    return _weight(target) + _change(target, ranks) + _dense(target, 8)


def _oft(target: Target) -> Cost:
    config, part = target.checkpoint.config, "oft_R.weight" if target.has("oft_R.weight") else "oft_embedding_R.weight"
    count, numbers = _rank(target, part, 0), _rank(target, part, 1)
    width = round((1 + (1 + 8 * numbers) ** 0.5) / 2)
    blocks = sweep(24, count * width**2)
    if config.get("use_cayley_neumann", True):
        terms = config.get("num_cayley_neumann_terms", 5)
        powers = max(terms - 2, 1) if type(terms) is int and terms <= 64 else 1
        return blocks + product(count * width, width, width * powers) + sweep(4 * powers, count * width**2)
    return blocks + solve(width, width, count)


def _boft(target: Target) -> Cost:
    count, width = _rank(target, "boft_R", 1), _rank(target, "boft_R", 2)
    return solve(width, width, count) + sweep(24, target.inputs * width)


def _tinylora(target: Target) -> Cost:
    """What is drawn for a module where it was not saved; sine and logarithm for each number."""
    rank, shape = _rank(target, "tinylora_A", 0), target.checkpoint.config.get("u", 64)
    length = shape if type(shape) is int and 0 < shape <= 1 << 26 else 0
    return sweep(24, length * rank**2)


COSTS: Mapping[str, Costs] = {
    "LORA": _lora,
    "HRA": _of_weight("hra_u", 1),
    "MISS": _miss,
    "LOHA": _loha,
    "LOKR": lambda target: _dense(target, 4),
    "C3A": lambda target: _dense(target, 8),
    "HIRA": _hira,
    "RANDLORA": _randlora,
    "FROD": _frod,
    "FOURIERFT": _fourierft,
    "WAVEFT": _waveft,
    "PSOFT": _psoft,
    "SUPERTUNING": _supertuning,
    "OSF": _osf,
    "DEFT": _deft,
    "PEANUT": _peanut,
    "GLORA": _glora,
    "OFT": _oft,
    "BOFT": _boft,
    "TINYLORA": _tinylora,
}
