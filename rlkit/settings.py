"""The settings of everything that is not a strategy: data, engines, learner, optimiser, evaluation, cluster, tracking.

Each class checks itself, and names everything wrong with it at once. `rlkit/config.py` says which class stands for which choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from omegaconf import MISSING

from rlkit.errors import ConfigError

CONVENTIONS = ("rlkit", "trl", "verl", "verifiers", "plain")  # of reward functions, see rlkit/data/rewards/signatures.py
STEP_SEPARATOR = "\n\n"  # of a response's steps, where nothing else is written
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output head


def require(*checks: tuple[bool, str]):
    """Raises one ConfigError with a line for every check that failed."""
    if failed := [sentence for holds, sentence in checks if not holds]:
        raise ConfigError("\n".join(failed))


class Dtype(Enum):
    """Precision of the engine, the scorer and the learner's compute. The learner's master weights are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class BadRow(Enum):
    """What happens to a row that cannot be used."""

    error = "error"  # the run does not start
    drop = "drop"  # it is left out, and counted


class LayoutKind(Enum):
    """How samples share rows."""

    auto = "auto"  # whichever the cost model finds cheapest for the batch
    padded = "padded"
    packed = "packed"
    shared = "shared"


class Placement(Enum):
    """Who shares devices with whom."""

    separate = "separate"  # engines, learner ranks and scorers have devices of their own
    colocated = "colocated"  # engines and learner use the same ones by turns


class WeightTransport(Enum):
    """How the learner's weights reach the engines after every step."""

    host = "host"  # over host memory: on every machine, and every byte is digested
    nccl = "nccl"  # broadcast from the learner's GPU to the engines' own
    ipc = "ipc"  # within the GPUs that engines and learner share


