"""The calls: one plain function builds each, with the parameters that both clients' methods take.

A parameter that is None is left out: the service's default holds.
"""
