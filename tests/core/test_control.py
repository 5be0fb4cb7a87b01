import json
from dataclasses import asdict, is_dataclass

from rlkit.core.control import Fixed


def test_a_fixed_coefficient_stays_where_it_was_set_whatever_is_measured():
    control = Fixed()
    state = control.initial(0.3)
    for measured in (0.0, 1e9, -5.0, float("nan"), float("inf")):
        state = control.update(state, measured=measured, num_sequences=8)
        assert state.coef == 0.3
    assert state == control.initial(0.3)


def test_the_state_survives_json_bit_for_bit():
    state = Fixed().initial(0.1 + 0.2)  # 0.30000000000000004
    assert is_dataclass(state)
    assert type(state)(**json.loads(json.dumps(asdict(state)))) == state
