"""The template language: printing undoes parsing, and whatever is wrong is shown with a caret under it."""

import copy
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaprompt.errors import TemplateError
from deltaprompt.templates import (
    FILTERS,
    Demos,
    Field,
    Literal,
    Mask,
    Piece,
    Prefix,
    Role,
    Soft,
    Special,
    Template,
    Turn,
    apply_filters,
    parse,
)

# Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "pieces"),
    [
        ("{text} It was {mask}.", (Field("text"), Literal(" It was "), Mask(), Literal("."))),
        ("{text|lower|nodot}", (Field("text", ("lower", "nodot")),)),
        ("{text|lower|lower}", (Field("text", ("lower", "lower")),)),
        ("{text|truncate}", (Field("text"),)),
        ("{text|truncate:tail}", (Field("text"),)),
        ("{text|truncate:head|lower}", (Field("text", ("lower",), cut="head"),)),
        ("{text|truncate:middle}", (Field("text", cut="middle"),)),
        ("{text|keep|strip}", (Field("text", ("strip",), keep=True),)),
        ("{_Text_2}", (Field("_Text_2"),)),
        ("{Mask}{masks}", (Field("Mask"), Field("masks"))),
        ("{soft:20}", (Soft(20),)),
        ("{soft:0020}", (Soft(20),)),
        ("{soft:20:intro}", (Soft(20, name="intro"),)),
        ('{soft:"In summary"}', (Soft(words="In summary"),)),
        (r'{soft:"a \"b\" \\ }{"}', (Soft(words='a "b" \\ }{'),)),
        ('{soft:"two\nlines"}', (Soft(words="two\nlines"),)),
        (
            "{ text | truncate : head }{\tmask\n}{ soft : 20 : a }",
            (Field("text", cut="head"), Mask(), Soft(20, name="a")),
        ),
        ('{soft:"Or so":x}', (Soft(words="Or so", name="x"),)),
        ('{soft:"so":so}', (Soft(words="so"),)),
        ("{soft:5|tied}", (Soft(5, tied=True),)),
        ("{ soft : 5 : intro | tied }", (Soft(5, name="intro", tied=True),)),
        ("{soft:5|lstm}{soft:5|mlp}", (Soft(5, encoder="lstm"), Soft(5, encoder="mlp"))),
        ("{soft:5:a|mlp|tied}", (Soft(5, name="a", tied=True, encoder="mlp"),)),
        ("{meta.word}{a.b.c|lower}", (Field("meta.word"), Field("a.b.c", ("lower",)))),
        ("{meta.mask}{soft.size}", (Field("meta.mask"), Field("soft.size"))),
        ("{special:sep}{ special : eos }", (Special("sep"), Special("eos"))),
        ("{prefix:6}{ prefix.x }", (Prefix(6), Field("prefix.x"))),
        ("a{ prefix : 06 }b", (Literal("a"), Prefix(6), Literal("b"))),
        ("{demos:3}", (Demos(3),)),
        ("{demos:3:nearest}", (Demos(3, "nearest"),)),
        ("{ demos : 3 : seeded }", (Demos(3),)),
        ("{user}{text}{assistant}{mask}", (Role("user"), Field("text"), Role("assistant"), Mask())),
        ("a label's description", (Literal("a label's description"),)),
        ("{{}}", (Literal("{}"),)),
        ("{{{text}}}", (Literal("{"), Field("text"), Literal("}"))),
        ("{{{{text}}}}", (Literal("{{text}}"),)),
        (" ", (Literal(" "),)),
    ],
)
def test_source_parses_to_pieces(source: str, pieces: tuple[Piece, ...]) -> None:
    assert parse(source).pieces == pieces


