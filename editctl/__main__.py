"""`python -m editctl` is `editctl`."""

from editctl.cli import main

main()
