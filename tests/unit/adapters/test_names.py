"""The grammar of names and model references: what is read, what is refused, and how a refusal reads."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidReference
from adapters.names import LATEST, MAX_VERSION, ModelReference, check_digest, check_name, excerpt

HEX = "0123456789abcdef" * 4

GOOD = {
    "sql": ModelReference(None, "sql", alias="latest"),
    "0": ModelReference(None, "0", alias=LATEST),
    "a" * 63: ModelReference(None, "a" * 63),
    "acme/sql-v2.1_x": ModelReference("acme", "sql-v2.1_x"),
    "sql:prod": ModelReference(None, "sql", alias="prod"),
    "acme/sql:v3": ModelReference("acme", "sql", alias="v3"),
    "sql@v3": ModelReference(None, "sql", version=3),
    f"sql@v{MAX_VERSION}": ModelReference(None, "sql", version=MAX_VERSION),
    f"acme/sql@sha256:{HEX}": ModelReference("acme", "sql", digest=HEX),
}

BAD_NAMES = [
    "",
    ".",
    "..",
    "/..",
    "../a",
    "a/..",
    "a..b",
    "a..",
    ".a",
    "-a",
    "_a",
    "A",
    "a b",
    "a\n",
    "\na",
    "a\r",
    "a\x00",
    "a\x1b[31m",
    "a" * 64,
    "é",
    "ａ",  # full-width a
    "а",  # Cyrillic a
    "a\u0660",  # a digit to \d, not to us
    "a\u200b",
    "\ud800",
    "a%2f",
    "a\\b",
    "a,b",
    "a'--",
    "*",
]

BAD_REFERENCES = [
    *BAD_NAMES,
    "/a",
    "a/",
    "a/b/c",
    "//a",
    "a:",
    ":a",
    "a:b:c",
    "a:Prod",
    "a:prod\n",
    "a@",
    "a@3",
    "a@v",
    "a@v0",
    "a@v01",
    "a@v-1",
    "a@v+1",
    "a@v1 ",
    "a@v1\n",
    "a@v1_0",
    "a@v١",
    "a@V1",
    "a@v1000000000",
    "a@v1@v1",
    "a:prod@v1",
    "a@latest",
    f"a@sha256:{HEX[:-1]}",
    f"a@sha256:{HEX}0",
    f"a@sha256:{HEX}\n",
    f"a@sha256:{HEX.upper()}",
    f"a@md5:{HEX}",
    f"a@{HEX}",
    "@v1",
]


@pytest.mark.parametrize("text", GOOD)
def test_reads_each_form(text: str) -> None:
    assert ModelReference.parse(text) == GOOD[text]
    assert str(GOOD[text]) == text


def test_the_latest_alias_has_one_spelling() -> None:
    assert ModelReference.parse("a:latest") == ModelReference.parse("a")
    assert str(ModelReference.parse("a:latest")) == "a"


@pytest.mark.parametrize("text", BAD_REFERENCES, ids=ascii)
def test_refuses_malformed_references(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        ModelReference.parse(text)
    message = str(caught.value)
    assert caught.value.param == "model"
    assert "expected" in message
    assert "[<tenant>/]<name>" in message


@pytest.mark.parametrize("text", BAD_NAMES, ids=ascii)
def test_refuses_malformed_names(text: str) -> None:
    with pytest.raises(InvalidReference, match=r"The alias .* is malformed; expected 1 to 63") as caught:
        check_name(text, what="alias")
    assert caught.value.param == "alias"


@pytest.mark.parametrize(
    "text", ["", HEX[:-1], HEX + "0", HEX + "\n", HEX.upper(), "../" + HEX[3:], "g" * 64]
)
def test_refuses_malformed_digests(text: str) -> None:
    with pytest.raises(InvalidReference, match="64 lower-case hex digits"):
        check_digest(text)


@pytest.mark.parametrize("version", [0, -1, MAX_VERSION + 1, 10**30])
def test_refuses_versions_out_of_range(version: int) -> None:
    with pytest.raises(InvalidReference, match="expected 1 to 999999999"):
        ModelReference(None, "a", version=version)


def test_refuses_two_selectors() -> None:
    with pytest.raises(InvalidReference, match="one of alias, version and digest"):
        ModelReference(None, "a", alias="prod", version=1)


def test_messages_show_little_and_nothing_raw() -> None:
    assert excerpt("a\n\x1b[31m\u202e") == r"'a\n\x1b[31m\u202e'"
    assert excerpt("x" * 40) == "'" + "x" * 40 + "'"
    assert excerpt("x" * 10**6) == "'" + "x" * 39 + "... (1000000 characters)"
    with pytest.raises(InvalidReference) as caught:
        ModelReference.parse("\U0001f600\n" * 10**5)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


_NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True).filter(lambda name: ".." not in name)
_SELECTORS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(dict, alias=_NAMES),
    st.builds(dict, version=st.integers(1, MAX_VERSION)),
    st.builds(dict, digest=st.from_regex(r"[0-9a-f]{64}", fullmatch=True)),
)


@given(tenant=st.none() | _NAMES, name=_NAMES, selector=_SELECTORS)
def test_str_and_parse_are_inverse(tenant: str | None, name: str, selector: dict[str, Any]) -> None:
    reference = ModelReference(tenant, name, **selector)
    assert ModelReference.parse(str(reference)) == reference


@given(st.text() | st.text(alphabet="a/:@v1.-sha256"))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        reference = ModelReference.parse(text)
    except InvalidReference as error:
        outcome = str(error)
    else:
        assert str(reference) in (text, text.removesuffix(f":{LATEST}"))
        outcome = str(reference)
    assert outcome.isprintable()
    assert outcome.isascii()
