"""Spoiled inputs by the thousand: each is read rightly, or refused in one sentence.

A module beside this one is a target. Its `opened` yields a function that makes one input from a
random generator, reads it in a folder of its own, and returns ``"read"`` where the result equals
the oracle. An `InkdaskError` counts as refused, and everything else as a failure.
"""
