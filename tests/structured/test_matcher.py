"""Matchers and masks: what may come next, behind drafts too, at the end, and where a grammar is too much."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jaxserve.structured.compiler import GrammarCompiler
from tests.structured.vocabulary import EMPTY, EOS, PERSON, SPECIAL, STOP, TABLE, WORDS, allowed, ids, load, matcher

YES, NO, NAME = (256 + WORDS.index(word) for word in (b"yes", b"no", b"name"))


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(load)
    yield compiler
    compiler.close()


def test_a_mask_holds_every_token_that_can_begin_a_choice(compiler):
    choice = matcher(compiler, choice=["yes", "name no"])
    (mask,) = compiler.masks.make([(choice, [])])
    assert allowed(mask) == {YES, NAME, *ids("yn")}


def test_forced_text_is_said_in_the_tokenizer_s_own_tokens():
    spelling = GrammarCompiler(lambda: (TABLE, ids))
    words = GrammarCompiler(load)
    lying = GrammarCompiler(lambda: (TABLE, lambda text: [NO]))
    padding = GrammarCompiler(lambda: (TABLE, lambda text: [EMPTY, *ids(text)]))
    compilers = (spelling, words, lying, padding)
    matchers = [(compiler, matcher(compiler, choice=["yes"])) for compiler in compilers]
    masks = [compiler.masks.make([(grammar, [])])[0] for compiler, grammar in matchers]
    assert [allowed(mask) for mask in masks] == [set(ids("y")), {YES}, {YES}, {YES}]
    for compiler in compilers:
        compiler.close()


def test_only_the_end_follows_what_is_complete_and_then_the_end_alone(compiler):
    choice = matcher(compiler, choice=["yes", "yes!"])
    choice.consume([YES])
    assert allowed(compiler.masks.make([(choice, [])])[0]) == {EOS, *ids("!")}
    choice.consume([EOS])
    assert choice.has_ended
    assert allowed(compiler.masks.make([(choice, [])])[0]) == {EOS}
    choice.consume([EOS, EOS])
    assert choice.error == ""
    assert choice.num_tokens == 4


def test_a_stop_token_is_allowed_where_the_end_is_and_nowhere_else(compiler):
    number = matcher(compiler, [STOP], regex="[0-9]+")
    first, second = compiler.masks.make([(number, ids("7"))])
    assert STOP not in allowed(first)
    assert allowed(second) >= {STOP, EOS}
    number.consume([*ids("7"), STOP])
    assert number.has_ended
    assert allowed(compiler.masks.make([(number, [])])[0]) == {EOS, STOP}


def test_masks_behind_drafts_are_those_of_a_matcher_that_has_gone_there(compiler):
    text = ids('{"name": "Bo", "age": 7}')
    ahead, behind = matcher(compiler, json=PERSON), matcher(compiler, json=PERSON)
    together = compiler.masks.make([(ahead, text[:12])])
    for index, token_id in enumerate(text[:12]):
        (mask,) = compiler.masks.make([(behind, [])])
        assert allowed(together[index]) == allowed(mask)
        behind.consume([token_id])
    assert allowed(together[12]) == allowed(compiler.masks.make([(behind, [])])[0])
    assert ahead.num_tokens == 0


def test_a_matcher_behind_drafts_goes_its_own_way(compiler):
    text = ids('{"name": "Bo"')
    first = matcher(compiler, json=PERSON)
    first.consume(text[:3])
    behind = [first.behind(text[3:end]) for end in range(3, len(text) + 1)]
    masks = compiler.masks.make([(one, []) for one in behind])
    assert [allowed(mask) for mask in masks] == [allowed(mask) for mask in compiler.masks.make([(first, text[3:])])]
    assert (first.num_tokens, behind[-1].num_tokens) == (3, len(text))
    wrong = first.behind([NO])
    assert wrong.error and not first.error
    assert allowed(compiler.masks.make([(wrong, [])])[0]) == set(range(len(TABLE.tokens)))


def test_a_matcher_behind_a_draft_of_the_end_allows_the_end_alone(compiler):
    choice = matcher(compiler, [STOP], choice=["yes", "yes!"])
    ended = choice.behind([YES, STOP])
    assert ended.has_ended and not choice.has_ended
    assert allowed(compiler.masks.make([(ended.behind([]), [])])[0]) == {EOS, STOP}


def test_a_forbidden_draft_is_in_no_mask_and_frees_the_places_behind(compiler):
    choice = matcher(compiler, choice=["yes"])
    masks = compiler.masks.make([(choice, [*ids("y"), NO, *ids("s")])])
    assert NO not in allowed(masks[1])
    assert allowed(masks[2]) == allowed(masks[3]) == set(range(len(TABLE.tokens)))
    assert choice.count_valid([*ids("y"), NO]) == 1
    choice.consume([YES])
    assert choice.error == ""


def test_places_behind_a_draft_of_the_end_allow_the_end_alone(compiler):
    choice = matcher(compiler, choice=["yes"])
    masks = compiler.masks.make([(choice, [YES, EOS, EOS])])
    assert [allowed(mask) for mask in masks[1:]] == [{EOS}, {EOS}, {EOS}]


def test_rows_of_a_step_have_their_masks_one_after_the_other(compiler):
    rows = [
        (matcher(compiler, choice=["yes"]), [YES]),
        (matcher(compiler, regex="[ab]"), []),
        (matcher(compiler, choice=["no"]), []),
    ]
    masks = compiler.masks.make(rows)
    assert [allowed(mask) for mask in masks] == [{YES}, {EOS}, set(ids("ab")), {NO}]


def test_special_tokens_are_no_text_and_characters_may_come_in_bytes(compiler):
    anything = matcher(compiler, regex="[^x]*")
    (mask,) = compiler.masks.make([(anything, [])])
    assert SPECIAL not in allowed(mask)
    assert ids("é")[0] in allowed(mask)
    anything.consume(ids("é"))
    assert anything.error == ""


def test_a_matcher_behind_an_output_is_one_that_took_it_in(compiler):
    text = ids('{"name": "Bo')
    grammar = matcher(compiler, json=PERSON)
    grammar.consume(text)
    again = compiler.matcher(next(reversed(compiler._compiled)), [], text)
    assert again.num_tokens == len(text)
    assert [allowed(m) for m in compiler.masks.make([(again, [])])] == [
        allowed(m) for m in compiler.masks.make([(grammar, [])])
    ]


def test_a_grammar_beyond_its_limits_ends_with_an_error_and_hurts_no_other(compiler):
    large = matcher(compiler, regex="((a{0,100}){0,100}){0,100}")
    small = matcher(compiler, choice=["yes"])
    for _ in range(400):
        masks = compiler.masks.make([(large, []), (small, [])])
        if large.error:
            break
        large.consume(ids("a"))
    assert "too many expressions" in large.error
    assert allowed(masks[1]) == {YES}
    large.consume(ids("a"))


def test_a_token_that_does_not_fit_is_an_error(compiler):
    choice = matcher(compiler, choice=["yes"])
    choice.consume([NO])
    assert "doesn't satisfy the grammar" in choice.error


@pytest.mark.parametrize(
    ("constraint", "fits", "fails"),
    [
        ({"json_object": True}, '{"a": [1, null]}', "[1"),
        ({"json": PERSON}, '{"name": "é", "age": -3}', '{"age"'),
        ({"json": '{"type": "array", "items": {"type": "boolean"}}'}, "[true, false]", "[1"),
        ({"json": {}}, "[1, 2]", "x"),
        ({"json": PERSON, "disable_any_whitespace": True}, '{"name":"b","age":1}', '{"name": '),
        ({"json": PERSON, "whitespace_pattern": " "}, '{"name" : "b" , "age" : 1}', '{"name"  '),
        ({"json": {"properties": {"a": {}}}, "disable_additional_properties": True}, '{"a":1}', '{"b'),
        ({"regex": r"\d{3}-[a-c]+"}, "123-abc", "12-"),
        ({"choice": ['say "é"', "a\\b\n", "start: x"]}, 'say "é"', "say é"),
        ({"choice": ['say "é"', "a\\b\n", "start: x"]}, "a\\b\n", "a/"),
        ({"grammar": 'root ::= "a" b+\nb ::= [0-9]'}, "a12", "a1b"),
        ({"grammar": 'start: "a" B+\nB: /[0-9]/'}, "a12", "a1b"),
    ],
)
def test_every_kind_of_constraint_takes_what_fits_and_refuses_the_rest(compiler, constraint, fits, fails):
    grammar = matcher(compiler, **constraint)
    assert grammar.error == ""
    assert grammar.count_valid([*ids(fits), EOS]) == len(ids(fits)) + 1
    assert grammar.count_valid(ids(fails)) < len(ids(fails))
