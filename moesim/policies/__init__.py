"""Policies as small classes with one question each: which copy leaves, what is fetched ahead.

`cache.py` is the place to start: the classes that `moesim.offload.decide` asks. A class of your own
with the same methods can be given wherever a built-in name can.
"""
