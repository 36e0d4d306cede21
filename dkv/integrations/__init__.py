"""dkv inside other libraries: an attention backend of transformers, a model of lm-eval."""
