"""What a delta may say it is."""

KINDS: tuple[str, ...] = (
    *("lora", "dora", "alora", "adalora", "delora", "gralora", "hra", "miss", "vera", "pvera", "vblora"),
    *("loha", "lokr", "fourierft", "c3a", "hira", "oft", "boft", "road", "shira", "supertuning", "ln-tuning"),
    *("unilora", "tinylora", "poly", "randlora", "frod", "waveft", "psoft", "osf", "deft", "peanut", "glora"),
    *("beft", "ia3", "prefix-tuning", "cartridge", "prompt-tuning", "p-tuning", "cpt", "multitask-prompt-tuning"),
    *("adapter", "parallel-adapter", "low-rank-adapter", "compacter", "bitfit"),
    *("adapter-fusion", "invertible-adapter", "mtl-lora", "reft"),
    *("trainable-tokens", "bias", "head", "selective-module"),
)
"""Methods first, what goes with them after: the order in which a delta names its own."""


def ordered(kinds: list[str]) -> tuple[str, ...]:
    """The method first, what goes with it after."""
    return tuple(sorted(kinds, key=KINDS.index))
