"""The page, the picture and the JSON made of a record: what they show is what happened."""

import base64
import gzip
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

import dkv
from dkv.engine.output import Stats
from dkv.tools import trace
from dkv.tools.trace import picture
from dkv.tools.trace.record import COMPUTED, HIDDEN, KINDS

HOSTILE = ["</script><script>alert(1)</script>", "<!--", "&lt;", *"\u2028\u2029\n\t", "{{data}}", '"', "\x07"]
BYTES = {40: b"\xe6", 41: b"\x97", 42: b"\xa5", **{i: text.encode() for i, text in enumerate(HOSTILE)}}
IDS = torch.tensor([[5, 9, 63, 11]])


class Tokens:
    """A tokenizer of 64 ids: some of them hostile, three that make one character, one special."""

    all_special_ids = (62,)

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        parts = (b"<|end|>" if i == 62 else BYTES.get(i, f" w{i}".encode()) for i in ids)
        return b"".join(parts).decode("utf-8", "replace")


@pytest.fixture
def found(llada):
    call = {"max_new_tokens": 8, "block_length": 4, "steps": 6, "cache": dkv.DecodeCache(3), "seed": 2**61 + 1}
    return trace.record(llada, Tokens(), IDS, **call)


def long_trace(steps: int, slots: int, prompt: int) -> trace.Trace:
    """As `DecodeCache` would leave it, in a random order."""
    draw = np.random.default_rng(0)
    decoded = np.full(slots, -1)
    decoded[prompt:] = draw.permutation(np.arange(slots - prompt) * steps // (slots - prompt))
    at = np.arange(steps)[:, None]
    computed = (decoded >= at - 1) & (np.arange(slots) >= prompt) | (at % 32 == 0)
    confidences = np.where(decoded >= at, np.log(draw.random((steps, slots))), np.nan).astype("f4")
    return trace.Trace(
        model="m",
        policy="DecodeCache(refresh=32)",
        prompt=prompt,
        blocks=(prompt,),
        ids=np.zeros(slots, int),
        texts=(" word",) * slots,
        special=np.zeros(slots, bool),
        decoded=decoded,
        computed=computed,
        through=computed,
        work=computed.sum(1),
        visible=np.ones_like(computed),
        confidences=confidences,
        stats=Stats(settings={"confidence": "probability"}),
    )


def test_json_has_everything_and_no_infinity(found, tmp_path):
    found.confidences[2, 7] = -np.inf
    path = trace.write_json(found, tmp_path / "t.json")
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    for step, row in enumerate(read["steps"]):
        computed = np.zeros(found.slots, bool)
        for first, stop in row["computed"]:
            computed[first:stop] = True
        assert np.array_equal(computed, found.computed[step]) and row["full"] == found.full[step]
        assert all(read["slots"][slot]["decoded"] == step for slot in row["decoded"])
        values = {int(s): -np.inf if v is None else v for s, v in row["confidences"].items()}
        assert values == {s: v for s, v in enumerate(found.confidences[step].tolist()) if v == v}
    assert sum(len(row["decoded"]) for row in read["steps"]) == 8
    assert [slot["text"] for slot in read["slots"]] == list(found.texts)


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype)


def test_the_page_holds_the_trace(found):
    data = embedded(trace.page(found))
    kinds = unpacked(data["kinds"], "u1").reshape(found.computed.shape)
    assert np.array_equal(kinds >= COMPUTED, found.computed) and np.array_equal(kinds == HIDDEN, ~found.visible)
    confidences = (unpacked(data["confidences"], "<u2").astype("<u4") << 16).view("<f4").reshape(found.computed.shape)
    np.testing.assert_allclose(confidences, found.confidences, rtol=2**-8, equal_nan=True)
    assert (data["decoded"], data["ids"]) == (found.decoded.tolist(), found.ids.tolist())
    assert (data["prompt"], data["blocks"], data["steps"], data["slots"]) == (4, [4, 8], found.steps, 12)
    assert data["settings"]["seed"] == str(2**61 + 1) and data["rule"] == "probability"


def test_no_token_breaks_out_of_the_page(found):
    count = found.slots
    texts = tuple(HOSTILE[i % len(HOSTILE)] for i in range(count))
    page = trace.page(replace(found, texts=texts, model='<img src=x onerror="alert(1)">'))
    assert embedded(page)["texts"] == list(texts)
    plain = trace.page(replace(found, texts=("a",) * count, model="m"))
    assert page.count("<script") == plain.count("<script") and page.count("</script>") == plain.count("</script>")
    assert page.count("{{") == plain.count("{{") + page.count("{{data}}")
    assert not set("\u2028\u2029\x07\t") & set(page) and "<img" not in page and html.escape("<img") in page


