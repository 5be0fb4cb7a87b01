"""What is wrong between the groups of a run, which no group can see by itself: one sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rlkit.config import GROUP_BASELINES, RunConfig, choice_of, suggest
from rlkit.core.anchors import NoAnchor
from rlkit.core.control import Fixed
from rlkit.core.divergences import (
    Divergence,
    NoDivergence,
    Penalty,
)
from rlkit.core.estimators import Place
from rlkit.core.ratios import (
    DivergenceRejection,
    MismatchCorrection,
    Rejection,
)
from rlkit.core.recap import ApplyTo
from rlkit.core.replay import BufferReplay, StoredReplay
from rlkit.core.safe import KLMode, KLPenalty
from rlkit.core.selectors import ClipCov, KLCov
from rlkit.errors import ConfigError
from rlkit.resources import reward_fns_dir
from rlkit.settings import (
    AsyncVllmEngine,
    EnvironmentReward,
    HeldOut,
    InProcess,
    JsonlData,
    LoraLearner,
    MixtureData,
    MultiTurn,
    ParquetData,
    Placement,
    PythonEnvironment,
    SingleTurn,
    ToolEnvironment,
    VerifiersData,
    VerifiersEnvironment,
    VllmEngine,
    WeightedRewards,
    WeightTransport,
)


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong between groups, and in the settings that belong to none. One sentence each: key=value, why, what to write."""
    for key in (
        "num_steps",
        "prompts_per_step",
        "group_size",
        "optimizer_steps_per_batch",
        "epochs_per_batch",
        "max_prompt_tokens",
        "max_response_tokens",
        "keep_checkpoints",
    ):
        if (value := getattr(config, key)) < 1:
            yield f"{key}={value}: write 1 or more."
    if config.max_staleness < 0:
        yield f"max_staleness={config.max_staleness}: write 0 (sample, then learn) or a number of steps; 1 is usual."
    if config.checkpoint_every < 0:
        yield f"checkpoint_every={config.checkpoint_every}: write a number of steps, or 0 for one checkpoint at the end."
    if not 0 <= config.seed < 2**32:
        yield f"seed={config.seed}: write a number from 0 to 4294967295."
    yield from _batch_problems(config)
    yield from _source_problems(config)
    yield from _worker_problems(config)


def _batch_problems(config: RunConfig) -> Iterator[str]:
    advantage = choice_of("advantage", config.advantage)
    if config.group_size == 1 and advantage in GROUP_BASELINES:
        yield (
            f"group_size=1: advantage={advantage} compares the responses to one prompt with each other, and one response has "
            "an advantage of 0. Write 2 or more; 8 or 16 is usual."
        )
    if config.max_staleness > 0 and (name := choice_of("prompt_filter", config.prompt_filter)) != "none":
        yield (
            f"prompt_filter={name}: how many prompts a step draws is known only after it, and max_staleness={config.max_staleness} "
            "starts the next one before. Write max_staleness=0 or prompt_filter=none."
        )
    if config.max_staleness > 0 and (name := choice_of("curriculum", config.curriculum)) != "none":
        yield (
            f"curriculum={name}: which prompts a step draws follows from the step before, and max_staleness={config.max_staleness} "
            "starts it without that. Write max_staleness=0 or curriculum=none."
        )
    yield from _component_problems(config)
    yield from _tempering_problems(config)
    yield from _selector_problems(config)
    yield from _divergence_problems(config)
    yield from _control_problems(config)
    yield from _replay_problems(config)
    yield from _reference_problems(config)
    critic = choice_of("critic", config.critic)
    if "values" in config.advantage.needs and critic == "none":
        yield f"critic=none: advantage={advantage} is computed from a critic's values. Write critic=value_model."
    if "values" in config.critic.needs and "values" not in config.advantage.needs:
        yield f"critic={critic}: advantage={advantage} never reads its values. Write advantage=gae, or critic=none."
    allowed = config.objective.aggregations
    if allowed is not None and config.aggregation.name not in allowed:
        yield (
            f"aggregation={config.aggregation.name}: objective={choice_of('objective', config.objective)} has one ratio per "
            f"response, and its loss is a mean over responses. Write aggregation={sorted(allowed)[0]}."
        )
    prompts, parts = config.prompts_per_step, config.optimizer_steps_per_batch
    if prompts >= 1 and parts >= 1 and prompts % parts:
        fitting = max(n for n in range(1, prompts + 1) if prompts % n == 0 and n <= parts)
        yield (
            f"optimizer_steps_per_batch={parts}: prompts_per_step={prompts} cannot be cut into {parts} equal mini-batches. "
            f"Write optimizer_steps_per_batch={fitting} or prompts_per_step={-(-prompts // parts) * parts}."
        )
    estimator = _on_policy_estimator(config.divergence)
    if estimator and config.optimizer_steps_per_step > 1:
        yield (
            f"divergence.estimator={estimator}: its gradient is right only for the first optimiser step on a batch, and there are "
            f"{config.optimizer_steps_per_step} (optimizer_steps_per_batch={parts}, epochs_per_batch={config.epochs_per_batch}). "
            "Write divergence.estimator=k3_weighted, score or exact, or take one optimiser step per batch."
        )
    if estimator and config.max_staleness > 0:
        yield (
            f"divergence.estimator={estimator}: its gradient is right only for samples of the present policy, and "
            f"max_staleness={config.max_staleness} trains on older ones. Write divergence.estimator=k3_weighted or exact, or "
            "max_staleness=0."
        )
    if config.optimizer.warmup_steps >= (total := config.num_steps * config.optimizer_steps_per_step) > 0:
        yield (
            f"optimizer.warmup_steps={config.optimizer.warmup_steps}: the run has only {total} optimiser steps, so the learning "
            "rate never arrives. Write a smaller number."
        )


