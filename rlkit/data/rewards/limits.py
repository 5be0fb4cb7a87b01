"""How long a reward function has to answer, by its pool. Workers import this file, so it may not import torch."""

from __future__ import annotations

SHARE = 0.8  # for what the function waits for; in the rest it says what went wrong, before the pool ends the call

_timeout_s = 10.0  # outside of a worker


def allow(timeout_s: float) -> None:
    """The worker's: the limit of the calls that follow."""
    global _timeout_s
    _timeout_s = timeout_s


def deadline_s() -> float:
    """What a call may spend on requests and retries: below `reward.timeout_s`, so that their own error is what is reported."""
    return SHARE * _timeout_s
