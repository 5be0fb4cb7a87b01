"""Pairs that are none are refused by row; what a fit leaves is whole, loads elsewhere, and follows from its seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlkit.data.models.loading import load_tokenizer, resolve
from rlkit.data.models.reward_fit import _pair, fit, read_pairs, split
from rlkit.data.models.reward_model import encode
from rlkit.errors import ConfigError, DataError

GOOD = {"prompt": "1 2 3 4 = 4:", "chosen": "1+2-3+4", "rejected": "1+2+3+4"}


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1", "chosen": "2"}, r"row 2 has no column rejected\. Write \{\"prompt\": \.\.\., \"chosen\""),
        (GOOD | {"chosen": 7}, r"row 2: column chosen is neither text nor messages\. Write text, or a list of"),
        (GOOD | {"rejected": [{"role": "user"}]}, r"row 2: column rejected is neither text nor messages"),
        (GOOD | {"prompt": []}, r"row 2: column prompt is neither text nor messages"),
        (
            GOOD | {"prompt": [{"role": "user", "content": "1"}]},
            r"row 2: column prompt is chat messages, and the model has no chat te",
        ),
        (
            GOOD | {"chosen": [{"role": "assistant", "content": "1"}]},
            r"row 2: column chosen is chat messages, and its prompt is text",
        ),
        (GOOD | {"chosen": GOOD["rejected"]}, r"row 2: columns chosen and rejected are the same to the model"),
        (GOOD | {"rejected": "1" * 200}, r"row 2: column rejected has 214 tokens with its prompt, .* positions for 128"),
    ],
)
def test_a_row_that_is_no_pair_is_named_with_its_column(tmp_path, row, message):
    file = write(tmp_path / "pairs.jsonl", GOOD, row)
    with pytest.raises(DataError, match=message):
        read_pairs(file, load_tokenizer(resolve("tiny")), limit=128)


def test_pairs_are_in_the_tokens_that_scoring_uses(tmp_path):
    tokenizer = load_tokenizer(resolve("tiny"))
    (pair,) = read_pairs(write(tmp_path / "pairs.jsonl", GOOD), tokenizer, limit=None)
    assert pair.chosen == encode(tokenizer, GOOD["prompt"], GOOD["chosen"], label="")
    assert pair.rejected == encode(tokenizer, GOOD["prompt"], GOOD["rejected"], label="")


@pytest.mark.parametrize("is_chat", [False, True])
def test_pairs_are_in_the_tokens_that_trl_would_have_made(tmp_path, is_chat):
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    tokenizer: Any = load_tokenizer(resolve("tiny"))
    row: dict[str, Any] = GOOD
    if is_chat:
        tokenizer.chat_template = "{% for m in messages %}{{ '=' if m.role == 'user' else ':' }}{{ m.content }}{% endfor %}"
        said = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        row = {column: [{"role": role, "content": GOOD[column]}] for column, role in said.items()}
        by_text = _pair(row | {"chosen": GOOD["chosen"]}, tokenizer, label="", limit=None)
        assert by_text == _pair(row, tokenizer, label="", limit=None)
    settings = RewardConfig(output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False)
    trainer: Any = None  # of which the preparation asks nothing
    prepared: Any = RewardTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, settings, "train")
    pair = _pair(row, tokenizer, label="", limit=None)
    assert [*pair.chosen.ids] == prepared[0]["chosen_ids"]
    assert [*pair.rejected.ids] == prepared[0]["rejected_ids"]


def test_no_prompt_is_on_both_sides_and_the_order_of_rows_moves_none(tmp_path):
    rows = [GOOD | {"prompt": f"{n % 40}:", "chosen": f"{n}"} for n in range(100)]
    tokenizer = load_tokenizer(resolve("tiny"))
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", *rows), tokenizer, limit=None)
    train, held_out = split(pairs, tmp_path)
    assert len(train) + len(held_out) == 100
    sides = [{pair.prompt for pair in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 4  # a tenth of forty
    assert {pair.prompt for pair in split(pairs[::-1], tmp_path)[1]} == sides[1]
    with pytest.raises(DataError, match="all pairs are of one prompt"):
        split(pairs[:1], tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"^--steps 0: nothing is learnt"),
        ({"learning_rate": 0.0}, r"^--learning-rate 0.0: nothing is learnt"),
        ({"batch_size": 0}, r"^--batch-size 0: no pair in a step"),
        ({"base": "nowhere/at/all"}, r"^--model=nowhere/at/all: no config.json there"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_leaves_nothing(tmp_path, expression_pairs, changes, message):
    file = write(tmp_path / "pairs.jsonl", *expression_pairs(20))
    settings: dict[str, Any] = {"base": "tiny", "steps": 1, "learning_rate": 1e-3, "batch_size": 2, "seed": 0} | changes
    with pytest.raises(ConfigError, match=message):
        fit(file, settings.pop("base"), tmp_path / "out", **settings)
    assert [each.name for each in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"out: exists already\. Remove it, or write another folder"):
        fit(tmp_path / "pairs.jsonl", "tiny", tmp_path / "out", steps=1, learning_rate=1e-3, batch_size=2, seed=0)


@pytest.mark.slow
def test_equal_seeds_fit_equal_models_and_touch_nobodys_generators(tmp_path, expression_pairs):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    file = write(tmp_path / "pairs.jsonl", *expression_pairs(60))
    states = random.getstate(), torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    lines: list[str] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(file, "tiny", tmp_path / name, steps=3, learning_rate=1e-3, batch_size=8, seed=seed, report=lines.append)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert str(np.random.get_state()) == states[2]  # noqa: NPY002
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert lines[0].startswith("step 1/3: loss 0.")
    assert {each.name for each in tmp_path.iterdir()} == {"pairs.jsonl", "a", "b", "c"}  # no temporary folder
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert model.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab() == load_tokenizer(resolve("tiny")).get_vocab()
