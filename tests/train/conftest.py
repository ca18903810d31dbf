"""Fixtures that the tests of training share."""

import pytest
from small_run import train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Folder of a finished run of `CONFIG`, to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder
