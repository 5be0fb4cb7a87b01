"""Frames over a socket."""

import os
import resource
import socket
from datetime import date

import numpy as np
import pytest

from rlkit.data.processes.channel import Channel, Unsendable, plain


def test_a_message_arrives_whole_whatever_its_size():
    ours, theirs = map(Channel, socket.socketpair())
    theirs.send({"a": "x" * 10})
    assert ours.has_input()
    assert ours.receive() == {"a": "x" * 10}
    assert not ours.has_input()
    with pytest.raises(TimeoutError):
        ours.receive(timeout_s=0.01)
    theirs.close()
    assert ours.receive() is None
    ours.close()


def test_descriptors_beyond_the_first_thousand_work():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4000), hard))
    first, second = socket.socketpair()
    high = os.dup2(first.fileno(), 1500)
    ours, theirs = Channel(socket.socket(fileno=high)), Channel(second)
    first.close()
    assert not ours.has_input()
    theirs.send({})
    assert ours.has_input()
    ours.close()
    theirs.close()


def test_values_as_json_carries_them():
    assert plain({"a": [np.int64(3), (np.array([1.5]), None)], "b": np.bool_(True)}) == {"a": [3, [[1.5], None]], "b": True}
    with pytest.raises(Unsendable, match="a date"):
        plain([date(2020, 1, 1)])
    with pytest.raises(Unsendable, match="a dict"):
        plain({1: 2})