def _on_policy_estimator(divergence: Divergence) -> str:
    """The estimator's name if its gradient is right under samples of the present policy alone; else empty."""
    if isinstance(divergence, Penalty) and divergence.verdict.is_right and divergence.verdict.on_policy:
        return divergence.estimator.name
    return ""


def _selector_problems(config: RunConfig) -> Iterator[str]:
    objective = choice_of("objective", config.objective)
    if config.objective.is_sequence_level:
        for group in ("selector", "token_filter", "token_weight"):
            if (chosen := choice_of(group, getattr(config, group))) != "none":
                yield (
                    f"{group}={chosen}: it tells tokens apart, and objective={objective} has one ratio for a whole response. "
                    f"Write objective=clipped, or {group}=none."
                )
    elif isinstance(config.selector, KLCov) and objective != "unclipped":
        yield f"selector=kl_cov: its pull takes a clip's place, and objective={objective} has one. Write objective=unclipped."
    elif isinstance(config.selector, ClipCov) and config.selector.exclude_clipped and not config.objective.clips:
        yield (
            f"selector.exclude_clipped=true: objective={objective} clips no token's gradient. Write selector.exclude_clipped=false."
        )


def _component_problems(config: RunConfig) -> Iterator[str]:
    """Advantages from the reward's parts do not see what is done to their sum."""
    if "reward_components" not in config.advantage.needs:
        return
    advantage = choice_of("advantage", config.advantage)
    if (shaping := choice_of("shaping", config.shaping)) != "none":
        yield (
            f"shaping={shaping}: advantage={advantage} learns from the parts of the reward, and what it adds to their sum is none. "
            "Write shaping=none, with a function of the length in reward.fns, or advantage=grpo."
        )
    if getattr(config.objective_weights, "apply_to", None) is ApplyTo.reward:
        yield (
            f"objective_weights.apply_to=reward: advantage={advantage} normalises each part of the reward, which undoes it. Write "
            "objective_weights.apply_to=advantage or loss, or advantage=grpo."
        )


LONE_BASELINES = ("grpo", "dr_grpo", "rloo")  # of CHOICES["advantage"]: a group's advantages depend on no other group


def _tempering_problems(config: RunConfig) -> Iterator[str]:
    """Tempered samples are groups beside the batch's own, and must change nothing about those."""
    if not (tempering := config.tempering).needs:
        return
    if config.max_staleness > 0:
        yield (
            f"tempering=aepo: its temperature follows from the step before, and max_staleness={config.max_staleness} samples ahead "
            "of it. Write max_staleness=0 or tempering=none."
        )
    if not tempering.num_prompts(config.prompts_per_step):
        if "tempered_rollouts" in tempering.needs:
            yield (
                f"prompts_per_step={config.prompts_per_step}: tempering.prompt_fraction of it is less than one prompt. Write more "
                "prompts, or a larger tempering.prompt_fraction."
            )
        return
    if (advantage := choice_of("advantage", config.advantage)) not in LONE_BASELINES:
        yield (
            f"tempering=aepo: its samples are groups of their own, and advantage={advantage} looks across groups. Write "
            f"advantage={' or '.join(LONE_BASELINES)}, or tempering.use=dcpo."
        )
    for group in ("prompt_advantage", "token_filter", "safeguard"):
        if (chosen := choice_of(group, getattr(config, group))) != "none":
            yield (
                f"{group}={chosen}: it looks at all responses of a batch, and tempering=aepo adds some of another temperature. "
                f"Write {group}=none, or tempering.use=dcpo."
            )


