"""What processes tell one another, as far as one of them shows it; `tests/test_many_hosts.py` starts two."""

import pytest

from jmoe.config import InputError
from jmoe.distributed import AnyProcess, Distributed, check_same, from_first, together


@pytest.mark.parametrize(
    "options, message",
    [
        ({"processes": 2}, "need distributed.coordinator HOST:PORT"),
        ({"coordinator": "auto", "process": 0}, "need distributed.coordinator HOST:PORT"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "distributed.coordinator is 'host'; it must be HOST:"),
        ({"coordinator": "host:1"}, "distributed.process = None of distributed.processes = None: give both"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "distributed.process = 2 of .* = 2: give both"),
        ({"timeout": 0}, "distributed.timeout is 0; it must be at least 1"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        Distributed(**options)


def test_options_that_can_be():
    for options in ({}, {"coordinator": "auto"}, {"coordinator": "[::1]:80", "processes": 1, "process": 0}):
        assert Distributed(**options).timeout == 60


def test_one_process_agrees_with_itself():
    assert [from_first(number) for number in (-1, 0, 1 << 30)] == [-1, 0, 1 << 30]
    check_same("things", {"a": [1, None]})
    flag = AnyProcess()
    assert [flag(False), flag(True), flag(False)] == [False, True, False]


def test_an_error_within_is_raised_as_it_is():
    with pytest.raises(InputError, match="^no$"), together(InputError):
        raise InputError("no")
    with pytest.raises(KeyError), together(InputError):
        raise KeyError("not of the kind that is told")
