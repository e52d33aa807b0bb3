"""Drafts: where they come from, and which of them a step accepts. No token changes by them.

An int8 cache is the exception: a draft's keys and values are rounded when they are stored, and the rows behind it in
its own step see them unrounded. So a near tie may fall the other way there.
"""
