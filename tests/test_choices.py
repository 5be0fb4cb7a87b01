"""What `rlkit choices` says is what the code and conf/ hold."""

import json
from dataclasses import fields

import pytest

from rlkit.choices import as_text, describe
from rlkit.config import CHOICES, RunConfig
from rlkit.overrides import options


@pytest.fixture(scope="module")
def described() -> dict:
    return describe()


def test_every_group_option_and_setting_is_listed(described: dict):
    assert list(described["groups"]) == [*CHOICES, "experiment"]
    for group, choices in described["groups"].items():
        assert list(choices) == options(group)
        for name, cls in CHOICES.get(group, {}).items():
            assert [each["name"] for each in choices[name]["settings"]] == [f"{group}.{field.name}" for field in fields(cls)]
    assert [each["name"] for each in described["settings"]] == [f.name for f in fields(RunConfig) if f.name not in CHOICES]


def test_everything_is_plain_data(described: dict):
    assert json.loads(json.dumps(described)) == described


def test_every_option_has_a_description(described: dict):
    for group, choices in described["groups"].items():
        for name, option in choices.items():
            assert option["description"].endswith((".", "2402.03300).")), f"{group}={name}: {option['description']!r}"
            assert not option["description"].startswith("Base of"), f"{group}={name}"


def test_a_setting_has_type_default_and_the_comment_beside_it(described: dict):
    settings = {each["name"]: each for each in described["groups"]["divergence"]["reverse_kl"]["settings"]}
    assert settings["divergence.coef"] == {
        "name": "divergence.coef",
        "type": "a number",
        "default": 0.05,
        "required": False,
        # inherited from the base
        "help": "multiplies the term, or the target's temperature; where a controller is chosen, its start",
    }
    assert settings["divergence.estimator"]["type"].startswith("one of score, reference_weighted, naive, k1, k2, k3, k1_weighted")
    assert settings["divergence.estimator"]["default"] == "score"
    (path,) = [each for each in described["groups"]["data"]["jsonl"]["settings"] if each["name"] == "data.path"]
    assert (path["required"], path["default"]) == (True, None)


def test_a_preset_says_what_it_sets(described: dict):
    assert described["groups"]["data"]["gsm8k_jsonl"]["sets"] == {
        "data": "jsonl",
        "data.prompt_column": "question",
        "data.chat": True,
    }
    published = described["groups"]["experiment"]["grpo_published"]["sets"]
    assert published["divergence"] == "reverse_kl"
    assert published["divergence.coef"] == 0.04
    assert published["experiment"] == "quickstart"


def test_the_text_shows_values_as_one_would_write_them(described: dict):
    text = as_text(described, ["evaluation", "cluster"])
    assert "evaluation.ks=[1,4,16]" in text
    assert "cluster.num_cpus=null" in text
    assert "evaluation.every=0 " in text
    assert "divergence" not in text
    assert "num_steps=100" in as_text(described, [])
