"""The guardian of a host: the parent of everything that runs there, and its last line of fencing.

A WatchDog may crash, hang or be upgraded; the guardian only starts programs, remembers what it is told of them, and kills
each one at its deadline unless that was moved on in time. It is small, has one thread and waits for nothing but its poll.
When it dies itself, the kernel kills what it started; when it is stopped, a kernel timer kills it.
"""