class Schedule(Enum):
    """Learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class Model:
    """The policy at the start of the run, and the precision it runs in."""

    path: str = MISSING  # `tiny`, `smollm2_135m`, a folder in Hugging Face format, or a hub id
    dtype: Dtype = Dtype.float32
    trust_remote_code: bool = False  # lets the model's own Python code run on this machine


@dataclass(kw_only=True, slots=True)
class Data:
    """Base of the data sources."""

    held_out_fraction: float = 0.1  # of the rows, kept for evaluation; by a hash of the row's id
    on_bad_row: BadRow = BadRow.error

    def __post_init__(self):
        share = self.held_out_fraction
        require((0 <= share < 1, f"data.held_out_fraction={share}: no share of the rows. Write a number in [0, 1); 0.1 is usual."))


@dataclass(kw_only=True, slots=True)
class ExpressionsData(Data):
    """The built-in task: write an expression over four digits that equals a target (many right answers per prompt)."""


@dataclass(kw_only=True, slots=True)
class ComparisonData(Data):
    """The larger of two two-digit numbers, asked as a chat message; made for a small pretrained model."""


@dataclass(kw_only=True, slots=True)
class GuessingData(Data):
    """Games of environment=guessing_game: the same question again and again, and a secret number behind each."""

    highest: int = 9  # secret numbers are 1 to this
    size: int = 512  # games
    question: str = "I have a number from 1 to {highest} in mind. Guess it; I say whether it is higher or lower."
    chat: bool = True

    def __post_init__(self):
        Data.__post_init__(self)
        require(
            (self.highest >= 2, f"data.highest={self.highest}: nothing to guess. Write 2 or more; 9 is usual."),
            (self.size >= 1, f"data.size={self.size}: no game. Write 1 or more; 512 is usual."),
            (bool(self.question.strip()), "data.question is empty. Write what the policy is asked."),
        )


@dataclass(kw_only=True, slots=True)
class TableData(Data):
    """Base of the sources whose rows have columns."""

    prompt_column: str = "prompt"  # plain text, or a list of chat messages
    id_column: str | None = None  # unique per row; without one a row is known by its number
    source_column: str | None = None  # names the source of each row, where several are mixed; without one all rows are of one
    source_weights: dict[str, float] = field(default_factory=dict)  # source: share of the draws; 1 where none is written
    columns: dict[str, str] = field(default_factory=dict)  # new name: name in the file, for the reward function's arguments
    system_prompt: str | None = None  # put before every prompt, as the chat template's system message
    chat: bool = False  # wrap plain text as one user message in the model's chat template

    def __post_init__(self):
        Data.__post_init__(self)
        weights = self.source_weights
        require(
            *(
                (0 < weight < math.inf, f"data.source_weights.{name}={weight}: never drawn. Write a number above 0.")
                for name, weight in weights.items()
            ),
            (
                not weights or self.source_column is not None or isinstance(self, MixtureData),
                "data.source_weights: all rows are of one source. Write data.source_column=<what names it>, or data=mixture.",
            ),
        )


@dataclass(kw_only=True, slots=True)
class MixtureData(TableData):
    """Several files of JSON lines or parquet, each a source of its own."""

    files: dict[str, str] = MISSING  # source: path

    def __post_init__(self):
        TableData.__post_init__(self)
        require(
            (bool(self.files), "data.files={}: no file. Write data.files={math:math.jsonl,chat:chat.parquet}."),
            (
                self.source_column is None,
                f"data.source_column={self.source_column}: the names in data.files are the sources. Leave it away.",
            ),
            *(
                (name in self.files, f"data.source_weights.{name}: data.files has {', '.join(self.files)}. Correct the name.")
                for name in self.source_weights
            ),
        )


@dataclass(kw_only=True, slots=True)
class JsonlData(TableData):
    """One JSON object per line."""

    path: str = MISSING  # of the file
    held_out_path: str | None = None  # evaluate on these rows instead of a share of the others


@dataclass(kw_only=True, slots=True)
class ParquetData(TableData):
    """A parquet file."""

    path: str = MISSING  # of the file
    held_out_path: str | None = None  # evaluate on these rows instead of a share of the others


@dataclass(kw_only=True, slots=True)
class HuggingFaceData(TableData):
    """A Hugging Face data set, by hub name or by folder."""

    path: str = MISSING  # a name on the hub, or a folder
    name: str | None = None  # of the configuration, where the data set has several
    split: str = "train"
    held_out_split: str | None = None  # evaluate on it instead of on a share of the other


@dataclass(kw_only=True, slots=True)
class ReasoningGymData(Data):
    """Endless verifiable tasks from the reasoning-gym package."""

    task: str = MISSING  # such as chain_sum, countdown, basic_arithmetic
    size: int = 4096  # problems
    options: dict[str, Any] = field(default_factory=dict)  # passed to the task
    system_prompt: str | None = None
    chat: bool = True

    def __post_init__(self):
        # By name: `slots=True` makes a second class, which a bare super() in the first one's method does not know.
        Data.__post_init__(self)
        require((self.size >= 1, f"data.size={self.size}: no problems to train on. Write 1 or more; 4096 is usual."))


@dataclass(kw_only=True, slots=True)
class VerifiersData(Data):
    """The data set of an environment of the verifiers package, with its own held-out rows where it has some."""

    env_id: str = MISSING  # as in environment=verifiers
    options: dict[str, Any] = field(default_factory=dict)  # likewise


class OnFailure(Enum):
    """What becomes of a sample whose reward failed. Whatever it is, the failure is counted, and too many stop the run."""

    mask = "mask"  # it is not trained on
    value = "value"  # reward.failed_value stands in for the reward  # pyright: ignore[reportAssignmentType]
    retry = "retry"  # the call is made once more, by another worker; then as mask
    stop = "stop"  # the run stops with the cause


BY_VALUE = OnFailure["value"]  # as an attribute, `value` is every member's own


@dataclass(kw_only=True, slots=True)
class RewardChoice:
    """Base of the rewards."""

    @property
    def functions(self) -> dict[str, str]:
        """The reward functions by the name that each is known by; one alone has no name."""
        return {}

    @property
    def model_paths(self) -> dict[str, str]:
        """The reward models by the setting that names each."""
        return {}


@dataclass(kw_only=True, slots=True)
class RewardSettings(RewardChoice):
    """Base of the rewards by functions: how long, how often and to what effect one may fail."""

    timeout_s: float = 10.0  # wall clock per call; the worker is killed at it
    num_workers: int = 2  # processes, per function
    max_error_rate: float = 0.2  # above it, over the last 200 samples, the run stops
    on_timeout: OnFailure = OnFailure.mask
    on_error: OnFailure = OnFailure.mask
    failed_value: float | None = None  # the reward of a sample whose reward failed, where on_timeout or on_error is value
    calls_at_once: int = 1  # under way in one worker, of an async function
    max_calls_per_s: float | None = None  # of all workers together; null: as fast as they come
    max_calls_per_worker: int = 10_000  # then the worker makes room for a new one
    unsafe_allow_unsandboxed: bool = False  # programs that the model wrote may run without bubblewrap, where there is none
    max_worker_mib: int = 4096  # of memory; a call in which its worker grows beyond it is an error

    def __post_init__(self):
        limit, rate, value, calls_rate = self.timeout_s, self.max_error_rate, self.failed_value, self.max_calls_per_s
        wanted = BY_VALUE in (self.on_timeout, self.on_error)
        finite = value is not None and math.isfinite(value)
        require(
            (0 < limit < math.inf, f"reward.timeout_s={limit}: no time to answer. Write seconds above 0; 10 is usual."),
            (self.num_workers >= 1, f"reward.num_workers={self.num_workers}: nobody computes rewards. Write 1 or more."),
            (0 <= rate <= 1, f"reward.max_error_rate={rate}: not a share. Write a number in [0, 1]; 0.2 is usual."),
            (not wanted or finite, f"reward.failed_value={value}: no reward for a sample that failed. Write a finite number."),
            (
                wanted or value is None,
                f"reward.failed_value={value}: nobody reads it. Write reward.on_timeout=value or reward.on_error=value as well.",
            ),
            (
                self.calls_at_once >= 1,
                f"reward.calls_at_once={self.calls_at_once}: no call at all. Write 1 or more.",
            ),
            (
                calls_rate is None or 0 < calls_rate < math.inf,
                f"reward.max_calls_per_s={calls_rate}: no call at all. Write a number above 0, or null.",
            ),
            (
                self.max_calls_per_worker >= 1,
                f"reward.max_calls_per_worker={self.max_calls_per_worker}: no call at all. Write 1 or more; 10000 is usual.",
            ),
            (
                self.max_worker_mib >= 64,
                f"reward.max_worker_mib={self.max_worker_mib}: Python alone takes more. Write 64 or more; 4096 is usual.",
            ),
        )


@dataclass(kw_only=True, slots=True)
class Reward(RewardSettings):
    """One reward function."""

    fn: str = MISSING  # a name in reward_fns/, or `file.py:function`, or `package.module:function`
    signature: str = "auto"  # the convention it is written in: rlkit, trl, verl, verifiers or plain; auto: told by its arguments

    @property
    def functions(self) -> dict[str, str]:
        return {"": self.fn}

    def __post_init__(self):
        RewardSettings.__post_init__(self)
        require(_known_convention("reward.signature", self.signature))


@dataclass(kw_only=True, slots=True)
class WeightedRewards(RewardSettings):
    """Several reward functions per sample, each a named part; the reward is the weighted sum of those that judge its source."""

    fns: dict[str, str] = MISSING  # name: function, written as in reward.fn
    models: dict[str, str] = field(default_factory=dict)  # name: outcome reward model, written as in reward=model reward.path
    weights: dict[str, float] = field(default_factory=dict)  # name: weight; 1 where nothing is written
    sources: dict[str, list[str]] = field(default_factory=dict)  # name: data sources that it judges; all where nothing is written
    signatures: dict[str, str] = field(default_factory=dict)  # name: convention; auto where nothing is written

    @property
    def functions(self) -> dict[str, str]:
        return self.fns

    @property
    def model_paths(self) -> dict[str, str]:
        return {f"reward.models.{name}": path for name, path in self.models.items()}

    def __post_init__(self):
        RewardSettings.__post_init__(self)
        names, models = list(self.fns), list(self.models)
        strangers = [
            (False, f"reward.{key}.{name}: there is no such function in reward.fns. It has {', '.join(names)}.")
            for key in ("weights", "sources", "signatures")
            for name in getattr(self, key)
            if name not in [*names, *(models if key != "signatures" else [])]
        ]
        strangers += [
            (False, f"reward.models.{name}: reward.fns has a part of that name. Write another.") for name in models if name in names
        ]
        weights = [
            (math.isfinite(weight) and weight != 0, f"reward.weights.{name}={weight}: write a finite number other than 0.")
            for name, weight in self.weights.items()
        ]
        conventions = [_known_convention(f"reward.signatures.{name}", each) for name, each in self.signatures.items()]
        require((bool(names), "reward.fns={}: no function. Write reward.fns={accuracy:numeric_match,form:format}."), *strangers)
        require(*weights, *conventions)


class ModelKind(Enum):
    """What a reward model says of a response."""

    outcome = "outcome"  # one score, at its last token: a sequence classifier with one label (Bradley-Terry)
    process = "process"  # a score for each step, at the separator behind it: a token classifier with one label, or two


class StepReduction(Enum):
    """How the scores of a response's steps become its reward."""

    min = "min"  # the worst step
    last = "last"
    mean = "mean"


