"""The models that a reference is made of: where they are, and whether they fit the policy and each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from rlkit.config import RunConfig
from rlkit.core.references import GeometricMixture, ModelReference, Reference, Soup, average
from rlkit.data.models.loading import checkpoint_shapes, checkpoint_tensors, load_tokenizer, resolve
from rlkit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Of a model's config.json: what two fine-tunings of one model may differ in, and neither weights nor computation see.
INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


def other_models(reference: Reference) -> list[tuple[str, str]]:
    """`key=value` of every setting that names a model beside the policy's, and its folder; in order, and twice if named twice."""
    match reference:
        case ModelReference() | GeometricMixture():
            return [(f"reference.path={reference.path}", resolve(reference.path, key="reference.path"))]
        case Soup():
            return [(f"reference.paths={path}", resolve(path, key="reference.paths")) for path in reference.paths]
        case _:
            return []


def held_models(config: RunConfig) -> list[str]:
    """Folders of the models whose sizes a scorer keeps in memory: a soup is as large as one of its models."""
    others = [folder for _, folder in other_models(config.reference)]
    match config.reference:
        case ModelReference() | Soup():
            return others[:1]
        case _:
            return [resolve(config.model.path), *others]


def check_reference(config: RunConfig) -> None:
    """Raises ConfigError where the reference's models cannot score the policy's tokens, or make no soup: before a worker starts."""
    if "ref_logprobs" not in config.needs:
        return
    reference, trust = config.reference, config.model.trust_remote_code
    if not (others := other_models(reference)):
        return
    policy = resolve(config.model.path)
    whole = isinstance(reference, GeometricMixture) or "ref_hidden" in config.needs  # distributions, entry by entry
    ours, size = _vocabulary("model.path", policy, trust), _architecture(policy, trust)["vocab_size"]
    for setting, folder in others:
        _check_vocabulary(ours, _vocabulary(setting, folder, trust), setting)
        if whole and (theirs := _architecture(folder, trust)["vocab_size"]) != size:
            raise ConfigError(
                f"{setting}: its output head has {theirs} entries and the policy's {size}, and whole distributions are compared. "
                "Write a reference of the policy's family, or a divergence.estimator that looks at sampled tokens."
            )
    if isinstance(reference, Soup):
        (first, folder), *more = others
        for setting, other in more:
            _check_same_model(first, folder, setting, other, trust)


def _vocabulary(setting: str, folder: str, trust_remote_code: bool) -> dict[str, int]:
    """Token -> id."""
    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code).get_vocab()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting}: no tokenizer can be read there ({type(error).__name__}), so nobody knows what its token ids mean. Put "
            "tokenizer.json and tokenizer_config.json beside its weights."
        ) from error


def _check_vocabulary(ours: Mapping[str, int], theirs: Mapping[str, int], setting: str) -> None:
    if ours == theirs:
        return
    token = min(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    raise ConfigError(
        f"{setting}: its tokenizer is not the policy's (token {token!r} has the id {theirs.get(token)} there and {ours.get(token)} "
        "here), so it would score other texts. Write a model of the policy's family."
    )


def _architecture(folder: str, trust_remote_code: bool) -> dict[str, Any]:
    """What config.json says of the computation, defaults filled in."""
    from transformers import AutoConfig  # takes a second to import, and the controller holds no model

    settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).to_dict()
    return {name: value for name, value in settings.items() if name not in INCIDENTAL and not name.endswith("_token_id")}


def _check_same_model(first: str, folder: str, setting: str, other: str, trust_remote_code: bool) -> None:
    """An average of weights is of equal computations."""
    mine, theirs = _architecture(folder, trust_remote_code), _architecture(other, trust_remote_code)
    if differing := sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)):
        key = differing[0]
        raise ConfigError(
            f"{setting}: not the architecture of {first} ({key} is {theirs.get(key)} and {mine.get(key)}), and their weights have "
            "no average. Write models that were trained from one base."
        )
    shapes, their_shapes = checkpoint_shapes(folder), checkpoint_shapes(other)
    if differing := sorted(name for name in {*shapes, *their_shapes} if shapes.get(name) != their_shapes.get(name)):
        name = differing[0]
        raise ConfigError(
            f"{setting}: its weights are not shaped as those of {first} ({name} is {their_shapes.get(name)} and "
            f"{shapes.get(name)}). Write models that were trained from one base."
        )


def pour_soup(model: nn.Module, ingredients: Sequence[tuple[str, float]]) -> None:
    """Put the average of several checkpoints, (folder, share) each, into `model`, one tensor at a time."""
    shares = [share for _, share in ingredients]
    for name, parameter in model.named_parameters():
        tensors = [checkpoint_tensors(folder, [name])[name] for folder, _ in ingredients]
        parameter.data.copy_(average(tensors, shares))
