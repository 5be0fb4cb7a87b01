"""Teachers: the signal a stronger or frozen model adds to the rewards."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(kw_only=True, slots=True)
class Teacher:
    """Base of the teacher signals."""

    needs: ClassVar[frozenset[str]] = frozenset()


@dataclass(kw_only=True, slots=True)
class NoTeacher(Teacher):
    """No teacher: the policy learns from rewards alone."""
