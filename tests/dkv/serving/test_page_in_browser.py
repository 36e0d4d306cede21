"""What is seen on the page of a server while it generates."""

import re
import time

import pytest

from tests.dkv.serving.browser import FOUND, browsing
from tests.dkv.serving.loopback import alone, serving, until

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.skipif(FOUND is None, reason="there is no chromium or google-chrome")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(autouse=True)
def clean(tab):
    tab.said.clear()
    tab.asked.clear()


def opened(tab, url):
    tab.call("Page.navigate", url=url)
    until(lambda: tab.do("document.readyState === 'complete' && typeof generate === 'function'"))


def ask(tab, **fields):
    for name, text in fields.items():
        tab.type(name, text)
    tab.do("$('go').click()")


def wait(tab):
    until(lambda: tab.do("running === null && drawn === null"))


def text(tab, name):
    return tab.do(f"$('{name}').textContent")


def test_a_generation_is_seen(tab, tiny):
    with serving(*tiny) as (url, _):
        opened(tab, url)
        assert tab.do("document.activeElement.id") == "prompt" and tab.do("$('key-line').hidden")
        ask(tab, prompt="1+2=", max_new_tokens="24", block_length="8", more='{"cache": "decode", "refresh": 4}')
        wait(tab)
        assert text(tab, "fault") == "" and text(tab, "state").startswith("finished")
        answer = text(tab, "answer")
        assert answer == alone(*tiny, "1+2=", max_new_tokens=24, block_length=8, cache={"name": "decode", "refresh": 4})
        seen = tab.do("[...document.querySelectorAll('#text .slot')].map((span) => span.textContent)")
        assert seen[0] == "1+2=" and "".join(seen[1:]).startswith(answer) and len(seen) == 25
        assert text(tab, "passes") == str(tab.do("steps"))
        # Of what is beyond an end nothing was decoded.
        count = int(text(tab, "filled").removesuffix(" / 24"))
        assert len(answer) <= count <= len(answer) + 1 and seen[1 + count :] == ["·"] * (24 - count)
        # Of each slot when it was filled; of each step that was told in time, what it computed.
        assert tab.do("decoded.slice(prompt, end).every((at) => at >= 0 && at < steps)")
        first = tab.do("[...new Set(kinds.slice(0, slots))]")
        assert first in ([4], [0]) and tab.do("kinds.length === steps * slots && kinds.includes(COMPUTED)")
        assert "%" in text(tab, "share") and re.fullmatch(r"[\d.]+ s", text(tab, "first"))
        # Earlier steps can be looked at.
        tab.do("$('step').value = 1, $('step').dispatchEvent(new Event('input'))")
        wait(tab)
        masks = tab.do("document.querySelectorAll('#text .slot.mask').length")
        assert masks == tab.do("decoded.slice(prompt).filter((at) => at !== 0).length") > 0
        assert tab.said == [] and tab.asked == [f"{url}/", f"{url}/v1/completions"]


def test_a_talk_is_asked_where_there_is_a_template(tab, talking, tiny):
    with serving(*talking) as (url, _):
        opened(tab, url)
        assert tab.do("$('chat').checked && !$('chat').disabled")
        ask(tab, prompt="1+2=")
        wait(tab)
        assert text(tab, "answer") == alone(*tiny, "1+2=")
        assert tab.asked[-1].endswith("/v1/chat/completions")


def test_stop_cancels_and_faults_are_told(tab, tiny, monkeypatch):
    with serving(*tiny) as (url, worker):
        opened(tab, url)
        assert tab.do("$('chat').disabled")
        ask(tab, prompt="1+2=", more='{"refesh": 1}')
        wait(tab)
        assert "did you mean 'refresh'?" in text(tab, "fault") and text(tab, "state") == "failed"
        ask(tab, more="[1]")
        wait(tab)
        assert "must be a JSON object" in text(tab, "fault")
        step = worker.llm.step
        monkeypatch.setattr(worker.llm, "step", lambda: (time.sleep(0.05), step())[1])
        ask(tab, more=" ", max_new_tokens="50")
        until(lambda: tab.do("steps > 1"))
        assert text(tab, "fault") == "" and "/ 50" in text(tab, "filled")
        tab.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape", windowsVirtualKeyCode=27)
        wait(tab)
        until(lambda: not worker.open)
        assert text(tab, "state") == "stopped" and 1 < tab.do("steps") < 50
    ask(tab)
    wait(tab)
    assert text(tab, "fault").startswith("The server does not answer")


def test_a_key_is_asked_for_and_sent(tab, tiny):
    with serving(*tiny, api_key="secret") as (url, _):
        opened(tab, url)
        assert not tab.do("$('key-line').hidden")
        ask(tab, prompt="1+2=")
        wait(tab)
        assert text(tab, "fault").startswith("401: the API key is missing or wrong")
        ask(tab, key="secret")
        wait(tab)
        assert text(tab, "answer") == alone(*tiny, "1+2=")
        assert tab.do("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_nothing_is_wider_than_a_small_window(tab, tiny):
    with serving(*tiny) as (url, _):
        tab.look(360, 700, "dark")
        opened(tab, url)
        before = tab.do("$('map-box').getBoundingClientRect().top + scrollY")
        ask(tab, prompt="1+2=", block_length="4")
        wait(tab)
        assert tab.do("document.documentElement.scrollWidth <= innerWidth")
        # What is seen stands where it stood.
        assert tab.do("$('map-box').getBoundingClientRect().top + scrollY") == before
        tab.look(1280, 800)
