from __future__ import annotations

import pytest

from megatron.config.source import read_file, read_override, scalar
from megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.5e+3", -500.0),
        ("1_000", 1000),
        ("-12", -12),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("no", False),
        ("~", None),
        ("", None),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("969,30,1", "969,30,1"),
        (".nan", ".nan"),
        ("-.inf", "-.inf"),
        ("1e999", "1e999"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("tRue", "tRue"),
        ("_1", "_1"),
    ],
)
def test_scalars(text, value):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_keys_are_texts_and_lines_are_kept(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text("# note\nno: 1\n2023:\n  - x\n  - [y, z]\n1e4: {a: b}\n")
    tree = read_file(path)
    assert list(tree) == ["no", "2023", "1e4"]
    assert [node.mark.line for node in tree.values()] == [2, 3, 6]
    assert tree["2023"].at([1, 0]).mark.line == 5
    assert str(tree["2023"].at([1, 0]).mark) == f"{path}:5"
    assert tree["2023"].plain() == ["x", ["y", "z"]]


def test_json_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.yml"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1,\n "b": [true, null],}')
    assert {key: node.plain() for key, node in read_file(path).items()} == {
        "a": 1,
        "b": [True, None],
    }


def test_anchors_and_merge_keys(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text("base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}\nlist: [*b]\n")
    tree = read_file(path)
    assert tree["other"].plain() == {"x": 1, "y": 3}
    assert tree["list"].plain() == [{"x": 1, "y": 2}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"# only a comment\n\n", "empty"),
        (b"a: 1\n\tb: 2\n", ":2: not valid YAML"),
        (b"a:\n\t- 1\n", "tabs"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"- a\n- b\n", "a list"),
        (b"just words\n", "a single value"),
        (b"a: 1\nb: 2\na: 3\n", ":3: a: written twice (first in line 1)"),
        (b"a: {b: 1, b: 1}\n", "b: written twice"),
        (b"a: !!python/object/apply:os.system [ls]\n", "tag"),
        (b"a: !custom 1\n", "tag"),
        (b"a: &x [*x]\n", "alias"),
        (b"a: *nowhere\n", "not valid YAML"),
        (b"? [1, 2]\n: 3\n", "key must be"),
        (b"ok: 1\n\xff\xfe: 2\n", ":2: not UTF-8"),
        (b"a: \x00\n", "not valid YAML"),
        (b"[" * 1500, "nested too deeply"),
        (b"a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
         b"c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
         b"e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]\n",
         "nested aliases"),
    ],
)  # fmt: skip
def test_bad_files_are_one_clear_message(tmp_path, content, said):
    path = tmp_path / "bad.yml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_file(path)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        read_file(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(tmp_path)


def test_overrides():
    path, node = read_override("optimizer.params.lr=1e-4")
    assert (path, node.plain()) == (["optimizer", "params", "lr"], 1e-4)
    assert str(node.mark) == "--set optimizer.params.lr=1e-4"
    assert read_override("a={b: [1, x=y]}")[1].plain() == {"b": [1, "x=y"]}
    assert read_override("a=")[1].plain() is None
    assert read_override("a='1'")[1].plain() == "1"


@pytest.mark.parametrize("argument", ["", "a", "=1", "a..b=1", ".a=1", "a=[1", "a={b: 1, b: 2}"])
def test_bad_overrides(argument):
    with pytest.raises(ConfigError, match="--set"):
        read_override(argument)
