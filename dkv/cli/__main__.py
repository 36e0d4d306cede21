"""`python -m dkv.cli`, which is `python -m dkv`."""

from dkv.__main__ import main

if __name__ == "__main__":
    main()