@pytest.mark.parametrize(
    ("source", "canonical"),
    [
        ("{text|truncate}", "{text}"),
        ("{ text |keep | lower }", "{text|lower|keep}"),
        ("{text|truncate:head|nodot}", "{text|nodot|truncate:head}"),
        ("{soft:007:x}", "{soft:7:x}"),
        (r'{soft: "say \"\\\""}', r'{soft:"say \"\\\""}'),
        ("{{ {text} }}", "{{ {text} }}"),
        ("{soft:5|lstm | tied}", "{soft:5|tied|lstm}"),
        ('{soft:"so": so }{soft:"so":x}', '{soft:"so"}{soft:"so":x}'),
        ("{ demos:3:seeded }{ special : sep }{prefix: 4}", "{demos:3}{special:sep}{prefix:4}"),
    ],
)
def test_printed_source_is_canonical(source: str, canonical: str) -> None:
    assert str(parse(source)) == canonical


def test_fields_masks_softs() -> None:
    template = parse('{soft:3}{b}{soft:"So"}{mask}{a}{soft:3}{b|lower}{mask}{soft:5:x}{soft:"So"}{soft:5:x}')
    assert template.fields == ("b", "a")
    assert template.masks == 2
    assert template.softs == (Soft(3), Soft(words="So"), Soft(3), Soft(5, name="x"))
    assert template.soft_ids == (0, 1, 2, 3, 1, 3)
    assert not template.is_chat
    assert template.turns() == ()


def test_prefix_and_demos_are_found_wherever_they_stand() -> None:
    assert parse("{text} {prefix:4}{demos:2:nearest}").prefix == Prefix(4)
    assert parse("{text} {prefix:4}{demos:2:nearest}").demos == Demos(2, "nearest")
    assert parse("{text}").prefix is None
    assert parse("{text}").demos is None


def test_prefix_is_no_part_of_a_turn() -> None:
    assert parse("\n{user} {prefix:4} {text}").turns() == (Turn("user", (Field("text"),)),)
    assert parse("{prefix:4}\n{user}{text} a {assistant}").turns() == (
        Turn("user", (Field("text"), Literal(" a"))),
        Turn("assistant", ()),
    )


def test_turns_are_without_the_white_space_around_them() -> None:
    chat = parse("\n{system} Be brief.\n{user}\n  {text} ?\n{assistant} It is {mask} \n{user}\n")
    assert chat.is_chat
    assert chat.turns() == (
        Turn("system", (Literal("Be brief."),)),
        Turn("user", (Field("text"), Literal(" ?"))),
        Turn("assistant", (Literal("It is "), Mask())),
        Turn("user", ()),
    )


# Laws -------------------------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True)
WORDS_OF_THE_LANGUAGE = ("mask", "soft", "special", "prefix", "demos", "system", "user", "assistant")
FIELD_NAMES = st.lists(NAMES, min_size=1, max_size=3).map(".".join).filter(lambda n: n not in WORDS_OF_THE_LANGUAGE)
ENCODERS = st.sampled_from([None, "lstm", "mlp"])
FILTER_LISTS = st.lists(st.sampled_from(list(FILTERS)), max_size=3).map(tuple)
BRACY = st.text(st.one_of(st.characters(), st.sampled_from('{}"\\:| ')), max_size=8)
PIECES: st.SearchStrategy[Piece] = st.one_of(
    st.builds(Literal, BRACY),
    st.builds(Field, FIELD_NAMES, FILTER_LISTS, st.booleans()),
    st.builds(Field, FIELD_NAMES, FILTER_LISTS, cut=st.sampled_from(["tail", "head", "middle"])),
    st.just(Mask()),
    st.builds(Soft, st.integers(1, 1000), tied=st.booleans(), encoder=ENCODERS),
    st.builds(Special, st.sampled_from(["bos", "eos", "sep", "cls", "pad"])),
    NAMES.map(lambda name: Soft(len(name), name=f"block_of_{name}")),  # one size a name, and longer than any words
    NAMES.map(lambda name: Soft(len(name), name=f"tied_{name}", tied=True, encoder="mlp")),
    NAMES.map(lambda name: Soft(words=f"{name} in words", name=f"words_{name}")),
    BRACY.filter(str.strip).map(lambda words: Soft(words=words)),
)
ONCE: st.SearchStrategy[Piece] = st.one_of(
    st.builds(Prefix, st.integers(1, 1000)),
    st.builds(Demos, st.integers(1, 1000), st.sampled_from(["seeded", "nearest"])),
)


