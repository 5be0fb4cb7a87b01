"""Reward 1 for a completion that is the answer, 0 otherwise."""


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """Compares with the column `answer` as text, without the white space around either. None where the row has no answer."""
    return [
        None if expected is None else float(text.strip() == str(expected).strip())
        for text, expected in zip(completions, answer, strict=True)
    ]
