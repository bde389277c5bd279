"""`python -m wandapp` is the command `wandapp`."""

from wandapp.cli import main

if __name__ == "__main__":
    main()
