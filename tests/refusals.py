"""What a data set that cannot be read says."""

import pytest

from libs.data import load_data
from libs.errors import UserError


def refused(*fragments: str, **request) -> None:
    """load_data(**request) raises one line with all the fragments."""
    with pytest.raises(UserError) as caught:
        load_data(**request)
    text = str(caught.value)
    assert "\n" not in text
    for fragment in fragments:
        assert fragment in text, text
