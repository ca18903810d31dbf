"""Data and models that the probes' tests share."""

import pytest
from hypothesis import settings
from small_probe import write_pictures

settings.register_profile("eval", deadline=None, database=None, max_examples=50)
settings.load_profile("eval")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))
