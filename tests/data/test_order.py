import pytest

from rlkit.data.order import BLOCK, PromptOrder, WeightedOrder, order_of
from rlkit.errors import DataError
from rlkit.settings import JsonlData
from rlkit.types import Prompt

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


def prompts(*sources: str) -> list[Prompt]:
    return [Prompt(id=str(i), text="t", prompt_ids=(1,), source=source, columns={}) for i, source in enumerate(sources)]


def test_sources_are_drawn_by_their_weights_and_each_goes_through_its_own_prompts():
    mixed = prompts(*"aaaaaaaabbc")
    order = order_of(mixed, JsonlData(path="f", source_column="of", source_weights={"a": 1.0, "b": 2.0}), seed=1)  # c weighs 1
    drawn = [mixed[index].source for index in order.take(0, BLOCK)]
    assert {name: drawn.count(name) for name in "abc"} == {"a": BLOCK // 4, "b": BLOCK // 2, "c": BLOCK // 4}
    for start in range(0, BLOCK, 32):  # also in every batch, as nearly as it can be
        batch = drawn[start : start + 32]
        assert abs(batch.count("b") - len(batch) / 2) <= 1
    of_a = [index for index in order.take(0, BLOCK) if mixed[index].source == "a"]
    assert all(sorted(of_a[start : start + 8]) == list(range(8)) for start in range(0, len(of_a) - 8, 8))


def test_a_weighted_order_goes_on_from_its_cursor():
    def make():
        return WeightedOrder(members=[[0, 1, 2], [3, 4]], weights=[0.3, 0.7], seed=4)

    whole = make().take(0, 3 * BLOCK)
    assert make().take(BLOCK - 5, BLOCK) == whole[BLOCK - 5 : 2 * BLOCK - 5]
    # A source goes on through its prompts where a block ends.
    own = [index for index in whole if index < 3]
    assert all(sorted(own[start : start + 3]) == [0, 1, 2] for start in range(0, len(own) - 3, 3))


def test_without_weights_every_prompt_is_drawn_alike():
    assert order_of(prompts(*"aab"), JsonlData(path="f"), seed=3).take(0, 9) == PromptOrder(3, seed=3).take(0, 9)
