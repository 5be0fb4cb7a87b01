"""What tests share: small random models, and one Ray cluster for all that need real actors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may need a download


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Callable[..., str]:
    """A function that returns the folder of a small Llama with random weights, tied or untied."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folders: dict[bool, str] = {}

    def build(*, tied: bool) -> str:
        if tied not in folders:
            folder = tmp_path_factory.mktemp(f"model-{'tied' if tied else 'untied'}")
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=96,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                tie_word_embeddings=tied,
                initializer_range=0.2,  # far from uniform, so that every weight shows in the log-probs
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
            LlamaForCausalLM(config).save_pretrained(folder)
            vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {chr(33 + i): 3 + i for i in range(93)}
            tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
            ).save_pretrained(folder)
            folders[tied] = str(folder)
        return folders[tied]

    return build


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator:
    """One Ray for the whole session; its workers are shared by key, as a sweep shares them."""
    from rlkit.controller.cluster import open_cluster
    from rlkit.settings import LocalRay

    with open_cluster(LocalRay()) as cluster:
        yield cluster


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
