"""Every setting of a run, and what can be chosen for it. Hydra composes them; past `load` nobody sees a DictConfig.

Strategies (objectives, divergences, ...) carry their own settings as dataclass fields in `rlkit/core/`, everything else in
`rlkit/settings.py`. `CHOICES` is the one table of what can be chosen: adding a method adds one line to it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlkit.core.advantages import (
    GAE,
    Advantage,
    ComponentNormalized,
    DecoupledGAE,
    GroupCentered,
    GroupNormalized,
    GroupPolicyGradient,
    LeaveOneOut,
    LengthAdaptiveGAE,
    Reinforce,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
)
from rlkit.core.aepo import Aepo, NoTempering, Tempering
from rlkit.core.anchors import Anchor, NoAnchor, OldPolicyAnchor
from rlkit.core.apo import DifficultyAdaptiveDivergence, NoResponseWeights, ResponseWeights, TrajectoryComplexity
from rlkit.core.control import Control, Controlled, Fixed
from rlkit.core.control import Schedule as ControlSchedule
from rlkit.core.copo import COPO, NoPromptAdvantage, PromptAdvantage
from rlkit.core.curriculum import Curriculum, NoCurriculum, PassRate
from rlkit.core.distill import NoTeacher, Teacher
from rlkit.core.divergences import (
    RAPO,
    Alpha,
    CauchySchwarz,
    ChiSquaredPolicyRef,
    ChiSquaredRefPolicy,
    Divergence,
    FDivergence,
    ForwardKL,
    GeneralizedJensenShannon,
    Jeffreys,
    JensenShannon,
    NoDivergence,
    Penalty,
    Renyi,
    ReverseKL,
    Sinkhorn,
    SquaredHellinger,
    TotalVariation,
)
from rlkit.core.entropy import EntropyBonus, EntropyTerm, Epo, NoEntropy, Siren
from rlkit.core.estimators import Place
from rlkit.core.feedback import PID, Doubling, DualAscent, LogDualAscent, LogPID, Proportional, Skywork
from rlkit.core.imitation import Imitation, NoImitation, PositiveExamples
from rlkit.core.loss import Strategy
from rlkit.core.objectives import CISPO, GMPO, GSPO, ClippedSurrogate, Objective, ScoreFunction, UnclippedSurrogate
from rlkit.core.ratios import (
    Bypass,
    Correction,
    DecoupledPPO,
    DivergenceRejection,
    IcePop,
    MaskedIS,
    MismatchCorrection,
    NoCorrection,
    Rejection,
    SequenceMaskedTIS,
    TruncatedIS,
)
from rlkit.core.recap import ApplyTo, NoObjectiveWeights, ObjectiveWeights, Recap, RecapCode
from rlkit.core.reduce import Aggregation
from rlkit.core.references import (
    BEMAReference,
    EMAReference,
    GeometricMixture,
    InitialReference,
    ModelReference,
    Reference,
    Refresh,
    SoftRefresh,
    Soup,
)
from rlkit.core.rehearsal import BaseAnswers, NoRehearsal, Rehearsal
from rlkit.core.replay import BufferReplay, NoReplay, Replay, StoredReplay, ZeroVarianceReplay
from rlkit.core.safe import Asymmetric, EntropyGated, KLMode, KLPenalty, NoSafeguard, Safeguard
from rlkit.core.selectors import ClipB, ClipCov, ClipV, KLCov, NoSelector, NoTokenFilter, Selector, TokenFilter
from rlkit.core.shaping import DynamicSampling, NoPromptFilter, NoShaping, OverlongPenalty, PromptFilter, Shaping
from rlkit.core.values import Critic, DoubleSoftMin, NoCritic, ValueModel
from rlkit.core.weights import HighEntropy, NoTokenWeight, Steer, TokenWeight
from rlkit.errors import ConfigError
from rlkit.resources import reward_fns_dir
from rlkit.settings import (
    AdamW,
    AsyncVllmEngine,
    ClusterSettings,
    ComparisonData,
    Data,
    Environment,
    EnvironmentReward,
    Evaluation,
    ExistingRay,
    ExpressionsData,
    FileTracking,
    GuessingData,
    GuessingGame,
    HeldOut,
    HuggingFaceData,
    InProcess,
    JsonlData,
    Learner,
    LocalRay,
    LoraLearner,
    MixtureData,
    Model,
    ModelReward,
    MultiTurn,
    NoEvaluation,
    Optimizer,
    ParquetData,
    Placement,
    PythonEnvironment,
    RaySettings,
    ReasoningGymData,
    Reward,
    RewardChoice,
    RolloutEngine,
    Sgd,
    SingleTurn,
    ToolEnvironment,
    Tracking,
    TransformersEngine,
    VerifiersData,
    VerifiersEnvironment,
    VllmEngine,
    WandbTracking,
    WeightedRewards,
    WeightTransport,
)
from rlkit.types import SamplingSpec


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run."""

    run_dir: str = ""  # empty: runs/<experiment_name>-<date and time>
    experiment_name: str = "run"
    dry_run: bool = False  # check everything, print what would run, and stop before any worker starts
    seed: int = 0
    num_steps: int = 100  # batches of rollouts
    prompts_per_step: int = 32
    group_size: int = 16  # responses per prompt
    optimizer_steps_per_batch: int = 1  # disjoint mini-batches of one batch of rollouts
    max_staleness: int = 0  # versions that a trained token's policy may be behind; above 0 generation and learning overlap
    epochs_per_batch: int = 1  # times that each mini-batch is trained on
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    checkpoint_every: int = 0  # steps; 0: only at the end
    keep_checkpoints: int = 3  # the newest ones; the best on held-out prompts stays as well
    mask_truncated: bool = False  # responses cut off by the token limit teach nothing (DAPO's overlong filtering)
    aggregation: Aggregation = Aggregation.seq_mean_token_mean  # of the per-token objective over one optimiser step

    model: Model = MISSING
    data: Data = MISSING
    reward: RewardChoice = MISSING
    shaping: Shaping = MISSING
    prompt_filter: PromptFilter = MISSING
    curriculum: Curriculum = MISSING
    environment: Environment = MISSING
    rollout: RolloutEngine = MISSING
    learner: Learner = MISSING
    optimizer: Optimizer = MISSING
    advantage: Advantage = MISSING
    advantage_weights: ResponseWeights = MISSING
    prompt_advantage: PromptAdvantage = MISSING
    objective: Objective = MISSING
    correction: Correction = MISSING
    critic: Critic = MISSING
    imitation: Imitation = MISSING
    rehearsal: Rehearsal = MISSING
    divergence: Divergence = MISSING
    divergence_weights: ResponseWeights = MISSING
    anchor: Anchor = MISSING
    safeguard: Safeguard = MISSING
    entropy: EntropyTerm = MISSING
    selector: Selector = MISSING
    tempering: Tempering = MISSING
    token_filter: TokenFilter = MISSING
    token_weight: TokenWeight = MISSING
    control: Control = MISSING  # of the entropy term's coefficient
    divergence_control: Control = MISSING  # of the divergence's coefficient
    threshold_control: Control = MISSING  # of the objective's upper clip threshold
    replay: Replay = MISSING
    objective_weights: ObjectiveWeights = MISSING
    reference: Reference = MISSING
    teacher: Teacher = MISSING
    evaluation: Evaluation = MISSING
    cluster: ClusterSettings = MISSING
    tracking: Tracking = MISSING

    @property
    def max_model_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def optimizer_steps_per_step(self) -> int:
        """Updates of the policy per batch of rollouts; above 1 the later ones are off-policy."""
        return self.optimizer_steps_per_batch * self.epochs_per_batch

    @property
    def placement(self) -> Placement:
        """Of engines and learner."""
        return self.cluster.placement if isinstance(self.cluster, RaySettings) else Placement.separate

    @property
    def strategy(self) -> Strategy:
        """The parts of the loss together."""
        return Strategy(
            objective=self.objective,
            selector=self.selector,
            token_weight=self.token_weight,
            tempering=self.tempering,
            correction=self.correction,
            divergence=self.divergence,
            entropy=self.entropy,
            imitation=self.imitation,
            rehearsal=self.rehearsal,
            critic=self.critic,
            anchor=self.anchor,
            aggregation=self.aggregation,
        )

    @property
    def needs(self) -> frozenset[str]:
        """What the chosen strategies must be given; what nobody needs is not computed, and its worker not started."""
        return self.strategy.needs | self.advantage.needs | self.token_filter.needs | self.safeguard.needs

    @property
    def measures_policy(self) -> bool:
        """Whether a batch of rollouts needs a forward pass of the present policy before it is trained on."""
        several = self.optimizer_steps_per_step > 1 and not self.compares_with_sampler
        return several or bool(self.needs & MEASURED)

    @property
    def compares_with_sampler(self) -> bool:
        """Whether old_logprobs are the engine's: the ratio is then to the policy that sampled, at whatever version."""
        return "rollout_as_old" in self.needs or (self.trains_on_stale and "proximal_logprobs" not in self.needs)

    @property
    def trains_on_stale(self) -> bool:
        """Whether some trained tokens may come from an older policy than the one that the update starts from."""
        return self.max_staleness > 0 or isinstance(self.replay, StoredReplay)

    @property
    def probes_divergence(self) -> bool:
        """Whether the sampled estimate of the divergence is held against the exact one now and then."""
        every = self.evaluation.every if isinstance(self.evaluation, HeldOut) else 0
        return every > 0 and isinstance(self.divergence, FDivergence) and not isinstance(self.reference, GeometricMixture)

    @property
    def compares_groups(self) -> bool:
        """Whether a response's advantage comes from the others to its prompt, and one alone teaches nothing."""
        return choice_of("advantage", self.advantage) in GROUP_BASELINES

    @property
    def controlled(self) -> dict[str, Controlled]:
        """What a controller can move, by the name that it is logged and checkpointed under."""
        return {
            "entropy": Controlled(
                group="control",
                control=self.control,
                key="entropy.coef",
                start=getattr(self.entropy, "coef", None),
                sign=1,
                measured="entropy/mean",
            ),
            "divergence": Controlled(
                group="divergence_control",
                control=self.divergence_control,
                key="divergence.coef",
                start=getattr(self.divergence, "coef", None),
                sign=-1,
                measured="kl/ref_token_mean",  # nats per token
            ),
            "threshold": Controlled(
                group="threshold_control",
                control=self.threshold_control,
                key="objective.clip_high",
                start=getattr(self.objective, "clip_high", None),
                sign=1,  # a wider bound lets unlikely tokens grow
                measured="entropy/mean",
            ),
        }

    def sampling(self, stop_token_ids: tuple[int, ...]) -> SamplingSpec:
        """How training responses are drawn."""
        rollout = self.rollout
        return SamplingSpec(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            max_tokens=self.max_response_tokens,
            stop_token_ids=stop_token_ids,
        )