def _divergence_problems(config: RunConfig) -> Iterator[str]:
    """What acts on the divergence term needs one."""
    is_none = isinstance(config.divergence, NoDivergence)
    for group in ("divergence_weights", "safeguard"):
        if is_none and (chosen := choice_of(group, getattr(config, group))) != "none":
            yield f"{group}={chosen}: there is no divergence for it to act on. Write divergence=reverse_kl, or {group}=none."
    yield from _reward_place_problems(config)
    if isinstance(config.safeguard, KLPenalty) and config.safeguard.kl_mode is KLMode.direct:
        yield (
            "safeguard.kl_mode=direct: it needs the KL of a whole optimiser step at once, and a step is computed in microbatches. "
            "Write safeguard.kl_mode=linearised, which has the same gradient at the measured KL."
        )


def _reference_problems(config: RunConfig) -> Iterator[str]:
    """A reference is kept for what compares with it. What its models must share, `data/models/reference.py` looks at."""
    reference = choice_of("reference", config.reference)
    if reference != "initial" and "ref_logprobs" not in config.needs:
        yield (
            f"reference={reference}: nothing that is chosen compares the policy with a reference. Write divergence=reverse_kl, or "
            "reference=initial."
        )
    if not isinstance(config.anchor, NoAnchor):
        yield from _anchor_problems(config)


def _anchor_problems(config: RunConfig) -> Iterator[str]:
    """The old policy is an anchor while it is another than the one that learns, and known."""
    anchor = choice_of("anchor", config.anchor)
    if config.optimizer_steps_per_step == 1:
        yield (
            f"anchor={anchor}: with one optimiser step per batch the policy is the old one wherever the two are compared, and "
            "nothing pulls. Write optimizer_steps_per_batch=2 or more, or anchor=none."
        )
    if config.compares_with_sampler or config.max_staleness > 0:
        yield (
            f"anchor={anchor}: it holds to the policy before the update, and max_staleness={config.max_staleness} with correction="
            f"{choice_of('correction', config.correction)} learns from samples of another. Write max_staleness=0 and "
            "correction=none, or anchor=none."
        )


def _replay_problems(config: RunConfig) -> Iterator[str]:
    """Replayed tokens come from older policies: what learns from them must weigh them by their ratio."""
    replay = config.replay
    if not isinstance(replay, StoredReplay):
        return
    name, correction = choice_of("replay", replay), choice_of("correction", config.correction)
    if isinstance(config.correction, Rejection | DivergenceRejection):
        yield (
            f"correction={correction}: the tokens it keeps weigh 1, however old the policy that sampled them, and replay={name} "
            "trains on such. Write correction=decoupled_ppo or tis, or correction=none for a ratio to the policy that sampled."
        )
    elif not isinstance(config.correction, MismatchCorrection) and "old_logprobs" not in config.objective.needs:
        yield (
            f"objective={choice_of('objective', config.objective)}: it has no ratio to the policy that sampled, and replay={name} "
            "trains on samples of older ones. Write objective=clipped, or correction=tis."
        )
    if estimator := _on_policy_estimator(config.divergence):
        yield (
            f"divergence.estimator={estimator}: its gradient is right only for samples of the present policy, "
            f"and replay={name} trains on older ones. Write divergence.estimator=k3_weighted or exact, or replay=none."
        )
    if (tempering := choice_of("tempering", config.tempering)) != "none":
        yield (
            f"tempering={tempering}: the entropy that it holds is measured on the whole batch, and replay={name} adds samples of "
            "older policies. Write tempering=none or replay=none."
        )
    if 1 <= replay.max_uses <= config.epochs_per_batch:
        yield (
            f"replay.max_uses={replay.max_uses}: a fresh response is trained on epochs_per_batch={config.epochs_per_batch} times, "
            f"so nothing is ever replayed. Write replay.max_uses={2 * config.epochs_per_batch} or more."
        )
    if replay.replaces:
        yield from _replacement_problems(config, name)
    elif (
        isinstance(replay, BufferReplay)
        and 0 < replay.fraction < 1
        and not replay.num_groups(num_fresh=config.prompts_per_step, num_flat=0)
    ):
        yield (
            f"prompts_per_step={config.prompts_per_step}: replay.fraction adds less than one group to so few. Write more prompts, "
            "or a larger replay.fraction."
        )


