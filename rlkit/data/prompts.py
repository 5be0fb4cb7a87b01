"""Rows of a data set -> checked, tokenised `Prompt`s, before any engine starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from rlkit.data.environments.history import render
from rlkit.data.files import Row
from rlkit.data.sources import Source, column_names, read
from rlkit.errors import ConfigError, DataError
from rlkit.settings import BadRow, Data, TableData
from rlkit.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN = 10
RESERVED = ("prompts", "completions")  # a reward function's own arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """What a run trains and is evaluated on."""

    train: list[Prompt]  # in the order of the source
    held_out: list[Prompt]  # in an order by hash of the id, so that its first n are a fair sample
    dropped: dict[str, int] = field(default_factory=dict)  # rows left out, by reason

    @property
    def everything(self) -> list[Prompt]:
        return [*self.train, *self.held_out]

    def fingerprint(self) -> str:
        """Of the prompts to train on, their tokens and their order: a run can be continued only on the same."""
        digest = sha256()
        for prompt in self.train:
            digest.update(f"{prompt.id}\x1f{prompt.prompt_ids}\x1e".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offender:
    label: str
    kind: str
    problem: str


# A row's source and its columns -> the column that the reward function needs and the row lacks.
Missing = Callable[[str, Mapping[str, Any]], str | None]


def load_prompts(
    settings: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    missing: Missing = lambda source, columns: None,
    tools: Sequence[dict[str, Any]] = (),
) -> PromptSet:
    """Reads, checks and tokenises the data. `missing`: what the reward function says of a row. `tools`: that chat prompts name.

    Raises DataError with up to ten of the rows that cannot be used; under `data.on_bad_row=drop` only if none is left.
    """
    source = replace(read(settings), tools=tuple(tools))
    _check_template(source, tokenizer)
    train, train_offenders = _prompts(source, source.train, tokenizer, max_prompt_tokens, missing, prefix="")
    offenders = train_offenders
    if source.held_out is None:
        fraction = settings.held_out_fraction
        held_out = [prompt for prompt in train if _hash(_split_key(source, prompt)) < fraction * 2**64]
        chosen = {prompt.id for prompt in held_out}
        train = [prompt for prompt in train if prompt.id not in chosen]
    else:
        held_out, held_out_offenders = _prompts(source, source.held_out, tokenizer, max_prompt_tokens, missing, prefix="held_out:")
        offenders = train_offenders + held_out_offenders
    if offenders and (settings.on_bad_row is BadRow.error or not train):
        raise DataError(_report(source, offenders, settings.on_bad_row))
    if not train:
        raise DataError(
            f"data {source.name}: all {len(held_out)} rows fell into the held-out share. Add rows, or lower data.held_out_fraction."
        )
    sources = dict.fromkeys(prompt.source for prompt in train)
    for name in settings.source_weights if isinstance(settings, TableData) else ():
        if name not in sources:
            raise ConfigError(f"data.source_weights.{name}: no prompt is of that source. The sources are {', '.join(sources)}.")
    held_out.sort(key=lambda prompt: _hash(prompt.id))
    return PromptSet(train=train, held_out=held_out, dropped=dict(Counter(offender.kind for offender in offenders)))


def _prompts(
    source: Source,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    missing: Missing,
    prefix: str,
) -> tuple[list[Prompt], list[_Offender]]:
    where = f"data {source.name}" + (" (held out)" if prefix else "")
    _check_columns(source, rows, missing, where)
    offenders, kept, seen = [], [], {}
    for row in rows:
        id = prefix + _id_of(source, row)
        kind, problem = _find_fault(source, row, missing)
        if not kind and id in seen:
            kind, problem = "duplicate_id", f"has the id {id} of {seen[id]}"
        if kind:
            offenders.append(_Offender(label=prefix + row.label, kind=kind, problem=problem))
            continue
        seen[id] = row.label
        kept.append((id, row))

    is_chat = [source.chat or not isinstance(row.values[source.prompt_column], str) for _, row in kept]
    texts = [
        _render(source, row, tokenizer) if chat else row.values[source.prompt_column]
        for chat, (_, row) in zip(is_chat, kept, strict=True)
    ]
    prompts = []
    for (id, row), text, chat, ids in zip(kept, texts, is_chat, _encode(tokenizer, texts, is_chat), strict=True):
        if not ids:
            offenders.append(_Offender(label=prefix + row.label, kind="empty_prompt", problem="has a prompt without a token"))
        elif len(ids) > max_prompt_tokens:
            problem = f"has {len(ids)} tokens, max_prompt_tokens={max_prompt_tokens}"
            offenders.append(_Offender(label=prefix + row.label, kind="too_long", problem=problem))
        else:
            prompts.append(
                Prompt(
                    id=id,
                    text=text,
                    prompt_ids=tuple(ids),
                    source=_source_of(source, row),
                    columns=row.values,
                    messages=tuple(_messages(source, row)) if chat else None,
                )
            )
    return prompts, offenders


def _check_template(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    if source.chat and not tokenizer.chat_template:
        raise ConfigError(f"data {source.name}: asks for chat, and this model's tokenizer has no chat template. {_TEMPLATE_FIX}")
    rows = source.train + (source.held_out or [])
    messages = any(isinstance(row.values.get(source.prompt_column), list) for row in rows)
    if messages and not tokenizer.chat_template:
        raise ConfigError(
            f"data {source.name}: prompts are chat messages, and this model's tokenizer has no chat template. {_TEMPLATE_FIX}"
        )
    if source.system_prompt is not None and not (source.chat or messages):
        raise ConfigError(
            "data.system_prompt is a chat message, and these prompts are plain text. Write data.chat=true, or leave it away."
        )


_TEMPLATE_FIX = "Write data.chat=false with prompts in plain text, or choose a model that was tuned for chat."


def _check_columns(source: Source, rows: list[Row], missing: Missing, where: str) -> None:
    if not rows:
        raise DataError(f"{where}: it has no rows. Write the path of a data set that has some.")
    existing = column_names(rows)
    if not existing:
        return  # no row could be read: each is an offender
    listed = ", ".join(existing)
    if source.prompt_column not in existing:
        raise DataError(f"{where}: there is no column {source.prompt_column}; set data.prompt_column. The columns are {listed}.")
    for setting in ("id_column", "source_column"):
        if (column := getattr(source, setting)) is not None and column not in existing:
            raise DataError(f"{where}: there is no column {column}; set data.{setting}. The columns are {listed}.")
    for name in {_source_of(source, row) for row in rows if not row.problem}:
        if (column := missing(name, dict.fromkeys(existing))) is not None:
            raise DataError(
                f"{where}: the reward function needs a column {column}, and there is none. The columns are {listed}; "
                f"write data.columns.{column}=<one of them>, or change the function's arguments."
            )
    for name in RESERVED:
        if name in existing:
            raise DataError(
                f"{where}: a column may not be called {name}, an argument of reward functions. Map it with data.columns."
            )


def _find_fault(source: Source, row: Row, missing: Missing) -> tuple[str, str]:
    """The kind and the description of what is wrong with a row; two empty strings when nothing is."""
    if row.problem:
        return "unreadable", row.problem
    wanted = missing(_source_of(source, row), row.values)
    for name in (source.prompt_column, source.id_column, source.source_column, wanted):
        if name is not None and name not in row.values:
            return "missing_key", f"lacks {name}; it has {', '.join(row.values)}"
    # A table fills a gap with None; a reward function may see that.
    for name in (source.prompt_column, source.id_column, source.source_column):
        if name is not None and row.values[name] is None:
            return "missing_key", f"has no value for {name}"
    prompt = row.values[source.prompt_column]
    if isinstance(prompt, str):
        if not prompt.strip():
            return "empty_prompt", "has an empty prompt"
        return _check_encodable(prompt)
    return _check_messages(source, prompt)


def _check_messages(source: Source, messages: Any) -> tuple[str, str]:
    if not isinstance(messages, list):
        return "wrong_type", f"has a {type(messages).__name__} for a prompt, neither text nor a list of messages"
    if not messages:
        return "empty_prompt", "has an empty list of messages"
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            return "wrong_type", 'has a message that is not {"role": text, "content": text}'
        kind, problem = _check_encodable(message["content"])
        if kind:
            return kind, problem
    if messages[-1]["role"] == "assistant":
        return "wrong_type", "ends with an assistant message, which leaves nothing to answer"
    if not any(message["content"].strip() for message in messages):
        return "empty_prompt", "has only empty messages"
    if source.system_prompt is not None and messages[0]["role"] == "system":
        return "two_system_prompts", "has a system message of its own, and data.system_prompt is set"
    return "", ""


def _check_encodable(text: str) -> tuple[str, str]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        return "unreadable", f"has a prompt that is not Unicode text at character {error.start}"
    return "", ""


def _source_of(source: Source, row: Row) -> str:
    """The name of where the row comes from; where it does not say, which is found out elsewhere, of the whole."""
    name = row.source if source.source_column is None else row.values.get(source.source_column)
    return source.name if name is None else str(name)


def _id_of(source: Source, row: Row) -> str:
    """What tells the row from others; where it does not say, which is found out elsewhere, None in words."""
    if row.id is not None:
        return row.id
    return row.label.replace(" ", "-") if source.id_column is None else str(row.values.get(source.id_column))


def _messages(source: Source, row: Row) -> list[dict[str, str]]:
    prompt = row.values[source.prompt_column]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return messages if source.system_prompt is None else [{"role": "system", "content": source.system_prompt}, *messages]


def _render(source: Source, row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    try:
        return render(tokenizer, _messages(source, row), source.tools)
    except TemplateError as error:
        raise DataError(
            f"data {source.name}: {row.label}: the model's chat template refuses its messages ({error}). "
            f"Change their roles, or data.system_prompt."
        ) from None


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], is_chat: list[bool]) -> list[list[int]]:
    """Token ids per text. A chat template has written its own special tokens, so only plain text gets the tokenizer's."""
    ids: list[list[int]] = [[] for _ in texts]
    for special in (True, False):
        rows = [index for index, chat in enumerate(is_chat) if chat is not special]
        if rows:
            encoded = tokenizer([texts[index] for index in rows], add_special_tokens=special)["input_ids"]
            for index, row_ids in zip(rows, encoded, strict=True):
                ids[index] = list(row_ids)
    return ids


def _split_key(source: Source, prompt: Prompt) -> str:
    # A row's number changes when a line above it goes, and two rows can ask one question: its text decides.
    return prompt.text if source.id_column is None else prompt.id


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")


def _report(source: Source, offenders: list[_Offender], policy: BadRow) -> str:
    total = len(source.train) + len(source.held_out or [])
    shown = "".join(f"\n  {offender.label} {offender.problem}" for offender in offenders[:MAX_SHOWN])
    rest = f"\n  and {len(offenders) - MAX_SHOWN} more" if len(offenders) > MAX_SHOWN else ""
    fix = "Fix them: no row is left to train on."
    if policy is BadRow.error:
        fix = "Fix them, or leave them out with data.on_bad_row=drop."
    return f"data {source.name}: {len(offenders)} of {total} rows cannot be used:{shown}{rest}\n{fix}"
