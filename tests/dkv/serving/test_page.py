"""The page of a server: what it is made of, and what it may load."""

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from tests.dkv.serving.loopback import served, serving

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from dkv.serving.page import page  # noqa: E402


class Parts(HTMLParser):
    """The elements of a page, and the text in each of those that have one of their own."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.inside = [], [["", ""]]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside.append([tag, ""])

    def handle_endtag(self, tag):
        self.inside.append(["", ""])

    def handle_data(self, data):
        self.inside[-1][1] += data

    def of(self, tag):
        return [text for name, text in self.inside if name == tag]


def rules_of(headers):
    found = {}
    for rule in headers["content-security-policy"].split("; "):
        name, _, value = rule.partition(" ")
        found[name] = value
    return found


def test_the_page_is_whole_and_its_rules_allow_nothing_else(talking):
    with serving(*talking) as (url, _):
        response = httpx.get(url)
        assert httpx.head(url).status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert response.headers["x-content-type-options"] == "nosniff"
    rules, parts = rules_of(response.headers), Parts(response.text)
    # One style and one script, and those are named by what they say.
    (style,), (data, script) = parts.of("style"), parts.of("script")
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(name) == f"'sha256-{digest}'"
    assert rules == {
        **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
        "connect-src": "'self'",
        "img-src": "data:",
    }
    named = [value for _, attrs in parts.elements for name, value in attrs.items() if name in ("src", "href", "action")]
    assert named == ["data:,"] and not re.search(r"\{\{\w+\}\}", response.text)
    assert not re.search(r"https?:|//\w+\.\w|url\(|@import|\bimport\b|innerHTML|\beval\b", style + script)
    assert not [attrs for _, attrs in parts.elements if any(n == "style" or n.startswith("on") for n in attrs)]
    about = json.loads(data)
    assert about["chat"] and not about["key"] and about["settings"]["max_new_tokens"] == 16
    assert "decode" in about["policies"] and about["max_length"] == 64


def test_every_field_has_a_label_and_the_script_names_only_what_there_is(tiny):
    text, _ = page(served(*tiny), has_key=True)
    parts = Parts(text)
    ids = [attrs["id"] for _, attrs in parts.elements if "id" in attrs]
    labelled = {attrs["for"] for tag, attrs in parts.elements if tag == "label" and "for" in attrs}
    fields = {attrs["id"] for tag, attrs in parts.elements if tag in ("input", "textarea", "select")}
    # The label of the slider stands around it.
    assert len(ids) == len(set(ids)) and fields - labelled == {"step"}
    assert set(re.findall(r'\$\("([\w-]+)"\)', parts.of("script")[-1])) <= set(ids)


def test_no_name_breaks_out_of_the_page(tiny):
    hostile = "</script><script>alert(1)</script>{{data}}"
    about = copy.copy(served(*tiny))
    object.__setattr__(about, "name", hostile)
    text, _ = page(about, has_key=False)
    plain, _ = page(served(*tiny), has_key=False)
    assert text.count("<script") == plain.count("<script")
    assert json.loads(Parts(text).of("script")[0])["model"] == hostile


def test_the_page_needs_no_key_and_knows_that_the_others_do(tiny):
    with serving(*tiny, api_key="secret") as (url, _):
        response = httpx.get(url)
    assert response.status_code == 200 and "secret" not in response.text
    assert json.loads(Parts(response.text).of("script")[0])["key"] is True
