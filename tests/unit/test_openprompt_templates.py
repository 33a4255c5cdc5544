"""OpenPrompt's templates: every piece and option of the language, all files that came with it, and no code run."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import deltaprompt as dp
from deltaprompt.errors import TemplateError
from deltaprompt.features import Features
from deltaprompt.templates import Template, parse
from deltaprompt.types import Example
from tests.tokenizers_zoo import build


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ('{"placeholder": "text_a"} It was {"mask"}.', "{text_a} It was {mask}."),
        ("{'placeholder': 'text_a'}{'mask'}", "{text_a}{mask}"),
        ('{"placeholder":"text_a","shortenable":True} {"mask":None}', "{text_a} {mask}"),
        ('{"placeholder":"text_a","shortenable":False} {"mask"}', "{text_a|keep} {mask}"),
        ('{"meta":"word"} {"meta":"passage","shortenable":True}', "{meta.word|keep} {meta.passage}"),
        ('{"mask"} {"mask"}', "{mask} {mask}"),
        # soft tokens
        ('{"soft"} {"soft": None} {"mask"}', "{soft:1} {soft:1} {mask}"),
        ('{"soft": None, "duplicate": 5}{"mask"}', "{soft:5}{mask}"),
        ('{"soft": None, "duplicate": 5, "same": True}{"mask"}', "{soft:5|tied}{mask}"),
        ('{"soft": None, "duplicate": 5, "same": False}{"mask"}', "{soft:5}{mask}"),
        ('{"soft": None, "same": True}{"mask"}', "{soft:1}{mask}"),
        ('{"soft": "In summary"} it was {"mask"}', '{soft:"In summary"} it was {mask}'),
        ('so {"soft": "In summary"}it', 'so{soft:" In summary"}it'),
        (
            '{"soft":None} {"soft":"the","soft_id":1} {"soft":"it","soft_id":3} {"soft_id":1} {"soft":"was"} {"mask"}',
            '{soft:1}{soft:" the":soft_1}{soft:" it":soft_3}{soft:" the":soft_1}{soft:" was"} {mask}',
        ),
        ('{"soft_id": 2} a {"soft_id": 2}', "{soft:1:soft_2} a {soft:1:soft_2}"),
        ('{"soft_id": 2, "duplicate": 3, "same": True}{"soft_id": 2}', "{soft:3:soft_2|tied}{soft:3:soft_2|tied}"),
        ('{"soft": "so","soft_id":1}{"soft":"so","soft_id":1}', '{soft:"so":soft_1}{soft:"so":soft_1}'),
        (
            '{"soft": "is"}{"soft":"is"}{"soft": "a"}{"soft":"a"}',  # blocks of their own, there and here
            '{soft:"is"}{soft:"is":again_1}{soft:"a"}{soft:"a":again_3}',
        ),
        # special tokens, text
        (
            '{"placeholder":"text_a"} {"special": "<sep>"} so {"special":"<eos>"}',
            "{text_a}{special:sep} so{special:eos}",
        ),
        ('{"meta": "context"} {"text": "\\nAssistant:"} {"mask"}', "{meta.context|keep} \nAssistant: {mask}"),
        ('{"text": "a{b}c"}{"mask"}', "a{{b}}c{mask}"),
        ('{"text": "a}b"}{"mask"}', "a}}b{mask}"),  # a brace in quotes is none; OpenPrompt ends the piece there
        ("""{"text": 'it"s }'}{"mask"}""", 'it"s }}{mask}'),
        (r'{"text": "\"}"}{"mask"}', '"}}{mask}'),
        ('a } b {"mask"}', "a }} b {mask}"),
        ('"{"meta":"x"}" ? {"mask"}', '"{meta.x|keep}" ? {mask}'),
        # blanks
        ('   It was   {"mask"}   .   ', " It was {mask} ."),
        ('{"placeholder":"text_a"}  {"placeholder":"text_b"}', "{text_a} {text_b}"),
        ('{"placeholder":"text_a"}{"placeholder":"text_b"} ', "{text_a}{text_b}"),
        ('a  b {"mask"}', "a  b {mask}"),
        ('a\t{"mask"}\n', "a\t{mask}\n"),
        ('a {"mask", "add_prefix_space"}', "a{mask}"),
        ('a{"placeholder": "text_a", "add_prefix_space": " "}', "a {text_a}"),
        ('a {"placeholder": "text_a", "add_prefix_space": ""}', "a{text_a}"),
        # functions
        ('{"placeholder":"text_a","post_processing":lambda s: s[:-1]}', "{text_a|chop}"),
        ('{"placeholder":"text_a","post_processing": lambda   x :x+"."}', "{text_a|dot}"),
        ("""{"placeholder":"text_a","post_processing":"lambda x:x.strip('.')"}""", "{text_a|nodots}"),
        ('{"meta":"a","post_processing":lambda s: s[:1].lower() + s[1:]}', "{meta.a|uncap|keep}"),
        ('{"meta":"a","post_processing":lambda text: text}', "{meta.a|keep}"),
        ('{"meta":"a","post_processing":lambda text: (text.strip())}', "{meta.a|strip|keep}"),
        ('{"meta":"a","post_processing":None}', "{meta.a|keep}"),
    ],
)
def test_pieces_mean_what_they_mean_there(theirs: str, ours: str) -> None:
    template = Template.from_openprompt(theirs)
    assert str(template) == ours
    assert parse(ours) == template


def test_soft_tokens_of_p_tuning_are_computed() -> None:
    template = dp.Template.from_openprompt('{"soft"}{"soft":None,"duplicate":3,"same":True} {"mask"}', encoder="lstm")
    assert str(template) == "{soft:1|lstm}{soft:3|tied|lstm} {mask}"


FIELDS = {"text_a": "A gem.", "text_b": "So it is", "meta.word": "gem"}


@given(st.sampled_from(["A gem.", "", ".", "..A..", "É a", "a. b ."]))
def test_filters_do_what_the_functions_do(text: str) -> None:
    functions = {  # written again here, as Python
        "lambda x: x + '.'": lambda x: x + ".",
        "lambda x: x[:-1]": lambda x: x[:-1],
        "lambda x: x[:1].lower() + x[1:]": lambda x: x[:1].lower() + x[1:],
        "lambda x: x.strip('.')": lambda x: x.strip("."),
        "lambda x: x.strip()": lambda x: x.strip(),
        "lambda x: x.lower()": lambda x: x.lower(),
        "lambda x: x": lambda x: x,
    }
    from deltaprompt.templates.openprompt import FUNCTIONS

    assert FUNCTIONS.keys() == functions.keys()
    for written, function in functions.items():
        field = Template.from_openprompt(f'{{"placeholder": "t", "post_processing": {written}}}').pieces[0]
        assert not isinstance(field, str)
        assert field.value({"t": text}) == function(text)  # type: ignore[union-attr, no-untyped-call]


def shown(error: TemplateError) -> tuple[str, int]:
    reason, _, caret = str(error).split("\n")
    return reason, caret.index("^") - 2


@pytest.mark.parametrize(
    ("theirs", "column", "reason"),
    [
        ('a {"mask"', 2, "this '{' is never closed; end the piece with '}'"),
        ('a {"text": "b}', 2, "this '{' is never closed"),
        ('{"mask"} {"placeholder": }', 9, "is no piece of OpenPrompt's: "),
        ("a {} {'mask'}", 2, '{} is no piece of OpenPrompt\'s; write {"mask"}, {"placeholder": "text_a"}'),
        ("{{'mask'}}", 0, "OpenPrompt has no key {'mask'}"),
        ("{text} {'mask'}", 0, "OpenPrompt has no key text"),
        ('{"placehoder": "text_a"}', 0, "OpenPrompt has no key 'placehoder'; did you mean 'placeholder'?"),
        ('{**{"mask": None}}', 0, "OpenPrompt has no key **"),
        ('{"mask", "mask"}', 0, "'mask' stands twice in a piece; leave one out"),
        ('{"mask", "soft"}', 0, "got soft and mask"),
        ('{"duplicate": 3}', 0, "got none of them"),
        ('{"mask": 3}', 0, 'a mask stands alone; write {"mask"}'),
        ('{"mask", "duplicate"}', 0, "a piece of 'mask' has no 'duplicate'; its options: none. Leave 'duplicate' out"),
        ('{"text": "a", "shortenable": True}', 0, "a piece of 'text' has no 'shortenable'"),
        (
            '{"soft", "post_processing"}',
            0,
            "a piece of 'soft' has no 'post_processing'; its options: soft_id, duplicate",
        ),
        ('{"placeholder"}', 0, "'placeholder' has no name after it; write {'placeholder': …}"),
        ('{"placeholder": 3}', 0, "'placeholder' is a str, got 3"),
        ('{"placeholder": open("x")}', 0, "'placeholder' is a str, got open('x')"),
        ('{"placeholder": "a", "shortenable": 1}', 0, "'shortenable' is a bool, got 1"),
        ('{"placeholder": "my text"}', 0, "'my text' is not a name"),
        ('{"meta": "mask it"}', 0, "'meta.mask it' is not a name"),
        ('{"soft": None, "duplicate": "5"}', 0, "'duplicate' is a int, got '5'"),
        ('{"soft": None, "duplicate": True}', 0, "'duplicate' is a int, got True"),
        ('{"soft": None, "duplicate": 0}', 0, "a soft block has 1 to 1000 tokens, got 0"),
        ('{"soft": "so", "duplicate": 2}', 0, "a soft block has either words or 'duplicate'; leave one out"),
        ('{"soft": "a", "soft_id": 1} {"soft": "a", "soft_id": 0}', 28, "'soft_id' is a number from 1 on, got 0"),
        ('{"soft":"a","soft_id":1}{"soft":"b","soft_id":1}', 24, "block of 'soft_id' 1 is {soft:\"a\":soft_1} already"),
        ('{"soft_id":1}{"soft_id":1,"duplicate":2}', 13, "block of 'soft_id' 1 is {soft:1:soft_1} already; write its"),
        ('{"special": "sep"}', 0, "a special token is written <sep>, got 'sep'"),
        ('{"special": "<unk>"}', 0, "there is no special token 'unk'; possible: bos, eos, sep, cls, pad"),
        ('{"special": "<mask>"}', 0, '<mask> is no place of an answer in OpenPrompt; write {"mask"} for one'),
        ('{"mask", "add_prefix_space": "a"}', 0, "is no piece of OpenPrompt's"),
        ('{"mask": None, "add_prefix_space": "a"}', 0, "'add_prefix_space' is a blank or nothing, got 'a'"),
        (
            'a {"placeholder": "t", "post_processing": lambda x: "\\n\\n".join(x)}',
            2,
            "'post_processing': lambda x: '\\n\\n'.join(x) is not; join the texts in the data, into one field",
        ),
        (
            '{"placeholder": "t", "post_processing": lambda x: x.rstrip(string.punctuation)}',
            0,
            "lambda x: x.rstrip(string.punctuation) is not; |nodot takes a final full stop away",
        ),
        ('{"placeholder": "t", "post_processing": str.lower}', 0, "str.lower is not; |lower makes all letters small"),
        (
            '{"placeholder": "t", "post_processing": lambda x, y: x}',
            0,
            "lambda x, y: x is not; do it to the data before",
        ),
        ('{"placeholder": "t", "post_processing": lambda x="b": x}', 0, "lambda x='b': x is not"),
        ('{"placeholder": "t", "post_processing": lambda *x: x}', 0, "lambda *x: x is not"),
        ('{"placeholder": "t", "post_processing": "lambda x"}', 0, "'post_processing' is a function, got 'lambda x'"),
        ('{"placeholder": "t", "post_processing": __import__("os").abort()}', 0, "__import__('os').abort() is not"),
    ],
)
def test_what_is_refused_is_named(theirs: str, column: int, reason: str) -> None:
    with pytest.raises(TemplateError) as caught:
        Template.from_openprompt(theirs)
    got, at = shown(caught.value)
    assert reason in got
    assert at == column


@pytest.mark.parametrize("text", ["", "  ", "It was great.", "0\tOther\tnothing"])
def test_text_without_a_piece_is_no_template(text: str) -> None:
    with pytest.raises(TemplateError, match="OpenPrompt's templates have pieces in braces"):
        Template.from_openprompt(text)


@given(st.text(st.sampled_from("{}\"\"'':,[()]\\ a1\n*=.masklbd"), max_size=30))
def test_any_text_is_a_template_or_a_template_error(text: str) -> None:
    try:
        template = Template.from_openprompt('{"mask"}' + text)
    except TemplateError:
        return
    assert parse(str(template)) == template


@pytest.mark.parametrize("depth", [100, 10_000])
def test_deep_nesting_is_a_template_error(depth: int) -> None:
    for sign in ("{}", "()", "[]"):
        with pytest.raises(TemplateError):
            Template.from_openprompt('{"mask": ' + sign[0] * depth + sign[1] * depth + "}")


def test_files_have_a_template_a_line(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text('\ufeff It was {"mask"}. \n\n{"placeholder":"text_a"} {"mask"}\r\n', encoding="utf-8")
    assert [str(t) for t in Template.all_from_openprompt(path)] == [" It was {mask}.", "{text_a} {mask}"]
    path.write_text('{"mask"}\n{"maks"}\n', encoding="utf-8")
    with pytest.raises(
        TemplateError, match=r"templates.txt, line 2: OpenPrompt has no key 'maks'; did you mean 'mask'"
    ):
        Template.all_from_openprompt(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(TemplateError, match=r"templates.txt has no template in it; write one a line"):
        Template.all_from_openprompt(path)
    with pytest.raises(TemplateError, match="absent.txt cannot be read as a file of templates"):
        Template.all_from_openprompt(tmp_path / "absent.txt")


# Blanks, against OpenPrompt's own way: each piece is tokenised alone, with a blank where one stands before it

PIECE = re.compile(r"(\{[^{}]*\})")
KEYS = re.compile(r'"(placeholder|meta|special)": ?"([^"]+)"')


def piecewise(line: str, tokenizer: PreTrainedTokenizerFast, fields: dict[str, str]) -> list[int]:
    """The ids that OpenPrompt puts between the tokenizer's own special tokens."""
    ids: list[int] = []
    for at, text in enumerate(PIECE.split(line.rstrip())):
        before = " " if at and ends_with_blank(line, PIECE.split(line.rstrip())[:at]) else ""
        if at % 2 == 0:
            blank = " " if text.startswith(" ") else before
            words = blank + text.strip(" ") if text.strip(" ") else ""
        elif found := KEYS.search(text):
            kind, name = found.groups()
            if kind == "special":
                ids.append(tokenizer.convert_tokens_to_ids(tokenizer.special_tokens_map[f"{name.strip('<>')}_token"]))
                continue
            words = before + fields[f"meta.{name}" if kind == "meta" else name]
        else:
            ids.append(tokenizer.mask_token_id)
            continue
        ids += tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    return ids


