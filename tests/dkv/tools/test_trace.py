"""The record of a generation, and the page and the picture made of it: what they show is what happened."""

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
from dkv.tools.trace.record import COMPUTED, HIDDEN, KINDS, label, texts_of

CACHES = [dkv.NoCache(), dkv.DecodeCache(3), dkv.PrefillCache(), dkv.PrefillDecodeCache(3), dkv.GreedyCache(3, 2)]
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


@pytest.mark.parametrize("cache", CACHES, ids=label)
def test_a_trace_is_what_the_generation_did(model, cache):
    call = {"max_new_tokens": 8, "block_length": 4, "cache": cache, "seed": 0}
    kept = {f"output_{name}": True for name in ("history", "active", "confidences")}
    output, found = dkv.generate(model, IDS, **call, **kept), trace.record(model, Tokens(), IDS, **call)
    assert (found.steps, found.slots, found.prompt, found.blocks) == (8, 12, 4, (4, 8))
    assert found.ids.tolist() == output.sequences[0].tolist()
    assert np.array_equal(found.computed, output.active[:, 0])
    assert np.array_equal(found.confidences, output.confidences[:, 0], equal_nan=True)
    for step, canvas in enumerate(output.history[:, 0]):
        assert np.array_equal(found.decoded[4:] > step, canvas[4:] == 63)
    assert (found.decoded[:4] == -1).all()
    stats = output.stats
    if model.spec.shifted:
        assert found.computed_share <= stats.computed_share
        return
    cost = (stats.passes, stats.full_passes, stats.computed_share)
    assert (found.passes, found.full.sum(), found.computed_share) == cost


def test_a_step_without_a_pass_and_several_tokens_in_a_step(dream):
    found = trace.record(dream, Tokens(), IDS, max_new_tokens=8, steps=3, confidence="random", cache="decode", seed=0)
    assert found.steps == found.passes <= 3 and set(found.decoded[4:]) <= {0, 1, 2}
    ran = np.arange(found.steps) != 1
    quiet = replace(found, computed=found.computed & ran[:, None], work=found.work * ran)
    assert quiet.passes == found.passes - 1
    assert quiet.computed_share == found.computed[[0, 2]].mean()


def test_slots_beyond_an_early_end_are_not_decoded(llada):
    whole = dkv.generate(llada, IDS, max_new_tokens=10, block_length=5)
    eos = int(whole.sequences[0, 4 + 1])
    found = trace.record(llada, Tokens(), IDS, max_new_tokens=[10], eos_token_id=eos, block_length=5)
    new = found.stats.new_tokens
    assert 0 < new < 10 and (found.decoded[4 : 4 + new] >= 0).all() and (found.decoded[4 + new :] == -1).all()
    assert sum(len(step["decoded"]) for step in found.to_dict()["steps"]) == new


def test_only_one_prompt_and_something_to_generate(llada):
    with pytest.raises(ValueError, match=r"input_ids must be \[1, P\], as a trace is of one prompt; got \[2, 4\]"):
        trace.record(llada, Tokens(), IDS.repeat(2, 1))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        trace.record(llada, Tokens(), IDS, max_new_tokens=0)


def test_the_arguments_of_a_record_are_those_of_generate(llada):
    expected = trace.record(llada, Tokens(), IDS, max_new_tokens=3).ids.tolist()
    ones = torch.ones_like(IDS)
    encoding = {"input_ids": IDS, "attention_mask": ones}
    assert trace.record(llada, Tokens(), encoding, max_length=7).ids.tolist() == expected
    with pytest.raises(ValueError, match="a trace is of one prompt; got padding"):
        trace.record(llada, Tokens(), {"input_ids": IDS, "attention_mask": ones * 0}, max_new_tokens=3)
    for wrong in (None, 5, "abc", [[1, 2]]):
        with pytest.raises(ValueError, match="input_ids must be a tensor"):
            trace.record(llada, Tokens(), wrong)
    for wrong in (5, "abc", {}):
        with pytest.raises(TypeError, match=r"generation_config must be a dkv.DiffusionConfig"):
            trace.record(llada, Tokens(), IDS, wrong)
        with pytest.raises(TypeError, match="tokenizer must be that of the model"):
            trace.record(llada, wrong, IDS)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        trace.record(llada, Tokens(), IDS, max_new_tokens=[0])


def test_the_settings_of_the_caller_are_left_alone(llada):
    config = dkv.DiffusionConfig(max_new_tokens=2)
    assert trace.record(llada, Tokens(), IDS, config, cache="prefill").policy == "PrefillCache()"
    assert not config.output_history and config.cache == dkv.NoCache()


def test_tokens_as_text():
    assert texts_of(Tokens(), [20, 62, 40, 41, 42, 5]) == [" w20", "<|end|>", "日", "", "", "\n"]
    assert texts_of(Tokens(), [40, 41, 20, 42]) == ["\ufffd", "\ufffd", " w20", "\ufffd"]
    assert texts_of(Tokens(), []) == []


def test_policies_are_written_as_in_python():
    assert label(dkv.DecodeCache(8)) == "DecodeCache(refresh=8)" and label(dkv.NoCache()) == "NoCache()"
    assert (
        label(dkv.PrefillDecodeCache(4, shift_rule="un_right"))
        == "PrefillDecodeCache(refresh=4, shift_rule='un_right')"
    )
    assert (
        label(dkv.GreedyCache(2, 0, window_center="last")) == "GreedyCache(refresh=2, window=0, window_center='last')"
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
    path = trace.write_page(replace(found, texts=texts), tmp_path / "t.html")
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
    expected = ["prompt" if d < 0 else "mask" if d > 2 else "new" if d == 2 else "old" for d in found.decoded]
    assert [kind for kind, _ in kinds] == expected
    assert [bool(mark) for _, mark in kinds] == found.computed[2].tolist()
    assert "CONSOLE" not in done.stderr
    said = html.unescape(re.search(r'<span id="detail"[^>]*>(.*?)</span>', done.stdout)[1])
    assert said.startswith(f"slot 0, “{HOSTILE[0]}” (id 5), prompt, ")
