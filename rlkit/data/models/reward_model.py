"""Reward models: finds and checks them, writes a response as the tokens that they were trained on, and scores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlkit.data.models.loading import checkpoint_shapes, load_tokenizer, resolve
from rlkit.errors import ConfigError, DataError
from rlkit.settings import ModelKind, StepReduction

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
HEADS = {ModelKind.outcome: "ForSequenceClassification", ModelKind.process: "ForTokenClassification"}
LABELS = {ModelKind.outcome: (1,), ModelKind.process: (1, 2)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredText:
    """A prompt and a response in a reward model's own tokens."""

    ids: tuple[int, ...]
    places: tuple[int, ...] = ()  # of the tokens that have a score each; of an outcome model's one, none
    ends: tuple[int, ...] = ()  # for each place, how many characters of the response it has seen


# --- finding -------------------------------------------------------------------------------------------------------------------


def find_reward_model(path: str, kind: ModelKind, *, key: str, trust_remote_code: bool = False) -> str:
    """The folder of a reward model of that kind, by its files alone. Raises ConfigError or ResourceError."""
    from transformers import AutoConfig

    try:
        folder = resolve(path, key=key)
    except ConfigError:
        raise ConfigError(
            f"{key}={path}: no config.json there. Write a reward model's folder, such as `rlkit reward fit` makes, or a hub id."
        ) from None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # also for a model with code of its own, which is not trusted
        raise ConfigError(
            f"{key}={path}: transformers cannot read its config.json ({str(error).splitlines()[0]}). Write another model, or where "
            "it needs its own code, reward.trust_remote_code=true."
        ) from error
    architecture = next(iter(config.architectures or ()), "no architecture")
    head, labels = HEADS[kind], LABELS[kind]
    if not architecture.endswith(head):
        other = next((name for name, suffix in HEADS.items() if architecture.endswith(suffix)), None)
        instead = f"write {key.rpartition('.')[0]}.kind={other.value}, or " if other and key == "reward.path" else "write "
        made = " such as `rlkit reward fit` makes" if kind is ModelKind.outcome else ""
        raise ConfigError(
            f"{key}={path}: its config.json names {architecture}, which has no head for kind={kind.value}: {instead}a folder of a "
            f"...{head} model{made}."
        )
    if config.num_labels not in labels:
        raise ConfigError(
            f"{key}={path}: its head has {config.num_labels} labels, and a model of kind={kind.value} has "
            f"{' or '.join(map(str, labels))}. Write another model, or fit one with num_labels=1."
        )
    shapes = checkpoint_shapes(folder)
    if shapes and (missing := _head_tensors(config, kind, trust_remote_code) - shapes.keys()):
        raise ConfigError(
            f"{key}={path}: its *.safetensors files lack {min(missing)}, so that its scores would be random. Save the whole model "
            "again, head and all."
        )
    try:
        load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={path}: no tokenizer can be read there ({type(error).__name__}). Put tokenizer.json and tokenizer_config.json "
            "beside its weights."
        ) from error
    return folder


def _head_tensors(config: Any, kind: ModelKind, trust_remote_code: bool) -> set[str]:
    """What such a model has beside its body's tensors."""
    with torch.device("meta"):
        model = _auto_class(kind).from_config(config, trust_remote_code=trust_remote_code)
    return {name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}


def _auto_class(kind: ModelKind) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    return AutoModelForSequenceClassification if kind is ModelKind.outcome else AutoModelForTokenClassification