CONTROLS: dict[str, type] = {
    "fixed": Fixed,
    "schedule": ControlSchedule,
    "proportional": Proportional,
    "doubling": Doubling,
    "skywork": Skywork,
    "pid": PID,
    "pid_log": LogPID,
    "dual": DualAscent,
    "dual_log": LogDualAscent,
}

# The only registry: group -> name -> dataclass. Further names come from YAML files in conf/<group>/, which hold differences only.
CHOICES: dict[str, dict[str, type]] = {
    "model": {"path": Model},
    "data": {
        "expressions": ExpressionsData,
        "comparison": ComparisonData,
        "guessing": GuessingData,
        "jsonl": JsonlData,
        "parquet": ParquetData,
        "mixture": MixtureData,
        "hf": HuggingFaceData,
        "reasoning_gym": ReasoningGymData,
        "verifiers": VerifiersData,
    },
    "reward": {"function": Reward, "weighted": WeightedRewards, "model": ModelReward, "environment": EnvironmentReward},
    "shaping": {"none": NoShaping, "overlong": OverlongPenalty},
    "prompt_filter": {"none": NoPromptFilter, "dynamic": DynamicSampling},
    "curriculum": {"none": NoCurriculum, "pass_rate": PassRate},
    "environment": {
        "single_turn": SingleTurn,
        "python": PythonEnvironment,
        "tools": ToolEnvironment,
        "verifiers": VerifiersEnvironment,
        "guessing_game": GuessingGame,
    },
    "rollout": {"vllm": VllmEngine, "vllm_async": AsyncVllmEngine, "transformers": TransformersEngine},
    "learner": {"fsdp": Learner, "lora": LoraLearner},
    "optimizer": {"adamw": AdamW, "sgd": Sgd},
    "advantage": {
        "grpo": GroupNormalized,
        "dr_grpo": GroupCentered,
        "rloo": LeaveOneOut,
        "gpg": GroupPolicyGradient,
        "gdpo": ComponentNormalized,
        "reinforce": Reinforce,
        "reinforce_pp": ReinforcePlusPlus,
        "reinforce_pp_baseline": ReinforcePlusPlusBaseline,
        "gae": GAE,
        "vc_ppo": DecoupledGAE,
        "vapo": LengthAdaptiveGAE,
    },
    "advantage_weights": {"none": NoResponseWeights, "stcr": TrajectoryComplexity},
    "prompt_advantage": {"none": NoPromptAdvantage, "copo": COPO},
    "objective": {
        "clipped": ClippedSurrogate,
        "unclipped": UnclippedSurrogate,
        "reinforce": ScoreFunction,
        "gspo": GSPO,
        "gmpo": GMPO,
        "cispo": CISPO,
    },
    "correction": {
        "none": NoCorrection,
        "bypass": Bypass,
        "tis": TruncatedIS,
        "masked_is": MaskedIS,
        "icepop": IcePop,
        "seq_mask_tis": SequenceMaskedTIS,
        "decoupled_ppo": DecoupledPPO,
        "rejection": Rejection,
        "divergence_rejection": DivergenceRejection,
    },
    "critic": {"none": NoCritic, "value_model": ValueModel, "double_softmin": DoubleSoftMin},
    "imitation": {"none": NoImitation, "positive": PositiveExamples},
    "rehearsal": {"none": NoRehearsal, "base_answers": BaseAnswers},
    "divergence": {
        "none": NoDivergence,
        "reverse_kl": ReverseKL,
        "forward_kl": ForwardKL,
        "rapo": RAPO,
        "jensen_shannon": JensenShannon,
        "generalized_js": GeneralizedJensenShannon,
        "alpha": Alpha,
        "total_variation": TotalVariation,
        "chi2_policy_ref": ChiSquaredPolicyRef,
        "chi2_ref_policy": ChiSquaredRefPolicy,
        "squared_hellinger": SquaredHellinger,
        "jeffreys": Jeffreys,
        "renyi": Renyi,
        "cauchy_schwarz": CauchySchwarz,
        "sinkhorn": Sinkhorn,
    },
    "divergence_weights": {"none": NoResponseWeights, "dads": DifficultyAdaptiveDivergence},
    "anchor": {"none": NoAnchor, "old_policy": OldPolicyAnchor},
    "safeguard": {"none": NoSafeguard, "entropy_gated": EntropyGated, "asymmetric": Asymmetric},
    "entropy": {"none": NoEntropy, "bonus": EntropyBonus, "siren": Siren, "epo": Epo},
    "selector": {"none": NoSelector, "clip_cov": ClipCov, "kl_cov": KLCov},
    "tempering": {"none": NoTempering, "aepo": Aepo},
    "token_filter": {"none": NoTokenFilter, "clip_b": ClipB, "clip_v": ClipV},
    "token_weight": {"none": NoTokenWeight, "steer": Steer, "high_entropy": HighEntropy},
    "control": dict(CONTROLS),
    "divergence_control": dict(CONTROLS),
    # Skywork's coefficient is 0 while it is off, and a threshold is never off.
    "threshold_control": {name: cls for name, cls in CONTROLS.items() if cls is not Skywork},
    "replay": {"none": NoReplay, "buffer": BufferReplay, "zero_variance": ZeroVarianceReplay},
    "objective_weights": {"none": NoObjectiveWeights, "recap": Recap, "recap_code": RecapCode},
    "reference": {
        "initial": InitialReference,
        "model": ModelReference,
        "soup": Soup,
        "geometric_mixture": GeometricMixture,
        "refresh": Refresh,
        "soft_refresh": SoftRefresh,
        "ema": EMAReference,
        "bema": BEMAReference,
    },
    "teacher": {"none": NoTeacher},
    "evaluation": {"none": NoEvaluation, "held_out": HeldOut},
    "cluster": {"local": LocalRay, "ray": ExistingRay, "inprocess": InProcess},
    "tracking": {"files": FileTracking, "wandb": WandbTracking},
}