@st.composite
def bodies(draw: st.DrawFn) -> list[Piece]:
    """Some pieces, and at most one of those that stand once."""
    pieces = draw(st.lists(PIECES, max_size=5))
    if draw(st.booleans()):
        pieces.insert(draw(st.integers(0, len(pieces))), draw(ONCE))
    return pieces


BODIES = bodies()
SAID = st.lists(PIECES, max_size=5)


@st.composite
def chats(draw: st.DrawFn) -> list[Piece]:
    """Turns that alternate, after a system turn or white space or neither."""
    speakers = [Role("user"), Role("assistant")] * 2
    first, last = draw(st.integers(0, 1)), draw(st.integers(2, 4))
    roles = draw(st.sampled_from([[], [Role("system")]])) + speakers[first:last]
    pieces: list[Piece] = [Literal(draw(st.sampled_from(["", "\n", "  "])))]
    for role in roles:
        pieces += [role, *draw(SAID)]
    return pieces


TEMPLATES = (
    st.one_of(BODIES, chats())
    .filter(lambda pieces: any(piece != Literal("") for piece in pieces))
    .map(lambda pieces: Template(tuple(pieces)))
)


@given(TEMPLATES)
def test_parsing_what_is_printed_gives_the_same_tree(template: Template) -> None:
    assert parse(str(template)) == template


@given(TEMPLATES)
def test_no_two_literals_are_adjacent_and_none_is_empty(template: Template) -> None:
    literal = [isinstance(piece, Literal) for piece in template.pieces]
    assert not any(a and b for a, b in pairwise(literal))
    assert Literal("") not in template.pieces


def parsed(source: str) -> Template | None:
    """The template, or none where the source is refused with a `TemplateError`; any other exception is a failure."""
    with suppress(TemplateError):
        return parse(source)
    return None


@given(st.text(st.sampled_from('{}{}{}":|\\ am1\n'), max_size=12))
def test_printing_is_stable_for_any_string_that_parses(source: str) -> None:
    if template := parsed(source):
        assert parse(str(template)) == template
        assert str(parse(str(template))) == str(template)


def test_any_string_gives_a_template_or_a_template_error() -> None:
    signs = '{{{{{}}}}}}||":\\\\ \n\t0.。-é漢\u0301\0\ud800\u2028'
    words = "mask soft user assistant system lower keep truncate head 20 9999999999 {{ }} {text} {mask} {soft:"
    choices, draw = [*signs, *words.split()], random.Random(0)
    sources = ["".join(draw.choices(choices, k=draw.randrange(9))) for _ in range(100_000)]
    templates = [template for source in sources if (template := parsed(source))]
    assert 10_000 < len(templates) < 90_000
    assert all(parse(str(template)) == template for template in templates)


def test_parsing_is_cached() -> None:
    assert parse("{text} {mask}") is parse("{text} {mask}")


TREES: list[Piece | Turn | Template] = [
    Literal("a"),
    Field("a"),
    Mask(),
    Soft(3),
    Special("sep"),
    Prefix(3),
    Demos(3),
    Role("user"),
    Turn("user", ()),
    parse("a"),
]


@pytest.mark.parametrize("tree", TREES)
def test_trees_are_immutable_can_be_keys_and_can_be_copied(tree: Piece | Turn | Template) -> None:
    for field in fields(tree):
        with pytest.raises(FrozenInstanceError):
            setattr(tree, field.name, "b")
    assert {tree: 1}[copy.deepcopy(tree)] == 1
    assert pickle.loads(pickle.dumps(tree)) == tree


# Errors -----------------------------------------------------------------------------------------------------------


def shown(error: TemplateError) -> tuple[str, str, int]:
    """The reason, the line of the template, and the column of the caret."""
    reason, line, caret = str(error).split("\n")
    assert line.startswith("  ")
    assert caret.strip(" ") == "^"
    return reason, line[2:], caret.index("^") - 2


