import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit.data import expressions
from rlkit.data.models import tiny
from rlkit.errors import DataError


def pass_at_k(folder, *, group_size: int) -> tuple[float, float]:
    """(pass@1, pass@group_size) at temperature 1 on all held-out prompts, as a run's evaluation counts them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = expressions.rows("held_out")
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=group_size,
            max_new_tokens=10,
        )
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = torch.tensor(
        [
            expressions.is_right(row["digits"], row["target"], text)
            for row, text in zip((row for row in rows for _ in range(group_size)), texts, strict=True)
        ]
    ).view(len(rows), group_size)
    return right.float().mean().item(), right.any(dim=1).float().mean().item()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_shipped_model_is_small_tied_and_bf16():
    assert sum(path.stat().st_size for path in tiny.SHIPPED.iterdir()) <= 6e6
    model = AutoModelForCausalLM.from_pretrained(tiny.SHIPPED)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 0.8e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 3e6


def test_the_shipped_model_leaves_room_to_learn_and_diversity_to_lose():
    pass_1, pass_16 = pass_at_k(tiny.SHIPPED, group_size=16)
    assert 0.2 <= pass_1 <= 0.35
    assert pass_16 >= 0.85


def test_the_shipped_generation_config_ends_at_the_tokenizers_eos():
    tokenizer = AutoTokenizer.from_pretrained(tiny.SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(tiny.SHIPPED)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.chat_template is None


def test_the_tokenizer_round_trips_every_prompt_and_answer():
    tokenizer = AutoTokenizer.from_pretrained(tiny.SHIPPED)
    for index in range(50):
        row, answer = expressions.example(0, index)
        text = row["prompt"] + answer
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) == 1 + len(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        # The answer's tokens do not depend on being tokenized with the prompt: what a trainer masks is what an engine samples.
        assert ids == tokenizer(row["prompt"])["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert tokenizer.tokenize("x") == [tiny.UNK]


def test_building_twice_gives_the_same_bytes_and_leaves_the_callers_generators_alone(tmp_path):
    def generators():
        legacy = str(np.random.get_state())  # noqa: NPY002  what the trainer seeds
        return [random.getstate(), torch.get_rng_state().tolist(), legacy, torch.get_num_threads()]

    before = generators()
    first = contents(tiny.build(tmp_path / "first", 0, steps=3))
    assert generators() == before
    torch.rand(1)  # the caller's state must not reach the model
    assert contents(tiny.build(tmp_path / "second", 0, steps=3)) == first
    assert contents(tiny.build(tmp_path / "other", 1, steps=3))["model.safetensors"] != first["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "other"}


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(DataError, match="exists already"):
        tiny.build(tmp_path, 0, steps=1)


@pytest.mark.study  # minutes of supervised training
@pytest.mark.timeout(1800)
def test_a_rebuild_is_as_good_as_the_shipped_model(tmp_path):
    """Not its bytes: another kind of processor rounds otherwise."""
    folder = tiny.build(tmp_path / "tiny")
    pass_1, pass_16 = pass_at_k(folder, group_size=16)
    assert 0.2 <= pass_1 <= 0.4
    assert pass_16 >= 0.85
    assert contents(folder).keys() == contents(tiny.SHIPPED).keys()
