"""Every setting of a run, and what can be chosen for it. Hydra composes them; past `examine.load` nobody sees a DictConfig.

Strategies (objectives, divergences, ...) carry their own settings as dataclass fields in `rlkit/core/`, everything else in
`rlkit/settings.py`. `CHOICES` is the one table of what can be chosen: adding a method adds one line to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

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
    NoCorrection,
    Rejection,
    SequenceMaskedTIS,
    TruncatedIS,
)
from rlkit.core.recap import NoObjectiveWeights, ObjectiveWeights, Recap, RecapCode
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
from rlkit.core.safe import Asymmetric, EntropyGated, NoSafeguard, Safeguard
from rlkit.core.selectors import ClipB, ClipCov, ClipV, KLCov, NoSelector, NoTokenFilter, Selector, TokenFilter
from rlkit.core.shaping import DynamicSampling, NoPromptFilter, NoShaping, OverlongPenalty, PromptFilter, Shaping
from rlkit.core.values import Critic, DoubleSoftMin, NoCritic, ValueModel
from rlkit.core.weights import HighEntropy, NoTokenWeight, Steer, TokenWeight
from rlkit.errors import ConfigError
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