# The literature's short names: understood, and written nowhere.
ALIASES: dict[str, dict[str, str]] = {
    "divergence": {
        "rkl": "reverse_kl",
        "fkl": "forward_kl",
        "js": "jensen_shannon",
        "gjs": "generalized_js",
        "tv": "total_variation",
        "hell2": "squared_hellinger",
    },
}
_BASES: dict[str, type] = {name: hint for name, hint in get_type_hints(RunConfig).items() if name in CHOICES}
# Of the `needs` of strategies, those that a pass of the policy before the update answers.
MEASURED = frozenset({"proximal_logprobs", "old_pass", "old_entropy", "old_expected_score", "old_nucleus_entropy"})
GROUP_BASELINES = ("grpo", "dr_grpo", "rloo", "gpg", "gdpo", "reinforce_pp_baseline")  # of CHOICES["advantage"]


def register(choices: Mapping[str, Mapping[str, type]]) -> None:
    """Makes dataclasses known to Hydra under group and name, and adds those from outside rlkit to CHOICES. Raises ConfigError."""
    for group, options in choices.items():
        if group not in CHOICES:
            raise ConfigError(f"{group}: no such group of choices.{suggest(group, CHOICES)} Groups: {', '.join(CHOICES)}.")
        base = _BASES[group]
        for name, node in options.items():
            where = f"{group}={name}"
            if not (is_dataclass(node) and isinstance(node, type) and issubclass(node, base)):
                raise ConfigError(f"{where}: {node!r} is not a dataclass that extends {base.__module__}.{base.__qualname__}.")
            known = CHOICES[group].get(name, node)
            if known is not node and known.__module__.startswith("rlkit."):
                raise ConfigError(f"{where}: rlkit has a choice of that name, {known.__qualname__}. Give yours another name.")
            CHOICES[group][name] = node
            ConfigStore.instance().store(group=group, name=name, node=node)


