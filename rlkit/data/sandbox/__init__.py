"""Runs programs that a model wrote where they reach nothing: bubblewrap, limits, and judgement outside."""

from rlkit.data.sandbox.run import Case, Limits, Outcome, Program, open_sandbox

__all__ = ["Case", "Limits", "Outcome", "Program", "open_sandbox"]