@dataclass(kw_only=True, slots=True)
class ModelReward(RewardChoice):
    """A reward model in a worker of its own: a score of the response, or of each step of it (a process reward model)."""

    path: str = MISSING  # a folder in Hugging Face format with a classification head, or a hub id; `rlkit reward fit` makes one
    kind: ModelKind = ModelKind.outcome
    step_separator: str = STEP_SEPARATOR  # between the steps of a response, for kind=process; as the model was trained with
    reduce: StepReduction = StepReduction.min  # of the steps' scores, for kind=process
    dtype: Dtype = Dtype.float32
    trust_remote_code: bool = False  # lets the model's own Python code run on this machine
    tokens_per_microbatch: int = 16384  # padding included
    max_rows: int = 64  # of a microbatch
    deadline_s: float = 600.0  # for one batch of responses

    @property
    def model_paths(self) -> dict[str, str]:
        return {"reward.path": self.path}

    def __post_init__(self):
        tokens, rows, limit = self.tokens_per_microbatch, self.max_rows, self.deadline_s
        is_process = self.kind is ModelKind.process
        require(
            (tokens >= 1, f"reward.tokens_per_microbatch={tokens}: no room for one token. Write 1 or more; 16384 is usual."),
            (rows >= 1, f"reward.max_rows={rows}: no room for one response. Write 1 or more; 64 is usual."),
            (0 < limit < math.inf, f"reward.deadline_s={limit}: no time to score. Write seconds above 0; 600 is usual."),
            (bool(self.step_separator), "reward.step_separator='': it ends every step. Write the text between two steps."),
            (
                is_process or self.reduce is StepReduction.min,
                f"reward.reduce={self.reduce.name}: an outcome model has no steps. Write reward.kind=process, or leave it away.",
            ),
            (
                is_process or self.step_separator == STEP_SEPARATOR,
                "reward.step_separator: an outcome model has no steps. Write reward.kind=process, or leave it away.",
            ),
        )


