"""The subcommands of `dkv`, one module each: SUMMARY, EXAMPLES, `add_arguments(parser)` and `run(args) -> exit code`.

Heavy imports stand inside the functions, so that `dkv --help` does not wait for torch.
"""
