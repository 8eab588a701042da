"""A pool's place on the Hub as one string."""

import pytest

from peft_xmask.core.hub import HubPath
from peft_xmask.errors import ConfigError

NAMES = {
    "owner/name": HubPath("owner/name"),
    "name": HubPath("name"),
    "name@v1": HubPath("name", "v1"),
    "owner/name@v1": HubPath("owner/name", "v1"),
    "owner/name/sub": HubPath("owner/name", None, "sub"),
    "owner/name/sub/folder": HubPath("owner/name", None, "sub/folder"),
    "owner/name@refs%2Fpr%2F1/sub": HubPath("owner/name", "refs/pr/1", "sub"),
    "owner/name/odd@sub": HubPath("owner/name", None, "odd@sub"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_where_and_is_given_back(name):
    assert HubPath.parse(name) == NAMES[name]
    assert NAMES[name].name == name


def test_what_the_name_leaves_open_comes_from_the_arguments():
    assert HubPath.parse("owner/name", "v1", "sub") == HubPath("owner/name", "v1", "sub")
    assert HubPath.parse("owner/name@v1", "v1") == HubPath("owner/name", "v1")
    assert HubPath.parse("owner/name/outer", None, "inner") == HubPath("owner/name", None, "outer/inner")


def test_two_revisions_are_refused():
    with pytest.raises(ConfigError, match="'owner/name@v1' names a revision, and revision='v2' is another"):
        HubPath.parse("owner/name@v1", "v2")
