"""`python -m mvcodec` is `mvcodec`."""

from mvcodec.cli import main

if __name__ == "__main__":
    main()
