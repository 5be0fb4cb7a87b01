"""What a reward function can say beside a number. Workers import this file, so it may not import torch."""

from __future__ import annotations


class Verdict(float):
    """A reward, and why it is what it is: it is trained on like any other number, and counted by its status."""

    __slots__ = ("message", "status")

    status: str  # a name of `rlkit.types.RewardStatus`
    message: str

    def __new__(cls, reward: float, status: str, message: str = "") -> Verdict:
        verdict = super().__new__(cls, reward)
        verdict.status, verdict.message = status, message
        return verdict


def wrong(reward: float = 0.0, message: str = "") -> Verdict:
    """The answer was found, and it is not the right one."""
    return Verdict(reward, "wrong", message)


def unparsable(reward: float = 0.0, message: str = "") -> Verdict:
    """No answer was found in the completion."""
    return Verdict(reward, "unparsable", message)
