"""Prompts -> scored rollouts of several turns: the policy and its environment speak in turn, many episodes side by side.

`EpisodeSampler` stands in the place of `Sampler`, so that nothing that samples knows of turns.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlkit.config import RunConfig
from rlkit.controller.dispatch import Ticket, first_complete
from rlkit.controller.fleet import Engines, Generation
from rlkit.controller.lookahead import wait_briefly
from rlkit.controller.sampling import Sampled, Sampler, Submitted, sample_seed, tokens_of
from rlkit.core.rehearsal import BaseAnswers
from rlkit.data.environments.calls import Calls, EpisodeWorker, Failure
from rlkit.data.environments.episode import Episode, Piece
from rlkit.data.environments.history import History
from rlkit.data.environments.pool import EnvironmentPool
from rlkit.data.environments.protocol import Step
from rlkit.data.prompts import PromptSet, load_prompts
from rlkit.data.rewards.pool import RewardItem
from rlkit.data.rewards.weighted import Rewards
from rlkit.errors import ConfigError
from rlkit.settings import CallFormat, EnvironmentReward, HeldOut, MultiTurn, ToolEnvironment
from rlkit.types import (
    FinishReason,
    Prompt,
    RewardResult,
    RewardStatus,
    Rollout,
    SampleRequest,
    SamplingSpec,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRANSCRIPT = "transcript"  # the column in which a reward function finds who said what


PATIENCE_S = 0.02  # at one of the two, environment and engines, while the other is at work too

Wave = tuple[list[Episode], Generation | Ticket]  # turns under way that come back together


class Played(NamedTuple):
    """When episodes had come to their ends, and how long they had waited for nothing but their environment."""

    at: float
    environment_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmittedEpisodes(Submitted):
    """Episodes, which somebody plays already, or which whoever collects them is to play."""

    episodes: list[Episode]
    sampling: SamplingSpec
    playing: Future[Played] | None


@dataclass(kw_only=True, slots=True)
class Play:
    """Where the episodes of a batch are that are not over."""

    waiting: deque[Episode]  # they have not begun, because so many others have
    calls: Calls  # with their environment
    sampling: SamplingSpec
    ready: list[Episode] = field(default_factory=list)  # for their next turn
    waves: list[Wave] = field(default_factory=list)  # with the engines

    @property
    def has_heard(self) -> bool:
        """Whether some turn is back, or never will be."""
        tickets = (generation for _, generation in self.waves if isinstance(generation, Ticket))
        return any(ticket.is_complete or ticket.failure is not None for ticket in tickets)


@dataclass(kw_only=True, slots=True)
class EpisodeSampler(Sampler):
    """Plays `group_size` episodes per prompt and has them scored."""

    environment: EnvironmentPool
    settings: MultiTurn
    history: History
    max_prompt_tokens: int
    max_model_tokens: int
    has_outcome: bool  # something judges the answer beside what the environment gives

    def submit(self, label: str, prompts: Sequence[Prompt], group_size: int, sampling: SamplingSpec) -> SubmittedEpisodes:
        """Begin the episodes, in a thread of their own where engines take samples one by one. See `Sampler.submit`."""
        started = time.monotonic()
        # One world for all samples of a prompt, because they are compared with each other.
        episodes = [
            Episode(
                sample_id=f"{label}/{place}/{prompt.id}/{index}",
                group_id=f"{label}/{place}/{prompt.id}",
                prompt=prompt,
                rendered=prompt.text,
                pieces=[Piece(prompt_ids=prompt.prompt_ids)],
                world=sample_seed(self.seed, label, place, prompt.id),
            )
            for place, prompt in enumerate(prompts)
            for index in range(group_size)
        ]
        playing = None
        if self.engines.takes_singly:  # whoever submits them has other things to do meanwhile
            playing = Future()
            given = (playing, episodes, sampling)
            threading.Thread(target=self._play_aside, args=given, name=f"plays {label}", daemon=True).start()
        return SubmittedEpisodes(started=started, episodes=episodes, sampling=sampling, playing=playing)

    def collect(self, submitted: Submitted) -> Sampled:
        """Play them to their ends. Raises RewardError when too many fail, in the environment or at their reward."""
        assert isinstance(submitted, SubmittedEpisodes)
        if (playing := submitted.playing) is None:
            played = self._play(submitted.episodes, submitted.sampling)
        else:
            while not playing.done():  # in short waits, because a signal cannot interrupt a long one
                wait_briefly(playing)
            played = playing.result()
        for episode in submitted.episodes:
            self.environment.count(episode.sample_id, episode.failure)
        began = time.monotonic()
        rollouts = self._scored(submitted.episodes)
        return Sampled(
            rollouts=rollouts,
            generate_s=played.at - submitted.started - played.environment_s,
            reward_s=time.monotonic() - began,
            environment_s=played.environment_s,
            num_prompts=len({episode.group_id for episode in submitted.episodes}),
            num_tokens=tokens_of(rollouts),
        )

    def _play_aside(self, playing: Future[Played], episodes: Sequence[Episode], sampling: SamplingSpec) -> None:
        """A thread."""
        try:
            playing.set_result(self._play(episodes, sampling))
        except Exception as error:  # raised again where the episodes are collected
            playing.set_exception(error)

    def _play(self, episodes: Sequence[Episode], sampling: SamplingSpec) -> Played:
        """All to their ends. Where engines take samples one by one, each goes on as soon as its own turn is answered; else they
        take their turns together, so that timing changes nothing."""
        places = {episode.sample_id: place for place, episode in enumerate(episodes)}
        environment_s = 0.0
        with self.environment.calls() as calls:
            play = Play(waiting=deque(episodes), calls=calls, sampling=sampling)
            for _ in range(min(len(episodes), self.settings.max_episodes_at_once)):
                self._begin(play)
            while calls or play.waves:
                began, is_alone = time.monotonic(), not play.waves
                if calls:
                    calls.poll(math.inf if is_alone else PATIENCE_S)
                if is_alone:
                    environment_s += time.monotonic() - began
                if calls and not self.engines.takes_singly:
                    continue
                play.ready.sort(key=lambda episode: places[episode.sample_id])  # and not as they were answered
                play.waves += self._ask(play.ready, sampling)
                play.ready = []
                if play.waves and (not calls or play.has_heard):
                    for episode in self._hear(play.waves):
                        assert episode.worker is not None  # it has not failed
                        action = str(episode.transcript[-1]["content"])
                        calls.step(episode.worker, action, partial(self._answered, play, episode))
        return Played(time.monotonic(), environment_s)

    def _begin(self, play: Play) -> None:
        """The next of those that wait."""
        if play.waiting:
            episode = play.waiting.popleft()
            play.calls.begin(episode.prompt.columns, episode.world, partial(self._begun, play, episode))

    def _begun(self, play: Play, episode: Episode, start: tuple[EpisodeWorker, str] | Failure) -> None:
        if isinstance(start, Failure):
            episode.failure = start
        else:
            episode.worker, opening = start
            self._open(episode, opening)
        self._go_on(play, episode)

    def _answered(self, play: Play, episode: Episode, step: Step | Failure) -> None:
        self._follow(episode, step, play.sampling.max_tokens)
        self._go_on(play, episode)

    def _go_on(self, play: Play, episode: Episode) -> None:
        """To its next turn, or to its end, which is worth what its environment says where it was cut off."""
        if not episode.is_over:
            play.ready.append(episode)
        elif episode.worker is not None and episode.finish_reason is FinishReason.length and self.environment.scores_cut:
            play.calls.cut(episode.worker, partial(self._appraised, play, episode))
        else:
            self._end(play, episode)

    def _appraised(self, play: Play, episode: Episode, reward: float | Failure) -> None:
        if isinstance(reward, Failure):
            episode.worker, episode.failure = None, reward
        else:
            episode.earn(reward)
        self._end(play, episode)

    def _end(self, play: Play, episode: Episode) -> None:
        """There is room for another."""
        if episode.worker is not None:
            self._leave(episode)
        self._begin(play)

    def _open(self, episode: Episode, opening: str) -> None:
        """What the environment says at the start is part of the prompt: in chat, of its last message."""
        prompt = episode.prompt
        if not opening:
            return
        opening = self.history.defused(opening)
        if prompt.messages is None:
            text, ids, messages = prompt.text + opening, (*prompt.prompt_ids, *self.history.ids(opening)), None
        else:
            *before, last = prompt.messages
            messages = (*before, last | {"content": f"{last['content']}\n\n{opening}"})
            text = self.history.render(messages)
            ids = tuple(self.history.ids(text))
        episode.prompt, episode.rendered = replace(prompt, text=text, prompt_ids=ids, messages=messages), text
        episode.pieces = [Piece(prompt_ids=ids)]
        if len(ids) > self.max_prompt_tokens:
            too_long = f"reset() makes a prompt of {len(ids)} tokens, max_prompt_tokens={self.max_prompt_tokens}"
            self._leave(episode)
            episode.failure = Failure(status=RewardStatus.error, message=too_long)

    def _ask(self, episodes: Sequence[Episode], sampling: SamplingSpec) -> list[Wave]:
        """Start the next turn of each: in one wave, so that timing changes nothing, or where engines take samples one by one in
        a wave each, so that none waits for another."""
        if not episodes:
            return []
        waves = [[episode] for episode in episodes] if self.engines.takes_singly else [list(episodes)]
        return [(wave, self.engines.generate([self._request(each, sampling) for each in wave], sampling)) for wave in waves]

    def _request(self, episode: Episode, sampling: SamplingSpec) -> SampleRequest:
        piece = episode.now
        left = min(sampling.max_tokens - episode.num_tokens, self.max_model_tokens - episode.num_read)
        assert left > 0  # `_observe` saw to it
        sample = f"{episode.sample_id}/turn-{episode.num_turns}"
        return SampleRequest(
            sample_id=sample,
            prompt_ids=(*piece.prompt_ids, *piece.ids),
            seed=sample_seed(self.seed, sample),
            max_tokens=min(left, self.settings.max_turn_tokens or left),
        )

    def _hear(self, waves: list[Wave]) -> list[Episode]:
        """The episodes of the waves that come back first, which leave the list."""
        tickets = [generation for _, generation in waves if isinstance(generation, Ticket)]
        complete = first_complete(tickets) if tickets else [waves[0][1]]
        back = [wave for wave in waves if any(wave[1] is each for each in complete)]
        waves[:] = [wave for wave in waves if not any(wave[1] is each for each in complete)]
        for episodes, generation in back:
            for episode, completion in zip(episodes, generation.result(), strict=True):
                episode.hear(completion, self.history.text(completion.response_ids.tolist()))
        return [episode for episodes, _ in back for episode in episodes]

    def _follow(self, episode: Episode, step: Step | Failure, max_tokens: int) -> None:
        """What an answer makes of the episode: its end, or tokens that the policy reads before its next turn."""
        if isinstance(step, Failure):
            episode.worker, episode.failure = None, step
            return
        episode.earn(step.reward)
        if step.done:
            episode.finish_reason = FinishReason.stop
        elif episode.num_turns == self.settings.max_turns or episode.num_tokens >= max_tokens:
            episode.finish_reason = FinishReason.length
        else:
            self._observe(episode, step.observation, max_tokens)

    def _observe(self, episode: Episode, observation: str, max_tokens: int) -> None:
        text, is_cut = self.history.cut(observation, self.settings.max_observation_tokens)
        behind = self.history.behind(text, messages=episode.messages, rendered=episode.rendered, last_id=episode.now.ids[-1])
        num_told = behind.num_told if behind.forks else len(behind.ids)
        num_read = len(behind.ids) + (0 if behind.forks else episode.num_read)
        # Not a token would be left for the turn, of all turns' budget or of the model's context.
        if episode.num_tokens + num_told >= max_tokens or num_read >= self.max_model_tokens:
            episode.finish_reason = FinishReason.length
        else:
            episode.tell(behind, text, role=self.settings.observation_role.value, is_cut=is_cut)

    def _leave(self, episode: Episode) -> None:
        assert episode.worker is not None  # it is over once
        self.environment.end(episode.worker)
        episode.worker = None

    def _scored(self, episodes: Sequence[Episode]) -> list[Rollout]:
        """A failure of the environment takes the place of a reward."""
        whole = [episode for episode in episodes if episode.failure is None]
        results = self._judged(
            [
                RewardItem(
                    sample_id=episode.sample_id,
                    group_id=episode.group_id,
                    prompt=episode.prompt.text,
                    completion=episode.answer,
                    columns=episode.prompt.columns | {TRANSCRIPT: episode.transcript},
                    completion_ids=[token for piece in episode.pieces for token in piece.own_ids],
                    messages=episode.prompt.messages,
                    source=episode.prompt.source,
                    turns=[{"role": each["role"], "content": each["content"]} for each in episode.transcript],
                )
                for episode in whole
            ]
        )
        by_id = {result.sample_id: result for result in results}
        for episode in episodes:
            if (failure := episode.failure) is not None:
                by_id[episode.sample_id] = RewardResult(sample_id=episode.sample_id, status=failure.status, message=failure.message)
        named = {"has_outcome": self.has_outcome, "earns": not isinstance(self.settings, ToolEnvironment)}
        return [episode.rollout(by_id[episode.sample_id], **named) for episode in episodes]


def open_environment(config: RunConfig, *, base_dir: Path) -> AbstractContextManager[EnvironmentPool | None]:
    """The run's environment, with its processes; None where there is but one turn. Raises ConfigError or ResourceError."""
    if not isinstance(config.environment, MultiTurn):
        return nullcontext(None)
    num_episodes, num_batches = most_episodes(config, config.environment), 1 + config.max_staleness
    return EnvironmentPool(config.environment, base_dir=base_dir, num_episodes=num_episodes, num_batches=num_batches)


