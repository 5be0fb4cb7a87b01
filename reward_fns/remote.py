"""Rewards that another machine computes: one HTTP request per completion."""

from rlkit.data.rewards.http import post, variable
from rlkit.data.rewards.limits import deadline_s

URL = variable("RLKIT_REWARD_URL", "where to send completions")


async def reward(prompts, completions, **columns) -> list[float | None]:
    """POSTs {"prompt": text, "completion": text, "columns": the row} to $RLKIT_REWARD_URL, which answers {"reward": number}; null
    where it cannot judge.

    Broken connections and busy servers are tried again for 0.8 of `reward.timeout_s`. `reward.calls_at_once` requests are under
    way at once.
    """
    rows = [{name: values[index] for name, values in columns.items()} for index in range(len(completions))]
    return [
        (await post(URL, {"prompt": prompt, "completion": text, "columns": row}, deadline_s=deadline_s()))["reward"]
        for prompt, text, row in zip(prompts, completions, rows, strict=True)
    ]
