"""How the samples of a microbatch lie in the rows that the model runs on. No layout changes a result, only its cost.

`padded`: a row each. `packed`: several samples in a row, which do not see each other. `shared`: a prompt once, followed by all of
its responses, each of which sees the prompt and itself; positions go on from the prompt's end in every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit.settings import LayoutKind
from rlkit.types import Sequences

Group = list[int]  # samples with one prompt, which is written once
Row = list[Group]
PAD = -1  # document of padding


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a forward pass reads. n counts the response tokens of all samples, sample by sample."""

    input_ids: Tensor  # [R, S] int64, right-padded with 0
    predicts: Tensor  # [n] int64: where in the flattened [R * S] each response token is predicted
    targets: Tensor  # [n] int64: the response tokens
    position_ids: Tensor | None = None  # [R, S] int64; None: 0, 1, 2, ... in every row
    mask: Tensor | None = None  # [R, 1, S, S] bool, who sees whom; None: causal

    def to(self, device: torch.device) -> Layout:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Layout(
            input_ids=self.input_ids.to(device),
            predicts=self.predicts.to(device),
            targets=self.targets.to(device),
            position_ids=move(self.position_ids),
            mask=move(self.mask),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """What decides between layouts: work per token, and per pair of tokens in a row's attention.

    A formula and not a stop-watch, so that two runs of one seed choose alike. tests/benchmarks/layouts.py measures what it
    chooses on a device: on two CPU cores never more than 2 % slower than the fastest. Where it is, write learner.layout.
    """

    per_token: float  # body parameters
    per_pair: float  # layers x attention width

    def of(self, widths: Sequence[int], *, masked: bool) -> float:
        """Of rows this wide. A causal kernel skips the half that a mask has to look at."""
        pairs = 2.0 if masked else 1.0
        return sum(self.per_token * width + pairs * self.per_pair * width * width for width in widths)


def plan(sequences: Sequences, *, token_budget: int, kind: LayoutKind, cost: ModelCost) -> list[list[Row]]:
    """Microbatches, each a list of rows, each within `token_budget` tokens with its padding.

    Length-sorted, so little of it is padding; a sample longer than the budget gets a microbatch of its own. No plan can change
    the gradient: every denominator is counted over the whole step.
    """
    if kind is LayoutKind.auto:
        return min(
            (
                plan(sequences, token_budget=token_budget, kind=each, cost=cost)
                for each in LayoutKind
                if each is not LayoutKind.auto
            ),
            key=lambda microbatches: plan_cost(sequences, microbatches, cost),
        )
    rows = _rows(sequences, token_budget, kind)
    widths = [row_width(sequences, row) for row in rows]
    microbatches: list[list[Row]] = []
    widest = 0
    for index in sorted(range(len(rows)), key=lambda index: -widths[index]):
        if microbatches and (len(microbatches[-1]) + 1) * widest <= token_budget:
            microbatches[-1].append(rows[index])
        else:
            microbatches.append([rows[index]])
            widest = widths[index]
    return microbatches


def plan_cost(sequences: Sequences, microbatches: Sequence[Sequence[Row]], cost: ModelCost) -> float:
    """Every row as wide as the widest of its microbatch."""
    total = 0.0
    for rows in microbatches:
        widest = max(row_width(sequences, row) for row in rows)
        total += cost.of([widest] * len(rows), masked=not is_plain(rows))
    return total


def is_plain(rows: Sequence[Row]) -> bool:
    """One sample a row: causal attention is enough."""
    return all(len(row) == 1 and len(row[0]) == 1 for row in rows)


def row_width(sequences: Sequences, row: Row) -> int:
    """Tokens of a row. A response's last token predicts nothing and is left out."""
    return sum(
        int(sequences.prompt_lengths[group[0]]) + sum(max(int(sequences.response_lengths[sample]) - 1, 0) for sample in group)
        for group in row
    )


def _rows(sequences: Sequences, token_budget: int, kind: LayoutKind) -> list[Row]:
    samples = list(range(len(sequences.prompt_lengths)))
    if kind is LayoutKind.padded:
        return [[[sample]] for sample in samples]
    if kind is LayoutKind.shared:
        return [[group] for group in _groups(sequences, token_budget)]
    widths = {sample: row_width(sequences, [[sample]]) for sample in samples}
    capacity = min(token_budget, PACKED_SAMPLES * max(widths.values(), default=0))
    bins: list[tuple[int, Row]] = []  # room left, row
    for sample in sorted(samples, key=lambda sample: -widths[sample]):  # first fit, longest first
        place = next((place for place, (room, _) in enumerate(bins) if room >= widths[sample]), None)
        if place is None:
            bins.append((capacity - widths[sample], [[sample]]))
        else:
            room, row = bins[place]
            row.append([sample])
            bins[place] = (room - widths[sample], row)
    return [row for _, row in bins]


PACKED_SAMPLES = 4  # of the longest length fit in a packed row: its mask costs the square of its width


def _groups(sequences: Sequences, token_budget: int) -> list[Group]:
    """Samples by prompt, a group cut where it would not fit into the budget."""
    by_prompt: dict[tuple[int, ...], list[Group]] = {}
    room: dict[tuple[int, ...], int] = {}
    for sample in range(len(sequences.prompt_lengths)):
        prompt = tuple(sequences.prompt(sample))
        tokens = int(sequences.response_lengths[sample])
        if prompt not in by_prompt or room[prompt] < tokens:
            by_prompt.setdefault(prompt, []).append([])
            room[prompt] = token_budget - len(prompt)
        by_prompt[prompt][-1].append(sample)
        room[prompt] -= tokens
    return [group for groups in by_prompt.values() for group in groups]


def arrange(sequences: Sequences, *, token_budget: int, kind: LayoutKind, cost: ModelCost) -> Iterator[tuple[list[int], Layout]]:
    """Microbatches: which samples, and how they lie; the layout's results come in the order of that list."""
    for rows in plan(sequences, token_budget=token_budget, kind=kind, cost=cost):
        yield [sample for row in rows for group in row for sample in group], lay_out(sequences, rows)


def lay_out(sequences: Sequences, rows: Sequence[Row]) -> Layout:
    """The rows as tensors; results come in the order in which the rows name their samples."""
    width = max((row_width(sequences, row) for row in rows), default=0)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    document = torch.full_like(input_ids, PAD)  # prompt and its responses
    branch = torch.zeros_like(input_ids)  # 0 in a prompt, a number of its own in each response
    predicts, targets = [_NONE], [_NONE]
    for index, row in enumerate(rows):
        end = 0
        for number, group in enumerate(row):
            prompt = sequences.prompt(group[0])
            start, end = end, end + len(prompt)
            input_ids[index, start:end] = torch.tensor(prompt)
            position_ids[index, start:end] = torch.arange(len(prompt))
            document[index, start:end] = number
            last = torch.tensor([end - 1])  # predicts the first token of every response
            for branch_number, sample in enumerate(group, start=1):
                response = sequences.response(sample)
                kept = response[:-1]
                start, end = end, end + len(kept)
                input_ids[index, start:end] = kept
                position_ids[index, start:end] = len(prompt) + torch.arange(len(kept))
                document[index, start:end] = number
                branch[index, start:end] = branch_number
                predicts.append(index * width + torch.cat([last, torch.arange(start, end)])[: len(response)])
                targets.append(response)
    plain = is_plain(rows)
    return Layout(
        input_ids=input_ids,
        predicts=torch.cat(predicts),
        targets=torch.cat(targets),
        position_ids=None if plain else position_ids,
        mask=None if plain else _mask(document, branch),
    )


def whole_sequences(token_ids: Sequence[Sequence[int]]) -> Layout:
    """A row each, of which everything after the first token is predicted."""
    rows = [torch.tensor(ids) for ids in token_ids]
    sequences = Sequences(
        input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        prompt_lengths=torch.ones(len(rows), dtype=torch.int64),
        response_lengths=torch.tensor([len(ids) - 1 for ids in rows]),
    )
    return lay_out(sequences, [[[index]] for index in range(len(rows))])


# What a rank without samples runs: a model must see at least one token. Nothing reads the result.
_NONE = torch.zeros(0, dtype=torch.int64)
EMPTY_LAYOUT = Layout(input_ids=torch.zeros(1, 1, dtype=torch.int64), predicts=_NONE, targets=_NONE)


def _mask(document: Tensor, branch: Tensor) -> Tensor:
    """[R, 1, S, S]: a token sees what came before it in its own document, in the prompt or in its own branch.

    Padding sees padding, so that no row of the softmax is empty.
    """
    same_document = document.unsqueeze(2) == document.unsqueeze(1)
    visible = (branch.unsqueeze(1) == 0) | (branch.unsqueeze(2) == branch.unsqueeze(1))
    causal = torch.ones(document.shape[1], document.shape[1], dtype=torch.bool).tril()
    return (same_document & visible & causal).unsqueeze(1)