def most_episodes(config: RunConfig, settings: MultiTurn) -> int:
    """That can be under way at once: of the batches sampled ahead, and of one that is waited for, of whatever kind."""
    limit = settings.max_episodes_at_once
    waited_for = [config.samples_per_step]
    if isinstance(held_out := config.evaluation, HeldOut):
        waited_for.append(held_out.num_prompts * held_out.samples_per_prompt)
    if isinstance(config.rehearsal, BaseAnswers):
        waited_for.append(limit)
    return config.max_staleness * min(limit, config.samples_per_step) + min(limit, max(waited_for))


def read_prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, rewards: Rewards, environment: EnvironmentPool | None
) -> PromptSet:
    """The run's data, held against what reward and environment make of it. Raises DataError or ConfigError."""
    limit = config.max_prompt_tokens
    if environment is None:
        return load_prompts(config.data, tokenizer, max_prompt_tokens=limit, missing=rewards.missing)
    settings = config.environment
    assert isinstance(settings, MultiTurn)

    def missing(source: str, columns: Any) -> str | None:
        if TRANSCRIPT in columns:
            raise ConfigError(f"data: a column may not be called {TRANSCRIPT}: the environment adds one. Map it with data.columns.")
        return rewards.missing(source, {**columns, TRANSCRIPT: None})

    prompts = load_prompts(config.data, tokenizer, max_prompt_tokens=limit, missing=missing, tools=environment.tools)
    if any(prompt.messages is not None for prompt in prompts.train):
        History(tokenizer, role=settings.observation_role.value).check()
    elif isinstance(settings, ToolEnvironment) and settings.call_format is CallFormat.hermes:
        raise ConfigError(
            "environment.call_format=hermes: it is a format of chat, and these prompts are plain text. Write data.chat=true, or "
            "environment.call_format=bare."
        )
    for prompt in {prompt.source: prompt for prompt in reversed(prompts.train)}.values():
        [start] = environment.begin([(prompt.columns, 0)])
        if isinstance(start, Failure):
            raise ConfigError(
                f"{environment.name}: reset() of the row {prompt.id} failed: {start.message}. Its columns are "
                f"{', '.join(prompt.columns)}."
            )
        environment.end(start[0])
    return prompts


def make_sampler(
    config: RunConfig,
    engines: Engines,
    rewards: Rewards,
    tokenizer: PreTrainedTokenizerBase,
    environment: EnvironmentPool | None,
) -> Sampler:
    """What samples in this run."""
    if environment is None:
        return Sampler(engines=engines, rewards=rewards, tokenizer=tokenizer, seed=config.seed)
    settings = config.environment
    assert isinstance(settings, MultiTurn)
    return EpisodeSampler(
        engines=engines,
        rewards=rewards,
        tokenizer=tokenizer,
        seed=config.seed,
        environment=environment,
        settings=settings,
        history=History(tokenizer, role=settings.observation_role.value, tools=environment.tools),
        max_prompt_tokens=config.max_prompt_tokens,
        max_model_tokens=config.max_model_tokens,
        has_outcome=not isinstance(config.reward, EnvironmentReward),
    )
