"""What must be refused on every rank, between processes; afterwards everything works as before."""

import pytest

from tests.contracts.bad_input import CASES, still_works


@pytest.mark.parametrize("name", CASES)
def test_on_every_rank(everyone, agreed, name):
    call, error, message = CASES[name]

    def run():
        with pytest.raises(error, match=message) as caught:
            call(everyone)
        assert caught.type is error

    agreed(run)
    agreed(lambda: still_works(everyone))
