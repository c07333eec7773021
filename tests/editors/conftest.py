import pytest


@pytest.fixture(autouse=True)
def _own_cache(own_cache):
    """For every test here."""
