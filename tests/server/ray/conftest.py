"""Ray takes seconds to import: it is done for the tests that need it, and not when tests are collected."""

import warnings

import pytest


@pytest.fixture(scope="session")
def handles():
    """The module of that name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of pydantic
        from tests.server.ray import handles

    return handles
