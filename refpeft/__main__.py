"""`python -m refpeft` is the command `refpeft`."""

from refpeft.cli import main

main()
