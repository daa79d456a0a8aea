"""Order of the examples: one global sequence, and the same micro-batches for every world size."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ldmole_dist.data.batches import Mixture, TrainingOrder

LENGTHS = [3 + (7 * i) % 11 for i in range(37)]


def make_order(world_size: int, seed: int = 0) -> TrainingOrder:
    return TrainingOrder(LENGTHS, global_batch_size=8, micro_batch_size=2, world_size=world_size, seed=seed)


def test_epochs_follow_each_other_without_gap() -> None:
    order = make_order(1)
    seen = list(itertools.chain.from_iterable(order.step(step) for step in range(14)))
    assert sorted(seen[:37]) == sorted(seen[37:74]) == list(range(37))
    assert seen[:37] != seen[37:74] and seen[:37] != list(range(37))


@given(step=st.integers(0, 40), seed=st.integers(0, 5))
def test_micro_batches_are_independent_of_world_size(step: int, seed: int) -> None:
    alone = make_order(1, seed).micro_batches(step, 0)
    assert sorted(itertools.chain.from_iterable(alone)) == sorted(make_order(4, seed).step(step))
    for world_size in (2, 4):
        by_rank = [make_order(world_size, seed).micro_batches(step, rank) for rank in range(world_size)]
        assert len({len(batches) for batches in by_rank}) == 1
        interleaved = [micro_batch for turn in zip(*by_rank, strict=True) for micro_batch in turn]
        assert interleaved == alone
        assert all(len(micro_batch) == 2 for micro_batch in interleaved)


def test_micro_batches_are_sorted_by_length() -> None:
    for micro_batch, following in itertools.pairwise(make_order(1).micro_batches(3, 0)):
        assert max(LENGTHS[i] for i in micro_batch) <= min(LENGTHS[i] for i in following)


def test_any_step_can_be_computed_first() -> None:
    order = make_order(2)
    steps = [order.micro_batches(step, 1) for step in range(12)]
    assert [make_order(2).micro_batches(step, 1) for step in (9, 3, 11)] == [steps[9], steps[3], steps[11]]


def test_mixture_follows_weights_and_visits_each_source_completely() -> None:
    sizes, weights = [10, 27], [3.0, 1.0]
    order = TrainingOrder(LENGTHS, 8, 2, 1, seed=5, mixture=Mixture(sizes, weights))
    drawn = list(itertools.chain.from_iterable(order.step(step) for step in range(500)))
    first, second = [e for e in drawn if e < 10], [e for e in drawn if e >= 10]
    assert abs(len(first) / len(drawn) - 0.75) < 0.03
    for source, size in ((first, 10), (second, 27)):  # no row repeats before all others of its source
        epochs = [source[i : i + size] for i in range(0, len(source) - size, size)]
        assert all(len(set(epoch)) == size for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    equal = TrainingOrder(LENGTHS[:20], 8, 2, 1, seed=5, mixture=Mixture([10, 10], weights))
    drawn = list(itertools.chain.from_iterable(equal.step(step) for step in range(20)))
    assert [e for e in drawn if e < 10][:10] != [e - 10 for e in drawn if e >= 10][:10]


def test_mixture_is_independent_of_world_size_and_first_step() -> None:
    def make_mixed(world_size: int) -> TrainingOrder:
        return TrainingOrder(LENGTHS, 8, 2, world_size, seed=5, mixture=Mixture([10, 27], [1.0, 1.0]))

    one = make_mixed(1)
    steps = [one.micro_batches(step, 0) for step in range(300)]
    for world_size in (2, 4):
        order = make_mixed(world_size)
        for step in (299, 0, 150):  # a resumed run starts in the middle
            by_rank = [order.micro_batches(step, rank) for rank in range(world_size)]
            assert [batch for turn in zip(*by_rank, strict=True) for batch in turn] == steps[step]
