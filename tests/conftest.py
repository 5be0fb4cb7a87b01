"""What tests share: small random models, and one Ray cluster for all that need real actors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may need a download

import numpy as np
import pytest
import torch

from rlkit.data.collate import collate
from rlkit.types import FinishReason, Origin, RewardStatus, Rollout, TrainBatch


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., bool]:
    """A function (condition, limit_s) -> whether it came true in time. The limit is long: only a failure waits for it."""

    def wait(condition: Callable[[], Any], limit_s: float = 30.0) -> bool:
        end = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    return wait


@pytest.fixture
def stuck() -> Iterator[threading.Event]:
    """What hangs in a test waits for this, and goes on when the test ends. Ask for it after `serve`, which joins its threads."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Callable[..., str]:
    """A function that returns the folder of a small Llama with random weights, tied or untied."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folders: dict[tuple[bool, int], str] = {}

    def build(*, tied: bool, num_key_value_heads: int = 1) -> str:
        kind = (tied, num_key_value_heads)
        if kind not in folders:
            folder = tmp_path_factory.mktemp(f"model-{'tied' if tied else 'untied'}-{num_key_value_heads}")
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=96,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=num_key_value_heads,
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
            folders[kind] = str(folder)
        return folders[kind]

    return build


@pytest.fixture(scope="session")
def random_reward_model(random_model, tmp_path_factory) -> Callable[..., str]:
    """A function (head, num_labels) -> the folder of a small reward model with random weights, and a token per character."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

    classes = {"ForSequenceClassification": LlamaForSequenceClassification, "ForTokenClassification": LlamaForTokenClassification}
    folders: dict[tuple[str, int], str] = {}

    def build(head: str, num_labels: int = 1) -> str:
        if (head, num_labels) not in folders:
            folder = tmp_path_factory.mktemp(f"reward-{head}-{num_labels}")
            config = LlamaConfig.from_pretrained(random_model(tied=True), num_labels=num_labels)
            torch.manual_seed(1)
            classes[head](config).save_pretrained(folder)
            AutoTokenizer.from_pretrained(random_model(tied=True)).save_pretrained(folder)
            folders[head, num_labels] = str(folder)
        return folders[head, num_labels]

    return build


@pytest.fixture(scope="session")
def expression_pairs() -> Callable[[int], list[dict[str, str]]]:
    """A function (count) -> rows for a reward model on the built-in task: a right answer, and one with a digit not given."""
    from rlkit.data import expressions

    def build(count: int) -> list[dict[str, str]]:
        rng, rows = np.random.default_rng(0), []
        for index in range(count):
            row, answer = expressions.example(0, index)
            place = 2 * int(rng.integers(expressions.NUM_DIGITS))
            strange = str(rng.choice([digit for digit in expressions.DIGITS if digit not in row["digits"]]))
            rows.append({"prompt": row["prompt"], "chosen": answer, "rejected": answer[:place] + strange + answer[place + 1 :]})
        return rows

    return build


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chat_tokenizer() -> Callable[..., Any]:
    """A function (chat template) -> tokenizer with one token per character, and ChatML's special tokens."""

    def build(template: str = CHATML) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
        characters = [chr(code) for code in range(32, 127)] + ["\n"]
        vocab = {token: number for number, token in enumerate([*special, *characters])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            eos_token="<|im_end|>",
            additional_special_tokens=["<|im_start|>"],
            clean_up_tokenization_spaces=False,
        )
        made.chat_template = template
        return made

    return build


@pytest.fixture
def ray_cluster(shared_ray_cluster):
    """The session's Ray as a run finds it: what earlier tests started may go where a test needs its room."""
    shared_ray_cluster.begin_run()
    return shared_ray_cluster


@pytest.fixture(scope="session")
def shared_ray_cluster() -> Iterator:
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


@pytest.fixture(scope="session")
def learner():
    """One rank. Call `begin` with the settings a test needs: it forgets everything before."""
    from rlkit.workers.handle import Rank
    from rlkit.workers.learner import Learner

    return Learner(Rank(index=0, count=1))


@pytest.fixture(scope="session")
def make_rollout() -> Callable[..., Rollout]:
    """A function (index, prompt ids, response ids) -> rollout."""

    def build(index: int, prompt: list[int], response: list[int], *, logprobs: list[float] | None = None) -> Rollout:
        length = len(response)
        return Rollout(
            sample_id=f"sample-{index}",
            group_id="group",
            prompt_id="prompt",
            source="test",
            prompt_ids=tuple(prompt),
            response_ids=np.array(response, dtype=np.int64),
            rollout_logprobs=np.array(logprobs if logprobs is not None else [-1.0] * length, dtype=np.float32),
            policy_version=np.zeros(length, dtype=np.int64),
            turn_index=np.zeros(length, dtype=np.int64),
            origin=np.full(length, Origin.policy, dtype=np.int64),
            token_rewards=np.zeros(length, dtype=np.float32),
            text="",
            finish_reason=FinishReason.stop,
            reward=0.0,
            reward_components={},
            status=RewardStatus.ok,
        )

    return build


@pytest.fixture(scope="session")
def make_batch(make_rollout) -> Callable[..., TrainBatch]:
    """A function (seed, rows) -> batch of ragged rows over the random model's vocabulary, with random advantages."""

    def build(seed: int = 0, rows: int = 6) -> TrainBatch:
        rng = np.random.default_rng(seed)
        rollouts = [
            make_rollout(i, rng.integers(3, 96, rng.integers(2, 6)).tolist(), rng.integers(3, 96, rng.integers(1, 14)).tolist())
            for i in range(rows)
        ]
        width = max(len(rollout.response_ids) for rollout in rollouts)
        advantages = torch.from_numpy(rng.normal(size=(rows, 1)).astype(np.float32)).expand(rows, width).contiguous()
        return collate(rollouts, advantages)

    return build
