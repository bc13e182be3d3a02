"""The order of an epoch: the same for any number of processes, and from any place in it."""

from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader

from revseg.data import Compose, EpochSampler, PhotometricJitter, RandomHorizontalFlip, create_dataset


def draws(length, world, start=0, epoch=0, **settings):
    samplers = [EpochSampler(length, 5, rank, world, **settings) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch, start)
        assert len(list(sampler)) == len(sampler)
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_every_sample_once(world):
    parts = draws(23, world, even=False)
    assert sorted(chain(*parts)) == list(range(23))
    assert len({len(part) for part in draws(23, world)}) == 1


def test_epochs_and_seeds_differ():
    orders = [tuple(EpochSampler(20, seed).order()) for seed in range(5)]
    orders += [tuple(draws(20, 1, epoch=epoch)[0]) for epoch in range(1, 5)]
    assert len(set(orders)) == 9
    assert draws(4, 2, shuffle=False) == [[0, 2], [1, 3]]


def test_a_batch_of_all_processes_is_a_batch_of_one():
    single = draws(24, 1)[0]
    for world in (2, 4):
        parts = draws(24, world)
        each = 8 // world
        for step in range(3):
            together = chain(*(part[step * each : (step + 1) * each] for part in parts))
            assert sorted(together) == sorted(single[step * 8 : (step + 1) * 8])


def test_an_epoch_continues_with_another_number_of_processes():
    single = draws(24, 1)[0]
    assert sorted(chain(*draws(24, 2, start=8))) == sorted(single[8:])
    assert draws(24, 1, start=24) == [[]]


def test_the_order_does_not_change():
    # a promise to runs that continue on another machine or with another version of torch
    assert EpochSampler(8, seed=3).order() == [7, 0, 4, 6, 2, 3, 1, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "length of at least 1, got 0"),
        ((4, 0, 2, 2), r"rank in \[0, 2\), got 2"),
        ((1, 0, 0, 2), "at least one sample for each of 2 processes, got 1"),
        ((4, 0, 0, 1, 5), r"start in \[0, 4\], got 5"),
    ],
)
def test_numbers_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(*arguments)


def samples_of(workers, epochs=2, persistent=False):
    transform = Compose([RandomHorizontalFlip(), PhotometricJitter()])
    dataset = create_dataset("synthetic", "train", size=(32, 48), samples=6, seed=2, transform=transform)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=EpochSampler(6, 2),
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context="fork" if workers else None,
    )
    seen = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        loader.sampler.set_epoch(epoch)
        seen.append(list(loader))
    return seen


@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (2, False), (2, True)])
def test_the_same_samples_with_any_number_of_workers(workers, persistent):
    torch.manual_seed(workers)  # the default generators have no part in it
    here, there = samples_of(0), samples_of(workers, persistent=persistent)
    for ours, theirs in zip(here, there, strict=True):
        for (image, label), (other_image, other_label) in zip(ours, theirs, strict=True):
            assert torch.equal(image, other_image)
            assert torch.equal(label, other_label)
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(*here, strict=True))


def test_a_transform_of_two_arguments_is_refused():
    with pytest.raises(TypeError, match=r"\(image, label, generator\), got .*TorchvisionTransform"):
        create_dataset("synthetic", "train", transform=lambda image, label: (image, label))
