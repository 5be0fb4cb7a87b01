from rlkit.data.environments.guessing import Guessing
from rlkit.data.environments.protocol import Step


def test_a_guess_is_told_where_the_secret_lies_and_the_right_one_alone_is_rewarded():
    game = Guessing(higher="+", lower="-")
    game.reset({"secret": 5}, 0)
    assert [game.step(said) for said in ("3", "I say 9.", "none", "4 or 5")] == [
        Step(" +:"),
        Step(" -:"),
        Step(" ?:"),
        Step("", 1.0, done=True),
    ]
    game.reset({"secret": 2}, 0)
    assert game.step("5") == Step(" -:")
