"""The tests. No property test depends on how fast the machine is."""

from hypothesis import settings

settings.register_profile("inkdask", deadline=None)
settings.load_profile("inkdask")
