import itertools

import numpy as np
import pytest

from derain.data.samplers import BalancedSampler, BatchStage, TrainingBatchSampler

ONE = (BatchStage(0, 16, 4),)
SCHEDULE = (*ONE, BatchStage(5, 24, 3), BatchStage(7, 32, 1))


def training(count=11, rank=0, world=1, seed=0, stages=ONE, limit=None):
    return TrainingBatchSampler(count, rank, world, seed, stages, limit)


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_counts_every_image_once(world, rng):
    costs = rng.integers(1, 10**7, 101).tolist()
    shares = [list(BalancedSampler(costs, rank, world)) for rank in range(world)]
    assert [len(share) for share in shares] == [len(BalancedSampler(costs, r, world)) for r in range(world)]
    assert sorted(itertools.chain.from_iterable(shares)) == list(range(101))


def test_images_of_one_size_are_dealt_in_turn():
    assert [list(BalancedSampler([5] * 7, rank, 3)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize("world", [2, 3])
def test_the_slowest_rank_is_near_the_optimum(world, rng):
    for _ in range(20):
        costs = rng.integers(1, 50, 7).tolist()
        loads = [sum(costs[index] for index in BalancedSampler(costs, rank, world)) for rank in range(world)]
        best = min(
            max(np.bincount(assignment, costs, world)) for assignment in itertools.product(range(world), repeat=7)
        )
        assert max(loads) <= (4 / 3 - 1 / (3 * world)) * best


def test_no_rank_is_left_without_an_image():
    assert [list(BalancedSampler([3, 9], rank, 5)) for rank in range(5)] == [[1], [0], [0], [1], [0]]


def test_ranks_train_on_different_images_equally_many():
    shares = [flat(training(rank=rank, world=2)) for rank in range(2)]
    assert [len(share) for share in shares] == [6, 6]
    assert {sample.number % 11 for share in shares for sample in share} == set(range(11))


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own():
    sampler = training()
    batches = {}
    for epoch in (0, 3, 4):
        sampler.set_epoch(epoch)
        batches[epoch] = list(sampler)
        assert [len(batch) for batch in batches[epoch]] == [4, 4, 3]
        assert len(sampler) == 3
        assert sorted(sample.number for sample in flat(batches[epoch])) == list(range(11))
        assert {(sample.epoch, sample.crop) for sample in flat(batches[epoch])} == {(epoch, 16)}
    assert len({tuple(sample.number for sample in flat(one)) for one in batches.values()}) == 3


@pytest.mark.parametrize("stages", [ONE, SCHEDULE])
@pytest.mark.parametrize("world", [1, 2])
def test_any_position_continues_the_order(stages, world):
    for epoch, rank in itertools.product((0, 1, 2), range(world)):
        sampler = training(rank=rank, world=world, stages=stages)
        sampler.set_epoch(epoch)
        whole = list(sampler)
        assert len(whole) == len(sampler)
        for batch in range(len(whole) + 1):
            resumed = training(rank=rank, world=world, stages=stages)
            resumed.resume_at(epoch, batch)
            begun = iter(resumed)
            resumed.set_epoch(epoch)  # as Lightning does once workers have begun to read
            assert list(begun) == whole[batch:]
            resumed.set_epoch(epoch + 1)
            sampler.set_epoch(epoch + 1)
            assert list(resumed) == list(sampler)
            sampler.set_epoch(epoch)


def test_stages_change_crop_and_batch_size_at_their_batch():
    sampler = training(stages=SCHEDULE)  # 3 batches an epoch
    found = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        found += [(batch[0].crop, len(batch)) for batch in sampler]
        assert len({sample.number for sample in flat(sampler)}) == len(flat(sampler))
    assert found == [(16, 4)] * 5 + [(24, 3)] * 2 + [(32, 1)] * 5
    limited = training(stages=SCHEDULE, limit=2)  # batches that the trainer does not ask for do not count
    limited.set_epoch(2)
    assert [batch[0].crop for batch in limited] == [16, 24]
    limited.resume_at(2, 2)
    assert list(limited) == []


def test_larger_batches_draw_the_next_permutation():
    sampler = training(count=5, stages=(BatchStage(0, 16, 1), BatchStage(0, 16, 3)))
    indices = [sample.number for sample in flat(sampler)]
    assert len(indices) == 15
    assert sorted(indices) == list(range(15))  # three permutations of five samples
    assert [sorted(index % 5 for index in indices[start : start + 5]) for start in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3


def test_the_images_of_a_group_are_evaluated_by_one_rank():
    groups = ["a", "a", "b", 3, "b", "c", "c", "c"]
    shares = [BalancedSampler([1] * 8, rank, 2, groups).indices for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(8))
    assert all(share == sorted(share) for share in shares)
    assert {len(share) for share in shares} == {4}
    owners = {
        group: {rank for rank in range(2) for index in shares[rank] if groups[index] == group} for group in groups
    }
    assert all(len(ranks) == 1 for ranks in owners.values())


def test_ranks_without_a_group_evaluate_an_image_again():
    shares = [BalancedSampler([1] * 3, rank, 4, ["a", "a", "a"]).indices for rank in range(4)]
    assert shares == [[0, 1, 2], [1], [2], [0]]
