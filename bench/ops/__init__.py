"""Micro-benchmarks: every operation at the sizes of LLaDA-8B and Dream-7B steps, computed in several ways.

Run in a checkout, with the extra `test` installed, on an idle machine:

    pytest bench/ --benchmark-only                             all, about 4 minutes on two CPU cores
    pytest bench/ --benchmark-only -k attention                one operation
    pytest bench/ --benchmark-only -k "llada and cached and b1"
    pytest bench/ --benchmark-only -k commit --benchmark-json=result.json
    pytest bench/ --collect-only -q                            what there is

-rs adds what was left out, and why. On a GPU the sizes are whole, in bfloat16. On a CPU they are scaled, in float32:
an eighth of the vocabulary and of LLaDA's heads, and a quarter of Dream's, which leaves seven to its one key head.
The ways:

    eager    as the published code or common practice has it: key heads repeated, a float mask, fresh and kept keys
             and values joined and put in order, a float64 softmax (Dream: in the dtype of the logits) of all rows
    sdpa     torch's scaled_dot_product_attention
    flex     flex attention, compiled for the shape
    torch    dkv's torch backend
    triton   dkv's Triton backend, on a GPU

Before a way is timed its result is compared with the definition of the operation, backend "reference", on the same
inputs in float64; one that differs fails and has no time. Every way gets the same slots: what dkv saves by choosing
fewer of them is measured end to end, by `dkv bench`.
"""
