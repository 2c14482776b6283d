"""How many series the metrics may have."""

from deltaserve.metrics import Metrics, TopLabels


def test_names_beyond_the_limit_are_other() -> None:
    dropped: list[str] = []
    labels = TopLabels(2, dropped.append)
    assert [labels.label(name) for name in ("a", "b", "c", "", "c")] == ["a", "b", "other", "", "other"]
    assert labels.label("c") == "c" and len(dropped) == 1  # it overtook one of the two
    assert labels.label(dropped[0]) == "other"


def test_forgotten_traffic_makes_room() -> None:
    dropped: list[str] = []
    labels = TopLabels(1, dropped.append, window=10)
    for _ in range(9):
        labels.label("old")
    for _ in range(12):
        labels.label("new")
    assert dropped == ["old"] and labels.label("new") == "new"


def test_a_flood_of_names_leaves_a_bounded_number_of_series() -> None:
    metrics = Metrics(delta_labels=5)
    for index in range(500):
        metrics.request("generate", "OK", f"d{index % 50}", 0.1)
        metrics.tokens(f"d{index}", 1, 1)
    shown = {
        sample.labels["delta"] for family in metrics.registry.collect() for sample in family.samples
        if "delta" in sample.labels
    }  # fmt: skip
    assert len(shown) <= 6
