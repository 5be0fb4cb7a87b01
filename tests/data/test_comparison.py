from rlkit.data import comparison


def test_rows_are_all_ordered_pairs_and_a_pair_is_in_one_split_whatever_its_order():
    train, held_out = comparison.rows("train", 0.1), comparison.rows("held_out", 0.1)
    pairs = {split: {frozenset(row["id"].split(",")) for row in rows} for split, rows in (("train", train), ("held_out", held_out))}
    assert len(train) + len(held_out) == 90 * 89
    assert not pairs["train"] & pairs["held_out"]
    assert 0.07 < len(held_out) / (90 * 89) < 0.13
    assert len(train) == 2 * len(pairs["train"])


def test_the_answer_is_the_larger_number_and_both_orders_are_asked():
    rows = {row["id"]: row for split in ("train", "held_out") for row in comparison.rows(split, 0.1)}
    assert rows["47,23"]["answer"] == rows["23,47"]["answer"] == "47"
    assert "47 or 23" in rows["47,23"]["prompt"]
    assert "23 or 47" in rows["23,47"]["prompt"]


def test_a_share_of_nothing_holds_nothing_out():
    assert comparison.rows("held_out", 0.0) == []
