"""What a reference's models must share with the policy and with each other, said before a worker starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlkit.compose import compose
from rlkit.data.models.reference import check_reference, held_models
from rlkit.errors import ConfigError

KL = ["divergence=reverse_kl"]


def check(policy: str, *overrides: str) -> None:
    check_reference(compose([f"model.path={policy}", *KL, *overrides]))


@pytest.fixture
def copied(random_model, tmp_path):
    """A function (change) -> the folder of a copy of `random_model(tied=True)` that `change(folder)` made another of."""

    def copy(change) -> str:
        folder = Path(shutil.copytree(random_model(tied=True), tmp_path / "other"))
        change(folder)
        return str(folder)

    return copy


def edit(name: str, **changes):
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return change


def other_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def test_fitting_models_pass(random_model, copied):
    policy = random_model(tied=True)
    other = copied(edit("config.json", eos_token_id=5, torch_dtype="bfloat16"))  # which no weight sees
    check(policy, "reference=ema")
    check(policy, "reference=model", f"reference.path={random_model(tied=False)}")  # another model, the same vocabulary
    check(policy, "reference=soup", f"reference.paths=[{policy},{other}]")
    check(policy, "reference=geometric_mixture", f"reference.path={other}")


def test_a_model_of_another_vocabulary_is_refused(random_model, copied):
    other = copied(other_vocabulary)
    for overrides in (
        ["reference=model", f"reference.path={other}"],
        ["reference=geometric_mixture", f"reference.path={other}"],
        ["reference=soup", f"reference.paths=[{random_model(tied=True)},{other}]"],
    ):
        with pytest.raises(
            ConfigError, match=r"reference\.paths?=.*other: its tokenizer is not the policy's \(token 'a' has the id"
        ):
            check(random_model(tied=True), *overrides)


def test_a_model_without_a_tokenizer_is_refused(random_model, copied):
    with pytest.raises(ConfigError, match=r"other: no tokenizer can be read there"):
        check(random_model(tied=True), "reference=model", f"reference.path={copied(no_tokenizer)}")


def test_a_head_of_another_size_is_refused_where_whole_distributions_are_compared(random_model, copied):
    other = copied(edit("config.json", vocab_size=128))  # padded, as families do between their sizes
    sampled, exact = "divergence.estimator=score", "divergence.estimator=exact"
    check(random_model(tied=True), "reference=model", f"reference.path={other}", sampled)
    for overrides in (["reference=model", exact], ["reference=geometric_mixture", sampled]):
        with pytest.raises(ConfigError, match="its output head has 128 entries and the policy's 96"):
            check(random_model(tied=True), *overrides, f"reference.path={other}")


def test_a_soup_of_two_architectures_is_refused(random_model, copied):
    policy = random_model(tied=True)
    with pytest.raises(ConfigError, match=r"not the architecture of reference\.paths=.* \(num_key_value_heads is 2 and 1\)"):
        check(policy, "reference=soup", f"reference.paths=[{policy},{random_model(tied=True, num_key_value_heads=2)}]")
    other = copied(lambda folder: shutil.copy(Path(random_model(tied=False)) / "model.safetensors", folder))
    with pytest.raises(ConfigError, match=r"its weights are not shaped as those of .* \(lm_head\.weight is \(96, 64\) and None\)"):
        check(policy, "reference=soup", f"reference.paths=[{policy},{other}]")


def test_a_folder_that_is_none_is_named_with_its_own_setting(random_model):
    with pytest.raises(ConfigError, match=r"^reference\.path=\./nowhere: no config\.json there"):
        check(random_model(tied=True), "reference=model", "reference.path=./nowhere")


def test_how_many_models_a_scorer_holds(random_model):
    policy, other = random_model(tied=True), random_model(tied=False)

    def held(*overrides: str) -> list[str]:
        return held_models(compose([f"model.path={policy}", *KL, *overrides]))

    assert held("reference=bema") == [policy]
    assert held("reference=model", f"reference.path={other}") == [other]
    assert held("reference=soup", f"reference.paths=[{policy},{other}]") == [policy]
    assert held("reference=geometric_mixture", f"reference.path={other}") == [policy, other]
