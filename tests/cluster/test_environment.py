"""A variable of the environment is set for a block, and is as before afterwards."""

import os

import pytest

from cluster.environment import environment_variable

NAME = "A_VARIABLE_OF_THIS_TEST"


@pytest.mark.parametrize("before", [None, "", "earlier"])
def test_a_variable_is_as_before_also_after_an_error(monkeypatch, before):
    if before is not None:
        monkeypatch.setenv(NAME, before)
    with pytest.raises(KeyError), environment_variable(NAME, "now"):
        assert os.environ[NAME] == "now"
        raise KeyError
    assert os.environ.get(NAME) == before
