"""Fits a Bradley-Terry reward model to pairs of responses, with TRL's RewardTrainer: `rlkit reward fit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from json import dumps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from rlkit.data.files import first_rows
from rlkit.data.models.loading import context_length, load_tokenizer, resolve
from rlkit.data.models.randomness import own_randomness
from rlkit.data.models.reward_model import RewardModel, ScoredText, encode
from rlkit.errors import ConfigError, DataError, NumericalError, ResourceError
from rlkit.settings import ModelKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = ("prompt", "chosen", "rejected")
FORM = 'Write {"prompt": ..., "chosen": ..., "rejected": ...} on each line, in text or in chat messages.'
HELD_OUT_FRACTION = 0.1  # of the prompts
WARMUP_FRACTION = 0.1
NUM_REPORTS = 10
SCORING = {"tokens_per_microbatch": 16384, "max_rows": 64}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two responses to one prompt."""

    prompt: str  # what tells it from other prompts
    chosen: ScoredText
    rejected: ScoredText


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What became of a fit."""

    folder: Path
    num_pairs: int  # trained on
    num_held_out: int
    accuracy: float  # the share of held-out pairs whose chosen response has the higher score

    def __str__(self) -> str:
        return (
            f"{self.folder}: fitted to {self.num_pairs:,} pairs. It prefers the chosen response in {self.accuracy:.1%} of "
            f"{self.num_held_out:,} held-out pairs, whose prompts it was not trained on. Train a policy with it: rlkit train "
            f"reward=model reward.path={self.folder}"
        )


def fit(
    data: Path,
    base: str,
    out: Path,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    report: Callable[[str], None] = print,
) -> Fitted:
    """Trains `base` with a new head on the pairs of a file and writes it, float32, to the new folder `out`, whole or not at all.

    The loss is -log sigmoid(score(chosen) - score(rejected)): arXiv:2203.02155 eq. 1 with pairs. Raises DataError for a row that
    is no pair, ConfigError for a base model that is none.
    """
    _check(steps=steps, learning_rate=learning_rate, batch_size=batch_size, out=out)
    folder = resolve(base, key="--model")
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ConfigError(f"--model {base}: its tokenizer has no token for padding. Write a model that has one, or an end token.")
    train, held_out = split(read_pairs(data, tokenizer, limit=context_length(folder)), data)
    out.parent.mkdir(parents=True, exist_ok=True)
    with own_randomness(), TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        torch.manual_seed(seed)  # of the head, which is new
        model = _with_head(folder)
        _train(model, tokenizer, train, Path(work, "trainer"), steps, learning_rate, batch_size, seed, report)
        accuracy = _accuracy(RewardModel(model, ModelKind.outcome), held_out)
        whole = Path(work, "model")
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        for file in whole.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner only
        whole.rename(out)
    return Fitted(folder=out, num_pairs=len(train), num_held_out=len(held_out), accuracy=accuracy)


def _check(*, steps: int, learning_rate: float, batch_size: int, out: Path) -> None:
    if out.exists():
        raise DataError(f"--out {out}: exists already. Remove it, or write another folder.")
    if steps < 1:
        raise ConfigError(f"--steps {steps}: nothing is learnt. Write 1 or more.")
    if not 0 < learning_rate < math.inf:
        raise ConfigError(f"--learning-rate {learning_rate}: nothing is learnt. Write a number above 0, such as 1e-5.")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: no pair in a step. Write 1 or more; 16 is usual.")
    if torch.cuda.device_count() > 1:
        raise ResourceError("rlkit reward fit uses one GPU, and several are visible. Write CUDA_VISIBLE_DEVICES=0 before it.")


def read_pairs(data: Path, tokenizer: PreTrainedTokenizerBase, *, limit: int | None) -> list[Pair]:
    """The pairs of a file in the model's tokens, of which each response may have `limit` with its prompt. Raises DataError."""
    return [
        _pair(row, tokenizer, label=f"--data {data}: row {number}", limit=limit)
        for number, row in enumerate(first_rows("--data", str(data)), start=1)
    ]


