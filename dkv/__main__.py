"""The command line as a process: `python -m dkv`, and the script `dkv`."""

from dkv.common import process


def main() -> None:
    """Run the arguments of the process, and end it."""
    process.begin("dkv")
    # Only now, as it takes a moment.
    from dkv.cli import main as command_line

    process.run(command_line)


if __name__ == "__main__":
    main()
