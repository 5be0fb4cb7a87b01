import pytest

from rlkit.data.rewards.pool import RewardItem
from rlkit.data.rewards.weighted import check_sources, open_functions
from rlkit.errors import ConfigError
from rlkit.settings import Reward, WeightedRewards
from rlkit.types import Prompt, RewardStatus

FUNCTIONS = """
from rlkit.data.rewards import unparsable, wrong

def accuracy(completions, answer):
    return [1.0 if c == a else wrong() for c, a in zip(completions, answer)]

def form(completions):
    return [1.0 if c.isdigit() else unparsable() for c in completions]

def split(completions):
    known = {"2": {"right": 1.0, "brief": 0.5}, "3": {"right": 0.0, "brief": 0.25}}
    return [known.get(c) or wrong() for c in completions]

def fussy(completions):
    return [None if c == "skip" else 1 / (c != "raise") for c in completions]
"""


@pytest.fixture
def opened(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)

    def of(*names, **settings):
        fns = {name: f"mine.py:{name}" for name in names}
        return open_functions(WeightedRewards(fns=fns, num_workers=1, max_error_rate=1.0, **settings), base_dir=tmp_path)

    return of


def score(rewards, *samples):
    items = [
        RewardItem(sample_id=f"s{i}", group_id="g", prompt="", completion=text, columns={"answer": "2"}, source=source)
        for i, (text, source) in enumerate(samples)
    ]
    with rewards:
        return rewards.score(items)


def test_the_reward_is_the_weighted_sum_of_named_parts(opened):
    right, wrong, other = score(opened("accuracy", "form", weights={"form": 0.25}), ("2", ""), ("3", ""), ("x", ""))
    assert (right.reward, right.components, right.status) == (1.25, {"accuracy": 1.0, "form": 0.25}, RewardStatus.ok)
    assert (wrong.reward, wrong.components, wrong.status) == (0.25, {"accuracy": 0.0, "form": 0.25}, RewardStatus.wrong)
    assert (other.reward, other.status) == (0.0, RewardStatus.unparsable)


def test_a_function_judges_the_sources_it_is_told(opened):
    results = score(opened("accuracy", "form", sources={"accuracy": ["math"]}), ("2", "math"), ("2", "chat"))
    assert [each.components for each in results] == [{"accuracy": 1.0, "form": 1.0}, {"form": 1.0}]
    with opened("accuracy", sources={"accuracy": ["math"]}) as rewards:
        assert rewards.missing("math", {}) == "answer"
        with pytest.raises(ConfigError, match=r"no function judges the data source chat.* data\.source_column"):
            rewards.missing("chat", {})


def test_a_source_that_no_prompt_is_of_is_refused_with_those_that_there_are():
    def prompt(source):
        return Prompt(id=source, text="", prompt_ids=(1,), source=source, columns={})

    settings = WeightedRewards(fns={"right": "exact_match", "form": "format"}, sources={"form": ["math", "caht", "chta"]})
    message = r"^reward\.sources\.form: no prompt is of the source caht\. The sources are math, chat; data\.source_column "
    with pytest.raises(ConfigError, match=message):
        check_sources(settings, [prompt("math"), prompt("chat"), prompt("math")])
    check_sources(settings, [prompt("math"), prompt("caht"), prompt("chta")])
    check_sources(Reward(fn="format"), [prompt("math")])


def test_a_sample_is_scored_when_all_its_functions_did(opened):
    failed, skipped, fine = score(opened("accuracy", "fussy"), ("raise", ""), ("skip", ""), ("2", ""))
    assert (failed.status, failed.reward) == (RewardStatus.error, None)
    assert "fussy: ZeroDivisionError" in failed.message
    assert failed.statuses == {"accuracy": RewardStatus.wrong, "fussy": RewardStatus.error}
    assert (skipped.status, skipped.reward) == (RewardStatus.skipped, None)
    assert fine.reward == 2.0


def test_parts_of_a_part_are_kept_beside_the_parts_that_share_out_the_reward(opened):
    results = score(opened("split", "form", weights={"split": 0.5}), ("2", ""), ("3", ""), ("x", ""))
    assert [each.components for each in results] == [
        {"split": 0.75, "form": 1.0},
        {"split": 0.125, "form": 1.0},
        {"split": 0.0, "form": 0.0},
    ]
    assert [sum(each.components.values()) for each in results] == [each.reward for each in results]
    assert [each.subparts for each in results] == [
        {"split/right": 1.0, "split/brief": 0.5},  # as the function gave them
        {"split/right": 0.0, "split/brief": 0.25},
        {"split/right": 0.0, "split/brief": 0.0},  # a verdict of 0 names none
    ]


def test_settings_name_functions_that_exist():
    with pytest.raises(ConfigError, match=r"reward.weights.from: there is no such function in reward.fns. It has form"):
        WeightedRewards(fns={"form": "format"}, weights={"from": 1.0})
    with pytest.raises(ConfigError, match=r"reward.fns=\{\}: no function"):
        WeightedRewards(fns={})
    with pytest.raises(ConfigError, match=r"reward.signature=verk: no such convention. Write auto or one of rlkit, trl"):
        Reward(fn="format", signature="verk")