@dataclass(kw_only=True, slots=True)
class EnvironmentReward(RewardChoice):
    """What the environment gives for each turn, and nothing else."""


def _known_convention(key: str, value: str) -> tuple[bool, str]:
    return value in ("auto", *CONVENTIONS), f"{key}={value}: no such convention. Write auto or one of {', '.join(CONVENTIONS)}."


@dataclass(kw_only=True, slots=True)
class Environment:
    """Base of the environments: what happens between the policy's turns."""


@dataclass(kw_only=True, slots=True)
class SingleTurn(Environment):
    """One prompt, one response."""


class Role(Enum):
    """Of an observation, in a chat template."""

    user = "user"
    tool = "tool"


@dataclass(kw_only=True, slots=True)
class MultiTurn(Environment):
    """Base of the environments that answer the policy. All turns and observations of an episode share max_response_tokens."""

    start_limit_s: ClassVar[float] = 60.0  # to start Python and import the environment

    max_turns: int = 8  # of the policy, in an episode
    max_turn_tokens: int | None = None  # of one turn of the policy; null: what is left of max_response_tokens
    max_observation_tokens: int = 512  # a longer observation is cut, and counted
    observation_role: Role = Role.user  # of an observation where the prompt is chat; plain text has no roles
    timeout_s: float = 10.0  # wall clock per turn; the episode is killed at it, and not trained on
    max_calls_at_once: int | None = None  # turns that are worked on together; null: one per core; more where they wait for others
    max_episodes_at_once: int = 1024  # of one batch, each in a process of its own
    max_worker_mib: int = 4096  # of memory, of an episode's own process
    max_error_rate: float = 0.2  # above it, over the last 200 episodes, the run stops
    unsafe_allow_unsandboxed: bool = False  # programs that the model wrote may run without bubblewrap, where there is none

    def __post_init__(self):
        turn, limit, rate = self.max_turn_tokens, self.timeout_s, self.max_error_rate
        require(
            (self.max_turns >= 1, f"environment.max_turns={self.max_turns}: the policy has no turn. Write 1 or more; 8 is usual."),
            (turn is None or turn >= 1, f"environment.max_turn_tokens={turn}: no token at all. Write 1 or more, or null."),
            (
                self.max_observation_tokens >= 1,
                f"environment.max_observation_tokens={self.max_observation_tokens}: nothing can be observed. Write 1 or more.",
            ),
            (0 < limit < math.inf, f"environment.timeout_s={limit}: no time to answer. Write seconds above 0; 10 is usual."),
            (
                self.max_calls_at_once is None or self.max_calls_at_once >= 1,
                f"environment.max_calls_at_once={self.max_calls_at_once}: no call at all. Write 1 or more, or null.",
            ),
            (
                self.max_episodes_at_once >= 1,
                f"environment.max_episodes_at_once={self.max_episodes_at_once}: no episode at all. Write 1 or more; 1024 is usual.",
            ),
            (
                self.max_worker_mib >= 64,
                f"environment.max_worker_mib={self.max_worker_mib}: Python alone takes more. Write 64 or more; 4096 is usual.",
            ),
            (0 <= rate <= 1, f"environment.max_error_rate={rate}: not a share. Write a number in [0, 1]; 0.2 is usual."),
        )


