"""The command line. Nothing but the standard library is imported before a command needs it, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rlkit.errors import ConfigError, RlkitError

if TYPE_CHECKING:
    from rlkit.config import RunConfig

COMMANDS = {
    "train": "train a policy",
    "eval": "evaluate a checkpoint on held-out prompts",
    "compare": "set runs side by side: settings, figures, curves",
    "reward": "try a reward function on rows of data, or fit a reward model to pairs",
    "choices": "list everything that can be chosen and set",
    "divergences": "measure what every divergence, estimator and place descends",
    "model": "build or fetch the models that rlkit knows by name",
}

HELP = f"""usage: rlkit <command> ...

RL post-training of language models.

commands:
{chr(10).join(f"  {name:<13}{what}" for name, what in COMMANDS.items())}

options:
  -h, --help     show this text; `rlkit <command> --help` explains a command
  --version      show the version

examples:
  rlkit train                                          the built-in task on this machine
  rlkit train num_steps=20 optimizer.learning_rate=1e-4
  rlkit train model=smollm2_135m data=gsm8k_jsonl data.path=train.jsonl reward.fn=my_rewards.py:exact
  rlkit train -m divergence=none,reverse_kl seed=1,2   four runs, one after the other
  rlkit train dry_run=true                             check everything, print what would run, start nothing
  rlkit eval runs/quickstart-20260101-120000           the newest checkpoint of a run
  rlkit compare runs/quickstart-20260101-120000        all runs of a sweep, or any runs, side by side
  rlkit choices divergence                             what divergences there are, with their settings

exit codes: 0 done, 2 configuration or data, 3 resources, 4 a component failed, 5 not finite, 75 stopped with a checkpoint,
130 interrupted
"""

TRAIN = """Train a policy.

A setting is written key=value, a choice group=name; `rlkit choices` lists them all. With no settings it is
experiment=quickstart: the built-in task, a tiny model, minutes on a CPU. With data= and no experiment= it is
experiment=none: the usual choices and every setting's own default, none of quickstart's numbers.
Whatever is wrong with the settings is reported at once, before anything starts."""

TRAIN_EXAMPLES = """examples:
  rlkit train
  rlkit train experiment=grpo_published divergence.coef=0.01 seed=3
  rlkit train data=jsonl data.path=train.jsonl data.prompt_column=question reward.fn=my_rewards.py:exact
  rlkit train -m divergence=none,reverse_kl 'seed=range(1,4)'
  rlkit train dry_run=true group_size=8
  rlkit train resume=runs/quickstart-20260101-120000      go on with a run that stopped
"""

EVAL = """Evaluate a checkpoint on held-out prompts: mean reward, unbiased pass@k with 95 % intervals, distinct right answers.

The folder is a run's (its newest checkpoint is taken) or a checkpoint's. Data, reward and sampling are the run's own
unless overridden; a model that no rlkit run made is evaluated on experiment=quickstart, or on the data you name."""

EVAL_EXAMPLES = """examples:
  rlkit eval runs/quickstart-20260101-120000
  rlkit eval runs/quickstart-20260101-120000/checkpoints/step_000100 evaluation.num_prompts=1000
  rlkit eval my-model data=jsonl data.path=test.jsonl reward.fn=gsm8k
"""


DIVERGENCES = """Measure what every divergence, estimator and place descends.

By enumeration of all sequences of a small vocabulary, with the functions that training calls, against automatic differentiation:
  gradient bias    |E[gradient] - exact| / |exact|, under samples of the policy that is trained; 0: right
  off-policy       the same under samples of another policy
  gradient spread  standard deviation of one response's gradient, in units of the exact one
  value bias       of the loss as a number"""

COMPARE = """Set runs side by side: the settings that differ, final figures with intervals over seeds and prompts, curves.

