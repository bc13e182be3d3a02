"""Threads run functions in turn, and none waits for ever."""

import threading

import pytest

from revseg.replay import call


def test_a_function_that_waits_for_another_thread_is_told(monkeypatch):
    monkeypatch.setattr(call, "_PATIENCE", 0.01)
    inside, done = threading.Event(), threading.Event()

    def hold():
        with call.Turn():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with (
        pytest.raises(RuntimeError, match=r"waited 0 s for another thread's function: does a function wait"),
        call.Turn(),
    ):
        pass
    done.set()
    thread.join()
    with call.Turn():
        pass
