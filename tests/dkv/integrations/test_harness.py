"""dkv as a model of lm-eval, called as lm-eval calls it, with a small random model."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

import dkv
from dkv.integrations.lm_eval.harness import DkvLM
from dkv.models import ModelSpec, Transformer
from dkv.models.export import save_model, save_tokenizer
from dkv.serving.request import Request
from dkv.tools.likelihood import are_greedy, log_likelihoods
from dkv.tools.text import answer, encode
from tests.dkv.conftest import small_model

ALPHABET, EOS, MASK, BOS, EOT, VOCABULARY = "0123456789+-= ", 14, 15, 16, 17, 20
TEMPLATE = "<|bos|>{% for m in messages %}-{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model that never ends, whose tokenizer has a start token, a second end and a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    spec = ModelSpec(
        family="llada",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        max_positions=64,
        rope_theta=10000.0,
        norm_eps=1e-5,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
        linear_bias=False,
    )
    model = Transformer(spec)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    model.head.weight.data[EOS:] *= 0.01
    save_model(model, folder)
    save_tokenizer(folder, ALPHABET, EOS, MASK)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"bos_token": "<|bos|>", "additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture
def lm(folder):
    """lm(cache="decode", ...): the random model with these model_args."""

    def make(**given) -> DkvLM:
        given = {"max_new_tokens": 12, "seed": 5, **given}
        return DkvLM(str(folder), **{name: value for name, value in given.items() if value is not None})

    return make


def asked(*requests, kind="generate_until"):
    return [Instance(kind, {}, request, i) for i, request in enumerate(requests)]


def texts(lm, *prompts, **kwargs):
    return lm.generate_until(asked(*((prompt, kwargs) for prompt in prompts)), disable_tqdm=True)


PROMPTS = ("1+", "12-34=", "7", "0 1 2 3 4 5=")


def test_texts_are_those_of_generate_for_each_prompt_alone(lm):
    found = texts(lm(cache="decode", refresh=4, batch_size="3", steps=6, remasking="low_confidence"), *PROMPTS)
    model = lm()
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids, mask = encode(model.tokenizer, [prompt])
        output = dkv.generate(
            model.model, ids, mask, max_new_tokens=12, steps=6, cache=dkv.DecodeCache(refresh=4), vocab_limit=18
        )
        assert text == answer(model.tokenizer, model.model.spec, output.sequences[0, ids.shape[1] :].tolist())
        assert len(text) == 12


def test_texts_are_cut_at_the_first_of_the_stop_strings(lm):
    model = lm()
    (whole,) = texts(model, "1+")
    late, early = whole[8:10], whole[3:5]
    first = min(whole.index(late), whole.index(early))
    assert texts(model, "1+", until=[late, "", "never", early]) == [whole[:first]]
    assert texts(model, "1+", until=late) == [whole[: whole.index(late)]]


@pytest.mark.parametrize(
    ("until", "text"), [([], "12345"), (["<|eot|>"], "12"), (["4"], "123"), (["<|eot|>", "2"], "1"), (["45"], "123")]
)
def test_ends_and_special_stop_strings_are_not_in_the_text(lm, monkeypatch, until, text):
    model = lm(max_new_tokens=8)
    end = Request.end

    def replaced(self, state, tokens=None, **how):
        end(self, state, torch.tensor([1, 2, EOT, 3, 4, 5, EOS, 6]), **how)

    monkeypatch.setattr(Request, "end", replaced)
    assert texts(model, "1+", until=until) == [text]


def test_each_task_gets_its_settings_and_texts_come_in_order(lm):
    model = lm(max_new_tokens=None)
    requests = [("1+", {"max_gen_toks": n, "until": []}) for n in (5, 9, 5)] + [("12-34=", {"max_gen_toks": 9})]
    assert [len(text) for text in model.generate_until(asked(*requests), disable_tqdm=True)] == [5, 9, 5, 9]
    info = model.get_model_info()["dkv"]["generation"]
    assert sorted((part["requests"], part["settings"]["max_new_tokens"]) for part in info) == [(2, 5), (2, 9)]


def test_repeated_requests_get_samples_of_their_own(lm):
    sampled = {"do_sample": True, "temperature": 1.0}
    first = texts(lm(batch_size=4), "1+", "1+", "7", "1+", **sampled)
    assert len({first[0], first[1], first[3]}) == 3
    assert texts(lm(), "1+", "1+", "7", "1+", **sampled) == first
    assert texts(lm(seed=6), "1+", **sampled) != first[:1]
    greedy = texts(lm(), "1+", "1+")
    assert greedy[0] == greedy[1]


def test_a_row_that_ends_makes_room_for_the_next(lm):
    """Of batches in turn the passes would be those of the longest rows of each."""
    model = lm(max_new_tokens=None, batch_size=2, eos_token_id=[3, 7])
    requests = [(f"{a}{b}+", {"max_gen_toks": 32}) for a in "01" for b in "4567"]
    found = model.generate_until(asked(*requests), disable_tqdm=True)
    (part,) = model.get_model_info()["dkv"]["generation"]
    passes = []
    for (prompt, _), text in zip(requests, found, strict=True):
        ids, _ = encode(model.tokenizer, [prompt])
        how = {"max_new_tokens": 32, "eos_token_id": [3, 7], "vocab_limit": 18}
        output = dkv.generate(model.model, ids, **how)
        assert text == answer(model.tokenizer, model.model.spec, output.sequences[0, ids.shape[1] :].tolist())
        passes.append(output.stats.passes)
    assert len(set(passes)) > 2 and sum(passes) / 2 <= part["passes"] < sum(map(max, passes[::2], passes[1::2]))
    assert part["requests"] == 8 and 0 < part["computed_share"] <= 1


def test_drafts_are_verified_in_batches(lm):
    """Their rows cannot be joined yet."""
    model = lm(max_new_tokens=9, batch_size=2, schedule="speculative", eos_token_id=[])
    model.model = small_model(attention="prefix_causal", block_length=4, blocks_from_prompt=True, seeded=True)
    found = texts(model, *PROMPTS[:3])
    for prompt, text in zip(PROMPTS, found, strict=False):
        ids, _ = encode(model.tokenizer, [prompt])
        output = dkv.generate(model.model, ids, max_new_tokens=9, schedule="speculative", eos_token_id=[])
        assert text == answer(model.tokenizer, model.model.spec, output.sequences[0, ids.shape[1] :].tolist())
    (part,) = model.get_model_info()["dkv"]["generation"]
    assert (part["requests"], part["new_tokens"]) == (3, 27)


def test_sampling_without_a_temperature_has_that_of_transformers(lm):
    hot = texts(lm(), "1+", do_sample=True)
    assert hot == texts(lm(), "1+", do_sample=True, temperature=1.0)
    assert hot != texts(lm(), "1+", do_sample=False)


def test_what_model_args_state_goes_before_the_task_with_a_warning(lm, caplog):
    model = lm(temperature=0.5)
    assert len(texts(model, "1+", max_gen_toks=30, do_sample=False)[0]) == 12
    assert "max_new_tokens: 12 of model_args is used, not 30 of the task" in caplog.text
    assert "temperature: 0.5 of model_args is used, not 0.0 of the task" in caplog.text
    assert len(texts(lm(max_new_tokens=None, gen_length=7), "1+", steps=3, block_length=4)[0]) == 7
    caplog.clear()
    texts(lm(), "1+", temperature=0.0, num_beams=1)
    assert not caplog.records


@pytest.mark.parametrize(
    "given", [{"parallelize": False}, {"peft": None}, {"revision": "main"}, {"load_in_4bit": False}, {"tokenizer": ""}]
)
def test_arguments_of_other_models_that_ask_for_nothing_are_taken(lm, given):
    assert texts(lm(**given), "1+") == texts(lm(), "1+")


def test_only_the_default_device_of_lm_eval_becomes_the_cpu(lm, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lm(device="cuda:0").device.type == "cpu" and "using the CPU" in caplog.text
    with pytest.raises(ValueError, match="device='cuda:3' cannot be used here"):
        lm(device="cuda:3")


@pytest.mark.parametrize(
    ("given", "kwargs", "message"),
    [
        ({}, {"stepz": 3}, "unknown setting 'stepz'"),
        ({}, {"max_length": 30}, "give max_gen_toks"),
        ({"max_new_tokens": 64}, {}, "64 new tokens leave no room for a prompt: the model has 64 positions"),
        ({}, {"block_length": 2, "steps": 3}, "12 new tokens in blocks of 2 need 6"),
        ({"block_length": 64, "max_new_tokens": None}, {"steps": 1, "max_gen_toks": 65}, "need 2"),
    ],
)
def test_wrong_settings_of_a_task_are_refused_before_the_first_pass(lm, given, kwargs, message):
    model = lm(**given)
    requests = asked(("1+", {**kwargs}), ("7", {"max_gen_toks": 4}))
    with pytest.raises(ValueError, match=message):
        model.generate_until(requests[::-1], disable_tqdm=True)
    assert not model.generated


def test_prompts_that_are_too_long_lose_their_beginning_and_are_counted(lm, caplog):
    model = lm()
    long = "9" * 20 + "1" * 52
    assert texts(model, long, "7") == texts(lm(), "1" * 52, "7")
    assert "1 prompts are too long" in caplog.text
    assert model.get_model_info()["dkv"]["truncated_prompts"] == 1


def test_likelihoods_are_those_of_their_tokens(lm):
    model = lm(mc_num=20, batch_size=3)
    pairs = [("12+3=", "15"), ("12+3=", "16"), ("7", "0123456789"), ("", "42"), ("1 ", "2")]
    found = model.loglikelihood(asked(*pairs, kind="loglikelihood"), disable_tqdm=True)
    ids = {c: i for i, c in enumerate(ALPHABET)}
    # A space that ends a prompt belongs to the answer; a start token stands in for no prompt.
    split = [("12+3=", "15"), ("12+3=", "16"), ("7", "0123456789"), ("", "42"), ("1", " 2")]
    questions = [([ids[c] for c in prompt] or [BOS], [ids[c] for c in answer]) for prompt, answer in split]
    right = dict(log_likelihoods(model.model, questions, samples=20, seed=5))
    greedy = dict(are_greedy(model.model, questions))
    assert [value for value, _ in found] == pytest.approx([right[i] for i in range(5)], abs=1e-4)
    assert [given for _, given in found] == [greedy[i] for i in range(5)]


def test_whether_an_answer_is_greedy_is_found_out_unless_refused(lm):
    (text,) = texts(lm(max_new_tokens=4), "12+3=")
    request = asked(("12+3=", text), kind="loglikelihood")
    assert lm().loglikelihood(request, disable_tqdm=True)[0][1] is True
    assert lm(is_check_greedy=False).loglikelihood(request, disable_tqdm=True)[0][1] is False


def test_results_are_handed_to_the_cache_of_lm_eval(lm):
    class Hook(list):
        def add_partial(self, *entry):
            self.append(entry)

    model, hook = lm(), Hook()
    model.set_cache_hook(hook)
    (text,) = texts(model, "1+", max_gen_toks=12)
    assert hook == [("generate_until", ("1+", {"max_gen_toks": 12}), text)]
    found = model.loglikelihood(asked(("1+", "2"), kind="loglikelihood"), disable_tqdm=True)
    assert hook[1:] == [("loglikelihood", ("1+", "2"), found[0])]


def test_perplexities_are_refused(lm):
    with pytest.raises(ValueError, match="generation and multiple choice"):
        lm().loglikelihood_rolling(asked(("12",), kind="loglikelihood_rolling"))


def test_chats_are_put_into_the_template_and_a_started_answer_stays_open(lm):
    model = lm()
    talk = [{"role": "user", "content": "1+1"}]
    assert model.apply_chat_template(talk) == "<|bos|>-1+1="
    assert model.chat_template(True) == TEMPLATE
    started = [*talk, {"role": "assistant", "content": "4"}]
    assert model.apply_chat_template(started, add_generation_prompt=False) == "<|bos|>-1+1-4"
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="leave out --apply_chat_template"):
        model.apply_chat_template(talk)


def test_prompts_begin_with_one_start_token_at_most(lm):
    assert lm().tok_encode("12") == [1, 2]
    assert lm().tok_encode("<|bos|>12") == [BOS, 1, 2]
    assert lm(add_bos_token=True).tok_encode("12") == [BOS, 1, 2]
    assert lm(add_bos_token=True).tok_encode("<|bos|>12") == [BOS, 1, 2]
    eager = lm()
    eager._adds_bos = True
    assert eager._begun("<|bos|>12") == "12"


def test_results_tell_work_speed_seed_settings_and_versions(lm):
    model = lm(cache="decode", refresh=6, batch_size=2)
    texts(model, *PROMPTS)
    model.loglikelihood(asked(("1+", "2"), kind="loglikelihood"), disable_tqdm=True)
    info = json.loads(json.dumps(model.get_model_info()))
    assert info["model_num_parameters"] == model.model.num_parameters
    (part,) = info["dkv"]["generation"]
    assert (part["requests"], part["new_tokens"], part["passes"]) == (4, 48, 24)
    assert 0 < part["computed_share"] < 1
    assert part["tokens_per_second"] == pytest.approx(48 / part["seconds"])
    assert part["settings"]["cache"]["refresh"] == 6
    assert part["settings"]["torch"] == info["dkv"]["versions"]["torch"]
    assert part["seed"] == info["dkv"]["seed"] == 5
    # One pass for the only mask there is.
    assert (info["dkv"]["likelihood"]["requests"], info["dkv"]["likelihood"]["passes"]) == (1, 1)


def test_the_seed_is_that_of_lm_eval_unless_stated(folder):
    torch.manual_seed(77)
    assert DkvLM(str(folder)).get_model_info()["dkv"]["seed"] == 77