def _replacement_problems(config: RunConfig, name: str) -> Iterator[str]:
    """Stored groups in the place of fresh ones that teach nothing."""
    if (advantage := choice_of("advantage", config.advantage)) not in LONE_BASELINES:
        yield (
            f"replay={name}: advantage={advantage} learns from groups whose rewards are all equal, or counts them in those of the "
            f"others. Write advantage={' or '.join(LONE_BASELINES)}, or replay=buffer."
        )
    if choice_of("objective", config.objective) == "unclipped":
        yield f"objective=unclipped: replay={name} trains on the same groups for long, and needs a bound. Write objective=clipped."
    if (prompt_filter := choice_of("prompt_filter", config.prompt_filter)) != "none":
        yield (
            f"prompt_filter={prompt_filter}: it leaves no group whose rewards are all equal, and replay={name} replaces such. "
            "Write prompt_filter=none or replay=none."
        )
    for group in ("prompt_advantage", "safeguard"):
        if (chosen := choice_of(group, getattr(config, group))) != "none":
            yield (
                f"{group}={chosen}: it also looks at the groups whose rewards are all equal, and replay={name} takes them out of "
                f"the batch. Write {group}=none or replay=buffer."
            )


def _reward_place_problems(config: RunConfig) -> Iterator[str]:
    """A divergence in the advantages gives every token one of its own."""
    if not isinstance(config.divergence, Penalty) or config.divergence.place is Place.loss:
        return
    place = f"divergence.place={config.divergence.place.name}"
    if config.divergence.place is Place.token_reward and config.objective.is_sequence_level:
        yield (
            f"{place}: it tells tokens apart, and objective={choice_of('objective', config.objective)} has one ratio for a whole "
            "response. Write divergence.place=sequence_reward or loss."
        )
    for group in ("tempering", "prompt_advantage"):
        if (chosen := choice_of(group, getattr(config, group))) != "none":
            yield f"{place}: {group}={chosen} works on one advantage per response. Write divergence.place=loss, or {group}=none."
    if config.divergence.place is Place.target:
        if config.trains_on_stale:
            yield (
                f"{place}: it weighs responses as samples of the present policy, and replay or max_staleness brings older "
                "ones. Write replay=none and max_staleness=0."
            )
        if config.group_size == 1:
            yield f"group_size=1: {place} estimates each prompt's target from its other responses. Write 2 or more; 16 is usual."
        for group in ("advantage_weights", "divergence_weights", "safeguard"):
            if (chosen := choice_of(group, getattr(config, group))) != "none":
                yield f"{place}: {group}={chosen} never acts, because the target takes the advantages' place. Write {group}=none."


