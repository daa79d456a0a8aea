"""The order of the examples: one global sequence, and the same micro-batches, for any number of ranks."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ldmole_dist.data.batches import Mixture, TrainingOrder

LENGTHS = [3 + (7 * i) % 11 for i in range(37)]


def make(world_size: int, seed: int = 0) -> TrainingOrder:
    return TrainingOrder(LENGTHS, global_batch_size=8, micro_batch_size=2, world_size=world_size, seed=seed)


def test_steps_follow_each_other_through_epochs_without_a_gap() -> None:
    order = make(1)
    seen = list(itertools.chain.from_iterable(order.step(step) for step in range(14)))
    assert sorted(seen[:37]) == sorted(seen[37:74]) == list(range(37))
    assert seen[:37] != seen[37:74] and seen[:37] != list(range(37))


@given(step=st.integers(0, 40), seed=st.integers(0, 5))
def test_micro_batches_are_the_same_for_any_number_of_ranks(step: int, seed: int) -> None:
    alone = make(1, seed).micro_batches(step, 0)
    assert sorted(itertools.chain.from_iterable(alone)) == sorted(make(4, seed).step(step))
    for world_size in (2, 4):
        dealt = [make(world_size, seed).micro_batches(step, rank) for rank in range(world_size)]
        assert len({len(of_rank) for of_rank in dealt}) == 1
        in_turn = [micro_batch for turn in zip(*dealt, strict=True) for micro_batch in turn]
        assert in_turn == alone
        assert all(len(micro_batch) == 2 for micro_batch in in_turn)


def test_sequences_of_like_length_share_a_micro_batch() -> None:
    for micro_batch, following in itertools.pairwise(make(1).micro_batches(3, 0)):
        assert max(LENGTHS[i] for i in micro_batch) <= min(LENGTHS[i] for i in following)


def test_a_resumed_order_goes_on_where_it_was() -> None:
    order = make(2)
    steps = [order.micro_batches(step, 1) for step in range(12)]
    assert [make(2).micro_batches(step, 1) for step in (9, 3, 11)] == [steps[9], steps[3], steps[11]]


def test_a_mixture_has_the_shares_of_its_weights_and_each_source_in_turn() -> None:
    sizes, weights = [10, 27], [3.0, 1.0]
    order = TrainingOrder(LENGTHS, 8, 2, 1, seed=5, mixture=Mixture(sizes, weights))
    drawn = list(itertools.chain.from_iterable(order.step(step) for step in range(500)))
    first, second = [e for e in drawn if e < 10], [e for e in drawn if e >= 10]
    assert abs(len(first) / len(drawn) - 0.75) < 0.03
    for source, size in ((first, 10), (second, 27)):  # no row again before all others of its source
        epochs = [source[i : i + size] for i in range(0, len(source) - size, size)]
        assert all(len(set(epoch)) == size for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    alike = TrainingOrder(LENGTHS[:20], 8, 2, 1, seed=5, mixture=Mixture([10, 10], weights))
    drawn = list(itertools.chain.from_iterable(alike.step(step) for step in range(20)))
    assert [e for e in drawn if e < 10][:10] != [e - 10 for e in drawn if e >= 10][:10]


def test_a_mixture_is_the_same_for_any_number_of_ranks_and_after_a_resume() -> None:
    def made(world_size: int) -> TrainingOrder:
        return TrainingOrder(LENGTHS, 8, 2, world_size, seed=5, mixture=Mixture([10, 27], [1.0, 1.0]))

    one = made(1)
    steps = [one.micro_batches(step, 0) for step in range(300)]
    for world_size in (2, 4):
        order = made(world_size)
        for step in (299, 0, 150):  # who goes on begins in the middle
            dealt = [order.micro_batches(step, rank) for rank in range(world_size)]
            assert [batch for turn in zip(*dealt, strict=True) for batch in turn] == steps[step]
