"""What a run will do, worked out from its settings: for `dry_run=true`."""

from __future__ import annotations

from rlkit.config import RunConfig, choice_of, to_yaml
from rlkit.core.references import MovingReference
from rlkit.settings import Dtype, HeldOut, MultiTurn, RewardSettings

MIB = 2**20
BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}
LEARNER_BYTES = 16  # of one parameter: float32 weight, gradient and AdamW's two moments


def schedule(
    config: RunConfig,
    num_parameters: int,
    num_adapter_parameters: int = 0,
    num_reference_parameters: int = 0,
    num_reward_parameters: int = 0,
) -> str:
    """Prompts, samples, tokens, updates, workers and their memory in a few lines, then every setting as YAML.

    `num_adapter_parameters`: where it is not 0, they are all that is trained, and the model is frozen.
    `num_reference_parameters`: of the models that a reference holds; where it is 0, as the policy's.
    `num_reward_parameters`: of the reward models.
    """
    facts = [
        ("policy", f"{config.model.path}, {config.model.dtype.name}"),
        ("each step", _step(config)),
        ("update", _update(config)),
        ("whole run", _run(config)),
        ("evaluation", _evaluation(config)),
        ("workers", _workers(config)),
        ("memory", _memory(config, num_parameters, num_adapter_parameters, num_reference_parameters, num_reward_parameters)),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {text}" for name, text in facts]
    return "\n".join([config.experiment_name, *(f"  {line}" for line in lines), "", to_yaml(config)])


def _step(config: RunConfig) -> str:
    samples, tokens = config.samples_per_step, config.samples_per_step * config.max_model_tokens
    return (
        f"{config.prompts_per_step:,} prompts x {config.group_size:,} responses = {samples:,} samples, "
        f"at most {config.max_prompt_tokens:,} + {config.max_response_tokens:,} tokens each: {tokens:,} tokens"
    )


def _update(config: RunConfig) -> str:
    parts, epochs = config.optimizer_steps_per_batch, config.epochs_per_batch
    prompts = config.prompts_per_step // parts
    what = _count(config.optimizer_steps_per_step, "optimiser step")
    of = "the whole batch"
    if parts * epochs > 1:
        of = f"{_count(parts, 'mini-batch', 'mini-batches')} of {_count(prompts, 'prompt')}, {_count(epochs, 'epoch')}"
    return f"{what} per batch ({of}), micro-batches of at most {config.learner.tokens_per_microbatch:,} tokens"


def _run(config: RunConfig) -> str:
    steps = config.num_steps
    checkpoints = f"every {_count(config.checkpoint_every, 'step')} and at the end" if config.checkpoint_every else "at the end"
    return (
        f"{_count(steps, 'step')}, {steps * config.samples_per_step:,} samples, "
        f"{_count(steps * config.optimizer_steps_per_step, 'optimiser step')}; checkpoints {checkpoints}"
    )


def _evaluation(config: RunConfig) -> str:
    settings = config.evaluation
    if not isinstance(settings, HeldOut):
        return "none"
    often = f", and every {_count(settings.every, 'step')}" if settings.every else ""
    return f"{settings.num_prompts:,} held-out prompts x {settings.samples_per_prompt} samples, before and after{often}"


def _workers(config: RunConfig) -> str:
    workers = [
        f"{_count(config.rollout.num_engines, 'engine')} ({choice_of('rollout', config.rollout)})",
        _count(config.learner.num_ranks, "learner rank"),
    ]
    if isinstance(config.reward, RewardSettings):
        num_processes = config.reward.num_workers * len(config.reward.functions)
        workers.append(_count(num_processes, "reward process", "reward processes"))
    if config.reward.model_paths:
        workers.append(_count(len(config.reward.model_paths), "reward model"))
    if isinstance(config.environment, MultiTurn):
        at_once = min(config.environment.max_episodes_at_once, config.samples_per_step)
        workers.append(f"up to {_count(at_once, 'environment process', 'environment processes')}")
    if "ref_logprobs" in config.needs:
        workers.append("1 reference")
    return f"{', '.join(workers)}; cluster={choice_of('cluster', config.cluster)}, placement={config.placement.name}"


def _memory(
    config: RunConfig,
    num_parameters: int,
    num_adapter_parameters: int,
    num_reference_parameters: int,
    num_reward_parameters: int,
) -> str:
    """Of each worker, without activations, whose size depends on the model's code."""
    ranks, dtype = config.learner.num_ranks, config.model.dtype
    weights = num_parameters * BYTES[dtype]
    copy = weights if dtype is not Dtype.float32 else 0  # in the compute precision, gathered for a forward pass
    trained, frozen = (num_adapter_parameters, weights) if num_adapter_parameters else (num_parameters, 0)
    learner = (trained * LEARNER_BYTES + frozen) / ranks + copy + config.learner.head_memory_mib * MIB
    cache = getattr(config.rollout, "kv_cache_mib", 0) * MIB
    parts = [f"{_mib(weights + cache)} per engine", f"{_mib(learner)} and activations per learner rank"]
    if "ref_logprobs" in config.needs:
        parts.append(f"{_mib(_reference(config, num_reference_parameters or num_parameters))} for the reference")
    if num_reward_parameters:
        each = BYTES[getattr(config.reward, "dtype", Dtype.float32)]
        parts.append(f"{_mib(num_reward_parameters * each)} for reward models")
    adapters = f", and {num_adapter_parameters / 1e6:,.2f} M of adapters" if num_adapter_parameters else ""
    return f"about {', '.join(parts)} ({num_parameters / 1e6:,.1f} M parameters{adapters})"


def _reference(config: RunConfig, num_parameters: int) -> float:
    """Bytes: its weights; where it moves and computes in less than float32, those in float32; and what its rule remembers."""
    dtype, each = config.model.dtype, BYTES[config.model.dtype]
    if isinstance(config.reference, MovingReference):
        exact = BYTES[Dtype.float32]
        each += (0 if dtype is Dtype.float32 else exact) + (exact if config.reference.has_average else 0)
    return num_parameters * each + config.learner.head_memory_mib * MIB


def _mib(size: float) -> str:
    return f"{size / MIB:,.0f} MiB"


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