def _control_problems(config: RunConfig) -> Iterator[str]:
    """A controller needs something to move that acts, and must keep to what could be set in its place."""
    tempered = config.tempering.num_prompts(config.prompts_per_step) * config.group_size
    num_sequences = -(-(config.samples_per_step + tempered) // max(config.optimizer_steps_per_batch, 1))  # at most, in one step
    for term, moved in config.controlled.items():
        if isinstance(moved.control, Fixed) or not _takes(moved.control):
            continue
        choice, (group, _, name) = choice_of(moved.group, moved.control), moved.key.partition(".")
        owner = getattr(config, group)
        if moved.start is None:
            instead = {
                "entropy": (
                    f"entropy=bonus, divergence_control={choice} for a divergence, threshold_control={choice} for a clip threshold"
                ),
                "divergence": "divergence=reverse_kl",
                "threshold": "objective=clipped",
            }[term]
            yield (
                f"{moved.group}={choice}: {group}={choice_of(group, owner)} has no {name} for it to move. Write {instead}, or "
                f"{moved.group}=fixed."
            )
            continue
        if term == "threshold" and config.optimizer_steps_per_step == 1 and not config.compares_with_sampler:
            yield (
                f"threshold_control={choice}: with one optimiser step on each batch every ratio is 1, and no threshold acts. Write "
                "optimizer_steps_per_batch=2, or threshold_control=fixed."
            )
        try:
            moved.control.check(coef=moved.start, num_sequences=num_sequences)
        except ConfigError as error:
            yield with_keys(str(error), moved.group, moved.control, coef=moved.key)
            continue
        lowest = moved.control.lowest(moved.start)
        if _takes(owner) and not _takes(owner, **{name: lowest}):
            yield (
                f"{moved.group}={choice}: it may go down to {moved.key}={lowest:g}, which is refused. Write settings that keep it "
                f"higher, such as {moved.group}.low, or choose another controller."
            )


def _takes(settings: Any, **changes: float) -> bool:
    """Whether a choice's own check passes, with `changes` of its settings."""
    try:
        replace(settings, **changes)
    except ConfigError:
        return False
    return True


def _source_problems(config: RunConfig) -> Iterator[str]:
    data = config.data
    for key in ("path", "held_out_path"):
        value = getattr(data, key, None)
        if value and isinstance(data, JsonlData | ParquetData) and not Path(value).expanduser().is_file():
            yield f"data.{key}={value}: no such file (looked from {Path.cwd()}). Check its spelling."
    if isinstance(data, MixtureData):
        for name, path in (data.files or {}).items():
            if not Path(path).expanduser().is_file():
                yield f"data.files.{name}={path}: no such file (looked from {Path.cwd()}). Check its spelling."
    separate = getattr(data, "held_out_path", None) or getattr(data, "held_out_split", None)
    if isinstance(config.evaluation, HeldOut) and data.held_out_fraction == 0 and not separate:
        yield "data.held_out_fraction=0: evaluation=held_out has no prompts. Write data.held_out_fraction=0.1 or evaluation=none."
    for part, name in config.reward.functions.items():
        key = f"reward.fns.{part}" if part else "reward.fn"
        yield from _function_problems(key, name)
    yield from _environment_problems(config)


def _environment_problems(config: RunConfig) -> Iterator[str]:
    environment = config.environment
    if isinstance(environment, PythonEnvironment) and environment.env:
        yield from _place_problems("environment.env", environment.env, "MyEnvironment")
        if ":" not in environment.env:
            yield f"environment.env={environment.env}: write file.py:Class or package.module:Class."
    if isinstance(environment, VerifiersEnvironment):
        yield from _place_problems("environment.env_id", environment.env_id, "load_environment")
        data = config.data
        if not isinstance(data, VerifiersData) or (data.env_id, data.options) != (environment.env_id, environment.options):
            yield (
                "environment=verifiers: it plays the rows of its own data set. Write data=verifiers with the same env_id and "
                "options."
            )
    if isinstance(environment, ToolEnvironment):
        for tool in environment.tools:
            yield from _place_problems("environment.tools", tool, "my_tool")
    if isinstance(config.reward, EnvironmentReward) and isinstance(environment, SingleTurn | ToolEnvironment):
        yield (
            f"reward=environment: environment={choice_of('environment', environment)} gives no reward. Write reward=function with "
            "reward.fn=, or an environment that does."
        )
    earns = isinstance(environment, MultiTurn) and not isinstance(environment, ToolEnvironment)
    if earns and isinstance(config.reward, WeightedRewards):
        for key in ("fns", "models"):
            if "environment" in getattr(config.reward, key):
                yield f"reward.{key}.environment: it is the name of what the environment gives. Write another."


def _function_problems(key: str, name: str) -> Iterator[str]:
    yield from _place_problems(key, name, "my_function")
    if name and ":" not in name and name not in (known := reward_names()):
        yield (
            f"{key}={name}: no such function in reward_fns/.{suggest(name, known)} Write file.py:function, or one of "
            f"{', '.join(known)}."
        )


def _place_problems(key: str, name: str, example: str) -> Iterator[str]:
    """Of a name in a file or a module; of a name alone nothing is known here."""
    if ":" not in name:
        return
    file, _, member = name.rpartition(":")
    if file.endswith(".py") and not Path(file).expanduser().is_file():
        yield f"{key}={name}: there is no file {file} (looked from {Path.cwd()}). Check its spelling."
    if not member.isidentifier():
        yield f"{key}={name}: {member!r} is no name. Write {key}={file}:{example}."


def reward_names() -> list[str]:
    return sorted(path.stem for path in reward_fns_dir().glob("*.py") if not path.stem.startswith("_"))


def _worker_problems(config: RunConfig) -> Iterator[str]:
    learner, room = config.learner, config.max_model_tokens
    if 1 <= learner.tokens_per_microbatch < room:
        yield (
            f"learner.tokens_per_microbatch={learner.tokens_per_microbatch}: one response with its prompt can have {room} tokens "
            f"(max_prompt_tokens + max_response_tokens). Write {room} or more."
        )
    if config.placement is Placement.colocated:
        if config.max_staleness > 0:
            yield (
                f"cluster.placement=colocated: engines and learner take turns on the same devices, and max_staleness="
                f"{config.max_staleness} lets them work at the same time. Write max_staleness=0 or cluster.placement=separate."
            )
        if learner.num_ranks > config.rollout.num_devices:
            yield (
                f"learner.num_ranks={learner.num_ranks}: with cluster.placement=colocated ranks sit on the engines' devices, "
                f"which are {config.rollout.num_devices}. Write rollout.num_engines={learner.num_ranks} or "
                "cluster.placement=separate."
            )
    yield from _transport_problems(config)
    if isinstance(config.cluster, InProcess):
        why = "cluster=inprocess runs every worker in this process"
        if isinstance(config.rollout, VllmEngine):
            name = choice_of("rollout", config.rollout)
            yield f"rollout={name}: {why}, and vLLM needs one of its own. Write rollout=transformers or cluster=local."
        if learner.num_ranks > 1:
            yield f"learner.num_ranks={learner.num_ranks}: {why}, which is one rank. Write learner.num_ranks=1 or cluster=local."
        if config.rollout.num_engines > 1:
            yield (
                f"rollout.num_engines={config.rollout.num_engines}: {why}, one after the other. "
                "Write rollout.num_engines=1 or cluster=local."
            )


def _transport_problems(config: RunConfig) -> Iterator[str]:
    """Where weights can go from GPU to GPU. Whether there are GPUs, only the workers know."""
    rollout = config.rollout
    if not isinstance(rollout, VllmEngine):
        return
    key, ranks, devices = f"rollout.weight_transport={rollout.weight_transport.name}", config.learner.num_ranks, rollout.num_devices
    is_host, has_own_process = rollout.weight_transport is WeightTransport.host, isinstance(rollout, AsyncVllmEngine)
    if is_host and rollout.devices_per_engine > 1 and not has_own_process:
        yield (
            f"rollout.tensor_parallel_size={rollout.devices_per_engine}: with rollout=vllm weights go to the engine's actor, and "
            "its workers are other processes. Write rollout=vllm_async, or on GPUs rollout.weight_transport=nccl."
        )
    if has_own_process and not is_host:
        yield (
            f"{key}: with rollout=vllm_async weights go through shared memory. Write rollout.weight_transport=host, or "
            "rollout=vllm."
        )
    if isinstance(config.learner, LoraLearner) and not is_host:
        yield f"{key}: it sends parameters as they are, and learner=lora sends merged ones. Write rollout.weight_transport=host."
    match rollout.weight_transport, config.placement:
        case WeightTransport.nccl, Placement.colocated:
            yield (
                f"{key}: NCCL takes a device into a communicator once, and with cluster.placement=colocated learner and engine "
                "share it. Write rollout.weight_transport=ipc or host, or cluster.placement=separate."
            )
        case WeightTransport.ipc, Placement.separate:
            yield (
                f"{key}: it hands memory of a device to another process on the same device, and with cluster.placement=separate "
                "learner and engines have devices of their own. Write rollout.weight_transport=nccl or host, or "
                "cluster.placement=colocated."
            )
        case WeightTransport.ipc, Placement.colocated if ranks != devices:
            yield (
                f"{key}: every device of an engine needs a learner rank that hands it the weights; there are {devices} devices and "
                f"learner.num_ranks={ranks}. Write learner.num_ranks={devices} or rollout.weight_transport=host."
            )


def with_keys(sentence: str, group: str, settings: Any, **others: str) -> str:
    """What a controller says of its settings, with their full keys: it is chosen in several groups, and knows of none."""
    keys = {field.name: f"{group}.{field.name}" for field in fields(settings)} | others
    return re.sub(r"(?<![\w.])(\w+)=", lambda match: f"{keys.get(match[1], match[1])}=", sentence)