@dataclass(kw_only=True, slots=True)
class PythonEnvironment(MultiTurn):
    """A class of your own with `reset` and `step`."""

    env: str = MISSING  # `file.py:Class` or `package.module:Class`
    options: dict[str, Any] = field(default_factory=dict)  # passed to the class


class CallFormat(Enum):
    """How the policy calls a tool."""

    hermes = "hermes"  # JSON between <tool_call> and </tool_call>; a turn without a call is the answer
    bare = "bare"  # each turn is the argument of the only tool; an empty turn, or the last, ends the episode


@dataclass(kw_only=True, slots=True)
class ToolEnvironment(MultiTurn):
    """Python functions that the policy may call before it answers; the reward function judges the answer."""

    observation_role: Role = Role.tool
    tools: list[str] = field(default_factory=lambda: ["calculator", "python"])  # these two, or `file.py:function`
    call_format: CallFormat = CallFormat.hermes

    def __post_init__(self):
        MultiTurn.__post_init__(self)
        bare = self.call_format is CallFormat.bare
        require(
            (bool(self.tools), "environment.tools=[]: nothing to call. Write environment.tools=[calculator,my_tools.py:search]."),
            (
                not bare or len(self.tools) == 1,
                f"environment.call_format=bare: a turn does not say which of {len(self.tools)} tools it calls. Write one tool, "
                "or environment.call_format=hermes.",
            ),
        )