# --- text -> tokens ------------------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str | Messages, *, label: str) -> ScoredText:
    """The whole text of a prompt and a response: through the chat template where the prompt is messages, otherwise as it is and
    ended, as TRL's RewardTrainer writes it. Raises DataError with `label`."""
    if not isinstance(prompt, str):
        return ScoredText(ids=tuple(_of_messages(tokenizer, [*prompt, *_as_messages(completion)], label=label)))
    ids = list(tokenizer(f"{prompt}{completion}")["input_ids"])  # pyright: ignore[reportArgumentType]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
    return ScoredText(ids=tuple(ids))


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str, separator: str, *, label: str
) -> ScoredText:
    """The separator's tokens stand behind every step, the last one too, and the last of them has the step's score.

    Steps and separators are tokenised apart, as they are for training (TRL's PRMTrainer, arXiv:2211.14275): within a text,
    separator and step may share a token.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
        if tokenizer.bos_token_id is not None:
            ids.insert(0, tokenizer.bos_token_id)  # pyright: ignore[reportArgumentType]
    else:
        ids = _of_messages(tokenizer, prompt, label=label, add_generation_prompt=True)
    behind: list[int] = list(tokenizer(separator, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
    places, ends = [], []
    for step, end in split_steps(completion, separator):
        ids += [*tokenizer(step, add_special_tokens=False)["input_ids"], *behind]  # pyright: ignore[reportGeneralTypeIssues]
        places.append(len(ids) - 1)
        ends.append(end)
    return ScoredText(ids=tuple(ids), places=tuple(places), ends=tuple(ends))


def split_steps(completion: str, separator: str) -> list[tuple[str, int]]:
    """The steps of a response, and where each ends in it, its separator included. Blank ones are none; one there always is."""
    steps, start = [], 0
    for piece in completion.split(separator):
        start += len(piece) + len(separator)
        if piece.strip():
            steps.append((piece, min(start, len(completion))))
    return steps or [(completion, len(completion))]


def _as_messages(completion: str | Messages) -> Messages:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _of_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, label: str, **options: Any) -> list[int]:
    from jinja2 import TemplateError

    try:
        written: Any = tokenizer.apply_chat_template([dict(each) for each in messages], tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        raise DataError(f"{label}: the reward model's chat template refuses its messages ({error}). Change their roles.") from None
    return list(written["input_ids"])


# --- tokens -> scores ----------------------------------------------------------------------------------------------------------


class RewardModel:
    """A frozen reward model on this process's device."""

    def __init__(self, model: PreTrainedModel, kind: ModelKind):
        self.model, self.kind = model.eval(), kind
        # Where a batch's padding begins, a sequence classifier tells by the token; without one it takes single rows.
        self._pad_id: int | None = model.config.get_text_config().pad_token_id

    @classmethod
    def load(cls, folder: str, kind: ModelKind, *, dtype: torch.dtype, trust_remote_code: bool = False) -> RewardModel:
        """From a folder that `find_reward_model` returned."""
        model = _auto_class(kind).from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu"), kind)

    @torch.no_grad()
    def score(self, texts: Sequence[ScoredText], *, tokens_per_microbatch: int, max_rows: int) -> list[np.ndarray]:
        """For each text its scores, float32: one, or one for each of its places. Batches and padding change none of them.

        A process model's score is its logit where it has one label, and the second label's probability where it has two.
        """
        if self.kind is ModelKind.outcome and self._pad_id is None:
            max_rows = 1
        scores: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(texts)
        lengths = [len(text.ids) for text in texts]
        for rows in microbatches(lengths, tokens_per_microbatch=tokens_per_microbatch, max_rows=max_rows):
            logits = self._logits([texts[row].ids for row in rows]).float().cpu()
            for place, row in enumerate(rows):
                found = logits[place] if self.kind is ModelKind.outcome else _of_steps(logits[place, list(texts[row].places)])
                scores[row] = found.numpy()
        return scores

    def _logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[R, 1], or [R, S, labels]: of rows padded on the right."""
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self._pad_id or 0, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        device = self.model.device
        return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits


def _of_steps(logits: Tensor) -> Tensor:
    """[n, labels] -> [n]."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, 1]


def running_reward(scores: np.ndarray, reduction: StepReduction) -> np.ndarray:
    """[n] float64: the reward if the response ended with this step; the last one is its reward."""
    scores = scores.astype(np.float64)
    match reduction:
        case StepReduction.min:
            return np.minimum.accumulate(scores)
        case StepReduction.mean:
            return np.cumsum(scores) / np.arange(1, len(scores) + 1)
        case StepReduction.last:
            return scores


def microbatches(lengths: Sequence[int], *, tokens_per_microbatch: int, max_rows: int) -> Iterator[list[int]]:
    """Rows of similar length together, as many as the budget holds with their padding; one that is longer goes alone."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if rows and (len(rows) == max_rows or lengths[rows[0]] * (len(rows) + 1) > tokens_per_microbatch):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
