"""Entry point: the image starts this directory with `python3 -I -S -u`."""

from agent import main

main()
