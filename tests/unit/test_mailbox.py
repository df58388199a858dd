"""A mailbox loses nothing, whatever writers and reader do at the same time, and leaves nobody polling in vain."""

import select
import threading

from charonia.serving.mailbox import Mailbox


def is_readable(mailbox: Mailbox[int], timeout_ms: int = 0) -> bool:
    poller = select.poll()
    poller.register(mailbox.fileno(), select.POLLIN)
    return bool(poller.poll(timeout_ms))


def test_readable_while_there_is_something_to_take() -> None:
    mailbox: Mailbox[int] = Mailbox()
    assert mailbox.take() == [] and not is_readable(mailbox)
    mailbox.put(1)
    mailbox.put(2)
    assert is_readable(mailbox) and mailbox.take() == [1, 2]
    assert not is_readable(mailbox) and mailbox.take() == []


def test_a_reader_that_polls_gets_everything_in_order_and_then_rests() -> None:
    mailbox: Mailbox[int] = Mailbox()
    count, writers = 5_000, 3

    def write(first: int) -> None:
        for i in range(count):
            mailbox.put(first * count + i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
    for thread in threads:
        thread.start()
    found: list[int] = []
    while len(found) < writers * count:
        assert is_readable(mailbox, 10_000), f"{len(found)} found, and nothing tells of the rest"
        found += mailbox.take()
    for thread in threads:
        thread.join()
    for i in range(writers):
        mine = [item for item in found if item // count == i]
        assert mine == sorted(mine) and len(mine) == count
    # At most the last writer's signal is left over, and one look takes it away.
    mailbox.take()
    assert not is_readable(mailbox)