def penalties() -> dict[str, type[Penalty]]:
    """The divergences that there are, a user's own among them."""
    return {name: cls for name, cls in CHOICES["divergence"].items() if issubclass(cls, Penalty)}


def base_of(group: str) -> type:
    """The class that every choice of a group extends; its fields are settings whatever is chosen."""
    return _BASES[group]


def class_of(node: DictConfig) -> type:
    """The dataclass that a composed group was made from."""
    cls = OmegaConf.get_type(node)
    assert cls is not None
    return cls


def choice_of(group: str, settings: object) -> str:
    """The name that `settings` was chosen by: the first, where several names share a class."""
    return next(name for name, node in CHOICES[group].items() if node is type(settings))


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is spelt most like this one; empty when none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def suggest(word: str, known: Iterable[str]) -> str:
    """A sentence for an error, with a space before it, or nothing."""
    near = nearest(word, known)
    return f" Did you mean {near}?" if near else ""


def load(cfg: DictConfig) -> RunConfig:
    """Type and check the composed settings. Raises one ConfigError that names every problem."""
    config, found = examine(cfg)
    if config is None or found:
        raise ConfigError(report(found))
    return config


def report(found: list[str]) -> str:
    """Problems as one message."""
    if len(found) == 1:
        return found[0]
    return f"{len(found)} settings are wrong.\n" + "\n".join(f"  {problem}" for problem in found)