@dataclass(kw_only=True, slots=True)
class VerifiersEnvironment(MultiTurn):
    """An environment of the verifiers package (0.1.9), scored by its own rubric; with data=verifiers."""

    start_limit_s: ClassVar[float] = 600.0  # it loads its data set

    env_id: str = MISSING  # of an installed environment, or `file.py:function` or `package.module:function` that returns one
    options: dict[str, Any] = field(default_factory=dict)  # passed to it
    max_turns: int = 1000  # the environment's own limit comes first
    timeout_s: float = 60.0  # the last turn is scored in it


@dataclass(kw_only=True, slots=True)
class GuessingGame(MultiTurn):
    """The policy guesses the row's `secret` number and hears whether it is higher or lower; 1 for the right guess, else 0."""

    max_turns: int = 4
    higher: str = "higher"  # what it hears when the secret number is
    lower: str = "lower"


@dataclass(kw_only=True, slots=True)
class RolloutEngine:
    """Base of the engines' settings."""

    num_engines: int = 1
    max_num_seqs: int = 512  # decoded together, per engine
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    deadline_s: float = 600.0  # for one batch of generation, and for one weight sync

    @property
    def devices_per_engine(self) -> int:
        """More than one where an engine is tensor-parallel."""
        return 1

    @property
    def num_devices(self) -> int:
        """Of all engines."""
        return self.num_engines * self.devices_per_engine

    def __post_init__(self):
        # The engine renormalises over the tokens it kept, so every importance ratio would be off by the mass it cut.
        truncated = "truncated sampling biases every ratio in training"
        t = self.temperature
        require(
            (0 < t < math.inf, f"rollout.temperature={t}: training needs sampled tokens. Write a number above 0; 1.0 is usual."),
            (self.top_p == 1, f"rollout.top_p={self.top_p}: {truncated}. Write rollout.top_p=1.0; evaluation.top_p may differ."),
            (self.top_k == 0, f"rollout.top_k={self.top_k}: {truncated}. Write rollout.top_k=0; evaluation.top_k may differ."),
            (self.min_p == 0, f"rollout.min_p={self.min_p}: {truncated}. Write rollout.min_p=0.0; evaluation.min_p may differ."),
            (self.num_engines >= 1, f"rollout.num_engines={self.num_engines}: nobody generates. Write 1 or more."),
            (self.max_num_seqs >= 1, f"rollout.max_num_seqs={self.max_num_seqs}: nothing is decoded. Write 1 or more."),
            (0 < self.deadline_s < math.inf, f"rollout.deadline_s={self.deadline_s}: no time to generate. Write seconds above 0."),
        )


@dataclass(kw_only=True, slots=True)
class VllmEngine(RolloutEngine):
    """vLLM in a Ray actor."""

    kv_cache_mib: int = 512
    enforce_eager: bool = True  # False compiles the model: minutes to start, faster on long runs
    tensor_parallel_size: int = 1  # devices, or on a CPU processes, that share each engine's model
    weight_transport: WeightTransport = WeightTransport.host  # nccl, ipc: from GPU to GPU; not run on a GPU yet

    @property
    def devices_per_engine(self) -> int:
        return self.tensor_parallel_size

    def __post_init__(self):
        RolloutEngine.__post_init__(self)
        cache, size = self.kv_cache_mib, self.tensor_parallel_size
        require(
            (cache >= 1, f"rollout.kv_cache_mib={cache}: no room for one token. 512 is usual."),
            (size >= 1, f"rollout.tensor_parallel_size={size}: nobody holds the model. Write 1 or more."),
        )


@dataclass(kw_only=True, slots=True)
class AsyncVllmEngine(VllmEngine):
    """vLLM in a process of its own beside the Ray actor: it samples on between calls, and may be tensor-parallel."""


@dataclass(kw_only=True, slots=True)
class TransformersEngine(RolloutEngine):
    """transformers' own generation: slower, needs nothing else."""


