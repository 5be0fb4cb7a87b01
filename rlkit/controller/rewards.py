"""Opens a run's rewards, functions and models alike. A model's files are read at once, its worker starts with the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkit.config import RunConfig
from rlkit.controller.cluster import START_DEADLINE_S, Cluster
from rlkit.controller.placement import reward_model_seat
from rlkit.data.models.loading import context_length, load_tokenizer
from rlkit.data.models.reward_model import ScoredText, encode, encode_steps, find_reward_model, running_reward
from rlkit.data.rewards.pool import RewardItem
from rlkit.data.rewards.weighted import Rewards, open_functions
from rlkit.errors import ConfigError, RewardError
from rlkit.settings import ModelKind, ModelReward, WeightedRewards
from rlkit.types import Prompt, RewardResult, RewardStatus
from rlkit.workers.handle import Handle, Pending
from rlkit.workers.reward_model import RewardModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def open_rewards(config: RunConfig, cluster: Cluster, *, base_dir: Path) -> Rewards:
    """Raises ConfigError for a function that cannot be found, imported or called, and for a folder that is no reward model."""
    settings = config.reward
    if isinstance(settings, ModelReward):
        return ModelRewards("reward.path", settings, config, cluster)
    models = {}
    if isinstance(settings, WeightedRewards):
        models = {
            name: ModelRewards(f"reward.models.{name}", ModelReward(path=path), config, cluster)
            for name, path in settings.models.items()
        }
    return open_functions(settings, base_dir=base_dir, models=models)


class ModelRewards:
    """Implements `Judge` with a reward model in a worker.

    A process model's steps earn what they change of the reward: with r_i the reward if the response ended with step i, step i
    earns r_i - r_(i-1). They sum to the reward, whatever the reduction, so that estimators of whole responses see the reward and
    those of single tokens see where it came from. More steps are not more reward.
    """

    def __init__(self, setting: str, settings: ModelReward, config: RunConfig, cluster: Cluster):
        """Reads the model's files; `setting` named it."""
        self._setting, self._settings, self._config, self._cluster = setting, settings, config, cluster
        trust = settings.trust_remote_code
        self._folder = find_reward_model(settings.path, settings.kind, key=setting, trust_remote_code=trust)
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._folder, trust_remote_code=trust)
        self._limit = context_length(self._folder, trust_remote_code=trust)
        self._deadline_s = START_DEADLINE_S + settings.deadline_s  # of the first call, which waits for the model
        self._handle: Handle | None = None
        self._has_failed = False  # and has said so: once is enough, metrics count the others
        separator = settings.step_separator
        if settings.kind is ModelKind.process and not self._tokenizer(separator, add_special_tokens=False)["input_ids"]:
            raise ConfigError(
                f"reward.step_separator={separator!r}: no token of the reward model, which scores at it. Write the one that it was "
                "trained with."
            )

    def missing(self, source: str, columns: Mapping[str, Any]) -> str | None:
        """None: it reads the prompt and the response alone."""
        return None

    def start(self, prompts: Sequence[Prompt]) -> None:
        if not self._tokenizer.chat_template and any(prompt.messages is not None for prompt in prompts):
            raise ConfigError(
                f"{self._setting}={self._settings.path}: prompts are chat messages, and the reward model's tokenizer has no chat "
                "template. Write a reward model that was trained on chat, or data.chat=false with prompts in plain text."
            )
        spec = RewardModelSpec(
            model_path=self._folder,
            kind=self._settings.kind,
            dtype=self._settings.dtype.value,
            trust_remote_code=self._settings.trust_remote_code,
            tokens_per_microbatch=self._settings.tokens_per_microbatch,
            max_rows=self._settings.max_rows,
        )
        name = f"reward model ({self._setting})"
        self._handle = self._cluster.worker(
            ("reward model", self._setting, spec),
            name,
            "rlkit.workers.reward_model:RewardModelWorker",
            spec,
            seat=reward_model_seat(self._config, name),
        )

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        return self.submit(items).result()

    def submit(self, items: Sequence[RewardItem]) -> ModelScoring:
        """Raises DataError where the model's chat template refuses a prompt."""
        assert self._handle is not None, "start comes first"
        texts = [self._encode(item) for item in items]
        problems = [self._problem(text) for text in texts]
        fit = [text for text, problem in zip(texts, problems, strict=True) if not problem]
        return ModelScoring(self, items, texts, problems, self._handle.call("score", fit))

    def _encode(self, item: RewardItem) -> ScoredText:
        """In the model's own tokens, which need not be the policy's."""
        given, label = (self._tokenizer, *read_by_model(item)), f"sample {item.sample_id}"
        if self._settings.kind is ModelKind.outcome:
            return encode(*given, label=label)
        return encode_steps(*given, self._settings.step_separator, label=label)

    def _problem(self, text: ScoredText) -> str:
        """Why the model cannot score it; empty: it can."""
        if not text.ids:
            return "there is no token in it"
        if self._limit is not None and len(text.ids) > self._limit:
            return f"it has {len(text.ids)} tokens of the reward model, which has positions for {self._limit}"
        return ""

    def collect(
        self, items: Sequence[RewardItem], texts: Sequence[ScoredText], problems: Sequence[str], pending: Pending
    ) -> list[RewardResult]:
        """What the worker said, by item. Raises RewardError where it could score none."""
        scores = iter(pending.result(self._deadline_s))
        self._deadline_s = self._settings.deadline_s
        results = [
            failed(item, problem) if problem else self._result(item, text, next(scores))
            for item, text, problem in zip(items, texts, problems, strict=True)
        ]
        errors = [result for result in results if result.status is RewardStatus.error]
        if errors and not self._has_failed:
            self._has_failed = True
            logger.warning(
                "%s=%s failed on sample %s: %s", self._setting, self._settings.path, errors[0].sample_id, errors[0].message
            )
        if results and len(errors) == len(results):
            raise RewardError(
                f"{self._setting}={self._settings.path}: none of {len(results)} samples could be scored. The first, "
                f"{results[0].sample_id}: {results[0].message}. Write another model, or a lower max_response_tokens."
            )
        return results

    def _result(self, item: RewardItem, text: ScoredText, scores: np.ndarray) -> RewardResult:
        if not np.isfinite(scores).all():
            return failed(item, "the reward model's score is not finite")
        if self._settings.kind is ModelKind.outcome:
            return RewardResult(sample_id=item.sample_id, status=RewardStatus.ok, reward=float(scores[0]))
        reward = running_reward(scores, self._settings.reduce)
        parts = np.diff(reward, prepend=0.0)[:-1].tolist()  # the last step's is earned with the end of the response
        earned = tuple(zip(text.ends[:-1], parts, strict=True))
        return RewardResult(sample_id=item.sample_id, status=RewardStatus.ok, reward=float(reward[-1]), earned=earned)

    def close(self) -> None:
        """The worker stays, for the next run."""

    def __enter__(self) -> ModelRewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_by_model(item: RewardItem) -> tuple[str | Sequence[Mapping[str, str]], str]:
    """Prompt and completion: of an episode, all that was said and the policy's last turn."""
    if item.turns is None:
        return (item.prompt if item.messages is None else item.messages), item.completion
    *before, last = item.turns
    if item.messages is None:
        return item.prompt + "".join(turn["content"] for turn in before), last["content"]
    return [*item.messages, *before], last["content"]


class ModelScoring:
    """Implements `Scoring`."""

    def __init__(
        self,
        rewards: ModelRewards,
        items: Sequence[RewardItem],
        texts: Sequence[ScoredText],
        problems: Sequence[str],
        pending: Pending,
    ):
        self._rewards, self._given = rewards, (items, texts, problems, pending)

    def result(self) -> list[RewardResult]:
        return self._rewards.collect(*self._given)


def failed(item: RewardItem, problem: str) -> RewardResult:
    """Of a sample that is left out, and counted."""
    return RewardResult(sample_id=item.sample_id, status=RewardStatus.error, message=problem)