@pytest.mark.parametrize(
    ("source", "column", "fragment"),
    [
        ("", 0, "the template is empty; write for example '{text} It was {mask}.'"),
        # braces
        ("a } b", 2, "this '}' closes nothing; write '}}' for a brace"),
        ("{text}}", 6, "this '}' closes nothing"),
        ("a {text", 2, "this '{' is never closed; end it with '}', or write '{{' for a brace"),
        ("a {", 2, "this '{' is never closed"),
        ("{a} {text|lower  ", 4, "this '{' is never closed"),
        ("{{{", 2, "this '{' is never closed"),
        ("{}", 1, "expected a field, mask, soft, special, prefix, demos or a role, got '}'; write '{{' for a brace"),
        ('{"a": 1}', 1, "expected a field, mask, soft, special, prefix, demos or a role, got '\"'"),
        ("{2nd}", 1, "got '2'"),
        ("{text.}", 5, "expected '|' or '}' after 'text', got '.'; a name is made of the letters a-z and A-Z"),
        (
            "{text.2}",
            5,
            "got '.'; a name is made of the letters a-z and A-Z, digits and _, that of a field also of dots",
        ),
        ("{a.b..c}", 4, "expected '|' or '}' after 'a.b', got '.'"),
        ("{text-a}", 5, "got '-'"),
        ("{texté}", 5, "got 'é'"),
        ("{text It was {mask}", 6, "expected '|' or '}' after 'text', got 'I'"),
        ("{text:tail}", 5, "after a field's name only truncate takes ':'"),
        # filters and flags
        (
            "{text|}",
            6,
            "expected a filter, got '}'; possible: strip, nodot, lower, dot, nodots, chop, uncap, truncate, keep",
        ),
        ("{text|lower|lowr}", 12, "there is no filter 'lowr'; did you mean 'lower'?"),
        ("{text|trunc}", 6, "there is no filter 'trunc'; did you mean 'truncate'"),
        (
            "{text|zzz}",
            6,
            "there is no filter 'zzz'; possible: strip, nodot, lower, dot, nodots, chop, uncap, truncate, keep",
        ),
        ("{text|lower:3}", 11, "expected '|' or '}' after 'lower', got ':'"),
        ("{text|keep:tail}", 10, "expected '|' or '}' after 'keep', got ':'"),
        ("{text|truncate:}", 15, "expected a side after 'truncate:', got '}'; possible: tail, head, middle"),
        ("{text|truncate: tial}", 16, "truncate says where to cut, got 'tial'; did you mean 'tail'?"),
        ("{text|truncate|keep}", 15, "truncate or keep stands once, got 'keep' after 'truncate'; leave one out"),
        ("{text|keep|lower|truncate}", 17, "got 'truncate' after 'keep'"),
        ("{text|keep|keep}", 11, "got 'keep' after 'keep'"),
        # masks and roles
        ("{mask|lower}", 5, "expected '}' after 'mask', got '|'; write {mask}: it takes no filters and no arguments"),
        ("{mask:2}", 5, "expected '}' after 'mask', got ':'"),
        ("{user:hi}", 5, "expected '}' after 'user', got ':'; write {user}: it takes no filters"),
        ("Hello {user}{text}", 0, "nothing may stand before the first role, {user}; move it into a turn"),
        ("  Hello {user}{text}", 2, "nothing may stand before the first role"),
        (" {mask}{assistant}", 1, "nothing may stand before the first role, {assistant}"),
        ("{user}a{system}b{user}", 7, "{system} comes first or not at all, got it after {user}; move it to the start"),
        ("{system}a{system}b{user}", 9, "{system} comes first or not at all, got it after {system}"),
        ("{user}a{user}b", 7, "two turns of {user} in a row; join them, or put another role between"),
        ("{system}Be brief.", 0, "the last turn is {system}; end with {user} or {assistant}"),
        # soft blocks
        ("{soft}", 5, "expected ':' after 'soft', got '}'; write {soft:20}, {soft:20:name} or {soft:\"some words\"}"),
        ("{soft:}", 6, "expected a number or quoted words after 'soft:', got '}'; write {soft:20}"),
        ("{soft:intro}", 6, "expected a number or quoted words after 'soft:', got 'i'"),
        ("{soft:'So'}", 6, "expected a number or quoted words after 'soft:', got \"'\""),
        ("{soft:-1}", 6, "got '-'"),
        ("{soft:1.5}", 7, "expected '}' after the soft block, got '.'"),
        ("{soft:20|lower}", 9, "a soft block is tied or has a network, got 'lower'; possible: tied, lstm, mlp"),
        ("{soft:20|lstn}", 9, "got 'lstn'; did you mean 'lstm'?"),
        ("{soft:20|}", 9, "expected tied, lstm or mlp, got '}'; a soft block takes no filters"),
        ("{soft:20|lstm|tied|mlp}", 19, "tied and one network stand once, got 'mlp' after 'lstm'; leave one out"),
        ("{soft:20|tied|tied}", 14, "got 'tied' after 'tied'"),
        ("{soft:20|tied:a}", 13, "expected '}' after the soft block, got ':'"),
        ('{soft:"a" | tied}', 12, "a block that begins from words is neither tied nor computed by a network; give"),
        ("{soft:٣}", 6, "got '٣'"),
        ("{soft: 0}", 7, "a soft block has 1 to 1000 tokens, got 0"),
        ("{soft:1001:a}", 6, "a soft block has 1 to 1000 tokens, got 1001"),
        ("{soft:" + "9" * 50 + "}", 6, "a soft block has 1 to 1000 tokens, got 999999999"),
        ("{soft:20:}", 9, "expected a name after ':', got '}'; a name is made of the letters"),
        ('{soft:20:"a"}', 9, "expected a name after ':', got '\"'"),
        ('{soft:"a":2}', 10, "expected a name after ':', got '2'"),
        ('{soft:" "}', 6, "a soft block needs at least one word to begin from; write {soft:20}"),
        ('{soft:"So}', 6, "this '\"' is never closed; end the words with '\"'"),
        ('{soft:"So\\', 9, "a '\\' in words stands only before"),
        ('{soft:"S\\o"}', 8, "a '\\' in words stands only before '\"' or '\\'; write '\\\\' for a backslash"),
        ("{soft:5:a} {soft:6:a}", 11, "{soft:6:a} was {soft:5:a} before; one name is one block: rename one, or write"),
        ('{soft:5:a}{soft:"a"}', 10, '{soft:"a"} was {soft:5:a} before'),
        ('{soft:"b":a}{soft:"c":a}', 12, '{soft:"c":a} was {soft:"b":a} before'),
        ("{soft:5:a} {soft:5:a|tied}", 11, "{soft:5:a|tied} was {soft:5:a} before"),
        # special tokens
        (
            "{special}",
            8,
            "expected ':' after 'special', got '}'; write {special:sep}; possible: bos, eos, sep, cls, pad",
        ),
        ("{special:}", 9, "expected a name after 'special:', got '}'; possible: bos, eos, sep, cls, pad"),
        ("{special: mask}", 10, "there is no special token 'mask'; write {mask}"),
        ("{special:sepp}", 9, "there is no special token 'sepp'; did you mean 'sep'?"),
        ("{special:<sep>}", 9, "expected a name after 'special:', got '<'"),
        ("{special:sep|lower}", 12, "expected '}' after 'sep', got '|'; write {special:sep}: it takes no filters"),
        # prefixes
        ("{prefix}", 7, "expected ':' after 'prefix', got '}'; write {prefix:6}"),
        ("{prefix:six}", 8, "expected a number after 'prefix:', got 's'; write {prefix:6}"),
        ("{prefix:6:a}", 9, "expected '}' after the length of the prefix, got ':'"),
        ("{prefix: 0}", 9, "a prefix has 1 to 1000 rows, got 0"),
        (
            "{prefix:6} a {prefix:4}",
            13,
            "prefix stands once in a template, got {prefix:4} after {prefix:6}; leave one out",
        ),
        # demonstrations
        ("{demos}", 6, "expected ':' after 'demos', got '}'; write {demos:3} or {demos:3:nearest}"),
        ("{demos:a}", 7, "expected a number after 'demos:', got 'a'"),
        ("{demos:3:}", 9, "expected a way of choosing after ':', got '}'; possible: seeded, nearest"),
        ("{demos:3:nearst}", 9, "demos says how examples are chosen, got 'nearst'; did you mean 'nearest'?"),
        ("{demos:3|lower}", 8, "expected '}' after the demonstrations, got '|'"),
        ("{demos:0}", 7, "there are 1 to 1000 demonstrations, got 0"),
        ("{demos:2} {demos:2}", 10, "demos stands once in a template, got {demos:2} after {demos:2}"),
        ("{demos:2}{user}{text}", 0, "nothing may stand before the first role"),
    ],
)
def test_error_says_what_is_wrong_and_where(source: str, column: int, fragment: str) -> None:
    with pytest.raises(TemplateError) as caught:
        parse(source)
    got, line, at = shown(caught.value)
    assert fragment in got
    assert (line, at) == (source, column)