def _pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, label: str, limit: int | None) -> Pair:
    for column in COLUMNS:
        if column not in row:
            raise DataError(f"{label} has no column {column}. {FORM}")
        if not isinstance(row[column], str) and not _is_messages(row[column]):
            raise DataError(
                f"{label}: column {column} is neither text nor messages. Write text, or a list of "
                '{"role": ..., "content": ...} with text in both.'
            )
    prompt, is_chat = row["prompt"], not isinstance(row["prompt"], str)
    if is_chat and not tokenizer.chat_template:
        raise DataError(f"{label}: column prompt is chat messages, and the model has no chat template. Write text.")
    texts: dict[str, ScoredText] = {}
    for column in COLUMNS[1:]:
        if not is_chat and not isinstance(row[column], str):
            raise DataError(f"{label}: column {column} is chat messages, and its prompt is text. Write both in one form.")
        texts[column] = encode(tokenizer, prompt, row[column], label=label)
        if limit is not None and len(texts[column].ids) > limit:
            raise DataError(
                f"{label}: column {column} has {len(texts[column].ids)} tokens with its prompt, and the model has positions for "
                f"{limit}. Shorten it, or write another model."
            )
    if texts["chosen"].ids == texts["rejected"].ids:
        raise DataError(f"{label}: columns chosen and rejected are the same to the model, which teaches nothing. Remove the row.")
    return Pair(prompt=dumps(prompt), **texts)


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("role", "content")) for each in value)
    )


def split(pairs: Sequence[Pair], data: Path) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and held-out ones. A prompt is on one side with all its pairs, by its hash: whatever the file's order."""
    prompts = sorted({pair.prompt for pair in pairs}, key=lambda prompt: sha256(prompt.encode()).digest())
    if len(prompts) < 2:
        raise DataError(f"--data {data}: all pairs are of one prompt, and some prompts are held out. Write pairs of two or more.")
    apart = set(prompts[: max(1, round(HELD_OUT_FRACTION * len(prompts)))])
    return [pair for pair in pairs if pair.prompt not in apart], [pair for pair in pairs if pair.prompt in apart]


def _with_head(folder: str) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    with suppress_seqcls_warning():  # that the head is new is what is wanted
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    work: Path,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    report: Callable[[str], None],
) -> None:
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "loss" in logs:
                report(f"step {state.global_step}/{steps}: loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.3f} (in training)")

    is_gpu = torch.cuda.is_available()
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(work),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=round(WARMUP_FRACTION * steps),
            max_length=None,  # a pair that is too long was refused
            seed=seed,
            use_cpu=not is_gpu,
            bf16=is_gpu,
            gradient_checkpointing=is_gpu,
            save_strategy="no",
            report_to="none",
            logging_steps=max(1, steps // NUM_REPORTS),
            disable_tqdm=True,
            dataloader_pin_memory=is_gpu,
        ),
        # In tokens: training and scoring then write a text by the same function.
        train_dataset=Dataset.from_dict(
            {"chosen_ids": [[*pair.chosen.ids] for pair in pairs], "rejected_ids": [[*pair.rejected.ids] for pair in pairs]}
        ),
        processing_class=tokenizer,
        callbacks=[Reporter()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.config.use_cache = True  # the trainer switches it off and would save that


def _accuracy(model: RewardModel, pairs: Sequence[Pair]) -> float:
    """Raises NumericalError where a score is not finite."""
    chosen, rejected = (model.score([getattr(pair, side) for pair in pairs], **SCORING) for side in COLUMNS[1:])
    if not all(math.isfinite(float(score[0])) for score in [*chosen, *rejected]):
        raise NumericalError("The fitted model's scores are not finite. Write a lower --learning-rate.")
    return sum(float(a[0]) > float(b[0]) for a, b in zip(chosen, rejected, strict=True)) / len(pairs)
