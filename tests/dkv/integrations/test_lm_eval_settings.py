"""What `model_args` of lm-eval may be: seen before a model is loaded."""

import pytest

pytest.importorskip("lm_eval")

from dkv.integrations.lm_eval.harness import DkvLM


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"refersh": 8}, r"unknown setting 'refersh'; did you mean 'refresh'\?$"),
        ({"cache": "decode", "refesh": 8}, r"unknown setting 'refesh'; did you mean 'refresh'\?$"),
        ({"windowcentre": "last"}, "did you mean 'window_center'"),
        ({"batchsize": 8}, "did you mean 'batch_size'"),
        ({"zzz": 8}, "unknown setting 'zzz'; known are max_new_tokens, max_length, steps"),
        ({"cache": "decod"}, "unknown policy 'decod'; did you mean 'decode'"),
        ({"cache": {"name": "decode", "refesh": 8}}, r"has no refesh \(did you mean 'refresh'\?\); it takes"),
        ({"stepz": 8}, "did you mean 'steps'"),
        ({"refresh": 8}, "policy 'none' has no refresh"),
        ({"cache": "decode", "window": 2}, "policy 'decode' has no window; it takes"),
        ({"cache": "lru"}, "unknown policy 'lru'; known are"),
        ({"temperature": -1.0}, "temperature must be between"),
        ({"seed": None}, "seed must be a whole number; leave it out"),
        ({"seed": [1, 2]}, "seed must be one value for all requests"),
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1, got 'auto'; dkv does not search"),
        ({"batch_size": "auto:4"}, "got 'auto:4'; dkv does not search for it: give a number, such as 8"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0$"),
        ({"batch_size": "abc"}, "batch_size must be a whole number of at least 1, got 'abc'$"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"add_bos_token": "no"}, "add_bos_token must be True or False, got 'no'"),
        ({"is_check_greedy": 0}, "is_check_greedy must be True or False, got 0"),
        ({"parallelize": True}, "parallelize=True has no meaning here: dkv runs a model on one device"),
        ({"device_map": "auto"}, "device_map='auto' has no meaning here"),
        ({"load_in_8bit": True}, "dkv runs weights in float32, bfloat16 or float16"),
        ({"peft": "folder"}, "dkv loads no adapters"),
        ({"revision": "v2"}, "give a local folder as pretrained; leave revision out"),
        ({"max_length": 4096}, "max_length counts the prompt, too"),
        ({"mc_num": 0}, "mc_num must be a whole number"),
        ({"max_batch_size": 8}, "give batch_size"),
    ],
)
def test_wrong_model_args_are_refused_before_a_model_is_loaded(given, message):
    with pytest.raises(ValueError, match=message):
        DkvLM("no/such/model", **given)


def test_a_model_must_be_named():
    with pytest.raises(ValueError, match="give model_args pretrained=NAME"):
        DkvLM(cache="decode")