def test_the_page_needs_nothing_else(found):
    page = trace.page(found)
    assert "default-src 'none'" in page and not re.search(r"\{\{\w+\}\}", page)
    own = re.sub(r"<script id=.data.*?</script>|<meta [^>]*>", "", page, flags=re.S)
    assert "<style>" in own and own.count("<script>") == 1
    assert not re.search(r"https?:|url\(|@import|\b(src|href)\s*=|\b(fetch|import|XMLHttpRequest|WebSocket)\b", own)


def test_a_page_of_2000_slots_and_1000_steps_is_small():
    assert len(trace.page(long_trace(1000, 2000, 1000))) < 2_000_000


def pixels(found):
    """The picture, and a function (step from 0, slot, reach) -> its pixel, or [n, n, 3] around it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = picture.figure(found)
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3]

    def at(step, slot, reach=0):
        x, y = figure.axes[0].transData.transform((slot, step + 1))
        y, x = image.shape[0] - 1 - int(y), int(x)
        return image[y - reach : y + reach + 1, x - reach : x + reach + 1] if reach else image[y, x]

    return figure, at


def near(pixel, name):
    colour = [int(picture.COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixel.astype(int) - colour).max(-1) < 12).any()


def test_every_cell_of_the_picture_has_its_colour(found):
    figure, at = pixels(found)
    for step, slot in np.ndindex(found.computed.shape):
        kind = KINDS[found.kinds[step, slot]]
        assert near(at(step, slot), "decoded at this step" if found.decoded[slot] == step else kind)
    axes = figure.axes[0]
    assert axes.get_title("left") == f"DecodeCache(refresh=3) computed {found.computed_share:.0%} of the slots"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["reused", "computed", "full pass", "decoded at this step", "end of the prompt", "start of a block"]
    assert sorted({line.get_xdata()[0] for line in axes.lines}) == [3.5, 7.5]


@pytest.mark.parametrize(("steps", "slots", "prompt"), [(1000, 2000, 600), (5, 2000, 1990), (1000, 20, 0)], ids=str)
def test_decoded_slots_are_seen_in_long_pictures(steps, slots, prompt):
    found = long_trace(steps, slots, prompt)
    figure, at = pixels(found)
    # The first and the last row are thinner than the frame.
    shown = [near(at(found.decoded[slot], slot, reach=2), "decoded at this step") for slot in range(prompt, slots)]
    assert all(shown)
    assert figure.get_size_inches().tolist()[0] == 10 and 3 <= figure.get_size_inches()[1] <= 8
    last = [text.get_text() for text in figure.legends[0].get_texts()][-1]
    assert last == ("end of the prompt" if prompt else "decoded at this step")


def test_the_picture_needs_matplotlib_and_the_page_does_not(found, tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the picture needs matplotlib: pip install 'dkv\[bench\]'"):
        trace.write_picture(found, tmp_path / "t.png")
    assert trace.write_page(found, tmp_path / "t.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_file_is_replaced_when_it_is_whole(found, tmp_path, monkeypatch):
    path = trace.write_page(found, str(tmp_path / "t.html"))
    before = path.read_text("utf-8")
    monkeypatch.setattr(trace, "page", lambda trace: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace.write_page(found, path)
    assert path.read_text("utf-8") == before
    assert trace.write_picture(found, tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.html", "t.png"]


def test_the_page_in_a_browser(found, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium or google-chrome")
    texts = tuple(HOSTILE[i % len(HOSTILE)] for i in range(found.slots))
    # What lies beyond an early end was decoded by no step.
    decoded = np.where(np.arange(found.slots) == found.slots - 1, -1, found.decoded)
    path = trace.write_page(replace(found, texts=texts, decoded=decoded), tmp_path / "t.html")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --v=0 --dump-dom "
        "--disable-background-networking --disable-component-update --virtual-time-budget=5000 --enable-logging=stderr"
    )
    done = subprocess.run(
        [browser, *options.split(), profile, f"{path.as_uri()}#step=3&slot=0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    kinds = re.findall(r'<span data-slot="\d+"[^>]*class="slot (\w+)( computed)?', done.stdout)
    expected = ["prompt" if d < 0 else "mask" if d > 2 else "new" if d == 2 else "old" for d in decoded[:-1]]
    assert [kind for kind, _ in kinds] == [*expected, "old"]
    assert [bool(mark) for _, mark in kinds] == found.computed[2].tolist()
    assert "CONSOLE" not in done.stderr
    said = html.unescape(re.search(r'<span id="detail"[^>]*>(.*?)</span>', done.stdout)[1])
    assert said.startswith(f"slot 0, “{HOSTILE[0]}” (id 5), prompt, ")
