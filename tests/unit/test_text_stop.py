"""Stop strings against an oracle that sees the whole text."""

import pytest
from charonia.text import StopChecker, StopMatch
from hypothesis import given, settings
from hypothesis import strategies as st


def oracle(text: str, stops: list[str], first_end: int = 0) -> tuple[str, str] | None:
    """(text before the match, stop string) of the match that ends first, the longest of those; None without one."""
    for end in range(first_end + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return None


def held_back(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that begins a stop string without being all of it."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )


SMALL = st.text("ab", min_size=1, max_size=5)
STOPS = st.lists(SMALL, min_size=1, max_size=4)
PIECES = st.lists(st.text("abc", max_size=6), max_size=12)


@given(stops=STOPS, pieces=PIECES, include=st.booleans())
@settings(max_examples=400, deadline=None)
def test_against_the_oracle(stops: list[str], pieces: list[str], include: bool) -> None:
    checker = StopChecker(stops, include)
    released = seen = ""
    for piece in pieces:
        seen += piece
        expected = oracle(seen, stops)
        result = checker.push(piece)
        if expected is not None:
            before, stop = expected
            assert isinstance(result, StopMatch) and result.stop_string == stop
            assert released + result.text == before + (stop if include else "")
            return
        assert isinstance(result, str)
        released += result
        assert released == seen[: len(seen) - held_back(seen, stops)]
    assert released + checker.flush() == seen
    assert checker.flush() == ""


@given(stops=STOPS, unarmed=PIECES, armed=PIECES)
@settings(max_examples=200, deadline=None)
def test_matches_that_end_while_unarmed_do_not_count(
    stops: list[str], unarmed: list[str], armed: list[str]
) -> None:
    checker = StopChecker(stops)
    released = ""
    for piece in unarmed:
        result = checker.push(piece, armed=False)
        assert isinstance(result, str)
        released += result
    expected = oracle("".join(unarmed + armed), stops, first_end=len("".join(unarmed)))
    for piece in armed:
        result = checker.push(piece)
        if isinstance(result, StopMatch):
            assert (released + result.text, result.stop_string) == expected
            return
        released += result
    assert expected is None
    assert released + checker.flush() == "".join(unarmed + armed)


def test_the_longest_of_those_that_end_together_wins() -> None:
    result = StopChecker(["end", "the end"]).push("this is the end.")
    assert result == StopMatch("this is ", "the end")


def test_the_earliest_end_wins_over_the_earliest_beginning() -> None:
    result = StopChecker(["abcd", "bc"]).push("xabcd")
    assert result == StopMatch("xa", "bc")


@pytest.mark.parametrize("include", [False, True])
def test_across_pieces(include: bool) -> None:
    checker = StopChecker(["\n\nUser:"], include)
    assert checker.push("Hello\n") == "Hello"
    assert checker.push("\nUs") == ""
    assert checker.push("er: x") == StopMatch("\n\nUser:" if include else "", "\n\nUser:")


def test_a_false_start_is_released_at_once() -> None:
    checker = StopChecker(["aab"])
    assert checker.push("aa") == ""
    assert checker.push("a") == "a"
    assert checker.push("c") == "aac"


def test_without_stop_strings_everything_passes() -> None:
    assert StopChecker([]).push("anything") == "anything"


def test_sequences_share_what_is_known_of_their_stop_strings() -> None:
    """It takes longer than anything else about a sequence, and a request may have 128 of them."""
    first, second = StopChecker(["ab" * 500]), StopChecker(["".join(["ab"] * 500)])
    assert first._failures[0] is second._failures[0]