def examine(cfg: DictConfig) -> tuple[RunConfig | None, list[str]]:
    """The settings, and everything wrong with them; None when too little is there to look at all of them together.

    A group whose own check fails is still built, unchecked, so that the problems between groups show in the same report.
    """
    found = [f"{key}: no such setting.{suggest(str(key), _names())}" for key in cfg if key not in _names()]
    values: dict[str, Any] = {}
    for name in _names():
        missing = name not in cfg or OmegaConf.is_missing(cfg, name)
        if name in CHOICES and (missing or OmegaConf.get_type(cfg, name) not in CHOICES[name].values()):
            found.append(f"{name}: nothing is chosen. Write {name}= and one of {', '.join(CHOICES[name])}.")
        elif name in CHOICES:
            settings, wrong = _examine_group(name, cfg[name])
            found += wrong
            if settings is not None:
                values[name] = settings
        else:
            try:
                values[name] = cfg[name]
            except OmegaConfBaseException as error:
                found.append(f"{name}: {str(error).splitlines()[0]}.")
    if len(values) < len(_names()):
        return None, found
    config = RunConfig(**values)
    return config, found + list(problems(config))


def _names() -> list[str]:
    return [field.name for field in fields(RunConfig)]


def _examine_group(group: str, node: DictConfig) -> tuple[object | None, list[str]]:
    cls = class_of(node)
    known = [field.name for field in fields(cls)]
    found = [f"{group}.{key}: no such setting.{suggest(str(key), known)}" for key in node if key not in known]
    values: dict[str, Any] = {}
    complete = True
    for name in known:
        key = f"{group}.{name}"
        if OmegaConf.is_missing(node, name):
            hint = get_type_hints(cls)[name]
            found.append(f"{key}: has no value.{_what_to_write(key, node)}")
            values[name] = "" if hint is str else None
            complete = complete and hint is str
            continue
        try:
            value = node[name]
            values[name] = OmegaConf.to_object(value) if isinstance(value, Container) else value
        except OmegaConfBaseException as error:
            found.append(f"{key}: {str(error).splitlines()[0]}.")
            complete = False
    if not complete:
        return None, found
    try:
        return cls(**values), found
    except ConfigError as error:
        sentence = _with_keys(str(error), group, cls) if issubclass(cls, Control) else str(error)
        found += sentence.splitlines()
    settings = object.__new__(cls)
    for name, value in values.items():
        setattr(settings, name, value)
    return settings, found


