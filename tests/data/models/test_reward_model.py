"""Reward models: which folders are refused, which tokens are scored, and that batches and padding change no score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlkit.data.models.reward_model import (
    RewardModel,
    ScoredText,
    encode,
    encode_steps,
    find_reward_model,
    microbatches,
    running_reward,
    split_steps,
)
from rlkit.errors import ConfigError, DataError
from rlkit.settings import ModelKind, StepReduction

SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
CHAT = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture
def tokenizer(random_model) -> Any:
    """A token per character; <bos> is 1 and <eos> is 2."""
    return AutoTokenizer.from_pretrained(random_model(tied=True))


def ragged(num_places: int = 0) -> list[ScoredText]:
    """Rows of 2 to 21 tokens, some of which end in the token that others are padded with."""
    rng = np.random.default_rng(0)
    texts = []
    for length in (2, 21, 7, 7, 13, 3):
        ids = rng.integers(3, 96, length).tolist()
        ids[-1] = 0 if length == 13 else ids[-1]
        places = sorted(rng.choice(length, min(num_places, length), replace=False).tolist())
        texts.append(ScoredText(ids=tuple(ids), places=tuple(places)))
    return texts


@pytest.mark.parametrize(("tokens", "rows"), [(10_000, 64), (21, 64), (1, 64), (10_000, 1), (40, 2)])
def test_no_split_into_batches_changes_an_outcome_score_from_a_direct_forward_pass(random_reward_model, tokens, rows):
    folder = random_reward_model(SEQUENCE)
    texts, direct = ragged(), AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    scores = RewardModel.load(folder, ModelKind.outcome, dtype=torch.float32).score(
        texts, tokens_per_microbatch=tokens, max_rows=rows
    )
    expected = [direct(input_ids=torch.tensor([text.ids])).logits[0].detach().numpy() for text in texts]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.std(expected) > 0.01  # they could differ


def test_a_model_that_attends_both_ways_does_not_see_padding(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=96)
    config.num_labels, config.initializer_range = 1, 0.2
    torch.manual_seed(0)
    direct = BertForSequenceClassification(config).eval()
    direct.save_pretrained(tmp_path)
    model = RewardModel.load(str(tmp_path), ModelKind.outcome, dtype=torch.float32)
    scores = model.score(ragged(), tokens_per_microbatch=9999, max_rows=64)
    expected = [direct(input_ids=torch.tensor([text.ids])).logits[0].detach().numpy() for text in ragged()]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_without_a_token_for_padding_rows_are_scored_one_by_one(random_reward_model, tmp_path):
    folder = Path(shutil.copytree(random_reward_model(SEQUENCE), tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"pad_token_id": None}))
    texts, direct = ragged(), AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    scores = RewardModel.load(str(folder), ModelKind.outcome, dtype=torch.float32).score(
        texts, tokens_per_microbatch=9999, max_rows=64
    )
    expected = [direct(input_ids=torch.tensor([text.ids])).logits[0].detach().numpy() for text in texts]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize(("tokens", "rows"), [(10_000, 64), (21, 2)])
def test_a_process_model_scores_each_place_as_a_direct_forward_pass_does(random_reward_model, num_labels, tokens, rows):
    folder = random_reward_model(TOKEN, num_labels)
    texts, direct = ragged(3), AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found = RewardModel.load(folder, ModelKind.process, dtype=torch.float32).score(
        texts, tokens_per_microbatch=tokens, max_rows=rows
    )
    for text, scores in zip(texts, found, strict=True):
        assert len(scores) == len(text.places)
        for place, score in zip(text.places, scores, strict=True):
            # What comes behind a step does not change its score.
            logits = direct(input_ids=torch.tensor([text.ids[: place + 1]])).logits[0, -1].detach()
            expected = logits[0] if num_labels == 1 else torch.softmax(logits, -1)[1]
            assert score == pytest.approx(float(expected), abs=1e-5)


def test_microbatches_hold_every_row_once_within_the_budget():
    lengths = [5, 1, 9, 30, 5, 2, 2]
    found = list(microbatches(lengths, tokens_per_microbatch=18, max_rows=3))
    assert sorted(row for rows in found for row in rows) == list(range(7))
    assert found[0] == [3]  # longer than the budget, and alone
    assert all(len(rows) <= 3 and max(lengths[row] for row in rows) * len(rows) <= 18 for rows in found[1:])
    assert list(microbatches([], tokens_per_microbatch=18, max_rows=3)) == []


def test_text_is_read_whole_and_ended_once(tokenizer):
    ids = encode(tokenizer, "ab", "cd", label="x").ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "b", "c", "d", "<eos>"]
    assert encode(tokenizer, "ab", "cd<eos>", label="x").ids == ids


def test_messages_go_through_the_models_own_chat_template(tokenizer):
    tokenizer.chat_template = CHAT
    prompt = [{"role": "user", "content": "ab"}]
    text = "".join(tokenizer.convert_ids_to_tokens(encode(tokenizer, prompt, "cd", label="x").ids))
    assert text == "<u>ab<a>cd"
    assert encode(tokenizer, prompt, [{"role": "assistant", "content": "cd"}], label="x") == encode(
        tokenizer, prompt, "cd", label="x"
    )
    text = "".join(tokenizer.convert_ids_to_tokens(encode_steps(tokenizer, prompt, "c;d", ";", label="x").ids))
    assert text == "<u>ab<a>c;d;"
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"^sample 7: the reward model's chat template refuses its messages \(no system role\)"):
        encode(tokenizer, prompt, "cd", label="sample 7")


def test_a_steps_place_is_the_last_token_of_the_separator_behind_it(tokenizer):
    text = encode_steps(tokenizer, "q:", "ab;;c;;d", ";;", label="x")
    tokens = tokenizer.convert_ids_to_tokens(text.ids)
    assert tokens == ["<bos>", *"q:ab;;c;;d;;"]
    assert text.places == (6, 9, 12)
    assert all("".join(tokens[place - 1 : place + 1]) == ";;" for place in text.places)
    assert text.ends == (4, 7, 8)  # ab;; c;; d


def test_a_separator_that_would_share_a_token_with_a_step_keeps_its_own():
    vocabulary = {"<eos>": 0, "a": 1, ";": 2, "b": 3, ";b": 4}
    merging: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[(";", "b")])))
    assert merging("a;b")["input_ids"] == [1, 4]
    text = encode_steps(merging, "a", "a;b", ";", label="x")
    assert text.ids == (1, 1, 2, 3, 2)
    assert text.places == (2, 4)


@pytest.mark.parametrize(
    ("completion", "steps"),
    [
        ("ab;;cd", [("ab", 4), ("cd", 6)]),
        (";;ab;; ;;cd;;", [("ab", 6), ("cd", 13)]),  # blank steps are none
        ("", [("", 0)]),
        (";;", [(";;", 2)]),
    ],
)
def test_steps_are_what_stands_between_separators(completion, steps):
    assert split_steps(completion, ";;") == steps


@pytest.mark.parametrize(
    ("reduction", "expected"), [("min", [0.5, 0.25, 0.25]), ("last", [0.5, 0.25, 0.75]), ("mean", [0.5, 0.375, 0.5])]
)
def test_the_running_reward_is_that_of_a_response_that_ends_there(reduction, expected):
    assert running_reward(np.array([0.5, 0.25, 0.75], dtype=np.float32), StepReduction[reduction]).tolist() == expected


def refused(path: str, kind: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        find_reward_model(path, ModelKind(kind), key=options.get("key", "reward.path"))
    (sentence,) = str(caught.value).splitlines()
    return sentence


def test_what_is_no_reward_model_of_the_kind_is_refused_by_its_files(random_reward_model, tmp_path):
    outcome, process = random_reward_model(SEQUENCE), random_reward_model(TOKEN, 2)
    assert find_reward_model(outcome, ModelKind.outcome, key="reward.path") == outcome
    assert find_reward_model(process, ModelKind.process, key="reward.path") == process
    assert refused("nowhere/at/all", "outcome").startswith(
        "reward.path=nowhere/at/all: no config.json there. Write a reward model's fold"
    )
    assert "its config.json names LlamaForCausalLM, which has no head for kind=outcome: write a folder" in refused(
        "tiny", "outcome"
    )
    assert "which has no head for kind=process: write reward.kind=outcome, or a folder of a ...ForToken" in refused(
        outcome, "process"
    )
    assert "which has no head for kind=outcome: write reward.kind=process, or a folder" in refused(process, "outcome")
    assert "write a folder of a ...ForSequence" in refused(
        process, "outcome", key="reward.models.taste"
    )  # where kinds are no choice
    three = random_reward_model(TOKEN, 3)
    assert refused(three, "process").startswith(
        f"reward.path={three}: its head has 3 labels, and a model of kind=process has 1 or 2."
    )


def test_a_config_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "strange"}')
    sentence = refused(str(tmp_path), "outcome")
    assert "transformers cannot read its config.json (The checkpoint you are trying to load has model type `strange`" in sentence
    assert sentence.endswith("or where it needs its own code, reward.trust_remote_code=true.")


def test_weights_without_a_head_are_refused_by_their_names(random_model, random_reward_model, tmp_path):
    """A base model's weights under a reward model's config.json load, with a head of random numbers."""
    folder = Path(shutil.copytree(random_reward_model(SEQUENCE), tmp_path / "model"))
    shutil.copy(Path(random_model(tied=True), "model.safetensors"), folder)
    assert "its *.safetensors files lack score.weight, so that its scores would be random." in refused(str(folder), "outcome")


def test_a_reward_model_without_a_tokenizer_is_refused(random_reward_model, tmp_path):
    folder = Path(shutil.copytree(random_reward_model(SEQUENCE), tmp_path / "model"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer can be read there" in refused(str(folder), "outcome")