def test_size_of_thousands_of_digits_is_a_template_error() -> None:
    with pytest.raises(TemplateError, match="1 to 1000 tokens, got 999999999"):  # int() would be a ValueError
        parse("{soft:" + "9" * 5000 + "}")


@pytest.mark.parametrize(
    ("source", "line", "column", "number"),
    [
        ("one\ntwo {text|kep}\nthree", "two {text|kep}", 10, "(line 2)"),
        ("\n\n  {}", "  {}", 3, "(line 3)"),
        ("\n hi \n{user}", " hi ", 1, "(line 2)"),
        ("a {\n", "a {", 2, "(line 1)"),
        ("a\t\0\r{}", "a   {}", 5, ""),
        ("漢字{}", "漢字{}", 5, ""),  # wide characters fill two columns each
        ("e\u0301{}", "e\u0301{}", 2, ""),  # and combining ones none
    ],
)
def test_caret_is_under_the_place_in_its_line(source: str, line: str, column: int, number: str) -> None:
    with pytest.raises(TemplateError) as caught:
        parse(source)
    reason, *place = shown(caught.value)
    assert place == [line, column]
    assert reason.endswith(number)


@pytest.mark.parametrize("before", [0, 1, 59, 60, 61, 500])
@pytest.mark.parametrize("after", [0, 1, 59, 60, 61, 500])
def test_long_line_is_shown_around_the_place(before: int, after: int) -> None:
    with pytest.raises(TemplateError) as caught:
        parse("a" * before + "{?}" + "b" * after)
    _, line, column = shown(caught.value)
    assert line[column - 1 : column + 2] == "{?}"
    assert len(line) <= 121
    assert set(line) <= set("ab{?}…")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: Field("mask"),
            "'mask' cannot be a field: it is a word of the language (mask, soft, ",
        ),
        (lambda: Field("my-text"), "'my-text' is not a name; a name is made of the letters"),
        (lambda: Field("text", ("lowr",)), "there is no filter 'lowr'; did you mean 'lower'?"),
        (lambda: Field("text", ("keep",)), "there is no filter 'keep'; possible: strip, nodot, lower"),
        (lambda: Field("text", cut="haed"), "truncate says where to cut, got 'haed'; did you mean 'head'?"),  # type: ignore[arg-type]
        (
            lambda: Field("text", keep=True, cut="head"),
            "the field 'text' is kept, so it has no side to cut; drop",
        ),
        (lambda: Soft(), "a soft block has either a size or words, got None, None"),
        (lambda: Soft(3, "So"), "a soft block has either a size or words, got 3, 'So'"),
        (lambda: Soft(3, name="my name"), "'my name' is not a name"),
        (lambda: Soft(words="So", name="my name"), "'my name' is not a name"),
        (lambda: Soft(words="So", tied=True), "a block that begins from words is neither tied nor computed"),
        (lambda: Soft(words="So", encoder="mlp"), "a block that begins from words is neither tied nor computed"),
        (lambda: Soft(3, encoder="lstn"), "there is no encoder 'lstn'; did you mean 'lstm'?"),  # type: ignore[arg-type]
        (lambda: Special("mask"), "there is no special token 'mask'; write {mask}"),  # type: ignore[arg-type]
        (lambda: Prefix(0), "a prefix has 1 to 1000 rows, got 0"),
        (lambda: Demos(0), "there are 1 to 1000 demonstrations, got 0"),
        (lambda: Demos(2, "near"), "demos says how examples are chosen, got 'near'"),  # type: ignore[arg-type]
        (lambda: Field("a..b"), "'a..b' is not a name; a name is made of the letters"),
        (lambda: Field("prefix"), "'prefix' cannot be a field: it is a word of the language"),
        (lambda: Template((Prefix(2), Prefix(2))), "prefix stands once in a template"),
        (lambda: Role("usr"), "there is no role 'usr'; did you mean 'user'?"),  # type: ignore[arg-type]
        (lambda: Template(()), "the template is empty"),
        (lambda: Template((Literal(""),)), "the template is empty"),
        (lambda: Template((Soft(3, name="a"), Soft(4, name="a"))), "{soft:4:a} was {soft:3:a} before"),
        (lambda: Template((Role("system"),)), "the last turn is {system}"),
    ],
)
def test_tree_built_by_hand_obeys_the_same_rules(build: Callable[[], object], reason: str) -> None:
    with pytest.raises(TemplateError) as caught:
        build()
    assert str(caught.value).startswith(reason)


# Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text", "filtered"),
    [
        ([], " A gem. ", " A gem. "),
        (["strip"], " A gem.\n", "A gem."),
        (["lower"], "A Gem É", "a gem é"),
        (["nodot"], "A gem.", "A gem"),
        (["nodot"], "  A gem . ", "  A gem"),
        (["nodot"], "好电影。", "好电影"),
        (["nodot"], "A gem!", "A gem!"),
        (["nodot"], "A gem ", "A gem "),
        (["nodot"], "v. 1.5 of it", "v. 1.5 of it"),
        (["nodot"], "A gem...", "A gem..."),
        (["nodot"], ".", ""),
        (["nodot"], "", ""),
        (["nodot", "strip", "lower"], " A Gem. ", "a gem"),
        (["nodot", "nodot"], "A gem. .", "A gem"),
        (["dot"], "A gem", "A gem."),
        (["dot"], "A gem.", "A gem.."),
        (["nodots"], "..A. gem. ..", "A. gem. "),
        (["nodots"], "...", ""),
        (["chop"], "A gem!", "A gem"),
        (["chop"], "", ""),
        (["uncap"], "A Gem", "a Gem"),
        (["uncap"], "", ""),
        (["chop", "uncap"], "A Gem.", "a Gem"),
    ],
)
def test_filters_apply_from_left_to_right(names: list[str], text: str, filtered: str) -> None:
    assert apply_filters(text, names) == filtered
    assert Field("text", tuple(names)).value({"text": text}) == filtered


def test_unknown_filter_names_the_nearest() -> None:
    with pytest.raises(TemplateError, match="there is no filter 'Strip'; did you mean 'strip'"):
        apply_filters("a", ["Strip"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"txt": "a", "label": "b"}, "the example has no field 'text'; possible: txt, label; did you mean 'txt'?"),
        ({"review": "a", "stars": "5"}, "the example has no field 'text'; possible: review, stars"),
        ({}, "the example has no field 'text'; there are none"),
        ({"text": None}, "row has no text in 'text', got None; fill it in or leave the row out"),
        ({"text": float("nan")}, "row has no text in 'text', got nan; fill it in or leave the row out"),
        ({"text": 3}, "the field 'text' is not text, got int 3; turn it into a string first"),
        ({"text": b"a"}, "the field 'text' is not text, got bytes b'a'; turn it into a string first"),
    ],
)
def test_value_that_is_missing_or_no_text_is_an_error(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(TemplateError) as caught:
        Field("text").value(fields)
    assert str(caught.value) == reason
