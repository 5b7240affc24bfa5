"""The tests. No property test depends on how fast the machine is, or on chance."""

from hypothesis import settings

settings.register_profile("inkdask", deadline=None, derandomize=True)
settings.load_profile("inkdask")
