"""What an episode has said so far, as token ids: the policy's as it sampled them, and in between what its environment answers.

Nothing that was sampled is ever tokenised again. What is new behind a turn (its end, the observation, the next turn's start) is
what the chat template writes there, tokenised alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
CHARACTERS_PER_TOKEN = 64  # of an observation, at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """What stands between two turns of the policy."""

    ids: list[int]
    rendered: str  # the template's text of everything up to the next turn; empty for plain text
    forks: bool = False  # the template writes earlier turns otherwise now: `ids` is then the whole history, a new prompt
    num_told: int = 0  # tokens of the observation in it


class History:
    """Renders observations for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, role: str, tools: Sequence[dict[str, Any]] = ()):
        self._tokenizer, self._role, self._tools = tokenizer, role, list(tools)
        added = tokenizer.added_tokens_decoder.values()
        self._special = sorted({token.content for token in added if len(token.content) > 1})

    def ids(self, text: str) -> list[int]:
        """Of a text in the middle of others."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """What the policy wrote, without special tokens: the environment's `action`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def defused(self, text: str) -> str:
        """What an environment says, with the special tokens that it spells broken up by a space: what a tool found must not end a
        turn, or begin one."""
        for token in self._special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def cut(self, observation: str, max_tokens: int) -> tuple[str, bool]:
        """The observation's first tokens, defused, and whether that is less than all of it."""
        # Tokenising megabytes would hold up every episode.
        text = self.defused(observation[: CHARACTERS_PER_TOKEN * max_tokens])
        ids = self.ids(text)
        if len(ids) > max_tokens:
            return str(self._tokenizer.decode(ids[:max_tokens])), True
        return text, len(observation) > CHARACTERS_PER_TOKEN * max_tokens

    def behind(self, observation: str, *, messages: Sequence[Message] | None, rendered: str, last_id: int) -> Continuation:
        """What follows a turn of the policy, whose last token is `last_id`.

        messages: the whole conversation up to this turn, in it the policy's turns as text; None for plain text, where the
        observation follows as it is. rendered: the template's text of it when the turn began.
        """
        if messages is None:
            return Continuation(ids=self.ids(observation), rendered="")
        now = self.render([*messages, {"role": self._role, "content": observation}])
        said = str(messages[-1]["content"])
        # Many templates trim what they are given, which changes nothing that was sampled.
        for content in (said, said.lstrip(), said.rstrip(), said.strip()):
            if now.startswith(rendered + content):
                ids = self.ids(now[len(rendered + content) :])
                # The template closes the turn with the token that the policy has sampled already.
                if ids and ids[0] == last_id:
                    ids = ids[1:]
                return Continuation(ids=ids, rendered=now)
        return Continuation(ids=self.ids(now), rendered=now, forks=True, num_told=len(self.ids(observation)))

    def render(self, messages: Sequence[Message]) -> str:
        """Up to the start of the policy's next turn. Raises ConfigError where the template refuses the conversation."""
        from jinja2 import TemplateError

        try:
            return render(self._tokenizer, messages, self._tools)
        except TemplateError as error:
            raise ConfigError(
                f"environment.observation_role={self._role}: the model's chat template refuses the conversation ({error}). Write "
                "another role, user or tool; where it refuses a system message, environment.tools has no place to be named."
            ) from None

    def check(self) -> None:
        """Raises ConfigError where the template refuses an observation, or leaves it out."""
        asked = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "turn"}]
        if "observation" not in self.render([*asked, {"role": self._role, "content": "observation"}]):
            raise ConfigError(
                f"environment.observation_role={self._role}: the model's chat template leaves out messages of this role. Write "
                "another role, user or tool."
            )


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
    """The conversation with its tools, up to the start of the next turn. Tools that the template does not write stand in the
    system message."""
    if tools and not names_tools(tokenizer, tools):
        messages, tools = with_instructions(messages, tools), ()
    return _written(tokenizer, messages, tools)


def names_tools(tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]]) -> bool:
    """Whether the chat template writes the tools that it is given, as a short conversation shows."""
    short = [{"role": "user", "content": "question"}]
    return _written(tokenizer, short, tools) != _written(tokenizer, short, ())


def _written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
    given = list(tools) or None
    return str(tokenizer.apply_chat_template(list(messages), tools=given, tokenize=False, add_generation_prompt=True))  # pyright: ignore[reportArgumentType]


def with_instructions(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """With a system message that names the tools."""
    import json

    listed = "\n".join(json.dumps(tool) for tool in tools)
    text = (
        f"You may call these tools before you answer:\n{listed}\nTo call one, write\n<tool_call>\n"
        '{"name": tool, "arguments": {name: value}}\n</tool_call>\nand end your turn; its result comes next. '
        "A turn without a call is your answer."
    )
    first, rest = ([], list(messages)) if messages[0]["role"] != "system" else ([messages[0]["content"]], list(messages[1:]))
    return [{"role": "system", "content": "\n\n".join([*first, text])}, *rest]
