"""The command line of EleutherAI's lm-evaluation-harness, with `dkv` among its models.

    python -m dkv.lm_eval run --model dkv --model_args pretrained=tiny,cache=decode,refresh=8 --tasks ...

lm-eval finds models of other packages by an entry point of the group `lm_eval.models`, which dkv has.
Release 0.4.13 does not look for it yet: a model must be in its registry before the command line runs.
"""

from dkv.common import process


def register() -> None:
    """Put `dkv` into lm-eval's registry of models, if it is not there.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
    """
    try:
        # Fills the registry, which lm-eval otherwise does only while that is empty.
        import lm_eval.models  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ModuleNotFoundError("lm-eval is not installed: pip install 'dkv[eval]'", name="lm_eval") from None
    from lm_eval.api.registry import model_registry

    if "dkv" not in model_registry:
        model_registry.register("dkv", target="dkv.integrations.lm_eval.harness:DkvLM")


def main() -> None:
    """Run lm-eval's own command line on the arguments of the process."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    process.begin("python -m dkv.lm_eval")
    # What lm-eval raises is its own: it keeps its traceback.
    process.run(main, errors=())
