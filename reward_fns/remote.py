"""Rewards that another machine computes: one HTTP request per completion."""

from rlkit.data.rewards.http import post, variable

URL = variable("RLKIT_REWARD_URL", "where to send completions")
DEADLINE_S = 8.0  # of a request with its retries; below the usual reward.timeout_s, so that its own error is what is reported


async def reward(prompts, completions, **columns) -> list[float | None]:
    """POSTs {"prompt": text, "completion": text, "columns": the row} to $RLKIT_REWARD_URL, which answers {"reward": number}; null
    where it cannot judge.

    Broken connections and busy servers are tried again within the deadline. `reward.calls_at_once` of them are under way at once.
    """
    rows = [{name: values[index] for name, values in columns.items()} for index in range(len(completions))]
    return [
        (await post(URL, {"prompt": prompt, "completion": text, "columns": row}, deadline_s=DEADLINE_S))["reward"]
        for prompt, text, row in zip(prompts, completions, rows, strict=True)
    ]
