"""For those who change kernels: what `dkv audit` compiles and checks, and the search of `DKV_AUTOTUNE=1`."""