def _with_keys(sentence: str, group: str, settings: Any, **others: str) -> str:
    """What a controller says of its settings, with their full keys: it is chosen in several groups, and knows of none."""
    keys = {field.name: f"{group}.{field.name}" for field in fields(settings)} | others
    return re.sub(r"(?<![\w.])(\w+)=", lambda match: f"{keys.get(match[1], match[1])}=", sentence)


def _what_to_write(key: str, group: DictConfig) -> str:
    match key:
        case "reward.fn":
            return f" Write reward.fn=my_rewards.py:my_function, or one of {', '.join(_reward_names())}."
        case "data.path" if class_of(group) is HuggingFaceData:
            return " Write data.path=name/on-the-hub or data.path=folder."
        case "data.path":
            return " Write data.path=file."
        case "data.files":
            return " Write data.files={math:math.jsonl,chat:chat.parquet}."
        case "environment.env":
            return " Write environment.env=my_env.py:MyEnvironment, a class with reset and step."
        case "environment.env_id" | "data.env_id":
            return f" Write {key}=name-of-an-installed-environment, or {key}=my_env.py:load_environment."
        case "reward.fns":
            return " Write reward.fns={accuracy:numeric_match,form:format}."
        case "reward.path":
            return " Write reward.path=folder-or-hub-id of a reward model; `rlkit reward fit` makes one."
        case "data.task":
            return " Write data.task=chain_sum, or another task of reasoning-gym."
        case "reference.path":
            return " Write reference.path=folder-or-hub-id."
        case "reference.paths":
            return " Write reference.paths=[first-folder,second-folder]."
        case "model.path":
            return " Write model=tiny, model=smollm2_135m, or model.path=folder-or-hub-id."
        case _:
            return f" Write {key}=value."


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
            yield _with_keys(str(error), moved.group, moved.control, coef=moved.key)
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
    if name and ":" not in name and name not in (known := _reward_names()):
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


def _reward_names() -> list[str]:
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


def to_yaml(config: RunConfig) -> str:
    """Every setting as YAML, each group with the name of its choice; `rlkit.compose.compose(stored=...)` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Every setting as plain values, each group with the name of its choice under `choice`."""
    plain: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in CHOICES:
            own = {inner.name: _plain(getattr(value, inner.name)) for inner in fields(value)}
            plain[field.name] = {"choice": choice_of(field.name, value), **own}
        else:
            plain[field.name] = _plain(value)
    return plain


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


ConfigStore.instance().store(name="run", node=RunConfig)
register(CHOICES)
