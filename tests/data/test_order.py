import pytest

from rlkit.data.order import PromptOrder
from rlkit.errors import DataError

STORED = [0, 2, 1, 5, 4, 3, 6, 7, 5, 3, 7, 2, 4, 1, 0, 6]


def test_every_index_comes_once_per_epoch_and_epochs_differ():
    order = PromptOrder(37, seed=5)
    epochs = [order.take(epoch * 37, 37) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_a_function_of_seed_and_cursor_alone():
    whole = PromptOrder(10, seed=1).take(0, 35)
    resumed = PromptOrder(10, seed=1)
    assert resumed.take(23, 12) == whole[23:]  # a new process goes on in the middle of epoch 2
    assert resumed.take(0, 23) == whole[:23]  # and may go back
    pieces = PromptOrder(10, seed=1)
    assert [index for cursor in range(0, 35, 7) for index in pieces.take(cursor, 7)] == whole
    assert PromptOrder(10, seed=2).take(0, 35) != whole


def test_the_order_is_the_same_in_every_version():
    # Written down when it was made: a change would make every resumed run see other prompts.
    assert PromptOrder(8, seed=0).take(0, 16) == STORED
    assert PromptOrder(8, seed=-1).take(0, 3) == PromptOrder(8, seed=2**64 - 1).take(0, 3)


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(PromptOrder(1, seed=0).take(3, 4)) == [0, 0, 0, 0]


def test_no_prompts_is_an_error():
    with pytest.raises(DataError, match=r"num_prompts=0"):
        PromptOrder(0, seed=0)
