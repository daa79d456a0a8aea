"""The order of the examples: one global sequence, and the same micro-batches, for any number of ranks."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ldmole_dist.data.batches import TrainingOrder

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
