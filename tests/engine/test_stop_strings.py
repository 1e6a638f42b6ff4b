"""The stop string that is complete first is found, whatever the pieces in which the text arrives."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.stop_strings import StopMatch, StopMatcher

TEXT = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)
CUTS = st.lists(st.integers(0, 30), max_size=6)


def pieces_of(text, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]


def first_match(text, stops):
    """Obvious: try every end, and the longest stop string first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return StopMatch(stop, end - len(stop), end)
    return None


@given(TEXT, STOPS, CUTS)
def test_the_first_complete_stop_string_is_found(text, stops, cuts):
    matcher = StopMatcher(stops)
    found = None
    for piece in pieces_of(text, cuts):
        found = found or matcher.feed(piece)

    assert found == first_match(text, stops)


@given(TEXT, STOPS, CUTS)
def test_just_the_longest_start_of_a_stop_string_is_held_back(text, stops, cuts):
    matcher = StopMatcher(stops)
    for piece in pieces_of(text, cuts):
        if matcher.feed(piece):
            return

    starts = [stop[:length] for stop in stops for length in range(len(stop))]
    assert matcher.num_held_back == max(len(start) for start in starts if text.endswith(start))


@given(TEXT, TEXT, STOPS)
def test_a_stop_string_that_ends_in_a_passage_to_skip_is_passed_over(skipped, text, stops):
    matcher = StopMatcher(stops)

    assert matcher.feed(skipped, can_match=False) is None
    found = matcher.feed(text)

    later = [first_match_after(skipped + text, stop, len(skipped)) for stop in stops]
    ends = [end for end in later if end is not None]
    assert (found.end if found else None) == min(ends, default=None)


def first_match_after(text, stop, offset):
    ends = [end for end in range(offset + 1, len(text) + 1) if text[:end].endswith(stop)]
    return min(ends, default=None)
