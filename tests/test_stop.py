"""Signals: the exception that was asked for comes out, whatever a library makes of it; handlers come back."""

import os
import signal

import pytest

from wandapp.errors import Interrupted
from wandapp.stop import Stoppable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_and_the_handler_comes_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name), Stoppable(Interrupted):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_an_exception_that_a_library_lost_is_raised_again():
    with pytest.raises(Interrupted) as caught, Stoppable(Interrupted):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Interrupted:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_without_a_signal_stays_itself():
    with pytest.raises(ValueError), Stoppable(Interrupted):
        raise ValueError
