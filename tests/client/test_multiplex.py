"""Bookkeeping of the requests on one call."""

from types import SimpleNamespace

import pytest
from charonia_client.multiplex import MultiplexedStream


class Harness:
    def __init__(self, limit=4):
        self.log = []
        self.stream = MultiplexedStream(
            limit,
            lambda m: self.log.append(f"send {m.id}"),
            lambda: self.log.append("half-close"),
            lambda: self.log.append("cancel"),
        )
        self.inboxes = {}

    def admit(self, name):
        inbox = []
        sink = inbox.append
        if not self.stream.admit(SimpleNamespace(id=name), sink):
            return False
        self.inboxes[name] = (inbox, sink)
        return True

    def release(self, name):
        self.stream.release(name, self.inboxes[name][1])

    def inbox(self, name):
        return self.inboxes[name][0]


@pytest.fixture
def harness():
    return Harness()


def test_messages_reach_their_requests_and_the_last_end_closes(harness):
    assert harness.admit("a")
    assert harness.admit("b")
    harness.stream.dispatch("b", 1, last=False)
    harness.stream.dispatch("a", 2, last=True)
    harness.stream.dispatch("b", 3, last=True)
    assert (harness.inbox("a"), harness.inbox("b")) == ([2], [1, 3])
    assert harness.log == ["send a", "send b", "half-close"]
    assert not harness.admit("c")


def test_full_streams_and_ids_in_use_are_refused():
    harness = Harness(limit=2)
    assert harness.admit("a")
    assert not harness.admit("a")
    assert harness.admit("b")
    assert not harness.admit("c")
    harness.stream.dispatch("a", 1, last=True)
    assert harness.admit("c")


def test_a_lone_request_is_cancelled_at_once(harness):
    harness.admit("a")
    harness.release("a")
    assert harness.log == ["send a", "cancel"]


def test_neighbours_of_a_released_request_live_on(harness):
    harness.admit("a")
    harness.admit("b")
    harness.release("a")
    assert not harness.admit("c")
    harness.stream.dispatch("a", "unheard", last=False)
    harness.stream.dispatch("b", 1, last=False)
    assert "cancel" not in harness.log
    harness.stream.dispatch("b", 2, last=True)
    assert harness.log == ["send a", "send b", "cancel"]
    assert (harness.inbox("a"), harness.inbox("b")) == ([], [1, 2])


def test_nothing_is_cancelled_once_the_released_request_has_ended(harness):
    harness.admit("a")
    harness.admit("b")
    harness.release("a")
    harness.stream.dispatch("a", "unheard", last=True)
    harness.stream.dispatch("b", 1, last=True)
    assert harness.log == ["send a", "send b", "half-close"]


def test_release_after_the_end_does_nothing(harness):
    harness.admit("a")
    harness.admit("b")
    harness.stream.dispatch("a", 1, last=True)
    harness.release("a")
    assert harness.admit("c")
    assert harness.log == ["send a", "send b", "send c"]


def test_a_broken_call_ends_each_live_request_with_an_error_of_its_own(harness):
    harness.admit("a")
    harness.admit("b")
    harness.release("a")
    harness.stream.fail(lambda: RuntimeError("broken"))
    (error,) = harness.inbox("b")
    assert str(error) == "broken"
    assert harness.inbox("a") == []
    assert not harness.admit("c")
    harness.release("b")
    assert "cancel" not in harness.log


def test_unknown_ids_are_ignored(harness):
    harness.admit("a")
    harness.stream.dispatch("stranger", 1, last=True)
    assert harness.log == ["send a"]
