"""`python -m etcdreplica` is the `etcdreplica` command."""

from etcdreplica.cli import main

main()