@dataclass(kw_only=True, slots=True)
class Learner:
    """torch with FSDP2."""

    num_ranks: int = 1
    tokens_per_microbatch: int = 8192  # prompt, response and padding together
    layout: LayoutKind = LayoutKind.auto  # of samples in rows; changes speed, never the gradient
    activation_checkpointing: bool = False  # keep each layer's input only, and run the layer again in the backward pass
    head_memory_mib: int = 256  # the output head is computed in chunks whose logits fit
    max_skipped_steps: int = 3  # non-finite steps in a row before the run stops
    deadline_s: float = 1800.0  # for one call

    def __post_init__(self):
        tokens, head = self.tokens_per_microbatch, self.head_memory_mib
        require(
            (self.num_ranks >= 1, f"learner.num_ranks={self.num_ranks}: nobody learns. Write 1 or more."),
            (tokens >= 1, f"learner.tokens_per_microbatch={tokens}: no room for one token. Write 1 or more; 8192 is usual."),
            (head >= 1, f"learner.head_memory_mib={head}: no room for one token's logits. Write 1 or more; 256 is usual."),
            (self.max_skipped_steps >= 1, f"learner.max_skipped_steps={self.max_skipped_steps}: write 1 or more; 3 is usual."),
            (0 < self.deadline_s < math.inf, f"learner.deadline_s={self.deadline_s}: no time to learn. Write seconds above 0."),
        )


@dataclass(kw_only=True, slots=True)
class LoraLearner(Learner):
    """Low-rank adapters on a frozen model (LoRA, arXiv:2106.09685), through PEFT; engines get them merged into the weights."""

    lora_rank: int = 16  # of each adapter
    lora_alpha: float = 32.0  # an adapter adds lora_alpha / lora_rank times its product; learns at ten times the usual rate
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])  # names such as q_proj; all-linear: all in the layers

    def __post_init__(self):
        Learner.__post_init__(self)
        rank, alpha, targets = self.lora_rank, self.lora_alpha, list(self.target_modules)
        require(
            (rank >= 1, f"learner.lora_rank={rank}: nothing is learnt. Write 1 or more; 16 is usual."),
            (
                0 < alpha < math.inf,
                f"learner.lora_alpha={alpha}: nothing is learnt. Write a number above 0; 2 x lora_rank is usual.",
            ),
            (
                bool(targets) and all(targets) and (ALL_LINEAR not in targets or len(targets) == 1),
                f"learner.target_modules=[{','.join(targets)}]: write [{ALL_LINEAR}], or names such as [q_proj,v_proj].",
            ),
        )


@dataclass(kw_only=True, slots=True)
class Optimizer:
    """Base of the optimisers."""

    learning_rate: float = 1e-6  # usual for a pretrained model; a tiny one takes a hundred times as much
    warmup_steps: int = 0  # optimiser steps from 0 to learning_rate
    schedule: Schedule = Schedule.constant
    final_fraction: float = 0.0  # of learning_rate, where a falling schedule ends
    max_grad_norm: float = 1.0

    def __post_init__(self):
        rate, norm, final = self.learning_rate, self.max_grad_norm, self.final_fraction
        require(
            (0 < rate < math.inf, f"optimizer.learning_rate={rate}: nothing is learnt. Write a number above 0, such as 1e-6."),
            (self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps}: write 0 or more."),
            (0 <= final <= 1, f"optimizer.final_fraction={final}: not a share of learning_rate. Write a number in [0, 1]."),
            (
                final == 0 or self.schedule is not Schedule.constant,
                f"optimizer.final_fraction={final}: optimizer.schedule=constant never reads it. Write optimizer.schedule=cosine.",
            ),
            (norm > 0, f"optimizer.max_grad_norm={norm}: clips every gradient away. Write a number above 0; 1.0 is usual."),
        )


