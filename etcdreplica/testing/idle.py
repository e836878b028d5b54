"""An application that does nothing, to see what protecting it costs: `python idle.py NAME DEGREE STYLE`."""

from __future__ import annotations

import sys

from etcdreplica import Replica, protected

name, degree, style = sys.argv[1], int(sys.argv[2]), sys.argv[3]


@protected(name=name, degree=degree, style=style)
def main(replica: Replica) -> None:
    """Wait for the end."""
    replica.wait()


if __name__ == "__main__":
    main()