def ends_with_blank(line: str, before: list[str]) -> bool:
    """Whether a blank stands where these pieces of a line end."""
    return line[: len("".join(before))].endswith(" ")


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_tokens_are_those_of_openprompts_pieces(name: str, data_dir: Path) -> None:
    tokenizer, lines = build(name), 0
    for path in sorted((data_dir / "verbalizers_templates").rglob("*templ*.txt")):
        for line in path.read_text().splitlines():
            if '"mask"' not in line or "soft" in line or "post_processing" in line:
                continue
            template = Template.from_openprompt(line.rstrip())
            fields = {field: f"the {field.removeprefix('meta.')} was good" for field in template.fields}
            features = Features(tokenizer, template, "masked", 400, ("a", "b"), soft_base=len(tokenizer))
            got = features.encode([Example(fields)])[0].variants[0].ids
            assert got[1:-1] == piecewise(line, tokenizer, fields), line
            lines += 1
    assert lines > 40


# The files that came with OpenPrompt

REFUSED = {
    "RelationClassification/SemEval/temp.txt": "OpenPrompt's templates have pieces in braces",  # a table of words
    "UltraChat/template.txt": "lambda x: '\\n\\n'.join(x) is not; join the texts in the data, into one field",
}


def test_every_template_file_is_read_or_refused_with_a_reason(data_dir: Path) -> None:
    folder = data_dir / "verbalizers_templates"
    names = ("temp", "generation_verbalizer")  # a generation verbalizer is a template of the answer for each label
    files = [path for path in sorted(folder.rglob("*.txt")) if any(name in path.name for name in names)]
    read: dict[str, tuple[Template, ...]] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if name in REFUSED:
            with pytest.raises(TemplateError) as caught:
                Template.all_from_openprompt(path)
            assert REFUSED[name] in str(caught.value)
        else:
            read[name] = Template.all_from_openprompt(path)
    assert len(read) == 45
    assert sum(map(len, read.values())) == 91
    lines = {path.relative_to(folder).as_posix(): path.read_text().splitlines() for path in files}
    for name, templates in read.items():
        assert len(templates) == sum(bool(line.strip()) for line in lines[name])
        for line, template in zip(filter(str.strip, lines[name]), templates, strict=True):
            assert parse(str(template)) == template
            assert line.count('"mask"') == template.masks
            soft = line.count('"soft"')
            assert soft == sum(str(piece).startswith("{soft") for piece in template.pieces)
    assert str(read["TextClassification/agnews/mixed_template.txt"][0]) == (
        '{text_a} {text_b}{soft:" This"} topic{soft:" is about"} {mask}.'
    )
    assert str(read["LMBFF/SNLI/manual_template.txt"][0]) == "{text_a|chop}?{mask},{text_b|uncap}"
