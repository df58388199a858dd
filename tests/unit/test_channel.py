"""Messages between frontends and the engine: whole, in order, never waited for, and dropped once nobody is there."""

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from charonia.serving import channel as channel_module
from charonia.serving.channel import Channel

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    first, second = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    yield first, second
    first.close()
    second.close()


def receive_until(channel: Channel, count: int, flushed: Channel | None = None) -> list[bytes]:
    found: list[bytes] = []
    deadline = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} messages"
        if flushed is not None:
            flushed.flush()
        found += map(bytes, channel.receive())
    return found


def test_messages_of_all_sizes_arrive_whole_and_in_order(pair: Pair) -> None:
    near, far = pair
    sizes = [0, 1, 65_531, 65_532, 65_533, 131_068, 3, 5_000_000, 0, 17]
    messages = [os.urandom(size) for size in sizes]
    kept = [not near.send(message) for message in messages]
    assert not kept[0] and kept[-1] and near.num_unsent > 0
    assert receive_until(far, len(messages), near) == messages
    assert near.num_unsent == 0 and near.send(b"again") and receive_until(far, 1) == [b"again"]


def test_a_message_in_pieces_is_put_together(pair: Pair) -> None:
    near, far = pair
    data = (5).to_bytes(4, "little") + b"hello" + (1).to_bytes(4, "little") + b"!"
    for byte in data[:-1]:
        os.write(near.fileno(), bytes([byte]))
        assert far.receive() in ([], [b"hello"])
    os.write(near.fileno(), data[-1:])
    assert receive_until(far, 1) == [b"!"]


def test_what_was_sent_before_the_end_is_received(pair: Pair) -> None:
    near, far = pair
    near.send(b"last words")
    near.close()
    assert receive_until(far, 1) == [b"last words"]
    assert far.receive() == [] and far.closed
    # Nobody is there any more: neither an error nor a heap of bytes.
    assert far.send(b"x" * 10_000_000) and far.num_unsent == 0


def test_what_is_kept_for_a_peer_that_goes_is_dropped(pair: Pair) -> None:
    near, far = pair
    assert not near.send(b"x" * 10_000_000)
    far.close()
    near.flush()
    assert near.num_unsent == 0
    assert near.receive() == [] and near.closed


def test_a_length_beyond_the_limit_ends_the_connection(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = pair
    near.send(b"good")
    near.send(b"x" * 101)
    monkeypatch.setattr(channel_module, "MAX_MESSAGE_BYTES", 100)
    assert receive_until(far, 1) == [b"good"] and far.closed
    with pytest.raises(ValueError, match="too long"):
        near.send(b"x" * 101)


def test_threads_may_send_side_by_side(pair: Pair) -> None:
    near, far = pair
    payloads = [bytes([i]) * (40_000 + i) for i in range(4)]
    threads = [threading.Thread(target=lambda p=p: [near.send(p) for _ in range(50)]) for p in payloads]
    for thread in threads:
        thread.start()
    found = receive_until(far, 200, near)
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(payload for payload in payloads for _ in range(50))