Runs that differ in the seed alone form an arm; the arm of the first folder is what the others are held against. Runs need a
held-out evaluation on the same prompts; they may still be running. Writes comparison.md, comparison.json and PNG files."""

COMPARE_EXAMPLES = """examples:
  rlkit compare runs/quickstart-20260101-120000                  the folder of a sweep
  rlkit compare runs/plain-seed1 runs/plain-seed2 runs/kl-seed1 runs/kl-seed2 --out kl
"""


REWARD = """Try a reward function on rows of data, before any model is loaded.

Each row's own answer, another row's, its column `completion` or `completions` if it has one, and on the first row what a policy
comes up with sooner or later: nothing, endless text, broken markup, numbers without end. The first line says what is wrong; the
first failure's traceback comes last. The exit code is 0 if nothing wrong was found, 2 if anything was.
`rlkit reward fit --help` is about reward models."""

REWARD_EXAMPLES = """examples:
  rlkit reward test my_rewards.py:exact --data train.jsonl
  rlkit reward test gsm8k --data train.jsonl --prompt-column question
  rlkit reward test my_rewards.py:score --data train.jsonl --signature verl --json
  rlkit reward test my_rewards.py:exact --data train.jsonl --column solution=answer
"""

REWARD_FIT = """Fit a reward model to pairs of responses (Bradley-Terry, with TRL's RewardTrainer).

A line of the file is {"prompt": ..., "chosen": ..., "rejected": ...}, in text or in chat messages. A tenth of the prompts is held
out, and the share of their pairs that the model orders rightly is printed. `rlkit train reward=model reward.path=<out>` trains
with it."""

REWARD_FIT_EXAMPLES = """examples:
  rlkit reward fit --data pairs.jsonl --model Qwen/Qwen3-0.6B --out my-reward-model
  rlkit reward fit --data pairs.jsonl --model tiny --learning-rate 1e-3 --out tiny-reward-model
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: --"):
            written = message.partition(": ")[2].split()[0]
            message = f"{written}: settings are written without dashes, such as {written.lstrip('-') or 'seed=1'}."
        raise ConfigError(f"{message} See {self.prog} --help.")


def main() -> None:
    """The console script."""
    sys.exit(guard(lambda: dispatch(sys.argv[1:])))


def run(overrides: Sequence[str] | None = None, extra: Mapping[str, Mapping[str, type]] | None = None) -> None:
    """`rlkit train` from a script of your own, which may bring choices: extra={"objective": {"mine": Mine}}.

    Overrides are the script's own arguments unless given (`-m` among them makes it a sweep). Like the command it prints a
    user's mistake without a traceback, and exits with its code; it returns when all went well.
    """
    arguments = sys.argv[1:] if overrides is None else list(overrides)

    def train() -> int:
        from rlkit.config import register

        register(extra or {})
        return command_train(arguments, prog=Path(sys.argv[0]).name)

    if code := guard(train):
        sys.exit(code)


def guard(command: Callable[[], int]) -> int:
    """The command's exit code; a RlkitError becomes one message and its own code."""
    try:
        code = command()
        sys.stdout.flush()  # here, where a reader that left is no error, and not when Python ends
        return code
    except RlkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        return 0


def dispatch(arguments: list[str]) -> int:
    """Find the command and run it."""
    match arguments:
        case []:
            print(HELP, end="")
            return ConfigError.exit_code
        case ["-h" | "--help" | "help", *_]:
            print(HELP, end="")
            return 0
        case ["--version", *_]:
            print(f"rlkit {version('rlkit-llm')}")
            return 0
        case ["train", *rest]:
            return command_train(rest)
        case ["eval", *rest]:
            return command_eval(rest)
        case ["compare", *rest]:
            return command_compare(rest)
        case ["reward", *rest]:
            return command_reward(rest)
        case ["choices", *rest]:
            return command_choices(rest)
        case ["divergences", *rest]:
            return command_divergences(rest)
        case ["model", *rest]:
            return command_model(rest)
        case [other, *_]:
            from difflib import get_close_matches  # config.suggest would bring Hydra and torch

            near = get_close_matches(other, COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            hint = f" Settings follow a command: rlkit train {other}." if "=" in other else hint
            raise ConfigError(f"{other}: no such command.{hint} Commands: {', '.join(COMMANDS)}.")
    raise AssertionError(arguments)


def _parser(prog: str, description: str, epilog: str = "") -> _Parser:
    return _Parser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def _parse(parser: _Parser, arguments: Sequence[str]) -> argparse.Namespace | None:
    """None after --help, which argparse answers by leaving."""
    try:
        return parser.parse_intermixed_args(list(arguments))
    except SystemExit as leaving:
        if leaving.code:
            raise
        return None


def command_train(arguments: Sequence[str], prog: str = "rlkit train") -> int:
    """One run, or with -m every run of a sweep."""
    parser = _parser(prog, TRAIN, TRAIN_EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a setting, or a choice as group=name")
    parser.add_argument("-m", "--multirun", action="store_true", help="key=a,b trains one run for each combination of values")
    if (given := _parse(parser, arguments)) is None:
        return 0
    from rlkit.compose import Arm, compose, compose_arms

    resumed = [word for word in given.overrides if word.startswith("resume=")]
    if resumed:
        if given.multirun or len(resumed) > 1:
            raise ConfigError(f"{' '.join(resumed)}: one run is resumed at a time, without -m.")
        given.overrides.remove(resumed[0])
        folder = Path(resumed[0].partition("=")[2].strip("'\""))
        arms = [Arm(label="", overrides=tuple(given.overrides), config=resumed_config(folder, given.overrides))]
    elif given.multirun:
        arms = compose_arms(given.overrides)
    else:
        arms = [Arm(label="", overrides=tuple(given.overrides), config=compose(given.overrides))]
    if any(arm.config.dry_run for arm in arms):
        for arm in arms:
            rehearse(arm.config)
        return 0
    from rlkit.controller.cluster import open_cluster
    from rlkit.controller.loop import train

    if len(arms) > 1:
        from rlkit.sweep import run_sweep

        return run_sweep(arms, train)
    config = arms[0].config
    with open_cluster(config.cluster) as cluster:
        train(config, cluster, resume=bool(resumed))
    return 0


def resumed_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The run's own settings, with `overrides` of what may change while it goes on."""
    from dataclasses import replace

    from rlkit.compose import compose, read_stored
    from rlkit.core.control import Fixed

    stored = read_stored(folder)
    before, now = compose(stored=stored), compose(overrides, stored=stored)
    for key in ("model", "data", "seed", "prompts_per_step", "group_size"):
        if getattr(now, key) != getattr(before, key):
            raise ConfigError(f"{key}: a run that is resumed keeps its {key}. Start a new run, from the checkpoint if you like.")
    for group, what in (
        ("optimizer", "its optimiser, whose state is in the checkpoint"),
        ("critic", "its critic, whose weights are in the checkpoint"),
        ("reference", "its reference"),
        ("rehearsal", "its rehearsal"),
    ):
        if type(getattr(now, group)) is not type(getattr(before, group)):
            raise ConfigError(f"{group}: a run that is resumed keeps {what}. Start a new run, from the checkpoint if you like.")
    for group, what in (("entropy", "entropy term"), ("safeguard", "safeguard")):
        if type(getattr(now, group).initial()) is not type(getattr(before, group).initial()):
            raise ConfigError(
                f"{group}: a run that is resumed keeps its {what}, whose state is in the checkpoint. Start a new run."
            )
    if now.max_staleness < before.max_staleness:
        raise ConfigError(
            f"max_staleness={now.max_staleness}: what the run has sampled ahead may be {before.max_staleness} versions old. Write "
            f"max_staleness={before.max_staleness} or more, or start a new run from the checkpoint."
        )
    for key in ("lora_rank", "lora_alpha", "target_modules"):  # None: not of this learner
        if getattr(now.learner, key, None) != getattr(before.learner, key, None):
            raise ConfigError(f"learner.{key}: a run that is resumed keeps its adapters. Start a new run, from the checkpoint.")
    for moved, earlier in zip(now.controlled.values(), before.controlled.values(), strict=True):
        if type(moved.control) is not type(earlier.control):
            raise ConfigError(f"{moved.group}: a run that is resumed keeps its controller, whose state is in the checkpoint.")
        if not isinstance(moved.control, Fixed) and moved.start != earlier.start:
            raise ConfigError(f"{moved.key}: a run that is resumed goes on from where {moved.group} took it. Leave it out.")
    return replace(now, run_dir=str(folder))


def rehearse(config: RunConfig) -> None:
    """`dry_run=true`: everything short of starting a worker. The model's files, the reward function and every row are looked at."""
    from rlkit.controller.episodes import open_environment, read_prompts
    from rlkit.controller.local import InProcessCluster
    from rlkit.controller.rewards import open_rewards
    from rlkit.controller.reweighting import check_objectives
    from rlkit.data.models.loading import load_tokenizer, num_parameters, resolve
    from rlkit.data.models.lora import num_adapter_parameters
    from rlkit.data.models.reference import check_reference, held_models
    from rlkit.data.rewards.weighted import check_sources
    from rlkit.schedule import schedule
    from rlkit.settings import LoraLearner

    folder = resolve(config.model.path)
    adapters = num_adapter_parameters(folder, config.learner) if isinstance(config.learner, LoraLearner) else 0
    check_reference(config)
    scored = sum(num_parameters(each) for each in held_models(config))
    judging = sum(num_parameters(resolve(path, key=key)) for key, path in config.reward.model_paths.items())
    print(schedule(config, num_parameters(folder), adapters, scored, judging))
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    base_dir, nobody = Path.cwd(), InProcessCluster()  # of which no worker is asked for
    with open_rewards(config, nobody, base_dir=base_dir) as rewards, open_environment(config, base_dir=base_dir) as environment:
        prompts = read_prompts(config, tokenizer, rewards, environment)
    check_sources(config.reward, prompts.everything)
    check_objectives(config, prompts.everything)
    print(f"{len(prompts.train):,} prompts to train on, {len(prompts.held_out):,} held out. Nothing was started: dry_run=true.")


def command_eval(arguments: Sequence[str]) -> int:
    """Held-out evaluation of a checkpoint."""
    parser = _parser("rlkit eval", EVAL, EVAL_EXAMPLES)
    parser.add_argument("folder", nargs="?", help="a run folder, or a checkpoint in Hugging Face format")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the run's")
    if (given := _parse(parser, arguments)) is None:
        return 0
    if given.folder is None or ("=" in given.folder and not Path(given.folder).exists()):
        raise ConfigError("rlkit eval needs a folder first: rlkit eval <run folder or checkpoint> key=value ...")
    checkpoint, run_dir = locate(Path(given.folder))
    config = evaluation_config(checkpoint, run_dir, given.overrides)
    from rlkit.controller.cluster import open_cluster
    from rlkit.controller.evaluate import evaluate_checkpoint
    from rlkit.controller.tracking.format import number

    with open_cluster(config.cluster) as cluster:
        evaluation = evaluate_checkpoint(config, cluster)
    metrics = evaluation.metrics()
    print(f"{checkpoint}: {len(evaluation.prompt_ids)} held-out prompts")
    for name in (name for name in metrics if f"{name}_low" in metrics):
        low, high = number(metrics[f"{name}_low"]), number(metrics[f"{name}_high"])
        print(f"  {name.removeprefix('evaluation/'):<10} {number(metrics[name])}  (95 % interval {low} to {high})")
    return 0


def command_compare(arguments: Sequence[str]) -> int:
    """Tables and curves of runs side by side."""
    parser = _parser("rlkit compare", COMPARE, COMPARE_EXAMPLES)
    parser.add_argument("folders", nargs="*", type=Path, metavar="folder", help="of a run, or of a sweep: all runs in it")
    parser.add_argument("--out", type=Path, default=Path("compare"), help="folder of what is written (default: compare)")
    if (given := _parse(parser, arguments)) is None:
        return 0
    if not given.folders:
        raise ConfigError("rlkit compare needs folders: rlkit compare <run or sweep folder> ...")
    from rlkit.report.compare import compare
    from rlkit.report.write import write

    print(write(compare(given.folders), given.out), end="")
    return 0


def command_reward(arguments: Sequence[str]) -> int:
    """A reward function's trial. The exit code is that of bad data when anything wrong was found."""
    if arguments[:1] == ["fit"]:
        return command_reward_fit(arguments[1:])
    parser = _parser("rlkit reward", REWARD, REWARD_EXAMPLES)
    parser.add_argument("action", choices=["test"])
    parser.add_argument("fn", help="a name in reward_fns/, or file.py:function, or package.module:function")
    parser.add_argument("--data", type=Path, required=True, help="a file of JSON lines, or .parquet")
    parser.add_argument("--rows", type=int, default=8, help="how many of its rows (default: 8)")
    parser.add_argument("--prompt-column", metavar="COLUMN", help="default: prompt")
    parser.add_argument("--answer-column", metavar="COLUMN", help="what a right completion is made from (default: answer)")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="as data.columns.NAME=COLUMN; may be given several times",
    )
    parser.add_argument("--chat", action="store_true", help="as data.chat=true: prompts are sent as messages")
    parser.add_argument("--signature", default="auto", help="the convention it is written in: rlkit, trl, verl, verifiers, plain")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="wall clock per call (default: 10)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    if (given := _parse(parser, arguments)) is None:
        return 0
    import json

    from rlkit.data.files import first_rows
    from rlkit.data.rewards.trial import try_function
    from rlkit.errors import DataError
    from rlkit.settings import Reward

    if given.rows < 1:
        raise ConfigError(f"--rows {given.rows}: write 1 or more.")
    columns = dict(written.partition("=")[::2] for written in given.column)
    for written in given.column:
        if not all(written.partition("=")):
            raise ConfigError(f"--column {written}: write --column name=column, the function's name and the data's.")
    settings = Reward(fn=given.fn, signature=given.signature, timeout_s=given.timeout_s, num_workers=1, max_error_rate=1.0)
    trial = try_function(
        settings,
        first_rows("--data", str(given.data), given.rows),
        base_dir=Path.cwd(),
        prompt_column=given.prompt_column,
        answer_column=given.answer_column,
        columns=columns,
        chat=given.chat,
    )
    print(json.dumps(trial.to_json(), indent=2) if given.json else trial)
    return 0 if trial.is_sound else DataError.exit_code


def command_reward_fit(arguments: Sequence[str]) -> int:
    """A reward model from pairs."""
    parser = _parser("rlkit reward fit", REWARD_FIT, REWARD_FIT_EXAMPLES)
    parser.add_argument("--data", type=Path, required=True, help="a file of JSON lines, or .parquet: prompt, chosen, rejected")
    parser.add_argument("--model", required=True, help="what it starts from: tiny, a folder in Hugging Face format, or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which does not exist yet")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: 200)")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-5, help="default: 1e-5; a tiny model takes a hundred times as much"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="pairs in a step (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the new head and the order of the pairs (default: 0)")
    if (given := _parse(parser, arguments)) is None:
        return 0
    from rlkit.data.models.reward_fit import fit

    fitted = fit(
        given.data,
        given.model,
        given.out,
        steps=given.steps,
        learning_rate=given.learning_rate,
        batch_size=given.batch_size,
        seed=given.seed,
    )
    print(fitted)
    return 0


def locate(folder: Path) -> tuple[Path, Path | None]:
    """The checkpoint that `folder` is, or the newest whole one that it holds, and the run it belongs to, if any."""
    if (folder / "config.json").is_file():
        run_dir = folder.resolve().parent.parent
        return folder, run_dir if (run_dir / "choices.yaml").is_file() else None
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Write a run folder (under runs/) or a checkpoint folder.")
    from rlkit.controller.checkpoint import newest_valid

    found, passed_over = newest_valid(folder)
    if found is None:
        raise ConfigError(f"{folder}: neither a checkpoint (config.json) nor a run with one (checkpoints/*/config.json).")
    for reason in passed_over:
        print(f"Passed over: {reason}")
    return found.folder, folder


def evaluation_config(checkpoint: Path, run_dir: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The run's settings with the checkpoint as the model."""
    from rlkit.compose import compose, read_stored
    from rlkit.settings import HeldOut

    model = {"choice": "path", "path": str(checkpoint)}
    stored: dict[str, Any] | None = None
    if run_dir is None:
        overrides = ["model=path", f"model.path={quoted(str(checkpoint))}", *overrides]
    else:
        stored = read_stored(run_dir)
        stored["model"] |= model
        if stored["evaluation"]["choice"] == "none":
            overrides = ["evaluation=held_out", *overrides]
    config = compose(overrides, stored=stored)
    if not isinstance(config.evaluation, HeldOut):
        raise ConfigError("evaluation=none: nothing to do. Write evaluation=held_out.")
    return config


def quoted(text: str) -> str:
    """As one value of an override, whatever is in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def command_choices(arguments: Sequence[str]) -> int:
    """Groups, options, settings."""
    parser = _parser("rlkit choices", "List every group, what can be chosen in it, and the settings of each choice.")
    parser.add_argument("groups", nargs="*", metavar="group", help="only these")
    parser.add_argument("--json", action="store_true", help="as JSON")
    if (given := _parse(parser, arguments)) is None:
        return 0
    import json

    from rlkit.choices import as_text, describe
    from rlkit.config import suggest

    described = describe()
    for group in given.groups:
        if group not in described["groups"]:
            known = described["groups"]
            raise ConfigError(f"{group}: no such group.{suggest(group, known)} Groups: {', '.join(known)}.")
    if given.json:
        if given.groups:
            described = {"groups": {group: described["groups"][group] for group in given.groups}}
        print(json.dumps(described, indent=2))
    else:
        print(as_text(described, given.groups))
    return 0


def command_divergences(arguments: Sequence[str]) -> int:
    """The ledger."""
    parser = _parser("rlkit divergences", DIVERGENCES)
    parser.add_argument("--seed", type=int, default=0, help="of the tabular policies (default: 0)")
    parser.add_argument("--refused", action="store_true", help="the combinations that are refused, with the reason")
    if (given := _parse(parser, arguments)) is None:
        return 0
    from rlkit.config import penalties
    from rlkit.core.ledger import as_markdown, ledger, refusals

    if given.refused:
        for name, place, estimator, reason in refusals(penalties()):
            print(f"{name} {place.name} {estimator.name}: {reason}")
    else:
        print(as_markdown(ledger(penalties(), seed=given.seed)))
    return 0


def command_model(arguments: Sequence[str]) -> int:
    """Build the tiny model, fetch the pretrained one."""
    parser = _parser("rlkit model", "Build or fetch the models that rlkit knows by name.")
    parser.add_argument("action", choices=["build", "fetch"], help="build tiny: train it again; fetch smollm2_135m: get it once")
    parser.add_argument("name", choices=["tiny", "smollm2_135m"])
    parser.add_argument("--out", type=Path, default=Path("tiny"), help="folder for `build tiny` (default: tiny)")
    if (given := _parse(parser, arguments)) is None:
        return 0
    if (given.action, given.name) == ("build", "tiny"):
        from rlkit.data.models.tiny import build

        print(f"{build(given.out)}: built. Train from it with rlkit train model=path model.path={given.out}")
    elif (given.action, given.name) == ("fetch", "smollm2_135m"):
        from rlkit.data.models.smollm2 import fetch

        print(f"{fetch()}: fetched. Train from it with rlkit train model=smollm2_135m")
    else:
        raise ConfigError(f"model {given.action} {given.name}: write rlkit model build tiny, or rlkit model fetch smollm2_135m.")
    return 0


if __name__ == "__main__":
    main()