@dataclass(kw_only=True, slots=True)
class AdamW(Optimizer):
    """AdamW with float32 state."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        Optimizer.__post_init__(self)
        require(
            (0 <= self.beta1 < 1, f"optimizer.beta1={self.beta1}: write a number in [0, 1); 0.9 is usual."),
            (0 <= self.beta2 < 1, f"optimizer.beta2={self.beta2}: write a number in [0, 1); 0.999 is usual."),
            (self.eps > 0, f"optimizer.eps={self.eps}: write a number above 0; 1e-8 is usual."),
            (self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay}: write 0 or more."),
        )


@dataclass(kw_only=True, slots=True)
class Sgd(Optimizer):
    """Plain stochastic gradient descent: no state, for comparisons and tests."""


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """Base of the evaluations."""


@dataclass(kw_only=True, slots=True)
class NoEvaluation(Evaluation):
    """No held-out evaluation."""


@dataclass(kw_only=True, slots=True)
class HeldOut(Evaluation):
    """Mean reward, unbiased pass@k and distinct right answers on held-out prompts."""

    every: int = 0  # steps between evaluations; 0: only before the first step and after the last
    num_prompts: int = 256
    samples_per_prompt: int = 16
    ks: list[int] = field(default_factory=lambda: [1, 4, 16])  # of pass@k
    right_from: float = 0.5  # a reward at least as high counts as a right answer
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        n, ks, t = self.samples_per_prompt, list(self.ks), self.temperature
        usable = ",".join(str(k) for k in ks if 1 <= k <= n) or "1"
        require(
            (self.every >= 0, f"evaluation.every={self.every}: write 0 (before and after the run) or a number of steps."),
            (self.num_prompts >= 1, f"evaluation.num_prompts={self.num_prompts}: write 1 or more, or evaluation=none."),
            (n >= 1, f"evaluation.samples_per_prompt={n}: write 1 or more, or evaluation=none."),
            (
                bool(ks) and all(1 <= k <= n for k in ks),
                f"evaluation.ks={ks}: pass@k needs 1 <= k <= evaluation.samples_per_prompt={n}. "
                f"Write evaluation.ks=[{usable}] or draw more samples.",
            ),
            (
                0 < t < math.inf or (t == 0 and n == 1),
                f"evaluation.temperature={t}: write a number above 0. (0, greedy, goes with evaluation.samples_per_prompt=1.)",
            ),
            (0 < self.top_p <= 1, f"evaluation.top_p={self.top_p}: write a number in (0, 1]; 1.0 is off."),
            (self.top_k >= 0, f"evaluation.top_k={self.top_k}: write 0 (off) or more."),
            (0 <= self.min_p < 1, f"evaluation.min_p={self.min_p}: write a number in [0, 1); 0.0 is off."),
        )


@dataclass(kw_only=True, slots=True)
class ClusterSettings:
    """Base of the clusters."""


@dataclass(kw_only=True, slots=True)
class RaySettings(ClusterSettings):
    """Base of the clusters that Ray makes."""

    placement: Placement = Placement.separate  # colocated: engines sleep while the learner learns, on the same devices


@dataclass(kw_only=True, slots=True)
class LocalRay(RaySettings):
    """Starts Ray on this machine, dashboard off, and stops it at the end."""

    num_cpus: int | None = None  # null: all cores this process may use
    object_store_mib: int = 1024

    def __post_init__(self):
        cpus, store = self.num_cpus, self.object_store_mib
        require(
            (cpus is None or cpus >= 1, f"cluster.num_cpus={cpus}: write 1 or more, or null for all cores."),
            (store >= 80, f"cluster.object_store_mib={store}: Ray starts with no less than 80. Write 1024."),
        )


@dataclass(kw_only=True, slots=True)
class ExistingRay(RaySettings):
    """Joins a running Ray cluster."""

    address: str = "auto"  # host:port of its head node; auto: the one that `ray start` made on this machine


@dataclass(kw_only=True, slots=True)
class InProcess(ClusterSettings):
    """Every worker in this process, without Ray: for tests and debuggers."""


@dataclass(kw_only=True, slots=True)
class Tracking:
    """Base of where measurements go."""

    save_rollouts_every: int = 1  # steps between stored rollouts; 1: every one

    def __post_init__(self):
        every = self.save_rollouts_every
        require((every >= 1, f"tracking.save_rollouts_every={every}: write 1 (every step) or more."))


@dataclass(kw_only=True, slots=True)
class FileTracking(Tracking):
    """Console, metrics.jsonl, TensorBoard, rollouts in parquet, plots."""


@dataclass(kw_only=True, slots=True)
class WandbTracking(Tracking):
    """As `files`, and Weights & Biases."""

    project: str = "rlkit"
    entity: str | None = None
